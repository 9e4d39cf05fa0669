"""CAE: predict latents of hidden patches, and from these alone their tokens (Chen et al. 2022, arXiv 2202.03026).

Official code: Atten4Vis/CAE, models/modeling_cae.py and modeling_cae_helper.py. The encoder sees visible patches only;
a regressor of cross-attention blocks predicts what the encoder itself would make of the hidden ones (the alignment
loss, against the encoder's own output on them, without gradient: the official `alignment_encoder` is the same weights,
not an average of them); a decoder that gets nothing but these predictions names the discrete token of each hidden
patch.

`version=2` is CAE v2 (Zhang et al. 2022, arXiv 2211.09799): no tokens, no decoder and no alignment branch, but one head
that brings class token, visible and predicted latents to the features of a CLIP teacher.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mim_jax.errors import ConfigError
from mim_jax.method import Field, Method
from mim_jax.models import blocks, dvae, posemb, teachers, vit
from mim_jax.ops import losses, masking, patches, pixels

DEFAULTS = {
  'version': 1,  # 1: CAE, 2: CAE v2
  'size': '768/12/12',  # encoder; the paper's Ti and S have 12 heads too: '192/12/12', '384/12/12'
  'patch': 16,  # side, or (height, width)
  'image_size': 224,  # side, or (height, width)
  'channels': 3,
  'mlp_ratio': 4.0,
  'ln_eps': 1e-6,
  'pos': 'sincos_rows',
  'qkv_bias': 'qv',  # keys have none, in encoder, regressor and decoder alike
  'layer_scale': 0.1,  # 1e-5 in the published Large encoder
  'drop_path': 0.1,  # of the last block of encoder, regressor and decoder each
  'masking': 'block',  # block | random
  'masked': 98,  # hidden patches of every image
  'min_block': 16,  # patches of the smallest rectangle that is tried
  'decoder': '768/4/12',  # width, depth and heads of the decoder; width and heads are the regressor's too
  'regressor_depth': 4,
  'decoder_layer_scale': 0.1,
  'align_weight': 2.0,
  'tokenizer': 'dvae',  # dvae: of `token_image`; ids: given, `token_ids`; colours: mean colours, `levels` per channel
  'codes': 8192,  # kinds of tokens that the decoder tells apart
  'tokenizer_width': 256,  # of the dVAE
  'levels': 3,
  'stats': 'imagenet',  # how `image` is normalised
  'teacher': 'B',  # version 2: size of the CLIP tower
  'teacher_patch': 16,
  'teacher_features': 512,  # of its projection
}

# Normal, cut at one standard deviation as the official `trunc_normal_` does it, so the spread that results is 0.0108.
CUT_NORMAL = nn.initializers.truncated_normal(0.02, lower=-1.0, upper=1.0)


class RegressorBlock(nn.Module):
  """Queries [B, M, D] look at visible latents and at each other: (queries, None), for a scan over depth."""

  heads: int
  mlp_ratio: float
  eps: float
  dtype: str
  bias: str
  layer_scale: float

  @nn.compact
  def __call__(self, queries, drop, visible, pos_hidden, pos_visible):
    """drop: None, or uniforms [B, 2] and this block's rate; visible [B, K, D]; positions [B, M, D] and [B, K, D]."""

    def branch(y, i):
      if self.layer_scale:
        y = blocks.LayerScale(self.layer_scale, self.dtype, name=f'layer_scale{i + 1}')(y)
      return y if drop is None else blocks.drop_path(y, drop[0][:, i], drop[1])

    norm = lambda name: blocks.LayerNorm(self.eps, self.dtype, name=name)
    context = jnp.concatenate([visible, queries], axis=1)
    places = jnp.concatenate([pos_visible, pos_hidden], axis=1)
    q, k, v = norm('norm1_q')(queries + pos_hidden), norm('norm1_k')(context + places), norm('norm1_v')(context)
    y = blocks.CrossAttention(self.heads, self.dtype, self.bias, name='attn')(q, k, values=v)
    x = norm('norm2')(queries + branch(y, 0))  # the normed tensor is what goes on, here and only here
    hidden = blocks.hidden_width(x.shape[-1], self.mlp_ratio)
    return x + branch(blocks.Mlp(hidden, self.dtype, name='mlp')(x), 1), None


