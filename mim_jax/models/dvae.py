"""The encoder of DALL-E's discrete VAE, a frozen tokenizer: one of 8192 codes for every 8 x 8 pixels.

Ramesh et al. 2021, arXiv 2102.12092, appendix A; openai/DALL-E, dall_e/encoder.py. Images are RGB in [0, 1], mapped by
`ops.pixels.map_pixels`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

STRIDE = 8  # pixels per code and side


def _conv(features, side, dtype, name):
  init = nn.initializers.variance_scaling(1.0, 'fan_in', 'normal')
  return nn.Conv(features, (side, side), padding='SAME', kernel_init=init, dtype=dtype, name=name)


class ResBlock(nn.Module):
  """x [B, H, W, C] -> [B, H, W, features]: the input, fitted to that width, plus `gain` times four convolutions."""

  features: int
  gain: float
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x):
    y = x
    for i, (features, side) in enumerate([(self.features // 4, 3)] * 3 + [(self.features, 1)], start=1):
      y = _conv(features, side, self.dtype, f'conv_{i}')(nn.relu(y))
    if x.shape[-1] != self.features:
      x = _conv(self.features, 1, self.dtype, 'id_path')(x)
    return x + self.gain * y


class Encoder(nn.Module):
  """Mapped pixels [B, H, W, C] -> logits [B, H / 8, W / 8, codes] float32; the code of a place is their argmax.

  Attributes:
    width: channels of the first group; the four groups have 1, 2, 4 and 8 times as many.
    depth: residual blocks of each group.
  """

  width: int = 256
  codes: int = 8192
  depth: int = 2
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x):
    x = _conv(self.width, 7, self.dtype, 'input')(x)
    for group in range(4):
      if group:
        x = nn.max_pool(x, (2, 2), (2, 2))
      for i in range(self.depth):
        name = f'group_{group + 1}_block_{i + 1}'
        x = ResBlock(self.width * 2**group, (4 * self.depth) ** -2, self.dtype, name=name)(x)
    return _conv(self.codes, 1, 'float32', 'output')(nn.relu(x).astype(jnp.float32))


def codes(encoder: Encoder, params, image):
  """Codes [B, N] int32 in raster order of mapped pixels [B, H, W, C]; nothing flows back into `params` or the image."""
  logits = encoder.apply({'params': params}, image)
  return jax.lax.stop_gradient(jnp.argmax(logits, axis=-1).reshape(len(image), -1).astype(jnp.int32))
