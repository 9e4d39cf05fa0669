"""Contrast of two embeddings of the same examples, and negatives drawn by similarity (CLIP, ALBEF, BLIP)."""

import jax
import jax.numpy as jnp

from mim_jax.ops import losses


def unit(z):
  """z [..., F] over its length, which counts as 1e-12 at least."""
  return z / jnp.maximum(jnp.linalg.norm(z, axis=-1, keepdims=True), 1e-12)


def clip_loss(first, second, temperature, share=0.5):
  """(loss, logits [B, B]) of embeddings [B, F] of the same B examples (CLIP, arXiv 2103.00020, figure 3).

  Row b of the logits compares first[b] with every row of `second`, by the cosine over `temperature`. The loss is
  `share` of the cross-entropy over rows and the rest of that over columns.
  """
  logits = unit(first) @ unit(second).T / temperature
  own = jnp.arange(len(logits))
  rows, columns = losses.cross_entropy(logits, own), losses.cross_entropy(logits.T, own)
  return share * rows + (1 - share) * columns, logits


def negative_weights(logits, floor=1e-4):
  """Weights of every column as a negative of each row: softmax(logits [B, B]) + floor, and 0 on the diagonal.

  No gradient goes through them (ALBEF, arXiv 2107.07651, section 3.2).
  """
  weights = jax.nn.softmax(jax.lax.stop_gradient(logits)) + floor
  return weights * (1 - jnp.eye(len(logits)))


def pick(weights, gumbel):
  """One column for each row, in proportion to weights [B, B], by standard Gumbel noise [B, B] -> int [B]."""
  return jnp.argmax(jnp.log(weights) + gumbel, axis=1)  # log 0 = -inf is never the largest where B > 1
