"""Bytes of a file to pixels, RGB order, whole pictures only; JPEGs lazily, at no more resolution than a crop needs."""

import io

import cv2
import numpy as np

from mim_jax.errors import ConfigError, UserError

# Loader threads already fill the cores; with OpenCV's own on top each call would wait for one pool shared by all.
cv2.setNumThreads(0)


class DecodeError(UserError):
  """Bytes that are not a whole picture. The pipeline replaces such an example."""


# The "reduced" bits are those of the greyscale flags: the colour ones hold IMREAD_COLOR, which excludes RGB order.
_REDUCED = {
  1: 0,
  2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
  4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
  8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}


class Jpeg:
  """A JPEG whose size is known from its header and whose pixels are made when asked for, as few as will do.

  height, width: as displayed, that is with the EXIF orientation applied.
  Raises DecodeError for a broken header and for a file cut short: some OpenCV versions fill the missing part with grey
  without a word, so the end marker is looked for here. Damage in the middle of the compressed data is not found.
  """

  __slots__ = ('data', 'grey', 'height', 'width')

  def __init__(self, data, grey=False):
    self.data, self.grey = data, grey
    i, orientation = 2, 1
    while (i := data.find(b'\xff', i)) >= 0 and i + 9 < len(data):
      marker = data[i + 1]
      if marker == 0xFF:  # fill byte
        i += 1
      elif marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:  # stand alone, without a length
        i += 2
      elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame: the size
        self.height, self.width = _int16(data, i + 5), _int16(data, i + 7)
        break
      elif marker in (0xD9, 0xDA):
        raise DecodeError(f'JPEG of {len(data)} bytes has pixels before its size')
      else:
        length = _int16(data, i + 2)
        if marker == 0xE1 and data[i + 4 : i + 10] == b'Exif\0\0':
          orientation = _orientation(data[i + 10 : i + 2 + length])
        i += 2 + length
    else:
      raise DecodeError(f'JPEG of {len(data)} bytes ends within its header')
    if data.rfind(b'\xff\xd9', i) < 0:
      raise DecodeError(f'JPEG of {len(data)} bytes is cut short: its end marker is missing')
    if 5 <= orientation <= 8:
      self.height, self.width = self.width, self.height

  def pixels(self, reduce=1):
    """uint8 [ceil(height / reduce), ceil(width / reduce), 1 or 3]; reduce 1, 2, 4 or 8 is done while decoding."""
    image = _imdecode(self.data, _REDUCED[reduce] | (cv2.IMREAD_GRAYSCALE if self.grey else cv2.IMREAD_COLOR_RGB))
    expected = -(-self.height // reduce), -(-self.width // reduce)
    if image.shape[:2] != expected:
      raise DecodeError(f'JPEG header says {expected}, the decoded picture is {image.shape[:2]} (height, width)')
    return image

  def window(self, box, size):
    """Pixels that hold `box` (y, x, h, w) at no less than `size` (height, width), and the box they cover.

    A reduced picture has fewer places to cut at, so the box grows to the next of them: by less than one output pixel.
    """
    y, x, h, w = box
    r = next((r for r in (8, 4, 2) if h >= r * size[0] and w >= r * size[1]), 1)
    image = self.pixels(r)
    top, left, bottom, right = y // r, x // r, -(-(y + h) // r), -(-(x + w) // r)
    y, x = top * r, left * r
    return image[top:bottom, left:right], (y, x, min(bottom * r, self.height) - y, min(right * r, self.width) - x)


def _int16(data, i):
  return data[i] << 8 | data[i + 1]


def _orientation(tiff):
  """EXIF orientation, 1 to 8, from the TIFF block of an Exif segment; 1 where there is none."""
  order = {b'II': 'little', b'MM': 'big'}.get(tiff[:2])
  if order is None:
    return 1
  number = lambda start, size: int.from_bytes(tiff[start : start + size], order)
  start = number(4, 4)
  for entry in range(start + 2, min(start + 2 + 12 * number(start, 2), len(tiff) - 11), 12):
    if number(entry, 2) == 0x0112:
      return number(entry + 8, 2)
  return 1


def _imdecode(data, flags):
  try:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
  except cv2.error as error:  # some decoders raise, others return None
    raise DecodeError(f'{len(data)} bytes starting {data[:8]!r} cannot be decoded: {error.err}') from error
  if image is None:
    raise DecodeError(f'{len(data)} bytes starting {data[:8]!r} are no whole picture of a format that OpenCV knows')
  return image if image.ndim == 3 else image[..., None]


def is_jpeg(data):
  return data[:2] == b'\xff\xd8'


def read(data, channels=None):
  """Decodes the bytes of one file: JPEG, PNG, WebP, TIFF, BMP or NPY -> [H, W, C].

  channels: None gives 3 (NPY: what it holds), 1 or 3 that many, 'any' what is stored: alpha and 16 bits are kept, the
  EXIF orientation is not applied. Raises DecodeError.
  """
  if data[:6] == b'\x93NUMPY':
    try:
      array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError) as error:
      raise DecodeError(f'NPY of {len(data)} bytes: {error}') from error
    return convert(array, channels)
  if is_jpeg(data):
    jpeg = Jpeg(data, grey=channels == 1)
    if channels != 'any':
      return jpeg.pixels()
  if channels != 'any':
    return _imdecode(data, cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR_RGB)
  image = _imdecode(data, cv2.IMREAD_UNCHANGED)
  return np.ascontiguousarray(image[..., [2, 1, 0, 3][: image.shape[-1]]]) if image.shape[-1] in (3, 4) else image


def convert(image, channels=None):
  """An array [H, W] or [H, W, C] as [H, W, channels]; None and 'any' keep C, 1 is repeated to 3, 3 becomes luma."""
  if image.ndim == 2:
    image = image[..., None]
  found = image.shape[-1]
  if channels in (None, 'any', found):
    return image
  if (found, channels) == (1, 3):
    return np.repeat(image, 3, axis=-1)
  if (found, channels) == (3, 1):
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]
  raise ConfigError(
    f'decode(channels={channels}) got an array of shape {image.shape}; leave channels out to keep all {found}'
  )
