"""TIFF of any channel count: satellite images keep ten or more bands in one page, microscopes one band per page.

OpenCV refuses more than four channels and silently reads only the first band of some smaller files, so the layout is
parsed here; only the unpacking of strips compressed otherwise than by zlib is left to it. Covers baseline TIFF 6.0 and
BigTIFF.
"""

import math
import struct
import zlib

import cv2
import numpy as np

# field type -> struct letter (TIFF 6.0, section 2; 13, 16 to 18: BigTIFF)
_TYPES = {1: 'B', 2: 'c', 3: 'H', 4: 'I', 6: 'b', 7: 'B', 8: 'h', 9: 'i', 11: 'f', 12: 'd', 13: 'I'}
_TYPES |= {16: 'Q', 17: 'q', 18: 'Q'}
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _OFFSETS, _SAMPLES, _ROWS, _COUNTS, _PLANAR = (
  256, 257, 258, 259, 262, 273, 277, 278, 279, 284)  # fmt: skip
_PREDICTOR, _TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_COUNTS, _FORMAT = 317, 322, 323, 324, 325, 339
_JPEG, _WHITE_IS_ZERO, _PALETTE, _YCBCR = (6, 7), 0, 3, 6


def read(data):
  """Array [H, W, C] of the stored dtype from the bytes of a TIFF; channels are those of a page, then of the next page.

  Raises ValueError if the bytes are damaged or use a layout that is not supported, with its name.
  """
  try:
    pages = [_page(data, n, tags, order) for n, (tags, order) in enumerate(_directories(data))]
  except (struct.error, KeyError, TypeError, IndexError, ZeroDivisionError, zlib.error, OverflowError) as e:
    raise ValueError(f'TIFF is damaged: {type(e).__name__}: {e}') from e
  if not pages:
    raise ValueError('TIFF holds no page')
  # A page of another size is a thumbnail or an overview, as scanners and GeoTIFF writers append.
  return np.concatenate([p for p in pages if p.shape[:2] == pages[0].shape[:2]], axis=-1)


def _directories(data):
  """Yields ({tag: values}, byte order) per page."""
  order = {b'II': '<', b'MM': '>'}.get(bytes(data[:2]))
  if order is None:
    raise ValueError(f'not a TIFF: it begins with {bytes(data[:4])!r}')
  version = struct.unpack_from(order + 'H', data, 2)[0]
  if version not in (42, 43):
    raise ValueError(f'not a TIFF: version {version}, expected 42 or 43')
  word, count, entry, start = ('I', 'H', 12, 4) if version == 42 else ('Q', 'Q', 20, 8)
  inline = struct.calcsize(word)
  at = struct.unpack_from(order + word, data, start)[0]
  seen = set()
  while at:
    if at in seen:
      raise ValueError('TIFF is damaged: its pages form a circle')
    seen.add(at)
    number = struct.unpack_from(order + count, data, at)[0]
    at += struct.calcsize(count)
    tags = {}
    for _ in range(number):
      tag, kind, length = struct.unpack_from(order + 'HH' + word, data, at)
      if kind in _TYPES:
        size = struct.calcsize('=' + _TYPES[kind]) * length
        where = at + entry - inline
        if size > inline:
          where = struct.unpack_from(order + word, data, where)[0]
        if where + size > len(data):
          raise ValueError('TIFF is damaged: it ends before its tags')
        tags[tag] = struct.unpack_from(f'{order}{length}{_TYPES[kind]}', data, where)
      at += entry
    yield tags, order
    at = struct.unpack_from(order + word, data, at)[0]


