"""Colour, RandAugment, blur and erasing on one example: numpy and OpenCV, all randomness from the generator passed in.

A transform is `fn(example, rng, **options) -> example` and acts on `example['image']` [H, W, C]. Those that move pixels
move `example['mask']` [H, W, ...] (nearest neighbour) and `example['boxes']` [n, 4] (x0, y0, x1, y1 in pixels) alike.
The colour functions repeat the 8-bit arithmetic of Pillow, on which the published recipes were tuned; where OpenCV
rounds and Pillow truncates, values differ by one level of 255.
"""

import math

import cv2
import numpy as np

from mim_jax.errors import ConfigError


def _need(image, name, channels=(1, 3)):
  if image.dtype != np.uint8 or image.shape[-1] not in channels:
    raise ConfigError(
      f'{name} works on 8-bit images of {" or ".join(map(str, channels))} channels, found {image.dtype} with '
      f'{image.shape[-1]}; put it before normalize, and use decode(channels=3) for grey images'
    )


def _lut(image, table):
  """image [H, W, C] uint8 through table [256] or [256, C] (any number, truncated to 0..255 as Pillow does)."""
  table = np.clip(table, 0, 255).astype(np.uint8)
  return cv2.LUT(image, table if table.ndim == 1 else table[None]).reshape(image.shape)


def _mix(image, other, factor):
  """other + factor * (image - other), saturated; factor may lie outside [0, 1]."""
  return cv2.addWeighted(image, factor, other, 1 - factor, 0).reshape(image.shape)


def _luma(image):
  return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) if image.shape[-1] == 3 else image[..., 0]


def brightness(image, factor):
  """Every value times `factor`: image [H, W, C] uint8; 1 leaves it, 0 gives black."""
  return _lut(image, np.arange(256) * factor)


def contrast(image, factor):
  """Distance from the mean luma times `factor`: image [H, W, 1 or 3] uint8; 1 leaves it, 0 gives flat grey."""
  mean = int(cv2.mean(_luma(image))[0] + 0.5)
  return _lut(image, mean + factor * (np.arange(256.0) - mean))


def saturation(image, factor):
  """Distance of each pixel from its own luma times `factor`; a grey image stays as it is."""
  return image if image.shape[-1] == 1 else _mix(image, cv2.cvtColor(_luma(image), cv2.COLOR_GRAY2RGB), factor)


def hue(image, turn):
  """Hue turned by `turn` of the circle, in [-0.5, 0.5]; a grey image stays as it is."""
  if image.shape[-1] == 1:
    return image
  hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
  hsv[..., 0] += np.uint8(int(turn * 255) % 256)  # wraps around, as a circle should
  return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # Pillow's SMOOTH


def sharpness(image, factor):
  """Distance from a smoothed copy times `factor`; the outermost pixels stay as they are, as in Pillow."""
  smooth = image.copy()
  if min(image.shape[:2]) > 2:
    smooth[1:-1, 1:-1] = cv2.filter2D(image, -1, _SMOOTH).reshape(image.shape)[1:-1, 1:-1]
  return _mix(image, smooth, factor)


def _histograms(image):
  return [cv2.calcHist([image], [c], None, [256], [0, 256]).ravel().astype(np.int64) for c in range(image.shape[-1])]


def auto_contrast(image):
  """Stretches each channel to 0..255; a flat channel stays as it is."""
  tables = []
  for counts in _histograms(image):
    low, high = np.flatnonzero(counts)[[0, -1]]
    tables.append((np.arange(256) - low) * (255 / (high - low)) if high > low else np.arange(256))
  return _lut(image, np.stack(tables, axis=1))


