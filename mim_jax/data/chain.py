"""The little language of `data.transforms`: names of transforms joined by '|', with options, into one `Chain`."""

import ast
import dataclasses
import difflib
import inspect
import math
from collections.abc import Callable

import numpy as np

from mim_jax.data.decoding import DecodeError, Jpeg
from mim_jax.data.sources import CorruptExample
from mim_jax.errors import ConfigError, MissingData


@dataclasses.dataclass(frozen=True)
class Transform:
  """A function with a name in the config.

  fn: (example, rng, **options) -> example, a new dict.
  lazy: fn takes a Jpeg in place of pixels.
  batch: fn is (batch, **options) -> batch, for arrays of any leading dims, and is done once for the whole batch.
  field: what an example must have for it; '' when its options say so.
  others: fn is (example, rng, other, **options): `other()` gives a random example of the source, as it is at this point
    of the chain.
  """

  fn: Callable[..., dict]
  lazy: bool = False
  batch: bool = False
  field: str = 'image'
  others: bool = False

  def options(self):
    """The parameters a config may give: all but the example or batch, the rng and the other one."""
    return list(inspect.signature(self.fn).parameters.values())[1 if self.batch else 2 + self.others :]

  def __str__(self):
    return f'{self.fn.__name__}({", ".join(map(str, self.options()))})'


TRANSFORMS: dict[str, Transform] = {}


def register(fn=None, **kind):
  """Makes a function known to `parse` by its name; usable as a decorator, with or without attributes of `Transform`."""
  if fn is None:
    return lambda fn: register(fn, **kind)
  TRANSFORMS[fn.__name__] = Transform(fn, **kind)
  return fn


def describe():
  """One line per transform: its name, options with defaults, and what it does."""
  return '\n'.join(f'{t}: {inspect.getdoc(t.fn).splitlines()[0]}' for _, t in sorted(TRANSFORMS.items()))


class Chain:
  """The transforms of a config string, in order.

  `example` runs all up to the last one that needs single examples, `batch` the rest, as a rule normalize, at once on
  the stacked arrays.
  """

  def __init__(self, steps, text='', source=None):
    self.text = text
    self._steps, self._source = steps, source
    split = max((k + 1 for k, (transform, _) in enumerate(steps) if not transform.batch), default=0)
    self._single, self._batched = steps[:split], steps[split:]
    self._decodes = any(t.fn.__name__ == 'decode' for t, _ in steps)

  def __repr__(self):
    return f'Chain({self.text!r})'

  def bind(self, source):
    """This chain over a source, from which transforms such as false_image take further examples."""
    return Chain(self._steps, self.text, source.select({'image'}))

  def of_images(self):
    """The part of this chain that works on images: what pictures without text and labels are put through."""
    return Chain([step for step in self._steps if step[0].field == 'image' and not step[0].others], self.text)

  def example(self, example, rng):
    """One raw example through the single transforms, as a new dict. Raises DecodeError on broken bytes."""
    return self._through(len(self._single), example, rng)

  def _through(self, count, example, rng):
    """An example through the first `count` transforms."""
    for number, (transform, options) in enumerate(self._single[:count]):
      if transform.field:
        self._check(transform.field, example)
      if transform.field == 'image' and not transform.lazy:
        example = _decoded(example)
      if transform.batch:
        example = transform.fn(example, **options)
      elif transform.others:
        example = transform.fn(example, rng, lambda number=number: self._other(number, rng), **options)
      else:
        example = transform.fn(example, rng, **options)
    return _decoded(example) if count else example

  def _check(self, field, example):
    if field not in example:
      raise ConfigError(f'transforms {self.text!r} need the field {field!r}, found {", ".join(sorted(example))}')
    if field == 'image' and isinstance(example['image'], bytes) and not self._decodes:
      raise ConfigError(f"transforms {self.text!r} get encoded images; begin with 'decode'")

  def _other(self, count, rng):
    """A random readable example of the source through the first `count` transforms."""
    if self._source is None:
      raise ConfigError(f'transforms {self.text!r} take further examples from a data source, and here is none')
    for _ in range(64):
      raw = self._source.getmany([int(rng.integers(len(self._source)))])[0]
      if isinstance(raw, CorruptExample):
        continue
      try:
        return self._through(count, raw, rng)
      except DecodeError:
        continue
    raise MissingData(f'none of 64 random examples of {self._source.name} is whole; check the files')

  def batch(self, batch):
    """A stacked batch, image [B, H, W, C], through the batch transforms."""
    for transform, options in self._batched:
      batch = transform.fn(batch, **options)
    return batch

  def levels(self, channels):
    """What black and white become, [channels] each: 0 and 255 of 8 bits, or the ends of `window`."""
    ends, steps = np.array([0, 255], np.uint8), [step for step in self._steps if step[0].batch]
    for transform, options in steps:
      if transform.fn.__name__ == 'window':
        ends = np.array([options['low'], options['high']], np.float32)
    batch = {'image': np.tile(ends[:, None, None, None], (1, 1, 1, channels))}
    for transform, options in steps:
      batch = transform.fn(batch, **options)
    black, white = batch['image'].astype(np.float32)[:, 0, 0]
    return black, white


def _decoded(example):
  image = example.get('image')
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
    expected, good = CHECKS.get(f'{name}.{key}') or CHECKS.get(key, ('', lambda v: True))
    if not good(value):
      raise ConfigError(f'{where}: {name}: {key} must be {expected}, found {value!r}')
  return transform, options


def _number(v, low=-math.inf, high=math.inf):
  return isinstance(v, int | float) and not isinstance(v, bool) and low <= v <= high


def _whole(v, low=0):
  return isinstance(v, int) and _number(v, low)


def _range(v, high=math.inf):
  return isinstance(v, tuple) and len(v) == 2 and all(map(_number, v)) and 0 < v[0] <= v[1] <= high


_SIDES = (
  'a number of pixels or (height, width)',
  lambda v: _whole(v, 1) or (isinstance(v, tuple) and len(v) == 2 and all(_whole(n, 1) for n in v)),
)
_FACTOR = 'a number, 0 or more', lambda v: _number(v, 0)
_FRACTION = '(low, high) with 0 < low <= high <= 1', lambda v: _range(v, 1)
_SPAN = '(low, high) with 0 < low <= high', _range
_FILTER = "'lanczos', 'bicubic' or 'bilinear'", lambda v: v in ('lanczos', 'bicubic', 'bilinear')
# What an option of this name must be, in whichever transform or in one ('flip.p'): in words, and as a test.
CHECKS = {
  'size': _SIDES,
  'second': _SIDES,
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
  'method': _FILTER,
  'second_method': _FILTER,
  'channels': ("1, 3 or 'any'", lambda v: v in (None, 1, 3, 'any')),
}
