import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.ops import hog


def pixels(seed=0, shape=(2, 16, 24, 3)):
  return jax.random.randint(jax.random.key(seed), shape, 0, 256).astype(jnp.uint8)


def by_hand(image, bins, cell):
  """One image [H, W] with loops, in double precision."""
  height, width = image.shape
  image = image.astype(np.float64)
  out = np.zeros((height // cell, width // cell, bins))
  for y in range(height):
    for x in range(width):
      rows = image[y + 1, x] - image[y - 1, x] if 0 < y < height - 1 else 0.0
      columns = image[y, x + 1] - image[y, x - 1] if 0 < x < width - 1 else 0.0
      angle = np.degrees(np.arctan2(rows, columns)) % 180
      out[y // cell, x // cell, int(angle // (180 / bins)) % bins] += np.hypot(rows, columns) / cell**2
  return out


@pytest.mark.parametrize('bins, cell', [(9, 8), (9, 4), (6, 8)])
def test_histograms_are_those_of_the_definition(bins, cell):
  image = pixels()
  ours = hog.histograms(image, bins, cell)
  assert ours.shape == (2, 16 // cell, 24 // cell, bins, 3) and ours.dtype == jnp.float32
  for b in range(2):
    for c in range(3):
      np.testing.assert_allclose(
        ours[b, ..., c], by_hand(np.asarray(image[b, ..., c]), bins, cell), rtol=1e-5, atol=1e-5
      )


def test_an_image_and_its_negative_have_the_same_histograms():
  image = pixels(1)
  np.testing.assert_array_equal(hog.histograms(image), hog.histograms(255 - image))


@pytest.mark.parametrize('step', [3, -3])
def test_a_ramp_from_left_to_right_is_in_the_first_bin(step):
  ramp = jnp.broadcast_to(step * jnp.arange(24) + (0 if step > 0 else 200), (1, 16, 24))[..., None].astype(jnp.uint8)
  found = np.asarray(hog.histograms(ramp))
  np.testing.assert_allclose(found[:, :, 1, 0], 2 * abs(step), rtol=1e-6)  # away from the left and right border
  assert not found[..., 1:, :].any()


def test_gradients_at_the_border_are_zero():
  rows, columns = hog.gradients(pixels(2).astype(jnp.float32))
  assert not np.any(rows[:, [0, -1]]) and not np.any(columns[:, :, [0, -1]])
  assert np.any(rows[:, :, [0, -1]]) and np.any(columns[:, [0, -1]])


def test_whitening_and_back():
  exact = hog.histograms(pixels(3))
  whitened = hog.whiten(exact)
  np.testing.assert_allclose(whitened.mean(-2), 0, atol=1e-5)
  np.testing.assert_allclose(whitened.var(-2), 1, atol=1e-4)
  np.testing.assert_allclose(hog.undo_whiten(whitened, exact), exact, atol=1e-3)
  assert not np.any(hog.whiten(hog.histograms(jnp.full((1, 16, 16, 3), 7, jnp.uint8))))


def test_cells_must_tile_the_image():
  with pytest.raises(ValueError, match='16 x 24'):
    hog.histograms(pixels(), cell=5)


def test_strokes_lie_along_edges():
  step = jnp.zeros((1, 16, 16, 1), jnp.uint8).at[:, :, 4:].set(255)  # a vertical edge in the left cells
  drawn = np.asarray(hog.draw(hog.histograms(step)[..., 0], 8))[0]
  assert drawn.shape == (16, 16)
  assert drawn[:8, 3:5].mean() > 3 * drawn[3:5, :8].mean() and not drawn[:, 8:].any()
