"""The decoder of MAE: predicts something for every token from the visible ones."""

import flax.linen as nn
import jax.numpy as jnp

from mim_jax.models import blocks, posemb
from mim_jax.ops import masking


class Decoder(nn.Module):
  """Visible tokens and a shared token in the hidden places, through transformer blocks (MAE section 3, "MAE decoder").

  Attributes:
    width, depth, heads, mlp_ratio, eps: of the blocks (eps of every LayerNorm).
    grid: tokens per axis.
    out: values predicted per token.
    cls: the first token is a class token, which has no place on the grid and gets no prediction.
    scan, remat: see `blocks.stack`.
    activation: of the MLPs, see `blocks.ACTIVATIONS`.
  """

  width: int
  depth: int
  heads: int
  grid: tuple[int, ...]
  out: int
  mlp_ratio: float = 4.0
  eps: float = 1e-6
  cls: bool = True
  dtype: str = 'float32'
  scan: bool = True
  remat: str = 'none'
  activation: str = 'gelu'

  @nn.compact
  def __call__(self, z, keep_ids, restore_ids):
    """z [B, cls + K, D], keep_ids [B, K], restore_ids [B, N] -> [B, N, out]."""
    table = jnp.asarray(posemb.sincos(self.grid, self.width)[None], self.dtype)
    mask_token = self.param('mask_token', nn.initializers.normal(0.02), (1, 1, self.width))
    y = blocks.Dense(self.width, self.dtype, name='embed')(z)
    first, y = y[:, : int(self.cls)], y[:, int(self.cls) :]
    y = masking.place(y, mask_token, keep_ids, restore_ids) + table
    y = jnp.concatenate([first, y], axis=1)
    layer = blocks.stack(blocks.Block, self.depth, self.scan, self.remat)
    y, _ = layer(self.heads, self.mlp_ratio, self.eps, self.dtype, activation=self.activation, name='blocks')(y)
    y = blocks.LayerNorm(self.eps, self.dtype, name='norm')(y)
    return blocks.Dense(self.out, self.dtype, name='pred')(y)[:, int(self.cls) :]
