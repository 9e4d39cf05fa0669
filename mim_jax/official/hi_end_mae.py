"""Hi-End-MAE's official release (FengheTan9/Hi-End-MAE): names, replays of pre-training and of UNETR (`hi_end_mae_seg`).

The published file (vit_large_12p) is a dict with key `state_dict` whose names all start with `module.`: `load` reads
it. The fine-tuning network is on MONAI 1.2's ViT, without class token and with trained positions: `finetuning` has its
names, `to_finetuning` the way from pre-trained weights to it.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax import method
from mim_jax.evals import metrics
from mim_jax.methods import hi_end_mae
from mim_jax.models import unetr, vit
from mim_jax.official import names
from mim_jax.ops import losses, masking, patches

# Fixed tables that official files carry and our trees do not.
TABLES = ('encoder_pos_embed', 'decoder_pos_embed')

# The official table has no row for the class token, whose position is zero; ours has that row.
POSITIONS = names.Form(lambda w: np.pad(w, ((0, 0), (1, 0), (0, 0))), lambda w: w[:, 1:])

# Kernels of convolutions [O, I, k, k, k] <-> [k, k, k, I, O], and of transposed ones [I, O, k, k, k] <-> [I, k, k, k,
# O].
CONV = names.Form(lambda w: np.moveaxis(w, (0, 1), (-1, -2)), lambda w: np.moveaxis(w, (-1, -2), (0, 1)))
UP = names.Form(lambda w: np.moveaxis(w, 1, -1), lambda w: np.moveaxis(w, -1, 1))

# A convolution of one channel by one weight for each output, then InstanceNorm: nothing but the sign of the weight has
# an effect, so the gradient is what rounding leaves of a sum that cancels.
TOLERANCES = {'grad/encoder1.layer.conv3.conv.weight': 1e-3}

MONAI_BLOCK = names.BlockNames('norm1', 'attn.qkv', 'attn.out_proj', 'norm2', 'mlp.linear1', 'mlp.linear2')


def pretraining(cfg) -> list[names.Entry]:
  """Names of `hi_end_mae.py:HiEndMAE` for the options of `mim_jax.methods.hi_end_mae`."""
  heads, decoder_heads = vit.size(cfg.size)['heads'], vit.size(cfg.decoder)['heads']
  learned = [names.Entry('encoder_pos_embed', 'encoder/pos_embed', POSITIONS)] if cfg.pos == 'learned' else []
  return [
    names.Entry('encoder.cls_token', 'encoder/cls_token'),
    *learned,
    names.Entry(
      'encoder.patch_embed.proj.weight', 'encoder/patch_embed/kernel', names.patch_conv(vit.sides(cfg.patch, 3))
    ),
    names.Entry('encoder.patch_embed.proj.bias', 'encoder/patch_embed/bias'),
    *names.block('encoder.blocks.{i}', 'encoder/blocks', heads),
    *names.norm('encoder.norm', 'encoder/norm'),
    *[e for i in range(len(cfg.taps) + 1) for e in names.linear(f'encoder_to_decoder.{i}', f'decoder/bridge{i}')],
    names.Entry('mask_token', 'decoder/mask_token'),
    *names.block('decoder.blocks.{i}', 'decoder/blocks1', decoder_heads),
    *names.cross_block('decoder.cross_attention_blocks.{i}', 'decoder/blocks2', decoder_heads),
    *names.norm('decoder.norm', 'decoder/norm'),
    *names.linear('decoder.head', 'decoder/pred'),
  ]


def load(weights, cfg) -> tuple[dict, list[str]]:
  """An official `state_dict` -> (the params of our method, names that were not taken), fixed tables aside."""
  weights = {name.removeprefix('module.'): value for name, value in weights.items()}
  fixed = TABLES if cfg.pos == 'sincos' else TABLES[1:]
  return names.load({name: value for name, value in weights.items() if name not in fixed}, pretraining(cfg))


def to_finetuning(params, cfg) -> dict:
  """Encoder params of `models.unetr.Unetr` from those of our method: no class token, and positions to be trained."""
  encoder, _ = hi_end_mae.modules(cfg)
  kept = {name: value for name, value in params['encoder'].items() if name not in ('cls_token', 'pos_embed')}
  table = params['encoder'].get('pos_embed', encoder.table)
  return {**kept, 'pos_embed': np.asarray(table)[:, 1:]}


def finetuning(heads: int) -> list[names.Entry]:
  """Names of downstream/models/UNETR/unetr.py for `models.unetr.Unetr`."""

  def residual(theirs, ours):
    return [names.Entry(f'{theirs}.conv{i}.conv.weight', f'{ours}/conv{i}/kernel', CONV) for i in (1, 2, 3)]

  def lift(theirs, ours, steps):
    entries = [names.Entry(f'{theirs}.transp_conv_init.conv.weight', f'{ours}/up0/kernel', UP)]
    for i in range(steps):
      entries += [names.Entry(f'{theirs}.blocks.{i}.0.conv.weight', f'{ours}/up{i + 1}/kernel', UP)]
      entries += residual(f'{theirs}.blocks.{i}.1', f'{ours}/res{i + 1}')
    return entries

  def merge(theirs, ours):
    return [
      names.Entry(f'{theirs}.transp_conv.conv.weight', f'{ours}/up/kernel', UP),
      names.Entry(f'{theirs}.conv3d.weight', f'{ours}/conv/kernel', CONV),
      names.Entry(f'{theirs}.conv3d.bias', f'{ours}/conv/bias'),
      *residual(f'{theirs}.conv_block', f'{ours}/res'),
    ]

  return [
    names.Entry('vit.patch_embedding.position_embeddings', 'encoder/pos_embed'),
    *names.linear('vit.patch_embedding.patch_embeddings.1', 'encoder/patch_embed'),
    *names.block('vit.blocks.{i}', 'encoder/blocks', heads, MONAI_BLOCK),
    *names.norm('vit.norm', 'encoder/norm'),
    *residual('encoder1.layer', 'decoder/encoder1'),
    *[entry for k, steps in ((2, 2), (3, 1), (4, 0)) for entry in lift(f'encoder{k}', f'decoder/encoder{k}', steps)],
    *[entry for k in (5, 4, 3, 2) for entry in merge(f'decoder{k}', f'decoder/decoder{k}')],
    names.Entry('out.conv.conv.weight', 'decoder/out/kernel', CONV),
    names.Entry('out.conv.conv.bias', 'decoder/out/bias'),
  ]


def replay(case) -> dict[str, np.ndarray]:
  """Outputs and gradients of a reference case under its own names."""
  return _replay_finetuning(case) if case.name.startswith('hi_end_mae_seg') else _replay_pretraining(case)


def config_of(case):
  """Our options for a pre-training case's `config`."""
  c = case.config
  return method.options(
    'hi_end_mae',
    size=f'{c.enc_dim}/{c.enc_depth}/{c.enc_heads}',
    decoder=f'{c.dec_dim}/{c.dec_self_depth}/{c.dec_heads}',
    taps=tuple(c.hidden_taps_zero_based),
    patch=_sides(c.patch_size),
    image_size=_sides(c.img_size),
    channels=c.in_chans,
    mlp_ratio=float(c.mlp_ratio),
    ln_eps=c.ln_eps,
    mask_ratio=c.mask_ratio,
    pos={'sincos': 'sincos', 'perceptron': 'learned'}[c.pos_embed_type],
  )


