"""How many examples a recipe's data set has, also where the data is not on this machine."""

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
    known = PUBLISHED.get(name, {}).get(split or 'train')
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
