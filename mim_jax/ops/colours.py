"""Features as colours, for pictures."""

import jax.numpy as jnp


def principal(reference):
  """A function features [..., D] -> colours [..., 3] in [0, 1], along the largest variance of `reference` [..., D].

  The range is two standard deviations of the reference either way. Pictures made by one function compare: give a target
  as the reference, and its prediction to the function.
  """
  flat = reference.reshape(-1, reference.shape[-1]).astype(jnp.float32)
  mean = jnp.mean(flat, axis=0)
  values, vectors = jnp.linalg.eigh(jnp.cov(flat, rowvar=False))
  spread = jnp.sqrt(jnp.maximum(values[-3:], 1e-12))

  def colours(features):
    return jnp.clip(0.5 + (features.astype(jnp.float32) - mean) @ vectors[:, -3:][:, ::-1] / (4 * spread[::-1]), 0, 1)

  return colours
