"""CropMAE pre-training (Eymaël et al. 2024, arXiv 2403.17823), and SiamMAE with the same network (Gupta et al. 2023,
arXiv 2305.14344).

  python -m mim_jax.train --config=configs/cropmae.py --workdir=runs/cropmae  # ViT-S/16, 400 epochs of ImageNet
  python -m mim_jax.train --config=configs/cropmae.py:data=kinetics --workdir=runs/cropmae_k400  # Kinetics-400
  python -m mim_jax.train --config=configs/cropmae.py:data=siammae --workdir=runs/siammae  # pairs of frames
  bash launch/local.sh configs/cropmae.py:debug  # a laptop, offline

The paper's figures by label propagation (its tables 1 and 3, released weights; not measured here): DAVIS J&F 60.1, VIP
mIoU 33.2, JHMDB PCK@0.1 43.5 for ImageNet; 58.6, 33.7 and 42.9 for Kinetics-400.
"""

from mim_jax import config, method
from mim_jax.errors import ConfigError
from mim_jax.evals import suite

# Paper section 4 and the launch scripts of alexandre-eymael/CropMAE: scales of area, the local one of the global
# crop's. TFDS has no Kinetics-400: the source is a data set of one's own in its format, with the field `frames` of
# clips [T, H, W, 3].
DATA = {
  'imagenet': ('tfds:imagenet2012:train', 'decode | two_views(224, scale=(0.1, 1.0), local_scale=(0.3, 0.6))'),
  'kinetics': ('tfds:kinetics400:train', 'random_frame | two_views(224, scale=(0.5, 1.0), local_scale=(0.3, 0.6))'),
  'siammae': ('tfds:kinetics400:train', 'frame_pair(224, scale=(0.5, 1.0), gap=(4, 48))'),
}


def get_config(arg=''):
  args = config.arguments(arg, size='S', epochs=400, data='imagenet', debug=False)
  if args.data not in DATA:
    raise ConfigError(f'configs/cropmae.py: data={args.data!r} is unknown; expected {", ".join(DATA)}')
  cfg = config.base()
  cfg.method = method.options('cropmae', size=args.size)
  cfg.method.mask_ratio = 0.95 if args.data == 'siammae' else 0.985  # paper section 4; SiamMAE: its section 4
  cfg.method.dtype = 'bfloat16'  # the authors' code: half precision with loss scaling, which bfloat16 does not need

  cfg.data.source, views = DATA[args.data]
  cfg.data.transforms = f'{views} | normalize'
  cfg.data.eval_transforms = f'decode | resize(256) | center_crop(224) | {views.removeprefix("decode | ")} | normalize'
  cfg.batch_size = 2048  # launch scripts: 128 on each of 16 GPUs
  cfg.duration = f'{args.epochs} epochs'  # paper section 4
  cfg.optim.name = 'adamw'  # paper section 4 and launch scripts, as are rate, betas and decay
  cfg.optim.base_lr = 1e-4
  cfg.optim.b1, cfg.optim.b2 = 0.9, 0.95
  cfg.optim.wd = 0.05
  # Without decay: tensors of one dimension and biases, the default; class and mask token are decayed.
  cfg.schedule.warmup = (
    '5%'  # launch scripts; the rate of a step is set before it, which the authors' loop does one step late
  )
  cfg.mesh.fsdp = -1
  cfg.mesh.data = 1
  if args.debug:
    return debug(cfg)
  video = {
    'kind': 'propagation',
    'batch_size': 16,
    'baselines': (),
  }  # protocol: paper section 4, figures as in its tables
  cfg.evals = {
    'davis': suite.settings(
      'davis',
      video
      | {
        'test': 'tfds:davis/480p:validation',
        'transforms': 'decode | resize((480, 880)) | normalize',
        'frames': 'video/frames',
        'labels': 'video/segmentations',
      },
    ),
    # Neither set is in TFDS: `every` is 'end' once they are there, with these fields.
    'vip': suite.settings(
      'vip',
      video
      | {
        'test': 'tfds:vip:validation',
        'transforms': 'decode | resize_long(880, multiple=64) | normalize',
        'metric': 'miou',
        'classes': 20,
        'k': 10,
        'every': 'never',
      },
    ),
    'jhmdb': suite.settings(
      'jhmdb',
      video
      | {
        'test': 'tfds:jhmdb:test',
        'transforms': 'decode | resize((320, 320)) | normalize',
        'metric': 'pck',
        'labels': 'joints',
        'every': 'never',
      },
    ),
  }
  return cfg


def debug(cfg):
  """The same method on rendered scenes of 48 pixels, judged on clips of such scenes: offline on two CPU cores in
  two to three minutes.
  """
  cfg.method = method.options(
    'cropmae', size='96/3/4', decoder='64/2/4', ff_dim=256, patch=8, image_size=48, mask_ratio=0.95, scan=False
  )
  views = 'two_views(48, scale=(0.5, 1.0), local_scale=(0.3, 0.6))'
  cfg.data.source = 'synthetic:shapes/size=48,train=4000,validation=1000,textures=false,others=0:train'
  cfg.data.transforms = f'decode | {views} | normalize'
  cfg.data.eval_transforms = f'decode | {views} | normalize'
  config.laptop(cfg, steps=700, base_lr=2e-3, batch_size=32)
  video = {
    'kind': 'propagation',
    'test': 'synthetic:moving/train=0,validation=12:validation',
    'transforms': 'decode | resize(128, method="bilinear") | normalize',
    'batch_size': 32,
  }
  cfg.evals = {
    'knn': suite.settings('knn', {'test': ':validation', 'batch_size': 256, 'features': 'max'}),
    'objects': suite.settings('objects', video),
    'joints': suite.settings('joints', video | {'metric': 'pck', 'labels': 'joints', 'valid': 'joint_valid'}),
  }
  return cfg
