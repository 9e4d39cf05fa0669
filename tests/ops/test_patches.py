import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.ops import patches


@pytest.mark.parametrize('spatial, patch', [((8, 12), (4, 3)), ((6,), (2,)), ((4, 6, 8), (2, 3, 4))])
def test_unpatchify_undoes_patchify(rng, spatial, patch):
  x = rng.standard_normal((2, *spatial, 3))
  tokens = patches.patchify(jnp.asarray(x), patch)
  grid = patches.grid_of(spatial, patch)
  assert tokens.shape == (2, np.prod(grid), np.prod(patch) * 3)
  np.testing.assert_array_equal(patches.unpatchify(tokens, grid, patch), jnp.asarray(x))


def test_raster_order_and_channels_last(rng):
  x = rng.standard_normal((1, 8, 12, 3)).astype(np.float32)
  tokens = patches.patchify(jnp.asarray(x), (4, 3))
  np.testing.assert_array_equal(tokens[0, 5], x[0, 4:8, 3:6].ravel())  # second row, second of four columns


def test_a_patch_must_divide_the_image():
  with pytest.raises(ValueError, match=r'\(10, 12\)'):
    patches.patchify(jnp.zeros((1, 10, 12, 3)), (4, 3))
