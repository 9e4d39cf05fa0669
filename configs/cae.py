"""CAE pre-training (Chen et al. 2022, arXiv 2202.03026), and CAE v2 (Zhang et al. 2022, arXiv 2211.09799).

  python -m mim_jax.train --config=configs/cae.py --workdir=runs/cae_b    ViT-B/16, 300 epochs of ImageNet
  python -m mim_jax.train --config=configs/cae.py:size=L,epochs=1600 --workdir=runs/cae_l   as the published Large
  python -m mim_jax.train --config=configs/cae.py:version=2 --workdir=runs/cae_v2_b         CLIP's features as targets
  bash launch/local.sh configs/cae.py:debug                                                 a laptop, offline

The tokenizer is DALL-E's encoder: `python -m mim_jax.official.cae encoder.pkl tokenizer.safetensors` makes the file
that `--config.frozen.path=tokenizer.safetensors` names. Paper, Base: 64.5 % by linear probe, 74.0 % by attentive probe
and 83.6 % after fine-tuning with 300 epochs, 70.3, 77.2 and 83.9 % with 1600; Large, 1600 epochs: 77.8, 81.2 and 86.2 %
(README of Atten4Vis/CAE; not measured here).
"""

from mim_jax import config, method
from mim_jax.evals import suite

SIZES = {'Ti': '192/12/12', 'S': '384/12/12', 'B': '768/12/12', 'L': '1024/24/16'}  # models/modeling_cae.py
WARMUP = {300: 10, 800: 20, 1600: 40}  # scripts/cae_{base_300e,base_800e,large_1600e}.sh and the README
MASKED = {'Ti': 30, 'S': 49, 'B': 98}  # version 2, project/CAEv2/scripts


def get_config(arg=''):
  args = config.arguments(arg, size='B', epochs=300, version=1, paper=False, debug=False)
  cfg = config.base()
  cfg.method = method.options('cae', size=SIZES[args.size])  # depths, weight of the alignment loss, masks: the scripts
  cfg.method.dtype = 'bfloat16'  # the authors' code: half precision with loss scaling, which bfloat16 does not need
  if args.size == 'L':
    # scripts/cae_large_1600e.sh. Regressor and decoder keep a LayerScale of 0.1 and a width of 768: their flags never
    # reach the model, through a missing line break and because the model does not read them. The paper means a width of
    # 1024.
    cfg.method.layer_scale = 1e-5
    if args.paper:
      cfg.method.decoder = '1024/4/16'

  crop = 'decode | two_size_crop(224, 112, scale=(0.08, 1.0)) | flip | normalize | map_token_image'
  cfg.data.source = 'tfds:imagenet2012:train'
  cfg.data.transforms = crop  # furnace/datasets.py, DataAugmentationForCAE; no colour jitter
  cfg.data.eval_transforms = 'decode | resize(256) | center_crop(224) | second_size(112) | normalize | map_token_image'
  cfg.batch_size = 2048  # 64 on each of 32 GPUs
  cfg.duration = f'{args.epochs} epochs'
  cfg.optim.name = 'adamw'  # scripts/cae_base_*.sh, as is what follows
  cfg.optim.base_lr = 1.5e-3  # at this batch, not per 256
  cfg.optim.lr_batch = 0
  cfg.optim.b1, cfg.optim.b2 = 0.9, 0.999
  cfg.optim.wd = 0.05
  cfg.optim.clip = 3.0
  # Without decay: one-dimensional tensors and biases (furnace/optim_factory.py), the default; class and mask token are
  # decayed.
  cfg.schedule.warmup = f'{WARMUP.get(args.epochs, 10)} epochs'
  cfg.schedule.warmup_to_peak = True  # furnace/utils.py, cosine_scheduler: linspace with both ends
  cfg.schedule.min_lr = 1e-5
  cfg.mesh.fsdp = -1
  cfg.mesh.data = 1
  if args.version == 2:
    second(cfg, args.size)
  if args.debug:
    return debug(cfg)
  probe = {  # README, linear probing: scripts of MAE with BatchNorm and LARS
    'every': 'end',
    'test': ':validation',
    'baselines': (),
    'augment': True,
    'train_transforms': 'decode | one_shot_crop(224) | flip | normalize',
    'batch_size': 1024,
    'train_batch': 16384,
    'epochs': 90,
    'trust': 0.001,
    'features': 'cls',
  }
  attentive = {  # README, attentive probing; rate, epochs and batch are the evaluator's own
    'every': 'never',  # trainings of their own: mim-jax eval --workdir=runs/cae_b --evals=attentive,finetune
    'test': ':validation',
    'baselines': (),
    'train_transforms': 'decode | random_resized_crop(224, scale=(0.08, 1.0)) | flip | normalize',
    'batch_size': 1024,
  }
  finetune = {  # scripts/cae_{base,large}_finetune.sh: rates 8e-3 and 2e-3 at a batch of 4096
    **attentive,
    'train_transforms': (
      'decode | random_resized_crop(224, scale=(0.08, 1.0)) | flip | color_jitter(0.4, 0.4, 0.4, 0.0) | normalize'
      ' | random_erasing(p=0.25)'
    ),
    'train_batch': 4096,
    'epochs': 50 if args.size == 'L' else 100,
    'base_lr': (2e-3 if args.size == 'L' else 8e-3) / 16,
    'layer_decay': 0.75 if args.size == 'L' else 0.65,
    'drop_path': 0.2 if args.size == 'L' else 0.1,
  }
  cfg.evals = {
    'knn': suite.settings(
      'knn', {'every': '50 epochs', 'train': ':train[:10%]', 'test': ':validation', 'baselines': ()}
    ),
    'linear': suite.settings('linear', probe),
    'attentive': suite.settings('attentive', attentive),
    'finetune': suite.settings('finetune', finetune),
  }
  return cfg


