"""Tensors of a PyTorch file (`torch.save`, TorchScript) without PyTorch and without running anything that is pickled in it.

A pickle is a program that may call any function by name. Here names are looked up in a short list of harmless ones; every other name
stands for an `Opaque` class, which does nothing with what it is given. Arrays are read from the file when they are asked for.
"""

import dataclasses
import io
import itertools
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from mim_jax.errors import CheckpointError

DTYPES = {
  'Double': np.float64,
  'Float': np.float32,
  'Half': np.float16,
  'BFloat16': ml_dtypes.bfloat16,
  'Long': np.int64,
  'Int': np.int32,
  'Short': np.int16,
  'Char': np.int8,
  'Byte': np.uint8,
  'Bool': np.bool_,
  'ComplexFloat': np.complex64,
  'ComplexDouble': np.complex128,
}
TORCH_DTYPES = {  # torch.<name>
  **{np.dtype(dtype).name: dtype for dtype in DTYPES.values()},
  'bool': np.bool_,
  'float': np.float32,
  'half': np.float16,
  'double': np.float64,
  'long': np.int64,
  'int': np.int32,
}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first pickled object of files written before PyTorch 1.6


@dataclasses.dataclass
class Storage:
  """Flat memory of a file: dtype (None: bytes without a type) and a function that reads it."""

  dtype: np.dtype | None
  read: Callable[[], bytes]


@dataclasses.dataclass
class Tensor:
  """A view of a storage, not read yet; offset and strides in elements."""

  storage: Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]
  dtype: np.dtype

  def read(self) -> np.ndarray:
    """The array, contiguous. Raises CheckpointError when it reaches beyond its storage."""
    flat = np.frombuffer(self.storage.read(), self.dtype)
    if 0 in self.shape:
      return np.zeros(self.shape, self.dtype)
    last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
    if self.offset < 0 or min(self.strides, default=0) < 0 or last >= len(flat):
      raise CheckpointError(
        f'a tensor of shape {self.shape} reaches beyond its storage of {len(flat)} numbers: the file is damaged'
      )
    strides = [s * flat.itemsize for s in self.strides]
    return np.array(np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, strides), order='C')


class Opaque:
  """Stands for an object of a class that is not known here. It runs nothing; only the state it is given is kept."""

  name = ''

  def __new__(cls, *args, **kwargs):
    del args, kwargs
    return object.__new__(cls)

  def __init__(self, *args, **kwargs):
    self.state = None

  def __setstate__(self, state):
    self.state = state

  def __call__(self, *args, **kwargs):
    return Opaque()

  def __setitem__(self, key, value):
    pass

  def append(self, item):
    pass

  def extend(self, items):
    pass

  def add(self, item):
    pass


def _tensor(storage, offset, shape, strides, *rest):
  del rest  # requires_grad, hooks, metadata
  return Tensor(storage, offset, tuple(shape), tuple(strides), np.dtype(storage.dtype))


def _untyped_tensor(storage, offset, shape, strides, grad, hooks, dtype, *rest):
  del grad, hooks, rest
  return Tensor(storage, offset, tuple(shape), tuple(strides), np.dtype(dtype))


KNOWN = {
  ('collections', 'OrderedDict'): OrderedDict,
  ('collections', 'defaultdict'): lambda *args: {},
  ('builtins', 'set'): set,
  ('builtins', 'frozenset'): frozenset,
  ('builtins', 'dict'): dict,
  ('builtins', 'list'): list,
  ('torch', 'Size'): tuple,
  ('torch._utils', '_rebuild_tensor'): _tensor,
  ('torch._utils', '_rebuild_tensor_v2'): _tensor,
  ('torch._utils', '_rebuild_tensor_v3'): _untyped_tensor,
  ('torch._utils', '_rebuild_parameter'): lambda data, *rest: data,
  ('torch._utils', '_rebuild_parameter_with_state'): lambda data, *rest: data,
  ('torch._tensor', '_rebuild_from_type_v2'): lambda build, kind, args, state: build(*args),
  ('torch.storage', 'UntypedStorage'): None,
  **{('torch', f'{name}Storage'): np.dtype(dtype) for name, dtype in DTYPES.items()},
  **{('torch', name): np.dtype(dtype) for name, dtype in TORCH_DTYPES.items()},
}


