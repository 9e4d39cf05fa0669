"""Position tables: fixed sin-cos tables for grids of any rank, and moving a table from one grid to another.

Everything here is a constant of the grid sizes, made once in numpy. Only `resample` also takes traced arrays, for
models that resample a trained table in their forward pass.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

TEMPERATURE = 10000.0


def sincos(grid: Sequence[int], width: int, order: Sequence[int] | None = None, cls: bool = False) -> np.ndarray:
  """Fixed sin-cos table of a grid -> [N, width] float32, or [1 + N, width] with a zero row first for the class token.

  Each axis of the grid owns width / rank columns: the sines, then the cosines, of its coordinate times 10000^(-i/m),
  i = 0..m-1, m = width / (2 rank). Rows are in raster order (last axis fastest). Computed in float64, as
  facebookresearch/mae util/pos_embed.py does.

  Args:
    grid: patches per axis, for instance (rows, columns) or (height, width, depth).
    order: which axis owns the first columns, the second, ... By default (1, 0) for two axes, which is MAE's order
      (column, then row), and (0, 1, 2, ...) otherwise, which is Hi-End-MAE's for volumes. CAE takes (0, 1).
    cls: put the zero row in front.

  Raises:
    ValueError: width is not a multiple of 2 rank, or `order` is not an order of the axes.
  """
  rank = len(grid)
  if order is None:
    order = (1, 0) if rank == 2 else tuple(range(rank))
  if sorted(order) != list(range(rank)):
    raise ValueError(f'order {tuple(order)} must name each of the {rank} axes of the grid {tuple(grid)} once')
  if width % (2 * rank):
    raise ValueError(f'width {width} must be a multiple of {2 * rank}: a sine and a cosine for each of {rank} axes')
  count = width // (2 * rank)
  frequency = TEMPERATURE ** (-np.arange(count, dtype=np.float64) / count)
  coordinates = np.indices(grid, dtype=np.float64).reshape(rank, -1)
  angles = [np.outer(coordinates[axis], frequency) for axis in order]
  table = np.concatenate([part for angle in angles for part in (np.sin(angle), np.cos(angle))], axis=1)
  if cls:
    table = np.concatenate([np.zeros((1, width)), table])
  return table.astype(np.float32)


def cubic_matrix(old: int, new: int, nudge: float = 0.0) -> np.ndarray:
  """Weights [new, old] float32 of a cubic resize of one axis, as PyTorch's `interpolate(mode='bicubic')` has them.

  Kernel with a = -0.75, half-pixel centres, no antialiasing when shrinking, taps outside clamped to the border, weights
  not renormalised. `jax.image.resize` differs in all of these but the second. Coordinates are float32 as PyTorch's are.
  `nudge` is what is added to the new side where coordinates are computed: 0.1 in facebookresearch/dino and what came of it,
  which guards `scale_factor` against rounding and so moves every row a little, even on the same grid.
  """
  a = np.float32(-0.75)
  source = np.float32(old / (new + nudge)) * (np.arange(new, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
  first = np.floor(source)
  weights = np.zeros((new, old), np.float32)
  for tap in range(-1, 3):
    x = np.abs(source - first - np.float32(tap))
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    column = np.clip(first.astype(int) + tap, 0, old - 1)
    np.add.at(weights, (np.arange(new), column), np.where(x <= 1, near, far))
  return weights


def resample(table, old_grid: Sequence[int], new_grid: Sequence[int], cls_rows: int = 0, nudge: float = 0.0):
  """Moves a position table to another grid: [..., cls_rows + N, D] -> [..., cls_rows + N', D], of the same dtype.

  Patch rows are resized by `cubic_matrix` along each axis; the first `cls_rows` rows are kept as they are. For two axes
  this is facebookresearch/mae util/pos_embed.py `interpolate_pos_embed`; for one and three the same kernel per axis.

  Args:
    table: numpy or JAX array (also traced), float.
    nudge: see `cubic_matrix`; a table that stays on its grid is left alone.

  Raises:
    ValueError: the table does not have cls_rows + prod(old_grid) rows, or the grids differ in rank.
  """
  if len(old_grid) != len(new_grid):
    raise ValueError(f'a table of a grid {tuple(old_grid)} cannot become one of {tuple(new_grid)}: other axes')
  rows, expected = table.shape[-2], cls_rows + math.prod(old_grid)
  if rows != expected:
    raise ValueError(f'table has {rows} rows; a grid {tuple(old_grid)} with {cls_rows} class rows has {expected}')
  if tuple(old_grid) == tuple(new_grid):
    return table
  xp = jnp if isinstance(table, jax.Array) else np
  lead = table.shape[:-2]
  patches = table[..., cls_rows:, :].reshape(*lead, *old_grid, table.shape[-1]).astype(xp.float32)
  for i, (old, new) in enumerate(zip(old_grid, new_grid, strict=True)):
    axis = len(lead) + i
    patches = xp.moveaxis(xp.tensordot(cubic_matrix(old, new, nudge), patches, axes=(1, axis)), 0, axis)
  patches = patches.reshape(*lead, -1, table.shape[-1]).astype(table.dtype)
  return xp.concatenate([table[..., :cls_rows, :], patches], axis=-2)
