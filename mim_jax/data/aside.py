"""Transforms of images: leaving a share of them as they are, and turning them."""

import math

import numpy as np

from mim_jax.data import augment
from mim_jax.data.chain import CHECKS, register

_KEPT = 'set_aside'  # field that holds the picture until it is taken back

CHECKS['degrees'] = ('a number from 0 to 180', lambda v: isinstance(v, int | float) and 0 <= v <= 180)


@register
def set_aside(example, rng, size, p):
  """With probability `p` keeps the image, brought to `size` (side, or height and width), for take_back at the end."""
  from mim_jax.data.images import scaled

  if rng.random() >= p:
    return example
  size = (size, size) if isinstance(size, int) else size
  return {**example, _KEPT: scaled(example['image'], size)}


@register
def take_back(example, rng):
  """The image that set_aside kept, if it did, in place of what the transforms between made of it."""
  kept = example.get(_KEPT)
  rest = {name: value for name, value in example.items() if name != _KEPT}
  return rest if kept is None else {**rest, 'image': kept}


@register
def rotate(example, rng, degrees):
  """Turns image, mask and boxes about the middle by up to `degrees` either way; what comes from outside is 0."""
  angle = math.radians(degrees * (2 * rng.random() - 1))
  height, width = example['image'].shape[:2]
  matrix = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
  centre = np.array([width / 2, height / 2])
  return augment.warp(example, matrix, centre - matrix @ centre, fill=0)
