"""Mixup and cutmix of a batch with itself reversed, and the soft labels that go with them, for fine-tuning.

mixup: arXiv 1710.09412; cutmix: arXiv 1905.04899; as combined in timm (data/mixup.py, "batch" mode): one choice and one
share for the whole batch, the partner of example i is example B - 1 - i.
"""

import jax
import jax.numpy as jnp


def draw(key, batch, mixup=0.8, cutmix=1.0, prob=1.0, switch=0.5):
  """Draws of one step for batch['image'] [B, H, W, C]: dict of arrays with leading dim B, all rows alike.

  mixup, cutmix: the alpha of Beta(alpha, alpha), 0 for never. prob: how often a batch is mixed at all. switch: how
  often by cutmix where both are on.

  Returns:
    cut: bool [B], whether to cut or to blend.
    share: float32 [B], what a blend keeps of the example itself; 1 leaves it as it is.
    box: int32 [B, 4], y0, x0, y1, x1 of the place that a cut takes from the partner; empty leaves the example as it is.
  """
  size, height, width = batch['image'].shape[:3]
  keys = jax.random.split(key, 6)
  mix = (jax.random.uniform(keys[0]) < prob) & (mixup > 0 or cutmix > 0)
  cut = jax.random.uniform(keys[1]) < (switch if mixup > 0 and cutmix > 0 else float(cutmix > 0))
  share = jax.random.beta(keys[2], mixup, mixup) if mixup > 0 else 1.0
  kept = jax.random.beta(keys[3], cutmix, cutmix) if cutmix > 0 else 1.0
  share, kept = jnp.where(mix, share, 1.0), jnp.where(mix, kept, 1.0)
  side = jnp.sqrt(1 - kept)  # of the box, which then is cut at the border of the image
  y = jax.random.randint(keys[4], (), 0, height)
  x = jax.random.randint(keys[5], (), 0, width)
  half_y, half_x = (jnp.floor(side * n).astype(jnp.int32) // 2 for n in (height, width))
  box = jnp.stack(
    [
      jnp.clip(y - half_y, 0, height),
      jnp.clip(x - half_x, 0, width),
      jnp.clip(y + half_y, 0, height),
      jnp.clip(x + half_x, 0, width),
    ]
  )
  rows = lambda v: jnp.broadcast_to(v, (size, *jnp.shape(v)))
  return {'cut': rows(cut), 'share': rows(share), 'box': rows(box)}


def smooth_labels(labels, classes, smoothing=0.0):
  """One-hot labels with 1 - s + s / C for the class and s / C elsewhere: int [B] -> float32 [B, C]."""
  return jax.nn.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


def apply(images, labels, draws, classes, smoothing=0.0):
  """Mixes images [B, H, W, C] and labels, int [B] or soft [B, classes], as `draws` says -> images, float32 [B, classes].

  A blend of share s is s * image + (1 - s) * partner. For a cut the share of the label is the exact area left, not the
  one that was drawn. Labels that are class numbers are smoothed here, so the loss is a plain cross-entropy with soft labels.
  """
  height, width = images.shape[1:3]
  y0, x0, y1, x1 = jnp.moveaxis(draws['box'], -1, 0)[..., None]
  y, x = jnp.arange(height), jnp.arange(width)
  inside = ((y >= y0) & (y < y1))[:, :, None] & ((x >= x0) & (x < x1))[:, None, :]  # [B, H, W]
  own = jnp.where(draws['cut'][:, None, None], 1.0 - inside, draws['share'][:, None, None])[..., None]
  own = own.astype(images.dtype)
  mixed = images * own + images[::-1] * (1 - own)
  left = 1 - ((y1 - y0) * (x1 - x0))[:, 0] / (height * width)
  share = jnp.where(draws['cut'], left, draws['share'])[:, None]
  targets = smooth_labels(labels, classes, smoothing) if labels.ndim == 1 else labels.astype(jnp.float32)
  return mixed, targets * share + targets[::-1] * (1 - share)
