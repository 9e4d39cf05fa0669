"""`synthetic:organs`: volumes like CT scans of a trunk, with organs as labels of voxels and a finding as label of all.

Options: `size` of a volume's side in voxels, `train` and `validation` number of volumes, `seed`. A volume is a
function of (seed, split, index); `size` only changes its resolution.

What makes it hard: the grey value of each organ is drawn anew for each volume from a range that it shares with the
other organs, with muscle, and with loops of bowel that belong to no class, under noise and a slow change of
brightness, so a table from grey value to class finds hardly anything; the trunk is turned, scaled, shifted and bent,
and organs differ in place, size and tilt, so a table from place to class stays far from the truth. An organ is told by
where it lies among the others. Mean Dice of the organs in 40 volumes of the defaults by tables from 200 others: 0.05
by grey value and 0.25 by place with classes weighed alike, 0.38 by place at the best weighing.

| field | shape, dtype | meaning |
|---|---|---|
| image | H W D 1 uint8 | left to right, back to front, feet to head; 0 = air |
| mask | H W D uint8 | 0 = none, 1 + number of the organ in `ORGANS` |
| label | int64 | finding, one of `FINDINGS` |
"""

import math

import numpy as np

from mim_jax.data.worlds import build

# Middle and half axes in the frame of the trunk, which reaches from -1 to 1 in each axis: left-right, back-front,
# feet-head.
ORGANS = {
  'liver': ((-0.36, 0.08, 0.36), (0.42, 0.36, 0.32)),
  'spleen': ((0.54, -0.14, 0.42), (0.17, 0.22, 0.23)),
  'right kidney': ((-0.36, -0.24, -0.28), (0.15, 0.14, 0.26)),
  'left kidney': ((0.36, -0.24, -0.22), (0.15, 0.14, 0.26)),
  'stomach': ((0.26, 0.2, 0.28), (0.25, 0.19, 0.25)),
  'aorta': ((0.07, -0.2, 0.0), (0.09, 0.09, 9.0)),
}
FINDINGS = ('none', 'one kidney', 'large spleen', 'spot in the liver')
TRUNK = (0.86, 0.62)  # half axes of a cross-section
WAVES = 5  # that bend a trunk


def _rotation(angles):
  """Rotation matrix [3, 3] about the three axes, one after another."""
  turn = np.eye(3)
  for axis, angle in enumerate(angles):
    a, b = [i for i in range(3) if i != axis]
    step = np.eye(3)
    step[a, a] = step[b, b] = math.cos(angle)
    step[a, b], step[b, a] = -math.sin(angle), math.sin(angle)
    turn = turn @ step
  return turn


def _ellipsoid(p, middle, axes, turn):
  """(distance from the middle in half axes)^2 of points p [..., 3], below 1 inside."""
  return np.sum(np.square(((p - np.float32(middle)) @ turn.astype(np.float32)) / np.float32(axes)), axis=-1)


def _frame(rng, size):
  """Coordinates [size, size, size, 3] float32 of voxels in the frame of a turned, scaled, shifted and bent trunk."""
  line = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
  p = np.stack(np.meshgrid(line, line, line, indexing='ij'), axis=-1)
  turn = _rotation(rng.uniform(-0.25, 0.25, 3)) / rng.uniform(1.05, 1.3)
  p = (p - rng.uniform(-0.12, 0.12, 3).astype(np.float32)) @ turn.astype(np.float32)
  for _ in range(WAVES):
    wave, phase = rng.normal(0, 2.0, 3).astype(np.float32), np.float32(rng.uniform(0, 2 * math.pi))
    p = p + np.sin(p @ wave + phase)[..., None] * rng.normal(0, 0.03, 3).astype(np.float32)
  return p


def _blur(values):
  """Each axis by (1, 2, 1) / 4: what a scanner does to edges."""
  for axis in range(3):
    padded = np.pad(values, [(1, 1) if a == axis else (0, 0) for a in range(3)], mode='edge')
    cut = lambda first, padded=padded, axis=axis: np.take(padded, np.arange(first, first + values.shape[axis]), axis)
    values = (cut(0) + 2 * cut(1) + cut(2)) / 4
  return values


