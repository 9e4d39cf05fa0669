"""Hybrid encoder of ConvMAE: two convolutional stages on the whole grid, then a transformer on the visible tokens.

Gao et al. 2022, arXiv 2205.03892; Alpha-VL/ConvMAE, models_convmae.py and vision_transformer.py. The stages' own grids
are 4 and 2 times as fine as that of the tokens. Their only layers that look at neighbours are depthwise convolutions,
and what these receive from masked places is zero: so masked pixels never reach a visible token, although masked places
are computed along. There is no class token.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax.errors import ConfigError
from mim_jax.models import blocks, posemb, vit
from mim_jax.ops import masking, patches, placement

# Widths and depths of the three stages, heads of the last. B: Alpha-VL/ConvMAE and mx-mark/DMJD; L: mx-mark/DMJD,
# models_dmjd.py; mu: for tests.
SIZES = {
  'mu': ((8, 16, 32), (1, 1, 1), 2),
  'B': ((256, 384, 768), (2, 2, 11), 12),
  'L': ((384, 768, 1024), (2, 2, 23), 16),
}
FINER = (4, 2)  # cells of a token's side on the grids of stage 1 and stage 2


def size(name: str) -> dict:
  """Widths, depths and heads of a named size, or of 'WIDTHS/DEPTHS/HEADS' such as '16,32,64/1,1,2/4'."""
  numbers = SIZES.get(name)
  if numbers is None:
    try:
      widths, depths, heads = ([int(number) for number in part.split(',')] for part in name.split('/'))
      numbers = (tuple(widths), tuple(depths), *heads) if len(widths) == len(depths) == 3 else ()
    except ValueError:
      numbers = ()
  if len(numbers) != 3:
    raise ConfigError(
      f"size {name!r} is neither one of {', '.join(SIZES)} nor 'WIDTHS/DEPTHS/HEADS' such as '16,32,64/1,1,2/4'"
    )
  widths, depths, heads = numbers
  if widths[-1] % heads:
    raise ConfigError(f'size {name!r}: width {widths[-1]} is not a multiple of {heads} heads')
  return dict(widths=widths, depths=depths, heads=heads)


class Conv(nn.Module):
  """Convolution whose stride is its kernel: flattened patches [..., P] -> [..., features]; 1 x 1 on single pixels.

  Starts as PyTorch's convolution does, kernel and bias uniform in +-1/sqrt(fan-in), or with a `xavier` kernel.
  """

  features: int
  dtype: str = 'float32'
  xavier: bool = False

  @nn.compact
  def __call__(self, x):
    fan_in = x.shape[-1]
    start = vit.conv_bias(fan_in)
    kernel_init = blocks.xavier_uniform(fan_in, self.features) if self.xavier else start
    kernel = self.param('kernel', kernel_init, (fan_in, self.features))
    bias = self.param('bias', start, (self.features,))
    return blocks.matmul(x.astype(self.dtype), kernel.astype(self.dtype)) + bias.astype(self.dtype)


class PatchEmbed(nn.Module):
  """Flattened patches [..., P] -> [..., features]: convolution, LayerNorm, GELU."""

  features: int
  eps: float
  dtype: str = 'float32'
  xavier: bool = False

  @nn.compact
  def __call__(self, x):
    y = Conv(self.features, self.dtype, self.xavier, name='proj')(x)
    return blocks.ACTIVATIONS['gelu'](blocks.LayerNorm(self.eps, self.dtype, name='norm')(y))


class Depthwise(nn.Module):
  """Convolution of every channel by itself, zeros beyond the border: x [B, H, W, C] -> same shape."""

  side: int = 5
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x):
    channels, start = x.shape[-1], vit.conv_bias(self.side**2)
    kernel = self.param('kernel', start, (self.side, self.side, 1, channels)).astype(self.dtype)
    bias = self.param('bias', start, (channels,)).astype(self.dtype)
    # On CPU, XLA's grouped convolution is 20 times slower than the sum, and 3 to 4 times with its gradient.
    y = jax.lax.platform_dependent(x.astype(self.dtype), kernel, cpu=_shifted_sum, default=_grouped)
    return placement.by_rows(y + bias)


def _grouped(x, kernel):
  layout = ('NHWC', 'HWIO', 'NHWC')
  return jax.lax.conv_general_dilated(
    x, kernel, (1, 1), 'SAME', dimension_numbers=layout, feature_group_count=x.shape[-1]
  )


@jax.custom_vjp
def _shifted_sum(x, kernel):
  """`_grouped` for odd sides as a sum of shifted copies, one by one: in one expression they take long to compile."""
  side, padded = kernel.shape[0], _with_border(x, kernel.shape[0])

  def add(total, tap):
    place, weight = tap
    return total + _shifted(padded, place, side, x.shape) * weight, None

  return jax.lax.scan(add, jnp.zeros_like(x), (jnp.arange(side**2), kernel.reshape(side**2, -1)))[0]


def _with_border(x, side):
  return jnp.pad(x, ((0, 0), (side // 2,) * 2, (side // 2,) * 2, (0, 0)))


def _shifted(padded, place, side, shape):
  return jax.lax.dynamic_slice(padded, (0, place // side, place % side, 0), shape)


def _shifted_sum_forward(x, kernel):
  return _shifted_sum(x, kernel), (x, kernel)


def _shifted_sum_backward(given, grad):
  x, kernel = given
  side, padded = kernel.shape[0], _with_border(x, kernel.shape[0])
  of_tap = lambda place: jnp.sum(_shifted(padded, place, side, x.shape) * grad, (0, 1, 2))
  return _shifted_sum(grad, kernel[::-1, ::-1]), jax.lax.map(of_tap, jnp.arange(side**2)).reshape(kernel.shape)


_shifted_sum.defvjp(_shifted_sum_forward, _shifted_sum_backward)


class ConvMlp(nn.Module):
  """`blocks.Mlp` of 1 x 1 convolutions, which start differently: x [..., C] -> [..., C]."""

  hidden: int
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x):
    y = blocks.ACTIVATIONS['gelu'](Conv(self.hidden, self.dtype, name='fc1')(x))
    return Conv(x.shape[-1], self.dtype, name='fc2')(y)


class ConvBlock(nn.Module):
  """Transformer block with a masked depthwise convolution for attention: x [B, H, W, C] -> (x, None), as a scan needs.

  `visible` [B, H, W, 1] is 1 where the convolution may look, None for everywhere; `drop` as in `blocks.Block`.
  """

  mlp_ratio: float
  eps: float
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x, visible=None, drop=None):
    width = x.shape[-1]
    branch = lambda y, i: y if drop is None else blocks.drop_path(y, drop[0][:, i], drop[1])
    y = blocks.LayerNorm(self.eps, self.dtype, name='norm1')(x)
    y = Conv(width, self.dtype, name='conv1')(y)
    y = y if visible is None else y * visible  # after the bias of conv1, so that masked places give exact zeros
    y = Depthwise(dtype=self.dtype, name='depthwise')(y)
    x = x + branch(Conv(width, self.dtype, name='conv2')(y), 0)
    y = blocks.LayerNorm(self.eps, self.dtype, name='norm2')(x)
    return x + branch(ConvMlp(blocks.hidden_width(width, self.mlp_ratio), self.dtype, name='mlp')(y), 1), None


class ConvMAE(nn.Module):
  """Image -> tokens.

  Attributes:
    widths, depths: of the three stages; heads: of the last one.
    patch, grid: sides of a token in pixels, each a multiple of 4, and number of tokens per axis.
    conv_mlp_ratios, mlp_ratio: of stages 1 and 2, and of the transformer.
    pos: 'sincos' (a fixed table, no parameter) or 'learned' (a parameter that starts as that table).
    fusion: add stages 1 and 2, brought to the grid of the tokens, to the output of the transformer; pre-training only.
    final_norm: LayerNorm after that.
    drop_path: stochastic depth of the last block; it grows linearly from 0 at the first block of stage 1.
    conv_eps, eps: of the LayerNorms in embeddings and convolutional stages, and of all others.
    scan, remat: see `blocks.stack`.
  """

  widths: tuple[int, int, int]
  depths: tuple[int, int, int]
  heads: int
  patch: tuple[int, int]
  grid: tuple[int, int]
  conv_mlp_ratios: tuple[float, float] = (4.0, 4.0)
  mlp_ratio: float = 4.0
  pos: str = 'sincos'
  fusion: bool = True
  final_norm: bool = True
  drop_path: float = 0.0
  conv_eps: float = 1e-5
  eps: float = 1e-6
  dtype: str = 'float32'
  scan: bool = True
  remat: str = 'none'
  prefix: int = 0  # tokens before those of the patches, as `vit.ViT` has it

  @property
  def table(self):
    """Sin-cos table [1, N, D] float32."""
    return posemb.sincos(self.grid, self.widths[-1])[None]

  @property
  def depth(self) -> int:
    """Blocks of all stages."""
    return sum(self.depths)

  @nn.compact
  def __call__(self, image, keep_ids=None, drop=None, taps=False):
    """image [B, H, W, C] -> tokens [B, K, D] at keep_ids [B, K], or all of them when None.

    Several views of an image at once: keep_ids [B, V, K] -> [B, V, K, D]. They share the first embedding, which no mask
    enters.

    Args:
      drop: [B, blocks of all stages, 2] uniforms for stochastic depth, or None for none of it; not with views.
      taps: also return {'embed1', 'stage1', 'embed2', 'stage2': maps [B V, h, w, C] before and after the blocks of both
        stages, 'fused1', 'fused2': the stages on the grid of the tokens [B V, N, D], 'tokens': the last embedding [B V,
        N, D] before positions, 'layers': output of every block of the transformer [L, B V, K, D]}.
    """
    strides = (self.patch[0] // FINER[0], self.patch[1] // FINER[0])
    grids = [tuple(side * finer for side in self.grid) for finer in FINER]
    if image.shape[1:-1] != tuple(g * s for g, s in zip(grids[0], strides, strict=True)):
      raise ValueError(
        f'image {image.shape[1:-1]} does not fit an encoder with patches of {self.patch} on a grid of {self.grid}'
      )
    lead = image.shape[:1] if keep_ids is None else keep_ids.shape[:-1]
    seen, drops = {}, self._drops(drop)

    def embed(x, patch, stage):
      y = PatchEmbed(self.widths[stage], self.conv_eps, self.dtype, stage == 2, name=f'patch_embed{stage + 1}')
      return y(patches.patchify(x, patch))

    def convolve(x, stage):
      seen[f'embed{stage + 1}'] = x
      layer = blocks.stack(ConvBlock, self.depths[stage], self.scan, self.remat, in_axes=(nn.broadcast, 0))
      layer = layer(self.conv_mlp_ratios[stage], self.conv_eps, self.dtype, name=f'blocks{stage + 1}')
      x, _ = layer(x, None if visible is None else _enlarge(visible, FINER[stage]), drops[stage])
      seen[f'stage{stage + 1}'] = x
      return x

    x = embed(image, strides, 0).reshape(-1, *grids[0], self.widths[0])
    if keep_ids is None:
      visible, kept = None, lambda tokens: tokens
    else:
      if len(lead) == 2:  # the view axis lies inside that of the batch, so that all views of an image are on its device
        x = jnp.broadcast_to(x[:, None], (*lead, *x.shape[1:])).reshape(-1, *x.shape[1:])
        keep_ids = keep_ids.reshape(-1, keep_ids.shape[-1])
      visible = masking.visible(keep_ids, math.prod(self.grid)).reshape(-1, *self.grid, 1).astype(self.dtype)
      kept = lambda tokens: masking.pick(tokens, keep_ids)
    stage1 = convolve(x, 0)
    stage2 = convolve(embed(stage1, (2, 2), 1).reshape(-1, *grids[1], self.widths[1]), 1)

    # Everything from here works on single tokens, so those that are not kept are left out before and not after it.
    last_embed = PatchEmbed(self.widths[2], self.conv_eps, self.dtype, xavier=True, name='patch_embed3')
    linear = blocks.Dense(self.widths[2], self.dtype, name='patch_embed4')
    cells = patches.patchify(stage2, (2, 2))
    table = jnp.asarray(self.table)
    if self.pos == 'learned':
      table = self.param('pos_embed', lambda key: table)
    rows = table if keep_ids is None else masking.take(jnp.broadcast_to(table, (len(x), *table.shape[1:])), keep_ids)
    y = linear(last_embed(kept(cells))) + rows.astype(self.dtype)
    layer = blocks.stack(blocks.Block, self.depths[2], self.scan, self.remat)
    y, layers = layer(self.heads, self.mlp_ratio, self.eps, self.dtype, taps, name='blocks')(y, drops[2])
    if taps:
      seen |= {'tokens': linear(last_embed(cells)), 'layers': layers}
    if self.fusion:  # after the blocks and before the norm
      for i, x in enumerate((stage1, stage2)):
        fuse = Conv(self.widths[2], self.dtype, name=f'fuse{i + 1}')
        x = patches.patchify(x, (FINER[i],) * 2)
        y = y + fuse(kept(x))
        if taps:
          seen[f'fused{i + 1}'] = fuse(x)
    if self.final_norm:
      y = blocks.LayerNorm(self.eps, self.dtype, name='norm')(y)
    y = y.reshape(*lead, *y.shape[1:])
    return (y, seen) if taps else y

  def _drops(self, drop):
    """What the blocks of each stage take for stochastic depth: (uniforms [depth, B, 2], rates [depth]), or None."""
    drop = vit.drop_rates(drop, self.depth, self.drop_path)
    if drop is None:
      return [None] * 3
    ends = (self.depths[0], sum(self.depths[:2]))
    return list(zip(*(jnp.split(x, ends) for x in drop), strict=True))


def _enlarge(x, times):
  """x [B, h, w, C] -> [B, h times, w times, C], every cell repeated."""
  batch, height, width, channels = x.shape
  x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, times, width, times, channels))
  return x.reshape(batch, height * times, width * times, channels)
