import eval_cases as cases
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from mim_jax.evals import features, knn, suite


@pytest.fixture(params=[1, 8])
def mesh(request):
  return cases.mesh_of(request.param)


@pytest.fixture
def small_blocks(monkeypatch):
  """Blocks that the cases below fill several times, with a rest."""
  monkeypatch.setattr(knn, 'BANK', 64)
  monkeypatch.setattr(knn, 'QUERIES', 8)
  knn._programs.cache_clear()
  yield
  knn._programs.cache_clear()


def test_votes_are_those_of_sklearn(mesh, small_blocks, rng):
  train, labels, test = rng.normal(size=(301, 16)), rng.integers(5, size=301), rng.normal(size=(157, 16))
  votes = knn.votes(train, labels, test, 5, mesh, k=20, temperature=0.07)
  theirs = KNeighborsClassifier(20, weights=lambda distance: np.exp((1 - distance) / 0.07), metric='cosine').fit(
    train, labels
  )
  np.testing.assert_allclose(votes / votes.sum(1, keepdims=True), theirs.predict_proba(test), atol=1e-5)


def test_only_the_direction_of_features_counts(rng):
  mesh = cases.mesh_of(1)
  train, labels, test = rng.normal(size=(50, 8)), rng.integers(3, size=50), rng.normal(size=(20, 8))
  scaled = knn.votes(train * rng.uniform(1, 9, size=(50, 1)), labels, 5 * test, 3, mesh)
  np.testing.assert_allclose(scaled, knn.votes(train, labels, test, 3, mesh), rtol=1e-4)


def test_ties_go_to_the_earlier_example(mesh, small_blocks):
  train = np.tile(np.eye(4), (40, 1))  # every direction forty times, over several blocks
  labels = np.where(np.arange(160) < 4, 6, np.arange(160) % 3)
  votes = knn.votes(train, labels, np.eye(4), 7, mesh, k=1)
  assert votes.argmax(1).tolist() == [6, 6, 6, 6]


def test_equal_votes_go_to_the_lower_class(mesh):
  votes = knn.votes(np.eye(3)[[0, 0]], np.array([2, 1]), np.eye(3)[:1], 3, mesh, k=2)
  assert votes.tolist() == [[0, 1, 1]] and votes.argmax(1) == 1


def test_fewer_examples_than_neighbours(mesh):
  votes = knn.votes(np.eye(3), np.arange(3), np.eye(3), 3, mesh, k=20)
  np.testing.assert_allclose(votes, np.eye(3) + (1 - np.eye(3)) * np.exp(-1 / 0.07), rtol=1e-5)


def test_a_case_with_a_known_answer(mesh):
  data = cases.Data(mesh, {'a': cases.images(101, 0, noise=0.05), 'b': cases.images(53, 1, noise=0.05)})
  cfg = suite.settings('knn', {'train': 'a', 'test': 'b', 'batch_size': 16})
  assert knn.run(features.raw_pixels(), cfg, data.context()) == {'top1': 1.0, 'top5': 1.0, 'class_mean': 1.0}
  data.sets['b']['label'] = (data.sets['b']['label'] + 1) % cases.CLASSES
  assert knn.run(features.raw_pixels(), cfg, data.context())['top1'] == 0.0


def test_stop_is_polled_between_blocks(small_blocks, rng):
  calls = []

  def check_stop():
    calls.append(1)
    if len(calls) == 2:
      raise features.Interrupted

  with pytest.raises(features.Interrupted):
    knn.votes(
      rng.normal(size=(200, 4)), np.zeros(200, int), rng.normal(size=(9, 4)), 1, cases.mesh_of(1), check_stop=check_stop
    )
