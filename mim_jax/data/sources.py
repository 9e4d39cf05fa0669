"""Where examples come from: one class per kind of storage, all of them `len(source)` and `source[i]`.

`open_source` turns the string of `data.source` into a `Source`. Nothing here imports TensorFlow or jax.
"""

import concurrent.futures
import dataclasses
import os
import re

import numpy as np

from mim_jax.data import decoding
from mim_jax.errors import ConfigError, MissingData

KINDS = ('tfds', 'folder', 'synthetic', 'arrays')


class CorruptExample(Exception):
  """One example cannot be read: a broken file or record. The pipeline puts another one in its place and counts it."""


@dataclasses.dataclass(frozen=True)
class Feature:
  """What a field holds before any transform.

  `shape` has None where examples differ; text has shape () and dtype object. `classes` is the number of labels of an
  integer class field and `names` their names where the data set knows them.
  """

  shape: tuple
  dtype: np.dtype
  classes: int | None = None
  names: tuple[str, ...] = ()


class Source:
  """Random access to raw examples; subclasses give `__len__`, `_read(i) -> dict` and `key(i)`.

  An example is a dict: `image` is encoded bytes or an array [H, W, C] of any dtype, other fields are numpy arrays,
  scalars or str. Reading is safe from several threads.
  """

  name: str
  features: dict[str, Feature]

  def __len__(self):
    raise NotImplementedError

  def _read(self, index):
    raise NotImplementedError

  def key(self, index):
    """A name for the log by which a person finds example `index` again."""
    return f'{self.name}[{index}]'

  def __getitem__(self, index):
    """Example `index` as a dict. Raises CorruptExample if its bytes are broken, IndexError outside [0, len)."""
    index = int(index)
    if not 0 <= index < len(self):
      raise IndexError(f'{self.name} has {len(self)} examples, not number {index}')
    return self._read(index)

  def getmany(self, indices):
    """Examples at `indices`, in order; in the place of one that cannot be read stands its CorruptExample."""
    return [attempt(self.__getitem__, i) for i in indices]

  def select(self, fields):
    """This source without the costly ones (pictures) of the fields that are not in `fields`; cheap ones may stay."""
    return self

  def classes(self, field='label'):
    """Number of classes of an integer label field. Raises ConfigError if the field is absent or has no classes."""
    feature = self.features.get(field)
    if feature is None or feature.classes is None:
      known = [k for k, f in self.features.items() if f.classes is not None]
      raise ConfigError(
        f'{self.name} has no class labels named {field!r}; fields with classes: {", ".join(known) or "none"}'
      )
    return feature.classes


def attempt(read, *args):
  """`read(*args)`, or the CorruptExample that it raised."""
  try:
    return read(*args)
  except CorruptExample as e:
    return e


class ArraySource(Source):
  """Examples held in memory: `fields` maps names to arrays (or lists of str) that share their first length."""

  def __init__(self, fields, name='arrays'):
    lengths = {k: len(v) for k, v in fields.items()}
    if not lengths or len(set(lengths.values())) != 1 or not min(lengths.values()):
      raise ConfigError(
        f'{name}: every field needs the same, positive number of examples; found {lengths or "no field"}'
      )
    self.name = name
    self.fields = {k: v if isinstance(v, list) else np.asarray(v) for k, v in fields.items()}
    self.features = {k: _array_feature(k, v) for k, v in self.fields.items()}
    self._length = min(lengths.values())

  def __len__(self):
    return self._length

  def _read(self, index):
    return {k: v[index] for k, v in self.fields.items()}

  def getmany(self, indices):
    fields = self.fields.items()
    return [{k: v[i] for k, v in fields} for i in np.asarray(indices).tolist()]


def _array_feature(name, values):
  if isinstance(values, list) or values.dtype.kind in 'OUS':
    return Feature((), np.dtype(object))
  classes = None
  if name == 'label' and values.ndim == 1 and values.dtype.kind in 'iu':
    classes = int(values.max()) + 1
  return Feature(values.shape[1:], values.dtype, classes)


