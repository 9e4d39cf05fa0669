"""MaskAlign's official release (OpenDriveLab/maskalign): names, replays of `maskalign` and `maskalign_clip`.

Published files (ModelCard.md there): ViT-B from CLIP-B/16, ViT-L from CLIP-B/16, ViT-L from CLIP-L/14, each under
'model' with MAE's names for the encoder, the heads `distill_heads.LEVEL` and the mixture `distill_weights`. Files of
the training script also hold the frozen teacher (`clip_model.` or `dino_model.`), which `TEACHER` matches. The encoder
alone is read by `mim-jax convert`, as any of MAE's.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax import method
from mim_jax.checkpoint import files
from mim_jax.errors import UserError
from mim_jax.methods import maskalign
from mim_jax.models import posemb, teachers, vit
from mim_jax.official import mae, names
from mim_jax.official.vits import huggingface, layout
from mim_jax.ops import masking, pixels

# PyTorch computes the source coordinates of a bicubic resize in float32, which moves its weights by up to 1.2e-5.
TOLERANCES = {'out/bicubic': 5e-5, 'out/clip_pos_14': 5e-5}

TEACHER = re.compile(r'^(clip_model|dino_model)\.')  # names of the frozen teacher inside an official file

# Where the parts of a head stand in the official nn.Sequential, by the option `head`; '' for a lone layer.
_HEADS = {
  'linear': {'out': ''},
  'norm_linear': {'norm': '.0', 'out': '.1'},
  'mlp': {'hidden': '.0', 'out': '.2'},
  'mlp2': {'hidden': '.0', 'norm': '.1', 'out': '.2'},
}


def pretraining(cfg) -> list[names.Entry]:
  """Names of `models_pretrain.py` for the options of `mim_jax.methods.maskalign`, without the fixed position table."""
  encoder = mae.encoder_names(vit.sides(cfg.patch, 2), vit.size(cfg.size)['heads'])
  table = [entry for entry in encoder if entry.theirs not in mae.TABLES]
  for part, place in _HEADS[cfg.head].items():
    kind = names.norm if part == 'norm' else names.linear
    table += kind(f'distill_heads.{{i}}{place}', f'heads/{part}')
  return [*table, names.Entry('distill_weights', 'mix')]


def replay(case) -> dict[str, np.ndarray]:
  """Outputs and gradients of a reference case under its own names."""
  if case.name.startswith('maskalign_clip'):
    return _replay_clip(case)
  if case.name.startswith('maskalign'):
    return _replay_pretraining(case)
  raise UserError(f'{case.name}: expected a case of maskalign or maskalign_clip')


def config_of(case, **changes):
  """Our options for a case's `config`, with `changes` put over them."""
  c = case.config
  given = dict(
    size=f'{c.embed_dim}/{c.depth}/{c.num_heads}',
    patch=c.patch_size,
    image_size=c.img_size,
    channels=case.inputs['imgs'].shape[1],
    mlp_ratio=float(c.mlp_ratio),
    ln_eps=c.ln_eps,
    drop_path=0.0,
    mask_ratio=c.mask_ratio,
    masking={'attention': 'attentive'}.get(c.mask_type, c.mask_type),
    fusion=c.fusion_type,
    head=c.head_type,
    target_norm=c.target_norm,
    distance=c.loss_type,
    levels=c.loss_weights,
    teacher=dict(kind='batch', size=f'{c.teacher_dim}/{c.teacher_depth}/{c.teacher_heads}'),
  )
  return method.options('maskalign', **given | changes)


