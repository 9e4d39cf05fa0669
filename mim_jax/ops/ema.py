"""Exponential moving averages of trees."""

import jax


def blend(old, new, momentum):
  """momentum * old + (1 - momentum) * new for every leaf, in the dtype of `old`; momentum [] or float, in [0, 1]."""
  return jax.tree.map(lambda o, n: (momentum * o + (1 - momentum) * n).astype(o.dtype), old, new)
