"""Scaling, crops, geometry and values. Pillow, which the published recipes used, measures."""

import cv2
import image_cases as cases
import numpy as np
import pytest
from PIL import Image

from mim_jax.data import images
from mim_jax.data.images import parse
from mim_jax.errors import ConfigError

# ---- scaling ----


# (shrinking of height, of width): largest mean difference from Pillow in levels of 255. OpenCV's own cubic is at 1.0
# for 1.5, 2.3 for 2.6 and 4.3 for 6.
SCALES = {
  (0.5, 0.5): 0.45, (0.9, 0.9): 0.42, (1.04, 1.04): 0.42, (1.2, 1.2): 0.33, (1.5, 1.5): 0.5, (1.9, 1.9): 0.6,
  (2.6, 2.6): 0.62, (6.0, 6.0): 1.0, (1.5, 0.7): 0.45, (0.7, 2.4): 0.55, (1.8, 1.2): 0.5,
}  # fmt: skip


@pytest.mark.parametrize('scale', SCALES, ids=str)
def test_scaling_is_near_pillow_bicubic(scale):
  image, size = cases.photograph(400, 400), (64, 64)
  h, w = (round(64 * s) for s in scale)
  cut = image[3 : 3 + h, 7 : 7 + w]
  expected = Image.fromarray(cut).resize(size, Image.BICUBIC)
  got = images.scaled(cut, size)
  assert got.shape == (64, 64, 3)
  assert np.abs(got.astype(float) - np.asarray(expected)).mean() < SCALES[scale]


@pytest.mark.parametrize(('scale', 'limit'), [(0.5, 0.4), (1.2, 0.4), (1.8, 0.6), (3.0, 1.0)])
def test_scaling_is_near_pillow_bilinear(scale, limit):
  n = round(64 * scale)
  image = cases.photograph(400, 400)[:n, :n]
  expected = np.asarray(Image.fromarray(image).resize((64, 64), Image.BILINEAR))
  assert np.abs(images.scaled(image, (64, 64), 'bilinear').astype(float) - expected).mean() < limit


@pytest.mark.parametrize('factor', [1.3, 1.5, 1.7, 3.7])
def test_fine_stripes_fade_instead_of_aliasing(factor):
  n = round(50 * factor)
  stripes = np.repeat(np.where(np.arange(n) % 2, 255, 0).astype(np.uint8)[None, :, None], n, axis=0)
  contrast = np.asarray(Image.fromarray(stripes[..., 0]).resize((50, 50), Image.BICUBIC)).std()
  assert images.scaled(stripes, (50, 50)).std() < contrast + 25
  assert cv2.resize(stripes, (50, 50), interpolation=cv2.INTER_CUBIC).std() > contrast + 50  # what is avoided


def test_a_crop_from_a_jpeg_is_near_the_same_crop_of_all_its_pixels():
  data = cases.jpeg(cases.photograph(700, 900))
  text = 'random_resized_crop(96, scale=(0.2, 1.0)) | flip'
  differences = []
  for seed in range(12):
    lazy = cases.run('decode | ' + text, {'image': data}, seed)['image']
    whole = cases.run(text, {'image': images.read(data)}, seed)['image']
    differences.append(np.abs(lazy.astype(float) - whole).mean())
  assert (
    np.mean(differences) < 3.0 and max(differences) > 0
  )  # the window is rounded to the pixels of the reduced picture


@pytest.mark.parametrize('dtype', ['uint8', 'uint16', 'int16', 'float32', 'float64'])
@pytest.mark.parametrize('channels', [1, 2, 4, 12])
def test_any_channels_and_usual_dtypes_pass_through(dtype, channels):
  image = np.ones((30, 40, channels), dtype) * 7
  for text in (
    'random_resized_crop(10)',
    'random_resized_crop(64)',
    'resize((11, 17))',  # by more than 2, and by no whole number
    'resize((24, 30))',
    'resize(29)',
    'random_crop(9)',
  ):
    got = cases.run(f'decode | {text} | flip(1.0)', {'image': image})['image']
    assert got.dtype == image.dtype and got.ndim == 3 and got.shape[-1] == channels
    assert np.allclose(got, 7)


def test_other_dtypes_are_refused():
  with pytest.raises(ConfigError, match='int64 cannot be scaled'):
    cases.run('resize(4)', {'image': np.zeros((8, 8, 3), np.int64)})


# ---- crops ----


def test_sampled_crops_cover_area_aspect_and_place_evenly():
  rng = cases.generator()
  boxes = np.array([images.sample_crop(rng, 200, 200, (0.1, 0.5), (0.75, 4 / 3)) for _ in range(4000)])
  y, x, h, w = boxes.T
  assert (y >= 0).all() and (x >= 0).all() and (y + h <= 200).all() and (x + w <= 200).all()
  area, aspect = h * w / 200**2, np.log(w / h)
  assert abs(area.mean() - 0.3) < 0.006 and abs(area.std() - 0.4 / 12**0.5) < 0.005
  assert abs(aspect.mean()) < 0.01 and abs(aspect.std() - 2 * np.log(4 / 3) / 12**0.5) < 0.01
  for place, room in ((y, 200 - h), (x, 200 - w)):
    assert abs((place / room).mean() - 0.5) < 0.02 and (place == 0).any() and (place == room).any()


