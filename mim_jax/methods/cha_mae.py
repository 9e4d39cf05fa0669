"""ChA-MAE: hidden patches and hidden channels, with a supervised loss (Pham et al. 2025, arXiv 2503.19331).

Official code: chaudatascience/cha_mae_vit, models/cha_mae_vit.py ("ChAMAEViT"). Where paper and code differ, the code
is followed: channel tokens are added, not concatenated; positions are resampled even on their own grid; one softmax
over heads and tokens pools the tokens; the "Fourier" loss works on runs of numbers that are no patches
(`fourier='patch'` is the paper's). In batches of images with different channels the code lets copies of the first token
fill shorter examples: they are pooled and take the place of mask tokens, so the loss depends on the batch.
`pad_mode='clean'`, the default, leaves them out, 'official' repeats them. PyTorch's backward pass of a bicubic resize
between equal sizes is a copy, though its forward pass is not: `position_gradient` is 'exact' by default, 'copied'
repeats that.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax.errors import ConfigError
from mim_jax.method import Field, Method
from mim_jax.models import blocks, channel_vit, initial, vit
from mim_jax.ops import losses, masking, patches, targets

DEFAULTS = {
  'size': '384/11/6',  # encoder: Ti S B L H or 'width/depth/heads'
  'patch': 16,  # side
  'image_size': 224,  # side, or (height, width)
  'channels': 5,  # of an image, padding included
  'channel_types': 12,  # all that there are, over all images
  'same_channels': False,  # every image has all types in order: one draw of hidden channels for the batch
  'classes': 14,
  'mlp_ratio': 4.0,
  'ln_eps': 1e-6,
  'layer_scale': 1.0,  # start of the encoder's; 0 for none
  'memory_tokens': 4,
  'init_std': 0.02,  # of linear layers, tokens and positions; much narrower networks than 384 need more to leave the plateau
  'fusion': 'sigmoid',  # of the class token with pooled patches: sigmoid | add | cls (none)
  'decoder': '1/16',  # depth/heads; it is as wide as the encoder
  'mask_ratio': 0.75,  # of the patches of a channel
  'p_patch': 0.5,  # chance that a step hides patches alone
  'p_channel': 0.5,  # chance that it hides channels alone; else it hides both
  'at_least_one': False,  # hide one channel or more whenever channels are hidden
  'pad_mode': 'clean',  # clean | official, see above
  'position_gradient': 'exact',  # exact | copied, see above
  'target': 'norm_pix',  # norm_pix | instance (each channel of an image normalised) | raw
  'fourier': 'official',  # official | patch, see above
  'fourier_weight': 0.01,  # the pixels weigh 1 - this
  'mae_weight': 0.99,
  'proxy_weight': 0.01,  # supervised: distances to class proxies
  'proxy_head': True,  # a linear layer before them
  'proxy_temperature': 0.11,
  'ce_weight': 0.0,  # supervised: classifier
  'ce_temperature': 5.0,
  'token_weight': 1e-3,  # diversity of the embedded patches
  'token_same': 0.5,  # weight of similarity within a channel
  'token_other': 1.0,  # and between channels
  'channel_weight': 1e-4,  # diversity of the channel tokens
}

PATCH, CHANNEL, BOTH = range(3)
CHANNEL_TEMPERATURE = 0.1  # of the channel tokens' diversity where there is no classifier


class Classifier(nn.Module):
  classes: int

  @nn.compact
  def __call__(self, features):
    hidden = blocks.ACTIVATIONS['gelu'](blocks.Dense(4 * features.shape[-1], name='fc1')(features))
    return blocks.Dense(self.classes, name='fc2')(hidden)


def hide(draws, valid, kept: int):
  """What a step shows and asks for: visible, masked [B, C, P] bool, hidden channels [B, C] bool (paper section 3.1).

  In a channel the `kept` patches of smallest `patch_noise` [B, C, P] stay; of an image the `hidden_count` [B] valid
  channels of smallest `channel_noise` [B, C] are hidden; `strategy` [B] says which of the two count. valid [B, C] bool.
  """
  ranks = lambda x: jnp.argsort(jnp.argsort(x, axis=-1, stable=True), axis=-1)
  strategy = draws['strategy'][:, None]
  gone = ranks(jnp.where(valid, draws['channel_noise'], jnp.inf)) < draws['hidden_count'][:, None]
  gone &= strategy != PATCH
  hidden = ((ranks(draws['patch_noise']) >= kept) & (strategy != CHANNEL)[..., None]) | gone[..., None]
  return valid[..., None] & ~hidden, valid[..., None] & hidden, gone


def hidden_counts(uniform, number, least: int):
  """Channels to hide of each image, [B] int32: floor(uniform [B] * number [B]), at least `least`, and never all."""
  return jnp.clip(jnp.floor(uniform * number).astype(jnp.int32), least, number - 1)


def completed(draws, ids, valid, kept: int, types: int, same: bool, official: bool):
  """`draws` with what follows from those of the whole batch, and would be another thing in a part of it.

  'counts'; 'present' [B, types]: types that the loss on channel tokens is taken over, all rows alike; with `official`
  (`pad_mode`) also 'rank' [B, C P]: place of each token when visible ones come first.
  """
  visible, mask, gone = hide(draws, valid, kept)
  here = jax.nn.one_hot(ids, types) * (valid & ~gone if same else valid)[..., None]
  present = jnp.broadcast_to(jnp.max(here, axis=(0, 1)), (len(ids), types))
  more = {'present': present, 'counts': {'masked': jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)}}
  if official:
    order = jnp.argsort(~visible.reshape(len(ids), -1), axis=1, stable=True)
    more['rank'] = jnp.argsort(order, axis=1).astype(jnp.int32)
  return draws | more


def masked_mean(per_token, mask, count):
  """Sum of per_token [B, N] where mask [B, N], over `count`, the number of masked tokens of the whole step."""
  return jnp.sum(jnp.where(mask, per_token, 0.0)) / count


def amplitudes(x):
  """|fft2| over the last two axes; its gradient is 0 where it is 0."""
  z = jnp.fft.fft2(x)
  power = jnp.square(z.real) + jnp.square(z.imag)
  return jnp.where(power > 0, jnp.sqrt(jnp.where(power > 0, power, 1.0)), 0.0)


def fourier_error(pred, target, shape):
  """Mean difference of amplitudes of each token -> [B, N].

  pred, target [B, N, p p], cut in raster order into slices of `shape`.
  """
  slices = lambda x: x.reshape(x.shape[0], -1, *shape)
  error = jnp.abs(amplitudes(slices(pred)) - amplitudes(slices(target)))
  return jnp.mean(error.reshape(pred.shape), axis=-1)


def proxy_logits(features, proxies, temperature):
  """-|s f / |f| - s w / |w||^2, s^2 = 1 / temperature, up to a constant: features [B, D], proxies [K, D] -> [B, K]."""
  unit = lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
  return 2 * unit(features.astype(jnp.float32)) @ unit(proxies).T / temperature


def token_similarity(emb, visible):
  """Mean cosine of visible tokens with others of their channel and of other channels, each [B] (paper section 3.4).

  emb [B, C P, D], visible [B, C, P]; every token counts as one of the others, masked and padded ones too.
  """
  size, channels, count = visible.shape
  f = emb.astype(jnp.float32)
  f = f / jnp.maximum(jnp.linalg.norm(f, axis=-1, keepdims=True), 1e-12)
  f = f.reshape(size, channels, count, -1)
  seen = visible.astype(jnp.float32)
  ours, all_ = jnp.einsum('bcp,bcpd->bcd', seen, f), jnp.sum(f, axis=2)
  within = jnp.einsum('bcd,bcd->b', ours, all_)
  across = jnp.einsum('bd,bd->b', ours.sum(1), all_.sum(1)) - within
  within -= jnp.einsum('bcp,bcpd->b', seen, jnp.square(f))  # a token is no other
  number = seen.sum((1, 2))
  return within / (number * (count - 1) + 1e-6), across / (number * (channels - 1) * count + 1e-6)


def modules(cfg):
  """Encoder, decoder, fusion and classifier for the options in `cfg`."""
  patch = vit.sides(cfg.patch, 2)
  size = vit.size(cfg.size)
  depth, heads = (int(n) for n in cfg.decoder.split('/'))
  options = ('mlp_ratio', 'dtype', 'scan', 'remat')
  shared = {name: cfg[name] for name in options} | {'eps': cfg.ln_eps, 'std': cfg.init_std}
  grid = patches.grid_of(vit.sides(cfg.image_size, 2), patch)
  encoder = channel_vit.Encoder(
    **size,
    patch=patch,
    grid=grid,
    types=cfg.channel_types,
    memory=cfg.memory_tokens,
    layer_scale=cfg.layer_scale,
    copied_gradient=cfg.position_gradient == 'copied',
    **shared,
  )
  decoder = channel_vit.Decoder(depth, heads, extra=1 + cfg.memory_tokens, out=math.prod(patch), **shared)
  return encoder, decoder, channel_vit.Fusion(size['heads'], cfg.fusion, cfg.init_std), Classifier(cfg.classes)


def check(cfg):
  known = {
    'fusion': ('sigmoid', 'add', 'cls'),
    'pad_mode': ('clean', 'official'),
    'position_gradient': ('exact', 'copied'),
    'target': ('norm_pix', 'instance', 'raw'),
    'fourier': ('official', 'patch'),
  }
  for key, values in known.items():
    if cfg[key] not in values:
      raise ConfigError(f'cha_mae: {key} is {cfg[key]!r}; expected {", ".join(values)}')
  if cfg.same_channels and cfg.channels != cfg.channel_types:
    raise ConfigError(
      'cha_mae: same_channels needs images with all types, '
      f'found channels={cfg.channels}, channel_types={cfg.channel_types}'
    )
  if not 0 <= cfg.p_patch + cfg.p_channel <= 1:
    raise ConfigError(f'cha_mae: p_patch + p_channel must be from 0 to 1, found {cfg.p_patch} + {cfg.p_channel}')


def make(cfg) -> Method:
  check(cfg)
  encoder, decoder, fusion, classifier = modules(cfg)
  patch, grid, extra = encoder.patch, encoder.grid, 1 + cfg.memory_tokens
  count, channels, types, same = math.prod(grid), cfg.channels, cfg.channel_types, cfg.same_channels
  kept = masking.keep_count(count, cfg.mask_ratio)
  std = cfg.init_std
  official = cfg.pad_mode == 'official' and not same
  # Patches are hidden in every step of such a recipe, so no image ever shows more than this.
  budget = channels * kept if not cfg.p_channel and not official else None
  p_patch, p_channel, least = cfg.p_patch, cfg.p_channel, int(cfg.at_least_one)
  weights = {
    'proxy': cfg.proxy_weight,
    'ce': cfg.ce_weight,
    'mae': cfg.mae_weight,
    'tokens': cfg.token_weight,
    'channels': cfg.channel_weight,
  }
  supervised = cfg.proxy_weight or cfg.ce_weight
  proxy_temperature, ce_temperature, use_head = cfg.proxy_temperature, cfg.ce_temperature, cfg.proxy_head
  channel_temperature = ce_temperature if cfg.ce_weight else CHANNEL_TEMPERATURE
  token_same, token_other, fourier_weight, kind = cfg.token_same, cfg.token_other, cfg.fourier_weight, cfg.target
  slices = grid if cfg.fourier == 'official' else patch

  fields = {
    'image': Field('B H W C', (*vit.sides(cfg.image_size, 2), channels), doc='each channel normalised, 0 where padded')
  }
  if not same:
    fields['channel_ids'] = Field('B C', (channels,), 'int32', 'type of each channel, -1 where padded')
    fields['channel_valid'] = Field('B C', (channels,), 'bool', 'real channels first')
  if supervised:
    fields['label'] = Field('B', (), 'int32', 'class')

  def channels_of(batch):
    """ids [B, C], valid [B, C]; without fields for them the image has all types in order."""
    size, found = batch['image'].shape[0], batch['image'].shape[-1]
    if 'channel_ids' in batch:
      ids = batch['channel_ids']
      return ids, batch.get('channel_valid', ids >= 0)
    if found != types:
      raise ValueError(f'images of {found} channels without channel_ids: expected all {types} types in order')
    return jnp.broadcast_to(jnp.arange(types), (size, types)), jnp.ones((size, types), bool)

  def draw(key, batch):
    keys = jax.random.split(key, 4)
    ids, valid = channels_of(batch)
    size = len(ids)
    chance = jax.random.uniform(keys[0])
    strategy = jnp.where(chance < p_patch, PATCH, jnp.where(chance < p_patch + p_channel, CHANNEL, BOTH))
    draws = {'strategy': jnp.broadcast_to(strategy, (size,))}
    draws['patch_noise'] = jax.random.uniform(keys[1], (size, channels, count))
    if same:  # as in the official code, the whole batch loses the same channels
      hidden_count = jnp.broadcast_to(jax.random.randint(keys[2], (), least, channels), (size,))
      noise = jnp.broadcast_to(jax.random.uniform(keys[3], (channels,)), (size, channels))
    else:
      hidden_count = hidden_counts(jax.random.uniform(keys[2], (size,)), valid.sum(1), least)
      noise = jax.random.uniform(keys[3], (size, channels))
    draws |= {'hidden_count': hidden_count, 'channel_noise': noise}
    return completed(draws, ids, valid, kept, types, same, official)

  def init(key, batch):
    keys = jax.random.split(key, 9)
    image = jnp.zeros((1, *batch['image'].shape[1:]))
    ids = jnp.arange(channels)[None] % types
    seen, params = encoder.init_with_output(keys[0], image, ids)
    tree = {'encoder': params['params']}
    width = seen['x'].shape[-1]
    shown = jnp.ones((1, channels * count), bool)
    tree['decoder'] = decoder.init(keys[1], seen['x'], shown, None, seen['rows'], seen['pos'])['params']
    features = jnp.zeros((1, width))
    if supervised and cfg.fusion != 'cls':
      tree['fusion'] = fusion.init(keys[2], features, features[None], jnp.ones((1, 1)))['params']
    if cfg.ce_weight:
      tree['classifier'] = classifier.init(keys[3], features)['params']
    if cfg.proxy_weight:
      tree['proxies'] = nn.initializers.orthogonal()(keys[4], (cfg.classes, width))
      if use_head:
        tree['proxy_head'] = blocks.Dense(width).init(keys[5], features)['params']
    if cfg.channel_weight:
      tree['channel_proxies'] = nn.initializers.orthogonal()(keys[6], (types, width))
    # Linear layers start normal; the patch projection stays as PyTorch starts a convolution.
    started = initial.normal_kernels(keys[7], tree, std)
    bound = 1 / math.sqrt(math.prod(patch))
    kernel = started['encoder']['patch_embed']['kernel']
    started['encoder']['patch_embed']['kernel'] = jax.random.uniform(keys[8], kernel.shape, minval=-bound, maxval=bound)
    return started

  def fuse(params, x, weight):
    if 'fusion' not in params:
      return x[:, 0].astype(jnp.float32)
    return fusion.apply({'params': params['fusion']}, x[:, 0].astype(jnp.float32), x[:, extra:], weight)

  def target_of(image):
    if kind == 'instance':
      mean, var = jnp.mean(image, (1, 2), keepdims=True), jnp.var(image, (1, 2), keepdims=True)
      image = (image - mean) / jnp.sqrt(var + 1e-5)
    target = patch_tokens(image)
    return targets.norm_pix(target) if kind == 'norm_pix' else target

  def patch_tokens(image):
    size = len(image)
    flat = patches.patchify(jnp.moveaxis(image, -1, 1).reshape(-1, *image.shape[1:3], 1), patch)
    return flat.reshape(size, -1, flat.shape[-1])

  def forward(params, batch, draws):
    ids, valid = channels_of(batch)
    visible, mask, _ = hide(draws, valid, kept)
    flat = visible.reshape(len(ids), -1)
    seen = encoder.apply({'params': params['encoder']}, batch['image'], ids, flat, budget)
    weight, stand_in = flat.astype(jnp.float32), None
    if official:  # copies of the first token fill every image up to the longest one
      number = flat.sum(1, keepdims=True)
      longest = jnp.max(number)
      weight = weight.at[:, 0].add((longest - number)[:, 0])
      stand_in = ~flat & (draws['rank'] < longest)
    recon = decoder.apply(
      {'params': params['decoder']}, seen['x'], flat, stand_in, seen['rows'], seen['pos'], None if same else valid
    ).astype(jnp.float32)
    fused = fuse(params, seen['x'], weight)
    return seen | {'visible': visible, 'mask': mask.reshape(len(ids), -1), 'fused': fused, 'recon': recon}

  def loss(params, state, frozen, batch, draws, step):
    del state, frozen, step
    out = forward(params, batch, draws)
    target, masked = target_of(batch['image']), draws['counts']['masked']
    pixel = masked_mean(jnp.mean(jnp.square(out['recon'] - target), -1), out['mask'], masked)
    spectrum = masked_mean(fourier_error(out['recon'], target, slices), out['mask'], masked)
    parts = {'mae': (1 - fourier_weight) * pixel + fourier_weight * spectrum}
    if weights['proxy']:
      features = out['fused']
      if use_head:
        features = blocks.Dense(features.shape[-1]).apply({'params': params['proxy_head']}, features)
      parts['proxy'] = losses.cross_entropy(
        proxy_logits(features, params['proxies'], proxy_temperature), batch['label']
      )
    if weights['ce']:
      logits = classifier.apply({'params': params['classifier']}, out['fused'])
      parts['ce'] = losses.cross_entropy(logits / ce_temperature, batch['label'])
      out['logits'] = logits
    if weights['tokens']:
      within, across = token_similarity(out['emb'], out['visible'])
      parts['tokens'] = jnp.mean(token_same * within + token_other * across)
    if weights['channels']:
      present = draws['present'][0]
      table = params['encoder']['channel_tokens']
      log_probs = jax.nn.log_softmax(proxy_logits(table, params['channel_proxies'], channel_temperature))
      parts['channels'] = -jnp.sum(jnp.diag(log_probs) * present) / jnp.maximum(jnp.sum(present), 1.0)
    value = sum(weights[name] * part for name, part in parts.items())
    metrics = {'loss/pixel': pixel, 'loss/fourier': spectrum, **{f'loss/{name}': part for name, part in parts.items()}}
    shown = {name: out[name] for name in ('x', 'fused', 'recon', 'mask', 'visible', 'logits') if name in out}
    return value, {'metrics': metrics, 'out': shown}

  def encode(params, batch, state=None):
    del state
    ids, valid = channels_of(batch)
    places = math.prod(patches.grid_of(batch['image'].shape[1:3], patch))
    whole = jnp.repeat(valid, places, axis=1)
    x = encoder.apply({'params': params['encoder']}, batch['image'], ids, None if same else whole)['x']
    fused = fuse(params, x, whole.astype(jnp.float32))
    out = {'tokens': x[:, extra:], 'cls': fused}
    if 'classifier' in params:
      out['logits'] = classifier.apply({'params': params['classifier']}, fused)
    return out

  def panels(params, state, frozen, batch, draws):
    del state, frozen
    out = forward(params, batch, draws)
    tokens, hidden = patch_tokens(batch['image']), out['mask'][..., None]
    pred = targets.undo_norm_pix(out['recon'], tokens) if kind == 'norm_pix' else out['recon']

    def picture(x):
      x = patches.unpatchify(x.reshape(-1, count, x.shape[-1]), grid, patch)
      return jnp.moveaxis(x.reshape(-1, channels, *x.shape[1:3]), 1, -1)

    shown = {'seen': jnp.where(hidden, 0, tokens), 'prediction': pred, 'pasted': jnp.where(hidden, pred, tokens)}
    return {'input': batch['image'], **{name: picture(x) for name, x in shown.items()}}

  return Method(fields=fields, init=init, draw=draw, loss=loss, encode=encode, panels=panels, couples=official)
