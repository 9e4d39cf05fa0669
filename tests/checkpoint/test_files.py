"""Weight files of every kind, sound, hostile and damaged. `torch_files` were written by PyTorch 2.14 from the values of `VALUES`."""

import json
import os
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mim_jax.checkpoint import files, pickled
from mim_jax.errors import CheckpointError

TORCH = Path(__file__).parent / 'torch_files'
BASE = np.arange(24, dtype=np.float32)
VALUES = {
  'model.whole': BASE.reshape(4, 6),
  'model.turned': BASE.reshape(4, 6).T,  # a view with strides
  'model.part': BASE[6:12].reshape(2, 3),  # a view into the middle of the same storage
  'model.half': np.arange(4, dtype=np.float16) / 8,
  'model.brain': (np.arange(4) / 8).astype(ml_dtypes.bfloat16),
  'model.long': np.array(7),
  'model.flags': np.array([True, False]),
  'model.empty': np.zeros((0, 3), np.float32),
  'model.parameter': np.ones(2, np.float32),
  'optimizer.state.0.exp_avg': np.ones(3, np.float32),
}


@pytest.mark.parametrize('name', ['zip.pth', 'legacy.pth'])
def test_pytorch_files_without_pytorch(name):
  weights = files.read(TORCH / name)
  assert weights.kind == 'torch' and set(weights) == set(VALUES)
  for key, value in VALUES.items():
    assert weights.shape(key) == value.shape and weights[key].dtype == value.dtype
    np.testing.assert_array_equal(weights[key], value)
  assert weights.opaque == ['argparse.Namespace']


def test_torchscript_modules_are_containers():
  weights = files.read(TORCH / 'script.pt')
  np.testing.assert_array_equal(weights['visual.proj.weight'], np.arange(6, dtype=np.float16).reshape(2, 3))
  assert set(weights) == {'visual.proj.weight', 'visual.proj.bias', 'visual.scale'}


class Hostile:
  def __init__(self, function, *args):
    self.call = function, args

  def __reduce__(self):
    return self.call


@pytest.mark.parametrize('wrapped', [True, False])
def test_pickled_code_is_not_run(tmp_path, wrapped):
  witness = tmp_path / 'witness'
  tree = {
    'a': Hostile(os.system, f'touch {witness}'),
    'b': Hostile(eval, f'open({str(witness)!r}, "w")'),
    'c': Hostile(getattr, Hostile(__import__, 'os'), 'system'),
    'd': [Hostile(Path, str(witness))],
  }
  path = tmp_path / 'hostile.pth'
  if wrapped:
    with zipfile.ZipFile(path, 'w') as archive:
      archive.writestr('archive/data.pkl', pickle.dumps(tree))
    weights = files.read(path)
    assert not list(weights) and 'posix.system' in weights.opaque and 'builtins.eval' in weights.opaque
  else:
    path.write_bytes(pickle.dumps(tree))
    with pytest.raises(CheckpointError, match='not of torch.save'):
      files.read(path)
  assert not witness.exists()


def test_a_view_beyond_its_storage_is_an_error():
  storage = pickled.Storage(np.dtype(np.float32), lambda: bytes(16))
  for offset, shape, strides in ((1, (2, 2), (2, 1)), (-1, (2,), (1,)), (0, (2,), (-1,)), (0, (3, 2), (2, 1))):
    with pytest.raises(CheckpointError, match='beyond its storage'):
      pickled.Tensor(storage, offset, shape, strides, storage.dtype).read()


@pytest.mark.parametrize('name', ['zip.pth', 'legacy.pth'])
def test_a_damaged_pytorch_file_is_refused(tmp_path, name):
  whole = (TORCH / name).read_bytes()
  (tmp_path / name).write_bytes(whole[: len(whole) * 2 // 3])
  with pytest.raises(CheckpointError, match=name):
    dict(files.read(tmp_path / name).items())


def test_other_files_are_told_apart(tmp_path):
  (tmp_path / 'notes.pth').write_text('hello world')
  with pytest.raises(CheckpointError, match='neither'):
    files.read(tmp_path / 'notes.pth')
  with zipfile.ZipFile(tmp_path / 'other.pth', 'w') as archive:
    archive.writestr('readme', 'x')
  with pytest.raises(CheckpointError, match='data.pkl'):
    files.read(tmp_path / 'other.pth')
  with pytest.raises(CheckpointError, match='does not exist'):
    files.read(tmp_path / 'absent.pth')


def test_safetensors_both_ways(tmp_path):
  arrays = {
    'a/b': BASE.reshape(4, 6).T,
    'scalar': np.array(3, np.int64),
    'half': np.ones(3, np.float16),
    'none': np.zeros((0, 2)),
  }
  files.write(tmp_path / 'deep' / 'x.safetensors', arrays, {'who': 'me'})
  weights = files.read(tmp_path / 'deep' / 'x.safetensors')
  assert weights.metadata == {'who': 'me'} and list((tmp_path / 'deep').iterdir()) == [weights.path]
  for name, value in arrays.items():
    assert weights[name].dtype == value.dtype
    np.testing.assert_array_equal(weights[name], value)
  assert files.size_on_disk(weights.path) == weights.path.stat().st_size


def _raw(path, header, data=b''):
  text = json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, 'little') + text + data)


