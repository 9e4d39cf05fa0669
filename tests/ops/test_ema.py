import jax.numpy as jnp
import numpy as np

from mim_jax.ops import ema


def test_blend():
  old, new = {'a': jnp.array([1.0, 2.0])}, {'a': jnp.array([3.0, 6.0])}
  np.testing.assert_allclose(ema.blend(old, new, 0.75)['a'], [1.5, 3.0])
  np.testing.assert_array_equal(ema.blend(old, new, 1.0)['a'], old['a'])
  np.testing.assert_array_equal(ema.blend(old, new, jnp.float32(0.0))['a'], new['a'])
  half = {'a': old['a'].astype(jnp.bfloat16)}
  assert ema.blend(half, new, 0.5)['a'].dtype == jnp.bfloat16
