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

  @property
  def table(self):
    """Sin-cos table [1, cls + N, width] float32 with a zero row for the class token."""
    return posemb.sincos(self.grid, self.width, cls=self.cls)[None]

  @nn.compact
  def __call__(self, z, keep_ids, restore_ids, taps=False):
    """z [B, cls + K, D], keep_ids [B, K], restore_ids [B, N] -> [B, N, out].

    With `taps` also {'input': [B, cls + N, width], 'layers': [L, B, cls + N, width]}.
    """
    mask_token = self.param('mask_token', nn.initializers.normal(0.02), (1, 1, self.width))
    y = blocks.Dense(self.width, self.dtype, name='embed')(z)
    first, y = y[:, : int(self.cls)], y[:, int(self.cls) :]
    y = masking.place(y, mask_token, keep_ids, restore_ids)
    tokens = jnp.concatenate([first, y], axis=1) + jnp.asarray(self.table, self.dtype)
    layer = blocks.stack(blocks.Block, self.depth, self.scan, self.remat)
    layer = layer(self.heads, self.mlp_ratio, self.eps, self.dtype, taps, activation=self.activation, name='blocks')
    y, layers = layer(tokens)
    y = blocks.LayerNorm(self.eps, self.dtype, name='norm')(y)
    pred = blocks.Dense(self.out, self.dtype, name='pred')(y)[:, int(self.cls) :]
    return (pred, {'input': tokens, 'layers': layers}) if taps else pred
