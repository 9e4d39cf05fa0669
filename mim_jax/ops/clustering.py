"""k-means with static shapes."""

import jax
import jax.numpy as jnp


def nearest(x, centroids):
  """Index [N] int32 of the centroid [K, D] nearest to each row of x [N, D] (the first of equally near ones)."""
  # Written out, as the cancellation in |x|^2 - 2 x c + |c|^2 may swap near ties.
  distance = jnp.sum(jnp.square(x[:, None] - centroids[None]), axis=-1)
  return jnp.argmin(distance, axis=-1).astype(jnp.int32)


def lloyd(x, centroids, iterations: int):
  """Lloyd's algorithm on x [N, D] from given centroids [K, D] -> (centroids [K, D], index [N] of the nearest of them).

  A cluster without members keeps its centroid.
  """

  def step(centroids, _):
    member = jax.nn.one_hot(nearest(x, centroids), len(centroids))  # [N, K]
    count = jnp.sum(member, axis=0)[:, None]
    means = jnp.matmul(member.T, x, precision=jax.lax.Precision.HIGHEST) / jnp.maximum(count, 1)
    return jnp.where(count > 0, means, centroids), None

  centroids, _ = jax.lax.scan(step, jnp.asarray(centroids, jnp.float32), None, iterations)
  return centroids, nearest(x, centroids)
