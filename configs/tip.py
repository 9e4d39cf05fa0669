"""TIP pre-training (Du et al. 2024, arXiv 2407.07582) on images and table rows.

  python -m mim_jax.train --config=configs/tip.py:columns=COLUMNS --workdir=runs/tip        DVM-Car, ResNet-50
  python -m mim_jax.train --config=configs/tip.py:data=cardiac,columns=COLUMNS --workdir=runs/tip_c    UK Biobank
  bash launch/local.sh configs/tip.py:debug                                                 a laptop, offline

COLUMNS is the metadata.json that `python -m mim_jax.data.csv_tables` writes beside a data set made of images and a
CSV file. Neither data set comes with TFDS. The paper's figures (accuracy on DVM, AUROC on the cardiac tasks) were not
measured here. With `missing` the table may lack cells in pre-training too, which the paper's complete tables do not.
"""

from mim_jax import config, method
from mim_jax.data import tables
from mim_jax.errors import ConfigError
from mim_jax.evals import suite

# siyi-wind/TIP, configs and datasets/ContrastiveImagingAndTabularDataset.py: source, side, augmentation, decay,
# batch, rate after pre-training.
DATA = {
  'dvm': dict(
    source='tfds:dvm_car:train',
    size=128,
    augment='color_jitter(0.8, 0.8, 0.8, 0, p=0.8) | grayscale(p=0.2) | '
    'gaussian_blur(kernel=29, sigma=(0.1, 2.0), p=0.5) | random_resized_crop({size}, scale=({floor}, 1.0)) | flip',
    floor=0.08,
    wd=1.5e-6,
    batch=256,
    lr=1e-4,
  ),
  'cardiac': dict(
    source='tfds:ukbb_cardiac:train',
    size=128,
    augment='flip | rotate(45) | color_jitter(0.5, 0.5, 0.5, 0) | random_resized_crop({size}, scale=({floor}, 1.0))',
    floor=0.2,
    wd=1e-4,
    batch=128,
    lr=1e-3,
  ),
}


def get_config(arg=''):
  args = config.arguments(arg, data='dvm', columns='', missing=False, epochs=500, debug=False)
  if args.data not in DATA:
    raise ConfigError(f'configs/tip.py: data={args.data!r} is unknown; expected {", ".join(DATA)}')
  data = DATA[args.data]
  cfg = config.base()
  cfg.method = method.options('tip', image_size=data['size'], missing=args.missing)
  if args.columns:
    columns = tables.read(args.columns)
    cfg.method.cat_lengths, cfg.method.num_con = columns.lengths, columns.continuous

  described = f'table({args.columns or "metadata.json"!r}, complete={not args.missing})'
  plain = f'decode | resize(({data["size"]}, {data["size"]})) | {described} | to_float'

  def augmented(share, floor):  # the images that are not augmented are only resized
    steps = data['augment'].format(size=data['size'], floor=floor)
    return f'decode | set_aside({data["size"]}, p={1 - share:.2g}) | {steps} | take_back | {described} | to_float'

  cfg.data.source = data['source']
  cfg.data.transforms = augmented(0.95, data['floor'])
  cfg.data.eval_transforms = plain
  cfg.batch_size = data['batch']
  cfg.duration = f'{args.epochs} epochs'
  cfg.optim.name = 'adam'  # decay is added to the gradient, of all parameters
  cfg.optim.base_lr, cfg.optim.lr_batch = 3e-4, 0
  cfg.optim.b1, cfg.optim.b2 = 0.9, 0.999
  cfg.optim.wd, cfg.optim.no_wd = data['wd'], ''
  # pl_bolts' LinearWarmupCosineAnnealingLR by epochs: the rate of epoch e is lr e / 9, so that epoch 0 only moves the
  # statistics.
  cfg.schedule.warmup = '10 epochs'
  cfg.schedule.per_epoch = True
  cfg.schedule.warmup_to_peak = True
  if args.debug:
    return debug(cfg)
  # Both protocols of the paper (section 4): with the encoder frozen, and with all of it; half of the cells lacking,
  # or none.
  judged = {
    'kind': 'tables',
    'test': ':test',
    'train_transforms': augmented(0.8, 0.6),
    'train_batch': data['batch'],
    'epochs': 100,
    'base_lr': data['lr'] * 256 / data['batch'],  # an evaluator's rate is per 256 images
    'min_lr': data['lr'],
    'baselines': (),
  }
  cfg.evals = {
    'probe': suite.settings('probe', judged | {'frozen': True}),
    'finetune': suite.settings('finetune', judged),
  }
  return cfg


def debug(cfg):
  """The same method on rendered adverts of 48 pixels, a tenth of the cells lacking: offline, on two CPU cores."""
  world = 'synthetic:tables/size=48,train=4000,validation=1000'
  columns = tables.read(world)
  cfg.method = method.options(
    'tip',
    image_encoder='basic/1,1,1,1/16',
    image_size=48,
    cat_lengths=columns.lengths,
    num_con=columns.continuous,
    tabular='64/2/4',
    multimodal='64/2/4',
    projection=32,
    init_std=0.1,  # for width 64 what 0.02 is for 512: with 0.02 the contrast loss stops at 3.5, with this at 2.4
    missing=True,
    scan=False,
  )
  cfg.data.source = f'{world}:train'
  crop = 'decode | random_resized_crop(48, scale=(0.7, 1.0), ratio=(0.9, 1.11)) | flip'
  cfg.data.transforms = f"{crop} | table('{world}') | to_float"
  cfg.data.eval_transforms = f"decode | table('{world}') | to_float"
  config.laptop(cfg, steps=1000, base_lr=1e-3)
  cfg.schedule.warmup, cfg.schedule.per_epoch, cfg.schedule.warmup_to_peak = '5%', False, False
  fields = {'fields': ('image', 'table', 'missing'), 'test': ':validation', 'batch_size': 250}
  probe = {'test': ':validation', 'batch_size': 250, 'train_batch': 250, 'epochs': 4, 'base_lr': 2e-2, 'min_lr': 1e-4}
  fit = probe | {'epochs': 20, 'base_lr': 1e-3, 'every': 'never'}  # asked for by mim-jax eval --evals=finetune
  cfg.evals = {
    'linear': suite.settings('linear', fields | {'trust': 0.03}),
    'tables': suite.settings('tables', probe | {'frozen': True}),
    'finetune': suite.settings('finetune', fit | {'kind': 'tables'}),
  }
  return cfg
