"""Weighted k-nearest-neighbour classifier on frozen features (Wu et al. 2018, arXiv 1805.01978, section 3.4).

Cosine similarity; each of the k nearest training examples votes for its class with exp(similarity / temperature);
k = 20 and temperature 0.07 are those of facebookresearch/dino, eval_knn.py. Exact search: the training features pass
the devices in blocks, the test features are spread over them. Each device does the same fixed-size products whatever
the number of devices, and ties go to the earlier example and the lower class, so figures do not depend on the mesh.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mim_jax.evals import features, metrics

DEFAULTS = {
  **features.DEFAULTS,
  'k': 20,
  'temperature': 0.07,
  'bootstrap': 0,  # resamples of the test set for 95 % intervals of its figures; 0 for none
}

QUERIES = 128  # test rows per product and device
BANK = 8192  # training rows per block


def normalised(x) -> np.ndarray:
  """Rows [n, D] scaled to unit length (zero rows stay zero), float32."""
  x = np.asarray(x, np.float32)
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _merge(best, labels_of_best, queries, bank, bank_labels, count):
  """Nearest so far [q, k] and one more block of the bank (its first `count` rows are real) -> nearest of both.

  Ties go to the earlier row.
  """

  def rows(part):
    best, labels_of_best, queries = part
    similarity = jnp.matmul(queries, bank.T, precision=jax.lax.Precision.HIGHEST)
    similarity = jnp.where(jnp.arange(len(bank)) < count, similarity, -jnp.inf)
    labels = jnp.broadcast_to(bank_labels, similarity.shape)
    both = jnp.concatenate([best, similarity], axis=1)
    best, places = jax.lax.top_k(both, best.shape[1])  # of equal values the first
    return best, jnp.take_along_axis(jnp.concatenate([labels_of_best, labels], axis=1), places, axis=1)

  blocks = jax.tree.map(lambda x: x.reshape(-1, QUERIES, *x.shape[1:]), (best, labels_of_best, queries))
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(rows, blocks))


def _vote(similarity, labels, temperature, classes):
  """Neighbours [q, k], nearest first -> votes per class [q, classes], scaled so that the nearest has weight 1."""
  weights = jnp.exp((similarity - similarity[:, :1]) / temperature)

  def add(votes, neighbour):
    weight, label = neighbour
    return votes + weight[:, None] * jax.nn.one_hot(label, classes), None

  # One neighbour after another, by rank: a scatter would leave the order of the sum open.
  return jax.lax.scan(add, jnp.zeros((len(labels), classes)), (weights.T, labels.T))[0]


@functools.lru_cache(maxsize=4)
def _programs(mesh, classes):
  spread, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
  merge = jax.shard_map(
    _merge, mesh=mesh, in_specs=(spread, spread, spread, whole, whole, whole), out_specs=(spread, spread)
  )
  vote = functools.partial(_vote, classes=classes)
  return jax.jit(merge, donate_argnums=(0, 1)), jax.jit(vote, out_shardings=NamedSharding(mesh, whole))


def votes(train, train_labels, test, classes, mesh, k=20, temperature=0.07, check_stop=lambda: None) -> np.ndarray:
  """Votes per class [n_test, classes] for test [n_test, D] from train [n_train, D], train_labels [n_train]."""
  k = min(k, len(train))
  merge, vote = _programs(mesh, classes)
  spread, whole = NamedSharding(mesh, PartitionSpec(mesh.axis_names)), NamedSharding(mesh, PartitionSpec())

  def put(x, sharding):
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

  rows = -(-len(test) // (QUERIES * mesh.size)) * QUERIES * mesh.size
  queries = put(np.pad(normalised(test), ((0, rows - len(test)), (0, 0))), spread)
  best = put(np.full((rows, k), -np.inf, np.float32), spread)
  labels_of_best = put(np.zeros((rows, k), np.int32), spread)
  size = min(BANK, len(train))
  for start in range(0, len(train), size):
    check_stop()
    bank, labels = train[start : start + size], np.asarray(train_labels[start : start + size], np.int32)
    count, short = len(bank), size - len(bank)
    bank = np.pad(normalised(bank), ((0, short), (0, 0)))
    best, labels_of_best = merge(
      best, labels_of_best, queries, put(bank, whole), put(np.pad(labels, (0, short)), whole), np.int32(count)
    )
  return np.asarray(vote(best, labels_of_best, np.float32(temperature)))[: len(test)]


def run(encoder: features.Encoder, cfg, ctx: features.Context) -> dict[str, float]:
  """top1, top5 and class_mean (fractions), see `features.best_of` for several kinds of features."""
  train, train_labels, test, test_labels, classes = features.train_and_test(encoder, ctx, cfg)

  def figures(name):
    scores = votes(train[name], train_labels, test[name], classes, ctx.mesh, cfg.k, cfg.temperature, ctx.check_stop)
    return metrics.with_intervals(
      lambda rows: metrics.classification(scores[rows], test_labels[rows]), len(scores), cfg.bootstrap
    )

  return features.best_of({name: figures(name) for name in train}, say=ctx.say)
