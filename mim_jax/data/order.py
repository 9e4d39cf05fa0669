"""Which example stands at which position of the endless training sequence."""

import functools

import grain
import numpy as np

from mim_jax.data import mixtures

SHUFFLE, MIX, AUGMENT = range(3)  # what a random stream is for
SMALL = 1 << 16  # examples up to which an epoch's permutation is kept in memory


def words(seed, *stream):
  """uint64 [2], a Philox key: the same for the same seed and stream, unrelated for any other."""
  return np.random.SeedSequence(seed, spawn_key=stream).generate_state(2, np.uint64)


class Order:
  """Maps positions to indices into a source, for training.

  Each source is shuffled anew in each of its epochs. A mixture draws from its sources by weight, in blocks of 65,536
  positions over which the shares are exact. Any position costs the same, wherever it is.
  """

  def __init__(self, source, seed, shuffle=True):
    self._seed, self._shuffle = seed, shuffle
    self._mixture = source if isinstance(source, mixtures.Mixture) else None
    self._length = len(source)
    self._block = functools.lru_cache(4)(self._draw_block)
    self._permutation = functools.lru_cache(64)(self._draw_permutation)
    if self._mixture:
      self._counts = mixtures.block_counts(self._mixture.weights)

  def __call__(self, positions):
    """int64 [n] indices into the source of int64 [n] positions."""
    if self._mixture is None:
      return self._within(0, positions, self._length)
    parts = np.empty_like(positions)
    inner = np.empty_like(positions)
    blocks, offsets = np.divmod(positions, mixtures.BLOCK)
    for b in np.unique(blocks).tolist():
      rows = np.flatnonzero(blocks == b)
      which, rank = self._block(b)
      parts[rows] = which[offsets[rows]]
      inner[rows] = rank[offsets[rows]] + b * self._counts[parts[rows]]
    index = np.empty_like(positions)
    for k in np.unique(parts).tolist():
      rows = np.flatnonzero(parts == k)
      index[rows] = self._within(k, inner[rows], int(self._mixture.sizes[k])) + self._mixture.starts[k]
    return index

  def _draw_block(self, number):
    """For each position of a block: its source, and how many earlier positions of the block have the same one."""
    which = np.repeat(np.arange(len(self._counts)), self._counts)
    which = which[_permutation(words(self._seed, MIX, number), len(which))]
    rank = np.empty_like(which)
    rank[np.argsort(which, kind='stable')] = np.concatenate([np.arange(n) for n in self._counts])
    return which, rank

  def _draw_permutation(self, part, epoch, length):
    return _permutation(words(self._seed, SHUFFLE, part, epoch), length)

  def _within(self, part, positions, length):
    epochs, offsets = np.divmod(positions, length)
    if not self._shuffle:
      return offsets
    indices = np.empty_like(positions)
    for epoch in np.unique(epochs).tolist():
      rows = np.flatnonzero(epochs == epoch)
      if length <= SMALL:
        indices[rows] = self._permutation(part, epoch, length)[offsets[rows]]
      else:
        # 2 us each, without memory. Not for small sets, where it slows down to 1 ms. Grain's own dataset seeds it with
        # seed + epoch, by which the second epoch of seed 0 is the first one of seed 1: hence a seed of its own here.
        seed = int(words(self._seed, SHUFFLE, part, epoch)[0] >> np.uint64(32))
        shuffle = grain.experimental.index_shuffle
        indices[rows] = [shuffle(i, length - 1, seed, 4) for i in offsets[rows].tolist()]
    return indices


def _permutation(key, length):
  """uint16 [length], by sorting raw words: unlike those of Generator.permutation, numpy promises not to change them."""
  return np.argsort(np.random.Philox(key=key).random_raw(length), kind='stable').astype(np.uint16)
