"""Robust MAE: prompts in the frequency domain for a fine-tuned MAE (Huang et al. 2023, arXiv 2308.10315).

  mim-jax convert mae_finetuned_vit_base.pth --out=mae_b_ft.safetensors
  python -m mim_jax.train --config=configs/robust_mae.py --workdir=runs/robust \\
    --config.init_from.path=mae_b_ft.safetensors
  bash launch/local.sh configs/robust_mae.py:debug          a laptop, offline: classifier, clusters, prompts and attacks

The paper's code and tables are not public: all values below are this project's, but for the classifier (MAE's ViT-B,
fine-tuned on ImageNet) and the attack (PGD), which its abstract names. Figures of this recipe are not the paper's.
"""

from mim_jax import config, method
from mim_jax.evals import suite

CLASSIFIER = r'^(encoder|fc_norm|head)/'


def get_config(arg=''):
  args = config.arguments(arg, size='B', epochs=1, transform='fft', debug=False)
  cfg = config.base()
  cfg.method = method.options('robust_mae', size=args.size, transform=args.transform)

  cfg.data.source = 'tfds:imagenet2012:train'
  cfg.data.transforms = "decode | random_resized_crop(224, scale=(0.2, 1.0)) | flip | normalize('none')"
  cfg.data.eval_transforms = "decode | resize(256) | center_crop(224) | normalize('none')"
  cfg.batch_size = 256
  cfg.duration = f'{args.epochs} epochs'
  cfg.optim.name = 'adam'
  cfg.optim.base_lr = 1e-2
  cfg.optim.lr_batch = 0
  cfg.optim.b2 = 0.999
  cfg.optim.wd = 0.0
  cfg.optim.lr_mult = ((CLASSIFIER, 0.0),)  # the network stays as it is
  cfg.init_from.allow_missing = '^prompt$'
  if args.debug:
    return debug(cfg)
  judged = {
    'test': ':validation',
    'train': ':train[:1%]',  # for probes only; this classifier has a head
    'batch_size': 64,
    'baselines': (),
    'stats': 'none',
    'transfer': 'undefended',
  }
  cfg.evals = {
    'robustness': suite.settings('robustness', judged | {'attacks': ('fgsm', 'pgd', 'cw_linf', 'apgd_ce')}),
    # Minutes per hundred images: mim-jax eval --workdir=runs/robust --evals=autoattack
    'autoattack': suite.settings(
      'autoattack', judged | {'kind': 'robustness', 'every': 'never', 'attacks': ('autoattack',), 'eps': (2 / 255,)}
    ),
  }
  return cfg


def debug(cfg):
  """The whole of it on rendered scenes of 48 pixels: trains offline on two CPU cores in about two minutes.

  The classifier is trained in the same run (900 steps, at a tenth of the rate of the prompts), then 32 batches fill the
  bank, then the prompts are trained. Adam's momentum carries the classifier on for some ten steps, as if it were
  trained that much longer.
  """
  cfg.method = method.options(
    'robust_mae',
    size='96/3/4',
    patch=8,
    image_size=48,
    classes=12,
    head_std=0.02,
    scan=False,
    transform=cfg.method.transform,
    clusters=4,
    bank=2048,
    classifier_steps=900,
  )
  cfg.data.source = 'synthetic:shapes/size=48,train=4000,validation=1000,textures=false,others=0:train'
  cfg.data.transforms = "decode | random_resized_crop(48, scale=(0.5, 1.0)) | flip | normalize('none')"
  cfg.data.eval_transforms = "decode | normalize('none')"
  config.laptop(cfg, steps=1100, base_lr=1e-2)
  cfg.optim.lr_mult = ((CLASSIFIER, 0.1),)
  cfg.schedule.warmup = '5%'
  cfg.panels.every = '50%'
  judged = {'test': ':validation', 'batch_size': 64, 'count': 256, 'baselines': ('untrained',), 'stats': 'none'}
  cfg.evals = {
    'robustness': suite.settings(
      'robustness', judged | {'transfer': 'undefended', 'eps': (1 / 255, 2 / 255), 'attacks': ('fgsm', 'pgd')}
    ),
    'autoattack': suite.settings(
      'autoattack',
      judged
      | {
        'kind': 'robustness',
        'every': 'never',  # some minutes: mim-jax eval --evals=autoattack
        'baselines': (),
        'transfer': 'undefended',
        'attacks': ('autoattack',),
        'eps': (1 / 255,),
        'count': 64,
        'apgd_steps': 20,
        'fab_steps': 20,
        'targets': 3,
        'square_queries': 200,
      },
    ),
  }
  return cfg
