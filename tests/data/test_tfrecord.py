import os
import struct
import types

import numpy as np
import pytest

from mim_jax.data import sources, tfrecord
from mim_jax.errors import MissingData


@pytest.fixture(autouse=True)
def index_cache(tmp_path, monkeypatch):
  monkeypatch.setenv('MIM_JAX_DATA', str(tmp_path / 'cache'))


def bitwise_crc(data):
  """CRC-32C a bit at a time, straight from its definition."""
  crc = 0xFFFFFFFF
  for byte in data:
    crc ^= byte
    for _ in range(8):
      crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
  return crc ^ 0xFFFFFFFF


def masked(data):
  crc = bitwise_crc(data)
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def write(path, records):
  with open(path, 'wb') as file:
    for data in records:
      length = struct.pack('<Q', len(data))
      file.write(length + struct.pack('<I', masked(length)) + data + struct.pack('<I', masked(data)))


def records(n=20, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.bytes(int(rng.integers(0, 700))) for _ in range(n)]


def shard(path, skip=0, take=None, total=20):
  take = total - skip if take is None else take
  return types.SimpleNamespace(filename=str(path), skip=skip, take=take, examples_in_shard=total)


@pytest.mark.parametrize(
  'data, crc',
  [
    (b'123456789', 0xE3069283),  # the usual check value; the others are of RFC 3720, appendix B.4
    (bytes(32), 0x8A9136AA),
    (b'\xff' * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (b'', 0),
  ],
)
def test_crc_of_published_vectors(data, crc):
  assert tfrecord.crc32c(data) == crc


@pytest.mark.parametrize('length', [1, 255, 256, 257, 511, 512, 3000])
def test_crc_of_any_length(length):
  data = np.random.default_rng(length).bytes(length)
  assert tfrecord.crc32c(data) == bitwise_crc(data)
  assert tfrecord.masked_crc32c(data) == masked(data)


def test_records_of_several_shards_with_skip_and_take(tmp_path):
  a, b = records(seed=1), records(seed=2)
  write(tmp_path / 'a', a)
  write(tmp_path / 'b', b)
  read = tfrecord.TFRecords([shard(tmp_path / 'a', skip=3, take=5), shard(tmp_path / 'b')], verify=True)
  assert [read[i] for i in range(len(read))] == a[3:8] + b


def test_index_is_made_once_and_anew_when_the_file_changes(tmp_path, monkeypatch):
  path = tmp_path / 'a'
  write(path, records())
  scans = []
  scan = tfrecord.scan
  monkeypatch.setattr(tfrecord, 'scan', lambda p: scans.append(p) or scan(p))
  first = tfrecord.index(path)
  np.testing.assert_array_equal(tfrecord.index(path), first)
  assert len(scans) == 1
  write(path, records(7))
  os.utime(path, ns=(0, 0))
  assert len(tfrecord.index(path)) == 7 and len(scans) == 2


def test_broken_index_is_replaced(tmp_path):
  write(tmp_path / 'a', records())
  tfrecord.index(tmp_path / 'a')
  (cached,) = tfrecord.cache_dir().glob('*.npy')
  cached.write_bytes(cached.read_bytes()[:50])
  assert len(tfrecord.index(tmp_path / 'a')) == 20
  assert len(np.load(cached)) == 20


def test_a_cache_that_cannot_be_written_costs_a_scan_only(tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('')
  monkeypatch.setenv('MIM_JAX_DATA', str(tmp_path / 'file'))
  write(tmp_path / 'a', records())
  assert len(tfrecord.index(tmp_path / 'a')) == 20


def test_damaged_data_is_found_if_verified(tmp_path):
  path = tmp_path / 'a'
  write(path, records())
  offset = int(tfrecord.index(path)[4, 0])
  stat = os.stat(path)
  with open(path, 'r+b') as file:
    file.seek(offset)
    byte = file.read(1)
    file.seek(offset)
    file.write(bytes([byte[0] ^ 1]))
  os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
  read = tfrecord.TFRecords([shard(path)], verify=True)
  with pytest.raises(sources.CorruptExample, match='CRC'):
    read[4]
  assert read[5] == records()[5]
  assert tfrecord.TFRecords([shard(path)])[4] != records()[4]


def test_truncated_and_damaged_files_are_named(tmp_path):
  path = tmp_path / 'a'
  write(path, records())
  whole = path.read_bytes()
  path.write_bytes(whole[:-3])
  with pytest.raises(MissingData, match='record 19 .* is cut short; expected 20'):
    tfrecord.TFRecords([shard(path)])
  path.write_bytes(whole[:5] + b'\xff' + whole[6:])
  with pytest.raises(MissingData, match='record 0 .* damaged length'):
    tfrecord.TFRecords([shard(path)])
  write(path, records(12))
  with pytest.raises(MissingData, match='holds 12 records, dataset_info.json says 20'):
    tfrecord.TFRecords([shard(path)])
  write(path, [])
  assert tfrecord.scan(path).shape == (0, 2)


def test_a_file_cut_after_it_was_indexed_is_corrupt_when_read(tmp_path):
  path = tmp_path / 'a'
  write(path, records())
  read = tfrecord.TFRecords([shard(path)])
  path.write_bytes(path.read_bytes()[:-3])
  with pytest.raises(sources.CorruptExample, match='ends inside'):
    read[19]