@pytest.mark.parametrize(
  ('shape', 'box'),
  [((10, 100), (0, 43, 10, 13)), ((100, 10), (43, 0, 13, 10)), ((3, 1), (1, 0, 1, 1))],
)
def test_when_no_crop_fits_the_centre_is_taken(shape, box):
  assert images.sample_crop(cases.generator(), *shape, (1.0, 1.0), (0.75, 4 / 3)) == box


def test_a_whole_image_fits_when_its_aspect_does():
  assert images.sample_crop(cases.generator(), 90, 100, (1.0, 1.0), (10 / 9, 10 / 9)) == (0, 0, 90, 100)


def test_one_shot_crop_cuts_its_sides_at_the_image_and_draws_once():
  rng, other = cases.generator(), cases.generator()
  image = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (10, 200, 1))
  widths = []
  for _ in range(300):
    got = images.one_shot_crop({'image': image}, rng, (4, 400), scale=(0.5, 1.0), ratio=(1, 1))['image']
    other.random(4)
    assert got.shape == (4, 400, 1)
    widths.append(int(got[0, -1, 0]) - int(got[0, 0, 0]) + 1)
  assert rng.random() == other.random()
  assert abs(min(widths) - 32) <= 3 and abs(max(widths) - 45) <= 3  # sqrt(1000), sqrt(2000): only the height is cut


@pytest.mark.parametrize(
  ('shape', 'size', 'expected'),
  [((50, 81), 20, (20, 32)), ((81, 50), 20, (32, 20)), ((30, 30), 60, (60, 60)), ((50, 81), (9, 7), (9, 7))],
)
def test_resize_brings_the_short_side(shape, size, expected):
  assert cases.run(f'resize({size})', {'image': cases.photograph(*shape)})['image'].shape[:2] == expected


def test_center_crop_takes_the_middle_and_refuses_small_images():
  image = cases.photograph(11, 14)
  np.testing.assert_array_equal(cases.run('center_crop(4)', {'image': image})['image'], image[4:8, 5:9])
  np.testing.assert_array_equal(cases.run('center_crop((11, 2))', {'image': image})['image'], image[:, 6:8])
  with pytest.raises(ConfigError, match=r'11 x 14; write resize\(12\)'):
    cases.run('center_crop(12)', {'image': image})


def test_random_crop_sees_every_place_of_the_padded_image():
  image = np.arange(1, 65, dtype=np.uint8).reshape(8, 8, 1)
  crop, rng, seen = parse('random_crop(8, pad=2)'), cases.generator(), set()
  for _ in range(600):
    got = crop.example({'image': image}, rng)['image']
    row, column = (int(v) for v in np.argwhere(got[..., 0] > 0)[0])
    first = int(got[row, column, 0]) - 1
    y, x = first // 8 - row, first % 8 - column
    seen.add((y, x))
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    np.testing.assert_array_equal(got, padded[y + 2 : y + 10, x + 2 : x + 10])
  assert seen == {(y, x) for y in range(-2, 3) for x in range(-2, 3)}
  with pytest.raises(ConfigError, match='8 x 8; pad more'):
    cases.run('random_crop(13, pad=2)', {'image': image})


def test_flip_is_a_mirror_half_of_the_time():
  image, rng, mirror = cases.photograph(5, 6), cases.generator(), parse('flip')
  flipped = [np.array_equal(mirror.example({'image': image}, rng)['image'], image[:, ::-1]) for _ in range(400)]
  assert 160 < sum(flipped) < 240


SCENE_TEXTS = (
  'random_resized_crop(48, scale=(0.5, 1.0)) | flip',
  'one_shot_crop((40, 56), scale=(0.5, 1.0)) | flip',
  'resize(50) | center_crop(40) | flip',
  'random_crop(90, pad=10) | flip',
)


def scene():
  """An example whose mask and box are those of the bright object in its image."""
  image, mask = np.full((96, 128, 3), 40, np.uint8), np.zeros((96, 128, 1), np.int32)
  image[30:70, 40:90], mask[30:70, 40:90] = 220, 5
  boxes = np.array([[40, 30, 90, 70], [0, 0, 0, 0], [0, 0, 128, 96]], np.float32)
  return {'image': image, 'mask': mask, 'boxes': boxes}


