"""Two views of one example: crops of a picture (CropMAE), or two frames of a clip (SiamMAE).

Both make the field `views` [2, H, W, C], the view that is seen whole and the one to be filled in; `normalize` works on
it as on `image`.
"""

import numpy as np

from mim_jax.data import images
from mim_jax.data.augment import color_jitter
from mim_jax.data.chain import CHECKS, register
from mim_jax.errors import ConfigError

STRATEGIES = ('global_to_local', 'local_to_global', 'random', 'same')

CHECKS['strategy'] = f'one of {", ".join(STRATEGIES)}', lambda v: v in STRATEGIES
CHECKS['local_scale'] = CHECKS['scale']
CHECKS['gap'] = (
  '(least, bound) frames with 0 < least < bound',
  lambda v: isinstance(v, tuple) and len(v) == 2 and all(type(n) is int for n in v) and 0 < v[0] < v[1],
)


@register(lazy=True)
def two_views(
  example,
  rng,
  size,
  scale=(0.1, 1.0),
  local_scale=(0.3, 0.6),
  strategy='global_to_local',
  ratio=(3 / 4, 4 / 3),
  p=0.5,
  jitter=False,
  method='bilinear',
):
  """Field `views`: two crops of the image, brought to `size`, each flipped with probability p (CropMAE section 3.1).

  The global crop has `scale` of the image's area, the local one `local_scale` of the *global crop's*, and is cut out of
  it after it was brought to `size`. strategy: 'global_to_local' (global one first), 'local_to_global' (local one
  first), 'random' (two global crops) or 'same' (one crop twice). jitter: change the colours of the global crop. `image`
  stays as it is; one that was not decoded yet, to spare that, becomes the first view.
  """
  picture = {'image': example['image']}
  first = images.one_shot_crop(picture, rng, size, scale, ratio, method)
  if strategy == 'random':
    second = images.one_shot_crop(picture, rng, size, scale, ratio, method)
  elif strategy == 'same':
    first = images.flip(first, rng, p)
    second = first
  else:
    second = images.one_shot_crop(first, rng, size, local_scale, ratio, method)
  if jitter:
    first = color_jitter(first, rng)
  if strategy != 'same':
    first, second = images.flip(first, rng, p), images.flip(second, rng, p)
  pair = [first['image'], second['image']]
  image = picture['image'] if isinstance(picture['image'], np.ndarray) else pair[0]
  return {**example, 'image': image, 'views': np.stack(pair[::-1] if strategy == 'local_to_global' else pair)}


def _clip(example, field):
  clip = example.get(field)
  if not isinstance(clip, np.ndarray) or clip.ndim != 4:
    found = 'nothing' if clip is None else f'{type(clip).__name__} of shape {np.shape(clip)}'
    raise ConfigError(
      f'field {field!r}: expected a clip [T, H, W, C], found {found}; the example holds {sorted(example)}'
    )
  return clip


@register(field='')
def frame_pair(
  example, rng, size, scale=(0.5, 1.0), ratio=(3 / 4, 4 / 3), gap=(4, 48), p=0.5, method='bilinear', field='frames'
):
  """Field `views`: two frames of a clip, `gap` = (least, bound) frames apart, under one crop and one flip (SiamMAE).

  The distance is uniform in least .. bound - 1, no more than the clip has. field: the clip [T, H, W, C].
  """
  clip = _clip(example, field)
  least, bound = gap[0], min(gap[1], len(clip))
  if bound <= least:
    raise ConfigError(f'frame_pair: a clip of {len(clip)} frames has no two that are {least} apart; lower gap={gap}')
  distance = least + int(rng.random() * (bound - least))
  start = int(rng.random() * (len(clip) - distance))
  both = {'image': np.concatenate([clip[start], clip[start + distance]], axis=-1)}
  both = images.flip(images.one_shot_crop(both, rng, size, scale, ratio, method), rng, p)['image']
  return {**example, 'views': np.stack(np.split(both, 2, axis=-1))}


@register(field='')
def random_frame(example, rng, field='frames'):
  """`image` becomes a random frame of a clip, field [T, H, W, C]: one per video and epoch (CropMAE on Kinetics)."""
  clip = _clip(example, field)
  return {**example, 'image': clip[int(rng.random() * len(clip))]}
