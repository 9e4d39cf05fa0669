"""UNETR: a convolutional decoder from layers of a ViT to a label for every pixel or voxel (arXiv 2103.10504).

In the form of FengheTan9/Hi-End-MAE, downstream/models/UNETR/unetr.py, on the blocks of MONAI 1.2: the last step up
resizes to the full size by linear interpolation, since patches of 12 leave a factor of 1.5. Any number of spatial
axes.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax.models import blocks, vit

NORM_EPS, SLOPE = 1e-5, 0.01  # MONAI's, of InstanceNorm and LeakyReLU


def instance_norm(x):
  """x [B, *spatial, C] with mean 0 and biased variance 1 over space for each example and channel, found in float32."""
  y, axes = x.astype(jnp.float32), tuple(range(1, x.ndim - 1))
  y = y - jnp.mean(y, axes, keepdims=True)
  return (y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axes, keepdims=True) + NORM_EPS)).astype(x.dtype)


def conv(x, features, side, name, use_bias=False):
  """x [B, *spatial, C] -> [B, *spatial, features] by a kernel of `side` in every axis, which starts as PyTorch's do."""
  window = (side,) * (x.ndim - 2)
  init = vit.conv_bias(math.prod(window) * x.shape[-1])
  return nn.Conv(features, window, use_bias=use_bias, dtype=x.dtype, kernel_init=init, bias_init=init, name=name)(x)


class Residual(nn.Module):
  """Two 3-wide convolutions with norms beside a shortcut: x or, where channels differ, a 1-wide convolution; x's dtype."""

  features: int

  @nn.compact
  def __call__(self, x):
    y = nn.leaky_relu(instance_norm(conv(x, self.features, 3, 'conv1')), SLOPE)
    y = instance_norm(conv(y, self.features, 3, 'conv2'))
    if x.shape[-1] != self.features:
      x = instance_norm(conv(x, self.features, 1, 'conv3'))
    return nn.leaky_relu(y + x, SLOPE)


class Up(nn.Module):
  """Transposed convolution with kernel and stride 2: x [B, *spatial, C] -> [B, *(2 spatial), features].

  Windows do not overlap, so it is one matrix product, whose kernel [C, 2, ..., 2, features] is laid out in space.
  """

  features: int
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x):
    batch, *spatial, width = x.shape
    rank = len(spatial)
    bound = 1 / math.sqrt(self.features * 2**rank)  # PyTorch takes the output channels for the fan-in here
    init = lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)
    kernel = self.param('kernel', init, (width, *(2,) * rank, self.features))
    y = blocks.matmul(x.astype(self.dtype), kernel.astype(self.dtype))
    order = [0, *(axis for i in range(1, rank + 1) for axis in (i, rank + i)), 2 * rank + 1]
    return y.transpose(order).reshape(batch, *(2 * n for n in spatial), self.features)


class Lift(nn.Module):
  """A layer of the ViT brought from its grid to 2^(1 + steps) times it: up, then `steps` times up and a `Residual`."""

  features: int
  steps: int
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x):
    x = Up(self.features, self.dtype, name='up0')(x)
    for i in range(1, self.steps + 1):
      x = Residual(self.features, name=f'res{i}')(Up(self.features, self.dtype, name=f'up{i}')(x))
    return x


class Merge(nn.Module):
  """A step of the decoder: x up to the size of `skip`, both joined, a `Residual`. `resize`: interpolate, no `Up`."""

  features: int
  resize: bool = False
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x, skip):
    if self.resize:
      x = jax.image.resize(x, (*skip.shape[:-1], x.shape[-1]), 'linear', antialias=False)
      x = conv(x, self.features, 3, 'conv', use_bias=True)
    else:
      x = Up(self.features, self.dtype, name='up')(x)
    return Residual(self.features, name='res')(jnp.concatenate([x, skip], axis=-1))


class Decoder(nn.Module):
  """Image and four layers of a ViT -> logits for every pixel or voxel.

  Attributes:
    grid: of the tokens.
    classes: labels, background included.
    features: channels at full size; 2, 4 and 8 times as many at 8, 4 and 2 times the grid.
  """

  grid: tuple[int, ...]
  classes: int
  features: int = 32
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, image, layers: Sequence[jax.Array], stages=False):
    """image [B, *spatial, C] -> logits [B, *spatial, classes] float32.

    layers: three inner ones, shallow first, and the last, [B, N, D] each. With `stages` also
    {name: activation} of each step.
    """
    shallow, middle, deep, last = (z.reshape(z.shape[0], *self.grid, z.shape[-1]) for z in layers)
    width, dtype = self.features, self.dtype
    seen = {
      'encoder1': Residual(width, name='encoder1')(image.astype(dtype)),
      'encoder2': Lift(2 * width, 2, dtype, name='encoder2')(shallow),
      'encoder3': Lift(4 * width, 1, dtype, name='encoder3')(middle),
      'encoder4': Lift(8 * width, 0, dtype, name='encoder4')(deep),
    }
    y = seen['decoder5'] = Merge(8 * width, dtype=dtype, name='decoder5')(last, seen['encoder4'])
    y = seen['decoder4'] = Merge(4 * width, dtype=dtype, name='decoder4')(y, seen['encoder3'])
    y = seen['decoder3'] = Merge(2 * width, dtype=dtype, name='decoder3')(y, seen['encoder2'])
    y = seen['decoder2'] = Merge(width, True, dtype, name='decoder2')(y, seen['encoder1'])
    logits = conv(y.astype(jnp.float32), self.classes, 1, 'out', use_bias=True)
    return (logits, seen) if stages else logits


class Unetr(nn.Module):
  """A ViT with `Decoder` on it: image [B, *spatial, C] -> logits [B, *spatial, classes] float32.

  Attributes:
    encoder: with `final_norm`.
    taps: three blocks, counted from zero, whose outputs the decoder takes beside the normed tokens.
  """

  encoder: vit.ViT
  classes: int
  taps: tuple[int, int, int] = (3, 6, 9)
  features: int = 32

  @nn.compact
  def __call__(self, image, stages=False):
    tokens, seen = self.encoder(image, taps=True)
    layers = [z[:, self.encoder.prefix :] for z in (*(seen['layers'][i] for i in self.taps), tokens)]
    decoder = Decoder(self.encoder.grid, self.classes, self.features, self.encoder.dtype, name='decoder')
    if not stages:
      return decoder(image, layers)
    logits, steps = decoder(image, layers, stages=True)
    return logits, {**steps, 'layers': layers}
