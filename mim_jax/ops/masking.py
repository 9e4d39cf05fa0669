"""Random masking by noise, and moving tokens between the kept order and raster order. All shapes are static."""

import functools

import jax
import jax.numpy as jnp

from mim_jax.ops import placement


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


PROPOSALS, ROUNDS = 32, 64  # windows tried at once, and how often


def blocks(key, grid, count: int, min_block: int = 16, max_block: int = 0, aspect: float = 0.3):
  """One mask of rectangles that hides exactly `count` cells of `grid` (rows, columns): key -> bool [rows * columns].

  BEiT's blockwise masking (arXiv 2106.08254, algorithm 1) in the form of Atten4Vis/CAE, furnace/masking_generator.py:
  rectangles of an area uniform between `min_block` and what is still to be hidden (at most `max_block`, by default
  `count`) and of height / width log-uniform in [aspect, 1 / aspect] go to uniform places; one is taken if it is smaller
  than the grid on both sides and hides at least one new cell and no more than still wanted. Many windows are tried at
  once and the first that fits is taken, which is the same distribution. Where `ROUNDS` rounds do not reach `count` (a
  grid in which hardly any window fits), random cells make up the rest.

  Use under `jax.vmap` over keys. True = hidden. Raises ValueError if nothing or everything would be hidden.
  """
  rows, columns = grid
  if not 0 < count < rows * columns:
    raise ValueError(f'{count} of {rows * columns} cells cannot be hidden: at least one must be hidden and one kept')
  loop_key, rest_key = jax.random.split(key)
  y, x = jnp.arange(rows)[:, None], jnp.arange(columns)[:, None]

  def propose(state):
    mask, hidden, i = state
    cap = count - hidden
    cap = jnp.minimum(cap, max_block) if max_block else cap
    area, ratio, top, left = jax.random.uniform(jax.random.fold_in(loop_key, i), (4, PROPOSALS))
    area = min_block + (cap - min_block) * area  # the ends may stand in either order
    ratio = jnp.exp(jnp.log(aspect) * (1 - 2 * ratio))
    height, width = jnp.round(jnp.sqrt(area * ratio)), jnp.round(jnp.sqrt(area / ratio))
    fits = (height >= 1) & (width >= 1) & (height < rows) & (width < columns)
    top, left = jnp.floor(top * (rows - height + 1)), jnp.floor(left * (columns - width + 1))
    down, across = (y >= top) & (y < top + height), (x >= left) & (x < left + width)  # [rows, P], [columns, P]
    new = height * width - jnp.einsum('yp,yx,xp->p', *(a.astype(jnp.float32) for a in (down, mask, across)))
    fits &= (new > 0) & (new <= cap)
    first = jnp.argmax(fits)
    window = down[:, first, None] & across[None, :, first] & fits[first]
    mask = mask | window
    return mask, jnp.sum(mask, dtype=jnp.int32), i + 1

  start = jnp.zeros((rows, columns), bool), jnp.int32(0), jnp.int32(0)
  mask, _, _ = jax.lax.while_loop(lambda state: (state[1] < count) & (state[2] < ROUNDS), propose, start)
  chosen = jnp.where(mask.reshape(-1), 2.0, jax.random.uniform(rest_key, (rows * columns,)))
  return jnp.argsort(jnp.argsort(-chosen, stable=True), stable=True) < count


def split(mask, count: int):
  """mask [B, N] that hides exactly `count` tokens of every row -> visible ids [B, N - count], hidden ids [B, count].

  Both in raster order, int32.
  """
  order = jnp.argsort(mask.astype(bool), axis=1, stable=True).astype(jnp.int32)
  return order[:, : mask.shape[1] - count], order[:, mask.shape[1] - count :]


def visible(keep_ids, count: int):
  """keep_ids [B, K] -> bool [B, count], True for the tokens that are kept. A comparison: XLA scatters one row at a time."""
  return jnp.any(keep_ids[..., None] == jnp.arange(count), axis=1)


def pick(tokens, keep_ids):
  """`take` for ids that differ from each other within a row, with a gradient that is a gather as well."""
  return _pick(tokens, keep_ids, tokens.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _pick(tokens, keep_ids, count):
  del count
  return take(tokens, keep_ids)


def _pick_forward(tokens, keep_ids, count):
  return _pick(tokens, keep_ids, count), keep_ids


def _pick_backward(count, keep_ids, grad):
  same = keep_ids[:, None, :] == jnp.arange(count)[:, None]  # [B, N, K]
  found = take(placement.by_rows(grad), placement.by_rows(jnp.argmax(same, axis=-1)))
  return placement.by_rows(jnp.where(jnp.any(same, axis=-1)[..., None], found, 0)), None


_pick.defvjp(_pick_forward, _pick_backward)
