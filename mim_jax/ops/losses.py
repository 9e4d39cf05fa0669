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