def second(cfg, size: str):
  """What CAE v2 does differently (project/CAEv2/scripts/caev2_*_300e.sh)."""
  cfg.method.version = 2
  cfg.method.masked = MASKED.get(size, 98)
  if size == 'Ti':
    cfg.method.regressor_depth, cfg.method.decoder = 1, '96/4/12'
  jitter = 'color_jitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4)'
  cfg.data.transforms = f'decode | random_resized_crop(224, scale=(0.4, 1.0)) | {jitter} | flip | normalize'
  cfg.data.eval_transforms = 'decode | resize(256) | center_crop(224) | normalize'
  cfg.schedule.warmup = '10 epochs'


def debug(cfg):
  """The same method on rendered scenes of 64 pixels with colours for tokens: trains offline on two CPU cores."""
  cfg.method = method.options(
    'cae',
    size='96/4/4',
    decoder='96/1/4',
    regressor_depth=2,
    patch=8,
    image_size=64,
    masked=32,
    min_block=4,
    tokenizer='colours',
    codes=27,
    drop_path=0.0,
    scan=False,
  )
  cfg.data.source = 'synthetic:shapes/train=4000,validation=1000,textures=false,others=0:train'
  cfg.data.transforms = 'decode | random_resized_crop(64, scale=(0.5, 1.0)) | flip | normalize'
  cfg.data.eval_transforms = 'decode | normalize'
  config.laptop(cfg, steps=500, base_lr=1e-3)
  cfg.optim.b2 = 0.95
  evaluation = {'test': ':validation', 'batch_size': 256}
  cfg.evals = {
    'knn': suite.settings('knn', evaluation | {'features': 'max'}),
    'linear': suite.settings('linear', evaluation | {'features': 'mean', 'trust': 0.03}),
    # A training of its own, from 1,000 labelled images: mim-jax eval --workdir=runs/cae --evals=attentive
    'attentive': suite.settings(
      'attentive',
      evaluation
      | {
        'every': 'never',
        'train': ':train[:1000]',
        'train_transforms': cfg.data.transforms,
        'train_batch': 64,
        'base_lr': 0.1,
        'epochs': 20,
        'warmup_epochs': 2,
      },
    ),
  }
  return cfg