class Reader(pickle.Unpickler):
  """Unpickler over `KNOWN`; other names are made `Opaque` and collected in `opaque`."""

  def __init__(self, file, storage: Callable[..., Storage]):
    super().__init__(file, encoding='utf-8')
    self._storage = storage
    self.opaque: set[str] = set()

  def find_class(self, module, name):
    module = 'builtins' if module == '__builtin__' else module
    if (module, name) in KNOWN:
      return KNOWN[module, name]
    self.opaque.add(f'{module}.{name}')
    return type('Opaque', (Opaque,), {'name': f'{module}.{name}'})

  def persistent_load(self, pid):
    kind, dtype, key, _, count, *view = pid
    if kind != 'storage' or any(part is not None for part in view):
      raise CheckpointError(f'found {pid!r} where a storage was expected; save the weights as .safetensors instead')
    return self._storage(dtype, str(key), int(count))


def read(path: Path) -> tuple[dict[str, Tensor], list[str]]:
  """Tensors of a file by dotted name, and names of the classes in it that were not read.

  Containers in containers are flattened: {'model': {'norm.weight': ...}} gives 'model.norm.weight'.

  Raises:
    CheckpointError: the file is damaged or no PyTorch file.
  """
  try:
    tree, opaque = _read_zip(path) if zipfile.is_zipfile(path) else _read_legacy(path)
  except CheckpointError as error:
    raise CheckpointError(f'{path}: {error}') from error
  except Exception as error:  # damaged bytes make an unpickler raise nearly anything
    raise CheckpointError(f'{path} cannot be read as a file of torch.save: {type(error).__name__}: {error}') from error
  return dict(_flat(tree, '', set())), sorted(opaque)


def _read_zip(path):
  """Files since PyTorch 1.6: `NAME/data.pkl` and one stored member per storage."""
  archive = zipfile.ZipFile(path)
  found = [name for name in archive.namelist() if name.endswith('/data.pkl') and name.count('/') == 1]
  if len(found) != 1:
    raise CheckpointError('a zip archive, but not of torch.save: it has no NAME/data.pkl')
  root = found[0].removesuffix('data.pkl')
  order = f'{root}byteorder'
  if order in archive.namelist() and archive.read(order) != b'little':
    raise CheckpointError('its numbers are big-endian; save it again on a little-endian machine')

  def storage(dtype, key, count):
    member = f'{root}data/{key}'
    size = archive.getinfo(member).file_size
    if dtype is not None and size < count * dtype.itemsize:
      raise CheckpointError(f'{member} has {size} bytes, {count} numbers of {dtype} were expected: the file is damaged')
    return Storage(dtype, lambda: archive.read(member))

  reader = Reader(io.BytesIO(archive.read(found[0])), storage)
  return reader.load(), reader.opaque


def _read_legacy(path):
  """Files of older PyTorch: five pickles after each other, then the storages, each after its length."""
  places: dict[str, tuple[int, int]] = {}  # key -> offset and bytes in the file, known once all is unpickled
  sizes: dict[str, int] = {}

  def storage(dtype, key, count):
    sizes[key] = dtype.itemsize

    def data():
      offset, size = places[key]
      with path.open('rb') as again:
        again.seek(offset)
        return again.read(size)

    return Storage(dtype, data)

  with path.open('rb') as file:
    if Reader(file, storage).load() != LEGACY_MAGIC:
      raise CheckpointError('a pickle, but not of torch.save; save the weights as .safetensors instead')
    for _ in ('protocol version', 'system'):
      Reader(file, storage).load()
    reader = Reader(file, storage)
    tree = reader.load()
    keys = Reader(file, storage).load()
    end = path.stat().st_size
    for key in keys:
      count = int.from_bytes(file.read(8), 'little')
      size = count * sizes[key]
      if file.tell() + size > end:
        raise CheckpointError('the file ends before its weights do: it is damaged')
      places[key] = file.tell(), size
      file.seek(size, io.SEEK_CUR)
  return tree, reader.opaque


def _flat(node, name: str, above: set[int]) -> Iterator[tuple[str, Tensor]]:
  """(dotted name, tensor) for each tensor in nested containers; modules, TorchScript or pickled whole, are containers."""
  if isinstance(node, Tensor):
    yield name, node
    return
  if isinstance(node, Opaque) and node.name.startswith('__torch__'):
    node = node.state
  elif isinstance(node, Opaque) and isinstance(node.state, dict) and '_modules' in node.state:
    # a whole torch.nn.Module
    node = {**(node.state.get('_parameters') or {}), **(node.state.get('_buffers') or {}), **node.state['_modules']}
  if isinstance(node, dict):
    items = node.items()
  elif isinstance(node, list | tuple):
    items = zip(itertools.count(), node)
  else:
    return
  if id(node) in above:
    return
  for key, item in items:
    yield from _flat(item, f'{name}.{key}' if name else str(key), above | {id(node)})
