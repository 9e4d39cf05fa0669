"""What is put on an encoder for a task."""

import flax.linen as nn
import jax.numpy as jnp

from mim_jax.models import blocks, vit


class Classifier(nn.Module):
  """ViT with a linear classifier, as facebookresearch/mae models_vit.py: image [B, *spatial, C] -> logits [B, classes] float32.

  Attributes:
    encoder: a ViT with `final_norm` exactly when `pool` is 'cls'.
    pool: 'mean' (mean of the patch tokens, then a LayerNorm of its own, `fc_norm`) or 'cls' (class token of the normed tokens).
    head_std: standard deviation of the truncated normal of the head's kernel: 2e-5 for fine-tuning, 0.01 for probing.
  """

  encoder: vit.ViT
  classes: int
  pool: str = 'mean'
  head_std: float = 2e-5

  @nn.compact
  def __call__(self, image, drop=None):
    """Returns (logits [B, classes], features [B, D] before the head), both float32."""
    if self.encoder.final_norm != (self.pool == 'cls'):
      raise ValueError(f'pool {self.pool!r} needs an encoder with final_norm={self.pool == "cls"}')
    tokens = self.encoder(image, drop=drop).astype(jnp.float32)
    if self.pool == 'mean':
      features = blocks.LayerNorm(name='fc_norm')(jnp.mean(tokens[:, 1:], axis=1))
    else:
      features = tokens[:, 0]
    head = nn.Dense(self.classes, kernel_init=nn.initializers.truncated_normal(self.head_std), name='head')
    return head(features), features
