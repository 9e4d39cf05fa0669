"""Transforms of volumes: window, crop, flip, rotate, change of intensity.

They work on `image` [H, W, D, C] (or [H, W, D], taken for one channel) and move `mask` [H, W, D, ...] alike. A crop
comes first: of a volume that is mapped from disk it reads no more than it needs. Recipe: FengheTan9/Hi-End-MAE,
dataloader/med_datasets.py, and MONAI 1.2.
"""

import numpy as np

from mim_jax.data.chain import CHECKS, register
from mim_jax.errors import ConfigError

TRIES = 256  # random voxels that are looked at before all of them are


def _is_sides(value):
  values = value if isinstance(value, tuple) else (value,) * 3
  return len(values) == 3 and all(type(n) is int and n > 0 for n in values)


CHECKS['sides'] = 'a number of voxels or (height, width, depth)', _is_sides
CHECKS['random_crop_3d.by'] = "'image' or 'mask'", lambda v: v in ('image', 'mask')
CHECKS['amount'] = 'a number from 0 to 1', lambda v: isinstance(v, int | float) and 0 <= v <= 1


def with_channels(image):
  """[H, W, D, C] of a volume with or without the last axis. Raises ConfigError for anything else."""
  image = image[..., None] if image.ndim == 3 else image
  if image.ndim != 4:
    raise ConfigError(f'a volume is [H, W, D] or [H, W, D, C], found an image of shape {image.shape}')
  return image


def _moved(example, move):
  """The example with `move` done to image and mask."""
  moved = {name: move(example[name]) for name in ('image', 'mask') if name in example}
  return {**example, **moved}


def _cut(example, start, sides):
  window = tuple(slice(a, a + n) for a, n in zip(start, sides, strict=True))
  return _moved({**example, 'image': with_channels(example['image'])}, lambda x: np.ascontiguousarray(x[window]))


def _sides(example, sides, name):
  """(sides of the volume, sides of the crop); raises ConfigError where the crop is larger."""
  sides = (sides,) * 3 if isinstance(sides, int) else sides
  have = example['image'].shape[:3]
  if example['image'].ndim < 3 or any(n > m for n, m in zip(sides, have, strict=True)):
    raise ConfigError(
      f'{name}({sides}) got a volume of {have}; write pad_3d({sides}) before it, or leave such volumes out'
    )
  return have, sides


@register
def pad_3d(example, rng, sides, value=0):
  """Surrounds volumes with `value` (the mask with 0) where they are smaller than `sides`; larger ones stay."""
  image = with_channels(example['image'])
  sides = (sides,) * 3 if isinstance(sides, int) else sides
  missing = [max(n - m, 0) for n, m in zip(sides, image.shape[:3], strict=True)]
  if not any(missing):
    return {**example, 'image': image}
  around = [(n // 2, n - n // 2) for n in missing]
  example = {**example, 'image': np.pad(image, [*around, (0, 0)], constant_values=value)}
  if 'mask' in example:
    example['mask'] = np.pad(example['mask'], around + [(0, 0)] * (example['mask'].ndim - 3))
  return example


@register
def crop_3d(example, rng, sides):
  """The middle `sides` voxels of a volume, one side or (height, width, depth)."""
  have, sides = _sides(example, sides, 'crop_3d')
  return _cut(example, [(m - n) // 2 for m, n in zip(have, sides, strict=True)], sides)


@register
def random_crop_3d(example, rng, sides, p=0.75, above=0.0, by='image'):
  """`sides` voxels around a random one that is above `above` with probability `p`, else around one of the others.

  by: what is compared, 'image' (its first channel, as stored) or 'mask'. Where there is no voxel of the
  wanted kind, any will do. A crop that would reach beyond the volume is moved inside.
  """
  have, sides = _sides(example, sides, 'random_crop_3d')
  if by not in example:
    raise ConfigError(f'random_crop_3d(by={by!r}) needs the field {by!r}, found {", ".join(sorted(example))}')
  centre = _random_voxel(example[by], rng, above, bool(rng.random() < p))
  start = [min(max(c - n // 2, 0), m - n) for c, n, m in zip(centre, sides, have, strict=True)]
  return _cut(example, start, sides)


def _random_voxel(values, rng, above, wanted):
  """A uniform draw among the voxels with (value > above) == wanted, or among all if there are none."""
  shape = values.shape[:3]
  at = lambda place: values[place] if values.ndim == 3 else values[place][0]
  for _ in range(TRIES):  # a draw that is refused costs less than a pass over the volume
    place = tuple(int(u * n) for u, n in zip(rng.random(3), shape, strict=True))
    if (at(place) > above) == wanted:
      return place
  plane = values if values.ndim == 3 else values[..., 0]
  places = np.flatnonzero((plane > above) == wanted)
  chosen = places[int(rng.random() * len(places))] if len(places) else int(rng.random() * np.prod(shape))
  return tuple(map(int, np.unravel_index(chosen, shape)))


@register
def flip_3d(example, rng, p=0.5):
  """Turns the order of each of the three axes round, with probability p for each."""
  axes = tuple(axis for axis in range(3) if rng.random() < p)
  return _moved(example, lambda x: np.flip(x, axes)) if axes else example


@register
def rot90_3d(example, rng, p=0.3):
  """With probability p turns the first two axes, which must be equally long, by 1, 2 or 3 right angles."""
  if rng.random() >= p:
    return example
  height, width = example['image'].shape[:2]
  if height != width:
    raise ConfigError(f'rot90_3d got {height} x {width} voxels across the turn; crop the first two axes to one length')
  turns = 1 + int(rng.random() * 3)
  return _moved(example, lambda x: np.rot90(x, turns))


def _number(value):
  return isinstance(value, int | float) and not isinstance(value, bool)


CHECKS['low'] = CHECKS['high'] = 'a number, in the units of the volume', _number


@register(batch=True)
def window(batch, low, high):
  """(x - low) / (high - low), cut to [0, 1], as float32: window(-175, 250) is soft tissue in CT's Hounsfield units."""
  if not low < high:
    raise ConfigError(f'window({low}, {high}): low must be less than high')
  image = (batch['image'].astype(np.float32) - np.float32(low)) * np.float32(1 / (high - low))
  return {**batch, 'image': np.clip(image, 0, 1, out=image)}


@register
def intensity_3d(example, rng, amount=0.1, p=0.1):
  """With probability p times 1 + U(-amount, amount), and with probability p plus U(-amount, amount); float images."""
  image = example['image']
  if image.dtype.kind != 'f':
    raise ConfigError(
      f'intensity_3d works on floats in [0, 1], found {image.dtype}; write window or to_float before it'
    )
  factor, offset = ((2 * rng.random() - 1) * amount if rng.random() < p else 0.0 for _ in range(2))
  return {**example, 'image': image * np.float32(1 + factor) + np.float32(offset)}
