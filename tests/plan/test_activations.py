"""What the gradient keeps, against a count by hand."""

import dataclasses

import pytest

from mim_jax import config, method
from mim_jax.plan import activations


def layers_by_hand(tokens, width, depth):
  """Bytes of bfloat16 that a pre-norm block cannot do without: input of either norm (1 + 1) and of its four products (1 + 1 + 1 + 4),
  queries, keys and values (3), and the slope of GELU (4), each times [N, D].
  """
  return 16 * tokens * width * depth * 2


@pytest.fixture
def cfg():
  cfg = config.base()
  cfg.method = method.options('mae', dtype='bfloat16')
  cfg.batch_size = 8
  return cfg


@pytest.mark.parametrize('scan', [True, False])
def test_mae_keeps_what_it_must_and_little_more(cfg, abstract, scan):
  cfg.method.scan = scan
  found = activations.kept_per_image(cfg, abstract('tpu', fsdp=8))
  assert 1 < found / (layers_by_hand(50, 768, 12) + layers_by_hand(197, 512, 8)) < 1.05


def test_plain_attention_keeps_its_shares(cfg, abstract):
  cfg.fused_attention = False
  more = activations.kept_per_image(cfg, abstract('tpu', fsdp=8))
  cfg.fused_attention = True
  more -= activations.kept_per_image(cfg, abstract('tpu', fsdp=8))
  shares = 12 * 12 * 50**2 + 8 * 16 * 197**2
  assert 4 < more / shares < 8  # float32, and once more in bfloat16


def test_remat_keeps_the_inputs_of_blocks(cfg, abstract):
  cfg.method.remat = 'full'
  found = activations.kept_per_image(cfg, abstract('tpu', fsdp=8))
  assert found < 0.15 * (layers_by_hand(50, 768, 12) + layers_by_hand(197, 512, 8))


def test_a_method_that_makes_its_gradients_itself_is_not_asked(cfg, abstract, monkeypatch):
  built = dataclasses.replace(method.build(cfg.method), grads=lambda *arguments: None)
  monkeypatch.setattr(method, 'build', lambda options: built)
  assert activations.kept_per_image(cfg, abstract('tpu')) is None