class Tower(nn.Module):
  """What regressor and decoder have in common: attributes as in `vit.ViT`."""

  depth: int
  heads: int
  mlp_ratio: float
  eps: float
  dtype: str
  bias: str
  layer_scale: float
  drop_path: float
  scan: bool
  remat: str


class Regressor(Tower):
  """Latents of hidden patches from those of visible ones: visible [B, K, D], positions of both -> [B, M, D]."""

  norm: bool

  @nn.compact
  def __call__(self, visible, pos_hidden, pos_visible, drop=None):
    mask_token = self.param('mask_token', CUT_NORMAL, (1, 1, visible.shape[-1]))
    queries = jnp.broadcast_to(mask_token.astype(self.dtype), pos_hidden.shape)
    layer = blocks.stack(RegressorBlock, self.depth, self.scan, self.remat, (0, *[nn.broadcast] * 3))
    layer = layer(self.heads, self.mlp_ratio, self.eps, self.dtype, self.bias, self.layer_scale, name='blocks')
    y, _ = layer(queries, vit.drop_rates(drop, self.depth, self.drop_path), visible, pos_hidden, pos_visible)
    return blocks.LayerNorm(self.eps, self.dtype, name='norm')(y) if self.norm else y


class Decoder(Tower):
  """What is to be told of each token, from tokens that see nothing but each other: [B, M, D] -> [B, M, out]."""

  out: int

  @nn.compact
  def __call__(self, x, drop=None):
    if self.depth:
      layer = blocks.stack(blocks.Block, self.depth, self.scan, self.remat)
      options = dict(qkv_bias=self.bias, layer_scale=self.layer_scale, name='blocks')
      layer = layer(self.heads, self.mlp_ratio, self.eps, self.dtype, **options)
      x, _ = layer(x, vit.drop_rates(drop, self.depth, self.drop_path))
    x = blocks.LayerNorm(self.eps, self.dtype, name='norm')(x)
    return blocks.Dense(self.out, self.dtype, name='head')(x)


class Projection(nn.Module):
  """Encoder latents to the width of the regressor: a linear layer and a norm."""

  width: int
  eps: float
  dtype: str

  @nn.compact
  def __call__(self, x):
    return blocks.LayerNorm(self.eps, self.dtype, name='norm')(blocks.Dense(self.width, self.dtype, name='dense')(x))


def modules(cfg):
  """Encoder, projection (None where widths agree), regressor and decoder for the options in `cfg`."""
  patch = vit.sides(cfg.patch, 2)
  grid = patches.grid_of(vit.sides(cfg.image_size, 2), patch)
  shared = dict(mlp_ratio=cfg.mlp_ratio, eps=cfg.ln_eps, dtype=cfg.dtype, scan=cfg.scan, remat=cfg.remat)
  shared |= dict(drop_path=cfg.drop_path)
  encoder = vit.ViT(
    **vit.size(cfg.size),
    **shared,
    patch=patch,
    grid=grid,
    pos=cfg.pos,
    qkv_bias=cfg.qkv_bias,
    layer_scale=cfg.layer_scale,
  )
  size, second = vit.size(cfg.decoder), cfg.version == 2
  shared |= dict(heads=size['heads'], bias=cfg.qkv_bias, layer_scale=cfg.decoder_layer_scale)
  projection = None if size['width'] == encoder.width else Projection(size['width'], cfg.ln_eps, cfg.dtype)
  regressor = Regressor(depth=cfg.regressor_depth, norm=not second, **shared)
  out, depth = (cfg.teacher_features, 0) if second else (cfg.codes, size['depth'])
  return encoder, projection, regressor, Decoder(depth=depth, out=out, **shared)


def palette(cfg) -> np.ndarray:
  """A colour for every code, [codes, C] in the image's units: the code's own where codes are colours, else any."""
  if cfg.tokenizer == 'colours':
    return pixels.renormalize(pixels.code_colours(cfg.levels, cfg.channels), 'none', cfg.stats)
  return np.random.default_rng(0).standard_normal((cfg.codes, cfg.channels)).astype(np.float32)


