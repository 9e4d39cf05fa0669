"""UMD pre-training (Hansen-Estruch et al. 2024, arXiv 2406.17688), its relatives, and training with labels to sample.

  python -m mim_jax.train --config=configs/umd.py --workdir=runs/umd_b      UMD-B/4, ImageNet of 64 pixels
  python -m mim_jax.train --config=configs/umd.py:kind=mae --workdir=runs/umd_mae    umd mae dit maskdit
  python -m mim_jax.train --config=configs/umd.py:space=latent --workdir=runs/umd_l \\
    --config.data.source=arrays:latents.npz
  python -m mim_jax.train --config=configs/umd.py:labels --workdir=runs/umd_b_labels --config.init_from.path=runs/umd_b
  bash launch/local.sh configs/umd.py:debug                                                         a laptop, offline

Official README, 800 epochs: 100-shot probe 31.8 % (MAE-B/4 36.6, DiT-B/4 25.6, MaskDiT-B/4 26.3); after 50 epochs with
labels FID of 10,000 samples 19.8 (MAE 26.8, DiT 18.9, MaskDiT 19.0). UMD-L/2 on latents: 54.4 % and 3.96. Not measured
here.
"""

from mim_jax import config, method
from mim_jax.errors import ConfigError
from mim_jax.evals import suite

# Share without noise, hidden share of noised images, adaLN: README of philippe-eecs/small-vision. Its MAE commands
# leave no_noise_prob at 0.5, which trains UMD without adaLN; a MAE needs 1.
KINDS = {'umd': (0.5, 0.375, True), 'mae': (1.0, 0.375, False), 'dit': (0.0, 0.0, True), 'maskdit': (0.0, 0.5, True)}


def get_config(arg=''):
  args = config.arguments(arg, kind='umd', space='pixels', size='', epochs=0, labels=False, debug=False)
  if args.kind not in KINDS or args.space not in ('pixels', 'latent'):
    raise ConfigError(f'kind={args.kind}, space={args.space}; kinds are {", ".join(KINDS)}, spaces are pixels, latent')
  cfg = config.base()
  clean, hidden, adaln = KINDS[args.kind]
  latent = args.space == 'latent'
  size = args.size or ('L' if latent else 'B')
  cfg.method = method.options('umd', size=size, clean=clean, mask_ratio=hidden, adaln=adaln)
  cfg.method.decoder_depth = 8 if size == 'L' else 4  # models/ae.py, decode_variant
  if clean == 0:
    cfg.method.probe_step = 50  # trainers/train_ae.py, 'noised_predict': a network that never saw clean images
  if latent:  # configs/ae_i1k.py: the VAE's latents of images of 256 pixels, times 0.18215, made beforehand
    cfg.method.patch, cfg.method.image_size, cfg.method.channels = 2, 32, 4
    cfg.method.schedule, cfg.method.clip = 'linear', False

  crop = 'decode | random_resized_crop(64, scale=(0.8, 1.0), method="bilinear") | flip | normalize("half")'
  cfg.data.source = 'tfds:imagenet2012:train[:99%]'  # configs/ae_i1k.py
  cfg.data.transforms = '' if latent else crop
  cfg.data.eval_transforms = '' if latent else 'decode | resize(64, "bilinear") | center_crop(64) | normalize("half")'
  cfg.batch_size = 4096 if args.kind == 'mae' else 1024  # README
  epochs = args.epochs or 800
  cfg.optim.name = 'adamw'  # trainers/train_ae.py, as is what follows
  cfg.optim.base_lr = 1.5e-4
  cfg.optim.b1, cfg.optim.b2 = 0.9, 0.95
  cfg.optim.wd = 0.05
  cfg.optim.no_wd = r'cls_tokens$|mask_token$|bias$'  # scales of norms and tables of positions are decayed
  cfg.optim.mu_dtype = 'bfloat16'
  cfg.optim.clip = 1.0
  if args.labels:  # README, fine-tuning for generation
    epochs = args.epochs or 50
    cfg.method.classes = 1000
    cfg.method.mask_ratio = 0.0
    cfg.method.clean = 0.0 if args.kind in ('dit', 'maskdit') else 0.05
    cfg.batch_size = 256
    cfg.optim.b2, cfg.optim.wd = 0.999, 0.0
    cfg.ema = 1 - 1e-4 * cfg.batch_size / 256
    cfg.data.transforms = cfg.data.transforms.replace('(0.8, 1.0)', '(0.95, 1.0)')
    cfg.method.guidance = 2.0  # 1.5 to 4 were measured
  cfg.duration = f'{epochs} epochs'
  cfg.schedule.warmup = f'{int(0.05 * epochs)} epochs'
  cfg.mesh.fsdp = -1
  cfg.mesh.data = 1
  if args.debug:
    return debug(cfg)
  shots = {'train': ':train[:100000]', 'test': ':validation', 'shots': (100,), 'seeds': 1, 'baselines': ()}
  cfg.evals = {'fewshot': suite.settings('fewshot', shots | {'every': '100 epochs', 'features': 'cls'})}
  if args.labels:
    cfg.evals['fid'] = suite.settings('fid', {'test': ':validation', 'label': 'label', 'baselines': ()})
  return cfg


def debug(cfg):
  """The same method on rendered scenes of 32 pixels: trains offline on two CPU cores."""
  cfg.method = method.options(
    'umd', size='96/4/4', decoder_depth=1, patch=4, image_size=32, scan=False, sampling_steps=20, eta=0.0
  )
  cfg.data.source = 'synthetic:shapes/size=32,train=4000,validation=1000,textures=false,others=0:train'
  cfg.data.transforms = 'decode | random_resized_crop(32, scale=(0.5, 1.0)) | flip | normalize("half")'
  cfg.data.eval_transforms = 'decode | normalize("half")'
  config.laptop(cfg, steps=800, base_lr=1e-3)
  evaluation = {'test': ':validation', 'batch_size': 256}
  cfg.evals = {
    'fewshot': suite.settings('fewshot', evaluation | {'shots': (100,), 'seeds': 3, 'features': 'cls'}),
    'linear': suite.settings('linear', evaluation | {'features': 'mean', 'trust': 0.03}),
    'fid': suite.settings('fid', {'test': ':validation', 'batch_size': 128, 'samples': 256}),
  }
  return cfg
