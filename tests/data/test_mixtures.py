import numpy as np
import pytest

from mim_jax.data import images, mixtures, order, pipeline, sources
from mim_jax.errors import ConfigError, MissingData


def part(n, first=0, **extra):
  return sources.ArraySource({'x': np.arange(first, first + n), **extra}, f'part{first}')


def draw(mixture, start, stop, seed=0):
  indices = order.Order(mixture, seed)(np.arange(start, stop))
  return np.array([e['x'] for e in mixture.getmany(indices)])


def test_mixture_is_the_sources_end_to_end():
  mixture = mixtures.Mixture([part(3), part(4, 100)])
  assert len(mixture) == 7
  assert [int(mixture[i]['x']) for i in range(7)] == [0, 1, 2, 100, 101, 102, 103]
  assert [int(e['x']) for e in mixture.getmany([6, 0, 3])] == [103, 0, 100]
  assert mixture.key(4) == 'part100/part100[1]'


@pytest.mark.parametrize('weights', [(3, 1), (0.5, 0.25, 0.25), (1, 1e-6), (1, 1, 1, 1, 1, 1, 1)])
def test_block_counts_keep_the_weights(weights):
  counts = mixtures.block_counts(np.array(weights, float))
  assert counts.sum() == mixtures.BLOCK and counts.min() >= 1
  share = np.array(weights) / sum(weights)
  assert np.abs(counts / mixtures.BLOCK - share).max() <= len(weights) / mixtures.BLOCK


def test_shares_follow_the_weights_near_every_place():
  mixture = mixtures.Mixture([part(50), part(50, 100)], weights=(3, 1))
  for start in (0, 10_000, mixtures.BLOCK - 500, 10 * mixtures.BLOCK):
    share = (draw(mixture, start, start + 1000) >= 100).mean()
    assert 0.2 < share < 0.3


def test_without_weights_each_example_is_equally_likely():
  mixture = mixtures.Mixture([part(30), part(10, 100)])
  assert 0.2 < (draw(mixture, 0, 1000) >= 100).mean() < 0.3


def test_each_source_is_repeated_on_its_own(monkeypatch):
  monkeypatch.setattr(mixtures, 'BLOCK', 64)  # the draws cross many blocks
  monkeypatch.setattr(order.mixtures.block_counts, '__defaults__', (64,))
  mixture = mixtures.Mixture([part(7), part(11, 100)], weights=(1, 2))
  drawn = draw(mixture, 0, 640)
  for members in (drawn[drawn < 100], drawn[drawn >= 100] - 100):
    n = members.max() + 1
    whole = members[: len(members) // n * n].reshape(-1, n)
    np.testing.assert_array_equal(np.sort(whole), np.tile(np.arange(n), (len(whole), 1)))
    assert not np.array_equal(whole[0], whole[1])


def test_draws_are_a_function_of_seed_and_position():
  mixture = mixtures.Mixture([part(50), part(50, 100)], weights=(3, 1))
  a = draw(mixture, 0, 200)
  np.testing.assert_array_equal(a, draw(mixture, 0, 200))
  np.testing.assert_array_equal(a[150:], draw(mixture, 150, 200))
  assert not np.array_equal(a, draw(mixture, 0, 200, seed=1))


def test_fields_are_those_in_common():
  a = part(4, label=np.arange(4), only_a=np.zeros(4))
  mixture = mixtures.Mixture([a, part(4, 100, label=np.arange(4) % 2)])
  assert mixture.features.keys() == {'x', 'label'}
  assert mixture[0].keys() == {'x', 'label'}
  with pytest.raises(ConfigError, match='no class labels'):  # 4 classes here, 2 there: not the same labels
    mixture.classes()
  assert mixtures.Mixture([a, part(4, 100, label=np.arange(4))]).classes() == 4
  assert mixture.select(['x']).weights.tolist() == [4, 4]


def test_mixtures_that_cannot_be():
  with pytest.raises(ConfigError, match='field in common'):
    mixtures.Mixture([part(2), sources.ArraySource({'y': np.arange(2)})])
  with pytest.raises(ConfigError, match='number of dims'):
    mixtures.Mixture([part(2), sources.ArraySource({'x': np.zeros((2, 3))})])
  for weights in [(1,), (1, -1), (1, 0), (1, float('nan'))]:
    with pytest.raises(ConfigError, match='2 positive numbers'):
      mixtures.Mixture([part(2), part(2, 100)], weights)


def test_broken_examples_stay_in_their_places():
  class Broken(sources.ArraySource):
    def _read(self, index):
      raise sources.CorruptExample('broken')

    getmany = sources.Source.getmany

  mixture = mixtures.Mixture([part(2), Broken({'x': np.arange(2)})])
  got = mixture.getmany([2, 1, 3])
  assert [isinstance(e, sources.CorruptExample) for e in got] == [True, False, True]


def test_open_sources_from_a_config(tmp_path):
  a, b = str(tmp_path / 'with, comma.npz'), str(tmp_path / 'b.npz')
  np.savez(a, x=np.arange(3))
  np.savez(b, x=np.arange(5))
  both = mixtures.open_sources(f'arrays:{a}, arrays:{b}', weights=(1, 3))
  assert [len(p) for p in both.parts] == [3, 5] and both.weights.tolist() == [1, 3]
  assert len(mixtures.open_sources(f'arrays:{a}')) == 3
  with pytest.raises(ConfigError, match='names one source'):
    mixtures.open_sources(f'arrays:{a}', weights=(1, 3))
  with pytest.raises(MissingData, match='nowhere'):
    mixtures.open_sources(f'arrays:{a}, folder:nowhere')


def test_synthetic_worlds_are_prepared_and_opened(tmp_path):
  spec = 'synthetic:shapes/size=16,train=6,validation=4, synthetic:shapes/size=16,train=6,validation=4:validation[:50%]'
  with pytest.raises(MissingData, match='shapes.*is not prepared.*Prepare it: '):
    mixtures.open_sources(spec, data_dir=str(tmp_path))
  mixtures.prepare(spec, str(tmp_path))
  mixture = mixtures.open_sources(spec, data_dir=str(tmp_path))
  assert mixture.sizes.tolist() == [6, 2]
  assert mixture.parts[1].name.endswith(':validation[:50%]')
  chain = images.parse('decode | flip | normalize')
  batch = pipeline.Pipeline(mixture, chain, 4, fields=('image', 'label', 'mask')).batch(0)
  assert batch['image'].shape == (4, 16, 16, 3) and batch['mask'].shape == (4, 16, 16, 1)
  assert batch['label'].max() < mixture.classes()
