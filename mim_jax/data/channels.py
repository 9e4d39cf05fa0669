"""Images of many channels, of which not all examples have the same ones.

Each channel is of a type, a whole number from 0 over all data sets of a run. `channel_ids` [C] int32 names the types of
an image's channels and is -1 where a channel is padding; `channel_valid` [C] bool says which are real; real ones come
first. A source may give `channel_ids`; images without are taken to have the types 0, 1, 2, ... in order.
"""

import numpy as np

from mim_jax.data.chain import CHECKS, register
from mim_jax.errors import ConfigError
from mim_jax.ops.pixels import STATS

CHECKS['keep'] = (
  'types of channels such as (0, 1, 4)',
  lambda v: isinstance(v, tuple) and len(v) > 0 and all(type(n) is int and n >= 0 for n in v) and len(set(v)) == len(v),
)
CHECKS['fields'] = (
  "names such as ('sentinel1', 'sentinel2')",
  lambda v: isinstance(v, tuple) and len(v) > 0 and all(isinstance(n, str) for n in v),
)


def _typed(example):
  """(image [H, W, C], types [C]) of an example without its padding."""
  image = example['image']
  types = np.asarray(example.get('channel_ids', np.arange(image.shape[-1])), np.int32)
  if types.shape != image.shape[-1:]:
    raise ConfigError(
      f'channel_ids {types.shape} for an image of {image.shape[-1]} channels; one number per channel is expected'
    )
  return image[..., types >= 0], types[types >= 0]


def _filled(example, image, types, pad):
  short = pad - len(types)
  if short < 0:
    raise ConfigError(f'an image has {len(types)} channels, more than the {pad} that all are filled up to; raise pad')
  return {
    **example,
    'image': np.pad(image, ((0, 0), (0, 0), (0, short))),
    'channel_ids': np.pad(types, (0, short), constant_values=-1),
    'channel_valid': np.arange(pad) < len(types),
  }


@register
def type_channels(example, rng, pad=0):
  """Adds `channel_ids` and `channel_valid`, with channels of 0 up to `pad` of them (0: as many as the image has)."""
  image, types = _typed(example)
  return _filled(example, image, types, pad or example['image'].shape[-1])


@register(field='')
def join_channels(example, rng, fields):
  """`image` becomes the channels of several fields [H, W, C] one after the other (So2Sat: radar and light)."""
  absent = [name for name in fields if name not in example]
  if absent:
    raise ConfigError(f'join_channels: {", ".join(absent)} not found; the example holds {", ".join(sorted(example))}')
  return {**example, 'image': np.concatenate([example[name] for name in fields], axis=-1)}


@register
def pick_channels(example, rng, keep, pad=0):
  """Leaves the channels of the types `keep`, in their order in the image, with their ids; see type_channels for
  `pad`.
  """
  image, types = _typed(example)
  chosen = np.isin(types, keep)
  if not chosen.any():
    raise ConfigError(
      f'pick_channels({keep}): the image has channels of the types {tuple(types.tolist())}, none of these'
    )
  return _filled(example, image[..., chosen], types[chosen], pad or int(chosen.sum()))


@register
def dihedral(example, rng):
  """One of the eight ways to turn and mirror a square image, each as likely (So2Sat: quarter turns and both flips)."""
  image = np.rot90(example['image'], int(rng.random() * 4))
  image = image[:, ::-1] if rng.random() < 0.5 else image
  return {**example, 'image': np.ascontiguousarray(image)}


@register(batch=True)
def normalize_channels(batch, stats):
  """normalize with the statistics of each channel's type, and 0 where a channel is padding.

  stats: a name or (mean, std) with one value per type. Images without `channel_ids` that have not all types (pictures
  of a run are scaled by such) are normalised with the means of the statistics over the types.
  """
  mean, std = (np.atleast_1d(np.asarray(s, np.float32)) for s in (STATS[stats] if isinstance(stats, str) else stats))
  image = batch['image']
  types = batch.get('channel_ids')
  if types is None and image.shape[-1] != len(mean):
    mean, std = mean.mean(keepdims=True), std.mean(keepdims=True)
  elif types is not None:
    if types.max() >= len(mean):
      raise ConfigError(f'normalize_channels has statistics of {len(mean)} types, the images have type {types.max()}')
    fill = np.maximum(types, 0)
    places = (slice(None),) * (types.ndim - 1) + (None, None)
    mean, std = mean[fill][places], std[fill][places]
  unit = np.float32(np.iinfo(image.dtype).max if image.dtype.kind in 'iu' else 1)
  out = (image.astype(np.float32) / unit - mean) / std
  if types is not None:
    out = np.where((types >= 0)[places], out, np.float32(0))
  return {**batch, 'image': out}
