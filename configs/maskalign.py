"""MaskAlign pre-training (Xue et al. 2023, arXiv 2211.08887).

  mim-jax convert clip-vit-base-patch16/ --out=clip_b16.safetensors
  python -m mim_jax.train --config=configs/maskalign.py --workdir=runs/maskalign_b \\
    --config.frozen.path=clip_b16.safetensors
  python -m mim_jax.train --config=configs/maskalign.py:size=L,teacher=clip-l14 --workdir=runs/maskalign_l \\
    --config.frozen.path=clip_l14.safetensors
  bash launch/local.sh configs/maskalign.py:debug               a laptop, offline, with a teacher of random weights
  bash launch/local.sh configs/maskalign.py:debug,teacher=mae \\
    --config.frozen.path=runs/mae                               the same, taught by a debug run of configs/mae.py

ImageNet top-1 after fine-tuning (ModelCard.md of OpenDriveLab/maskalign; not measured here): ViT-B 85.4, ViT-L 86.5
with CLIP-B/16, ViT-L 87.4 with CLIP-L/14.
"""

from mim_jax import config, method
from mim_jax.errors import ConfigError, nearest
from mim_jax.evals import suite
from mim_jax.models import vit

# The three teachers of the official code (README.md), and MAE, which it does not have.
TEACHERS = {
  'clip-b16': dict(kind='clip', size='B', patch=16, image_size=224),
  'clip-l14': dict(kind='clip', size='L', patch=14, image_size=196),  # 196 pixels give the student's 14 x 14 patches
  'dino-b16': dict(kind='dino', size='B', patch=16, image_size=224),
  'mae': dict(kind='mae', size='B', patch=16, image_size=224),
}


def get_config(arg=''):
  args = config.arguments(arg, size='B', teacher='clip-b16', debug=False)
  if args.teacher not in TEACHERS:
    raise ConfigError(f'recipe argument teacher={args.teacher}; {nearest(args.teacher, TEACHERS)}')
  teacher = TEACHERS[args.teacher]
  cfg = config.base()
  cfg.method = method.options(
    'maskalign',  # README.md of OpenDriveLab/maskalign, as all that follows; its code's own defaults differ
    size=args.size,
    drop_path=0.2 if args.size == 'L' else 0.1,
    # The published L from CLIP-B/16 cannot have used 'linear', which needs equal depths; its flag is not documented.
    fusion='linear' if vit.size(args.size)['depth'] == vit.size(teacher['size'])['depth'] else 'sum',
    teacher=teacher,
  )
  cfg.method.dtype = 'bfloat16'  # the official code: half precision with loss scaling, which bfloat16 does not need

  cfg.data.source = 'tfds:imagenet2012:train'
  cfg.data.transforms = 'decode | random_resized_crop(224, scale=(0.2, 1.0)) | flip | normalize'  # main_pretrain.py
  cfg.batch_size = 1024  # README.md: 8 x 128
  cfg.duration = '200 epochs'
  cfg.optim.name = 'adamw'
  cfg.optim.base_lr = 1.5e-4
  cfg.optim.b1, cfg.optim.b2 = 0.9, 0.95  # main_pretrain.py
  cfg.optim.wd = 0.05  # main_pretrain.py
  cfg.optim.no_wd = r'bias$|scale$|^mix$'  # main_pretrain.py: one-dimensional tensors and distill_weights
  cfg.schedule.warmup = '20 epochs'
  cfg.schedule.min_lr = 1e-5
  cfg.mesh.fsdp = -1
  cfg.mesh.data = 1
  if args.debug:
    return debug(cfg, args.teacher)
  probe = {  # README.md: 90 epochs, batch 16384, base rate 0.025, class token and BatchNorm
    'every': 'end',
    'test': ':validation',
    'baselines': (),
    'augment': True,
    'train_transforms': 'decode | one_shot_crop(224) | flip | normalize',
    'batch_size': 1024,
    'train_batch': 16384,
    'epochs': 90,
    'base_lr': 0.025,
    'trust': 0.001,
    'features': 'cls',
  }
  finetune = {  # README.md: B | L; mixing, smoothing and augmentation are the defaults of MAE's main_finetune.py
    'every': 'never',  # a training of its own: mim-jax eval --workdir=runs/maskalign_b --evals=finetune
    'test': ':validation',
    'baselines': (),
    'train_transforms': (
      'decode | random_resized_crop(224, scale=(0.08, 1.0)) | flip | rand_augment(9, std=0.5, ops=2) | normalize'
      ' | random_erasing(p=0.25)'
    ),
    'batch_size': 1024,
    'train_batch': 1024,
    'epochs': 50 if args.size == 'L' else 100,
    'warmup_epochs': 5,
    'base_lr': 3e-4,
    'min_lr': 1e-6,
    'layer_decay': 0.75 if args.size == 'L' else 0.55,
    'drop_path': 0.4 if args.size == 'L' else 0.2,
  }
  cfg.evals = {
    'knn': suite.settings(
      'knn', {'every': '20 epochs', 'train': ':train[:10%]', 'test': ':validation', 'baselines': ()}
    ),
    'linear': suite.settings('linear', probe),
    'finetune': suite.settings('finetune', finetune),
  }
  return cfg


def debug(cfg, teacher: str):
  """The same method on rendered scenes of 64 pixels: trains offline on two CPU cores in about two minutes.

  The teacher is of the size of the debug recipe of MAE. Unless `config.frozen.path` names one, its weights are random;
  what the student then learns is how such a network mixes the patches that it does not see.
  """
  kind = TEACHERS[teacher]['kind']
  cfg.method = method.options(
    'maskalign',
    size='128/4/4',
    patch=8,
    image_size=64,
    scan=False,
    drop_path=0.0,
    levels='top2',
    teacher=dict(kind=kind, size='128/4/4', patch=8, image_size=64),
  )
  cfg.data.source = 'synthetic:shapes/train=4000,validation=1000,textures=false,others=0:train'
  cfg.data.transforms = 'decode | random_resized_crop(64, scale=(0.5, 1.0)) | flip | normalize'
  cfg.data.eval_transforms = 'decode | normalize'
  config.laptop(cfg, steps=1000, base_lr=1e-3)
  evaluation = {'test': ':validation', 'batch_size': 256}
  fit = evaluation | {  # a training of its own, from 1,000 labelled images: mim-jax eval --evals=finetune
    'every': 'never',
    'train': ':train[:1000]',
    'train_transforms': cfg.data.transforms,
    'train_batch': 64,
    'base_lr': 4e-3,
    'layer_decay': 0.75,
    'drop_path': 0.1,
  }
  cfg.evals = {
    'knn': suite.settings('knn', evaluation | {'features': 'max'}),
    'linear': suite.settings('linear', evaluation | {'features': 'mean', 'trust': 0.03}),
    'finetune': suite.settings('finetune', fit | {'epochs': 20, 'warmup_epochs': 2, 'mixup': 0, 'cutmix': 0}),
  }
  return cfg
