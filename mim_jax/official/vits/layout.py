"""One engine for all plain ViTs: a `Layout` says what a codebase calls things, `load` and `save` do the rest.

What can be read off names and shapes is: patch, width, depth, MLP width, class token, registers, biases, layer scale, norms, grid of
positions. What cannot be is taken from `Hints`: heads, LayerNorm eps, activation, normalisation of the images.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from flax import traverse_util

from mim_jax.checkpoint import bundle as bundles
from mim_jax.checkpoint import files
from mim_jax.errors import CheckpointError
from mim_jax.models import posemb, vit
from mim_jax.official import names

# Heads of the published models by width: ViT (Touvron et al. 2021; Dosovitskiy et al. 2021), DINOv2 giant.
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1536: 24}
DECODER_HEADS = {512: 16}  # facebookresearch/mae, models_mae.py, all sizes


@dataclasses.dataclass(frozen=True)
class Hints:
  """What weights alone do not tell; None where it is not known."""

  heads: int | None = None
  image_size: tuple[int, ...] | None = None
  eps: float | None = None
  activation: str | None = None
  stats: Any = None
  crop: float | None = None
  decoder_heads: int | None = None
  method: dict[str, Any] = dataclasses.field(default_factory=dict)  # such as norm_pix

  def over(self, other: 'Hints') -> 'Hints':
    """These hints where they are known, else the other ones."""
    mine = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    known = {name: value for name, value in mine.items() if value is not None and value != {}}
    return dataclasses.replace(other, **known)


@dataclasses.dataclass(frozen=True)
class Layout:
  """A codebase's names of a ViT.

  Attributes:
    name, about: for users.
    patch, cls, pos, norm, embed_norm, registers: names; '' where the codebase has no such thing.
    block, parts: names of the blocks, with '{i}'.
    inner: what comes before the encoder's names where there is more than an encoder.
    swiglu: names of the two MLP layers in models that gate; () if there are none.
    extras: (theirs, ours) of linear layers and norms beside the encoder, by kind.
    flat: class token [D] and table [1 + N, D] instead of [1, 1, D] and [1, 1 + N, D].
    class_row: the table has a row for the class token also when there are registers.
    needs: paths of ours that it cannot do without.
    neutral: value of arrays it always has and that an encoder may lack.
    eps, activation, stats: what it has unless told otherwise.
    decoder: (options) -> entries of a MAE decoder; decoder_pos: the name of its table.
    rewrites: (regex, replacement) that bring other spellings of the same codebase to the one given here.
    unused: regex of names that do not bear on features.
    marks: regexes of which one must match some name, for layouts that another one would fit as well.
    hints: config.json beside the weights -> Hints.
    config: bundle -> config.json for the weights; None if the codebase has none.
  """

  name: str
  about: str
  patch: str
  cls: str
  pos: str
  norm: str
  block: str
  parts: names.BlockNames
  embed_norm: str = ''
  registers: str = ''
  inner: str = ''
  swiglu: tuple[str, str] | tuple[()] = ()
  extras: tuple[tuple[str, str], ...] = ()
  flat: bool = False
  class_row: bool = True
  needs: tuple[str, ...] = ()
  neutral: tuple[tuple[str, float], ...] = ()
  eps: float = 1e-6
  activation: str = 'gelu'
  activations: tuple[str, ...] = ('gelu', 'gelu_tanh', 'quick_gelu')
  stats: str = 'imagenet'
  decoder: Callable[..., list[names.Entry]] | None = None
  decoder_pos: str = ''
  rewrites: tuple[tuple[str, str], ...] = ()
  unused: str = 'mask_token$'
  marks: tuple[str, ...] = ()
  hints: Callable[[dict], Hints] = lambda config: Hints()
  config: Callable[[bundles.Bundle], dict] | None = None

  def renamed(self, weights: files.Weights) -> files.Weights:
    """The weights under this layout's spelling."""

    def spelled(name):
      for pattern, replacement in self.rewrites:
        name = re.sub(pattern, replacement, name)
      return name

    stored = {spelled(name): entry for name, entry in weights.stored.items()}
    return files.Weights(weights.path, weights.kind, stored, weights.metadata, weights.opaque)

  def prefixes(self, weights: files.Weights) -> list[str]:
    """What comes before this layout's names, for each network of it in a file; [] if there is none."""
    here = self.renamed(weights)
    if self.marks and not any(re.search(mark, name) for mark in self.marks for name in here):
      return []
    first = f'{self.patch}.weight'
    found = [name.removesuffix(first) for name in here if name == first or name.endswith(f'.{first}')]
    inner = f'{self.block.replace("{i}", "0")}.{self.parts.norm1}.weight'
    return [prefix for prefix in found if f'{prefix}{inner}' in here]

  def entries(self, patch, heads: int, swiglu: bool = False) -> list[names.Entry]:
    """Names of everything but the position table."""
    tokens = names.Form(lambda w: w.reshape(1, 1, -1), lambda w: w.reshape(-1)) if self.flat else names.SAME
    parts = dataclasses.replace(self.parts, fc1=self.swiglu[0], fc2=self.swiglu[1]) if swiglu else self.parts
    optional = [(self.cls, 'encoder/cls_token', tokens), (self.registers, 'encoder/registers', names.SAME)]
    table = [
      names.Entry(f'{self.patch}.weight', 'encoder/patch_embed/kernel', names.patch_conv(patch)),
      names.Entry(f'{self.patch}.bias', 'encoder/patch_embed/bias'),
      *[names.Entry(theirs, ours, form) for theirs, ours, form in optional if theirs],
      *names.block(self.block, 'encoder/blocks', heads, parts),
      *names.norm(self.norm, 'encoder/norm'),
    ]
    if self.embed_norm:
      table += names.norm(self.embed_norm, 'encoder/embed_norm')
    for theirs, ours in self.extras:
      table += names.norm(theirs, ours) if ours.endswith('norm') else names.linear(theirs, ours)
    return table