def _page(data, number, tags, order):
  width, height = tags[_WIDTH][0], tags[_HEIGHT][0]
  channels = tags.get(_SAMPLES, (1,))[0]
  bits = set(tags.get(_BITS, (1,)))
  compression = tags.get(_COMPRESSION, (1,))[0]
  photometric = tags.get(_PHOTOMETRIC, (1,))[0]
  if bits - {8, 16, 32, 64} or len(bits) > 1 or compression in _JPEG or photometric in (_PALETTE, _YCBCR):
    return _by_opencv(data, number, channels, bits, compression, photometric)
  kind = {1: 'u', 2: 'i', 3: 'f', 4: 'u'}[tags.get(_FORMAT, (1,))[0]]
  dtype = np.dtype(f'{order}{kind}{bits.pop() // 8}')
  separate = tags.get(_PLANAR, (1,))[0] == 2
  depth = 1 if separate else channels  # channels side by side in a chunk
  if _TILE_OFFSETS in tags:
    tall, wide = tags[_TILE_HEIGHT][0], tags[_TILE_WIDTH][0]
    offsets, counts = tags[_TILE_OFFSETS], tags[_TILE_COUNTS]
  else:
    tall, wide = min(tags.get(_ROWS, (height,))[0], height), width
    offsets, counts = tags[_OFFSETS], tags[_COUNTS]
  down, across = math.ceil(height / tall), math.ceil(width / wide)
  if len(offsets) != down * across * (channels if separate else 1) or min(width, height, channels) < 1:
    raise ValueError(f'TIFF is damaged: {len(offsets)} chunks for {width} x {height} x {channels}')
  image = np.zeros((height, width, channels), dtype.newbyteorder('='))
  for k, (offset, count) in enumerate(zip(offsets, counts, strict=True)):
    plane, cell = divmod(k, down * across)
    top, left = cell // across * tall, cell % across * wide
    rows = tall if _TILE_OFFSETS in tags else min(tall, height - top)
    chunk = _unpack(data[offset : offset + count], compression, rows, wide * depth * dtype.itemsize)
    chunk = _undo(chunk, tags.get(_PREDICTOR, (1,))[0], (rows, wide, depth), dtype)
    target = image[top : top + tall, left : left + wide, plane : plane + depth]
    target[...] = chunk[: target.shape[0], : target.shape[1]]
  return np.iinfo(image.dtype).max - image if photometric == _WHITE_IS_ZERO and kind == 'u' else image


def _by_opencv(data, number, channels, bits, compression, photometric):
  """Page `number`, whose pixels are coded (JPEG, palette, bits): OpenCV knows them for one or three channels."""
  if channels not in (1, 3):
    raise ValueError(
      f'TIFF with {channels} channels, bits {sorted(bits)}, compression {compression}, photometric {photometric} is '
      'not supported; convert it to 8, 16 or 32 bits without compression or with deflate'
    )
  found, pages = cv2.imdecodemulti(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED, range=(number, number + 1))
  if not found:
    raise ValueError('TIFF is damaged: OpenCV cannot decode it')
  return pages[0][..., None] if pages[0].ndim == 2 else cv2.cvtColor(pages[0], cv2.COLOR_BGR2RGB)


def _unpack(packed, compression, rows, row_bytes):
  """uint8 [rows, row_bytes]."""
  if compression == 1:
    values = np.frombuffer(packed, np.uint8)
  elif compression in (8, 32946):
    values = np.frombuffer(zlib.decompress(packed), np.uint8)
  else:
    # LZW, PackBits, Zstandard, ... work on bytes and know nothing of channels: as a grey image of its own, with bytes
    # for pixels, OpenCV unpacks any strip.
    grey = np.frombuffer(_grey(packed, compression, rows, row_bytes), np.uint8)
    values = cv2.imdecode(grey, cv2.IMREAD_UNCHANGED)
    if values is None:
      raise ValueError(f'TIFF is damaged, or its compression {compression} is not supported')
  if values.size < rows * row_bytes:
    raise ValueError(f'TIFF is damaged: a strip holds {values.size} bytes, expected {rows * row_bytes}')
  return values.reshape(-1)[: rows * row_bytes].reshape(rows, row_bytes)


def _grey(packed, compression, rows, row_bytes):
  tags = {_WIDTH: row_bytes, _HEIGHT: rows, _BITS: 8, _COMPRESSION: compression, _PHOTOMETRIC: 1, _OFFSETS: 0,
          _SAMPLES: 1, _ROWS: rows, _COUNTS: len(packed)}  # fmt: skip
  tags[_OFFSETS] = 8 + 2 + 12 * len(tags) + 4
  body = b''.join(struct.pack('<HHII', tag, 4, 1, value) for tag, value in tags.items())
  return b'II*\0' + struct.pack('<IH', 8, len(tags)) + body + bytes(4) + bytes(packed)


def _undo(chunk, predictor, shape, dtype):
  """Array of `shape` from bytes, differences along a row summed up (predictor 2) or byte planes joined (3)."""
  rows, wide, depth = shape
  if predictor == 3:  # TIFF technical note 3: differences of bytes, the most significant byte plane first
    planes = np.cumsum(chunk.reshape(rows, -1, depth), axis=1, dtype=np.uint8).reshape(rows, dtype.itemsize, -1)
    return np.ascontiguousarray(planes.transpose(0, 2, 1)).view(dtype.newbyteorder('>')).reshape(shape)
  values = np.ascontiguousarray(chunk).view(dtype).reshape(shape).astype(dtype.newbyteorder('='))
  if predictor == 2:
    return np.cumsum(values, axis=1, dtype=values.dtype)
  if predictor != 1:
    raise ValueError(f'TIFF predictor {predictor} is not supported')
  return values
