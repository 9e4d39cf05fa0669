import json
import pathlib
import struct
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from mim_jax.data import images, pipeline, records, sources, tfrecord
from mim_jax.errors import ConfigError, MissingData


@pytest.fixture(autouse=True)
def index_cache(tmp_path, monkeypatch):
  monkeypatch.setenv('MIM_JAX_DATA', str(tmp_path / 'cache'))


def features():
  return tfds.features.FeaturesDict(
    {
      'image': tfds.features.Image(shape=(None, None, 3), encoding_format='png'),
      'mask': tfds.features.Image(shape=(None, None, 1), encoding_format='png'),
      'label': tfds.features.ClassLabel(names=['cat', 'dog', 'owl']),
      'caption': tfds.features.Text(),
      'place': {'depth': np.float32, 'corner': tfds.features.Tensor(shape=(2,), dtype=np.int64)},
      'objects': tfds.features.Sequence({'size': np.float32}),
    }
  )


def example(i):
  rng = np.random.default_rng(i)
  return {
    'image': rng.integers(0, 256, (8 + i, 9, 3), np.uint8),
    'mask': rng.integers(0, 2, (8 + i, 9, 1), np.uint8),
    'label': i % 3,
    'caption': f'número {i}',
    'place': {'depth': np.float32(i), 'corner': np.array([i, -i])},
    'objects': [{'size': np.float32(k)} for k in range(i)],
  }


def encoded(example):
  png = lambda image: images.cv2.imencode('.png', image[..., ::-1])[1].tobytes()
  return {**example, 'image': png(example['image']), 'mask': png(example['mask'])}


def prepare(data_dir, file_format, name='things', version='1.0.0', shards=(3, 4)):
  """A data set of sum(shards) examples on disk, as TFDS lays it out."""
  folder = pathlib.Path(data_dir) / name / version
  folder.mkdir(parents=True)
  spec = features()
  spec.save_config(folder)
  start = 0
  for k, count in enumerate(shards):
    path = folder / f'{name}-train.{file_format}-{k:05d}-of-{len(shards):05d}'
    rows = [spec.serialize_example(spec.encode_example(encoded(example(i)))) for i in range(start, start + count)]
    start += count
    if file_format == 'array_record':
      writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
      for row in rows:
        writer.write(row)
      writer.close()
    else:
      with open(path, 'wb') as file:
        for row in rows:
          length = struct.pack('<Q', len(row))
          crcs = [struct.pack('<I', tfrecord.masked_crc32c(part)) for part in (length, row)]
          file.write(length + crcs[0] + row + crcs[1])
  split = {
    'name': 'train',
    'shardLengths': [str(n) for n in shards],
    'numBytes': '1',
    'filepathTemplate': '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
  }
  info = {'name': name, 'version': version, 'fileFormat': file_format, 'splits': [split]}
  (folder / 'dataset_info.json').write_text(json.dumps(info))
  return folder


@pytest.fixture(params=['array_record', 'tfrecord'])
def things(request, tmp_path):
  return prepare(tmp_path, request.param)


def test_examples_come_back_with_the_image_still_encoded(things):
  source = records.RecordSource(things)
  assert len(source) == 7
  for i in (0, 2, 3, 6):
    got, want = source[i], example(i)
    assert isinstance(got['image'], bytes)
    np.testing.assert_array_equal(images.read(got['image']), want['image'])
    np.testing.assert_array_equal(got['mask'], want['mask'])
    assert (got['label'], got['caption'], got['place/depth']) == (want['label'], want['caption'], i)
    assert got['place/corner'].tolist() == [i, -i]
    assert got['objects/size'].tolist() == list(range(i))
  with pytest.raises(IndexError):
    source[7]


def test_getmany_equals_one_by_one(things):
  source = records.RecordSource(things)
  many = source.getmany(np.array([6, 0, 3]))
  for i, got in zip([6, 0, 3], many, strict=True):
    assert got['caption'] == source[i]['caption'] and got['image'] == source[i]['image']


def test_features(things):
  source = records.RecordSource(things)
  assert source.features['image'] == sources.Feature((None, None, 3), np.dtype(np.uint8))
  assert source.features['label'].names == ('cat', 'dog', 'owl') and source.classes() == 3
  assert source.features['caption'].dtype == object
  assert source.features['place/corner'].shape == (2,)
  assert source.features['objects/size'].shape == (None,)
  with pytest.raises(ConfigError, match="no class labels named 'mask'; fields with classes: label"):
    source.classes('mask')


@pytest.mark.parametrize(
  'split, want',
  [
    ('train[:2]', [0, 1]),
    ('train[5:]', [5, 6]),
    ('train[2:4]', [2, 3]),
    ('train[:1]+train[6:]', [0, 6]),
    ('train[50%:]', [4, 5, 6]),
  ],
)
def test_splits_as_tfds_slices_them(things, split, want):
  source = records.RecordSource(things, split)
  assert [source[i]['place/corner'][0] for i in range(len(source))] == want
  shard, row = (0, want[-1]) if want[-1] < 3 else (1, want[-1] - 3)
  assert source.key(len(want) - 1).endswith(f'-{shard:05d}-of-00002[{row}]')


