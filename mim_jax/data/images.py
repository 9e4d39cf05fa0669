"""Transforms of images: decode, crop, resize, flip, normalise; with `augment` all that a config string can name.

`parse('decode | random_resized_crop(224, scale=(0.2, 1.0)) | flip | normalize')` gives a `Chain`. A transform is
`fn(example, rng, **options) -> example` on `example['image']` [H, W, C]; those that move pixels move `example['mask']`
[H, W, ...] (nearest neighbour) and `example['boxes']` [n, 4] (x0, y0, x1, y1 in pixels) alike. Pixels are uint8 until
`normalize`, which works on whole batches.
"""

import math

import cv2
import numpy as np

from mim_jax.data import aside, augment, channels, tables, text, views, volumes
from mim_jax.data.chain import CHECKS, Chain, describe, parse, register
from mim_jax.data.decoding import DecodeError, Jpeg, convert, is_jpeg, read
from mim_jax.errors import ConfigError
from mim_jax.ops.pixels import STATS, map_pixels

__all__ = [
  'Chain',
  'DecodeError',
  'STATS',
  'describe',
  'parse',
  'read',
  'register',
  'aside',
  'channels',
  'tables',
  'text',
  'views',
  'volumes',
]

PIXELS = ('image', 'views', 'false_image')  # fields that `normalize` turns into numbers


@register(lazy=True)
def decode(example, rng, channels=None):
  """Bytes to pixels in RGB order; channels: None (files give 3, arrays stay as they are), 1, 3, or 'any' (as stored).

  With 'any' a file keeps alpha and 16 bits. JPEGs are decoded by the crop or resize that follows, at no more resolution
  than it needs.
  """
  image = example['image']
  if isinstance(image, np.ndarray):
    return {**example, 'image': convert(image, channels)}
  if is_jpeg(image) and channels != 'any':
    return {**example, 'image': Jpeg(image, grey=channels == 1)}
  return {**example, 'image': read(image, channels)}


def _size(example):
  image = example['image']
  return (image.height, image.width) if isinstance(image, Jpeg) else image.shape[:2]


def _pair(size):
  return (size, size) if isinstance(size, int) else size


_METHODS = {'bicubic': cv2.INTER_CUBIC, 'bilinear': cv2.INTER_LINEAR, 'lanczos': cv2.INTER_LANCZOS4}
_SCALABLE = tuple(map(np.dtype, ('uint8', 'uint16', 'int16', 'float32', 'float64')))


def scaled(image, size, method='bicubic'):
  """image [H, W, C] -> [*size, C], antialiased like Pillow's filters, on which the published recipes were tuned.

  On photographs the mean difference from Pillow's bicubic is 0.3 to 0.7 of 255 up to a shrinking by 1.4, about 1 up to 2
  and 1.2 to 1.8 beyond; OpenCV's own bicubic is off by 3 at 1.7.
  """
  height, width = image.shape[:2]
  fy, fx = height / size[0], width / size[1]
  if fy == fx == 1:
    return image
  if image.dtype not in _SCALABLE:
    raise ConfigError(f'images of {image.dtype} cannot be scaled; store them as {", ".join(map(str, _SCALABLE))}')
  channels = image.shape[-1]
  if channels > 4:  # the most that OpenCV takes means of
    parts = [np.ascontiguousarray(image[..., first : first + 4]) for first in range(0, channels, 4)]
    return np.concatenate([scaled(part, size, method) for part in parts], axis=-1)
  interpolation = _METHODS[method]
  # OpenCV's kernels do not widen when shrinking, so they alias. Nearly at the same size that is the least of errors; up to
  # 2 it is cheaper and closer to Pillow to go to twice the size and take means of 2 x 2; beyond, area means are best.
  if 1.05 < max(fy, fx) <= 2:
    if fy * fx > 1.6**2:  # there the cubic kernel is too sharp
      interpolation = cv2.INTER_LINEAR
    image = cv2.resize(image, (2 * size[1], 2 * size[0]), interpolation=interpolation)
    interpolation = cv2.INTER_AREA
  elif max(fy, fx) > 2:
    if min(fy, fx) >= 1:
      interpolation = cv2.INTER_AREA
    else:  # INTER_AREA turns bilinear unless both sides shrink, so the shrinking side goes first, alone
      between = (size[1], height) if fx > 1 else (width, size[0])
      image = cv2.resize(image, between, interpolation=cv2.INTER_AREA)
  image = cv2.resize(image, size[::-1], interpolation=interpolation)
  return image if image.ndim == 3 else image[..., None]


def _nearest(mask, size):
  rows, columns = ((np.arange(n) + 0.5) * have / n for n, have in zip(size, mask.shape[:2], strict=True))
  return mask.take(rows.astype(np.int64), axis=0).take(columns.astype(np.int64), axis=1)


