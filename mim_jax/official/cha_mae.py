"""ChA-MAEViT's official release (chaudatascience/cha_mae_vit): names, and replays of every way to hide patches and
channels.

No checkpoints are linked in the repository; its trainer saves flat safetensors, `model.safetensors`, under these names.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax import method
from mim_jax.methods import cha_mae
from mim_jax.models import vit
from mim_jax.official import names
from mim_jax.ops import masking

STRATEGIES = {
  'PATCH_MASKING_ONLY': cha_mae.PATCH,
  'CHANNEL_MASKING_ONLY': cha_mae.CHANNEL,
  'BOTH_MASKING': cha_mae.BOTH,
}
FUSIONS = {'cls_attn_pooling_sigmoid': 'sigmoid', 'cls_attn_pooling': 'add', 'cls_token': 'cls'}
TARGETS = {'norm_pix_loss': 'norm_pix', 'instance_norm': 'instance', None: 'raw'}


def patch_conv(patch) -> names.Form:
  """Convolution over space alone [D, 1, 1, p, p] <-> kernel [p p, D]."""
  return names.Form(lambda w: w.reshape(w.shape[0], -1).T, lambda w: w.T.reshape(-1, 1, 1, *patch))


def pretraining(cfg) -> list[names.Entry]:
  """Names of `ChAMAEViT` for the options of `mim_jax.methods.cha_mae`."""
  encoder_heads, decoder_heads = vit.size(cfg.size)['heads'], int(cfg.decoder.split('/')[1])
  scaled = dataclasses.replace(names.TIMM_BLOCK, scale1='ls1.gamma', scale2='ls2.gamma')
  tokens = names.Form(lambda w: w[0, :, :, 0, 0].T, lambda w: w.T[None, :, :, None, None])
  return [
    names.Entry('patch_embed.proj.weight', 'encoder/patch_embed/kernel', patch_conv(vit.sides(cfg.patch, 2))),
    names.Entry('patch_embed.proj.bias', 'encoder/patch_embed/bias'),
    names.Entry('patch_embed.channel_tokens', 'encoder/channel_tokens', tokens),
    *[names.Entry(name, f'encoder/{name}') for name in ('cls_token', 'memory_tokens', 'pos_embed')],
    *names.block('blocks.{i}', 'encoder/blocks', encoder_heads, scaled),
    *names.norm('norm', 'encoder/norm'),
    names.Entry('pooling_query', 'fusion/query'),
    *[entry for part in 'qkvo' for entry in names.linear(f'attn_pooling.fc_{part}', f'fusion/{part}')],
    *names.linear('encoder_decoder_proj', 'decoder/embed'),
    names.Entry('decoder.mask_token', 'decoder/mask_token'),
    *names.block('decoder.blocks.{i}', 'decoder/blocks', decoder_heads),
    *names.norm('decoder.norm', 'decoder/norm'),
    *names.linear('decoder_pred', 'decoder/pred'),
    *names.linear('classifier_head.0', 'classifier/fc1'),
    *names.linear('classifier_head.2', 'classifier/fc2'),
    *names.linear('proxy_head', 'proxy_head'),
    names.Entry('output_proxies', 'proxies'),
    names.Entry('channel_token_proxies', 'channel_proxies'),
  ]


def config_of(case, given, channels: int, padded: bool):
  """Our options for the part `given` of a case's `config`, with images of so many channels."""
  c = case.config
  return method.options(
    'cha_mae',
    size=f'{c.embed_dim}/{c.depth}/{c.num_heads}',
    patch=c.patch_size,
    image_size=c.img_size,
    channels=channels,
    channel_types=c.in_chans,
    same_channels=not padded,
    classes=c.num_classes,
    mlp_ratio=float(c.mlp_ratio),
    ln_eps=c.norm_eps,
    layer_scale=float(c.init_values or 0.0),
    memory_tokens=c.num_memory_tokens,
    fusion=FUSIONS[c.encoder_pooling],
    decoder=f'{c.decoder["depth"]}/{c.decoder["num_heads"]}',
    mask_ratio=given.get('mask_ratio', 0.5),
    pad_mode='official',
    position_gradient='copied',
    target=TARGETS[c.mae_loss_norm],
    fourier_weight=c.mae_recon_fourier_lambda,
    mae_weight=c.mae_lambda,
    proxy_weight=c.proxy_loss_lambda,
    proxy_head=c.use_proxy_head,
    proxy_temperature=c.proxy_temperature,
    ce_weight=c.cross_entropy_lambda,
    ce_temperature=c.cross_entropy_temperature,
    token_weight=c.diverse_patch_token_weight,
    token_same=c.diverse_patch_token_gamma_s,
    token_other=c.diverse_patch_token_gamma_d,
    channel_weight=c.diverse_channel_token_weight,
  )


def replay(case) -> dict[str, np.ndarray]:
  """Outputs and gradients of every part of a reference case under its own names."""
  result = {}
  for name, given in case.config.cases.items():
    prefix = '' if name == 'main' else f'{name}/'
    inputs = {key.removeprefix(prefix): value for key, value in case.inputs.items() if key.startswith(prefix)}
    part = _replay_training if given['strategy'] else _replay_evaluation
    for kind, values in part(case, given, inputs).items():
      result |= {f'{kind}/{prefix}{key}': np.asarray(value) for key, value in values.items()}
  return result