def _sides(value):
  return tuple(value) if isinstance(value, list) else value


def _volumes(array):
  """[B, C, H, W, D] -> [B, H, W, D, C]."""
  return jnp.moveaxis(jnp.asarray(array), 1, -1)


def _replay_pretraining(case):
  cfg = config_of(case)
  table = pretraining(cfg)
  params = names.complete(*load(case.weights, cfg))
  built = method.build(cfg)
  encoder, decoder = hi_end_mae.modules(cfg)
  batch, draws = {'image': _volumes(case.inputs['imgs'])}, {'noise': jnp.asarray(case.inputs['noise'])}

  (loss, aux), grads = jax.jit(jax.value_and_grad(built.loss, has_aux=True))(params, {}, {}, batch, draws, 0)
  shuffle, restore_ids, _ = masking.keep_smallest(draws['noise'], draws['noise'].shape[1])
  keep_ids = shuffle[:, : aux['out']['latent'].shape[1] - 1]

  @jax.jit
  def inner(params):
    encoder_params = {'params': hi_end_mae.placed(params['encoder'])}
    latent, seen = encoder.apply(encoder_params, batch['image'], keep_ids, taps=True)
    layers = seen['layers'][jnp.asarray(cfg.taps)]
    return layers, *decoder.apply({'params': params['decoder']}, latent, layers, shuffle, taps=True)

  layers, pred, built_up = inner(params)
  cubes = patches.patchify(batch['image'], encoder.patch)
  out = {
    'patches': cubes,
    'latent': aux['out']['latent'],
    'pred': aux['out']['pred'],
    'target': aux['out']['target'],
    'loss': loss.reshape(1),
    'recon': hi_end_mae.undo_norm(masking.take(pred[:, 1:], restore_ids), cubes),
    f'dec_in_{vit.size(cfg.size)["depth"]}': built_up['input'],
    **{f'hidden_{tap}': layer for tap, layer in zip(cfg.taps, layers, strict=True)},
    **{f'dec_kv_{tap}': context for tap, context in zip(cfg.taps, built_up['context'], strict=True)},
  }
  return {**{f'out/{name}': np.asarray(value) for name, value in out.items()}, **names.grads(grads, table)}


