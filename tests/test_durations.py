import pytest

from mim_jax import durations
from mim_jax.errors import ConfigError

RUN = {'total': 2000, 'steps_per_epoch': 50, 'batch_size': 64}


@pytest.mark.parametrize(
  'value, expected',
  [
    (1000, 1000),
    (0, 0),
    (1000.0, 1000),
    ('1000', 1000),
    ('1_000 steps', 1000),
    ('1 step', 1),
    ('40 epochs', 2000),
    ('0.5 epoch', 25),
    ('1e6 examples', 15625),
    ('1.5E3 Examples', 23),  # 23.4
    ('5%', 100),
    ('5 %', 100),
    ('100%', 2000),
    ('0%', 0),
    ('0.01%', 1),  # 0.2 of a step: something was asked for, so one step
  ],
)
def test_forms(value, expected):
  got = durations.steps(value, **RUN)
  assert got == expected
  assert isinstance(got, int)


def test_fractional_epochs_round_to_the_nearest_step():
  # round(epochs * n / batch) with 1,000 examples in batches of 64
  assert durations.steps('3 epochs', steps_per_epoch=1000 / 64) == 47


@pytest.mark.parametrize(
  'value, message',
  [
    ('40 weeks', "unit 'weeks' is unknown"),
    ('forty epochs', 'give a number of steps'),
    ('', 'give a number of steps'),
    (None, 'give a number of steps'),
    (True, 'give a number of steps'),
    ('1.2.3 epochs', 'is not a number'),
    ('-5 epochs', 'not negative'),
    (-1, 'not negative'),
    (float('nan'), 'finite'),
    ('1e999 steps', 'finite'),
    (2.5, 'steps are whole'),
    ('2.5', 'steps are whole'),
    ('2.5 steps', 'steps are whole'),
    ('2.5 steps of nothing', 'give a number of steps'),
  ],
)
def test_bad_values_are_named(value, message):
  with pytest.raises(ConfigError, match=message) as error:
    durations.steps(value, **RUN, key='schedule.warmup')
  assert 'schedule.warmup' in str(error.value)


@pytest.mark.parametrize(
  'value, missing', [('5%', 'whole run'), ('2 epochs', 'data set'), ('10 examples', 'batch size')]
)
def test_a_unit_needs_its_reference(value, missing):
  with pytest.raises(ConfigError, match=missing):
    durations.steps(value)
