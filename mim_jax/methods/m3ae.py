"""M3AE: medical images and texts by masked words, masked patches and matching (Chen et al. 2022, arXiv 2209.07098).

Official code: zhjohnchan/M3AE. A step makes three passes: masked text with the whole image, clean text with a quarter
of the image, and clean text with an image that may be another one's. Pixels are decoded from the image stream ahead of
fusion layer `mim_layer`, by which it has read the text that many times. Both clean passes share what the text encoder
makes of the text (and its dropout; the official code runs it twice).
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax.errors import ConfigError
from mim_jax.method import Field, Method
from mim_jax.models import blocks, decoder, initial, text, vit
from mim_jax.ops import attention, losses, masking, patches, targets

DEFAULTS = {
  'size': '768/11/12',  # image encoder: CLIP's ViT-B/16, of whose 12 blocks the official class builds 11
  'patch': 16,
  'image_size': 288,
  'channels': 3,
  'mlp_ratio': 4.0,
  'activation': 'quick_gelu',  # of the image encoder and of the pixel decoder
  'ln_eps': 1e-5,  # likewise
  'text': dict(text.PRESETS['roberta-base']),  # see models.text.encoder
  'length': 64,  # tokens of a text
  'fusion': '768/6/12',  # width/depth/heads of either stream
  'fusion_mlp_ratio': 4.0,
  'fusion_eps': 1e-12,  # also of the head for masked words, with either kind of text encoder
  'decoder': '384/4/6',
  'mask_ratio': 0.75,
  'norm_pix': True,
  'mim_layer': 3,  # fusion layers that the image stream has passed when pixels are decoded from it; -1: all
  'weights': {'words': 1.0, 'pixel': 1.0, 'match': 1.0},  # of the three losses
  'dropout': 0.1,  # of text encoder and fusion
  'init_std': 0.02,  # of the dense layers outside the image encoder; it suits width 768, narrower ones want more
}


class Join(nn.Module):
  """Words [B, L, E] and image tokens [B, N, F] to one width D, each with the embedding of its kind added."""

  width: int
  dtype: str

  @nn.compact
  def __call__(self, words, tokens):
    types = self.param('types', nn.initializers.normal(0.02), (2, self.width)).astype(self.dtype)
    dense = lambda name: blocks.Dense(self.width, self.dtype, name=name)
    return dense('text')(words) + types[0], dense('image')(tokens) + types[1]


class Pair(nn.Module):
  """A fusion layer: both streams attend to themselves and to the other one as it was before the layer (section 2.2)."""

  heads: int
  hidden: int
  eps: float
  dtype: str
  dropout: float

  @nn.compact
  def __call__(self, streams, mask, drop):
    words, tokens = streams
    layer = lambda name: text.Layer(self.heads, self.hidden, self.eps, self.dtype, self.dropout, cross=True, name=name)
    drops = [None if drop is None else text.folded(drop, stream) for stream in range(2)]
    new_words, _ = layer('text')(words, mask, drops[0], tokens)
    new_tokens, _ = layer('image')(tokens, None, drops[1], words, mask)
    return (new_words, new_tokens), None


class Fusion(nn.Module):
  """`depth` pairs of layers: (words [B, L, D], tokens [B, N, D]), mask [B, L] -> the same two streams."""

  width: int
  depth: int
  heads: int
  mlp_ratio: float
  eps: float
  dtype: str
  dropout: float
  scan: bool
  remat: str

  @nn.compact
  def __call__(self, words, tokens, mask, drop=None):
    layers = blocks.stack(Pair, self.depth, self.scan, self.remat, in_axes=(nn.broadcast, 0))
    layer = layers(
      self.heads, blocks.hidden_width(self.width, self.mlp_ratio), self.eps, self.dtype, self.dropout, name='blocks'
    )
    return layer((words, tokens), attention.mask_out(mask), text.per_layer(drop, self.depth))[0]


@dataclasses.dataclass(frozen=True)
class Nets:
  """The networks under the names that their params have, and how losses, features and replays use them."""

  encoder: vit.ViT
  text: text.Encoder
  join: Join
  fusion: Fusion
  pool_text: text.Pooler
  pool_image: text.Pooler
  words: text.MaskedWords
  match: blocks.Dense
  decoder: decoder.Decoder

  def run(self, name, params, *args, **options):
    return getattr(self, name).apply({'params': params[name]}, *args, **options)

  def fuse(self, params, words, tokens, mask, drop=None, first=0, last=None):
    """Both streams through the fusion layers first to last - 1 (to the end when None)."""
    last = self.fusion.depth if last is None else last
    if first == last:
      return words, tokens
    part = jax.tree.map(lambda x: x[first:last], params['fusion'])
    return self.fusion.clone(depth=last - first).apply({'params': part}, words, tokens, mask, drop)

  def pooled(self, params, words, tokens):
    """What the streams say together [B, 2 D] float32: first word and class token, each through its pooler."""
    both = [self.run('pool_text', params, words), self.run('pool_image', params, tokens)]
    return jnp.concatenate(both, axis=-1).astype(jnp.float32)


def modules(cfg) -> Nets:
  """The networks for the options in `cfg`. Raises ConfigError where they do not fit together."""
  run = dict(scan=cfg.scan, remat=cfg.remat, dtype=cfg.dtype)
  patch = vit.sides(cfg.patch, 2)
  image = dict(grid=patches.grid_of(vit.sides(cfg.image_size, 2), patch), mlp_ratio=cfg.mlp_ratio, eps=cfg.ln_eps)
  image['activation'] = cfg.activation
  fusion = vit.size(cfg.fusion)
  if not -1 <= cfg.mim_layer <= fusion['depth']:
    raise ConfigError(f'method.mim_layer is {cfg.mim_layer}; fusion {cfg.fusion!r} allows 0 to its depth, or -1')
  reader = text.encoder(**cfg.text, dropout=cfg.dropout, **run)
  return Nets(
    encoder=vit.ViT(
      **vit.size(cfg.size), patch=patch, pos='learned', patch_bias=False, embed_norm=True, **image, **run
    ),
    text=reader,
    join=Join(fusion['width'], cfg.dtype),
    fusion=Fusion(**fusion, mlp_ratio=cfg.fusion_mlp_ratio, eps=cfg.fusion_eps, dropout=cfg.dropout, **run),
    pool_text=text.Pooler(cfg.dtype),
    pool_image=text.Pooler(cfg.dtype),
    words=text.MaskedWords(reader.vocab, cfg.fusion_eps, cfg.dtype),
    match=blocks.Dense(2),
    decoder=decoder.Decoder(**vit.size(cfg.decoder), out=math.prod(patch) * cfg.channels, **image, **run),
  )


def matches(order):
  """Which pairs stay true: int32 [B], 1 at B // 2 places that the permutation `order` [B] chooses, else 0."""
  return (order < order.shape[0] // 2).astype(jnp.int32)


def counts(batch):
  """How many words are to be named in the whole step, at least 1."""
  return {'words': jnp.maximum(jnp.sum(batch['text_labels_mlm'] >= 0), 1).astype(jnp.float32)}


def braid(a, b):
  """Two arrays [B, ...] -> [2 B, ...], rows of the same example beside each other, so that no row leaves its device."""
  return jnp.stack([a, b], axis=1).reshape(2 * a.shape[0], *a.shape[1:])


def unbraid(x):
  """Inverse of `braid`."""
  x = x.reshape(x.shape[0] // 2, 2, *x.shape[1:])
  return x[:, 0], x[:, 1]


def make(cfg) -> Method:
  nets = modules(cfg)
  patch, grid = nets.encoder.patch, nets.encoder.grid
  count, norm_pix, dropout, scale = math.prod(grid), cfg.norm_pix, cfg.dropout, dict(cfg.weights)
  kept, init_std = masking.keep_count(count, cfg.mask_ratio), cfg.init_std
  mim_layer = nets.fusion.depth if cfg.mim_layer == -1 else cfg.mim_layer
  picture = lambda doc: Field('B H W C', (*vit.sides(cfg.image_size, 2), cfg.channels), doc=doc)
  row = lambda doc: Field('B T', (cfg.length,), 'int32', f'{doc} (data.transforms has tokenize)')
  fields = {
    'image': picture('normalised RGB (data.transforms ends in normalize)'),
    'false_image': picture('that of another example (data.transforms has false_image)'),
    'text_ids': row('token ids of the text'),
    'text_mask': row('1 = token, 0 = padding'),
    'text_ids_mlm': row('token ids with some words hidden'),
    'text_labels_mlm': row('id of the hidden words, negative elsewhere'),
  }

  def draw(key, batch):
    keys = jax.random.split(key, 3)
    size = batch['image'].shape[0]
    return {
      'noise': jax.random.uniform(keys[0], (size, count)),
      'match': matches(jax.random.permutation(keys[1], size)),
      **({'drop': jax.random.split(keys[2], size)} if dropout else {}),
      'counts': counts(batch),
    }

  def init(key, batch):
    keys = iter(jax.random.split(key, 20))
    image, ids = jnp.zeros((1, *batch['image'].shape[1:])), jnp.zeros((1, batch['text_ids'].shape[1]), jnp.int32)
    keep_ids, restore_ids, _ = masking.keep_smallest(jnp.zeros((1, count)), kept)
    params = {}

    def start(name, *args):  # everything but the image encoder starts as BERT does (official code, init_weights)
      out, made = getattr(nets, name).init_with_output(next(keys), *args)
      params[name] = made['params']
      if name != 'encoder':
        params[name] = initial.normal_kernels(next(keys), params[name], init_std)
      return out, made['params']

    tokens, _ = start('encoder', image)
    words, _ = start('text', ids, ids)
    words, tokens = start('join', words, tokens)[0]
    words, tokens = start('fusion', words, tokens, ids)[0]
    start('words', words)
    start('match', jnp.concatenate([start('pool_text', words)[0], start('pool_image', tokens)[0]], axis=-1))
    _, uniform = start('decoder', tokens[:, : 1 + kept], keep_ids, restore_ids)
    params['decoder']['blocks']['attn']['qkv'] = uniform['blocks']['attn']['qkv']  # torch's own start, which stays
    return params

  def loss(params, state, frozen, batch, draws, step):
    del state, frozen, step
    mask, match = batch['text_mask'], draws['match']
    drop = [text.folded(draws['drop'], i) if dropout else None for i in range(5)]
    both = lambda i: braid(drop[i], drop[i + 1]) if dropout else None

    masks, ids = braid(mask, mask), braid(batch['text_ids_mlm'], batch['text_ids'])
    words = nets.run('text', params, ids, masks, drop=both(0))
    other = jnp.where(match[:, None, None, None] == 1, batch['image'], batch['false_image'])
    tokens = nets.run('encoder', params, braid(batch['image'], other))
    fused = nets.fuse(params, *nets.run('join', params, words, tokens), masks, both(2))
    (mlm_words, clean), (mlm_tokens, itm_tokens) = unbraid(words), unbraid(tokens)
    (mlm_text, itm_text), (mlm_image, itm_image) = map(unbraid, fused)

    named = nets.run('words', params, mlm_text)
    features = nets.pooled(params, itm_text, itm_image)
    matched = nets.run('match', params, features)

    keep_ids, restore_ids, hidden = masking.keep_smallest(draws['noise'], kept)
    seen = nets.run('encoder', params, batch['image'], keep_ids)
    streams = nets.fuse(params, *nets.run('join', params, clean, seen), mask, drop[4], last=mim_layer)
    pred = nets.run('decoder', params, streams[1], keep_ids, restore_ids)
    target = patches.patchify(batch['image'], patch)
    target = targets.norm_pix(target) if norm_pix else target

    labels, total = batch['text_labels_mlm'], draws['counts']['words']
    parts = {
      'words': losses.token_cross_entropy(named, labels, total),
      'pixel': losses.masked_mse(pred, target, hidden),
      'match': losses.cross_entropy(matched, match),
    }
    metrics = {
      **{f'loss/{name}': value for name, value in parts.items()},
      'accuracy/words': losses.token_accuracy(named, labels, total),
      'accuracy/match': jnp.mean(jnp.argmax(matched, axis=-1) == match),
    }
    out = {
      'mlm': {'tokens': mlm_tokens, 'words': mlm_words, 'text': mlm_text, 'image': mlm_image, 'logits': named},
      'mim': {'tokens': seen, 'words': clean, 'streams': streams, 'logits': pred, 'target': target, 'mask': hidden},
      'itm': {'tokens': itm_tokens, 'words': clean, 'text': itm_text, 'image': itm_image, 'logits': matched},
      'features': features,
    }
    return sum(scale[name] * value for name, value in parts.items()), {'metrics': metrics, 'out': out}

  def encode(params, batch, state=None, layers=False, drop=None):
    """Of images alone their encoder's tokens; with text the fused image stream, 'cls' [B, 2 D] of both and 'match' [B].

    'match' is the logit of "they belong together". `drop` keys also drive the dropout of text encoder and fusion.
    """
    del state
    image_encoder, uniforms = vit.with_drop_path(nets.encoder, drop)
    variables = {'params': params['encoder']}
    tokens, taps = image_encoder.apply(variables, batch['image'], drop=uniforms, taps=True)
    extra = {'layers': taps['layers']} if layers else {}
    if 'text_ids' not in batch:
      return {'tokens': tokens[:, 1:], 'cls': tokens[:, 0], **extra}
    keys = [None if drop is None else text.folded(drop[0], i) for i in range(2)]
    words = nets.run('text', params, batch['text_ids'], batch['text_mask'], drop=keys[0])
    streams = nets.fuse(params, *nets.run('join', params, words, tokens), batch['text_mask'], keys[1])
    features = nets.pooled(params, *streams)
    return {
      'tokens': streams[1][:, 1:],
      'cls': features,
      'match': nets.run('match', params, features)[:, 1],
      **extra,
    }

  def panels(params, state, frozen, batch, draws):
    _, aux = loss(params, state, frozen, batch, draws, 0)
    target, mim = patches.patchify(batch['image'], patch), aux['out']['mim']
    pred = targets.undo_norm_pix(mim['logits'], target) if norm_pix else mim['logits']
    shown = patches.pictures(target, pred, mim['mask'], grid, patch)
    return {'input': batch['image'], **shown, 'false image': batch['false_image']}

  return Method(fields=fields, init=init, draw=draw, loss=loss, encode=encode, panels=panels)