def equalize(image):
  """Makes the histogram of each channel flat, by the integer rule of Pillow."""
  tables = []
  for counts in _histograms(image):
    used = counts[counts > 0]
    step = (used.sum() - used[-1]) // 255
    below = np.concatenate([[0], np.cumsum(counts)[:-1]])
    tables.append((step // 2 + below) // step if step else np.arange(256))
  return _lut(image, np.stack(tables, axis=1))


def solarize(image, threshold):
  """Inverts the values from `threshold` up."""
  values = np.arange(256)
  return _lut(image, np.where(values < threshold, values, 255 - values))


def solarize_add(image, add):
  """Adds `add` to the values below 128."""
  values = np.arange(256)
  return _lut(image, np.where(values < 128, values + add, values))


def posterize(image, bits):
  """Keeps the `bits` highest bits of every value; 0 gives black."""
  return _lut(image, np.arange(256) & ~(2 ** (8 - bits) - 1))


def move_boxes(boxes, matrix, shift, height, width):
  """Upright boxes around boxes [n, 4] (x0, y0, x1, y1) under p -> matrix p + shift, cut at the image -> float32 [n, 4].

  A box that leaves the image is left with no area, so the rows stay as many and in order.
  """
  x, y = boxes[:, [0, 2, 2, 0]], boxes[:, [1, 1, 3, 3]]
  corners = np.stack([x, y], axis=-1) @ np.asarray(matrix, np.float64).T + shift  # [n, 4, 2]
  moved = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
  return np.clip(moved, 0, [width, height, width, height]).astype(np.float32)


def warp(example, matrix, shift, fill):
  """Samples image (bicubic), mask (nearest) and boxes of an example at `matrix` p + shift for every output place p.

  Coordinates start at the corner of the first pixel, so pixel i has its centre at i + 0.5. Places from outside the
  image get `fill` (0 in the mask).
  """
  image = example['image']
  height, width = image.shape[:2]
  matrix, shift = np.asarray(matrix, np.float64), np.asarray(shift, np.float64)
  # OpenCV counts from pixel centres: half a pixel is added before and taken off after.
  affine = np.column_stack([matrix, shift + matrix @ [0.5, 0.5] - 0.5])
  flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
  moved = cv2.warpAffine(image, affine, (width, height), flags=flags, borderMode=cv2.BORDER_CONSTANT, borderValue=fill)
  example = {**example, 'image': moved.reshape(image.shape)}
  if 'mask' in example:
    places = np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), axis=-1)
    x, y = np.moveaxis(np.floor(places @ matrix.T + shift).astype(np.int64), -1, 0)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    moved = np.zeros_like(example['mask'])
    moved[inside] = example['mask'][y[inside], x[inside]]
    example['mask'] = moved
  if 'boxes' in example:
    forward = np.linalg.inv(matrix)
    example['boxes'] = move_boxes(example['boxes'], forward, -forward @ shift, height, width)
  return example


def _rotation(level, height, width):
  angle = math.radians(30 * level)
  matrix = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
  centre = np.array([width / 2, height / 2])
  return matrix, centre - matrix @ centre


# level in [-1, 1]: its sign is a direction where there are two. Ranges: the "increasing" set of timm
# (data/auto_augment.py), in which every operation is stronger at a higher level; in its other set posterize and
# solarize grow weaker and the enhancements pass through "no change".
_COLOUR = {
  'auto_contrast': lambda image, level: auto_contrast(image),
  'equalize': lambda image, level: equalize(image),
  'invert': lambda image, level: 255 - image,
  'posterize': lambda image, level: posterize(image, 4 - int(abs(level) * 4)),
  'solarize': lambda image, level: solarize(image, 256 - int(abs(level) * 256)),
  'solarize_add': lambda image, level: solarize_add(image, int(abs(level) * 110)),
  'color': lambda image, level: saturation(image, 1 + 0.9 * level),
  'contrast': lambda image, level: contrast(image, 1 + 0.9 * level),
  'brightness': lambda image, level: brightness(image, 1 + 0.9 * level),
  'sharpness': lambda image, level: sharpness(image, 1 + 0.9 * level),
}
_SHAPE = {
  'rotate': _rotation,
  'shear_x': lambda level, height, width: ([[1, 0.3 * level], [0, 1]], [0, 0]),
  'shear_y': lambda level, height, width: ([[1, 0], [0.3 * level, 1]], [0, 0]),
  'translate_x': lambda level, height, width: (np.eye(2), [0.45 * level * width, 0]),
  'translate_y': lambda level, height, width: (np.eye(2), [0, 0.45 * level * height]),
}
OPERATIONS = (*_COLOUR, *_SHAPE)