def load(
  weights: files.Weights, layout: Layout, prefix: str, hints: Hints
) -> tuple[bundles.Bundle, list[str], list[str]]:
  """A network in a file -> (bundle, their names that were not taken, remarks for the user).

  Raises:
    CheckpointError: something is missing, does not fit together, or cannot be known from the file.
  """
  whole = layout.renamed(weights)
  beside = [name for name in whole if not name.startswith(prefix)]
  root = prefix.removesuffix(layout.inner)
  stored = {name.removeprefix(prefix): entry for name, entry in whole.stored.items() if name.startswith(prefix)}
  parts = (*(f'{root}{theirs}.' for theirs, _ in layout.extras), *((f'{root}decoder.',) if layout.decoder else ()))
  for name in [name for name in beside if root != prefix and name.startswith(parts)]:
    stored[name.removeprefix(root)] = whole.stored[name]
    beside.remove(name)
  mine = files.Weights(weights.path, weights.kind, stored)
  notes = []
  options, swiglu = _options(mine, layout, hints, notes)
  table = layout.entries(options['patch'], options['heads'], swiglu)
  method = {}
  if layout.decoder:
    method = _method(mine, layout, options, hints, notes)
    if method:
      table += [entry for entry in layout.decoder(SimpleNamespace(**method)) if entry.ours.startswith('decoder/')]
  params, unknown = names.load(mine, [entry for entry in table if entry.theirs != layout.pos])
  params = bundles.float32(params)
  unknown = [name for name in unknown if name not in (layout.pos, layout.decoder_pos)]
  encoder = params['encoder']
  _place(encoder, options, mine.get(layout.pos), hints, layout, notes)
  if method:
    method |= {'image_size': tuple(p * g for p, g in zip(options['patch'], options['grid'], strict=True))}
    width = vit.size(method['decoder'])['width']
    fixed = posemb.sincos(options['grid'], width, cls=True)
    given = mine.get(layout.decoder_pos, fixed).astype(np.float32).reshape(-1, width)
    if 'pos_embed' in encoder or given.shape != fixed.shape or not np.allclose(given, fixed, atol=1e-5):
      notes.append(
        'positions are not the fixed sin-cos ones in encoder and decoder: right as an encoder, but the method mae would put its own'
      )
  bundle = bundles.Bundle(
    encoder=options,
    params=params,
    channels=mine.shape(f'{layout.patch}.weight')[1],
    stats=hints.stats or layout.stats,
    crop=hints.crop or 0.875,
    method=method,
  )
  bundle.check()
  dull = re.compile(layout.unused)
  return bundle, [name for name in unknown if not dull.search(name)] + beside, notes


