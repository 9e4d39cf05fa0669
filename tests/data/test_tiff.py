import contextlib
import struct
import zlib

import cv2
import numpy as np
import pytest

from mim_jax.data import tiff


def write(pages, order='<', planar=1, tile=None, rows=None, pack=None, compression=1, big=False, **tags):
  """Bytes of a TIFF with `pages` [H, W, C], laid out as asked; `pack` compresses the bytes of a chunk."""
  word, count, head = ('Q', 'Q', 16) if big else ('I', 'H', 8)
  inline = 8 if big else 4
  out = bytearray(b'II' if order == '<' else b'MM')
  out += struct.pack(order + 'HHHQ', 43, 8, 0, 0) if big else struct.pack(order + 'HI', 42, 0)
  link = head - inline
  for page in pages:
    height, width, channels = page.shape
    page = page.astype(page.dtype.newbyteorder(order))
    planes = [page[..., k : k + 1] for k in range(channels)] if planar == 2 else [page]
    tall, wide = tile or (rows or height, width)
    offsets, counts = [], []
    for plane in planes:
      for top in range(0, height, tall):
        for left in range(0, width, wide):
          chunk = plane[top : top + tall, left : left + wide]
          if tile:
            chunk = np.pad(chunk, [(0, tall - chunk.shape[0]), (0, wide - chunk.shape[1]), (0, 0)])
          data = np.ascontiguousarray(chunk).tobytes()
          data = pack(data) if pack else data
          offsets.append(len(out))
          counts.append(len(data))
          out += data
    kind = {'u': 1, 'i': 2, 'f': 3}[page.dtype.kind]
    bits = page.dtype.itemsize * 8
    entries = {256: [width], 257: [height], 258: [bits] * channels, 259: [compression], 262: [1], 277: [channels]}
    entries |= {284: [planar], 339: [kind] * channels}
    where = {322: [wide], 323: [tall], 324: offsets, 325: counts} if tile else {273: offsets, 278: [tall], 279: counts}
    entries |= where
    entries |= {int(k[1:]): [v] for k, v in tags.items()}
    packed = []
    for tag, values in sorted(entries.items()):
      body = struct.pack(f'{order}{len(values)}I', *values)
      if len(body) > inline:
        value = struct.pack(order + word, len(out))
        out += body
      else:
        value = body.ljust(inline, b'\0')
      packed.append(struct.pack(order + 'HH' + word, tag, 4, len(values)) + value)
    struct.pack_into(order + word, out, link, len(out))
    out += struct.pack(order + count, len(packed)) + b''.join(packed)
    link = len(out)
    out += bytes(inline)
  return bytes(out)


def picture(channels, dtype=np.uint16, height=37, width=45, seed=0):
  return (np.random.default_rng(seed).random((height, width, channels)) * 200).astype(dtype)


@pytest.mark.parametrize('channels', [1, 2, 3, 4, 13])
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16, np.int16, np.float32])
@pytest.mark.parametrize('planar', [1, 2])
def test_any_channels_dtype_and_layout(channels, dtype, planar):
  image = picture(channels, dtype)
  got = tiff.read(write([image], planar=planar, rows=8))
  assert got.dtype == dtype
  np.testing.assert_array_equal(got, image)


@pytest.mark.parametrize(
  'options',
  [{'order': '>'}, {'big': True}, {'big': True, 'order': '>'}, {'tile': (16, 32)}, {'tile': (16, 16), 'planar': 2}],
)
def test_byte_order_bigtiff_and_tiles(options):
  image = picture(5)
  np.testing.assert_array_equal(tiff.read(write([image], **options)), image)


def test_deflate_with_and_without_predictor():
  image = picture(6)
  np.testing.assert_array_equal(tiff.read(write([image], pack=zlib.compress, compression=8, rows=10)), image)
  differences = np.diff(image, axis=1, prepend=np.zeros_like(image[:, :1]))
  packed = write([differences], pack=zlib.compress, compression=8, t317=2)
  np.testing.assert_array_equal(tiff.read(packed), image)


def test_floating_point_predictor():
  image = picture(2, np.float32)
  height, width, channels = image.shape
  values = image.astype('>f4').reshape(height, -1).view(np.uint8).reshape(height, width * channels, 4)
  steps = values.transpose(0, 2, 1).reshape(height, -1, channels)  # byte planes, the most significant first
  coded = np.diff(steps, axis=1, prepend=np.zeros_like(steps[:, :1])).astype(np.uint8)
  data = write([coded.reshape(height, width, -1).view(np.float32)], pack=zlib.compress, compression=8, t317=3)
  np.testing.assert_array_equal(tiff.read(data), image)


def lzw(data):
  """Bytes packed by LZW, by way of a grey image that OpenCV writes in one strip."""
  values = np.frombuffer(data, np.uint8)[None]
  file = cv2.imencode('.tif', values, [cv2.IMWRITE_TIFF_COMPRESSION, 5, cv2.IMWRITE_TIFF_PREDICTOR, 1])[1].tobytes()
  (tags, _), *_ = tiff._directories(file)
  assert tags[259] == (5,) and len(tags[273]) == 1
  return file[tags[273][0] : tags[273][0] + tags[279][0]]


def test_lzw_with_many_channels():
  image = picture(13)
  np.testing.assert_array_equal(tiff.read(write([image], pack=lzw, compression=5, rows=16)), image)


@pytest.mark.parametrize('compression', [1, 5, 8, 32773])
def test_what_opencv_writes(compression):
  for image in (picture(3, np.uint8), picture(1), picture(3)):
    file = cv2.imencode('.tif', image[..., ::-1], [cv2.IMWRITE_TIFF_COMPRESSION, compression])[1].tobytes()
    np.testing.assert_array_equal(tiff.read(file), image)


def test_jpeg_inside_is_left_to_opencv():
  smooth = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None, None] * 3, (64, 64, 3)).copy()
  written, file = cv2.imencode('.tif', smooth, [cv2.IMWRITE_TIFF_COMPRESSION, 7, cv2.IMWRITE_TIFF_ROWSPERSTRIP, 64])
  assert written
  assert np.abs(tiff.read(file.tobytes()).astype(int) - smooth).max() < 12


def test_pages_are_channels_and_thumbnails_are_left_out():
  pages = [picture(1, seed=k) for k in range(4)]
  np.testing.assert_array_equal(tiff.read(write([*pages, picture(1, height=8, width=8)])), np.concatenate(pages, -1))


def test_white_is_zero_is_turned_over():
  image = picture(1, np.uint8)
  np.testing.assert_array_equal(tiff.read(write([image], t262=0)), 255 - image)


def test_damage_is_a_value_error():
  whole = write([picture(5)], pack=zlib.compress, compression=8, rows=8)
  rng = np.random.default_rng(0)
  for cut in rng.integers(0, len(whole), 60):
    with pytest.raises(ValueError):
      tiff.read(whole[:cut])
  for place in rng.integers(0, len(whole), 200):  # may go unseen in the pixels, but is never another exception
    broken = bytearray(whole)
    broken[place] ^= 0xFF
    with contextlib.suppress(ValueError):
      tiff.read(bytes(broken))
  with pytest.raises(ValueError, match='not a TIFF'):
    tiff.read(b'\xff\xd8\xff\xe0 JPEG')


def test_unknown_layout_is_named():
  with pytest.raises(ValueError, match='5 channels.*compression 7'):
    tiff.read(write([picture(5, np.uint8)], compression=7))
