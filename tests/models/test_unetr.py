"""UNETR's decoder: its parts against plain definitions, its shapes; for the whole see `methods/test_hi_end_mae`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.models import unetr


def test_up_is_a_transposed_convolution_of_stride_two():
  x = jax.random.normal(jax.random.key(0), (2, 3, 2, 4, 5))
  module = unetr.Up(6)
  params = module.init(jax.random.key(1), x)
  kernel = params['params']['kernel']
  assert kernel.shape == (5, 2, 2, 2, 6) and np.abs(kernel).max() <= 1 / 48**0.5
  y = module.apply(params, x)
  assert y.shape == (2, 6, 4, 8, 6)
  for place in np.ndindex(6, 4, 8):
    inner, corner = np.divmod(place, 2)
    expected = x[(slice(None), *inner)] @ kernel[(slice(None), *corner)]
    np.testing.assert_allclose(y[(slice(None), *place)], expected, atol=1e-5)


def test_instance_norm_is_per_example_and_channel():
  x = 3 + 2 * jax.random.normal(jax.random.key(0), (2, 4, 5, 6, 3))
  y = np.asarray(unetr.instance_norm(x))
  np.testing.assert_allclose(y.mean((1, 2, 3)), 0, atol=1e-5)
  np.testing.assert_allclose(y.var((1, 2, 3)), 1, atol=1e-4)
  assert unetr.instance_norm(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_shortcut_has_weights_only_where_channels_change():
  x = jnp.zeros((1, 4, 4, 4, 3))
  names = lambda features: set(jax.eval_shape(unetr.Residual(features).init, jax.random.key(0), x)['params'])
  assert names(3) == {'conv1', 'conv2'} and names(5) == {'conv1', 'conv2', 'conv3'}


@pytest.mark.parametrize(
  ('spatial', 'grid'), [((24, 36, 12), (2, 3, 1)), ((16, 16, 16), (2, 2, 2)), ((32, 32), (2, 2))]
)
def test_logits_lie_on_the_image_whatever_the_patch(spatial, grid):
  image, tokens = jnp.zeros((2, *spatial, 1)), [jnp.zeros((2, int(np.prod(grid)), 8), jnp.bfloat16)] * 4
  module = unetr.Decoder(grid, classes=3, features=2, dtype='bfloat16')
  (logits, stages), variables = jax.eval_shape(
    lambda: module.init_with_output(jax.random.key(0), image, tokens, stages=True)
  )
  assert logits.shape == (2, *spatial, 3) and logits.dtype == jnp.float32
  sides = {name: value.shape[1] // grid[0] for name, value in stages.items() if name not in ('encoder1', 'decoder2')}
  assert sides == {'encoder2': 8, 'encoder3': 4, 'encoder4': 2, 'decoder5': 2, 'decoder4': 4, 'decoder3': 8}
  assert {stage.dtype for stage in stages.values()} == {jnp.dtype('bfloat16')}
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
