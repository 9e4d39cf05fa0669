"""Which form attention takes on which devices, and that the way to cuDNN and back changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.ops import attention, placement


def case(tokens, keys, dtype='float32'):
  draw = jax.random.split(jax.random.key(tokens), 4)
  shapes = [(2, tokens, 3, 16), (2, keys, 3, 16), (2, keys, 3, 16), (2, tokens, 3, 16)]
  return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(draw, shapes, strict=True)]


@pytest.mark.parametrize(('tokens', 'keys'), [(6, 6), (7, 7), (5, 8), (4, 9)])
def test_what_is_given_to_cudnn_is_attention_to_the_keys_that_there_are(tokens, keys):
  *arguments, grad = case(tokens, keys)
  found, back = jax.vjp(lambda *x: attention.cudnn(*x, implementation='xla'), *arguments)
  expected, plain_back = jax.vjp(attention.attention, *arguments)
  for ours, plain in zip((found, *back(grad)), (expected, *plain_back(grad)), strict=True):
    np.testing.assert_allclose(ours, plain, atol=1e-6)


@pytest.fixture
def calls(monkeypatch):
  """Shapes of queries that went to cuDNN."""
  seen = []

  def count(q, k, v):
    seen.append(q.shape)
    return q

  monkeypatch.setattr(attention, 'cudnn', count)
  return seen


@pytest.fixture
def on_gpu(abstract):
  def trace(*arguments, **options):
    with jax.sharding.use_abstract_mesh(abstract('gpu', 'NVIDIA H100 80GB HBM3')):
      jax.eval_shape(lambda *x: attention.attention(*x, **options), *arguments)

  return trace


def test_half_precision_on_a_gpu_goes_to_cudnn(calls, on_gpu):
  on_gpu(*case(4, 6, 'bfloat16')[:3])
  assert calls == [(2, 4, 3, 16)]


def test_float32_masks_drops_odd_heads_and_other_devices_do_not(calls, on_gpu):
  q, k, v, _ = case(4, 6, 'bfloat16')
  on_gpu(*case(4, 6)[:3])
  on_gpu(q, k, v, mask=attention.mask_out(jnp.ones((2, 6))))
  on_gpu(q, k, v, drop=lambda shares: shares)
  on_gpu(q[..., :9], k[..., :9], v[..., :9])
  with placement.fused_attention(False):
    on_gpu(q, k, v)
  attention.attention(q, k, v)
  assert calls == []


def test_fused_attention_can_be_switched_off_on_tpus(abstract):
  qkv = jnp.ones((2, 5, 3, 4, 32), jnp.bfloat16)

  def text(wanted):
    with jax.sharding.use_abstract_mesh(abstract('tpu')), placement.fused_attention(wanted):
      return str(
        jax.make_jaxpr(lambda *x: attention.self_attention(*x))(qkv, qkv[0, 0])
      )  # a function of its own: JAX remembers what it traced

  assert 'short_attention_forward' in text(True)
  assert 'short_attention_forward' not in text(False)