def _options(weights, layout: Layout, hints: Hints, notes: list[str]):
  """Options of `vit.ViT` but for grid and pos; whether the MLP gates."""
  width, _, *patch = weights.shape(f'{layout.patch}.weight')
  pattern = re.compile(re.escape(f'{layout.block}.{layout.parts.norm1}.weight').replace(r'\{i\}', r'(\d+)') + '$')
  depth = 1 + max(int(match[1]) for match in map(pattern.match, weights) if match)
  first = layout.block.replace('{i}', '0')
  gated = bool(layout.swiglu) and f'{first}.{layout.swiglu[0]}.weight' in weights
  fc1, fc2 = layout.swiglu if gated else (layout.parts.fc1, layout.parts.fc2)
  hidden = weights.shape(f'{first}.{fc2}.weight')[1]
  swiglu = gated and weights.shape(f'{first}.{fc1}.weight')[0] == 2 * hidden
  heads = hints.heads or HEADS.get(width)
  if heads is None:
    raise CheckpointError(
      f'{weights.path}: how many heads a ViT of width {width} has cannot be read off its weights, and no config.json beside them says it; give --heads'
    )
  if hints.heads is None:
    notes.append(f'heads: {heads}, as published for width {width} (not in the file; --heads)')
  if width % heads:
    raise CheckpointError(f'{heads} heads do not divide the width {width} of {weights.path}')
  qkv = layout.parts.qkv if isinstance(layout.parts.qkv, str) else layout.parts.qkv[0]
  present = lambda name: bool(name) and name in weights
  embed_norm = present(f'{layout.embed_norm}.weight')
  eps = hints.eps or (1e-5 if embed_norm else layout.eps)
  activation = 'swiglu' if swiglu else hints.activation or layout.activation
  if hints.eps is None:
    notes.append(f'LayerNorm eps: {eps:g} (not in the file; --eps)')
  if hints.activation is None and not swiglu:
    notes.append(f'activation: {activation} (not in the file; --activation)')
  if hints.stats is None:
    notes.append(f'images normalised with: {layout.stats} (not in the file; --stats)')
  options = dict(
    width=width,
    depth=depth,
    heads=heads,
    patch=tuple(patch),
    mlp_ratio=hidden / width,
    final_norm=present(f'{layout.norm}.weight'),
    eps=eps,
    cls=present(layout.cls),
    registers=weights.shape(layout.registers)[-2] if present(layout.registers) else 0,
    patch_bias=present(f'{layout.patch}.bias'),
    qkv_bias=present(f'{first}.{qkv}' + ('' if qkv.endswith('_') else '.') + 'bias'),
    embed_norm=embed_norm,
    activation=activation,
    layer_scale=1.0 if layout.parts.scale1 and present(f'{first}.{layout.parts.scale1}') else 0.0,
  )
  return options, swiglu


