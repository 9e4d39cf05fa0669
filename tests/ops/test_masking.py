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
