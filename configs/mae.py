"""MAE pre-training (He et al. 2022, arXiv 2111.06377).

  python -m mim_jax.train --config=configs/mae.py --workdir=runs/mae_b                      ViT-B/16, 800 epochs of ImageNet
  python -m mim_jax.train --config=configs/mae.py:size=L,epochs=1600 --workdir=runs/mae_l   the published weights
  bash launch/local.sh configs/mae.py:debug                                                 a laptop, offline, two minutes

The paper's ViT-L, 1600 epochs: 85.9 % ImageNet top-1 after fine-tuning, 75.8 % by linear probe (paper table 3 and README of
facebookresearch/mae; not measured here).
"""

from mim_jax import config, method
from mim_jax.evals import suite


def get_config(arg=''):
  args = config.arguments(arg, size='B', epochs=800, debug=False)
  cfg = config.base()
  patch = 14 if args.size == 'H' else 16  # paper section 4.2: ViT-H/14
  cfg.method = method.options('mae', size=args.size, patch=patch)
  cfg.method.dtype = 'bfloat16'  # the authors' code: half precision with loss scaling, which bfloat16 does not need
  # Unrolled, ViT-B takes three quarters of the cycles of a loop on TPUs and twice its time to compile (docs/performance.md).
  cfg.method.scan = args.size in ('L', 'H')

  cfg.data.source = 'tfds:imagenet2012:train'
  cfg.data.transforms = 'decode | random_resized_crop(224, scale=(0.2, 1.0)) | flip | normalize'  # paper table 8
  cfg.batch_size = 4096  # paper table 8
  cfg.duration = f'{args.epochs} epochs'  # paper table 8 and section 4: 800, and 1600 for the published weights
  cfg.optim.name = 'adamw'  # paper table 8, as are rate, betas and decay
  cfg.optim.base_lr = 1.5e-4
  cfg.optim.b1, cfg.optim.b2 = 0.9, 0.95
  cfg.optim.wd = 0.05
  # Without decay: one-dimensional tensors (facebookresearch/mae, main_pretrain.py), the default; class and mask token are decayed.
  cfg.schedule.warmup = '40 epochs'  # paper table 8
  cfg.mesh.fsdp = -1
  cfg.mesh.data = 1
  if args.debug:
    return debug(cfg)
  probe = {  # facebookresearch/mae, main_linprobe.py and its README
    'every': 'end',
    'test': ':validation',
    'baselines': (),
    'augment': True,
    'train_transforms': 'decode | one_shot_crop(224) | flip | normalize',
    'batch_size': 1024,
    'train_batch': 16384,
    'epochs': 90 if args.size == 'B' else 50,
    'trust': 0.001,
    'features': 'cls',
  }
  finetune = {  # facebookresearch/mae, FINETUNE.md and main_finetune.py: base | large | huge
    'every': 'never',  # a training of its own: mim-jax eval --workdir=runs/mae_b --evals=finetune
    'test': ':validation',
    'baselines': (),
    'train_transforms': (
      'decode | random_resized_crop(224, scale=(0.08, 1.0)) | flip | rand_augment(9, std=0.5, ops=2) | normalize'
      ' | random_erasing(p=0.25)'
    ),
    'batch_size': 1024,
    'train_batch': 1024,
    'epochs': 100 if args.size == 'B' else 50,
    'warmup_epochs': 5,
    'base_lr': 5e-4 if args.size == 'B' else 1e-3,
    'min_lr': 1e-6,
    'layer_decay': 0.65 if args.size == 'B' else 0.75,
    'drop_path': {'B': 0.1, 'L': 0.2, 'H': 0.3}.get(args.size, 0.1),
  }
  cfg.evals = {
    'knn': suite.settings(
      'knn', {'every': '50 epochs', 'train': ':train[:10%]', 'test': ':validation', 'baselines': ()}
    ),
    'linear': suite.settings('linear', probe),
    'finetune': suite.settings('finetune', finetune),
  }
  return cfg


def debug(cfg):
  """The same method on rendered scenes of 64 pixels: trains offline on two CPU cores in about two and a half minutes."""
  cfg.method = method.options('mae', size='128/4/4', decoder='64/1/4', patch=8, image_size=64, scan=False)
  cfg.data.source = 'synthetic:shapes/train=4000,validation=1000,textures=false,others=0:train'
  cfg.data.transforms = 'decode | random_resized_crop(64, scale=(0.5, 1.0)) | flip | normalize'
  cfg.data.eval_transforms = 'decode | normalize'
  config.laptop(cfg, steps=1500, base_lr=2e-3)
  evaluation = {'test': ':validation', 'batch_size': 256}
  fit = evaluation | {  # trainings of their own, from 1,000 labelled images: mim-jax eval --evals=finetune,segment
    'every': 'never',
    'train': ':train[:1000]',
    'train_transforms': cfg.data.transforms,
    'train_batch': 32,
    'base_lr': 8e-3,
    'layer_decay': 0.75,
    'drop_path': 0.1,
  }
  cfg.evals = {
    'knn': suite.settings('knn', evaluation | {'features': 'max'}),
    'linear': suite.settings('linear', evaluation | {'features': 'mean', 'trust': 0.03}),
    'finetune': suite.settings('finetune', fit | {'epochs': 10, 'warmup_epochs': 1, 'mixup': 0, 'cutmix': 0}),
    'segment': suite.settings('segment', fit | {'epochs': 8, 'classes': 13, 'decoder': 'conv', 'frozen': False}),
  }
  return cfg