@pytest.mark.parametrize('text', SCENE_TEXTS)
@pytest.mark.parametrize('compress', [False, True], ids=['array', 'jpeg'])
def test_mask_and_boxes_go_where_the_image_goes(text, compress):
  for seed in range(8):
    example = scene()
    if compress:  # large enough for a reduced decode
      big = {k: np.repeat(np.repeat(v, 4, 0), 4, 1) for k, v in example.items() if k != 'boxes'}
      if 'random_crop' not in text:
        example = {'image': cases.jpeg(big['image']), 'mask': big['mask'], 'boxes': example['boxes'] * 4}
      else:
        example['image'] = cases.jpeg(example['image'])
    got = cases.run('decode | ' + text, example, seed)
    mask = got['mask'][..., 0]
    assert mask.shape == got['image'].shape[:2] and set(np.unique(mask)) <= {0, 5}
    wrong = (got['image'][..., 0] > 130) != (mask == 5)
    assert wrong.mean() < 0.03
    y, x = np.nonzero(mask)
    assert np.abs(got['boxes'][0] - [x.min(), y.min(), x.max() + 1, y.max() + 1]).max() <= 1.01
    empty, whole = got['boxes'][1:]
    assert (empty[2] - empty[0]) * (empty[3] - empty[1]) == 0
    assert whole[2] > whole[0] and whole[3] > whole[1] and got['boxes'].dtype == np.float32
    assert (got['boxes'] >= 0).all() and (got['boxes'] <= [*mask.shape[::-1], *mask.shape[::-1]]).all()


# ---- values ----


@pytest.mark.parametrize(
  ('stats', 'mean', 'std'),
  [
    ("'imagenet'", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ("'clip'", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    ("'half'", 0.5, 0.5),
    ("'none'", 0, 1),
    ('((0.1, 0.2, 0.3), 0.4)', (0.1, 0.2, 0.3), 0.4),
    ('(0.25, (0.5, 0.6, 0.7))', 0.25, (0.5, 0.6, 0.7)),
  ],
)
def test_normalize(stats, mean, std):
  image = np.arange(2 * 4 * 32 * 3, dtype=np.uint8).reshape(2, 4, 32, 3)
  got = parse(f'normalize({stats})').batch({'image': image})['image']
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, (image / 255 - mean) / np.array(std), atol=1e-6)


def test_normalize_takes_views_sixteen_bits_floats_and_many_channels():
  def normalize(image, *args):
    return images.normalize({'image': image}, *args)['image']

  views = cases.photograph(8, 12).reshape(1, 2, 4, 12, 3)
  np.testing.assert_array_equal(normalize(views)[0, 1], normalize(views[0, 1]))
  np.testing.assert_allclose(normalize(np.full((2, 2, 1), 65535, np.uint16), 'half'), 1, atol=1e-6)
  np.testing.assert_allclose(normalize(np.full((2, 2, 1), 0.75, np.float64), 'half'), 0.5, atol=1e-6)
  assert normalize(np.zeros((2, 3, 3, 12), np.float64), 'half').dtype == np.float32
  with pytest.raises(ConfigError, match='is for 3 channels, the images have 12'):
    normalize(np.zeros((2, 3, 3, 12), np.uint8))


def test_to_float_is_in_zero_to_one():
  got = parse('to_float').batch({'image': np.array([0, 51, 255], np.uint8).reshape(1, 1, 1, 3)})['image']
  np.testing.assert_allclose(got.ravel(), [0, 0.2, 1], atol=1e-7)


def test_keep_holds_on_to_the_pixels_before_normalize():
  chain = parse("decode | flip | keep('image_u8') | normalize")
  made = chain.example({'image': cases.photograph(8, 12)}, cases.generator())
  batch = chain.batch({name: value[None] for name, value in made.items()})
  assert batch['image_u8'].dtype == np.uint8
  np.testing.assert_array_equal(parse('normalize').batch({'image': batch['image_u8']})['image'], batch['image'])
  with pytest.raises(ConfigError, match='a name in quotes'):
    parse("keep('image u8')")


def test_one_crop_and_flip_make_both_sizes():
  image = cases.photograph(97, 131)
  for seed in range(4):  # some are flipped, some are not
    made = cases.run('decode | two_size_crop(64, 32, scale=(0.3, 0.6)) | flip', {'image': image}, seed)
    assert made['image'].shape == (64, 64, 3) and made['token_image'].shape == (32, 32, 3)
    half = made['image'].reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(half - made['token_image']).mean() < 6
    assert np.abs(half[:, ::-1] - made['token_image']).mean() > 12
    alone = cases.run('decode | random_resized_crop(64, scale=(0.3, 0.6)) | flip', {'image': image}, seed)
    np.testing.assert_array_equal(made['image'], alone['image'])


def test_a_second_size_for_evaluation_and_its_mapping():
  chain = parse('decode | second_size(16) | normalize | map_token_image')
  made = chain.example({'image': np.full((32, 32, 3), 255, np.uint8)}, cases.generator())
  batch = chain.batch({name: value[None] for name, value in made.items()})
  assert batch['token_image'].shape == (1, 16, 16, 3) and batch['token_image'].dtype == np.float32
  np.testing.assert_allclose(batch['token_image'], 0.9, rtol=1e-6)
  assert 'token_image' not in chain.batch({'image': made['image'][None]})


@pytest.mark.parametrize(('scale', 'limit'), [(0.5, 0.6), (1.8, 1.0), (3.0, 1.6)])
def test_scaling_is_near_pillow_lanczos(scale, limit):
  n = round(64 * scale)
  image = cases.photograph(400, 400)[:n, :n]
  expected = np.asarray(Image.fromarray(image).resize((64, 64), Image.LANCZOS))
  assert np.abs(images.scaled(image, (64, 64), 'lanczos').astype(float) - expected).mean() < limit
