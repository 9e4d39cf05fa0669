"""Segmentation of volumes: windows, figures, and volumes with a known answer."""

import eval_cases as cases
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.data.sources import CorruptExample
from mim_jax.errors import ConfigError, UserError
from mim_jax.evals import features, suite, volume_segment

CROP = 8
GIVEN = {
  'train': 'a',
  'test': 'b',
  'classes': 3,
  'taps': (1, 1, 2),
  'width': 2,
  'batch_size': 8,
  'train_batch': 8,
  'epochs': 8,
  'warmup_epochs': 1,
  'base_lr': 0.5,
}


@pytest.mark.parametrize(
  ('length', 'side', 'overlap', 'expected'),
  [
    (96, 96, 0.5, [0]),
    (97, 96, 0.5, [0, 1]),
    (192, 96, 0.5, [0, 48, 96]),
    (200, 96, 0.5, [0, 48, 96, 104]),
    (20, 8, 0.0, [0, 8, 12]),
  ],
)
def test_windows_cover_an_axis(length, side, overlap, expected):
  assert volume_segment.starts(length, side, overlap) == expected


@pytest.mark.parametrize('spatial', [(8, 8, 8), (11, 8, 17), (5, 9, 3)])
@pytest.mark.parametrize('overlap', [0.0, 0.5])
def test_windows_put_a_volume_together(rng, spatial, overlap):
  volume = rng.normal(size=(*spatial, 2)).astype(np.float32)
  sizes = []

  def predict(windows):
    sizes.append(windows.shape)
    return 2 * windows + 1

  found = volume_segment.sliding_window(predict, volume, (8, 8, 8), overlap, batch=3)
  np.testing.assert_allclose(found, 2 * volume + 1, atol=1e-6)
  assert set(sizes) == {(3, 8, 8, 8, 2)}


def test_scores_are_averaged_where_windows_overlap():
  calls = iter(range(10))
  found = volume_segment.sliding_window(
    lambda windows: np.full((1, *windows.shape[1:-1], 1), next(calls), np.float32),
    np.zeros((6, 4, 4, 1)),
    (4, 4, 4),
    0.5,
    1,
  )
  np.testing.assert_allclose(found[:, 0, 0, 0], [0, 0, 0.5, 0.5, 1, 1])


def test_absent_classes_do_not_count():
  nan = np.nan
  dice = np.array([[0.9, 0.5, nan, 1.0], [0.7, nan, nan, 0.5], [1.0, nan, nan, nan]])
  found = volume_segment.figures(dice)
  assert found == pytest.approx(
    {'dice': (0.75 + 0.5) / 2, 'dice_all': (0.8 + 0.6 + 1.0) / 3, 'class1/dice': 0.5, 'class3/dice': 0.75}
  )


def volumes(count, seed, sides=(CROP,) * 3):
  """Volumes whose voxels have one of three grey values each, which are the classes."""
  rng = np.random.default_rng(seed)
  mask = rng.integers(3, size=(count, *sides))
  image = (mask[..., None] - 1 + 0.1 * rng.normal(size=(*mask.shape, 1))).astype(np.float32)
  return {'image': image, 'mask': mask.astype(np.uint8)}


class Data(cases.Data):
  """`cases.Data` whose test volumes are read one by one, and may be broken."""

  def open_source(self, spec):
    return _Source(self.sets[spec])


class _Source:
  def __init__(self, data):
    self.data = data

  def __len__(self):
    return len(self.data['image'])

  def __getitem__(self, index):
    if self.data.get('broken') == index:
      raise CorruptExample('half a file')
    return {name: self.data[name][index] for name in ('image', 'mask')}

  def key(self, index):
    return f'volume {index}'


def _encode(variables, batch, layers=False):
  """Patches of 4 voxels through two matrices."""
  image = batch['image'].reshape(-1, 2, 4, 2, 4, 2, 4).transpose(0, 1, 3, 5, 2, 4, 6).reshape(-1, 8, 64)
  first = image @ variables['params']['embed']
  second = jnp.tanh(first @ variables['params']['blocks'])
  return {'tokens': second, **({'layers': jnp.stack([first, second])} if layers else {})}


def encoder(options=('layers',)):
  keys = jax.random.split(jax.random.key(0))
  params = {'embed': jax.random.normal(keys[0], (64, 6)) / 8, 'blocks': jax.random.normal(keys[1], (6, 6)) / 3}
  return features.Encoder('trained', None, {'params': params, 'state': {}}, _encode, frozenset(options))


def run(count, test, **given):
  data = Data(cases.mesh_of(count), {'a': volumes(64, 0), 'b': test})
  context, drawn = data.context(), {}
  context.picture = drawn.__setitem__
  return volume_segment.run(encoder(), suite.settings('volume_segment', GIVEN | given), context), data.lines, drawn


class Light(nn.Module):
  """In place of UNETR's decoder, which takes long to compile: a polynomial of each voxel and a hint from its token."""

  grid: tuple[int, ...]
  classes: int
  features: int
  dtype: str

  @nn.compact
  def __call__(self, image, layers):
    assert len(layers) == 4 and {z.shape for z in layers} == {(len(image), 8, 6)} and self.grid == (2, 2, 2)
    hint = nn.Dense(self.classes)(jnp.concatenate(layers, axis=-1)).reshape(len(image), *self.grid, self.classes)
    voxel = nn.Dense(self.classes)(jnp.concatenate([image, image**2], axis=-1))
    return 10 * voxel + 0.01 * jax.image.resize(hint, voxel.shape, 'nearest')


@pytest.mark.parametrize('count', [1, 8])
def test_a_case_with_a_known_answer(count, monkeypatch):
  monkeypatch.setattr(volume_segment.unetr, 'Decoder', Light)
  test = volumes(3, 1, sides=(12, 8, 10)) | {'broken': 1}
  found, lines, drawn = run(count, test)
  assert found['dice'] > 0.95 and found['dice_all'] > 0.95
  assert {'class1/dice', 'class2/dice', 'train_loss'} <= set(found)
  assert any('volume 1 cannot be read' in line for line in lines)
  assert list(drawn) == ['volume_segment_trained'] and drawn['volume_segment_trained'].dtype == np.uint8


@pytest.mark.slow
def test_a_case_with_a_known_answer_by_unetr():
  found, *_ = run(1, volumes(3, 1, sides=(12, 8, 10)))
  assert found['dice'] > 0.9


def test_settings_that_do_not_fit():
  with pytest.raises(ConfigError, match='gives no|does not give'):
    volume_segment.check(suite.settings('volume_segment', GIVEN), frozenset())
  with pytest.raises(ConfigError, match='three blocks'):
    volume_segment.check(suite.settings('volume_segment', GIVEN | {'taps': (1, 2)}), frozenset({'layers'}))
  with pytest.raises(ConfigError, match='blocks 1 to 2'):
    run(1, volumes(1, 1), taps=(1, 2, 3))


def test_labels_that_are_no_class_say_so(monkeypatch):
  monkeypatch.setattr(volume_segment.unetr, 'Decoder', Light)
  test = volumes(1, 1)
  test['mask'][0, 0, 0, 0] = 7
  with pytest.raises(UserError, match='labels from 0 to 7; expected 0 to 2'):
    run(1, test, epochs=2)