def _crop_resize(example, box, size, method, second=None):
  """Cuts `box` (y, x, h, w) out of an example and scales it to `size` (height, width); `second`: (size, method) of `token_image`."""
  image = example['image']
  if isinstance(image, Jpeg):
    image, box = image.window(box, size)
    y, x, h, w = box
  else:
    y, x, h, w = box
    image = image[y : y + h, x : x + w]
  example = {**example, 'image': scaled(image, size, method)}
  if second:
    example['token_image'] = scaled(image, *second)
  if 'mask' in example:
    example['mask'] = _nearest(example['mask'][y : y + h, x : x + w], size)
  if 'boxes' in example:
    scale = np.array([size[1] / w, size[0] / h])
    example['boxes'] = augment.move_boxes(example['boxes'], np.diag(scale), -scale * [x, y], *size)
  return example


def sample_crop(rng, height, width, scale, ratio):
  """Box (y, x, h, w) of torchvision's RandomResizedCrop.

  Area uniform in `scale` of the image, width / height log-uniform in `ratio`, up to 10 tries; if none fits, the largest
  centre crop whose aspect is in `ratio`.
  """
  for _ in range(10):
    top, left, h, w = _sample(rng, height, width, scale, ratio)
    if 0 < h <= height and 0 < w <= width:
      return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
  h = min(height, max(1, round(width / ratio[0])))
  w = min(width, max(1, round(height * ratio[1])))
  return (height - h) // 2, (width - w) // 2, h, w


def _sample(rng, height, width, scale, ratio):
  """Two uniforms for the place, and a height and width that may exceed the image."""
  area, aspect, top, left = rng.random(4).tolist()
  area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
  aspect = ratio[0] * (ratio[1] / ratio[0]) ** aspect
  return top, left, round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))


@register(lazy=True)
def random_resized_crop(example, rng, size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), method='bicubic'):
  """A crop of `scale` of the area and width / height in `ratio`, brought to `size`, one side or (height, width)."""
  return _crop_resize(example, sample_crop(rng, *_size(example), scale, ratio), _pair(size), method)


@register(lazy=True)
def two_size_crop(
  example, rng, size, second, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), method='bicubic', second_method='lanczos'
):
  """random_resized_crop, and the same crop at the size `second` as `token_image`, for a tokenizer of other patches."""
  box = sample_crop(rng, *_size(example), scale, ratio)
  return _crop_resize(example, box, _pair(size), method, (_pair(second), second_method))


@register
def second_size(example, rng, second, second_method='lanczos'):
  """The image also at the size `second` as `token_image`; crops and resizes come before."""
  return {**example, 'token_image': scaled(example['image'], _pair(second), second_method)}


@register(lazy=True)
def one_shot_crop(example, rng, size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), method='bicubic'):
  """random_resized_crop with one draw, each side cut to the image: the crop of MAE's linear probe and of CropMAE."""
  height, width = _size(example)
  top, left, h, w = _sample(rng, height, width, scale, ratio)
  h, w = min(max(h, 1), height), min(max(w, 1), width)
  box = int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
  return _crop_resize(example, box, _pair(size), method)


