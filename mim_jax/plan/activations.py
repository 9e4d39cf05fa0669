"""Memory that the gradient needs of the forward pass, whatever the compiler makes of it."""

import math

import jax

from mim_jax import method, step
from mim_jax.plan import inputs


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
  def backward(params, *rest):
    return jax.vjp(lambda params: built.loss(params, *rest)[0], params)[1]

  kept = jax.eval_shape(step.traced_on(mesh, backward, cfg.fused_attention), *inputs.abstract(built, batch_size))
  return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