def make(cfg) -> Method:
  encoder, projection, regressor, decoder = modules(cfg)
  patch, grid, masked, second = encoder.patch, encoder.grid, cfg.masked, cfg.version == 2
  count = math.prod(grid)
  table, dtype, colours = posemb.sincos(grid, vit.size(cfg.decoder)['width'], (0, 1)), cfg.dtype, palette(cfg)
  places = lambda ids: jnp.asarray(table, dtype)[ids]  # rows of the table [B, n, D]
  drop_path, align_weight, random, min_block = cfg.drop_path, cfg.align_weight, cfg.masking == 'random', cfg.min_block
  tokenizer, levels, stats = '' if second else cfg.tokenizer, cfg.levels, cfg.stats
  check(cfg, grid)
  depths = {'encoder': encoder.depth, 'target': encoder.depth, 'regressor': regressor.depth, 'decoder': decoder.depth}
  side = dvae.STRIDE
  fields = {'image': Field('B H W C', (*vit.sides(cfg.image_size, 2), cfg.channels), doc='normalised RGB')}
  if tokenizer == 'dvae':
    tower = dvae.Encoder(cfg.tokenizer_width, cfg.codes, dtype=cfg.dtype)
    fields['token_image'] = Field(
      'B H W C',
      (side * grid[0], side * grid[1], cfg.channels),
      doc='the same crop for the tokenizer: two_size_crop or second_size, and map_token_image, in data.transforms',
    )
  elif tokenizer == 'ids':
    fields['token_ids'] = Field('B N', (count,), 'int32', doc='token of every patch in raster order')
  elif second:
    teacher = teachers.make('clip', cfg.teacher, cfg.teacher_patch, cfg.teacher_patch * grid[0], dtype=cfg.dtype)

  def draw(key, batch):
    rows = batch['image'].shape[0]
    mask_key, *keys = jax.random.split(key, 1 + len(depths))
    if random:
      order = jnp.argsort(jax.random.uniform(mask_key, (rows, count)), axis=1)
      draws = {'mask': order < masked}
    else:
      hide = lambda key: masking.blocks(key, grid, masked, min_block)
      draws = {'mask': jax.vmap(hide)(jax.random.split(mask_key, rows))}
    if drop_path:
      uniform = lambda key, depth: jax.random.uniform(key, (rows, depth, 2))
      draws['drop'] = {part: uniform(k, depths[part]) for k, part in zip(keys, depths, strict=True) if depths[part]}
    return draws

  def frozen(key, batch):
    if tokenizer == 'dvae':
      image = jnp.zeros((1, *batch['token_image'].shape[1:]))
      return {'tokenizer': tower.init(key, image)['params']}
    if second:
      keys = jax.random.split(key)
      shape = (teacher.encoder.width, decoder.out)
      return {**teacher.init(keys[0]), 'projection': blocks.xavier_uniform(*shape)(keys[1], shape)}
    return {}

  def project(params, tokens):
    return tokens if projection is None else projection.apply({'params': params['projection']}, tokens)

  def init(key, batch):
    keys = jax.random.split(key, 7)
    visible, hidden = masking.split(jnp.arange(count)[None] < masked, masked)
    tokens, tree = encoder.init_with_output(keys[0], jnp.zeros((1, *batch['image'].shape[1:])), visible)
    tree = dict(tree['params'])
    tree['cls_token'] = CUT_NORMAL(keys[1], tree['cls_token'].shape)
    embed = tree['patch_embed']
    tree['patch_embed'] = {
      'kernel': CUT_NORMAL(keys[2], embed['kernel'].shape),
      'bias': jnp.zeros_like(embed['bias']),
    }
    params = {'encoder': tree}
    if projection is not None:
      tokens, tree = projection.init_with_output(keys[3], tokens)
      params['projection'] = tree['params']
    latent, tree = regressor.init_with_output(keys[4], tokens[:, 1:], places(hidden), places(visible))
    return params | {'regressor': tree['params'], 'decoder': decoder.init(keys[5], latent)['params']}

  def regress(params, batch, draws):
    """Encoder output of class token and visible patches, projected too, predictions of hidden ones, ids of both."""
    drop = draws.get('drop', {})
    visible, hidden = masking.split(draws['mask'], masked)
    encoded = encoder.apply({'params': params['encoder']}, batch['image'], visible, drop.get('encoder'))
    latent = project(params, encoded)
    predicted = regressor.apply(
      {'params': params['regressor']}, latent[:, 1:], places(hidden), places(visible), drop.get('regressor')
    )
    return encoded, latent, predicted, visible, hidden

  def decode(params, latent, hidden, draws):
    drop = draws.get('drop', {}).get('decoder')
    return decoder.apply({'params': params['decoder']}, latent + places(hidden), drop)

  def tokens_of(frozen, batch):
    """Token of every patch [B, N] int32."""
    if tokenizer == 'ids':
      return batch['token_ids']
    if tokenizer == 'dvae':
      return dvae.codes(tower, frozen['tokenizer'], batch['token_image'])
    return pixels.colour_codes(batch['image'], patch, levels, stats)

  def loss(params, state, frozen, batch, draws, step):
    del state, step
    encoded, latent, predicted, visible, hidden = regress(params, batch, draws)
    if second:
      student = decoder.apply({'params': params['decoder']}, jnp.concatenate([latent, predicted], axis=1))
      seen = teacher(frozen, batch['image'], stats)
      target = jnp.concatenate([seen['cls'][:, None], *(masking.take(seen['tokens'], i) for i in (visible, hidden))], 1)
      value = losses.cosine(student, jax.lax.stop_gradient(target @ frozen['projection'].astype(target.dtype)))
      out = {'encoded': encoded, 'predicted': predicted, 'student': student}
      return value, {'metrics': {'loss/cosine': value}, 'out': out}
    own = jax.lax.stop_gradient(params)  # all of it: nothing reaches the encoder or the projection through the target
    drop = draws.get('drop', {}).get('target')
    target = encoder.apply({'params': own['encoder']}, batch['image'], hidden, drop)
    target = project(own, target)[:, 1:]
    logits = decode(params, predicted, hidden, draws)
    ids = jnp.take_along_axis(tokens_of(frozen, batch), hidden, axis=1)
    main = losses.cross_entropy(logits, ids)
    align = align_weight * jnp.mean(jnp.square(predicted.astype(jnp.float32) - target.astype(jnp.float32)))
    accuracy = jnp.mean((jnp.argmax(logits, axis=-1) == ids).astype(jnp.float32))
    metrics = {'loss/token': main, 'loss/align': align, 'token_accuracy': accuracy}
    out = {'encoded': encoded, 'predicted': predicted, 'target': target, 'logits': logits, 'hidden': hidden}
    return main + align, {'metrics': metrics, 'out': out}

  def encode(params, batch, state=None, layers=False, drop=None):
    del state
    return vit.encode(encoder, params['encoder'], batch['image'], layers, drop)

  def panels(params, state, frozen, batch, draws):
    """Hidden patches in the colour of their token: the true one, the predicted, and what the true latent is read as."""
    draws = {'mask': draws['mask']}
    _, aux = loss(params, state, frozen, batch, draws, 0)
    image, out = patches.patchify(batch['image'], patch), aux['out']
    rows = jnp.arange(len(image))[:, None]
    flat = lambda ids: jnp.tile(jnp.asarray(colours)[ids], (1, 1, math.prod(patch)))
    shown = {
      'masked': jnp.zeros_like(image[:, :masked]),
      'tokens': flat(jnp.take_along_axis(tokens_of(frozen, batch), out['hidden'], axis=1)),
      'predicted': flat(jnp.argmax(out['logits'], axis=-1)),
      'from true latents': flat(jnp.argmax(decode(params, out['target'], out['hidden'], draws), axis=-1)),
    }
    put = lambda x: patches.unpatchify(image.at[rows, out['hidden']].set(x), grid, patch)
    return {'input': batch['image'], **{name: put(x) for name, x in shown.items()}}

  return Method(
    fields=fields,
    init=init,
    draw=draw,
    loss=loss,
    encode=encode,
    frozen=frozen,
    panels=None if second else panels,
  )


def check(cfg, grid):
  """Raises ConfigError for options that do not fit together."""
  count = math.prod(grid)
  for key, known in (('version', (1, 2)), ('masking', ('block', 'random')), ('tokenizer', ('dvae', 'ids', 'colours'))):
    if cfg[key] not in known:
      raise ConfigError(f'method.{key} is {cfg[key]!r}; expected one of {", ".join(map(str, known))}')
  if not 0 < cfg.masked < count:
    raise ConfigError(f'method.masked={cfg.masked} of {count} patches: at least one must be hidden and one visible')
  if cfg.version == 2 and grid[0] != grid[1]:
    raise ConfigError(f'version 2 needs square images for its teacher; found a grid of {grid} patches')
  if cfg.version == 1 and cfg.tokenizer == 'colours' and cfg.codes != cfg.levels**cfg.channels:
    raise ConfigError(
      f'method.codes={cfg.codes}, but {cfg.levels} levels of {cfg.channels} channels are '
      f'{cfg.levels**cfg.channels} colours'
    )
