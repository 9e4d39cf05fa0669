import jax.numpy as jnp
import numpy as np

from mim_jax.ops import colours


def test_the_largest_variance_becomes_colour(rng):
  spread = np.array([5.0, 2.0, 1.0, 0.01, 0.01])
  features = (3.0 + rng.normal(size=(4, 50, 5)) * spread).astype(np.float32)
  colour = colours.principal(jnp.asarray(features))
  shown = np.asarray(colour(features))
  assert shown.shape == (4, 50, 3) and shown.min() >= 0 and shown.max() <= 1
  for channel in range(3):  # red follows the first direction, and so on, whatever its sign
    assert abs(np.corrcoef(shown[..., channel].ravel(), features[..., channel].ravel())[0, 1]) > 0.95
  np.testing.assert_allclose(colour(features.mean((0, 1))), 0.5, atol=1e-5)


def test_what_does_not_vary_is_grey():
  assert np.isfinite(colours.principal(jnp.ones((2, 3, 4)))(jnp.ones((2, 3, 4)))).all()
