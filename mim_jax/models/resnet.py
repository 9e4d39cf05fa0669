"""Residual networks in torchvision's layout (He et al. 2016, arXiv 1512.03385; stride in the 3x3), and BatchNorm.

Batch statistics live in the collection 'batch_stats', which a method keeps in its `state`: the caller hands it in,
and with `mutable='batch_stats'` gets the new one back. Statistics are those of the whole batch given, on however many
devices it lies.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax.errors import ConfigError
from mim_jax.models import blocks

# block, blocks per stage, width of the first stage.
SIZES = {
  'resnet18': ('basic', (2, 2, 2, 2), 64),
  'resnet34': ('basic', (3, 4, 6, 3), 64),
  'resnet50': ('bottleneck', (3, 4, 6, 3), 64),
  'resnet101': ('bottleneck', (3, 4, 23, 3), 64),
}
EXPANSION = {'basic': 1, 'bottleneck': 4}  # channels that leave a block, over its width


def size(name: str) -> dict:
  """Block, depths and width of a named size, or of 'BLOCK/DEPTHS/WIDTH' such as 'bottleneck/1,1,1,1/16'."""
  if name in SIZES:
    return dict(zip(('block', 'depths', 'width'), SIZES[name], strict=True))
  parts = name.split('/')
  depths = parts[1].split(',') if len(parts) == 3 else []
  if not depths or parts[0] not in EXPANSION or not all(part.isdigit() and int(part) for part in (*depths, parts[2])):
    raise ConfigError(
      f"ResNet size {name!r} is neither one of {', '.join(SIZES)} nor 'BLOCK/DEPTHS/WIDTH' such as "
      f"'bottleneck/1,1,1,1/16', BLOCK being one of {', '.join(EXPANSION)}"
    )
  return dict(block=parts[0], depths=tuple(map(int, depths)), width=int(parts[2]))


class BatchNorm(nn.Module):
  """Normalises every channel of x [B, *spatial, C], statistics in float32 (Ioffe and Szegedy 2015, arXiv 1502.03167).

  With `train` by the mean and the biased variance of the batch; the running statistics then move towards the mean and
  the unbiased variance, as PyTorch's do. Without `train` by the running statistics.

  Attributes:
    momentum: weight of the newest batch in the running statistics (PyTorch's meaning; Flax's is the other share).
  """

  momentum: float = 0.1
  eps: float = 1e-5
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x, train=False):
    width, count = x.shape[-1], x.size // x.shape[-1]
    scale = self.param('scale', nn.initializers.ones, (width,))
    bias = self.param('bias', nn.initializers.zeros, (width,))
    running_mean = self.variable('batch_stats', 'mean', jnp.zeros, (width,))
    running_var = self.variable('batch_stats', 'var', jnp.ones, (width,))
    x = x.astype(jnp.float32)
    if train:
      axes = tuple(range(x.ndim - 1))
      mean = jnp.mean(x, axes)
      var = jnp.mean(jnp.square(x - mean), axes)
      if self.is_mutable_collection('batch_stats') and not self.is_initializing():
        unbiased = var * (count / max(count - 1, 1))
        for running, new in ((running_mean, mean), (running_var, unbiased)):
          running.value = (1 - self.momentum) * running.value + self.momentum * jax.lax.stop_gradient(new)
    else:
      mean, var = running_mean.value, running_var.value
    return ((x - mean) * (jax.lax.rsqrt(var + self.eps) * scale) + bias).astype(self.dtype)


class Conv(nn.Module):
  """Convolution without bias, padded by half its kernel: x [B, H, W, C] -> [B, H', W', features]."""

  features: int
  side: int
  stride: int = 1
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x):
    shape = (self.side, self.side, x.shape[-1], self.features)
    kernel = self.param('kernel', nn.initializers.variance_scaling(2.0, 'fan_out', 'normal'), shape)
    return jax.lax.conv_general_dilated(
      x.astype(self.dtype),
      kernel.astype(self.dtype),
      (self.stride, self.stride),
      [(self.side // 2,) * 2] * 2,
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )


class Residual(nn.Module):
  """One block: 'basic' is 3x3, 3x3; 'bottleneck' is 1x1, 3x3 (with the stride), 1x1 to four times the width."""

  block: str
  width: int
  stride: int
  momentum: float
  eps: float
  dtype: str

  @nn.compact
  def __call__(self, x, train):
    norm = lambda y, name: BatchNorm(self.momentum, self.eps, self.dtype, name=name)(y, train)
    conv = lambda y, features, side, stride, name: Conv(features, side, stride, self.dtype, name=name)(y)
    out = self.width * EXPANSION[self.block]
    if self.block == 'basic':
      y = nn.relu(norm(conv(x, self.width, 3, self.stride, 'conv1'), 'bn1'))
      y = norm(conv(y, out, 3, 1, 'conv2'), 'bn2')
    else:
      y = nn.relu(norm(conv(x, self.width, 1, 1, 'conv1'), 'bn1'))
      y = nn.relu(norm(conv(y, self.width, 3, self.stride, 'conv2'), 'bn2'))
      y = norm(conv(y, out, 1, 1, 'conv3'), 'bn3')
    if self.stride > 1 or x.shape[-1] != out:
      x = norm(conv(x, out, 1, self.stride, 'downsample_conv'), 'downsample_bn')
    return nn.relu(x.astype(self.dtype) + y)


class ResNet(nn.Module):
  """Image [B, H, W, C] -> last feature map [B, H / 32, W / 32, channels], rounded up. Blocks: layerSTAGE_INDEX.

  Attributes:
    block, depths, width: see `size`.
    momentum, eps: of every BatchNorm.
    remat: see `blocks.stack`, for every residual block.
  """

  block: str
  depths: tuple[int, ...]
  width: int
  momentum: float = 0.1
  eps: float = 1e-5
  dtype: str = 'float32'
  remat: str = 'none'

  @property
  def channels(self) -> int:
    return self.width * 2 ** (len(self.depths) - 1) * EXPANSION[self.block]

  @nn.compact
  def __call__(self, image, train=False):
    """With `train` by statistics of the batch; apply with mutable='batch_stats' to get the running ones moved."""
    x = Conv(self.width, 7, 2, self.dtype, name='conv1')(image)
    x = nn.relu(BatchNorm(self.momentum, self.eps, self.dtype, name='bn1')(x, train))
    x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    residual = Residual
    if self.remat != 'none':
      residual = nn.remat(Residual, policy=blocks.REMAT[self.remat], static_argnums=2)
    for stage, depth in enumerate(self.depths):
      for i in range(depth):
        stride = 2 if stage and not i else 1
        width = self.width * 2**stage
        block = residual(self.block, width, stride, self.momentum, self.eps, self.dtype, name=f'layer{stage + 1}_{i}')
        x = block(x, train)
    return x
