"""Images and volumes in folders, of any channel count: JPEG, PNG, WebP, TIFF and NPY."""

import os
import pathlib

import numpy as np

from mim_jax.data import decoding, tiff
from mim_jax.data.sources import CorruptExample, Feature, Source
from mim_jax.errors import ConfigError, MissingData

ENCODED = ('.jpg', '.jpeg', '.png', '.webp')  # given on as bytes, for the decode transform
ARRAYS = ('.tif', '.tiff', '.npy')  # opened here, since they hold more than eight bits or three channels


class FolderSource(Source):
  """Every image below a folder, in the order of their paths.

  When each image lies in one of at least two first-level folders, those are the classes, in sorted order, as field
  `label`. Files are only listed here; a broken one shows when it is read. An NPY file holds [H, W], [H, W, C] or, for
  volumes, [D, H, W, C] or, for the transforms of `volumes`, without channels; it is mapped, so a crop reads no more of
  it than it needs.

  A folder of just two folders, `images` and `masks`, is a set for segmentation: images/a/1.jpg has the labels of its
  pixels in masks/a/1.png or .npy, field `mask` [H, W, 1], or as the file has it, of whole numbers.
  """

  def __init__(self, path):
    root = pathlib.Path(path).expanduser()
    if not root.is_dir():
      raise MissingData(
        f'folder:{path} is not a folder (looked at {root.absolute()}); set data.source to one that holds images'
      )
    self.name, self.root = f'folder:{path}', root
    self.paths = _listing(root)
    if not self.paths:
      raise MissingData(
        f'folder:{path} holds no image; expected files that end in {", ".join(ENCODED + ARRAYS)}, at any depth'
      )
    tops = [p.partition('/')[0] if '/' in p else None for p in self.paths]
    names = sorted(set(tops), key=str)
    self.labels = self.masks = None
    if names == ['images', 'masks']:
      self.paths, self.masks = self._pairs()
      names = []
    self.features = {'image': self._image_feature()}
    if self.masks:
      mask = self._mask(0)
      self.features['mask'] = Feature((None,) * mask.ndim, mask.dtype)
    if None not in names and len(names) > 1:
      number = {name: i for i, name in enumerate(names)}
      self.labels = np.array([number[t] for t in tops], np.int32)
      self.features['label'] = Feature((), np.dtype(np.int32), len(names), tuple(names))

  def _pairs(self):
    """Paths of the images and of their masks, which have the same path but for the first folder and the suffix."""
    stem = lambda path: os.path.splitext(path.partition('/')[2])[0]
    masks = {stem(path): path for path in self.paths if path.startswith('masks/')}
    images = [path for path in self.paths if path.startswith('images/')]
    alone = [path for path in images if stem(path) not in masks]
    if alone or len(images) != len(masks):
      raise ConfigError(
        f'{self.name} holds {len(images)} images and {len(masks)} masks'
        + (f'; {alone[0]} has none' if alone else '')
        + '; expected masks/NAME.png or .npy for each images/NAME.*'
      )
    return images, [masks[stem(path)] for path in images]

  def _image_feature(self):
    """From the kinds of files, and from the header or content of the first few arrays if there are any."""
    arrays = [i for i, p in enumerate(self.paths) if p.lower().endswith(ARRAYS)]
    if not arrays:
      return Feature((None, None, 3), np.dtype(np.uint8))
    for i in arrays[:16]:
      try:
        image = self._image(i)
      except CorruptExample:
        continue
      return Feature((None,) * (image.ndim - 1) + image.shape[-1:], image.dtype)
    raise ConfigError(
      f'{self.name}: none of its first {len(arrays[:16])} TIFF and NPY files can be read ({self.key(arrays[0])}, ...); '
      'replace them by whole ones'
    )

  def __len__(self):
    return len(self.paths)

  def key(self, index):
    return self.paths[index]

  def _read(self, index):
    example = {'image': self._image(index)}
    if self.masks is not None:
      example['mask'] = self._mask(index)
    if self.labels is not None:
      example['label'] = self.labels[index]
    return example

  def _image(self, index):
    image = self._open(self.paths[index])
    return image[..., None] if isinstance(image, np.ndarray) and image.ndim == 2 else image

  def _mask(self, index):
    path = self.masks[index]
    mask = self._open(path)
    if isinstance(mask, bytes):
      try:
        mask = decoding.read(mask, 'any')
      except decoding.DecodeError as e:
        raise CorruptExample(f'{path}: {e}') from e
    if mask.dtype.kind not in 'iub' or (mask.ndim == 3 and mask.shape[-1] == 3):
      raise ConfigError(
        f'{self.name}: {path} holds {mask.dtype} {mask.shape}; a mask has one whole number for each place'
      )
    return mask

  def _open(self, name):
    """A file as an array, or as bytes where a transform is to decode them."""
    path = self.root / name
    try:
      if path.suffix.lower() == '.npy':
        return np.load(path, mmap_mode='r', allow_pickle=False)
      data = path.read_bytes()
      if not data:
        raise CorruptExample(f'{name} is empty')
      return tiff.read(data) if path.suffix.lower() in ARRAYS else data
    except (OSError, ValueError, EOFError) as e:
      raise CorruptExample(f'{type(e).__name__}: {e}') from e


def _listing(root):
  """Paths of images below `root`, relative, with '/', sorted by code point: the same on every host and locale."""
  found, seen = [], set()
  for folder, inner, files in os.walk(root, followlinks=True):
    inner.sort()
    identity = os.stat(folder).st_dev, os.stat(folder).st_ino
    if identity in seen:  # a link back to a folder above would never end
      inner.clear()
      continue
    seen.add(identity)
    inside = os.path.relpath(folder, root).replace(os.sep, '/')
    prefix = '' if inside == '.' else inside + '/'
    found += [prefix + f for f in files if f.lower().endswith(ENCODED + ARRAYS) and not f.startswith('.')]
  return sorted(found)
