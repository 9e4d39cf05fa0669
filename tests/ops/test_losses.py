import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.ops import losses


@pytest.mark.parametrize('beta', [1.0, 2.0])
def test_smooth_l1_is_square_near_zero_and_linear_beyond(beta):
  error = jnp.array([0.0, 0.5 * beta, beta, 3 * beta, -3 * beta])
  expected = np.array([0.0, 0.125, 0.5, 2.5, 2.5]) * beta
  np.testing.assert_allclose(losses.smooth_l1(error, jnp.zeros(5), beta), expected, rtol=1e-6)
  slope = jax.vmap(jax.grad(lambda d: losses.smooth_l1(d, 0.0, beta)))(error)
  np.testing.assert_allclose(slope, [0, 0.5, 1, 1, -1], atol=1e-6)


def test_dice_is_the_squared_form_of_each_example_and_class():
  logits = jax.random.normal(jax.random.key(0), (2, 3, 4, 5, 3))
  labels = jax.random.randint(jax.random.key(1), (2, 3, 4, 5), 0, 2)  # class 2 is absent
  p, g = np.asarray(jax.nn.softmax(logits)), np.eye(3)[np.asarray(labels)]
  terms = [
    1 - 2 * np.sum(p[b, ..., c] * g[b, ..., c]) / (np.sum(p[b, ..., c] ** 2) + np.sum(g[b, ..., c] ** 2) + 1e-6)
    for b in range(2)
    for c in range(3)
  ]
  np.testing.assert_allclose(losses.dice(logits, labels), np.mean(terms), rtol=1e-6)
  present = jnp.concatenate([jnp.arange(3), jnp.zeros(57, int)]).reshape(1, 3, 4, 5)
  np.testing.assert_allclose(losses.dice(1e3 * jax.nn.one_hot(present, 3), present), 0, atol=1e-6)


def test_sigmoid_cross_entropy_is_its_formula_and_holds_for_large_scores():
  logits, labels = jax.random.normal(jax.random.key(0), (4, 3)), jax.random.uniform(jax.random.key(1), (4, 3))
  s = jax.nn.sigmoid(logits)
  expected = -np.mean(labels * np.log(s) + (1 - labels) * np.log(1 - s))
  np.testing.assert_allclose(losses.sigmoid_cross_entropy(logits, labels), expected, rtol=1e-5)
  twice = losses.sigmoid_cross_entropy(jnp.tile(logits, 2), jnp.tile(labels, 2))  # a mean over classes too
  np.testing.assert_allclose(twice, expected, rtol=1e-5)
  np.testing.assert_allclose(losses.sigmoid_cross_entropy(jnp.array([[200.0]]), jnp.array([[0.0]])), 200.0)
