"""What a loss is traced with."""

import jax

from mim_jax.method import Method


def abstract(built: Method, batch_size: int) -> tuple:
  """Abstract (params, state, frozen, batch, draws, step): the arguments of `built.loss` for a batch of this size; nothing is allocated."""
  batch = built.abstract_batch(batch_size)
  key = jax.eval_shape(lambda: jax.random.key(0))
  params = jax.eval_shape(built.init, key, batch)
  state, frozen = jax.eval_shape(built.state, params), jax.eval_shape(built.frozen, key, batch)
  return params, state, frozen, batch, jax.eval_shape(built.draw, key, batch), jax.ShapeDtypeStruct((), 'int32')
