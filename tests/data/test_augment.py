"""Colour, RandAugment, blur and erasing, against Pillow, on whose operations the published recipes were tuned."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from mim_jax.data import augment
from mim_jax.errors import ConfigError

FILL = (124, 116, 104)


def picture(height=40, width=52, seed=0):
  """uint8 [H, W, 3]: smooth colours with some noise, not using the whole range."""
  rng = np.random.default_rng(seed)
  y, x = np.mgrid[:height, :width] / max(height, width)
  waves = [100 + 60 * np.sin(5 * x + k) * np.cos(4 * y - k) + rng.normal(0, 6, y.shape) for k in range(3)]
  return np.clip(np.stack(waves, axis=-1), 20, 230).astype(np.uint8)


def generator(seed=0):
  return np.random.Generator(np.random.Philox(seed))


def gap(got, expected):
  """Largest difference in levels."""
  assert got.dtype == np.uint8 and got.shape == np.asarray(expected).shape
  return np.abs(got.astype(int) - np.asarray(expected).astype(int)).max()


# ---- single operations ----


@pytest.mark.parametrize('factor', [0.0, 0.1, 0.7, 1.0, 1.4, 1.9])
def test_enhancements_are_those_of_pillow(factor):
  image = picture()
  pillow = Image.fromarray(image)
  assert gap(augment.brightness(image, factor), ImageEnhance.Brightness(pillow).enhance(factor)) <= 1
  assert gap(augment.contrast(image, factor), ImageEnhance.Contrast(pillow).enhance(factor)) <= 1
  assert gap(augment.saturation(image, factor), ImageEnhance.Color(pillow).enhance(factor)) <= 2
  assert gap(augment.sharpness(image, factor), ImageEnhance.Sharpness(pillow).enhance(factor)) <= 1


def test_histogram_operations_are_those_of_pillow():
  for image in (picture(), np.full((5, 6, 3), 90, np.uint8), np.arange(1800).reshape(20, 30, 3).astype(np.uint8)):
    pillow = Image.fromarray(image)
    assert gap(augment.auto_contrast(image), ImageOps.autocontrast(pillow)) <= 1
    assert gap(augment.equalize(image), ImageOps.equalize(pillow)) == 0
    for threshold in (0, 26, 128, 256):
      assert gap(augment.solarize(image, threshold), ImageOps.solarize(pillow, threshold)) == 0
    for bits in (1, 3, 8):
      assert gap(augment.posterize(image, bits), ImageOps.posterize(pillow, bits)) == 0


def test_solarize_add_lifts_the_dark_half_and_no_bits_are_black():
  image = np.array([0, 100, 127, 128, 250, 20], np.uint8).reshape(1, 2, 3)
  assert augment.solarize_add(image, 99).ravel().tolist() == [99, 199, 226, 128, 250, 119]
  assert augment.solarize_add(image, 150).ravel().tolist() == [150, 250, 255, 128, 250, 170]
  assert not augment.posterize(image, 0).any()


@pytest.mark.parametrize('turn', [-0.5, -0.1, 0.07, 0.3])
def test_hue_turns_as_in_pillow(turn):
  image = picture()
  hsv = np.array(Image.fromarray(image).convert('HSV'))
  hsv[..., 0] += np.uint8(int(turn * 255) % 256)
  expected = np.asarray(Image.fromarray(hsv, 'HSV').convert('RGB')).astype(int)
  assert np.abs(augment.hue(image, turn).astype(int) - expected).mean() < 2
  assert np.abs(augment.hue(image, 0.0).astype(int) - image).mean() < 2


def test_grey_images_have_no_colour_to_change():
  grey = picture()[..., :1]
  for function in (augment.hue, augment.saturation):
    assert function(grey, 0.3) is grey
  for function in (augment.brightness, augment.contrast, augment.sharpness):
    assert function(grey, 0.3).shape == grey.shape


# ---- moves ----


def test_rotation_shear_and_translation_go_the_way_of_pillow():
  image = picture(60, 80)
  pillow, affine = Image.fromarray(image), Image.Transform.AFFINE
  height, width = image.shape[:2]
  options = {'resample': Image.BICUBIC, 'fillcolor': FILL}
  for level in (-0.9, -0.2, 0.5, 1.0):
    expected = {
      'rotate': pillow.rotate(30 * level, **options),
      'shear_x': pillow.transform(pillow.size, affine, (1, 0.3 * level, 0, 0, 1, 0), **options),
      'shear_y': pillow.transform(pillow.size, affine, (1, 0, 0, 0.3 * level, 1, 0), **options),
      'translate_x': pillow.transform(pillow.size, affine, (1, 0, 0.45 * level * width, 0, 1, 0), **options),
      'translate_y': pillow.transform(pillow.size, affine, (1, 0, 0, 0, 1, 0.45 * level * height), **options),
    }
    for name, theirs in expected.items():
      ours = augment.operate({'image': image}, name, level)['image']
      assert np.abs(ours.astype(int) - np.asarray(theirs)).mean() < 2.0, name
      assert np.abs(ours.astype(int) - image).mean() > 4, name


def test_a_whole_pixel_translation_is_exact_and_filled():
  image = picture(20, 20)
  moved = augment.operate({'image': image}, 'translate_x', 1 / 0.45 * 3 / 20)['image']
  np.testing.assert_array_equal(moved[:, :-3], image[:, 3:])
  assert (moved[:, -3:] == FILL).all()


@pytest.mark.parametrize('name', ['rotate', 'shear_x', 'shear_y', 'translate_x', 'translate_y'])
@pytest.mark.parametrize('level', [-0.6, 0.4])
def test_mask_and_boxes_move_with_the_image(name, level):
  image, mask = np.full((80, 100, 3), 30, np.uint8), np.zeros((80, 100), np.int16)
  image[30:50, 40:70], mask[30:50, 40:70] = 230, 9
  example = {'image': image, 'mask': mask, 'boxes': np.array([[40, 30, 70, 50], [0, 0, 0, 0]], np.float32)}
  moved = augment.operate(example, name, level, fill=(30, 30, 30))
  assert ((moved['image'][..., 0] > 130) != (moved['mask'] == 9)).mean() < 0.01
  assert moved['mask'].dtype == mask.dtype
  y, x = np.nonzero(moved['mask'])
  box, empty = moved['boxes']
  assert np.abs(box - [x.min(), y.min(), x.max() + 1, y.max() + 1]).max() < 1.6
  assert (empty[2] - empty[0]) * (empty[3] - empty[1]) == 0
  assert mask[30, 40] == 9 and example['boxes'][0, 0] == 40  # the inputs stay


# ---- RandAugment ----


def test_the_operations_are_the_fifteen_of_the_increasing_set():
  assert set(augment.OPERATIONS) == {
    'auto_contrast', 'brightness', 'color', 'contrast', 'equalize', 'invert', 'posterize', 'rotate', 'sharpness',
    'shear_x', 'shear_y', 'solarize', 'solarize_add', 'translate_x', 'translate_y',
  }  # fmt: skip


@pytest.mark.parametrize('name', augment.OPERATIONS)
def test_a_higher_level_changes_more(name):
  image = picture()

  def change(level):
    return np.abs(augment.operate({'image': image}, name, level)['image'].astype(int) - image).mean()

  if name in ('auto_contrast', 'equalize', 'invert'):
    assert change(0.1) == change(-0.9) > 1
  else:
    for sign in (-1, 1):
      assert change(sign * 0.2) < change(sign * 0.6) < change(sign * 1.0)


def test_level_nine_has_the_published_strengths():
  ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=-1)

  def values(name, level=0.9):
    return augment.operate({'image': ramp}, name, level)['image'][0, :, 0].tolist()

  assert values('posterize') == [v & 0b10000000 for v in range(256)]
  assert values('solarize') == [v if v < 26 else 255 - v for v in range(256)]
  assert values('solarize_add') == [v + 99 if v < 128 else v for v in range(256)]
  assert values('brightness') == [min(255, int(v * 1.81)) for v in range(256)]
  assert values('brightness', -0.9) == [int(v * (1 - 0.81)) for v in range(256)]


def test_rand_augment_draws_operations_levels_and_signs_evenly(monkeypatch):
  calls = []
  monkeypatch.setattr(augment, 'operate', lambda example, name, level, fill: calls.append((name, level)) or example)
  rng, example = generator(), {'image': picture()}
  for _ in range(6000):
    augment.rand_augment(example, rng)
  names, levels = zip(*calls, strict=True)
  assert abs(len(calls) / 6000 - 1.0) < 0.05  # two operations, each half of the time
  counts = np.array([names.count(name) for name in augment.OPERATIONS]) / len(calls)
  assert np.abs(counts - 1 / 15).max() < 0.015
  strength = 10 * np.abs(levels)
  assert strength.max() <= 10 and abs(np.median(strength) - 9) < 0.03 and abs(strength.std() - 0.5) < 0.03
  assert abs((np.array(levels) < 0).mean() - 0.5) < 0.03


def test_rand_augment_without_operations_changes_nothing():
  image = picture()
  for options in ({'p': 0.0}, {'ops': 0}):
    assert augment.rand_augment({'image': image}, generator(), **options)['image'] is image


@pytest.mark.parametrize('image', [picture()[..., :1], picture().astype(np.float32), np.zeros((4, 4, 12), np.uint8)])
def test_rand_augment_wants_rgb_bytes(image):
  with pytest.raises(ConfigError, match='rand_augment works on 8-bit images of 3 channels'):
    augment.rand_augment({'image': image}, generator())


# ---- the others ----


def test_color_jitter_is_done_with_its_probability_and_within_its_range():
  rng, image = generator(), np.full((6, 6, 3), 100, np.uint8)
  options = {'brightness': 0.4, 'contrast': 0, 'saturation': 0, 'hue': 0}
  jitter = lambda **options: augment.color_jitter({'image': image}, rng, **options)['image'][0, 0, 0]
  values = np.array([jitter(p=0.8, **options) for _ in range(2000)])
  done = values[values != 100]
  assert abs(len(done) / 2000 - 0.8) < 0.04
  assert 60 <= done.min() < 63 and 137 < done.max() <= 140
  strong = np.array([jitter(**{**options, 'brightness': 3.0}) for _ in range(500)])
  assert strong.min() < 20 and (strong == 0).mean() < 0.05  # the range ends at factor 0, it does not pile up there


def test_color_jitter_applies_its_four_changes_in_every_order(monkeypatch):
  orders = set()
  names = ('b', 'c', 's', 'h')
  order = []
  monkeypatch.setattr(augment, '_JITTER', [lambda image, factor, n=n: order.append(n) or image for n in names])
  rng, example = generator(), {'image': picture()}
  for _ in range(400):
    order.clear()
    augment.color_jitter(example, rng)
    orders.add(tuple(order))
  assert len(orders) == 24


def test_color_jitter_wants_bytes():
  with pytest.raises(ConfigError, match='color_jitter works on 8-bit images of 1 or 3 channels, found float32'):
    augment.color_jitter({'image': picture().astype(np.float32)}, generator())


def test_grayscale_keeps_three_equal_channels_of_luma():
  image = picture()
  got = augment.grayscale({'image': image}, generator(), p=1.0)['image']
  luma = np.asarray(Image.fromarray(image).convert('L'))
  assert gap(got, np.repeat(luma[..., None], 3, axis=-1)) <= 1
  assert augment.grayscale({'image': image}, generator(), p=0.0)['image'] is image


def test_gaussian_blur_spreads_a_point_by_sigma():
  point = np.zeros((41, 41, 1), np.float32)
  point[20, 20] = 1
  for kernel in (0, 29):
    got = augment.gaussian_blur({'image': point}, generator(), kernel, sigma=(2.0, 2.0), p=1.0)['image']
    assert got.shape == point.shape and abs(got.sum() - 1) < 1e-4
    spread = (got.sum(axis=(1, 2)) * (np.arange(41) - 20) ** 2).sum() ** 0.5
    assert abs(spread - 2) < 0.05
  rng = generator()
  blurred = [augment.gaussian_blur({'image': point}, rng)['image'][20, 20, 0] < 1 for _ in range(400)]
  assert 0.3 < np.mean(blurred) < 0.55  # half of the time; the smallest sigmas leave a point as it is


def test_random_erasing_puts_normal_noise_into_one_rectangle():
  rng, image = generator(), np.full((64, 80, 3), 7, np.float32)
  done, areas, aspects, noise = 0, [], [], []
  for _ in range(1200):
    got = augment.random_erasing({'image': image}, rng)['image']
    changed = (got != 7).all(axis=-1)
    assert ((got != 7).any(axis=-1) == changed).all()
    if changed.any():
      y, x = np.nonzero(changed)
      h, w = y.max() - y.min() + 1, x.max() - x.min() + 1
      assert changed.sum() == h * w  # one full rectangle
      done += 1
      areas.append(h * w / (64 * 80))
      aspects.append(h / w)
      noise.append(got[changed].ravel())
  noise = np.concatenate(noise)
  assert abs(done / 1200 - 0.25) < 0.04
  assert min(areas) > 0.015 and 0.28 < max(areas) < 0.34
  assert 0.25 < min(aspects) < 0.5 and 2 < max(aspects) < 3.8
  assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
  assert (image == 7).all()


def test_random_erasing_comes_after_normalize():
  with pytest.raises(ConfigError, match='found uint8; normalize first'):
    augment.random_erasing({'image': picture()}, generator())
