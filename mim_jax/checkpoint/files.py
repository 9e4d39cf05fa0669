"""Weight files as they lie on disk, ours and those of others: safetensors, sharded safetensors, PyTorch's .pth and .bin.

`read` gives the arrays of any of them by name, read when asked for. What a file is follows from its first bytes, not from its name.
Neither PyTorch nor pickled code is needed, see `pickled`.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy

from mim_jax.checkpoint import pickled
from mim_jax.errors import CheckpointError

DTYPES = {  # of the safetensors format
  'F64': np.float64,
  'F32': np.float32,
  'F16': np.float16,
  'BF16': ml_dtypes.bfloat16,
  'F8_E4M3': ml_dtypes.float8_e4m3fn,
  'F8_E5M2': ml_dtypes.float8_e5m2,
  'I64': np.int64,
  'I32': np.int32,
  'I16': np.int16,
  'I8': np.int8,
  'U64': np.uint64,
  'U32': np.uint32,
  'U16': np.uint16,
  'U8': np.uint8,
  'BOOL': np.bool_,
  'C64': np.complex64,
}
# In a folder, the first of these that is there.
NAMES = ('model.safetensors', 'model.safetensors.index.json', 'pytorch_model.bin', 'pytorch_model.bin.index.json')


@dataclasses.dataclass(frozen=True)
class Stored:
  """An array on disk."""

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]


class Weights(Mapping[str, np.ndarray]):
  """The arrays of a file by name; `weights[name]` reads one.

  Attributes:
    path: the file (of several: their index).
    kind: 'safetensors' or 'torch'.
    stored: shape and dtype of each array.
    metadata: texts by name that a safetensors file carries.
    opaque: classes of pickled objects that were left unread.
  """

  def __init__(self, path: Path, kind: str, stored: Mapping[str, Stored], metadata=None, opaque=()):
    self.path, self.kind, self.stored = path, kind, dict(stored)
    self.metadata: dict[str, str] = dict(metadata or {})
    self.opaque: list[str] = list(opaque)

  def __getitem__(self, name: str) -> np.ndarray:
    return self.stored[name].read()

  def __contains__(self, name) -> bool:
    return name in self.stored

  def __iter__(self) -> Iterator[str]:
    return iter(self.stored)

  def __len__(self) -> int:
    return len(self.stored)

  def shape(self, name: str) -> tuple[int, ...]:
    return self.stored[name].shape


def locate(path: str | Path) -> Path:
  """The weights of a path: a file as it is, of a folder the file in it. Raises CheckpointError when there is none or more than one."""
  path = Path(path)
  if path.is_file():
    return path
  if not path.is_dir():
    raise CheckpointError(f'{path} does not exist; give a file of weights or a folder that holds one')
  for name in NAMES:
    if (path / name).is_file():
      return path / name
  found = sorted(file for end in ('safetensors', 'pth', 'pt', 'bin') for file in path.glob(f'*.{end}'))
  if len(found) != 1:
    listed = ', '.join(file.name for file in found) or 'none'
    raise CheckpointError(
      f'{path} holds no {NAMES[0]} and not exactly one other file of weights (found: {listed}); name the file'
    )
  return found[0]


def read(path: str | Path) -> Weights:
  """The arrays of a file, of a sharded file's index, or of a folder that holds one of these.

  Raises:
    CheckpointError: nothing there, damaged, or of another kind.
  """
  path = locate(path)
  if path.name.endswith('.index.json'):
    return _read_shards(path)
  with path.open('rb') as file:
    head = file.read(9)
  if head[8:] == b'{':  # asked first: the length before it may look like the start of the others
    return _read_safetensors(path)
  if head[:2] == b'PK' or head[:1] == b'\x80':
    tensors, opaque = pickled.read(path)
    return Weights(path, 'torch', {n: Stored(t.shape, t.dtype, t.read) for n, t in tensors.items()}, opaque=opaque)
  raise CheckpointError(f'{path} is neither a safetensors file nor one of torch.save: it begins with {head!r}')


def _read_safetensors(path: Path) -> Weights:
  """Eight bytes with the length of a JSON header, the header, then the arrays, little-endian and contiguous."""
  with path.open('rb') as file:
    length = int.from_bytes(file.read(8), 'little')
    size = path.stat().st_size
    if length > size - 8:
      raise CheckpointError(f'{path} ends within its header: it is damaged, copy it again')
    try:
      header = json.loads(file.read(length))
    except ValueError as error:
      raise CheckpointError(f'{path} has a header that is not JSON: {error}') from error
  metadata = header.pop('__metadata__', {})
  start = 8 + length

  def stored(name, entry):
    try:
      dtype, shape, (begin, end) = np.dtype(DTYPES[entry['dtype']]), tuple(entry['shape']), entry['data_offsets']
    except (KeyError, TypeError, ValueError) as error:
      raise CheckpointError(f'{path}: the header says {entry} of {name!r}, which cannot be understood') from error
    count = int(np.prod(shape, dtype=np.int64))
    if begin < 0 or end - begin != count * dtype.itemsize or start + end > size:
      raise CheckpointError(
        f'{path}: {name!r} {shape} does not lie within the file of {size} bytes: it is damaged, copy it again'
      )

    def load():
      return np.fromfile(path, dtype, count, offset=start + begin).reshape(shape)

    return Stored(shape, dtype, load)

  return Weights(path, 'safetensors', {name: stored(name, entry) for name, entry in header.items()}, metadata)


def _read_shards(path: Path) -> Weights:
  """A Hugging Face index: {"weight_map": {name: file beside it}}."""
  try:
    places = json.loads(path.read_text())['weight_map']
  except (ValueError, KeyError, TypeError) as error:
    raise CheckpointError(f'{path} is no index of weights: expected JSON with "weight_map"') from error
  shards = {}
  for file in sorted(set(places.values())):
    if Path(file).name != file or not (path.parent / file).is_file():
      raise CheckpointError(f'{path} names the file {file!r}, which is not beside it')
    shards[file] = read(path.parent / file)
  lost = [name for name, file in places.items() if name not in shards[file]]
  if lost:
    raise CheckpointError(f'{path}: {lost[0]!r} and {len(lost) - 1} more are not in the files that the index names')
  kinds = {shard.kind for shard in shards.values()}
  opaque = sorted({name for shard in shards.values() for name in shard.opaque})
  return Weights(path, kinds.pop(), {name: shards[file].stored[name] for name, file in places.items()}, opaque=opaque)


def write(path: str | Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None):
  """Writes a safetensors file, complete or not at all. Raises CheckpointError when the disk refuses."""
  path = Path(path)
  arrays = {name: np.asarray(value, order='C') for name, value in arrays.items()}
  unfinished = path.with_name(f'.{path.name}.unfinished')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(arrays, unfinished, dict(metadata or {}) or None)
    os.replace(unfinished, path)
  except (OSError, safetensors.SafetensorError) as error:
    unfinished.unlink(missing_ok=True)
    raise CheckpointError(f'{path} could not be written: {error}') from error


def settings(path: str | Path, name: str = 'config.json') -> dict[str, Any]:
  """The JSON file `name` beside a file of weights (or in its folder), or {} when there is none."""
  path = Path(path)
  file = (path if path.is_dir() else path.parent) / name
  if not file.is_file():
    return {}
  try:
    found = json.loads(file.read_text())
  except ValueError as error:
    raise CheckpointError(f'{file} is not JSON: {error}; mend it or move it away') from error
  return found if isinstance(found, dict) else {}


def size_on_disk(path: str | Path) -> int:
  """Bytes of a file, of the files of a sharded one, or of a folder."""
  path = Path(path)
  if path.name.endswith('.index.json'):
    shards = set(json.loads(path.read_text())['weight_map'].values())
    return path.stat().st_size + sum((path.parent / shard).stat().st_size for shard in shards)
  if path.is_file():
    return path.stat().st_size
  return sum(file.stat().st_size for file in path.rglob('*') if file.is_file())


def digest(path: str | Path) -> str:
  """First 16 hexadecimal digits of a file's SHA-256."""
  with Path(path).open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()[:16]
