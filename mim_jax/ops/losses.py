"""Losses on arrays; every reduction over examples is a plain mean, so it is exact on any mesh."""

import jax
import jax.numpy as jnp


def masked_mse(pred, target, mask):
  """Mean squared error of the hidden patches: pred, target [B, N, P], mask [B, N] (1 = hidden) -> scalar.

  Each hidden patch weighs the same (MAE section 3, "Reconstruction target"). Every row of `mask` must hide the same number of patches;
  where it does not, the denominator belongs in `draws['counts']`.
  """
  per_patch = jnp.mean(jnp.square(pred.astype(jnp.float32) - target), axis=-1)
  return jnp.sum(per_patch * mask) / jnp.sum(mask)


def cross_entropy(logits, labels):
  """Mean of -sum(labels * log softmax(logits)): logits [B, C], labels [B, C] probabilities or [B] int -> scalar."""
  log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
  if labels.ndim == logits.ndim - 1:
    labels = jax.nn.one_hot(labels, logits.shape[-1])
  return -jnp.mean(jnp.sum(labels * log_probs, axis=-1))


def dice(logits, labels, eps=1e-6):
  """Mean over examples and classes, background included, of 1 - 2 sum(p g) / (sum g^2 + sum p^2 + eps), sums over space.

  logits [B, *spatial, C], p their softmax; labels [B, *spatial] int, g their one-hot form. MONAI 1.2's DiceLoss, squared_pred.
  """
  p = jax.nn.softmax(logits.astype(jnp.float32))
  g = jax.nn.one_hot(labels, logits.shape[-1])
  total = lambda x: jnp.sum(x, axis=tuple(range(1, x.ndim - 1)))
  return jnp.mean(1 - 2 * total(p * g) / (total(g * g) + total(p * p) + eps))


def token_cross_entropy(logits, labels, count):
  """Sum of -log softmax(logits)[label] over the places with a label, over `count`: logits [B, L, V], labels [B, L] int, < 0 for none.

  `count` is the number of labels of the whole step, at least 1 (`draws['counts']`).
  """
  log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
  own = jnp.take_along_axis(log_probs, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
  return -jnp.sum(jnp.where(labels >= 0, own, 0)) / count


def token_accuracy(logits, labels, count):
  """Share of the labels that have the largest logit; arguments as in `token_cross_entropy`."""
  return jnp.sum((jnp.argmax(logits, axis=-1) == labels) & (labels >= 0)) / count


def sigmoid_cross_entropy(logits, labels):
  """Mean of -(y log s + (1 - y) log(1 - s)), s = sigmoid(logits): logits, labels y [B, C] in [0, 1] -> scalar."""
  logits, labels = logits.astype(jnp.float32), labels.astype(jnp.float32)
  return -jnp.mean(labels * jax.nn.log_sigmoid(logits) + (1 - labels) * jax.nn.log_sigmoid(-logits))


def smooth_l1(pred, target, beta=1.0):
  """Elementwise |d| - beta / 2 where |d| = |pred - target| is beta or more, d^2 / (2 beta) below: float32 of the common shape."""
  error = jnp.abs(pred.astype(jnp.float32) - target)
  return jnp.where(error < beta, 0.5 * jnp.square(error) / beta, error - 0.5 * beta)


def cosine(pred, target):
  """Mean of 1 - cos(pred, target) over all tokens: [B, N, F] each -> scalar."""
  unit = lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-8)
  return 1 - jnp.mean(jnp.sum(unit(pred.astype(jnp.float32)) * unit(target.astype(jnp.float32)), axis=-1))