def operate(example, name, level, fill=(124, 116, 104)):
  """One RandAugment operation (a name of OPERATIONS) at signed `level` in [-1, 1] on an RGB uint8 example."""
  image = example['image']
  if name in _COLOUR:
    return {**example, 'image': _COLOUR[name](image, level)}
  return warp(example, *_SHAPE[name](level, *image.shape[:2]), fill)


def rand_augment(example, rng, magnitude=9.0, std=0.5, ops=2, p=0.5, fill=(124, 116, 104)):
  """RandAugment (arXiv 1909.13719) as fine-tuning recipes use it: `ops` operations, each done with probability `p`.

  The magnitude of each, of 10, is normal(magnitude, std) cut to [0, 10]. timm writes this 'rand-m9-mstd0.5-inc1'.
  fill: RGB of places that come from outside the image, by default the ImageNet mean.
  """
  _need(example['image'], 'rand_augment', (3,))
  for _ in range(ops):
    name = OPERATIONS[int(rng.random() * len(OPERATIONS))]
    if rng.random() < p:
      level = min(max(rng.normal(magnitude, std), 0.0), 10.0) / 10
      example = operate(example, name, level if rng.random() < 0.5 else -level, fill)
  return example


def color_jitter(example, rng, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=1.0):
  """With probability `p` changes brightness, contrast, saturation, hue, in random order, as torchvision does.

  A factor is uniform in [max(0, 1 - x), 1 + x], the turn of hue uniform in [-hue, hue] of the circle.
  """
  image = example['image']
  _need(image, 'color_jitter')
  if rng.random() >= p:
    return example
  for k in rng.permutation(4):
    strength = (brightness, contrast, saturation, hue)[k]
    if strength:
      low, high = (-strength, strength) if k == 3 else (max(0.0, 1 - strength), 1 + strength)
      image = _JITTER[k](image, low + (high - low) * rng.random())
  return {**example, 'image': image}


_JITTER = (brightness, contrast, saturation, hue)  # the functions, which color_jitter's options hide


def grayscale(example, rng, p=0.2):
  """With probability `p` replaces the colours by their luma, repeated over the channels."""
  image = example['image']
  _need(image, 'grayscale')
  if image.shape[-1] == 1 or rng.random() >= p:
    return example
  return {**example, 'image': cv2.cvtColor(_luma(image), cv2.COLOR_GRAY2RGB)}


def gaussian_blur(example, rng, kernel=0, sigma=(0.1, 2.0), p=0.5):
  """With probability `p` blurs by a Gaussian of uniform sigma in pixels; kernel: its width in pixels, 0 fits sigma."""
  if rng.random() >= p:
    return example
  image = example['image']
  width = sigma[0] + (sigma[1] - sigma[0]) * rng.random()
  blurred = cv2.GaussianBlur(image, (kernel, kernel), width, borderType=cv2.BORDER_REFLECT_101)
  return {**example, 'image': blurred.reshape(image.shape)}


def random_erasing(example, rng, p=0.25, area=(0.02, 0.3333), ratio=(0.3, 3.3333)):
  """With probability `p` fills one rectangle with normal noise, a draw per value (arXiv 1708.04896; timm's pixel mode).

  The rectangle has `area` of the image and log-uniform height / width in `ratio`, tried up to 10 times. It comes after
  normalize, where noise of mean 0 and deviation 1 looks like the data.
  """
  image = example['image']
  if image.dtype != np.float32:
    raise ConfigError(f'random_erasing puts noise into normalised float32 images, found {image.dtype}; normalize first')
  if rng.random() >= p:
    return example
  height, width, channels = image.shape
  for _ in range(10):
    draws = rng.random(4)
    size = height * width * (area[0] + (area[1] - area[0]) * draws[0])
    aspect = ratio[0] * (ratio[1] / ratio[0]) ** draws[1]
    h, w = round(math.sqrt(size * aspect)), round(math.sqrt(size / aspect))
    if 0 < h < height and 0 < w < width:
      y, x = int(draws[2] * (height - h + 1)), int(draws[3] * (width - w + 1))
      image = image.copy()
      image[y : y + h, x : x + w] = rng.standard_normal((h, w, channels), np.float32)
      return {**example, 'image': image}
  return example