def test_select_leaves_out_what_is_not_asked_for(things, monkeypatch):
  source = records.RecordSource(things).select(['image', 'place/depth'])
  monkeypatch.setattr(tfds.features.Image, 'decode_example_np', lambda *_: pytest.fail('a mask was decoded in vain'))
  assert source[4].keys() == source.features.keys()
  assert 'mask' not in source.features and 'image' in source.features


def test_pipeline_over_records(things):
  chain = images.parse('decode | random_crop(8) | flip | normalize')
  made = pipeline.Pipeline(records.RecordSource(things), chain, 4, fields=('image', 'mask', 'label'))
  batch = made.batch(0)
  assert (
    batch['image'].shape == (4, 8, 8, 3) and batch['mask'].shape == (4, 8, 8, 1) and batch['label'].dtype == np.int32
  )
  ids = np.concatenate([made.batch(s)['label'] for s in range(7)])
  assert np.bincount(ids).tolist() == [12, 8, 8]  # four epochs of 3, 2, 2


def break_shard(things):
  (path,) = things.glob('*-00001-of-*')
  data = bytearray(path.read_bytes())
  middle = len(data) // 2 if path.name.count('tfrecord') else data.index(b'label') + 20
  data[middle : middle + 20] = bytes(20)
  path.write_bytes(data)


def test_broken_record_is_corrupt_and_named(things):
  break_shard(things)
  source = records.RecordSource(things, verify=True)
  got = source.getmany(range(7))
  broken = [i for i, e in enumerate(got) if isinstance(e, sources.CorruptExample)]
  assert 1 <= len(broken) <= 2 and min(broken) >= 3
  with pytest.raises(sources.CorruptExample):
    source[broken[0]]


def test_bytes_that_are_no_example_are_corrupt(things):
  source = records.RecordSource(things)
  with pytest.raises(sources.CorruptExample):
    source._example(b'\xff\xff not a proto')


def test_find_takes_the_newest_version_unless_told(tmp_path):
  folders = {v: prepare(tmp_path, 'tfrecord', version=v) for v in ('1.0.0', '2.9.0', '2.10.0')}
  (tmp_path / 'things' / '3.0.0.incomplete').mkdir()
  assert str(records.find('things', tmp_path)) == str(folders['2.10.0'])
  assert str(records.find('things:1.0.0', tmp_path)) == str(folders['1.0.0'])
  assert str(records.find('things:2.*.*', tmp_path)) == str(folders['2.10.0'])
  assert str(records.find('things/2.9.0', tmp_path)) == str(folders['2.9.0'])


def test_missing_data_says_what_is_there_and_how_to_prepare(tmp_path, monkeypatch):
  prepare(tmp_path, 'tfrecord')
  with pytest.raises(
    MissingData, match=r"other is not prepared under .*holds cache?.*things.*builder\('other', data_dir="
  ):
    (tmp_path / 'cache').mkdir()
    records.find('other', tmp_path)
  with pytest.raises(MissingData, match='holds 1.0.0'):
    records.find('things:9.0.0', tmp_path)
  with pytest.raises(MissingData, match='does not exist'):
    records.find('things', tmp_path / 'nowhere')
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  assert records.find('things').name == '1.0.0'


def test_wrong_splits_name_the_right_ones(things):
  for split in ('valid', 'train[:x]'):
    with pytest.raises(ConfigError, match=r'splits here: train \(7\)'):
      records.RecordSource(things, split)
  with pytest.raises(ConfigError, match='empty'):
    records.RecordSource(things, 'train[:0]')


def test_format_without_random_access_names_the_conversion(tmp_path):
  folder = prepare(tmp_path, 'tfrecord')
  info = json.loads((folder / 'dataset_info.json').read_text())
  (folder / 'dataset_info.json').write_text(json.dumps({**info, 'fileFormat': 'riegeli'}))
  with pytest.raises(MissingData, match='tfds convert_format'):
    records.RecordSource(folder)


def test_tensorflow_is_never_imported(things, tmp_path):
  """Even where it is installed: a package of that name lies on the path, and nothing may touch it."""
  (tmp_path / 'fake' / 'tensorflow').mkdir(parents=True)
  (tmp_path / 'fake' / 'tensorflow' / '__init__.py').write_text('')
  code = f"""
import sys
sys.path.insert(0, {str(tmp_path / 'fake')!r})
from mim_jax.data import images, mixtures, pipeline
source = mixtures.open_sources('tfds:things, tfds:things:train[:3]', data_dir={str(tmp_path)!r})
made = pipeline.Pipeline(source, images.parse('decode | random_crop(8) | normalize'), 4, fields=('image', 'label'))
with made.iterate() as batches:
  next(batches)
assert 'tensorflow' not in sys.modules, 'imported'
import tensorflow
assert tensorflow.__file__.startswith({str(tmp_path)!r})
"""
  root = pathlib.Path(__file__).parents[2]
  done = subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
