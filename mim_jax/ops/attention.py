"""Scaled dot-product attention: the plain form, which every device and every mask takes, and the kernels of TPUs and GPUs."""

import functools

import jax
import jax.numpy as jnp

from mim_jax.ops import bias, placement, short_attention

HIDDEN = -1e9  # what `mask_out` adds to a logit: zero after softmax as long as a row keeps one visible key


def mask_out(visible):
  """Additive mask for `attention` from visible [B, M] (1 where a key may be looked at) -> float32 [B, 1, 1, M]."""
  return jnp.where(visible.astype(bool), 0.0, HIDDEN)[:, None, None, :]


def attention(q, k, v, mask=None, drop=None):
  """softmax(q k^T / sqrt(d) + mask) v, softmax in float32: q [B, N, H, d], k and v [B, M, H, d] -> [B, N, H, d] in q's dtype.

  `mask` is None or float32 that broadcasts to [B, H, N, M], such as `mask_out` makes. `drop`, where given, is a function of the
  attention [B, H, N, M] float32 that gives it back with entries dropped.

  Heads are moved in front of the tokens first: products whose batch axes lead run three to five times faster on CPU than the same
  contraction with heads between tokens and features, and cost the same elsewhere.

  On GPUs by cuDNN where it takes the shapes and nothing is masked or dropped.
  """
  if mask is None and drop is None and placement.on_nvidia() and placement.wants_fused_attention() and _cudnn_takes(q):
    return cudnn(q, k, v)
  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
  logits = jnp.einsum('bhnd,bhmd->bhnm', q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
  logits = logits if mask is None else logits + mask
  shares = jax.nn.softmax(logits) if drop is None else drop(jax.nn.softmax(logits))
  return jnp.einsum('bhnm,bhmd->bhnd', shares.astype(v.dtype), v).swapaxes(1, 2)


def _cudnn_takes(q) -> bool:
  return q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0


def cudnn(q, k, v, implementation='cudnn'):
  """`attention` without mask by cuDNN, which keeps N x M on the chip: half precision, heads of 8, 16, .. 128 features.

  JAX lets its gradient have even numbers of tokens only: odd ones get one more, a key that no query looks at, a query that nobody reads.
  """
  tokens, keys = q.shape[1], k.shape[1]
  q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
  lengths = jnp.full(k.shape[0], keys, jnp.int32) if keys % 2 else None
  found = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation=implementation)
  return found[:, :tokens]


def parts(qkv):
  """qkv [B, N, 3, H, d] -> queries, keys and values [B, N, H, d]."""
  return qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]


def self_attention(qkv, added, mask=None):
  """Attention of tokens to each other: qkv [B, N, 3, H, d] plus the bias `added` [3, H, d] -> [B, N, H, d]; `mask` as in `attention`.

  On TPUs by the kernel of `short_attention` where nothing is masked, its shapes suit and heads are not cut over devices.
  """
  batch, tokens, _, heads, head_dim = qkv.shape
  suits = placement.wants_fused_attention() and short_attention.fits(tokens, heads, head_dim)
  if mask is None and placement.on_tpu() and placement.heads_whole() and suits:
    kernel = placement.rows_per_device(functools.partial(_short, heads), batch)
    if kernel is not None:
      return kernel(qkv.reshape(batch, tokens, -1), added.reshape(-1)).reshape(batch, tokens, heads, head_dim)
  return attention(*parts(bias.add(qkv, added)), mask)


def _short(heads, qkv, added):
  return short_attention.self_attention(qkv, added, heads)


def weights(q, k, mask=None):
  """The attention itself, softmax(q k^T / sqrt(d) + mask) float32: q [B, N, H, d], k [B, M, H, d] -> [B, H, N, M]."""
  logits = jnp.einsum('bnhd,bmhd->bhnm', q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
  return jax.nn.softmax(logits if mask is None else logits + mask)
