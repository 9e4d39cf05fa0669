"""M3AE pre-training on images with texts (Chen et al. 2022, arXiv 2209.07098).

  python -m mim_jax.train --config=configs/m3ae.py --workdir=runs/m3ae --config.init_from.path=start.safetensors
  bash launch/local.sh configs/m3ae.py:debug      a laptop, offline, three minutes

The data set is to be prepared as a TFDS one with the fields `image` and `caption` (one text, or several of which one
is drawn), from ROCO and MedICaT: those are not to be had by a download alone. `vocab` is the folder of roberta-base's
vocab.json and merges.txt, and `start.safetensors` CLIP's tower and RoBERTa as `python -m mim_jax.official.m3ae` puts
them together.

Mean of three runs fine-tuned from the released weights, by the scores in their file names (not measured here): VQA-RAD
77.0, SLAKE 83.3, VQA-2019 80.1, MELINDA 78.4.
"""

from mim_jax import config, method
from mim_jax.evals import suite
from mim_jax.models import text

# Official code, set_schedule: names with `multi_modal`, and names of heads.
FUSION = r'^(join/(text|image)|fusion|pool_\w+)/'
HEADS = r'^(words|match|decoder)/'
# Official code: not decayed are biases and what is called LayerNorm.weight or norm.weight, so CLIP's ln_* and all
# tables are.
NO_WD = r'bias$|^(text|fusion|words)/.*scale$|^decoder/norm/scale$'


def get_config(arg=''):
  args = config.arguments(arg, vocab='roberta-base', text_encoder='roberta-base', image_size=288, debug=False)
  cfg = config.base()
  cfg.method = method.options('m3ae', text=text.PRESETS[args.text_encoder], image_size=args.image_size)
  cfg.method.dtype = 'bfloat16'  # official code: half precision, whose loss scaling bfloat16 does not need

  # Official script pretrain_m3ae.sh: 288 pixels, 64 tokens, words hidden at 0.15; resize and crop without augmentation.
  size = args.image_size
  picture = f'decode | resize({size}) | center_crop({size})'
  tokens = lambda length, field='caption': f'tokenize({args.vocab!r}, {length}, field={field!r})'
  hidden = f'tokenize({args.vocab!r}, 64, masked=0.15)'
  cfg.data.source = 'tfds:roco_medicat:train'
  cfg.data.transforms = cfg.data.eval_transforms = f"{picture} | false_image | {hidden} | normalize('clip')"
  cfg.batch_size = 256  # 8 GPUs of 32
  cfg.duration = '100000 steps'
  cfg.optim.name = 'adamw'
  cfg.optim.base_lr, cfg.optim.lr_batch = 1e-5, 0
  cfg.optim.b1, cfg.optim.b2, cfg.optim.eps = 0.9, 0.98, 1e-8
  cfg.optim.wd, cfg.optim.no_wd = 0.01, NO_WD
  cfg.optim.lr_mult = ((FUSION, 5.0), (HEADS, 5.0))
  cfg.schedule.name, cfg.schedule.warmup = 'linear', '10%'
  cfg.mesh.fsdp, cfg.mesh.data = -1, 1
  cfg.checkpoint.every = '5000 steps'
  if args.debug:
    return debug(cfg)

  # Downstream (paper section 3.2 and official scripts), for `mim-jax eval --evals=vqa_rad`; the data is to be prepared.
  crop = f'decode | random_resized_crop({size}, scale=(0.9, 1.0))'
  question = f"{tokens(32, 'question')} | normalize('clip')"

  def answers(name, batch, epochs, train=crop, **given):
    return suite.settings(
      'answers',
      {
        'every': 'never',
        'train': f'tfds:{name}:train',
        'test': f'tfds:{name}:test',
        'transforms': f'{picture} | {question}',
        'train_transforms': f'{train} | {question}',
        'train_batch': batch,
        'base_lr': 5e-6 * 256 / batch,  # 5e-6 whatever the batch
        'epochs': epochs,
        'baselines': (),
        **given,
      },
    )

  paragraph = f"{tokens(128)} | normalize('clip')"
  cfg.evals = {
    'vqa_rad': answers('vqa_rad', 64, 50, picture, closed='closed'),
    'slake': answers('slake', 32, 15, closed='closed'),
    'vqa_2019': answers('vqa_2019', 32, 10),
    'melinda': answers(
      'melinda',
      16,
      20,
      label='label',
      loss='softmax',
      head_mult=10.0,
      transforms=f'{picture} | {paragraph}',
      train_transforms=f'{crop} | {paragraph}',
    ),
    'roco': suite.settings(
      'retrieval',
      {
        'every': 'never',
        'train': 'tfds:roco:train',
        'test': 'tfds:roco:test',
        'transforms': f"{picture} | {tokens(40)} | normalize('clip')",
        'train_batch': 256,
        'epochs': 10,
        'baselines': (),
      },
    ),
  }
  return cfg


def debug(cfg):
  """Rendered scenes of 48 pixels with one-sentence captions: trains offline on two CPU cores in two to three and a half
  minutes.
  """
  from mim_jax.data import text as host

  words = 'words:questions'
  cfg.method = method.options(
    'm3ae',
    size='64/3/4',
    patch=8,
    image_size=48,
    text={'kind': 'bert', 'size': '64/2/4', 'vocab': len(host.load(words)), 'positions': 20, 'mlp_ratio': 2.0},
    mlp_ratio=2.0,
    length=20,
    fusion='64/2/4',
    fusion_mlp_ratio=2.0,
    decoder='48/1/4',
    mim_layer=1,
    dropout=0.0,
    init_std=0.1,  # for width 64 what 0.02 is for 768
    scan=False,
  )
  caption = f"tokenize('{words}', 20, masked=0.3, rule='words')"
  cfg.data.source = 'synthetic:shapes/size=48,train=4000,validation=1000,textures=false,others=0:train'
  cfg.data.transforms = cfg.data.eval_transforms = f"decode | false_image | {caption} | normalize('clip')"
  config.laptop(cfg, steps=500, base_lr=1e-3, batch_size=32)
  cfg.optim.lr_mult = ()  # everything starts from scratch here
  images = {'test': ':validation', 'batch_size': 250, 'transforms': "decode | normalize('clip')"}
  world = 'synthetic:questions/size=48,train=2000,validation=500,textures=false'
  cfg.evals = {
    'linear': suite.settings('linear', images | {'features': 'mean', 'trust': 0.03}),
    'retrieval': suite.settings(
      'retrieval',
      {
        'test': ':validation',
        'batch_size': 100,
        'count': 100,
        'pairs': 500,
        'transforms': f"decode | tokenize('{words}', 20) | normalize('clip')",
      },
    ),
    'answers': suite.settings(
      'answers',
      {
        'train': f'{world}:train',
        'test': f'{world}:validation',
        'batch_size': 250,
        'transforms': f"decode | tokenize('{words}', 20, field='question') | normalize('clip')",
        'closed': 'closed',
        'every': 'never',  # longer than the run itself: mim-jax eval --workdir=... --evals=answers
        'train_batch': 50,
        'epochs': 12,
        'base_lr': 3e-3,
        'fusion_mult': 1.0,
        'head_mult': 3.0,
      },
    ),
  }
  return cfg