def _opened(case, cfg):
  """(params, names that they have in the case)."""
  table = pretraining(cfg)
  params = names.complete(*names.load(case.weights, table))
  return params, table


def _batch(inputs):
  """Our fields of a case's inputs; channel ids may be given once for all images."""
  batch = {'image': names.channels_last(inputs['imgs'])}
  size, channels = batch['image'].shape[0], batch['image'].shape[-1]
  if 'labels' in inputs:
    batch['label'] = jnp.asarray(inputs['labels'])
  if 'channel_ids' in inputs:
    batch['channel_ids'] = jnp.broadcast_to(jnp.asarray(inputs['channel_ids']), (size, channels))
    valid = inputs.get('valid_channel_mask', np.ones((size, channels)))
    batch['channel_valid'] = jnp.asarray(valid, bool)
  return batch


def _draws(cfg, given, inputs, batch, kept):
  """Our draws for the random numbers of a case."""
  size, channels = batch['image'].shape[0], batch['image'].shape[-1]
  same = cfg.same_channels
  types = jnp.broadcast_to(jnp.arange(channels), (size, channels))
  ids, valid = batch.get('channel_ids', types), batch.get('channel_valid', jnp.ones((size, channels), bool))
  count = (inputs['mask'].shape[1]) // channels
  draws = {
    'strategy': jnp.full(size, STRATEGIES[given['strategy']]),
    'patch_noise': jnp.asarray(inputs.get('patch_noise', np.zeros((size, channels, count), np.float32))),
    'hidden_count': jnp.zeros(size, jnp.int32),
    'channel_noise': jnp.zeros((size, channels)),
  }
  if 'channel_perm' in inputs:
    draws['hidden_count'] = jnp.full(size, inputs['k'][0])
    draws['channel_noise'] = jnp.broadcast_to(jnp.argsort(jnp.asarray(inputs['channel_perm'])), (size, channels))
  elif 'channel_scores' in inputs:
    least = int(given.get('at_least_one', False))
    draws['hidden_count'] = cha_mae.hidden_counts(jnp.asarray(inputs['u_num_channels']), valid.sum(1), least)
    draws['channel_noise'] = jnp.asarray(inputs['channel_scores'])
  draws = cha_mae.completed(draws, ids, valid, kept, cfg.channel_types, same, not same)
  # The official sort is not stable: in which order hidden tokens come is as it happened there.
  return draws | ({} if same else {'rank': jnp.asarray(inputs['ind_restore'])})


def _replay_training(case, given, inputs):
  batch = _batch(inputs)
  cfg = config_of(case, given, batch['image'].shape[-1], 'channel_ids' in inputs)
  params, table = _opened(case, cfg)
  built = method.build(cfg)
  kept = masking.keep_count(inputs['mask'].shape[1] // batch['image'].shape[-1], cfg.mask_ratio)
  draws = _draws(cfg, given, inputs, batch, kept)
  step = jax.jit(jax.value_and_grad(built.loss, has_aux=True))
  (loss, aux), grads = step(params, {}, {}, batch, draws, 0)
  for name in ('mask', 'visible'):
    if not np.array_equal(np.asarray(aux['out'][name]).reshape(inputs[name].shape), inputs[name] > 0):
      raise ValueError(f'{case.name}: {name} does not follow from the draws')
  metrics, out = aux['metrics'], aux['out']
  extra = 1 + cfg.memory_tokens
  tokens = masking.take(out['x'][:, extra:], jnp.asarray(inputs['tokens_to_keep']))
  result = {
    'proxy_loss': metrics['loss/proxy'],
    'ce_loss': metrics['loss/ce'],
    'mae_img_loss': metrics['loss/pixel'],
    'mae_fourier_loss': metrics['loss/fourier'],
    'mae_loss': metrics['loss/mae'],
    'diverse_channeltoken_loss': metrics['loss/channels'],
    'diverse_patchtoken_loss': metrics['loss/tokens'],
    'loss': loss,
    'latent': jnp.concatenate([out['x'][:, :extra], tokens], axis=1),
    'fused': out['fused'],
    'logits': out['logits'],
    'recon': out['recon'],
  }
  encoder = cha_mae.modules(cfg)[0]
  seen = encoder.apply({'params': params['encoder']}, names.channels_last(case.inputs['imgs']), _all(case))
  return {
    'out': result | {'pos_embed_seen': seen['pos']},
    'grad': names.grads(grads, table, prefix=''),
  }


def _all(case):
  size, channels = case.inputs['imgs'].shape[:2]
  return jnp.broadcast_to(jnp.arange(channels), (size, channels))


def _replay_evaluation(case, given, inputs):
  batch = _batch(inputs)
  cfg = config_of(case, given, case.config.in_chans, padded=False)
  params, _ = _opened(case, cfg)
  encoder = cha_mae.modules(cfg)[0]
  ids = batch.get('channel_ids', _all(case))
  latent = encoder.apply({'params': params['encoder']}, batch['image'], ids)['x']
  encoded = method.build(cfg).encode(params, batch)
  return {'out': {'latent': latent, 'fused': encoded['cls'], 'logits': encoded['logits']}}
