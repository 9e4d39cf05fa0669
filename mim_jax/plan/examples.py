"""How many examples a recipe's data set has, also where the data is not on this machine."""

import tensorflow_datasets as tfds

from mim_jax.data import mixtures, worlds
from mim_jax.errors import ConfigError, MissingData

# Sizes that the TensorFlow Datasets catalogue gives for data sets which recipes name.
PUBLISHED = {
  'imagenet2012': {'train': 1_281_167, 'validation': 50_000},
  'cifar10': {'train': 50_000, 'test': 10_000},
  'cifar100': {'train': 50_000, 'test': 10_000},
  'food101': {'train': 75_750, 'validation': 25_250},
}


def count(data) -> int:
  """Examples of `data.source` (config.data), published or counted. Raises ConfigError when neither can be."""
  return sum(_count(spec, data) for spec in mixtures.split_spec(data.source))


def _count(spec: str, data) -> int:
  kind, _, rest = spec.partition(':')
  if kind == 'tfds':
    name, _, split = rest.partition(':')
    known = _published(name, split or 'train')
  elif kind == 'synthetic':
    _, options, split = worlds.parse(rest)
    known = options.get(split)
  else:
    known = None
  if known:
    return known
  try:
    return len(mixtures.open_sources(spec, (), data.data_dir))
  except MissingData as error:
    raise ConfigError(
      f'how many examples {spec} has is not known, as the data is not on this machine: give --examples=N. ({error})'
    ) from error


def _published(name: str, split: str) -> int | None:
  """Examples of `split`, such as 'train' or 'train[:99%]', of a set in `PUBLISHED`; None for another set or a split it does not have."""
  split_of = lambda split, size: tfds.core.SplitInfo(
    name=split, shard_lengths=[size], num_bytes=0, filename_template=None
  )
  sizes = {split: split_of(split, size) for split, size in PUBLISHED.get(name, {}).items()}
  try:
    parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(sizes)
  except ValueError:
    return None
  return sum((part.to or sizes[part.splitname].num_examples) - (part.from_ or 0) for part in parts)
