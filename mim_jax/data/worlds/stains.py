"""`synthetic:stains`: cells under a microscope of six channels, which show different things and follow from each other
in part.

Options: `size` of the image's side in pixels, `train` and `validation` number of examples, `seed`, `varying`: every
image comes from one of three microscopes that have other channels (`MICROSCOPES`), else all have all six. An example is
a function of (seed, split, index).

What makes it hard: the class is a pair, the form of the nuclei (round, long, lobed) and the order of the granules
(fine, coarse, around the nucleus). No channel tells both but `bleed`, in which they lie over each other; `body` and
`membrane` tell neither. Gain and offset of every channel vary from image to image, so channel means (a trivial
baseline) tell nothing of the form; number, size, place and direction of cells are drawn independently of it.

| field | shape, dtype | meaning |
|---|---|---|
| image | H W C uint8 | C = 6, or 4 with `varying`, 0 where padded |
| channel_ids | C int32 | types of the channels, numbers of `CHANNELS`, -1 where padded |
| label | int64 | 3 x form of the nuclei + order of the granules |
"""

import math

import cv2
import numpy as np

from mim_jax.data.worlds import build

FORMS = ('round', 'long', 'lobed')
ORDERS = ('fine', 'coarse', 'around')
CHANNELS = ('nucleus', 'body', 'granules', 'membrane', 'bleed', 'transmission')
MICROSCOPES = ((0, 1, 2), (0, 3, 4), (1, 2, 4, 5))
DRAWN = 64  # pixels of the side that everything is drawn at


def _nucleus(form, y, x, radius, angle):
  """[DRAWN, DRAWN] in [0, 1]: a soft nucleus at pixels (y, x)."""
  rows, columns = np.mgrid[:DRAWN, :DRAWN].astype(np.float32)
  dy, dx = rows - y, columns - x
  u, v = math.cos(angle) * dx + math.sin(angle) * dy, math.cos(angle) * dy - math.sin(angle) * dx
  if form == 0:
    distance = np.hypot(u, v) / radius
  elif form == 1:
    distance = np.hypot(u / 1.6, v * 1.6) / radius
  else:  # the same area, cut in by three notches
    turn = np.arctan2(v, u)
    distance = np.hypot(u, v) / (radius * (1 + 0.4 * np.cos(3 * turn)))
  return (1 / (1 + np.exp((distance - 1) * 8))).astype(np.float32)


def _granules(rng, order, body, nucleus):
  """[DRAWN, DRAWN] in [0, 1]: dots within the body."""
  sigma = {0: 0.8, 1: 2.2, 2: 1.2}[order]
  noise = cv2.GaussianBlur(rng.standard_normal((DRAWN, DRAWN)).astype(np.float32), (0, 0), sigma)
  dots = 1 / (1 + np.exp(-4 * (noise / noise.std() - 0.6)))
  where = body * (1 - nucleus)
  if order == 2:
    ring = cv2.GaussianBlur(nucleus, (0, 0), 2.5) * (1 - nucleus)
    where = ring / max(ring.max(), 1e-6)
  return (dots * where).astype(np.float32)


def _shifted(image, down, right):
  return np.pad(image, ((down, 0), (right, 0)), mode='edge')[:-down, :-right]


def channels(rng, label):
  """[DRAWN, DRAWN, 6] float32 in [0, 1]: all channels of a random image of a class."""
  form, order = divmod(label, len(ORDERS))
  nucleus, body = np.zeros((2, DRAWN, DRAWN), np.float32)
  for _ in range(int(rng.integers(2, 5))):
    y, x = DRAWN * (0.12 + 0.76 * rng.random(2))
    radius, angle = 5 + 3 * rng.random(), 2 * math.pi * rng.random()
    nucleus = np.maximum(nucleus, _nucleus(form, y, x, radius, angle))
    away = rng.normal(size=2) * 1.5
    body = np.maximum(body, _nucleus(0, y + away[0], x + away[1], radius * (1.9 + 0.5 * rng.random()), 0))
  grain = cv2.GaussianBlur(rng.standard_normal((DRAWN, DRAWN)).astype(np.float32), (0, 0), 3)
  body = np.clip(body * (0.8 + 0.6 * grain), 0, 1).astype(np.float32)
  granules = _granules(rng, order, body, nucleus)
  dy, dx = (cv2.Sobel(body, cv2.CV_32F, *step) for step in ((0, 1), (1, 0)))
  membrane = np.clip(np.hypot(dx, dy) / 1.2, 0, 1)
  bleed = _shifted(cv2.GaussianBlur(0.5 * nucleus + 0.5 * granules, (0, 0), 0.7), 2, 1)
  thick = cv2.GaussianBlur(body + nucleus, (0, 0), 1)
  transmission = np.clip(0.5 + (thick - _shifted(thick, 2, 2)), 0, 1)
  return np.stack([nucleus, body, granules, membrane, bleed, transmission], axis=-1).astype(np.float32)


def example(options, split, index):
  """Example `index` of a split as a dict of the features."""
  rng = build.stream(options['seed'], f'stains/{split}', index)
  label = int(rng.integers(len(FORMS) * len(ORDERS)))
  image = channels(rng, label)
  gain, offset = 0.5 + 0.4 * rng.random(len(CHANNELS)), 0.1 * rng.random(len(CHANNELS))
  image = image * gain + offset + 0.02 * rng.standard_normal(image.shape)
  types = np.arange(len(CHANNELS), dtype=np.int32)
  if options['varying']:
    types = np.array(MICROSCOPES[rng.integers(len(MICROSCOPES))], np.int32)
    image = image[..., types]
  size = options['size']
  image = cv2.resize(
    image.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA if size < DRAWN else cv2.INTER_LINEAR
  )
  image = (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
  short = _width(options) - len(types)
  return {
    'image': np.pad(image, ((0, 0), (0, 0), (0, short))),
    'channel_ids': np.pad(types, (0, short), constant_values=-1),
    'label': label,
  }


def _width(options):
  return max(map(len, MICROSCOPES)) if options['varying'] else len(CHANNELS)


def _features(options):
  import tensorflow_datasets as tfds

  size, width = options['size'], _width(options)
  names = [f'{form} {order}' for form in FORMS for order in ORDERS]
  return {
    'image': tfds.features.Tensor(shape=(size, size, width), dtype=np.uint8),
    'channel_ids': tfds.features.Tensor(shape=(width,), dtype=np.int32),
    'label': tfds.features.ClassLabel(names=names),
  }


WORLD = build.World(
  name='stains',
  version='1.0.0',
  description='Cells under a microscope of six channels; the class is a pair, most channels tell half of it or none.',
  defaults={'size': 32, 'train': 20_000, 'validation': 2_000, 'seed': 0, 'varying': False},
  limits={'size': (16, 1024), 'train': (0, 10**8), 'validation': (0, 10**8), 'seed': (0, 2**63 - 1)},
  splits=('train', 'validation'),
  features=_features,
  example=example,
  metadata=lambda options: {'channels': list(CHANNELS), 'microscopes': [list(types) for types in MICROSCOPES]},
)
