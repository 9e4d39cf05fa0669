"""Hiding and corrupting cells of table rows [B, N] by given noise. All counts are exact and static."""

import jax
import jax.numpy as jnp


def hidden_count(columns: int, ratio: float) -> int:
  """Columns hidden of `columns`: rounded half to even, as Python does (0.5 of 17 hides 8)."""
  count = round(columns * ratio)
  if not 0 <= count <= columns:
    raise ValueError(f'ratio {ratio} hides {count} of {columns} columns; it must lie in [0, 1]')
  return count


def smallest(noise, count: int):
  """True at the `count` places of smallest noise in each row: noise [B, N] -> bool [B, N]."""
  order = jnp.argsort(noise, axis=1, stable=True)
  return jnp.argsort(order, axis=1, stable=True) < count


def from_marginals(table, uniform, missing=None):
  """For every cell a value of its column in a random row of the batch, a row for each cell (SCARF, arXiv 2106.15147).

  table [B, N], uniform [B, N] in [0, 1) -> [B, N]. With `missing` bool [B, N] only rows that have the column are
  drawn from; a column that every row lacks keeps what it holds.
  """
  rows = len(table)
  if missing is None:
    missing = jnp.zeros(table.shape, bool)
  present_first = jnp.argsort(missing, axis=0, stable=True)
  present = jnp.sum(~missing, axis=0)
  place = jnp.minimum(jnp.floor(uniform * present), jnp.maximum(present - 1, 0)).astype(jnp.int32)
  source = jnp.take_along_axis(present_first, place, axis=0)
  drawn = jnp.take_along_axis(table, jnp.clip(source, 0, rows - 1), axis=0)
  return jnp.where(present > 0, drawn, table)


def reconstruction(logits, values, table, target, lengths, offsets):
  """Losses of the categorical and of the continuous cells, each a mean over the cells that `target` bool [B, N] marks.

  logits [B, n, sum of lengths]: one softmax over the categories of all columns; values [B, N - n] are compared by
  squared error. A batch without a marked cell of a kind gives 0 for it.
  """
  count = len(lengths)
  marks = target.astype(jnp.float32)
  codes = table[:, :count].astype(jnp.int32) + jnp.array(offsets, jnp.int32)
  chance = jnp.take_along_axis(jax.nn.softmax(logits), codes[..., None], axis=-1)[..., 0]
  mean = lambda errors, mark: jnp.sum(errors * mark) / jnp.maximum(jnp.sum(mark), 1)
  return (
    mean(-jnp.log(chance + 1e-8), marks[:, :count]),
    mean(jnp.square(values - table[:, count:]), marks[:, count:]),
  )


def best_codes(logits, lengths, offsets):
  """The most likely category of each column among its own: logits [B, n, sum of lengths] -> int [B, n]."""
  pairs = enumerate(zip(lengths, offsets, strict=True))
  return jnp.stack([jnp.argmax(logits[:, j, start : start + n], axis=-1) for j, (n, start) in pairs], axis=1)


def bars(values, lengths, colours, shape):
  """Pictures of table rows: one horizontal bar for every column, from the first at the top.

  Args:
    values: [B, N]; codes first, their bar is (code + 1) / categories of the width, then standardised columns, whose
      bar is the share of a standard normal below them.
    lengths: categories of each categorical column.
    colours: [B, N, 3] in [0, 1], of the bars.
    shape: height and width of a picture.

  Returns:
    [B, height, width, 3] float32 in [0, 1] on white.
  """
  count, columns = len(lengths), values.shape[1]
  codes = (values[:, :count] + 1) / jnp.array(lengths, jnp.float32)
  long = jnp.concatenate([codes, jax.scipy.stats.norm.cdf(values[:, count:])], axis=1)
  height, width = shape
  row = jnp.arange(height) * columns // height  # the column that each line of pixels belongs to
  gap = jnp.diff(row, append=columns) > 0  # one white line between bars
  inside = (jnp.arange(width) + 0.5) / width < long[:, row, None]
  inside &= ~gap[:, None]
  return jnp.where(inside[..., None], colours[:, row, None], 1.0).astype(jnp.float32)
