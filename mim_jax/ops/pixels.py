"""Normalised pixels, and moving them from the statistics of one network to those of another."""

import numpy as np

STATS = {  # mean and standard deviation per channel, of values in [0, 1]
  'imagenet': ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
  'clip': ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
  'half': (0.5, 0.5),
  'none': (0.0, 1.0),
}


def stats(name_or_pair) -> tuple[np.ndarray, np.ndarray]:
  """Mean and standard deviation, float32 arrays of one or C entries, of a name in `STATS` or of a pair."""
  mean, std = STATS[name_or_pair] if isinstance(name_or_pair, str) else name_or_pair
  return np.asarray(mean, np.float32), np.asarray(std, np.float32)


def renormalize(image, given, wanted):
  """Image [..., C] normalised with the statistics `given` -> the same image normalised with `wanted`."""
  if given == wanted:
    return image
  (mean, std), (new_mean, new_std) = stats(given), stats(wanted)
  return ((image * std + mean) - new_mean) / new_std
