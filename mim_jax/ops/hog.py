"""Histograms of oriented gradients (Dalal and Triggs 2005) as prediction targets.

A gradient votes with its magnitude for the one bin its angle falls into; nothing is shared between bins, cells or
blocks (mx-mark/DMJD, util/hog_tensor.py). Angles are unsigned, so an image and its negative have the same histograms.
"""

import math

import jax.numpy as jnp
import numpy as np


def gradients(image):
  """Differences of the two neighbours, without the half: image [B, H, W, C] float32 -> (rows, columns), like it.

  The row difference is 0 in the first and last row, the column difference in the first and last column.
  """
  rows = jnp.pad(image[:, 2:] - image[:, :-2], ((0, 0), (1, 1), (0, 0), (0, 0)))
  columns = jnp.pad(image[:, :, 2:] - image[:, :, :-2], ((0, 0), (0, 0), (1, 1), (0, 0)))
  return rows, columns


def histograms(image, bins=9, cell=8):
  """Mean gradient magnitude per direction and cell: image [B, H, W, C] -> [B, H / cell, W / cell, bins, C] float32.

  `image` is integer or has integer values, as a rule 0..255: then no direction but that of bin 0 lies on the edge of a
  bin, and rounding moves no vote. Bin k holds the angles from k 180 / bins degrees; a brightness that changes from left
  to right is in bin 0. Raises ValueError when the cells do not tile the image.
  """
  batch, height, width, channels = image.shape
  if height % cell or width % cell:
    raise ValueError(f'cells of {cell} pixels do not tile an image of {height} x {width}')
  rows, columns = gradients(image.astype(jnp.float32))
  angle = jnp.degrees(jnp.arctan2(rows, columns)) % 180  # 180 itself becomes 0
  votes = jnp.floor(angle * (bins / 180)).astype(jnp.int32)
  votes = (votes[..., None, :] == jnp.arange(bins)[:, None]) * jnp.hypot(rows, columns)[..., None, :]
  return votes.reshape(batch, height // cell, cell, width // cell, cell, bins, channels).mean((2, 4))


def whiten(histogram, eps=1e-5):
  """Histograms [..., bins, C] minus their mean, over the root of their biased variance; a flat one gives zeros."""
  mean, var = statistics(histogram)
  return (histogram - mean) / jnp.sqrt(var + eps)


def undo_whiten(whitened, histogram, eps=1e-5):
  """Predicted whitened histograms in the units of `histogram`, by the statistics of `histogram` (for pictures)."""
  mean, var = statistics(histogram)
  return whitened * jnp.sqrt(var + eps) + mean


def statistics(histogram):
  """Mean and biased variance over the bins of [..., bins, C], both [..., 1, C]."""
  return jnp.mean(histogram, -2, keepdims=True), jnp.var(histogram, -2, keepdims=True)


def draw(histogram, cell):
  """Histograms [B, rows, columns, bins] -> pictures [B, rows * cell, columns * cell].

  In each cell a stroke per direction, along the edge that has it, as bright as its bin (negative ones count as 0);
  where strokes cross, the brighter one shows.
  """
  strokes = jnp.asarray(_strokes(histogram.shape[-1], cell))
  batch, rows, columns, _ = histogram.shape
  picture = jnp.max(jnp.maximum(histogram, 0)[..., None, None] * strokes, axis=3)
  return picture.transpose(0, 1, 3, 2, 4).reshape(batch, rows * cell, columns * cell)


def _strokes(bins, cell):
  """[bins, cell, cell] in [0, 1]: a line through the middle of a cell, at right angles to the gradients of each bin."""
  y, x = np.indices((cell, cell)) - (cell - 1) / 2
  lines = []
  for k in range(bins):
    angle = math.pi * (k + 0.5) / bins
    away = np.abs(x * math.cos(angle) + y * math.sin(angle))  # from the line through the middle
    lines.append(np.clip(1.2 - away, 0, 1) * (np.hypot(x, y) <= cell / 2))
  return np.stack(lines).astype(np.float32)
