"""Normalised pixels, and moving them from the statistics of one network to those of another."""

import jax.numpy as jnp
import numpy as np

from mim_jax.ops import patches

STATS = {  # mean and standard deviation per channel, of values in [0, 1]
  'imagenet': ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
  'clip': ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
  # By type of channel, from the configs of chaudatascience/cha_mae_vit. So2Sat: 8 of radar, 10 of light, not in [0, 1]; CHAMMI: 3 of
  # Allen (WTC-11), 4 of the Human Protein Atlas, 5 of Cell Painting.
  'so2sat': (
    (-3.59e-5, -7.66e-6, 5.94e-5, 2.52e-5, 0.0442, 0.2576, 7.557e-4, 0.00135)
    + (0.1238, 0.1093, 0.1011, 0.1142, 0.1593, 0.1815, 0.1746, 0.1950, 0.1543, 0.1091),
    (0.1756, 0.1756, 0.4600, 0.4560, 2.8554, 8.3226, 2.4494, 1.4644)
    + (0.0396, 0.0478, 0.0664, 0.0636, 0.0774, 0.0910, 0.0922, 0.1016, 0.0999, 0.0878),
  ),
  'chammi': (
    (0.1730, 0.2120, 0.0672, 0.0829, 0.0411, 0.0640, 0.0845, 0.0996, 0.1923, 0.1625, 0.1824, 0.1498),
    (0.3124, 0.3374, 0.1519, 0.1621, 0.1056, 0.1771, 0.1631, 0.1729, 0.1663, 0.1517, 0.1486, 0.1525),
  ),
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


def map_pixels(x):
  """x in [0, 1] -> 0.8 x + 0.1: what DALL-E's VAE was trained on, away from the ends of its logit-Laplace distribution (dall_e/utils.py)."""
  return 0.8 * x + 0.1


def colour_codes(image, patch, levels: int, given='imagenet'):
  """Mean colour of each patch as one number: image [B, H, W, C] normalised with `given` -> [B, N] int32 below levels ** C.

  The mean of a channel, in [0, 1], is cut into `levels` equal steps; the first channel counts most. A tokenizer that needs no training.
  """
  raw = patches.patchify(renormalize(image, given, 'none'), patch)
  mean = jnp.mean(raw.reshape(*raw.shape[:2], -1, image.shape[-1]), axis=2)
  digits = jnp.clip(jnp.floor(mean * levels), 0, levels - 1).astype(jnp.int32)
  return jnp.sum(digits * levels ** np.arange(image.shape[-1])[::-1], axis=-1)


def code_colours(levels: int, channels: int) -> np.ndarray:
  """The colours [levels ** channels, channels] float32 in [0, 1] in the middle of the steps of `colour_codes`."""
  digits = np.arange(levels**channels)[:, None] // levels ** np.arange(channels)[::-1] % levels
  return ((digits + 0.5) / levels).astype(np.float32)
