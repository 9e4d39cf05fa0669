"""Hi-End-MAE pre-training on CT volumes (Tang et al. 2025, arXiv 2502.08347).

  python -m mim_jax.train --config=configs/hi_end_mae.py --workdir=runs/hi_end_mae           the published encoder,
  patches of 12 python -m mim_jax.train --config=configs/hi_end_mae.py:size=B,patch=16 --workdir=runs/b16  vit_base_16p
  bash launch/local.sh configs/hi_end_mae.py:debug                                           a laptop, offline, two
  minutes

Data: `folder:` of .npy volumes [H, W, D] of Hounsfield units (int16 will do), resampled to 1.5 mm, axes right,
anterior, superior; for the evaluation a folder `images` of the same and a folder `masks` of class numbers. No result
table is published with the code.
"""

from mim_jax import config, method
from mim_jax.errors import ConfigError, nearest
from mim_jax.evals import suite

# Encoder and decoder by name, networks/vit.py: vit_base_patch16_96, vit_large_patch12_96 and vit_large_patch16_96.
SIZES = {'B': ('768/12/12', '384/2/12'), 'L': ('1536/12/16', '528/2/16')}


def get_config(arg=''):
  args = config.arguments(arg, size='L', patch=12, wd_on_all=False, debug=False)
  if args.size not in SIZES:
    raise ConfigError(f'size={args.size} is unknown; {nearest(args.size, SIZES)}')
  size, decoder = SIZES[args.size]
  cfg = config.base()
  cfg.seed = 41  # main.py
  cfg.method = method.options('hi_end_mae', size=size, decoder=decoder, patch=args.patch)
  cfg.method.dtype = 'bfloat16'  # the authors' code: half precision with loss scaling, which bfloat16 does not need

  cfg.data.source = 'folder:data/ct'
  # dataloader/med_datasets.py, whose volumes are clipped and scaled beforehand: a centre above 0 there is one above
  # -175 here.
  cfg.data.transforms = (
    'pad_3d(96, value=-1024) | random_crop_3d(96, p=0.75, above=-175) | flip_3d(p=0.5) | rot90_3d(p=0.3)'
    ' | window(-175, 250) | intensity_3d(0.1, p=0.1)'
  )
  cfg.data.eval_transforms = 'pad_3d(96, value=-1024) | crop_3d(96) | window(-175, 250)'
  # main.py: 24 volumes of 8 crops each on a device; its README trains on 4. Here an example is one crop, so that the
  # crops of a volume fall into different batches, and an epoch of theirs is 8 of ours.
  cfg.batch_size = 4 * 24 * 8
  cfg.duration = '8000 epochs'  # main.py: 1000
  cfg.schedule.warmup = '80 epochs'  # main.py: 10
  cfg.optim.name = 'adamw'
  cfg.optim.base_lr = 1e-4  # main.py, as it is: not scaled by the batch
  cfg.optim.lr_batch = 0
  cfg.optim.b1, cfg.optim.b2 = 0.9, 0.95  # main.py
  cfg.optim.wd = 0.05  # main.py
  # trainer.py names these as without decay, but stores that where AdamW does not read it: as run, all parameters were
  # decayed.
  cfg.optim.no_wd = '' if args.wd_on_all else r'bias$|scale$|cls_token$|mask_token$|pos_embed$'
  cfg.checkpoint.every = '1%'
  cfg.panels.every = '1%'
  cfg.mesh.fsdp = -1
  cfg.mesh.data = 1
  if args.debug:
    return debug(cfg)
  unetr = {  # downstream/main.py: 500 epochs of 4 crops a volume, 50 of them warmup, AdamW at 1e-4
    'train': 'folder:data/btcv/train',
    'test': 'folder:data/btcv/validation',
    'train_transforms': (
      "pad_3d(96, value=-1024) | random_crop_3d(96, p=0.5, by='mask') | flip_3d(p=0.2) | rot90_3d(p=0.2)"
      ' | window(-175, 250) | intensity_3d(0.1, p=0.1)'
    ),
    'transforms': 'window(-175, 250)',
    'classes': 14,  # 13 organs and background
    'batch_size': 8,
    'baselines': (),
  }
  cfg.evals = {'volume_segment': suite.settings('volume_segment', unetr)}
  return cfg


def debug(cfg):
  """The same method on rendered trunks of 40 voxels: trains offline on two CPU cores in about two minutes."""
  cfg.method = method.options(
    'hi_end_mae', size='96/5/4', taps=(1, 2, 3), decoder='48/1/4', patch=8, image_size=32, scan=False
  )
  cfg.data.source = 'synthetic:organs/train=300,validation=16:train'
  cfg.data.transforms = 'random_crop_3d(32, p=0.75) | flip_3d(p=0.5) | to_float | intensity_3d(0.1, p=0.1)'
  cfg.data.eval_transforms = 'crop_3d(32) | to_float'
  config.laptop(cfg, steps=500, base_lr=1e-3, batch_size=32)
  cfg.panels.every, cfg.panels.count = '25%', 4
  labelled = {'train': ':train[:40]', 'test': ':validation', 'classes': 7, 'batch_size': 8}
  tokens = labelled | {'background': 0, 'train_batch': 8, 'epochs': 20, 'base_lr': 0.1, 'decoder': 'linear'}
  unetr = labelled | {
    'train_transforms': "random_crop_3d(32, p=0.5, by='mask') | flip_3d(p=0.2) | to_float | intensity_3d(0.1, p=0.1)",
    'transforms': 'to_float',
    'every': 'never',  # minutes of its own: mim-jax eval --evals=volume_segment
    'taps': (2, 3, 4),
    'width': 2,
    'epochs': 8,
    'warmup_epochs': 1,
    'base_lr': 0.06,
  }
  cfg.evals = {'segment': suite.settings('segment', tokens), 'volume_segment': suite.settings('volume_segment', unetr)}
  return cfg
