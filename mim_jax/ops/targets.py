"""What a method regresses to, made from pixels without parameters."""

import jax.numpy as jnp


def norm_pix(target, eps=1e-6, ddof=1):
  """Each patch minus its mean, over the root of its variance: target [..., P] -> same shape (MAE section 3, "normalized pixel values").

  `ddof=1` is the unbiased variance of facebookresearch/mae; eps is added inside the root.
  """
  mean, var = patch_statistics(target, ddof)
  return (target - mean) / jnp.sqrt(var + eps)


def undo_norm_pix(pred, target, eps=1e-6, ddof=1):
  """Prediction of normalised patches back in the units of `target`, with the target's own statistics (for pictures)."""
  mean, var = patch_statistics(target, ddof)
  return pred * jnp.sqrt(var + eps) + mean


def patch_statistics(target, ddof):
  """Mean and variance over the values of each patch, both [..., 1]."""
  return jnp.mean(target, -1, keepdims=True), jnp.var(target, -1, keepdims=True, ddof=ddof)
