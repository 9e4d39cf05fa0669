"""Frozen encoders that other methods learn from: CLIP, DINO, DINOv2 and MAE.

A teacher is a shape (`Teacher.encoder`) and its tree {'encoder': ...}, which a method hands out in `frozen`: random weights of that shape
from `init` (so that any recipe runs offline), real ones from a file that `mim-jax convert` made, named by `config.frozen.path`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mim_jax.errors import ConfigError, nearest
from mim_jax.models import posemb, vit
from mim_jax.ops import patches, pixels

# What the published networks of a kind have in common. Sources: facebookresearch/mae models_mae.py, facebookresearch/dino
# vision_transformer.py, facebookresearch/dinov2 vision_transformer.py, openai/CLIP model.py and its preprocessing.
KINDS: dict[str, dict[str, Any]] = {
  'mae': dict(stats='imagenet', pos='sincos'),
  'dino': dict(stats='imagenet', pos='learned'),
  'dinov2': dict(stats='imagenet', pos='learned', layer_scale=1.0),
  'clip': dict(stats='clip', pos='learned', eps=1e-5, patch_bias=False, embed_norm=True, activation='quick_gelu'),
}


@dataclasses.dataclass(frozen=True)
class Teacher:
  """A frozen encoder and the pixels it expects.

  Attributes:
    stats: normalisation of its input, a name in `ops.pixels.STATS` or (mean, std).
    channels: of its input.
  """

  encoder: vit.ViT
  stats: Any = 'imagenet'
  channels: int = 3

  @property
  def image_size(self) -> tuple[int, ...]:
    return tuple(side * count for side, count in zip(self.encoder.patch, self.encoder.grid, strict=True))

  def init(self, key) -> dict:
    """{'encoder': tree} with random weights; shapes alone under `jax.eval_shape`."""
    image = jnp.zeros((1, *self.image_size, self.channels))
    return {'encoder': self.encoder.init(key, image)['params']}

  def __call__(self, frozen, image, stats='imagenet', attention: bool = False) -> dict[str, jax.Array]:
    """What the encoder makes of images; no gradient flows into it.

    Args:
      frozen: {'encoder': tree}.
      image: [B, H, W, C] normalised with `stats`. Of another size it is first resized, then renormalised for the teacher.
      attention: also return how the last block's class token attends to the patches.

    Returns:
      tokens [B, N, D] and cls [B, D] (without a class token: absent), after the final norm;
      input [B, prefix + N, D], what the first block receives; layers [L, B, prefix + N, D], the residual stream after each block, without
      norm; with `attention` also attention [B, H, N] float32, whose sum over N is at most 1 (the rest goes to class token and registers).
    """
    if attention and not self.encoder.cls:
      raise ValueError('class attention was asked of a teacher without class token')
    frozen, image = jax.lax.stop_gradient((frozen, image))
    image = pixels.renormalize(resize(image, self.image_size), stats, self.stats)
    variables = {'params': frozen['encoder']}
    tokens, seen = self.encoder.apply(variables, image, taps=True, show='cls' if attention else '')
    prefix = self.encoder.prefix
    out = {'tokens': tokens[:, prefix:], 'input': seen['input'], 'layers': seen['layers']}
    if self.encoder.cls:
      out['cls'] = tokens[:, 0]
    if attention:
      out['attention'] = seen['attention'][-1, :, :, 0, prefix:]
    return out


def make(kind: str, size: str = 'B', patch: int = 16, image_size: int = 224, registers: int = 0, **options) -> Teacher:
  """A teacher of a kind ('clip', 'dino', 'dinov2', 'mae') for images of one side.

  Args:
    size: Ti S B L H or 'width/depth/heads'.
    options: of `vit.ViT`, such as dtype; they win over those of the kind.

  Raises:
    ConfigError: the kind or size is unknown, or the patch does not divide the image.
  """
  if kind not in KINDS:
    raise ConfigError(f'teacher {kind!r} is unknown; {nearest(kind, KINDS)}')
  chosen = {**KINDS[kind], **options}
  stats = chosen.pop('stats')
  sides = vit.sides(patch, 2)
  try:
    grid = patches.grid_of(vit.sides(image_size, 2), sides)
  except ValueError as error:
    raise ConfigError(f'teacher {kind!r}: {error}') from error
  return Teacher(vit.ViT(**vit.size(size), patch=sides, grid=grid, registers=registers, **chosen), stats)


def resize(image, size: tuple[int, int]) -> jax.Array:
  """Image [B, H, W, C] -> [B, *size, C] by PyTorch's bicubic kernel without antialiasing; values are not clipped."""
  height, width = image.shape[1:3]
  if (height, width) == tuple(size):
    return image
  rows, columns = posemb.cubic_matrix(height, size[0]), posemb.cubic_matrix(width, size[1])
  return jnp.einsum('ph,bhwc,qw->bpqc', rows, image, columns)
