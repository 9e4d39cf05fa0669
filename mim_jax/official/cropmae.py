"""CropMAE's official release (alexandre-eymael/CropMAE): names, and replays of pre-training and of label propagation.

Published files hold ViT-S/16 under `model` beside optimizer, epoch, scaler and args, pre-trained on ImageNet or
Kinetics-400.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax import method
from mim_jax.evals import propagation
from mim_jax.models import vit
from mim_jax.official import names
from mim_jax.official.mae import TABLES, encoder_names
from mim_jax.ops import masking


def attention_names(theirs: str, ours: str, heads: int) -> list[names.Entry]:
  """Names of a stack of PyTorch MultiheadAttention layers; `theirs` holds `{i}`."""
  return [
    names.Entry(f'{theirs}.in_proj_weight', f'{ours}/qkv/kernel', names.qkv_kernel(heads)),
    names.Entry(f'{theirs}.in_proj_bias', f'{ours}/qkv/bias', names.qkv_bias(heads)),
    names.Entry(f'{theirs}.out_proj.weight', f'{ours}/proj/kernel', names.merge_heads(heads)),
    names.Entry(f'{theirs}.out_proj.bias', f'{ours}/proj/bias'),
  ]


def pretraining(cfg) -> list[names.Entry]:
  """Names of `SiameseMAE` for the options of `mim_jax.methods.cropmae`."""
  theirs, ours, heads = 'decoder_blocks.{i}', 'decoder/blocks', vit.size(cfg.decoder)['heads']
  return [
    *encoder_names(vit.sides(cfg.patch, 2), vit.size(cfg.size)['heads']),
    *names.linear('decoder_embed', 'decoder/embed'),
    names.Entry('mask_token', 'decoder/mask_token'),
    *attention_names(f'{theirs}.multihead_attn', f'{ours}/cross_attn', heads),
    *attention_names(f'{theirs}.self_attn', f'{ours}/self_attn', heads),
    *names.linear(f'{theirs}.linear1', f'{ours}/mlp/fc1'),
    *names.linear(f'{theirs}.linear2', f'{ours}/mlp/fc2'),
    *names.norm(f'{theirs}.norm2', f'{ours}/cross_norm'),  # numbered by the order of attributes, used as 2, 3, 1
    *names.norm(f'{theirs}.norm3', f'{ours}/mlp_norm'),
    *names.norm(f'{theirs}.norm1', f'{ours}/self_norm'),
    *names.norm('decoder_norm', 'decoder/norm'),
    *names.linear('decoder_pred', 'decoder/pred'),
  ]


def config_of(case):
  """Our options for a case's `config`."""
  c = case.config
  return method.options(
    'cropmae',
    size=f'{c.embed_dim}/{c.depth}/{c.num_heads}',
    decoder=f'{c.decoder_embed_dim}/{c.decoder_depth}/{c.decoder_num_heads}',
    patch=c.patch_size,
    image_size=c.img_size,
    channels=case.inputs['imgs'].shape[2],
    mlp_ratio=float(c.mlp_ratio),
    ln_eps=c.norm_eps,
    mask_ratio=c.mask_ratio,
    norm_pix=c.norm_pix_loss,
    ff_dim=c.dim_feedforward,
    decoder_dropout=c.dropout,
  )


def replay(case) -> dict[str, np.ndarray]:
  """Outputs and gradients of a reference case under its own names."""
  cfg = config_of(case)
  weights = {name: value for name, value in case.weights.items() if name not in TABLES}
  table = [entry for entry in pretraining(cfg) if entry.theirs not in TABLES]
  params = names.complete(*names.load(weights, table))
  built = method.build(cfg)
  batch = {'views': names.channels_last(case.inputs['imgs'])}
  draws = {'noise': jnp.asarray(case.inputs['noise'])}
  (loss, aux), grads = jax.jit(jax.value_and_grad(built.loss, has_aux=True))(params, {}, {}, batch, draws, 0)
  out = aux['out']
  kept = out['latent'].shape[1] - 1
  result = {
    'latent_full': out['memory'],
    'latent_masked': out['latent'],
    'ids_restore': masking.keep_smallest(draws['noise'], kept)[1],
    'mask': out['mask'],
    'pred': out['pred'],
    'loss': loss,
  }
  if 'prop_feats' in case.inputs:
    result['prop_pred'] = _replay_propagation(case)
  return {**{f'out/{name}': np.asarray(value) for name, value in result.items()}, **names.grads(grads, table)}


def _replay_propagation(case):
  """Soft labels [T, h, w, K] of the frames of the case; the copies of the first one in front are left out, as we make
  them.
  """
  p = case.config.propagation
  frames = np.moveaxis(case.inputs['prop_feats'], 0, -1)[p['n_context'] :]
  return propagation.propagate(
    frames,
    case.inputs['prop_label0'],
    context=p['n_context'],
    k=p['topk'],
    radius=p['radius'],
    temperature=p['temperature'],
  )
