"""Model FLOPs against counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from mim_jax import config, method
from mim_jax.plan import flops


def mae_by_hand(width, depth, patch):
  """MAE at 224 with 75 % hidden and the 512 x 8 decoder: three times forward, but for patches, whose pixels need no gradient."""
  patches = (224 // patch) ** 2
  kept, pixels = int(patches * 0.25), patch * patch * 3

  def blocks(tokens, width, depth):
    return depth * (12 * tokens * width**2 + 2 * tokens**2 * width)

  forward = (
    blocks(kept + 1, width, depth)
    + (kept + 1) * width * 512
    + blocks(patches + 1, 512, 8)
    + (patches + 1) * 512 * pixels
  )
  return 2 * (3 * forward + 2 * kept * pixels * width)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize(
  ('size', 'patch', 'numbers', 'giga'),
  [('B', 16, (768, 12), 58.11), ('L', 16, (1024, 24), 123.76), ('H', 14, (1280, 32), 290.41)],
)
def test_mae_per_image_is_the_hand_count(size, patch, numbers, giga, dtype):
  cfg = config.base()
  cfg.method = method.options('mae', size=size, patch=patch, dtype=dtype)
  cfg.batch_size = 8
  found = flops.per_image(cfg)
  assert found == mae_by_hand(*numbers, patch)
  assert found / 1e9 == pytest.approx(giga, abs=0.01)


def test_scan_remat_and_accumulation_change_nothing():
  cfg = config.base()
  cfg.method = method.options('mae', size='mu', decoder='32/2/2', image_size=64)
  cfg.batch_size = 8
  once = flops.per_image(cfg)
  cfg.method.scan, cfg.method.remat, cfg.accumulate = False, 'full', 4
  assert flops.per_image(cfg) == once > 0


def count(f, *args):
  return flops.count(jax.make_jaxpr(f)(*args).jaxpr)


def test_count_of_products_convolutions_loops_and_branches():
  x, image, kernel = jnp.ones((4, 6)), jnp.ones((2, 8, 8, 3)), jnp.ones((4, 4, 3, 5))
  square = jnp.ones((6, 6))
  assert count(lambda x, w: x @ w, x, square) == 2 * 4 * 6 * 6
  conv = lambda a, k: jax.lax.conv_general_dilated(a, k, (4, 4), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  assert count(conv, image, kernel) == 2 * (2 * 2 * 2 * 5) * (4 * 4 * 3)
  assert (
    count(lambda x, w: jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=5)[0], x, square) == 5 * 2 * 4 * 6 * 6
  )
  assert count(lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w @ w), x, square) == 2 * 2 * 4 * 6 * 6


def test_gradient_of_a_frozen_network_is_not_counted():
  frozen, trained = jnp.ones((6, 6)), jnp.ones((6, 6))
  loss = lambda trained, frozen, x: jnp.sum(jax.lax.stop_gradient(x @ frozen) @ trained)
  assert (
    count(jax.grad(loss), trained, frozen, jnp.ones((4, 6))) == 2 * 4 * 36 * 3
  )  # frozen forward; trained forward and gradient