def _replay_pretraining(case):
  cfg = config_of(case)
  weights = {name: value for name, value in case.weights.items() if name not in mae.TABLES}
  table = pretraining(cfg)
  params = names.complete(*names.load(weights, table))
  image = names.channels_last(case.inputs['imgs'])
  hidden = [case.inputs[f'teacher_hidden_{i + 1}'] for i in range(case.config.teacher_depth)]
  batch = {
    'image': image,
    'teacher_hidden': jnp.stack(hidden, axis=1),
    'teacher_importance': jnp.mean(case.inputs['teacher_attn_last'][:, :, 0, 1:], axis=1),
  }
  noises = {'attentive': jnp.asarray(case.inputs['exp_noise']), 'random': jnp.asarray(case.inputs['noise'])}
  order = noises[cfg.masking]
  if cfg.masking == 'attentive':
    order = maskalign.attentive_order(batch['teacher_importance'], order)

  def run(params, **changes):
    options = config_of(case, **changes)
    mine = {name: part for name, part in params.items() if name != 'mix' or options.fusion != 'simple'}
    return method.build(options).loss(mine, {}, {}, batch, {'noise': noises[options.masking]}, 0)

  @jax.jit
  def everything(params):
    (loss, _), grads = jax.value_and_grad(run, has_aux=True)(params)
    every = run(params, levels='mean')[1]['out']  # what levels without weight would predict is part of the reference
    variants = {name: _variant(name) for name in case.group('out')}
    return loss, grads, every, {name: run(params, **changes)[0] for name, changes in variants.items() if changes}

  loss, grads, every, out = everything(params)
  out |= {
    'importance': batch['teacher_importance'],
    'ids_shuffle': masking.keep_smallest(order, order.shape[1])[0],
    'ids_keep': every['keep_ids'],
    'loss': loss,
    **_replay_teacher_input(case, image),
  }
  for i in range(every['layers'].shape[1]):
    out[f'student_hidden_{i}'] = every['layers'][:, i]
  for i in range(every['pred'].shape[1]):
    out |= {f'student_pred_{i}': every['pred'][:, i], f'teacher_target_{i}': every['target'][:, i]}
  return {**{f'out/{name}': np.asarray(value) for name, value in out.items()}, **names.grads(grads, table)}


def _variant(name: str) -> dict:
  """Options of an output such as 'loss_whiten_l1' beside those of the case; {} for other outputs."""
  if found := re.fullmatch(r'loss_weights_(\w+)', name):
    return {'levels': found[1]}
  if found := re.fullmatch(r'loss_fusion_(\w+)', name):
    return {'fusion': found[1]}
  if name == 'loss_random_mask':
    return {'masking': 'random'}
  found = re.fullmatch(r'loss_(none|l2|whiten|bn)_(l2|l1|smoothl1)', name)
  return {'target_norm': found[1], 'distance': found[2]} if found else {}


def _replay_teacher_input(case, image):
  """What the CLIP teacher is fed, and the resizes for the one with patches of 14."""
  expected = case.group('out')
  out = {'teacher_pixel_values': jnp.moveaxis(pixels.renormalize(image, 'imagenet', 'clip'), -1, 1)}
  if 'bicubic' in expected:
    resized = teachers.resize(names.channels_last(case.inputs['bicubic_x']), expected['bicubic'].shape[-2:])
    out['bicubic'] = jnp.moveaxis(resized, -1, 1)
  for name in [name for name in expected if name.startswith('clip_pos_')]:
    given = next(value for key, value in case.inputs.items() if key.startswith('clip_pos_'))
    old, new = (round((len(x) - 1) ** 0.5) for x in (given, expected[name]))
    out[name] = posemb.resample(given, (old, old), (new, new), cls_rows=1)
  return out


def _replay_clip(case):
  """Every hidden state and attention of the tower, for images with ImageNet statistics."""
  c = case.config
  stored = {
    name: files.Stored(value.shape, value.dtype, lambda value=value: value) for name, value in case.weights.items()
  }
  hints = layout.Hints(
    heads=c.num_attention_heads,
    image_size=(c.img_size,) * 2,
    eps=c.layer_norm_eps,
    activation=huggingface.ACTIVATIONS[c.hidden_act],
  )
  bundle, unknown, _ = layout.load(
    files.Weights(case.name, 'safetensors', stored), huggingface.CLIP, 'vision_model.', hints
  )
  teacher = teachers.Teacher(bundle.module, bundle.stats)
  frozen = {'encoder': names.complete(bundle.params['encoder'], unknown)}
  image = names.channels_last(case.inputs['imgs'])
  out = teacher(frozen, image)
  image = pixels.renormalize(image, 'imagenet', teacher.stats)
  _, seen = teacher.encoder.apply({'params': frozen['encoder']}, image, show='all')
  hidden = [out['input'], *out['layers']]
  result = {
    'pixel_values': jnp.moveaxis(image, -1, 1),
    'last_hidden_state': hidden[-1],
    'pooled': out['cls'],
    **{f'hidden_{i}': value for i, value in enumerate(hidden)},
    **{f'attn_{i}': value for i, value in enumerate(seen['attention'])},
  }
  return {f'out/{name}': np.asarray(value) for name, value in result.items()}
