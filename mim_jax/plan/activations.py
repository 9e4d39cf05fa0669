"""Memory that the gradient needs of the forward pass, whatever the compiler makes of it."""

import math

import jax

from mim_jax import method, step


def kept_per_image(cfg, mesh) -> float | None:
  """Bytes per example of the arrays that differentiation keeps from the forward pass, under the config's remat policy, on the devices
  of `mesh` together. None for methods that make their gradients themselves.

  It is what grows with the batch among the residuals of `jax.vjp`. The compiler may keep less, when it computes something again that is
  cheap, and needs gradients, optimizer and work space besides.
  """
  built = method.build(cfg.method)
  if built.grads is not None:
    return None
  one, two = (_residuals(cfg, built, mesh, times * cfg.batch_size) for times in (1, 2))
  return (two - one) / cfg.batch_size


def _residuals(cfg, built, mesh, batch_size) -> int:
  batch = built.abstract_batch(batch_size)
  key = jax.eval_shape(lambda: jax.random.key(0))
  params = jax.eval_shape(built.init, key, batch)
  state, frozen = jax.eval_shape(built.state, params), jax.eval_shape(built.frozen, key, batch)
  draws = jax.eval_shape(built.draw, key, batch)

  def backward(params, state, frozen, batch, draws, at):
    return jax.vjp(lambda params: built.loss(params, state, frozen, batch, draws, at)[0], params)[1]

  traced = step.traced_on(mesh, backward, cfg.fused_attention)
  kept = jax.eval_shape(traced, params, state, frozen, batch, draws, jax.ShapeDtypeStruct((), 'int32'))
  return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
