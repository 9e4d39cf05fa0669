"""The little language of `data.transforms`: names of transforms joined by '|', with options, into one `Chain`."""

import ast
import dataclasses
import difflib
import inspect
import math
from collections.abc import Callable

from mim_jax.data.decoding import Jpeg
from mim_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Transform:
  """A function with a name in the config.

  fn: (example, rng, **options) -> example, a new dict.
  lazy: fn takes a Jpeg in place of pixels.
  batch: fn is (batch, **options) -> batch, for arrays of any leading dims, and is done once for the whole batch.
  """

  fn: Callable[..., dict]
  lazy: bool = False
  batch: bool = False

  def options(self):
    """The parameters a config may give: all but the example or batch and the rng."""
    return list(inspect.signature(self.fn).parameters.values())[1 if self.batch else 2 :]

  def __str__(self):
    return f'{self.fn.__name__}({", ".join(map(str, self.options()))})'


TRANSFORMS: dict[str, Transform] = {}


def register(fn=None, *, lazy=False, batch=False):
  """Makes a function known to `parse` by its name; usable as a decorator, with or without options."""
  if fn is None:
    return lambda fn: register(fn, lazy=lazy, batch=batch)
  TRANSFORMS[fn.__name__] = Transform(fn, lazy, batch)
  return fn


def describe():
  """One line per transform: its name, options with defaults, and what it does."""
  return '\n'.join(f'{t}: {inspect.getdoc(t.fn).splitlines()[0]}' for _, t in sorted(TRANSFORMS.items()))


class Chain:
  """The transforms of a config string, in order.

  `example` runs all up to the last one that needs single examples, `batch` the rest, as a rule normalize, at once on
  the stacked arrays.
  """

  def __init__(self, steps, text=''):
    self.text = text
    split = max((k + 1 for k, (transform, _) in enumerate(steps) if not transform.batch), default=0)
    self._single = [(t.fn, t.lazy, t.batch, options) for t, options in steps[:split]]
    self._batched = [(t.fn, options) for t, options in steps[split:]]
    self._decodes = any(t.fn.__name__ == 'decode' for t, _ in steps)

  def __repr__(self):
    return f'Chain({self.text!r})'

  def example(self, example, rng):
    """One raw example through the single transforms, as a new dict. Raises DecodeError on broken bytes."""
    if not self._single:
      return example
    if 'image' not in example:
      raise ConfigError(f"transforms {self.text!r} need the field 'image', found {', '.join(sorted(example))}")
    if isinstance(example['image'], bytes) and not self._decodes:
      raise ConfigError(f"transforms {self.text!r} get encoded images; begin with 'decode'")
    for fn, lazy, batch, options in self._single:
      if not lazy:
        example = _decoded(example)
      example = fn(example, **options) if batch else fn(example, rng, **options)
    return _decoded(example)

  def batch(self, batch):
    """A stacked batch, image [B, H, W, C], through the batch transforms."""
    for fn, options in self._batched:
      batch = fn(batch, **options)
    return batch


def _decoded(example):
  image = example['image']
  return {**example, 'image': image.pixels()} if isinstance(image, Jpeg) else example


def parse(text):
  """'name | name(option, key=value) | ...' -> Chain; options are literals. Raises ConfigError saying what is taken."""
  if not text.strip():
    return Chain([])
  try:
    node = ast.parse(f'({text})', mode='eval').body
  except SyntaxError as error:
    raise ConfigError(
      f"transforms {text!r} cannot be read ({error.msg}); write them like 'decode | flip(p=0.5) | normalize'"
    ) from error
  parts = []
  while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
    parts.append(node.right)
    node = node.left
  return Chain([_step(part, f'transforms {text!r}') for part in (node, *parts[::-1])], text)


def _step(node, where):
  """(transform, options) of one part of the string."""
  name, args, keywords = node, [], []
  if isinstance(node, ast.Call):
    name, args, keywords = node.func, node.args, node.keywords
  if not isinstance(name, ast.Name) or any(k.arg is None for k in keywords):
    raise ConfigError(f"{where}: {ast.unparse(node)!r} is not a transform; write 'name' or 'name(option, key=value)'")
  name = name.id
  if name not in TRANSFORMS:
    close = difflib.get_close_matches(name, TRANSFORMS, n=1, cutoff=0.4)
    hint = f'did you mean {close[0]!r}?' if close else f'known: {", ".join(sorted(TRANSFORMS))}'
    raise ConfigError(f'{where}: {name!r} is unknown; {hint}')
  transform = TRANSFORMS[name]
  try:
    args, keywords = [ast.literal_eval(a) for a in args], {k.arg: ast.literal_eval(k.value) for k in keywords}
  except ValueError as error:
    raise ConfigError(
      f'{where}: options must be plain values such as 0.75 or (0.2, 1.0), found {ast.unparse(node)!r}'
    ) from error
  try:
    options = inspect.Signature(transform.options()).bind(*args, **keywords).arguments
  except TypeError as error:
    raise ConfigError(f'{where}: {name}: {error}; it takes {transform}') from error
  for key, value in options.items():
    expected, good = CHECKS.get(key, ('', lambda v: True))
    if not good(value):
      raise ConfigError(f'{where}: {name}: {key} must be {expected}, found {value!r}')
  return transform, options


def _number(v, low=-math.inf, high=math.inf):
  return isinstance(v, int | float) and not isinstance(v, bool) and low <= v <= high


def _whole(v, low=0):
  return isinstance(v, int) and _number(v, low)


def _range(v, high=math.inf):
  return isinstance(v, tuple) and len(v) == 2 and all(map(_number, v)) and 0 < v[0] <= v[1] <= high


_FACTOR = 'a number, 0 or more', lambda v: _number(v, 0)
_FRACTION = '(low, high) with 0 < low <= high <= 1', lambda v: _range(v, 1)
_SPAN = '(low, high) with 0 < low <= high', _range
# What an option of this name must be, in whichever transform: in words, and as a test.
CHECKS = {
  'size': (
    'a number of pixels or (height, width)',
    lambda v: _whole(v, 1) or (isinstance(v, tuple) and len(v) == 2 and all(_whole(n, 1) for n in v)),
  ),
  'scale': _FRACTION,
  'area': _FRACTION,
  'ratio': _SPAN,
  'sigma': _SPAN,
  'p': ('a probability from 0 to 1', lambda v: _number(v, 0, 1)),
  'hue': ('a number from 0 to 0.5', lambda v: _number(v, 0, 0.5)),
  'brightness': _FACTOR,
  'contrast': _FACTOR,
  'saturation': _FACTOR,
  'std': _FACTOR,
  'magnitude': ('a number from 0 to 10', lambda v: _number(v, 0, 10)),
  'ops': ('a whole number, 0 or more', _whole),
  'kernel': ('an odd number of pixels, or 0', lambda v: _whole(v) and (v == 0 or v % 2 == 1)),
  'pad': ('a number of pixels', _whole),
  'method': ("'bicubic' or 'bilinear'", lambda v: v in ('bicubic', 'bilinear')),
  'channels': ("1, 3 or 'any'", lambda v: v in (None, 1, 3, 'any')),
}
