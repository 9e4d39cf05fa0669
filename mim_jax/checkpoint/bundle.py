"""Our weight files: a safetensors file whose names are the paths of the tree, and whose metadata rebuilds the network.

`params` always holds 'encoder', a tree of `models.vit.ViT`; a pre-training method's file also its other parts, a classifier's `fc_norm`
and `head`.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from mim_jax.checkpoint import files
from mim_jax.errors import CheckpointError
from mim_jax.models import posemb, vit
from mim_jax.ops import patches, pixels

KEY = 'mim_jax'  # of the metadata
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Bundle:
  """Weights and what it takes to use them.

  Attributes:
    encoder: options of `vit.ViT`.
    params: nested dicts of float32 arrays.
    channels: of the images.
    stats: normalisation of the images, a name in `ops.pixels.STATS` or ((mean, ...), (std, ...)).
    crop: share of the resized image's short side that the evaluation crop keeps.
    eval_transforms: what brings a picture to the encoder; '' for a resize and a crop by the three above.
    method: options of the method that the weights pre-train, with its 'name'; {} for an encoder alone.
    source: where they came from: file, format, digest, step.
  """

  encoder: dict[str, Any]
  params: dict[str, Any]
  channels: int = 3
  stats: Any = 'imagenet'
  crop: float = 0.875
  eval_transforms: str = ''
  method: dict[str, Any] = dataclasses.field(default_factory=dict)
  source: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def module(self) -> vit.ViT:
    return vit.ViT(**self.encoder)

  @property
  def image_size(self) -> tuple[int, ...]:
    return tuple(p * g for p, g in zip(self.encoder['patch'], self.encoder['grid'], strict=True))

  @property
  def transforms(self) -> str:
    """What brings a picture to the encoder, in the language of `data.transforms`."""
    return self.eval_transforms or transforms(self.image_size, self.stats, self.crop)

  def table(self) -> np.ndarray:
    """Position table [cls + N, D], whether trained or fixed."""
    return np.asarray(self.params['encoder'].get('pos_embed', self.module.table))[0]

  def resized(self, image_size: tuple[int, ...]) -> 'Bundle':
    """The same weights for images of another size: a trained position table is resampled, a fixed one made anew."""
    if tuple(image_size) == self.image_size:
      return self
    try:
      grid = patches.grid_of(image_size, self.encoder['patch'])
    except ValueError as error:
      raise CheckpointError(str(error)) from error
    params = dict(self.params)
    if 'pos_embed' in params['encoder']:
      table = posemb.resample(params['encoder']['pos_embed'], self.encoder['grid'], grid, int(self.module.cls))
      params['encoder'] = {**params['encoder'], 'pos_embed': table}
    method = {**self.method, 'image_size': tuple(image_size)} if self.method else {}
    encoder = {**self.encoder, 'grid': grid}
    return dataclasses.replace(self, encoder=encoder, params=params, method=method, eval_transforms='')

  def check(self):
    """Raises CheckpointError when the encoder's arrays are not those that its options describe."""
    image = jax.ShapeDtypeStruct((1, *self.image_size, self.channels), jnp.float32)
    expected = jax.eval_shape(self.module.init, jax.random.key(0), image)['params']
    here, there = (traverse_util.flatten_dict(tree, sep='/') for tree in (self.params['encoder'], expected))
    wrong = [
      f'{path}: found {here[path].shape if path in here else "none"}, expected {there[path].shape if path in there else "none"}'
      for path in sorted(here.keys() | there.keys())
      if path not in here or path not in there or tuple(here[path].shape) != tuple(there[path].shape)
    ]
    if wrong:
      raise CheckpointError('the weights of the encoder do not fit together: ' + '; '.join(wrong[:6]))


def transforms(image_size, stats, crop: float = 0.875) -> str:
  """Evaluation transforms: resize the short side, take the middle, normalise."""
  height, width = image_size
  normalize = 'normalize' if stats == 'imagenet' else f'normalize({stats!r})'
  if height != width:
    return f'decode | resize({(height, width)}) | {normalize}'
  return f'decode | resize({math.floor(height / crop)}) | center_crop({height}) | {normalize}'


def write(path: str | Path, bundle: Bundle):
  """Writes a bundle as one safetensors file."""
  description = {
    'format': FORMAT,
    **{field.name: getattr(bundle, field.name) for field in dataclasses.fields(bundle) if field.name != 'params'},
  }
  arrays = {name: np.asarray(value) for name, value in traverse_util.flatten_dict(bundle.params, sep='/').items()}
  files.write(path, arrays, {KEY: json.dumps(description, sort_keys=True)})


def is_bundle(weights: files.Weights) -> bool:
  return KEY in weights.metadata


def describe(weights: files.Weights) -> dict[str, Any]:
  """What the metadata of a bundle says, without its arrays."""
  try:
    found = json.loads(weights.metadata[KEY])
    version = found.pop('format')
  except (ValueError, KeyError, TypeError) as error:
    raise CheckpointError(f'{weights.path}: the metadata {KEY!r} cannot be read: {error}') from error
  if version != FORMAT:
    raise CheckpointError(f'{weights.path} has format {version}, this version reads format {FORMAT}; convert it again')
  return tuples(found)


def read(weights: files.Weights) -> Bundle:
  """The bundle in a file. Raises CheckpointError when its arrays do not fit its description."""
  params = traverse_util.unflatten_dict({name: weights[name] for name in weights}, sep='/')
  bundle = Bundle(params=params, **describe(weights))
  bundle.check()
  return bundle


def float32(tree: Mapping) -> dict:
  """Floating arrays of any width as float32."""
  return jax.tree.map(lambda x: np.asarray(x).astype(np.float32), dict(tree))


def named_stats(mean, std) -> Any:
  """The name in `ops.pixels.STATS` of a mean and standard deviation, or the pair itself."""
  pair = tuple(tuple(float(v) for v in part) for part in (mean, std))
  for name in pixels.STATS:
    known = pixels.stats(name)  # of one entry, or of one per channel
    if all(np.size(a) in (1, len(b)) and np.allclose(a, b, atol=1e-3) for a, b in zip(known, pair, strict=True)):
      return name
  return pair


def tuples(value):
  """What JSON made lists of, as tuples again."""
  if isinstance(value, dict):
    return {key: tuples(item) for key, item in value.items()}
  return tuple(map(tuples, value)) if isinstance(value, list) else value
