"""Decoding, crops, geometry, values and the transform language. Pillow, which the published recipes used, measures."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from mim_jax.data import chain, decoding, images
from mim_jax.data.images import DecodeError, parse
from mim_jax.errors import ConfigError


def photograph(height, width, seed=0):
  """uint8 [H, W, 3] with the spectrum of a natural image, some sharp edges and related channels."""
  rng = np.random.default_rng(seed)
  fy, fx = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]
  falloff = 1 / np.maximum(np.hypot(fy, fx), 1 / max(height, width)) ** 1.5
  planes = [np.fft.ifft2(np.fft.fft2(rng.standard_normal((height, width))) * falloff).real for _ in range(4)]
  image = np.stack([planes[3] + 0.4 * p for p in planes[:3]], axis=-1)
  image = 128 + 45 * (image - image.mean()) / image.std()
  for _ in range(6):
    y, x, h, w = (rng.random(4) * [height, width, height / 3, width / 3]).astype(int)
    image[y : y + h, x : x + w] += rng.normal(0, 30, 3)
  return np.clip(image, 0, 255).astype(np.uint8)


def jpeg(image, **options):
  out = io.BytesIO()
  Image.fromarray(image.squeeze()).save(out, 'JPEG', quality=92, **options)
  return out.getvalue()


def encoded(image, extension):
  return cv2.imencode(extension, image[..., ::-1])[1].tobytes()


def generator(seed=0):
  return np.random.Generator(np.random.Philox(seed))


def run(text, example, seed=0):
  transforms = parse(text)
  return transforms.batch(transforms.example(example, generator(seed)))


# ---- the language ----


def test_a_chain_does_single_examples_then_the_batch():
  both = parse('decode | random_resized_crop(16, scale=(0.2, 1.0)) | flip | normalize')
  rows = [both.example({'image': photograph(20, 30, k), 'label': k}, generator(k)) for k in range(3)]
  assert all(r['image'].dtype == np.uint8 and r['image'].shape == (16, 16, 3) for r in rows)
  batch = both.batch({'image': np.stack([r['image'] for r in rows]), 'label': np.arange(3)})
  assert batch['image'].dtype == np.float32 and batch['image'].shape == (3, 16, 16, 3)
  assert batch['label'].tolist() == [0, 1, 2]


def test_normalize_runs_per_example_when_a_single_transform_follows():
  erased = parse('normalize | random_erasing(p=1)')
  example = erased.example({'image': photograph(20, 20)}, generator())
  assert example['image'].dtype == np.float32
  assert erased.batch(example) is example


def test_line_breaks_and_an_empty_string_are_fine():
  assert run('flip(1)\n  | flip(1.0)', {'image': np.arange(12, dtype=np.uint8).reshape(2, 2, 3)})['image'][0, 0, 0] == 0
  example = {'text': 'no picture'}
  assert run('', example) is example


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('decode | random_resize_crop(224)', ["did you mean 'random_resized_crop'"]),
    ('qqqq', ['known:', 'normalize']),
    ('resize(224, sclae=1)', ['sclae', 'resize(size, method=']),
    ('random_resized_crop', ["missing a required argument: 'size'", 'scale=(0.08, 1.0)']),
    ('flip(1, 2)', ['too many', 'flip(p=0.5)']),
    ('flip(p=1.5)', ['flip', 'probability', '1.5']),
    ('resize(size)', ['plain values', 'resize(size)']),
    ('resize(-3)', ['size must be a number of pixels', '-3']),
    ('random_resized_crop(8, scale=(0.5, 0.2))', ['scale must be (low, high)']),
    ('random_resized_crop(8, method="nearest")', ["'bicubic' or 'bilinear'"]),
    ('gaussian_blur(12)', ['kernel must be an odd number']),
    ('normalize("imagnet")', ['imagenet, clip', 'imagnet']),
    ('decode(channels=4)', ["1, 3 or 'any'"]),
    ('decode |', ['cannot be read']),
    ('decode; flip', ['cannot be read']),
    ('decode | 3', ["'3' is not a transform"]),
    ('decode.flip', ['is not a transform']),
    ('decode | flip(**{})', ['is not a transform']),
    ('__import__("os")', ['unknown']),
  ],
)
def test_mistakes_are_named(text, words):
  with pytest.raises(ConfigError) as error:
    parse(text)
  for word in words:
    assert word in str(error.value)


def test_describe_lists_every_transform_with_its_options():
  lines = dict(line.split('(', 1) for line in images.describe().splitlines())
  assert set(lines) >= {
    'center_crop', 'color_jitter', 'decode', 'flip', 'gaussian_blur', 'grayscale', 'normalize', 'one_shot_crop',
    'rand_augment', 'random_crop', 'random_erasing', 'random_resized_crop', 'resize', 'to_float',
  }  # fmt: skip
  assert lines['flip'] == 'p=0.5): Swaps left and right with probability p.'


def test_a_registered_function_gets_its_place_in_the_language():
  @images.register
  def darken(example, rng, by=2):
    """Divides."""
    return {**example, 'image': example['image'] // by}

  try:
    example = run('decode | darken(4)', {'image': encoded(np.full((4, 4, 3), 200, np.uint8), '.png')})
    assert (example['image'] == 50).all()
  finally:
    del chain.TRANSFORMS['darken']


def test_an_image_is_needed_and_bytes_need_decode():
  with pytest.raises(ConfigError, match="need the field 'image', found label, text"):
    run('flip', {'label': 1, 'text': ''})
  with pytest.raises(ConfigError, match="begin with 'decode'"):
    run('flip', {'image': jpeg(photograph(8, 8))})


def test_the_result_follows_from_the_generator_and_the_example_is_left_alone():
  text = 'decode | random_resized_crop(24) | flip | color_jitter | rand_augment | normalize | random_erasing(p=0.9)'
  image = photograph(40, 50)
  before = image.copy()
  first, again, other = (run(text, {'image': image}, seed)['image'] for seed in (1, 1, 2))
  np.testing.assert_array_equal(first, again)
  assert not np.array_equal(first, other)
  np.testing.assert_array_equal(image, before)


def test_opencv_starts_no_threads_of_its_own():
  assert cv2.getNumThreads() <= 1


# ---- decoding ----


def test_colours_are_in_rgb_order_for_each_format():
  image = np.zeros((16, 16, 3), np.uint8)
  image[..., 0], image[..., 1] = 220, 60
  for data in (jpeg(image), *(encoded(image, e) for e in ('.png', '.webp', '.tiff', '.bmp'))):
    got = run('decode', {'image': data})['image']
    assert got.shape == (16, 16, 3)
    assert np.abs(got.astype(int) - image).max() < 8


def test_a_jpeg_decodes_like_pillow():
  data = jpeg(photograph(61, 83))
  expected = np.asarray(Image.open(io.BytesIO(data)))
  assert np.abs(run('decode', {'image': data})['image'].astype(int) - expected).max() <= 2


def test_grey_files_become_what_is_asked_for():
  grey = photograph(20, 24)[..., :1]
  for data in (jpeg(grey), cv2.imencode('.png', grey)[1].tobytes()):
    three, one, any_ = (run(f'decode(channels={c!r})', {'image': data})['image'] for c in (3, 1, 'any'))
    assert three.shape == (20, 24, 3) and one.shape == any_.shape == (20, 24, 1)
    np.testing.assert_array_equal(three, np.repeat(one, 3, axis=-1))
    np.testing.assert_array_equal(one, any_)
  luma = run('decode(channels=1) | resize(10)', {'image': jpeg(photograph(20, 24))})['image']
  assert luma.shape == (10, 12, 1)


def test_any_keeps_alpha_and_sixteen_bits_in_rgb_order():
  image = np.dstack([photograph(8, 9), np.full((8, 9), 77, np.uint8)])
  data = cv2.imencode('.png', image[..., [2, 1, 0, 3]])[1].tobytes()
  np.testing.assert_array_equal(run("decode('any')", {'image': data})['image'], image)
  np.testing.assert_array_equal(run('decode', {'image': data})['image'], image[..., :3])
  deep = photograph(8, 9).astype(np.uint16) * 250
  np.testing.assert_array_equal(run("decode('any')", {'image': encoded(deep, '.png')})['image'], deep)


def test_arrays_keep_their_channels_unless_told():
  many = np.zeros((6, 7, 12), np.float32)
  assert run('decode', {'image': many})['image'] is many
  assert run('decode', {'image': many[..., 0]})['image'].shape == (6, 7, 1)
  assert run('decode(3)', {'image': many[..., :1]})['image'].shape == (6, 7, 3)
  with pytest.raises(ConfigError, match=r'\(6, 7, 12\).*keep all 12'):
    run('decode(3)', {'image': many})


def test_npy_files_hold_any_number_of_channels():
  array = np.arange(5 * 4 * 13, dtype=np.int16).reshape(5, 4, 13)
  out = io.BytesIO()
  np.save(out, array)
  np.testing.assert_array_equal(images.read(out.getvalue()), array)
  with pytest.raises(DecodeError):
    images.read(out.getvalue()[:-9])


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation_is_applied_and_known_before_decoding(orientation):
  exif = Image.Exif()
  exif[0x0110] = 'a camera'
  exif[0x0112] = orientation
  data = jpeg(photograph(64, 96), exif=exif)
  expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
  lazy = decoding.Jpeg(data)
  assert (lazy.height, lazy.width) == expected.shape[:2]
  assert np.abs(lazy.pixels().astype(int) - expected).max() <= 2
  half = np.asarray(Image.fromarray(expected).resize((expected.shape[1] // 2, expected.shape[0] // 2), Image.BOX))
  assert np.abs(lazy.pixels(2).astype(int) - half).mean() < 3


def damaged():
  whole = {
    'baseline': jpeg(photograph(64, 64)),
    'progressive': jpeg(photograph(64, 64), progressive=True),
    'png': encoded(photograph(64, 64), '.png'),
    'webp': encoded(photograph(64, 64), '.webp'),
  }
  for name, data in whole.items():
    yield name + ' half', data[: len(data) // 2]
  yield 'baseline without its last byte', whole['baseline'][:-1]
  yield 'baseline header alone', whole['baseline'][:40]
  yield 'two bytes', b'\xff\xd8'
  yield 'nothing', b''
  yield 'noise', np.random.default_rng(0).bytes(500)
  yield 'text', b'<html>404 not found</html>'
  size = whole['baseline'].index(b'\xff\xc0') + 5
  yield 'no height', whole['baseline'][:size] + b'\0\0' + whole['baseline'][size + 2 :]
  thumbnail = jpeg(photograph(8, 8))  # with an end marker of its own
  segment = b'\xff\xe1' + (len(thumbnail) + 8).to_bytes(2, 'big') + b'Exif\0\0' + thumbnail
  yield 'cut behind its thumbnail', b'\xff\xd8' + segment + whole['baseline'][2:-300]


@pytest.mark.parametrize(('name', 'data'), list(damaged()), ids=lambda v: v if isinstance(v, str) else '')
@pytest.mark.parametrize('text', ['decode', 'decode(1)', "decode('any')", 'decode | random_resized_crop(8)'])
def test_damaged_bytes_raise(name, data, text):
  with pytest.raises(DecodeError, match='bytes|JPEG'):
    run(text, {'image': data})


def test_bytes_after_the_end_marker_are_no_damage():
  data = jpeg(photograph(16, 16))
  np.testing.assert_array_equal(images.read(data + b'\0' * 100), images.read(data))


def test_a_picture_that_is_not_as_its_header_says_raises(monkeypatch):
  monkeypatch.setattr(decoding, '_imdecode', lambda data, flags: np.zeros((5, 5, 3), np.uint8))
  with pytest.raises(DecodeError, match=r'\(16, 12\).*\(5, 5\)'):
    decoding.Jpeg(jpeg(photograph(16, 12))).pixels()


@pytest.mark.parametrize(
  ('shape', 'text', 'reduce'),
  [
    ((500, 400), 'decode', 1),
    ((500, 400), 'decode | resize(224)', 1),
    ((500, 447), 'decode | resize((250, 223))', 2),
    ((500, 447), 'decode | resize((250, 224))', 1),
    ((500, 400), 'decode | resize(200)', 2),
    ((500, 400), 'decode | resize(60)', 4),
    ((500, 400), 'decode | resize(40)', 8),
    ((500, 400), 'decode | random_resized_crop(100, scale=(1.0, 1.0), ratio=(0.8, 0.8))', 4),
    ((500, 400), 'decode | random_resized_crop(100, scale=(0.25, 0.25), ratio=(0.8, 0.8))', 2),
    ((500, 400), 'decode | one_shot_crop(126, scale=(0.25, 0.25), ratio=(0.8, 0.8))', 1),
    ((500, 400), 'decode | flip | resize(40)', 1),
  ],
)
def test_no_more_is_decoded_than_the_crop_needs_and_no_less(monkeypatch, shape, text, reduce):
  asked = []
  pixels = decoding.Jpeg.pixels

  def watched(self, reduce=1):
    asked.append(reduce)
    return pixels(self, reduce)

  monkeypatch.setattr(decoding.Jpeg, 'pixels', watched)
  run(text, {'image': jpeg(photograph(*shape))})
  assert asked == [reduce]


def test_the_window_of_a_reduced_picture_holds_the_box_and_enough_pixels():
  image = decoding.Jpeg(jpeg(photograph(203, 317)))
  rng = np.random.default_rng(0)
  for _ in range(200):
    h, w = rng.integers(1, 204), rng.integers(1, 318)
    y, x = rng.integers(0, 204 - h), rng.integers(0, 318 - w)
    size = tuple(rng.integers(1, 50, 2).tolist())
    part, (top, left, height, width) = image.window((y, x, h, w), size)
    assert top <= y and left <= x and y + h <= top + height <= 203 and x + w <= left + width <= 317
    assert part.shape[0] >= min(size[0], h) and part.shape[1] >= min(size[1], w)


# ---- scaling ----


# (shrinking of height, of width): largest mean difference from Pillow in levels of 255. OpenCV's own cubic is at 1.0
# for 1.5, 2.3 for 2.6 and 4.3 for 6.
SCALES = {
  (0.5, 0.5): 0.45, (0.9, 0.9): 0.42, (1.04, 1.04): 0.42, (1.2, 1.2): 0.33, (1.5, 1.5): 0.5, (1.9, 1.9): 0.6,
  (2.6, 2.6): 0.62, (6.0, 6.0): 1.0, (1.5, 0.7): 0.45, (0.7, 2.4): 0.55, (1.8, 1.2): 0.5,
}  # fmt: skip


@pytest.mark.parametrize('scale', SCALES, ids=str)
def test_scaling_is_near_pillow_bicubic(scale):
  image, size = photograph(400, 400), (64, 64)
  h, w = (round(64 * s) for s in scale)
  cut = image[3 : 3 + h, 7 : 7 + w]
  expected = Image.fromarray(cut).resize(size, Image.BICUBIC)
  got = images.scaled(cut, size)
  assert got.shape == (64, 64, 3)
  assert np.abs(got.astype(float) - np.asarray(expected)).mean() < SCALES[scale]


@pytest.mark.parametrize(('scale', 'limit'), [(0.5, 0.4), (1.2, 0.4), (1.8, 0.6), (3.0, 1.0)])
def test_scaling_is_near_pillow_bilinear(scale, limit):
  n = round(64 * scale)
  image = photograph(400, 400)[:n, :n]
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
  data = jpeg(photograph(700, 900))
  text = 'random_resized_crop(96, scale=(0.2, 1.0)) | flip'
  differences = []
  for seed in range(12):
    lazy = run('decode | ' + text, {'image': data}, seed)['image']
    whole = run(text, {'image': images.read(data)}, seed)['image']
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
    got = run(f'decode | {text} | flip(1.0)', {'image': image})['image']
    assert got.dtype == image.dtype and got.ndim == 3 and got.shape[-1] == channels
    assert np.allclose(got, 7)


def test_other_dtypes_are_refused():
  with pytest.raises(ConfigError, match='int64 cannot be scaled'):
    run('resize(4)', {'image': np.zeros((8, 8, 3), np.int64)})


# ---- crops ----


def test_sampled_crops_cover_area_aspect_and_place_evenly():
  rng = generator()
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
  assert images.sample_crop(generator(), *shape, (1.0, 1.0), (0.75, 4 / 3)) == box


def test_a_whole_image_fits_when_its_aspect_does():
  assert images.sample_crop(generator(), 90, 100, (1.0, 1.0), (10 / 9, 10 / 9)) == (0, 0, 90, 100)


def test_one_shot_crop_cuts_its_sides_at_the_image_and_draws_once():
  rng, other = generator(), generator()
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
  assert run(f'resize({size})', {'image': photograph(*shape)})['image'].shape[:2] == expected


def test_center_crop_takes_the_middle_and_refuses_small_images():
  image = photograph(11, 14)
  np.testing.assert_array_equal(run('center_crop(4)', {'image': image})['image'], image[4:8, 5:9])
  np.testing.assert_array_equal(run('center_crop((11, 2))', {'image': image})['image'], image[:, 6:8])
  with pytest.raises(ConfigError, match=r'11 x 14; write resize\(12\)'):
    run('center_crop(12)', {'image': image})


def test_random_crop_sees_every_place_of_the_padded_image():
  image = np.arange(1, 65, dtype=np.uint8).reshape(8, 8, 1)
  crop, rng, seen = parse('random_crop(8, pad=2)'), generator(), set()
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
    run('random_crop(13, pad=2)', {'image': image})


def test_flip_is_a_mirror_half_of_the_time():
  image, rng, mirror = photograph(5, 6), generator(), parse('flip')
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
        example = {'image': jpeg(big['image']), 'mask': big['mask'], 'boxes': example['boxes'] * 4}
      else:
        example['image'] = jpeg(example['image'])
    got = run('decode | ' + text, example, seed)
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

  views = photograph(8, 12).reshape(1, 2, 4, 12, 3)
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
  made = chain.example({'image': photograph(8, 12)}, generator())
  batch = chain.batch({name: value[None] for name, value in made.items()})
  assert batch['image_u8'].dtype == np.uint8
  np.testing.assert_array_equal(parse('normalize').batch({'image': batch['image_u8']})['image'], batch['image'])
  with pytest.raises(ConfigError, match='a name in quotes'):
    parse("keep('image u8')")


def test_one_crop_and_flip_make_both_sizes():
  image = photograph(97, 131)
  for seed in range(4):  # some are flipped, some are not
    made = run('decode | two_size_crop(64, 32, scale=(0.3, 0.6)) | flip', {'image': image}, seed)
    assert made['image'].shape == (64, 64, 3) and made['token_image'].shape == (32, 32, 3)
    half = made['image'].reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(half - made['token_image']).mean() < 6
    assert np.abs(half[:, ::-1] - made['token_image']).mean() > 12
    alone = run('decode | random_resized_crop(64, scale=(0.3, 0.6)) | flip', {'image': image}, seed)
    np.testing.assert_array_equal(made['image'], alone['image'])


def test_a_second_size_for_evaluation_and_its_mapping():
  chain = parse('decode | second_size(16) | normalize | map_token_image')
  made = chain.example({'image': np.full((32, 32, 3), 255, np.uint8)}, generator())
  batch = chain.batch({name: value[None] for name, value in made.items()})
  assert batch['token_image'].shape == (1, 16, 16, 3) and batch['token_image'].dtype == np.float32
  np.testing.assert_allclose(batch['token_image'], 0.9, rtol=1e-6)
  assert 'token_image' not in chain.batch({'image': made['image'][None]})


@pytest.mark.parametrize(('scale', 'limit'), [(0.5, 0.6), (1.8, 1.0), (3.0, 1.6)])
def test_scaling_is_near_pillow_lanczos(scale, limit):
  n = round(64 * scale)
  image = photograph(400, 400)[:n, :n]
  expected = np.asarray(Image.fromarray(image).resize((64, 64), Image.LANCZOS))
  assert np.abs(images.scaled(image, (64, 64), 'lanczos').astype(float) - expected).mean() < limit