def _method(weights, layout: Layout, options, hints: Hints, notes):
  """Options of `methods.mae` for a file with a decoder; {} for an encoder alone."""
  entries = layout.decoder(SimpleNamespace(size='16/1/1', decoder='16/1/1', patch=options['patch']))
  name = {entry.ours: entry.theirs for entry in entries}
  embed = name['decoder/embed/kernel']
  if embed not in weights:
    return {}
  width = weights.shape(embed)[0]
  pattern = re.compile(re.escape(name['decoder/blocks/norm1/scale']).replace(r'\{i\}', r'(\d+)') + '$')
  depth = 1 + max(int(match[1]) for match in map(pattern.match, weights) if match)
  hidden = weights.shape(name['decoder/blocks/mlp/fc1/kernel'].replace('{i}', '0'))[0]
  if hidden != int(width * options['mlp_ratio'] + 1e-6):
    notes.append(
      f"decoder: left out, as its MLPs ({hidden} of width {width}) are not {options['mlp_ratio']:g} times as wide, like the encoder's"
    )
    return {}
  heads = hints.decoder_heads or DECODER_HEADS.get(width)
  if heads is None:
    raise CheckpointError(
      f'{weights.path}: how many heads a decoder of width {width} has cannot be read off its weights; give --decoder_heads'
    )
  if hints.decoder_heads is None:
    notes.append(f'decoder heads: {heads}, as published for width {width} (not in the file; --decoder_heads)')
  if 'norm_pix' not in hints.method:
    notes.append('target: normalised pixels, as most published weights (not in the file)')
  return {
    'name': 'mae',
    'size': f'{options["width"]}/{options["depth"]}/{options["heads"]}',
    'decoder': f'{width}/{depth}/{heads}',
    'patch': options['patch'],
    'channels': weights.shape(f'{layout.patch}.weight')[1],
    'mlp_ratio': options['mlp_ratio'],
    'ln_eps': options['eps'],
    **hints.method,
  }