@register(lazy=True)
def resize(example, rng, size, method='bicubic'):
  """Brings the short side to `size` pixels, aspect kept; (height, width) brings the image to exactly that."""
  height, width = _size(example)
  if isinstance(size, int):
    short = min(height, width)
    size = (size * height // short, size * width // short)
  return _crop_resize(example, (0, 0, height, width), size, method)


CHECKS['multiple'] = ('a number of pixels, 1 or more', lambda v: type(v) is int and v > 0)


@register(lazy=True)
def resize_long(example, rng, size: int, multiple=1, method='bicubic'):
  """Brings the long side to `size` pixels and the other, aspect kept, down to a multiple of `multiple`: frames of VIP."""
  height, width = _size(example)
  short = max(size * min(height, width) // max(height, width) // multiple, 1) * multiple
  size = (short, size) if width >= height else (size, short)
  return _crop_resize(example, (0, 0, height, width), size, method)


def _window(example, y, x, h, w):
  """Cuts a window that may reach beyond the image, where it is 0."""

  def cut(array):
    height, width = array.shape[:2]
    if y >= 0 and x >= 0 and y + h <= height and x + w <= width:
      return array[y : y + h, x : x + w]
    out = np.zeros((h, w, *array.shape[2:]), array.dtype)
    part = array[max(y, 0) : y + h, max(x, 0) : x + w]
    top, left = max(-y, 0), max(-x, 0)
    out[top : top + part.shape[0], left : left + part.shape[1]] = part
    return out

  example = {**example, 'image': cut(example['image'])}
  if 'mask' in example:
    example['mask'] = cut(example['mask'])
  if 'boxes' in example:
    example['boxes'] = augment.move_boxes(example['boxes'], np.eye(2), [-x, -y], h, w)
  return example


@register
def center_crop(example, rng, size):
  """The middle `size` pixels, one side or (height, width); a smaller image is an error, so resize comes before."""
  (height, width), (h, w) = _size(example), _pair(size)
  if h > height or w > width:
    raise ConfigError(f'center_crop({size}) got an image of {height} x {width}; write resize({max(h, w)}) before it')
  return _window(example, round((height - h) / 2), round((width - w) / 2), h, w)


@register
def random_crop(example, rng, size, pad=0):
  """`size` pixels, one side or (height, width), from a random place of the image with `pad` pixels of 0 around it."""
  (height, width), (h, w) = _size(example), _pair(size)
  rows, columns = height + 2 * pad - h, width + 2 * pad - w
  if rows < 0 or columns < 0:
    raise ConfigError(f'random_crop({size}, pad={pad}) got an image of {height} x {width}; pad more, or resize before')
  return _window(example, int(rng.random() * (rows + 1)) - pad, int(rng.random() * (columns + 1)) - pad, h, w)


@register
def flip(example, rng, p=0.5):
  """Swaps left and right with probability p."""
  if rng.random() >= p:
    return example
  image = example['image']
  example = {**example, 'image': cv2.flip(image, 1).reshape(image.shape)}
  for name in ('mask', 'token_image'):
    if name in example:
      example[name] = example[name][:, ::-1]
  if 'boxes' in example:
    height, width = image.shape[:2]
    example['boxes'] = augment.move_boxes(example['boxes'], [[-1, 0], [0, 1]], [width, 0], height, width)
  return example


CHECKS['name'] = ('a name in quotes', lambda v: isinstance(v, str) and v.isidentifier())


@register
def keep(example, rng, name):
  """The image as it is at this point, also under another name: keep('image_u8') before normalize, for a target made of pixels."""
  return {**example, name: example['image']}


@register(others=True)
def false_image(example, rng, other):
  """Adds `false_image`, that of an example drawn uniformly from the whole source, by the transforms before this one."""
  return {**example, 'false_image': other()['image']}


CHECKS['stats'] = (
  f'one of {", ".join(STATS)} or (mean, std)',
  lambda v: v in STATS if isinstance(v, str) else isinstance(v, tuple) and len(v) == 2,
)


@register(batch=True)
def normalize(batch, stats='imagenet'):
  """(x / 255 - mean) / std as float32; stats: 'imagenet', 'clip', 'half' (to [-1, 1]), 'none' ([0, 1]) or (mean, std).

  It works on those of the fields in PIXELS [..., W, C] that there are. 16-bit images are divided by 65535; float images are
  taken to be in [0, 1] already.
  """
  found = [name for name in PIXELS if name in batch]
  if not found:
    raise ConfigError(f'normalize works on {" and ".join(PIXELS)}, the batch holds {", ".join(sorted(batch))}')
  return {**batch, **{name: _normalized(batch[name], stats) for name in found}}


def _normalized(image, stats):
  mean, std = (np.atleast_1d(np.asarray(s, np.float64)) for s in (STATS[stats] if isinstance(stats, str) else stats))
  width, channels = image.shape[-2:]
  if not {mean.size, std.size} <= {1, channels}:
    raise ConfigError(
      f'normalize({stats!r}) is for {mean.size} channels, the images have {channels}; '
      f'give (mean, std) with {channels} values each or one'
    )
  unit = np.iinfo(image.dtype).max if image.dtype.kind in 'iu' else 1
  # One row of pixels per inner loop: over the 3 channels alone numpy would be many times slower.
  scale, shift = (
    np.tile(np.broadcast_to(v, channels), width).astype(np.float32) for v in (1 / (std * unit), -mean / std)
  )
  out = np.multiply(image.reshape(-1, width * channels), scale, dtype=np.float32)
  out += shift
  return out.reshape(image.shape)


@register(batch=True)
def map_token_image(batch):
  """`token_image` uint8, where there is one, as the float32 pixels of DALL-E's tokenizer: 0.8 x + 0.1 of x in [0, 1]."""
  if 'token_image' not in batch:  # an evaluator that reads the image alone
    return batch
  return {**batch, 'token_image': map_pixels(batch['token_image'].astype(np.float32) / 255)}


@register(batch=True)
def to_float(batch):
  """x / 255 as float32 in [0, 1]."""
  return normalize(batch, 'none')


register(augment.color_jitter)
register(augment.gaussian_blur)
register(augment.grayscale)
register(augment.rand_augment)
register(augment.random_erasing)
