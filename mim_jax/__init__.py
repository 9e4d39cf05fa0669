"""Masked image modelling in JAX: 27 methods on one trainer."""

__version__ = '0.1.0'

_LAZY = ('load_encoder', 'load_teacher')  # in mim_jax.encoder, whose imports take seconds


def __getattr__(name):
  if name in _LAZY:
    from mim_jax import encoder

    return getattr(encoder, name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__():
  return [*globals(), *_LAZY]