def _place(encoder, options, table, hints: Hints, layout: Layout, notes):
  """Puts grid and pos into `options`, and a trained table into `encoder`."""
  patch, cls, registers = options['patch'], int(options['cls']), options['registers']
  rank = len(patch)
  told = hints.image_size and tuple(side // p for side, p in zip(hints.image_size, patch, strict=True))
  if table is None:
    if told is None:
      raise CheckpointError(
        'the file has no position table, so the image size cannot be read off it; give --image_size'
      )
    notes.append('positions: the fixed sin-cos table (the file has none)')
    options |= {'grid': told, 'pos': 'sincos'}
    return
  table = np.asarray(table).astype(np.float32).reshape(-1, options['width'])
  rows = len(table)
  # Rows that are no patches: one for the class token, none, or one for each token before the patches.
  for extra in dict.fromkeys((cls, 0, cls + registers)):
    side = round(max(rows - extra, 0) ** (1 / rank))
    grid = told if told and math.prod(told) == rows - extra else (side,) * rank
    if math.prod(grid) == rows - extra:
      break
  else:
    raise CheckpointError(
      f'the position table has {rows} rows, which is no square grid of patches; give --image_size of its training'
    )
  first, places = table[:extra], table[extra:]
  if extra > cls:
    encoder['registers'] = encoder['registers'] + first[cls:]
  ours = np.concatenate([first[:cls] if extra else np.zeros((cls, table.shape[1]), np.float32), places])[None]
  options |= {'grid': tuple(grid), 'pos': 'learned'}
  if options['width'] % (2 * rank) == 0 and np.allclose(
    ours[0], posemb.sincos(grid, options['width'], cls=bool(cls)), atol=1e-5
  ):
    options['pos'] = 'sincos'
  else:
    encoder['pos_embed'] = ours


def save(bundle: bundles.Bundle, layout: Layout) -> tuple[dict[str, np.ndarray], list[str]]:
  """A bundle -> (arrays under a layout's names, parts of ours that it leaves out).

  Raises:
    CheckpointError: the layout has no place for something that changes the encoder's features, or needs something it lacks.
  """
  encoder, options = dict(bundle.params['encoder']), bundle.encoder
  swiglu = options.get('activation') == 'swiglu'
  if swiglu and not layout.swiglu or not swiglu and options.get('activation', 'gelu') not in layout.activations:
    raise CheckpointError(f'{layout.name} cannot express the activation {options["activation"]!r}')
  if isinstance(options.get('qkv_bias'), str) and options['qkv_bias']:
    _join_biases(encoder)
  _fill(encoder, options, layout)
  table = bundle.table()[None]
  encoder.pop('pos_embed', None)
  cls = int(bundle.module.cls)
  if options.get('registers') and not layout.class_row:
    if cls:
      encoder['cls_token'] = encoder['cls_token'] + table[:, :1]
    table = table[:, cls:]
  entries = layout.entries(options['patch'], options['heads'], swiglu)
  known = {entry.ours for entry in entries}
  homeless = sorted(path for path in traverse_util.flatten_dict({'encoder': encoder}, sep='/') if path not in known)
  if homeless:
    raise CheckpointError(f'{layout.name} has no place for {", ".join(homeless)}; take another format')
  extras = {ours: bundle.params[ours] for _, ours in layout.extras if ours in bundle.params}
  whole = names.export({'encoder': encoder, **extras}, entries)
  whole[layout.pos] = table[0] if layout.flat else table
  decoder = {}
  if layout.decoder and bundle.method.get('name') == 'mae' and 'decoder' in bundle.params:
    named = [entry for entry in layout.decoder(SimpleNamespace(**bundle.method)) if entry.ours.startswith('decoder/')]
    decoder = names.export({'decoder': bundle.params['decoder']}, named)
    width = vit.size(bundle.method['decoder'])['width']
    decoder[layout.decoder_pos] = posemb.sincos(options['grid'], width, cls=True)[None]
  elif layout.decoder:
    raise CheckpointError(
      f'{layout.name} holds encoder and decoder of a MAE; these weights have no such decoder; take another format'
    )
  beside = tuple(f'{theirs}.' for theirs, ours in layout.extras if ours in extras)
  inner = layout.inner if extras or decoder else ''
  arrays = {name if name.startswith(beside) else inner + name: value for name, value in whole.items()} | decoder
  left = sorted(bundle.params.keys() - extras.keys() - {'encoder'} - ({'decoder'} if decoder else set()))
  return {name: np.asarray(value, np.float32) for name, value in arrays.items()}, left


def _fill(encoder, options, layout: Layout):
  """Adds to `encoder` what a layout always has and what, at a neutral value, changes nothing."""
  width, depth, heads = options['width'], options['depth'], options['heads']
  shapes = {
    'blocks/layer_scale1/scale': (depth, width),
    'blocks/layer_scale2/scale': (depth, width),
    'blocks/attn/qkv/bias': (depth, 3, heads, width // heads),
    'patch_embed/bias': (width,),
  }
  for path, value in layout.neutral:
    _put(encoder, path.split('/'), np.full(shapes[path], value, np.float32))
  for need in layout.needs:
    if need not in encoder:
      raise CheckpointError(f'{layout.name} needs {need!r}, which this encoder does not have; take another format')


def _join_biases(encoder):
  """Puts biases of queries, keys and values that are parameters of their own into one, with zeros for those that are not there."""
  attn = encoder['blocks']['attn']
  own = {letter: attn['qkv'].get(f'{letter}_bias') for letter in 'qkv'}
  zero = np.zeros_like(next(bias for bias in own.values() if bias is not None))
  bias = np.stack([zero if own[letter] is None else own[letter] for letter in 'qkv'], axis=1)
  qkv = {'kernel': attn['qkv']['kernel'], 'bias': bias}
  encoder['blocks'] = {**encoder['blocks'], 'attn': {**attn, 'qkv': qkv}}


def _put(tree: dict, path: list[str], value):
  """Sets tree[path] where it is absent, copying the dicts on the way."""
  for key in path[:-1]:
    tree[key] = dict(tree.get(key, {}))
    tree = tree[key]
  tree.setdefault(path[-1], value)
