import numpy as np
import pytest

from mim_jax.data import images
from mim_jax.errors import ConfigError


def run(text, image, seed=0, **fields):
  return images.parse(text).example({'image': image, **fields}, np.random.default_rng(seed))


def test_a_share_of_the_images_stays_as_it_is(rng):
  image = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
  text = 'decode | set_aside(10, p={}) | random_resized_crop(10, scale=(0.2, 0.3)) | take_back'
  plain = run('decode | resize((10, 10))', image)['image']
  np.testing.assert_array_equal(run(text.format(1.0), image)['image'], plain)
  assert (run(text.format(0.0), image)['image'] != plain).any()
  kept = [np.array_equal(run(text.format(0.3), image, seed)['image'], plain) for seed in range(300)]
  assert 0.2 < np.mean(kept) < 0.4
  assert set(run(text.format(1.0), image)) == {'image'}


def test_rotation_keeps_the_middle_and_stays_within_its_range():
  image = np.zeros((41, 41, 3), np.uint8)
  image[18:23, 30:35] = 255  # to the right of the middle
  mask = image[..., :1] > 0
  angles = []
  for seed in range(60):
    out = run('decode | rotate(45)', image, seed, mask=mask)
    y, x = (np.mean(places) - 20 for places in np.nonzero(out['image'][..., 0] > 128))
    assert np.hypot(y, x) == pytest.approx(12, abs=0.7)
    assert np.hypot(*(np.mean(p) - 20 for p in np.nonzero(out['mask'][..., 0]))) == pytest.approx(12, abs=1)
    angles.append(np.degrees(np.arctan2(y, x)))
  assert -47 < min(angles) < -35 and 35 < max(angles) < 47
  np.testing.assert_array_equal(run('decode | rotate(0)', image)['image'], image)


def test_options_are_checked():
  with pytest.raises(ConfigError, match='from 0 to 180'):
    images.parse('decode | rotate(400)')
