"""Lengths of time written for people: '40 epochs', '5%', '1000 steps', '1e6 examples' or a plain number of steps."""

import math
import re
from numbers import Real

from mim_jax.errors import ConfigError

FORMS = "a number of steps, 'N steps', 'N epochs', 'N examples' or 'N%'"
STEPS = ('', 'step', 'steps')
PATTERN = re.compile(r'([-+]?[\d.][\d._]*(?:e[-+]?\d+)?)\s*(%|[a-z]*)', re.IGNORECASE)


def steps(value, *, total=None, steps_per_epoch=None, batch_size=None, key='duration') -> int:
  """Number of training steps in `value`, rounded to the nearest; at least 1 unless the value is 0.

  Args:
    value: steps as a number, '1000' or '1000 steps'; '40 epochs'; '1e6 examples'; '5%' of `total`.
    total: steps of the whole run, what a percentage is of.
    steps_per_epoch: may be fractional where the data set is no multiple of the batch.
    batch_size: examples per step, over all devices.
    key: name of the config key, for the error.

  Raises:
    ConfigError: for another form, a negative or infinite number, or a unit that needs something not given.
  """
  number, unit = _split(value, key)
  if unit in STEPS:
    count = number
  elif unit in ('epoch', 'epochs'):
    count = number * _need(steps_per_epoch, 'the length of the data set', value, key)
  elif unit in ('example', 'examples'):
    count = number / _need(batch_size, 'the batch size', value, key)
  elif unit == '%':
    count = number / 100 * _need(total, 'the length of the whole run', value, key)
  else:
    raise ConfigError(f'{key} is {value!r}: unit {unit!r} is unknown; give {FORMS}')
  return max(1, math.floor(count + 0.5)) if count else 0


def _split(value, key) -> tuple[float, str]:
  match = PATTERN.fullmatch(value.strip()) if isinstance(value, str) else None
  if match:
    text, unit = match[1], match[2].lower()
  elif isinstance(value, Real) and not isinstance(value, bool):
    text, unit = value, ''
  else:
    raise ConfigError(f'{key} is {value!r}; give {FORMS}')
  try:
    number = float(text)
  except ValueError:
    raise ConfigError(f'{key} is {value!r}: {text!r} is not a number; give {FORMS}') from None
  if not 0 <= number < math.inf:
    raise ConfigError(f'{key} is {value!r}; it must be finite and not negative')
  if unit in STEPS and number != int(number):
    raise ConfigError(f'{key} is {value!r}: steps are whole; give {FORMS}')
  return number, unit


def _need(known, what, value, key):
  if known is None:
    raise ConfigError(f'{key} is {value!r}, but {what} is not known here; give the number of steps')
  return known
