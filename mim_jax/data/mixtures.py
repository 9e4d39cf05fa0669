"""Several sources as one, drawn from by weight."""

import dataclasses
import re

import numpy as np

from mim_jax.data import sources, worlds
from mim_jax.errors import ConfigError

BLOCK = 1 << 16  # positions over which the weights hold exactly


class Mixture(sources.Source):
  """The sources laid end to end, with a weight each for training; number i of the first is number i of the mixture.

  Fields are those that every source has. Label fields keep the classes of a source only if all agree on them.

  Args:
    parts: the sources.
    weights: relative share of the examples of a batch; empty for shares proportional to the sizes.
  """

  def __init__(self, parts, weights=()):
    self.parts = list(parts)
    self.name = ', '.join(p.name for p in self.parts)
    self.sizes = np.array([len(p) for p in self.parts], np.int64)
    self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
    self.weights = np.array(weights if len(weights) else self.sizes, np.float64)
    if len(self.weights) != len(self.parts) or not (self.weights > 0).all() or not np.isfinite(self.weights).all():
      raise ConfigError(
        f'data.weights is {list(weights)}; expected {len(self.parts)} positive numbers, one per source of {self.name}'
      )
    self.features = {}
    for k, feature in self.parts[0].features.items():
      others = [p.features.get(k) for p in self.parts[1:]]
      if None not in others:
        self.features[k] = _common(k, [feature, *others], self.name)
    if not self.features:
      have = '; '.join(f'{p.name} has {", ".join(p.features)}' for p in self.parts)
      raise ConfigError(f'sources of a mixture need a field in common; {have}')

  def __len__(self):
    return int(self.starts[-1])

  def _place(self, index):
    part = int(np.searchsorted(self.starts, index, 'right')) - 1
    return self.parts[part], int(index - self.starts[part])

  def key(self, index):
    part, inner = self._place(index)
    return f'{part.name}/{part.key(inner)}'

  def _read(self, index):
    part, inner = self._place(index)
    return self._common_fields(part[inner])

  def _common_fields(self, example):
    if isinstance(example, sources.CorruptExample):
      return example
    return {k: v for k, v in example.items() if k in self.features}

  def getmany(self, indices):
    indices = np.asarray(indices, np.int64)
    which = np.searchsorted(self.starts, indices, 'right') - 1
    examples = [None] * len(indices)
    for k in np.unique(which):
      rows = np.flatnonzero(which == k)
      for row, example in zip(rows, self.parts[k].getmany(indices[rows] - self.starts[k]), strict=True):
        examples[row] = self._common_fields(example)
    return examples

  def select(self, fields):
    return Mixture([p.select(fields) for p in self.parts], self.weights)


def _common(name, features, mixture):
  shapes = [f.shape for f in features]
  if len({len(s) for s in shapes}) > 1:
    raise ConfigError(
      f'field {name!r} has shapes {" and ".join(map(str, shapes))} in {mixture}; expected the same number of dims'
    )
  shape = tuple(d[0] if len(set(d)) == 1 else None for d in zip(*shapes, strict=True))
  if len({(f.classes, f.names) for f in features}) > 1:
    return sources.Feature(shape, features[0].dtype)
  return dataclasses.replace(features[0], shape=shape)


def block_counts(weights, block=BLOCK):
  """How many of `block` positions each weight gets: integers >= 1 that sum to `block` (largest remainders)."""
  share = weights / weights.sum() * (block - len(weights))
  counts = np.floor(share).astype(np.int64)
  order = np.argsort(-(share - counts), kind='stable')
  counts[order[: block - len(weights) - counts.sum()]] += 1
  return counts + 1


def split_spec(spec):
  """The sources of a config string, as a list of strings; commas inside one (paths, options of a world) stay."""
  return re.split(rf',\s*(?=(?:{"|".join(sources.KINDS)}):)', spec.strip())


def prepare(spec, data_dir=''):
  """Renders the synthetic worlds that `spec` names and that are not there yet; other sources are left to their owners."""
  for one in split_spec(spec):
    if one.startswith('synthetic:'):
      worlds.prepare(one, data_dir)


def open_sources(spec, weights=(), data_dir='', cache=False, verify=False):
  """What `data.source` names: one source, or several separated by commas as a Mixture with `weights`.

  `'tfds:a:train, folder:/b'`: a comma separates only where the kind of the next source follows. The rest as in
  sources.open_source.
  """
  opened = [sources.open_source(s, data_dir, cache, verify) for s in split_spec(spec)]
  if len(opened) > 1:
    return Mixture(opened, weights)
  if len(weights) > 1:
    raise ConfigError(
      f'data.weights is {list(weights)} but data.source names one source, {spec!r}; separate sources by commas'
    )
  return opened[0]
