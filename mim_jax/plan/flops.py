"""Model FLOPs: what the mathematics of a training step needs, whatever the compiler makes of it.

Two operations for each multiplication with addition in every matrix product and convolution of the loss and of its
gradient, read off their JAX expression with nothing computed twice. Norms, softmax, activations, the optimizer and
moving tokens count nothing; a frozen network counts forward only. For a transformer block of width D with an MLP of 4 D
on N tokens that is 2 (12 N D^2 + 2 N^2 D) forward and twice that backward.
"""

import math

import jax
from jax.interpreters import partial_eval

from mim_jax import method, step
from mim_jax.ops import placement
from mim_jax.plan import inputs

FORMULA = (
  '2 per multiply-add of every matrix product in the loss and its gradient, nothing recomputed; '
  'frozen networks forward only'
)


def per_image(cfg) -> float:
  """Model FLOPs of a training step per example of its batch."""
  options = cfg.method.copy_and_resolve_references()
  options.scan, options.remat = True, 'none'
  built = method.build(options)

  def gradient(params, state, frozen, batch, draws, at):
    train = {'params': params, 'state': state, 'step': at}
    with placement.nowhere():  # kernels, and products that stand for transposes on CPUs, are no part of the mathematics
      (loss, _), grads = step.gradients(built, train, frozen, batch, draws, 1)
    return loss, grads

  closed = jax.make_jaxpr(gradient)(*inputs.abstract(built, cfg.batch_size))
  used, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
  return count(used) / cfg.batch_size


def count(jaxpr) -> float:
  """FLOPs of matrix products and convolutions in a jaxpr: loops times their length, of branches the dearest."""
  return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation) -> float:
  name, params = equation.primitive.name, equation.params
  if name == 'dot_general':
    (contracted, _), _ = params['dimension_numbers']
    lhs = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(lhs[d] for d in contracted)
  if name == 'conv_general_dilated':
    kernel, numbers = equation.invars[1].aval.shape, params['dimension_numbers']
    taps = math.prod(kernel[d] for d in numbers.rhs_spec[1:])  # input features of a group, and space
    return (
      2.0
      * math.prod(equation.outvars[0].aval.shape)
      * taps
      / math.prod(params['lhs_dilation'])
      / params['batch_group_count']
    )
  inner = [count(sub) for sub in _subs(params)]
  if name == 'cond':
    return max(inner, default=0.0)
  times = {'scan': lambda: params['length'], 'pallas_call': lambda: math.prod(params['grid_mapping'].grid)}.get(
    name, lambda: 1
  )()
  return times * sum(inner)


def _subs(params):
  for value in params.values():
    for item in value if isinstance(value, tuple | list) else (value,):
      sub = getattr(item, 'jaxpr', item)  # of a ClosedJaxpr
      if hasattr(sub, 'eqns'):
        yield sub
