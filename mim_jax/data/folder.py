"""Images in folders, of any channel count: JPEG, PNG, WebP, TIFF and NPY."""

import os
import pathlib

import numpy as np

from mim_jax.data import tiff
from mim_jax.data.sources import CorruptExample, Feature, Source
from mim_jax.errors import ConfigError, MissingData

ENCODED = ('.jpg', '.jpeg', '.png', '.webp')  # given on as bytes, for the decode transform
ARRAYS = ('.tif', '.tiff', '.npy')  # opened here, since they hold more than eight bits or three channels


class FolderSource(Source):
  """Every image below a folder, in the order of their paths.

  When each image lies in one of at least two first-level folders, those are the classes, in sorted order, as field
  `label`. Files are only listed here; a broken one shows when it is read. An NPY file holds [H, W], [H, W, C] or, for
  volumes, [D, H, W, C].
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
    self.labels = None
    self.features = {'image': self._image_feature()}
    if None not in names and len(names) > 1:
      number = {name: i for i, name in enumerate(names)}
      self.labels = np.array([number[t] for t in tops], np.int32)
      self.features['label'] = Feature((), np.dtype(np.int32), len(names), tuple(names))

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
    if self.labels is not None:
      example['label'] = self.labels[index]
    return example

  def _image(self, index):
    path = self.root / self.paths[index]
    try:
      if path.suffix.lower() == '.npy':
        image = np.load(path, allow_pickle=False)
        return image[..., None] if image.ndim == 2 else image
      data = path.read_bytes()
      if not data:
        raise CorruptExample(f'{self.paths[index]} is empty')
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
