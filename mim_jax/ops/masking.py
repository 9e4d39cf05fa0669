"""Random masking by noise, and moving tokens between the kept order and raster order. All shapes are static."""

import jax
import jax.numpy as jnp


def keep_count(tokens: int, mask_ratio: float) -> int:
  """Tokens kept of `tokens`: truncated in double precision exactly as facebookresearch/mae does (0.9 of 100 keeps 9, not 10).

  Raises ValueError when nothing would be kept or nothing hidden.
  """
  kept = int(tokens * (1 - mask_ratio))
  if not 0 < kept < tokens:
    raise ValueError(
      f'mask_ratio {mask_ratio} keeps {kept} of {tokens} tokens; at least one must be kept and one hidden'
    )
  return kept


def keep_smallest(noise, kept: int):
  """Keeps the `kept` tokens of smallest noise in each row (MAE section 3, "random sampling").

  noise [B, N] -> keep_ids [B, K] int32 in ascending noise order, restore_ids [B, N] int32 (place of each raster token in the kept-first
  order), mask [B, N] float32, 1 = hidden. Ties keep raster order.
  """
  shuffle = jnp.argsort(noise, axis=1, stable=True).astype(jnp.int32)
  restore_ids = jnp.argsort(shuffle, axis=1, stable=True).astype(jnp.int32)
  return shuffle[:, :kept], restore_ids, (restore_ids >= kept).astype(jnp.float32)


def take(tokens, ids):
  """tokens [B, N, D] at ids [B, K] -> [B, K, D]."""
  return jnp.take_along_axis(tokens, ids[..., None], axis=1)


def place(kept, fill, keep_ids, restore_ids):
  """Puts kept tokens [B, K, D] at their raster places and `fill` [1, 1, D] everywhere else -> [B, N, D]."""
  hidden = restore_ids[..., None] >= kept.shape[1]
  return jnp.where(hidden, fill.astype(kept.dtype), _raster(kept, keep_ids, restore_ids))


# The K kept tokens go to K different places, so the gradient of this gather is a gather by keep_ids. Autodiff would write a scatter-add,
# which TPUs and CPUs do one row at a time.
@jax.custom_vjp
def _raster(kept, keep_ids, restore_ids):
  del keep_ids
  return take(kept, jnp.minimum(restore_ids, kept.shape[1] - 1))


def _raster_forward(kept, keep_ids, restore_ids):
  return _raster(kept, keep_ids, restore_ids), keep_ids


def _raster_backward(keep_ids, grad):
  return take(grad, keep_ids), None, None


_raster.defvjp(_raster_forward, _raster_backward)