def test_safetensors_in_bfloat16(tmp_path):
  value = np.array([0.5, -2, 3]).astype(ml_dtypes.bfloat16)
  _raw(tmp_path / 'x.safetensors', {'x': {'dtype': 'BF16', 'shape': [3], 'data_offsets': [0, 6]}}, value.tobytes())
  np.testing.assert_array_equal(files.read(tmp_path / 'x.safetensors')['x'], value)


@pytest.mark.parametrize('length', [0x180, int.from_bytes(b'PK', 'little')])
def test_safetensors_whose_header_is_as_long_as_a_pickle_or_zip_begins(tmp_path, length):
  header = {'x': {'dtype': 'U8', 'shape': [1], 'data_offsets': [0, 1]}}
  header['__metadata__'] = {'pad': ''}
  header['__metadata__']['pad'] = ' ' * (length - len(json.dumps(header)))
  _raw(tmp_path / 'x.safetensors', header, b'7')
  assert files.read(tmp_path / 'x.safetensors')['x'].tolist() == [55]


@pytest.mark.parametrize(
  'entry, word',
  [
    ({'dtype': 'F32', 'shape': [3], 'data_offsets': [0, 12]}, 'damaged'),  # the file ends before
    ({'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 4]}, 'damaged'),
    ({'dtype': 'F99', 'shape': [2], 'data_offsets': [0, 8]}, 'understood'),
    ({'dtype': 'F32', 'shape': [2]}, 'understood'),
  ],
)
def test_safetensors_whose_header_lies(tmp_path, entry, word):
  _raw(tmp_path / 'x.safetensors', {'x': entry}, bytes(8))
  with pytest.raises(CheckpointError, match=word):
    files.read(tmp_path / 'x.safetensors')


def test_truncated_safetensors(tmp_path):
  _raw(tmp_path / 'x.safetensors', {'x': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]}}, bytes(8))
  whole = (tmp_path / 'x.safetensors').read_bytes()
  for size, word in ((20, 'header'), (len(whole) - 1, 'damaged')):
    (tmp_path / 'x.safetensors').write_bytes(whole[:size])
    with pytest.raises(CheckpointError, match=word):
      files.read(tmp_path / 'x.safetensors')


def _shards(folder):
  files.write(folder / 'a.safetensors', {'x': BASE})
  files.write(folder / 'b.safetensors', {'y': BASE + 1})
  places = {'x': 'a.safetensors', 'y': 'b.safetensors'}
  (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': places}))
  return places


def test_shards(tmp_path):
  _shards(tmp_path)
  weights = files.read(tmp_path)  # the folder finds the index
  np.testing.assert_array_equal(weights['y'], BASE + 1)
  assert list(weights) == ['x', 'y'] and files.size_on_disk(weights.path) > 192


@pytest.mark.parametrize('file', ['c.safetensors', '../a.safetensors'])
def test_shards_that_are_elsewhere(tmp_path, file):
  places = _shards(tmp_path) | {'z': file}
  (tmp_path / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': places}))
  with pytest.raises(CheckpointError, match='not beside it'):
    files.read(tmp_path)


def test_shards_that_lack_an_array(tmp_path):
  places = _shards(tmp_path) | {'z': 'a.safetensors'}
  (tmp_path / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': places}))
  with pytest.raises(CheckpointError, match="'z'"):
    files.read(tmp_path)


def test_what_a_folder_stands_for(tmp_path):
  with pytest.raises(CheckpointError, match='found: none'):
    files.locate(tmp_path)
  files.write(tmp_path / 'one.safetensors', {'x': BASE})
  assert files.locate(tmp_path).name == 'one.safetensors'
  files.write(tmp_path / 'two.safetensors', {'x': BASE})
  with pytest.raises(CheckpointError, match='one.safetensors, two.safetensors'):
    files.locate(tmp_path)
  files.write(tmp_path / 'model.safetensors', {'x': BASE})
  assert files.locate(tmp_path).name == 'model.safetensors'


def test_settings_beside_a_file(tmp_path):
  assert files.settings(tmp_path / 'x.safetensors') == {}
  (tmp_path / 'config.json').write_text('{"a": 1}')
  assert files.settings(tmp_path) == files.settings(tmp_path / 'x.safetensors') == {'a': 1}
  (tmp_path / 'config.json').write_text('{')
  with pytest.raises(CheckpointError, match='not JSON'):
    files.settings(tmp_path)


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
  def refuse(*args):
    raise OSError('no space left')

  monkeypatch.setattr(files.os, 'replace', refuse)
  with pytest.raises(CheckpointError, match='no space left'):
    files.write(tmp_path / 'x.safetensors', {'x': BASE})
  assert not list(tmp_path.iterdir())