class CachedSource(Source):
  """Every example of `source` read and its image decoded once, into one array per field.

  For sets that fit in memory: after that a batch costs no parsing and no decoding. Images must share one shape. An
  example that could not be read stays unreadable.
  """

  def __init__(self, source, threads=None, chunk=256):
    self.name, self.key = source.name, source.key
    self._length = len(source)
    self._broken = {}
    arrays = {}

    def read(start):
      rows = range(start, min(start + chunk, self._length))
      return rows, [attempt(_decoded, example) for example in source.getmany(rows)]

    with concurrent.futures.ThreadPoolExecutor(threads or min(16, os.cpu_count() or 1)) as pool:
      for rows, examples in pool.map(read, range(0, self._length, chunk)):
        for i, example in zip(rows, examples, strict=True):
          if isinstance(example, CorruptExample):
            self._broken[i] = example
          else:
            self._store(arrays, i, example)
    self._arrays = ArraySource(arrays, self.name)
    self.features = dict(source.features)
    if 'image' in arrays:
      self.features['image'] = Feature(arrays['image'].shape[1:], arrays['image'].dtype)

  def _store(self, arrays, index, example):
    for k, value in example.items():
      numeric = not isinstance(value, str | bytes)
      if k not in arrays:
        value = np.asarray(value) if numeric else value
        arrays[k] = np.zeros((self._length, *value.shape), value.dtype) if numeric else [''] * self._length
      if numeric and np.shape(value) != arrays[k].shape[1:]:
        raise ConfigError(
          f'data.cache needs one shape per field; {self.name} has {k!r} of shape {arrays[k].shape[1:]} and, at '
          f'{self.key(index)}, {np.shape(value)}; set data.cache=False'
        )
      arrays[k][index] = value

  def __len__(self):
    return self._length

  def _read(self, index):
    if index in self._broken:
      raise CorruptExample(str(self._broken[index]))
    return self._arrays[index]

  def getmany(self, indices):
    if not self._broken:
      return self._arrays.getmany(indices)
    return super().getmany(indices)


def _decoded(example):
  if isinstance(example, CorruptExample):
    raise example
  if not isinstance(example.get('image'), bytes):
    return example
  try:
    return {**example, 'image': decoding.read(example['image'])}
  except decoding.DecodeError as e:
    raise CorruptExample(str(e)) from e


def open_source(spec, data_dir='', cache=False, verify=False):
  """The source that `spec` names.

  Args:
    spec: `tfds:NAME[:SPLIT]` (SPLIT as TFDS writes it, such as `train[:1%]`; default `train`), `folder:PATH`,
      `synthetic:WORLD[/OPTION=VALUE,...][:SPLIT]` or `arrays:PATH.npz`.
    data_dir: where TFDS data sets and synthetic worlds lie; empty for their defaults.
    cache: read and decode everything once into memory.
    verify: check the CRC of each TFRecord as it is read (ArrayRecord always does).

  Raises MissingData, with the command that prepares it, if the data is not there; ConfigError for a wrong `spec`.
  """
  kind, _, rest = spec.strip().partition(':')
  if kind not in KINDS or not rest:
    raise ConfigError(
      f'data.source is {spec!r}; expected tfds:NAME[:SPLIT], folder:PATH, synthetic:WORLD[:SPLIT] or arrays:PATH.npz'
    )
  if kind == 'arrays':
    source = _open_arrays(rest)
  elif kind == 'folder':
    from mim_jax.data import folder

    source = folder.FolderSource(rest)
  elif kind == 'synthetic':
    from mim_jax.data import records, worlds

    source = records.RecordSource(*worlds.locate(rest, data_dir), name=spec.strip())
  else:
    from mim_jax.data import records

    name, split = _name_and_split(spec, rest)
    source = records.RecordSource(records.find(name, data_dir), split, verify=verify)
  if cache and not isinstance(source, ArraySource):
    source = CachedSource(source)
  return source


def _name_and_split(spec, rest):
  """`NAME[/CONFIG][:VERSION][:SPLIT]` in two."""
  match = re.fullmatch(r'([\w.+-]+(?:/[\w.+-]+)*(?::[\d*]+\.[\d*]+\.[\d*]+)?)(?::(.+))?', rest)
  if not match:
    raise ConfigError(
      f'{spec!r} is not understood; expected tfds:NAME[/CONFIG][:VERSION][:SPLIT], such as tfds:cifar10:train[:1%]'
    )
  return match[1], match[2] or 'train'


def _open_arrays(path):
  path = os.path.expanduser(path)
  if not os.path.exists(path):
    raise MissingData(f'arrays:{path} does not exist; make it with numpy.savez(path, image=..., label=...)')
  try:
    with np.load(path, allow_pickle=False) as file:
      return ArraySource({k: file[k] for k in file.files}, f'arrays:{path}')
  except (ValueError, OSError, AttributeError, TypeError) as e:
    raise ConfigError(
      f'arrays:{path} cannot be read ({e}); expected what numpy.savez(path, image=..., label=...) writes'
    ) from e
