import numpy as np
import pytest

from mim_jax.data import order, sources


def make(n, seed=0, **options):
  return order.Order(sources.ArraySource({'x': np.arange(n)}), seed, **options)


@pytest.fixture(params=['small', 'large'])
def regime(request, monkeypatch):
  if request.param == 'large':  # as if the set were too large to hold its permutation
    monkeypatch.setattr(order, 'SMALL', 0)


@pytest.mark.parametrize('n, small', [(1, 1 << 16), (2, 1 << 16), (3, 1 << 16), (1000, 1 << 16), (1000, 0)])
def test_each_epoch_is_a_permutation_and_epochs_differ(n, small, monkeypatch):
  monkeypatch.setattr(order, 'SMALL', small)
  epochs = make(n)(np.arange(3 * n)).reshape(3, n)
  np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(n), (3, 1)))
  if n >= 100:
    fixed = (epochs[0] == epochs[1]).mean()
    assert fixed < 0.1


def test_shuffled_order_has_no_trend(regime):
  n = 4096
  indices = make(n)(np.arange(n))
  assert abs(np.corrcoef(np.arange(n), indices)[0, 1]) < 0.06
  assert abs(np.corrcoef(indices[:-1], indices[1:])[0, 1]) < 0.06


def test_seeds_are_unrelated(regime):
  n = 1000
  first = [make(n, seed)(np.arange(2 * n)).reshape(2, n)[:, :20] for seed in range(4)]
  orders = {tuple(epoch) for epochs in first for epoch in epochs}
  assert len(orders) == 8  # seed s, epoch 1 is not seed s + 1, epoch 0


def test_any_position_can_be_asked_for(regime):
  made = make(1000)
  far = np.array([10**12 + 5, 3, 10**12 + 5])
  got = made(far)
  assert got[0] == got[2] and got[1] == make(1000)(np.arange(10))[3]


def test_without_shuffle_the_order_is_that_of_the_source():
  assert make(3, shuffle=False)(np.arange(7)).tolist() == [0, 1, 2, 0, 1, 2, 0]