def _replay_finetuning(case):
  c = case.config
  patch = vit.sides(_sides(c.patch_size), 3)
  encoder = vit.ViT(
    c.hidden_size,
    c.num_layers,
    c.num_heads,
    patch,
    patches.grid_of(vit.sides(_sides(c.img_size), 3), patch),
    c.mlp_dim / c.hidden_size,
    pos='learned',
    eps=c.vit_ln_eps,
    cls=False,
  )
  model = unetr.Unetr(encoder, c.num_classes, features=c.feature_size)
  table = finetuning(c.num_heads)
  params = names.complete(*names.load(case.weights, table))
  images, labels = _volumes(case.inputs['imgs']), jnp.asarray(case.inputs['labels'])[:, 0]

  def loss_of(params):
    logits, seen = model.apply({'params': params}, images, stages=True)
    parts = losses.dice(logits, labels, c.dice_smooth_dr), losses.cross_entropy(logits, labels)
    return sum(parts), (logits, seen, *parts)

  (loss, (logits, seen, dice, ce)), grads = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
  *inner, last = seen.pop('layers')
  tables = [metrics.confusion(*pair, c.num_classes) for pair in _labelled(logits, labels)]
  figures = np.stack([metrics.dice(table) for table in tables])
  out = {
    'vit_out': last,
    **{f'hidden_{tap}': layer for tap, layer in zip(model.taps, inner, strict=True)},
    **{f'{name}_absmean': jnp.mean(jnp.abs(value), axis=(0, 1, 2, 3)) for name, value in seen.items()},
    'logits': jnp.moveaxis(logits, -1, 1),
    'loss_dice': dice.reshape(1),
    'loss_ce': ce.reshape(1),
    'loss': loss.reshape(1),
    'dice': np.nan_to_num(figures, nan=-1),
    'dice_present': np.isfinite(figures).astype(np.int32),
  }
  return {**{f'out/{name}': np.asarray(value) for name, value in out.items()}, **names.grads(grads, table)}


def _labelled(logits, labels):
  """(predicted, true) classes of each volume, flat."""
  for scores, truth in zip(np.asarray(logits), np.asarray(labels), strict=True):
    yield scores.argmax(axis=-1).ravel(), truth.ravel()
