"""How many examples a data set has that is not on this machine."""

import pytest

from mim_jax import config
from mim_jax.errors import ConfigError
from mim_jax.plan import examples


@pytest.mark.parametrize(
  'source, count',
  [
    ('tfds:imagenet2012:train', 1_281_167),
    ('tfds:imagenet2012', 1_281_167),
    ('tfds:imagenet2012:train[:99%]', 1_268_355),
    ('tfds:imagenet2012:validation[10:30]', 20),
    ('tfds:cifar10:train+test', 60_000),
    ('synthetic:shapes/train=300:train', 300),
  ],
)
def test_published_and_synthetic_sets_need_no_data(source, count):
  cfg = config.base()
  cfg.data.source = source
  assert examples.count(cfg.data) == count


@pytest.mark.parametrize('source', ['tfds:imagenet2012:tests', 'tfds:nobody_knows:train'])
def test_others_say_which_argument_is_missing(source, tmp_path):
  cfg = config.base()
  cfg.data.source, cfg.data.data_dir = source, str(tmp_path)
  with pytest.raises(ConfigError, match='--examples=N'):
    examples.count(cfg.data)
