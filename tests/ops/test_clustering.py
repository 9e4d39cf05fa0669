import numpy as np
from sklearn.cluster import KMeans

from mim_jax.ops import clustering


def test_lloyd_is_that_of_another_library(rng):
  x = np.concatenate([rng.normal(size=(40, 5)) + 4 * rng.normal(size=5) for _ in range(4)]).astype(np.float32)
  start = x[rng.permutation(len(x))[:4]]
  theirs = KMeans(4, init=start, n_init=1, max_iter=50, tol=0, algorithm='lloyd').fit(x)
  centroids, ids = clustering.lloyd(x, start, 50)
  np.testing.assert_allclose(centroids, theirs.cluster_centers_, atol=1e-4)
  np.testing.assert_array_equal(ids, theirs.labels_)


def test_a_cluster_without_members_stays(rng):
  x = rng.normal(size=(20, 3)).astype(np.float32)
  far = np.float32([[0, 0, 0], [100, 100, 100]])
  centroids, ids = clustering.lloyd(x, far, 3)
  np.testing.assert_allclose(centroids, [x.mean(0), far[1]], atol=1e-6)
  assert not ids.any()


def test_the_first_of_equally_near_ones_counts():
  assert clustering.nearest(np.zeros((1, 2), np.float32), np.float32([[1, 0], [-1, 0], [0, 1]])) == 0
