"""Cutting images and volumes into patches and putting them together again; any number of spatial axes."""

import math

import jax.numpy as jnp


def patchify(x, patch):
  """Cuts x [B, *spatial, C] into non-overlapping patches -> [B, N, prod(patch) * C].

  Patches are in raster order (last spatial axis fastest), and so are the values inside a patch, channel last: row, column, channel for
  images, as in facebookresearch/mae `patchify`. `patch` is a tuple with one size per spatial axis, each dividing that axis.
  """
  batch, *spatial, channels = x.shape
  grid = grid_of(spatial, patch)
  rank = len(patch)
  split = [n for g, p in zip(grid, patch, strict=True) for n in (g, p)]
  order = [0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1]
  return (
    x.reshape(batch, *split, channels).transpose(order).reshape(batch, math.prod(grid), math.prod(patch) * channels)
  )


def unpatchify(tokens, grid, patch):
  """Inverse of `patchify`: tokens [B, N, prod(patch) * C] on a grid -> [B, *spatial, C]."""
  rank = len(patch)
  batch = tokens.shape[0]
  channels = tokens.shape[-1] // math.prod(patch)
  order = [0, *[axis for i in range(rank) for axis in (1 + i, 1 + rank + i)], 2 * rank + 1]
  spatial = [g * p for g, p in zip(grid, patch, strict=True)]
  return tokens.reshape(batch, *grid, *patch, channels).transpose(order).reshape(batch, *spatial, channels)


def pictures(target, pred, hidden, grid, patch) -> dict:
  """What most methods show: {'masked', 'prediction', 'pasted': [B, *spatial, C]} of tokens target and pred [B, N, P].

  hidden [B, N] is 1 where a patch was hidden; pasted has predictions there and the target elsewhere.
  """
  hidden, pred = hidden[..., None] == 1, pred.astype(jnp.float32)
  tokens = {
    'masked': jnp.where(hidden, 0, target),
    'prediction': pred,
    'pasted': jnp.where(hidden, pred, target),
  }
  return {name: unpatchify(x, grid, patch) for name, x in tokens.items()}


def grid_of(spatial, patch):
  """Patches per spatial axis; raises ValueError where a patch does not divide its axis."""
  if len(spatial) != len(patch) or any(n % p for n, p in zip(spatial, patch, strict=True)):
    raise ValueError(
      f'patch {tuple(patch)} does not divide an image of {tuple(spatial)}; each side must be a multiple of its patch side'
    )
  return tuple(n // p for n, p in zip(spatial, patch, strict=True))