def volume(rng, size):
  """(grey values [size, size, size] float32 in [0, 1], organs [size, size, size] uint8, number of the finding)."""
  p = _frame(rng, size)
  finding = int(rng.integers(len(FINDINGS)))
  edge = (np.abs(p[..., 0]) / TRUNK[0]) ** 2.5 + (np.abs(p[..., 1]) / TRUNK[1]) ** 2.5
  fat, muscle = rng.uniform(0.2, 0.3), rng.uniform(0.42, 0.5)
  grey = np.where(edge < 1, np.where(edge < rng.uniform(0.72, 0.85), muscle, fat), 0).astype(np.float32)
  inner = edge < 0.8
  mask = np.zeros((size,) * 3, np.uint8)

  for _ in range(int(rng.integers(3, 7))):  # loops of bowel, which are no class
    middle = rng.uniform((-0.5, 0.0, -0.9), (0.5, 0.4, 0.0))
    loop = _ellipsoid(p, middle, rng.uniform(0.1, 0.22, 3), _rotation(rng.uniform(-1, 1, 3))) < 1
    grey[loop & inner] = rng.uniform(0.45, 0.75)
  spine = (p[..., 0] / 0.15) ** 2 + ((p[..., 1] + 0.44) / 0.14) ** 2
  grey[(spine < 1) & (edge < 1)] = rng.uniform(0.8, 0.95)
  grey[spine < 0.12] = rng.uniform(0.4, 0.5)

  absent = int(rng.integers(2, 4)) if FINDINGS[finding] == 'one kidney' else -1
  for number, (name, (middle, axes)) in enumerate(ORGANS.items()):
    middle, axes = middle + rng.normal(0, 0.035, 3), np.asarray(axes) * rng.uniform(0.85, 1.15, 3)
    turn, value = _rotation(rng.uniform(-0.35, 0.35, 3) * (name != 'aorta')), rng.uniform(0.45, 0.75)
    if name == 'spleen' and FINDINGS[finding] == 'large spleen':
      axes = axes * 1.45
    distance = _ellipsoid(p, middle, axes, turn)
    inside = (distance < 1) & inner & (mask == 0)
    spot, radius = middle + 0.4 * axes * rng.uniform(-1, 1, 3), rng.uniform(0.11, 0.16)
    if number == absent:
      continue
    mask[inside] = number + 1
    grey[inside] = value
    if 'kidney' in name:
      grey[inside & (distance < 0.3)] = 0.75 * value  # its marrow
    if name == 'liver' and FINDINGS[finding] == 'spot in the liver':
      grey[inside & (np.sum(np.square(p - np.float32(spot)), axis=-1) < radius**2)] = value - 0.15

  slow = 1 + 0.08 * np.sin(p @ rng.normal(0, 1.2, 3).astype(np.float32) + np.float32(rng.uniform(0, 2 * math.pi)))
  grey = _blur(grey) * slow + 0.04 * rng.standard_normal(grey.shape, np.float32)
  return np.clip(grey, 0, 1), mask, finding


def example(options, split, index):
  """Example `index` of a split as a dict of the features."""
  grey, mask, finding = volume(build.stream(options['seed'], f'organs/{split}', index), options['size'])
  return {'image': (grey * 255 + 0.5).astype(np.uint8)[..., None], 'mask': mask, 'label': finding}


def _features(options):
  import tensorflow_datasets as tfds

  sides = (options['size'],) * 3
  tensor = lambda shape: tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding='bytes')
  return {'image': tensor((*sides, 1)), 'mask': tensor(sides), 'label': tfds.features.ClassLabel(names=list(FINDINGS))}


WORLD = build.World(
  name='organs',
  version='1.0.0',
  description='Grey volumes of a bent trunk with six organs, and one of four findings.',
  defaults={'size': 40, 'train': 400, 'validation': 60, 'seed': 0},
  limits={'size': (8, 512), 'train': (0, 10**6), 'validation': (0, 10**6), 'seed': (0, 2**63 - 1)},
  splits=('train', 'validation'),
  features=_features,
  example=example,
  metadata=lambda options: {'mask': ['none', *ORGANS]},
)
