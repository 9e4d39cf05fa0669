import jax
import jax.numpy as jnp
import numpy as np

from mim_jax.ops import contrast


def test_length_and_order_do_not_matter(rng):
  a, b = (jnp.asarray(rng.normal(size=(5, 8)), jnp.float32) for _ in range(2))
  value, logits = contrast.clip_loss(a, b, 0.1)
  order = np.array([2, 0, 4, 1, 3])
  np.testing.assert_allclose(contrast.clip_loss(3 * a, 0.2 * b, 0.1)[0], value, rtol=1e-5)
  np.testing.assert_allclose(contrast.clip_loss(a[order], b[order], 0.1)[0], value, rtol=1e-5)
  expected = -np.log(np.exp(10.0) / (np.exp(10.0) + 4))
  np.testing.assert_allclose(contrast.clip_loss(jnp.eye(5), jnp.eye(5), 0.1)[0], expected, atol=1e-6)
  assert np.isfinite(contrast.clip_loss(jnp.zeros((3, 4)), jnp.zeros((3, 4)), 0.1)[0])


def test_share_weighs_rows_against_columns(rng):
  a, b = (jnp.asarray(rng.normal(size=(5, 8)), jnp.float32) for _ in range(2))
  rows, columns = (contrast.clip_loss(a, b, 0.1, share)[0] for share in (1.0, 0.0))
  assert rows != columns
  np.testing.assert_allclose(contrast.clip_loss(a, b, 0.1, 0.25)[0], 0.25 * rows + 0.75 * columns, rtol=1e-6)
  np.testing.assert_allclose(contrast.clip_loss(b, a, 0.1, 1.0)[0], columns, rtol=1e-6)


def test_negatives_are_drawn_in_proportion_to_their_weights_and_never_themselves(rng):
  weights = contrast.negative_weights(jnp.asarray(rng.normal(size=(4, 4)), jnp.float32))
  assert not np.diag(weights).any() and (np.asarray(weights) + np.eye(4) > 0).all()
  drawn = jax.vmap(lambda key: contrast.pick(weights, jax.random.gumbel(key, (4, 4))))(
    jax.random.split(jax.random.key(0), 20_000)
  )
  share = np.stack([np.bincount(drawn[:, b], minlength=4) / len(drawn) for b in range(4)])
  np.testing.assert_allclose(share, weights / weights.sum(1, keepdims=True), atol=0.015)


def test_no_gradient_goes_through_the_weights(rng):
  logits = jnp.asarray(rng.normal(size=(4, 4)), jnp.float32)
  assert not np.any(jax.grad(lambda x: jnp.sum(contrast.negative_weights(x) ** 2))(logits))
