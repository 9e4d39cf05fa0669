"""Pictures of a run: what its method sees and predicts on fixed examples, and the curve of its loss."""

from pathlib import Path

import jax
import numpy as np

from mim_jax.data import images
from mim_jax.log import pictures
from mim_jax.log.writer import series


class Panel:
  """Draws a method's `panels` on the first examples of a source, with the same random draws every time, so that pictures of different steps compare.

  Args:
    method: with `panels`.
    feeds: opens the source.
    source, transforms, count: which examples, and how they are prepared (unaugmented).
  """

  def __init__(self, method, feeds, source: str, transforms: str, count: int):
    self._batch = feeds.first(source, transforms, count, tuple(method.fields))
    pictures_of = next(field for name, field in method.fields.items() if name in images.PIXELS)
    self._scale = pixel_scale(transforms, pictures_of.shape[-1])

    def draw(params, state, frozen, batch):
      columns = method.panels(params, state, frozen, batch, method.draw(jax.random.key(0), batch))
      self._titles = list(columns)  # as the method orders them; a dict that leaves a jitted function is sorted
      return columns

    whole = jax.tree.leaves(self._batch)[0].sharding
    self._draw = jax.jit(draw, out_shardings=whole)

  def draw(self, params, state, frozen) -> np.ndarray:
    """[H, W, 3] uint8, one row per example, one column per picture of the method."""
    columns = jax.device_get(self._draw(params, state, frozen, self._batch))
    zero, span = self._scale
    return pictures.panel(
      {name: (np.asarray(columns[name], np.float32) - zero) / span for name in self._titles},
      count=len(jax.tree.leaves(self._batch)[0]),
    )


def pixel_scale(transforms: str, channels: int) -> tuple[np.ndarray, np.ndarray]:
  """What black becomes under `transforms`, and how far white is from it, per channel: (x - black) / span is in [0, 1].

  Found by sending both through the chain, so it holds for any normalisation.
  """
  black, white = images.parse(transforms).levels(channels)
  return black, white - black


def loss_curve(records: list[dict], path: Path):
  """Draws every 'loss/...' metric (or 'loss') over the steps into a PNG."""
  names = sorted({name for record in records for name in record if name.startswith('loss/')}) or ['loss']
  lines = {name.removeprefix('loss/'): series(records, name) for name in names}
  pictures.curve({name: line for name, line in lines.items() if line[0]}, path)
