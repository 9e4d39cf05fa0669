import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.ops import masking


@pytest.mark.parametrize('tokens, ratio, kept', [(196, 0.75, 49), (196, 0.9, 19), (100, 0.9, 9), (196, 0.7, 58)])
def test_counts_are_truncated_as_in_the_official_code(tokens, ratio, kept):
  assert masking.keep_count(tokens, ratio) == kept


@pytest.mark.parametrize('ratio', [0.0, 0.99])
def test_something_is_kept_and_something_hidden(ratio):
  with pytest.raises(ValueError, match='keeps'):
    masking.keep_count(64, ratio)


def test_smallest_noise_is_kept_in_its_order():
  keep_ids, restore_ids, mask = masking.keep_smallest(jnp.array([[0.5, 0.1, 0.9, 0.3]]), 2)
  np.testing.assert_array_equal(keep_ids, [[1, 3]])
  np.testing.assert_array_equal(mask, [[1, 0, 1, 0]])
  np.testing.assert_array_equal(restore_ids, [[2, 0, 3, 1]])


def test_place_puts_tokens_back_and_its_gradient_is_that_of_indexing():
  noise = jax.random.uniform(jax.random.key(0), (3, 10))
  kept = jax.random.normal(jax.random.key(1), (3, 4, 5))
  fill = jax.random.normal(jax.random.key(2), (1, 1, 5))
  keep_ids, restore_ids, _ = masking.keep_smallest(noise, 4)

  def plain(kept, fill):
    rows = jnp.concatenate([kept, jnp.broadcast_to(fill, (3, 6, 5))], axis=1)
    return jnp.take_along_axis(rows, restore_ids[..., None], axis=1)

  placed = masking.place(kept, fill, keep_ids, restore_ids)
  np.testing.assert_array_equal(placed, plain(kept, fill))
  np.testing.assert_array_equal(masking.take(placed, keep_ids), kept)
  weight = jax.random.normal(jax.random.key(3), placed.shape)
  ours = jax.grad(lambda *a: jnp.sum(masking.place(*a, keep_ids, restore_ids) * weight), (0, 1))(kept, fill)
  theirs = jax.grad(lambda *a: jnp.sum(plain(*a) * weight), (0, 1))(kept, fill)
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_pick_is_take_with_the_same_gradient():
  tokens = jax.random.normal(jax.random.key(0), (3, 10, 5))
  keep_ids, _, mask = masking.keep_smallest(jax.random.uniform(jax.random.key(1), (3, 10)), 4)
  np.testing.assert_array_equal(masking.visible(keep_ids, 10), mask == 0)
  np.testing.assert_array_equal(masking.pick(tokens, keep_ids), masking.take(tokens, keep_ids))
  weight = jax.random.normal(jax.random.key(2), (3, 4, 5))
  ours, theirs = (
    jax.grad(lambda x, form=form: jnp.sum(form(x, keep_ids) * weight))(tokens) for form in (masking.pick, masking.take)
  )
  np.testing.assert_array_equal(ours, theirs)


def components(mask):
  """Number of 4-connected groups of hidden cells of a mask [rows, columns]."""
  left, count = {tuple(cell) for cell in np.argwhere(mask)}, 0
  while left:
    count, front = count + 1, [left.pop()]
    while front:
      y, x = front.pop()
      near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & left
      left -= near
      front += near
  return count


def test_blocks_hide_exactly_the_count_in_few_pieces():
  """98 of 14 x 14 as in CAE: the official generator makes 1.4 pieces on average, uniformly random masks 18."""
  make = jax.jit(jax.vmap(lambda key: masking.blocks(key, (14, 14), 98)))
  masks = np.asarray(make(jax.random.split(jax.random.key(0), 500)))
  assert masks.dtype == bool and set(masks.sum(1)) == {98}
  assert np.mean([components(mask.reshape(14, 14)) for mask in masks[:200]]) < 3
  assert len({mask.tobytes() for mask in masks}) == 500
  assert masks.mean(0).min() > 0.01 and masks.mean(0).max() < 0.95  # corners seldom, the middle often, nothing always


@pytest.mark.parametrize('grid, count, smallest', [((2, 2), 3, 16), ((3, 9), 1, 16), ((6, 6), 35, 2), ((8, 8), 32, 4)])
def test_blocks_hide_the_count_on_any_grid(grid, count, smallest):
  make = jax.jit(jax.vmap(lambda key: masking.blocks(key, grid, count, smallest)))
  assert set(np.asarray(make(jax.random.split(jax.random.key(0), 8))).sum(1)) == {count}


def test_blocks_cannot_hide_everything():
  with pytest.raises(ValueError, match='one kept'):
    masking.blocks(jax.random.key(0), (2, 2), 4)


def test_split_lists_both_halves_in_raster_order():
  visible, hidden = masking.split(jnp.array([[1, 0, 0, 1], [0, 0, 1, 1]]) > 0, 2)
  np.testing.assert_array_equal(visible, [[1, 2], [0, 1]])
  np.testing.assert_array_equal(hidden, [[0, 3], [2, 3]])
