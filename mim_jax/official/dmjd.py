"""DMJD's official release (mx-mark/DMJD): names, and the replay of `dmjd` (pre-training of DMJDConViT).

Published files are dicts with `model`, `optimizer`, `epoch`, `scaler` and `args`; the names below are those in `model`.
They may come from training with `visible_targets='raster'` (see `mim_jax.methods.dmjd`).
"""

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax import method
from mim_jax.models import convmae, vit
from mim_jax.official import names
from mim_jax.ops import hog

# Fixed tables that official files carry and our trees do not.
TABLES = ('pos_embed', 'decoder_pos_embed')

DEPTHWISE = names.Form(
  lambda w: w.transpose(2, 3, 1, 0), lambda w: w.transpose(3, 2, 0, 1)
)  # [C, 1, k, k] <-> [k, k, 1, C]


def convolution(theirs, ours, side) -> list[names.Entry]:
  """Convolution whose stride is its kernel of `side` (number or pair)."""
  return [
    names.Entry(f'{theirs}.weight', f'{ours}/kernel', names.patch_conv(vit.sides(side, 2))),
    names.Entry(f'{theirs}.bias', f'{ours}/bias'),
  ]


def encoder_names(patch, heads, prefix='encoder/') -> list[names.Entry]:
  """ConvMAE's names, which DMJD keeps, for `models.convmae.ConvMAE`; `pos_embed` only matters for a learned table."""
  table = [names.Entry('pos_embed', f'{prefix}pos_embed'), *names.linear('patch_embed4', f'{prefix}patch_embed4')]
  first = tuple(side // convmae.FINER[0] for side in vit.sides(patch, 2))
  for i, side in enumerate((first, 2, 2), start=1):
    table += convolution(f'patch_embed{i}.proj', f'{prefix}patch_embed{i}/proj', side)
    table += names.norm(f'patch_embed{i}.norm', f'{prefix}patch_embed{i}/norm')
  for i, finer in enumerate(convmae.FINER, start=1):
    theirs, ours = f'blocks{i}.{{i}}', f'{prefix}blocks{i}'
    for part, own in (('conv1', 'conv1'), ('conv2', 'conv2'), ('mlp.fc1', 'mlp/fc1'), ('mlp.fc2', 'mlp/fc2')):
      table += convolution(f'{theirs}.{part}', f'{ours}/{own}', 1)
    table += names.norm(f'{theirs}.norm1', f'{ours}/norm1') + names.norm(f'{theirs}.norm2', f'{ours}/norm2')
    table += [
      names.Entry(f'{theirs}.attn.weight', f'{ours}/depthwise/kernel', DEPTHWISE),  # it stands where attention would
      names.Entry(f'{theirs}.attn.bias', f'{ours}/depthwise/bias'),
    ]
    table += convolution(f'stage{i}_output_decode', f'{prefix}fuse{i}', finer)
  return [*table, *names.block('blocks3.{i}', f'{prefix}blocks', heads), *names.norm('norm', f'{prefix}norm')]


def decoder_names(heads) -> list[names.Entry]:
  return [
    names.Entry('mask_token', 'decoder/mask_token'),
    *names.linear('decoder_embed', 'decoder/embed'),
    *names.block('decoder_blocks.{i}', 'decoder/blocks', heads),
    *names.norm('decoder_norm', 'decoder/norm'),
    *names.linear('decoder_pred', 'decoder/pred'),
  ]


def pretraining(cfg) -> list[names.Entry]:
  """Names of DMJDConViT for the options of `mim_jax.methods.dmjd` with the backbone convmae."""
  visible = [
    *[entry for i in (1, 2, 3) for entry in names.linear(f'proj_embed.{3 * (i - 1)}', f'visible/fc{i}')],
    *[entry for i in (1, 2) for entry in names.norm(f'proj_embed.{3 * i - 2}', f'visible/norm{i}')],
    *names.linear('predictor.0', 'visible/pred'),
  ]
  heads = convmae.size(cfg.size)['heads']
  return encoder_names(cfg.patch, heads) + decoder_names(vit.size(cfg.decoder)['heads']) + visible


def config_of(case, **overrides):
  """Our options for a case's `config`."""
  c = case.config
  if list(c.patch_size[1:]) != [2, 2]:
    raise ValueError(f'stages with strides {c.patch_size} are not ConvMAE, whose second and third halve the grid')
  row = lambda numbers: ','.join(map(str, numbers))
  return method.options(
    'dmjd',
    size=f'{row(c.embed_dim)}/{row(c.depth)}/{c.num_heads}',
    decoder=f'{c.decoder_embed_dim}/{c.decoder_depth}/{c.decoder_num_heads}',
    decoder_mlp_ratio=float(c.mlp_ratio[0]),  # theirs follows the first stage
    patch=int(np.prod(c.patch_size)),
    image_size=c.img,
    channels=case.inputs['imgs'].shape[1],
    conv_mlp_ratios=tuple(map(float, c.mlp_ratio[:2])),
    mlp_ratio=float(c.mlp_ratio[2]),
    conv_ln_eps=c.norm_eps_conv_stages,
    ln_eps=c.norm_eps_transformer,
    mask_ratio=c.mask_ratio,
    pred_ratio=c.pred_ratio,
    unit={'block': 2, 'rand': 1}[c.mask_type],
    bins=c.hog['orientations'],
    cell=c.hog['cell'],
    whiten_eps=c.hog['whiten_eps'],
    hidden_loss=c.mim_loss_type,
    visible_loss=c.vis_loss_type,
    visible_weight=c.theta,
    **overrides,
  )


def replay(case) -> dict[str, np.ndarray]:
  """Outputs and gradients of a case under its own names, with the targets of the visible branch in both orders."""
  cfg = config_of(case)
  weights = {name: value for name, value in case.weights.items() if name not in TABLES}
  table = pretraining(cfg)
  params = names.complete(*names.load(weights, table))
  batch = {'image': names.channels_last(case.inputs['imgs']), 'image_u8': jnp.asarray(case.inputs['target_u8'])}
  whole = lambda order: jnp.broadcast_to(jnp.asarray(order), (len(batch['image']), len(order)))
  draws = {
    'noise': jnp.asarray(case.inputs['noise']),
    'seen_order': whole(case.inputs['perm_disj']),
    'hidden_order': whole(case.inputs['perm_joint']),
  }
  views = lambda x: np.concatenate(
    np.moveaxis(np.asarray(x), 1, 0)
  )  # [B, 2, ...] -> theirs: all first views, then all second
  result = {}
  for order, suffix in (('raster', ''), ('aligned', '_aligned')):
    built = method.build(config_of(case, visible_targets=order))
    (loss, aux), grads = jax.jit(jax.value_and_grad(built.loss, has_aux=True))(params, {}, {}, batch, draws, 0)
    result |= {
      f'out/loss{suffix}': loss,
      f'out/loss_vis_{order}': aux['metrics']['loss/visible'],
      **names.grads(grads, table, f'grad{suffix}/'),
    }
  out = aux['out']
  result |= {
    'out/hog_raw': jnp.moveaxis(hog.histograms(batch['image_u8'], cfg.bins, cfg.cell), -1, 1),
    'out/target': out['target'],
    'out/loss_mim': aux['metrics']['loss/hidden'],
    'out/ids_keep': views(out['keep_ids']),
    'out/ids_restore': views(out['restore_ids']),
    'out/mask': views(out['mask']),
    'out/latent': views(out['latent']),
    'out/pred': views(out['pred']),
    'out/pred_vis': views(out['pred_visible']),
  }
  return {name: np.asarray(value) for name, value in result.items()}
