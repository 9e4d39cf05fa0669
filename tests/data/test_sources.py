import numpy as np
import pytest

from mim_jax.data import images, mixtures, pipeline, sources
from mim_jax.errors import ConfigError, MissingData


def fields(n=12):
  rng = np.random.default_rng(0)
  return {'image': rng.integers(0, 256, (n, 6, 7, 3), np.uint8), 'label': np.arange(n) % 5}


def test_array_source():
  source = sources.ArraySource({**fields(), 'caption': [f'number {i}' for i in range(12)]})
  assert len(source) == 12 and source.classes() == 5 and source.key(3) == 'arrays[3]'
  assert source[3]['caption'] == 'number 3' and source[3]['label'] == 3
  assert source.features['image'] == sources.Feature((6, 7, 3), np.dtype(np.uint8))
  assert source.features['caption'].dtype == object
  assert [int(e['label']) for e in source.getmany(np.array([4, 11]))] == [4, 1]
  for index in (-1, 12):
    with pytest.raises(IndexError):
      source[index]


def test_array_source_needs_one_length():
  for bad in ({'a': np.zeros(3), 'b': np.zeros(4)}, {'a': np.zeros(0)}, {}):
    with pytest.raises(ConfigError, match='same, positive number'):
      sources.ArraySource(bad)


def test_arrays_from_a_file(tmp_path):
  np.savez(tmp_path / 'x.npz', **fields())
  source = sources.open_source(f'arrays:{tmp_path / "x.npz"}')
  np.testing.assert_array_equal(source[5]['image'], fields()['image'][5])
  with pytest.raises(MissingData, match='numpy.savez'):
    sources.open_source(f'arrays:{tmp_path / "y.npz"}')
  (tmp_path / 'z.npz').write_bytes(b'not a zip')
  with pytest.raises(ConfigError, match='cannot be read'):
    sources.open_source(f'arrays:{tmp_path / "z.npz"}')


@pytest.mark.parametrize('spec', ['cifar10', 'tfds:', 'tfrecord:x', '', 'tfds:a b'])
def test_wrong_specs(spec):
  with pytest.raises(ConfigError, match='expected'):
    sources.open_source(spec)


@pytest.mark.parametrize(
  'rest, want',
  [
    ('cifar10', ('cifar10', 'train')),
    ('cifar10:test', ('cifar10', 'test')),
    ('imagenet2012_subset/1pct:5.1.0:train[:1%]', ('imagenet2012_subset/1pct:5.1.0', 'train[:1%]')),
    ('cifar10:3.*.*', ('cifar10:3.*.*', 'train')),
    ('cifar10/3.0.2:train[10:20]+test', ('cifar10/3.0.2', 'train[10:20]+test')),
  ],
)
def test_names_and_splits(rest, want):
  assert sources._name_and_split(f'tfds:{rest}', rest) == want


class Encoded(sources.ArraySource):
  """Images as PNG bytes, two of them broken in different ways."""

  def __init__(self):
    super().__init__({**fields(), 'name': [f'n{i}' for i in range(12)]}, 'encoded')
    self.reads = 0

  def _read(self, index):
    self.reads += 1
    if index == 2:
      raise sources.CorruptExample('no such sector')
    example = super()._read(index)
    data = images.cv2.imencode('.png', example['image'][..., ::-1])[1].tobytes()
    return {**example, 'image': data[:30] if index == 7 else data}

  getmany = sources.Source.getmany


def test_cache_holds_decoded_images_and_reads_once():
  inner = Encoded()
  source = sources.CachedSource(inner, chunk=5)
  assert inner.reads == 12 and len(source) == 12
  for i in (0, 5, 11):
    np.testing.assert_array_equal(source[i]['image'], fields()['image'][i])
    assert source[i]['label'] == i % 5 and source[i]['name'] == f'n{i}'
  assert source.features['image'] == sources.Feature((6, 7, 3), np.dtype(np.uint8))
  assert source.classes() == 5
  assert inner.reads == 12


def test_cache_keeps_broken_examples_broken():
  source = sources.CachedSource(Encoded())
  made = pipeline.Pipeline(source, images.parse('decode | flip'), 12, shuffle=False, fields=('image', 'label'))
  batch = made.batch(0)
  assert np.flatnonzero(batch['corrupt']).tolist() == [2, 7]
  assert made.faults[0] == (0, 'encoded[2]', 'no such sector')
  assert batch['label'][[2, 7]].tolist() == [3, 3]


def test_cached_batches_equal_uncached_ones():
  whole = sources.ArraySource(fields())
  chain = images.parse('decode | random_crop(5) | flip | normalize')
  plain = pipeline.Pipeline(whole, chain, 8).batch(3)
  cached = pipeline.Pipeline(sources.CachedSource(whole), chain, 8).batch(3)
  for k in plain:
    np.testing.assert_array_equal(plain[k], cached[k])


def test_cache_needs_one_shape():
  ragged = np.empty(3, object)
  ragged[:] = [np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4, 3), np.uint8), np.zeros((5, 4, 3), np.uint8)]
  with pytest.raises(ConfigError, match=r'ragged\[2\], \(5, 4, 3\); set data.cache=False'):
    sources.CachedSource(sources.ArraySource({'image': ragged}, 'ragged'))


def test_real_images(cifar10):
  source = mixtures.open_sources('tfds:cifar10:train[:64]', data_dir=str(cifar10))
  assert source.classes() == 10 and source.features['label'].names[0] == 'airplane'
  made = pipeline.Pipeline(source, images.parse('decode | flip | normalize'), 16, fields=('image', 'label'))
  cached = mixtures.open_sources('tfds:cifar10:train[:64]', data_dir=str(cifar10), cache=True)
  again = pipeline.Pipeline(cached, images.parse('decode | flip | normalize'), 16, fields=('image', 'label'))
  for step in (0, 5):
    np.testing.assert_array_equal(made.batch(step)['image'], again.batch(step)['image'])
  assert made.batch(0)['image'].shape == (16, 32, 32, 3)
