"""Decoding: formats, orientation, damage, and no more pixels than are needed. Pillow, which the published recipes used, measures."""

import io

import cv2
import image_cases as cases
import numpy as np
import pytest
from PIL import Image, ImageOps

from mim_jax.data import decoding, images
from mim_jax.data.images import DecodeError
from mim_jax.errors import ConfigError


def test_colours_are_in_rgb_order_for_each_format():
  image = np.zeros((16, 16, 3), np.uint8)
  image[..., 0], image[..., 1] = 220, 60
  for data in (cases.jpeg(image), *(cases.encoded(image, e) for e in ('.png', '.webp', '.tiff', '.bmp'))):
    got = cases.run('decode', {'image': data})['image']
    assert got.shape == (16, 16, 3)
    assert np.abs(got.astype(int) - image).max() < 8


def test_a_jpeg_decodes_like_pillow():
  data = cases.jpeg(cases.photograph(61, 83))
  expected = np.asarray(Image.open(io.BytesIO(data)))
  assert np.abs(cases.run('decode', {'image': data})['image'].astype(int) - expected).max() <= 2


def test_grey_files_become_what_is_asked_for():
  grey = cases.photograph(20, 24)[..., :1]
  for data in (cases.jpeg(grey), cv2.imencode('.png', grey)[1].tobytes()):
    three, one, any_ = (cases.run(f'decode(channels={c!r})', {'image': data})['image'] for c in (3, 1, 'any'))
    assert three.shape == (20, 24, 3) and one.shape == any_.shape == (20, 24, 1)
    np.testing.assert_array_equal(three, np.repeat(one, 3, axis=-1))
    np.testing.assert_array_equal(one, any_)
  luma = cases.run('decode(channels=1) | resize(10)', {'image': cases.jpeg(cases.photograph(20, 24))})['image']
  assert luma.shape == (10, 12, 1)


def test_any_keeps_alpha_and_sixteen_bits_in_rgb_order():
  image = np.dstack([cases.photograph(8, 9), np.full((8, 9), 77, np.uint8)])
  data = cv2.imencode('.png', image[..., [2, 1, 0, 3]])[1].tobytes()
  np.testing.assert_array_equal(cases.run("decode('any')", {'image': data})['image'], image)
  np.testing.assert_array_equal(cases.run('decode', {'image': data})['image'], image[..., :3])
  deep = cases.photograph(8, 9).astype(np.uint16) * 250
  np.testing.assert_array_equal(cases.run("decode('any')", {'image': cases.encoded(deep, '.png')})['image'], deep)


def test_arrays_keep_their_channels_unless_told():
  many = np.zeros((6, 7, 12), np.float32)
  assert cases.run('decode', {'image': many})['image'] is many
  assert cases.run('decode', {'image': many[..., 0]})['image'].shape == (6, 7, 1)
  assert cases.run('decode(3)', {'image': many[..., :1]})['image'].shape == (6, 7, 3)
  with pytest.raises(ConfigError, match=r'\(6, 7, 12\).*keep all 12'):
    cases.run('decode(3)', {'image': many})


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
  data = cases.jpeg(cases.photograph(64, 96), exif=exif)
  expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
  lazy = decoding.Jpeg(data)
  assert (lazy.height, lazy.width) == expected.shape[:2]
  assert np.abs(lazy.pixels().astype(int) - expected).max() <= 2
  half = np.asarray(Image.fromarray(expected).resize((expected.shape[1] // 2, expected.shape[0] // 2), Image.BOX))
  assert np.abs(lazy.pixels(2).astype(int) - half).mean() < 3


def damaged():
  whole = {
    'baseline': cases.jpeg(cases.photograph(64, 64)),
    'progressive': cases.jpeg(cases.photograph(64, 64), progressive=True),
    'png': cases.encoded(cases.photograph(64, 64), '.png'),
    'webp': cases.encoded(cases.photograph(64, 64), '.webp'),
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
  thumbnail = cases.jpeg(cases.photograph(8, 8))  # with an end marker of its own
  segment = b'\xff\xe1' + (len(thumbnail) + 8).to_bytes(2, 'big') + b'Exif\0\0' + thumbnail
  yield 'cut behind its thumbnail', b'\xff\xd8' + segment + whole['baseline'][2:-300]


@pytest.mark.parametrize(('name', 'data'), list(damaged()), ids=lambda v: v if isinstance(v, str) else '')
@pytest.mark.parametrize('text', ['decode', 'decode(1)', "decode('any')", 'decode | random_resized_crop(8)'])
def test_damaged_bytes_raise(name, data, text):
  with pytest.raises(DecodeError, match='bytes|JPEG'):
    cases.run(text, {'image': data})


def test_bytes_after_the_end_marker_are_no_damage():
  data = cases.jpeg(cases.photograph(16, 16))
  np.testing.assert_array_equal(images.read(data + b'\0' * 100), images.read(data))


def test_a_picture_that_is_not_as_its_header_says_raises(monkeypatch):
  monkeypatch.setattr(decoding, '_imdecode', lambda data, flags: np.zeros((5, 5, 3), np.uint8))
  with pytest.raises(DecodeError, match=r'\(16, 12\).*\(5, 5\)'):
    decoding.Jpeg(cases.jpeg(cases.photograph(16, 12))).pixels()


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
  cases.run(text, {'image': cases.jpeg(cases.photograph(*shape))})
  assert asked == [reduce]


def test_the_window_of_a_reduced_picture_holds_the_box_and_enough_pixels():
  image = decoding.Jpeg(cases.jpeg(cases.photograph(203, 317)))
  rng = np.random.default_rng(0)
  for _ in range(200):
    h, w = rng.integers(1, 204), rng.integers(1, 318)
    y, x = rng.integers(0, 204 - h), rng.integers(0, 318 - w)
    size = tuple(rng.integers(1, 50, 2).tolist())
    part, (top, left, height, width) = image.window((y, x, h, w), size)
    assert top <= y and left <= x and y + h <= top + height <= 203 and x + w <= left + width <= 317
    assert part.shape[0] >= min(size[0], h) and part.shape[1] >= min(size[1], w)
