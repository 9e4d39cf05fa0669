"""Random access to TFRecord files: an index of record offsets, made by one scan and kept in a cache, read by `pread`.

A record is: length (uint64, little-endian), masked CRC-32C of those 8 bytes, the data, masked CRC-32C of the data.
"""

import concurrent.futures
import functools
import hashlib
import os
import pathlib
import struct

import numpy as np

from mim_jax.data.sources import CorruptExample
from mim_jax.errors import MissingData

HEADER, FOOTER = 12, 4  # bytes around the data of a record


def cache_dir():
  """Where offset indices are kept: `$MIM_JAX_DATA/index`, else `~/.cache/mim_jax/index`."""
  root = os.environ.get('MIM_JAX_DATA')
  return pathlib.Path(root) / 'index' if root else pathlib.Path.home() / '.cache' / 'mim_jax' / 'index'


def scan(path):
  """Offset and length in bytes of the data of every record of one file, int64 [n, 2].

  Reads only the 12 bytes before each record. Raises CorruptExample if the file ends inside one or a length is damaged.
  """
  rows, at, size = [], 0, os.stat(path).st_size
  fd = os.open(path, os.O_RDONLY)
  try:
    while at < size:
      header = os.pread(fd, HEADER, at)
      if len(header) < HEADER:
        raise CorruptExample(f'{path} ends at byte {size}, inside the header of record {len(rows)}')
      length, check = struct.unpack('<QI', header)
      # The CRC of the length costs more than the read itself, so only a length that leads nowhere is suspected.
      if at + HEADER + length + FOOTER > size:
        why = 'is cut short' if masked_crc32c(header[:8]) == check else 'has a damaged length'
        raise CorruptExample(f'{path} ends at byte {size}: record {len(rows)} at byte {at} {why}')
      rows.append((at + HEADER, length))
      at += HEADER + length + FOOTER
  finally:
    os.close(fd)
  return np.array(rows, np.int64).reshape(-1, 2)


def index(path):
  """`scan(path)`, from the cache if the file has kept its size and modification time since."""
  stat = os.stat(path)
  name = hashlib.sha256(f'{os.path.realpath(path)}|{stat.st_size}|{stat.st_mtime_ns}'.encode()).hexdigest()[:32]
  cached = cache_dir() / f'{name}.npy'
  try:
    return np.load(cached)
  except (OSError, ValueError, EOFError):  # absent, or cut short by a full disk: the file itself is the truth
    rows = scan(path)
  try:
    cached.parent.mkdir(parents=True, exist_ok=True)
    partial = cached.with_name(f'{name}.{os.getpid()}.tmp.npy')
    np.save(partial, rows)
    os.replace(partial, cached)  # several processes may do this at once; each leaves a whole file
  except OSError:
    return rows  # a home that cannot be written costs a scan per start, nothing else
  return rows


class TFRecords:
  """The records of TFDS file instructions (`filename, skip, take, examples_in_shard`) as one sequence of bytes."""

  def __init__(self, instructions, verify=False):
    self.files = [os.fspath(f.filename) for f in instructions]
    self.verify = verify
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
      tables = list(pool.map(self._table, instructions))
    self.starts = np.cumsum([0] + [len(t) for t in tables])
    self.table = np.concatenate(tables)

  def _table(self, instruction):
    try:
      rows = index(instruction.filename)
    except CorruptExample as e:
      raise MissingData(
        f'{e}; expected {instruction.examples_in_shard} whole records. Copy or prepare this file again'
      ) from e
    if len(rows) != instruction.examples_in_shard:
      raise MissingData(
        f'{instruction.filename} holds {len(rows)} records, dataset_info.json says {instruction.examples_in_shard}; '
        'copy or prepare this file again'
      )
    return rows[instruction.skip : instruction.skip + instruction.take]

  def __len__(self):
    return len(self.table)

  def __getitem__(self, i):
    path = self.files[int(np.searchsorted(self.starts, i, 'right')) - 1]
    offset, length = (int(x) for x in self.table[i])
    # Opened anew for each read, about 10 us: 1024 shards kept open would pass the usual limit of open files.
    fd = os.open(path, os.O_RDONLY)
    try:
      data = os.pread(fd, length + FOOTER, offset)
    finally:
      os.close(fd)
    if len(data) < length + FOOTER:
      raise CorruptExample(f'{path} ends inside the record at byte {offset - HEADER}')
    record = data[:length]
    if self.verify and masked_crc32c(record) != struct.unpack('<I', data[length:])[0]:
      raise CorruptExample(f'{path}: the record at byte {offset - HEADER} does not match its CRC')
    return record


# CRC-32C (Castagnoli, reflected polynomial 0x82F63B78). Plain Python needs 0.1 us per byte, so long data are cut into
# lanes that advance together in numpy; a CRC is linear over GF(2), which lets the lanes be joined afterwards.
_LANES = 256


@functools.cache
def _byte_table():
  table = np.arange(256, dtype=np.uint32)
  for _ in range(8):
    table = np.where(table & 1, (table >> 1) ^ np.uint32(0x82F63B78), table >> 1)
  return table


@functools.lru_cache(64)
def _skip_table(length):
  """[4, 256]: what each byte of a CRC register turns into when `length` zero bytes follow."""
  register = (np.arange(256, dtype=np.uint32) << np.arange(0, 32, 8, dtype=np.uint32)[:, None]).astype(np.uint32)
  if length == 1:
    return (register >> 8) ^ _byte_table()[register & 255]
  half = _skip_table(length // 2)
  register = _skip(half, half)
  return _skip(_skip_table(1), register) if length % 2 else register


def _skip(table, register):
  low, high = table[0][register & 255] ^ table[1][(register >> 8) & 255], table[2][(register >> 16) & 255]
  return low ^ high ^ table[3][register >> 24]


def crc32c(data):
  """CRC-32C of bytes, as an int."""
  table = _byte_table()
  values = np.frombuffer(data, np.uint8)
  length = len(values) // _LANES
  register = np.uint32(0xFFFFFFFF)
  if length:
    lanes = np.zeros(_LANES, np.uint32)
    lanes[0] = register
    for column in values[: length * _LANES].reshape(_LANES, length).T:
      lanes = (lanes >> 8) ^ table[(lanes ^ column) & 255]
    span = length
    while len(lanes) > 1:  # join neighbours: the left one is carried over the bytes of the right one
      lanes = _skip(_skip_table(span), lanes[0::2]) ^ lanes[1::2]
      span *= 2
    register = lanes[0]
  for byte in values[length * _LANES :]:
    register = (register >> np.uint32(8)) ^ table[(register ^ byte) & 255]
  return int(register) ^ 0xFFFFFFFF


def masked_crc32c(data):
  """CRC-32C as TFRecord stores it: rotated right by 15 bits, plus 0xa282ead8."""
  crc = crc32c(data)
  return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
