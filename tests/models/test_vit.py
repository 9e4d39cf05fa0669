"""The options of the encoder that other libraries' networks need."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.models import blocks, vit

BASE = dict(width=32, depth=2, heads=4, patch=(8, 8), grid=(4, 4))


def made(**options):
  module = vit.ViT(**BASE, **options)
  image = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
  return module, module.init(jax.random.key(1), image), image


def test_the_plain_encoder_has_no_array_of_the_options():
  _, variables, _ = made()
  tree = variables['params']
  assert set(tree) == {'patch_embed', 'cls_token', 'blocks', 'norm'}
  assert set(tree['blocks']) == {'norm1', 'attn', 'norm2', 'mlp'}
  assert set(tree['blocks']['attn']['qkv']) == {'kernel', 'bias'}


@pytest.mark.parametrize(
  'options, tokens, present, absent',
  [
    ({'cls': False}, 16, (), ('cls_token',)),
    ({'registers': 3}, 20, ('registers',), ()),
    ({'pos': 'learned', 'cls': False}, 16, ('pos_embed',), ()),
    ({'patch_bias': False}, 17, (), ('patch_embed/bias',)),
    ({'qkv_bias': False}, 17, (), ('blocks/attn/qkv/bias',)),
    ({'embed_norm': True}, 17, ('embed_norm/scale',), ()),
    ({'layer_scale': 0.1}, 17, ('blocks/layer_scale1/scale', 'blocks/layer_scale2/scale'), ()),
    ({'activation': 'swiglu'}, 17, (), ()),
  ],
)
def test_options_add_and_remove_arrays(options, tokens, present, absent):
  module = vit.ViT(**BASE, **options)
  image = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
  variables = jax.eval_shape(module.init, jax.random.key(0), image)
  paths = {
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, _ in jax.tree_util.tree_leaves_with_path(variables['params'])
  }
  assert set(present) <= paths and not set(absent) & paths
  assert jax.eval_shape(module.apply, variables, image).shape == (2, tokens, 32) and module.prefix == tokens - 16


def test_activations():
  x = jnp.linspace(-3, 3, 7)
  np.testing.assert_allclose(blocks.quick_gelu(x), x / (1 + np.exp(-1.702 * x)), rtol=1e-5)
  np.testing.assert_allclose(blocks.swiglu(jnp.array([2.0, 5.0])), [2 / (1 + np.exp(-2)) * 5], rtol=1e-6)
  exact, tanh = blocks.ACTIVATIONS['gelu'](x), blocks.ACTIVATIONS['gelu_tanh'](x)
  assert 1e-5 < np.abs(exact - tanh).max() < 1e-2


def test_a_layer_scale_of_nearly_zero_leaves_the_tokens_as_they_come_in():
  module, variables, image = made(layer_scale=1e-9, final_norm=False)
  tokens, seen = module.apply(variables, image, taps=True)
  np.testing.assert_allclose(tokens, seen['input'], atol=1e-6)
  module, variables, image = made(layer_scale=1.0, final_norm=False)
  tokens, seen = module.apply(variables, image, taps=True)
  assert np.abs(tokens - seen['input']).max() > 0.1


@pytest.mark.parametrize('scan', [True, False])
def test_attention_is_shown_on_demand(scan):
  module, variables, image = made(scan=scan)
  plain = module.apply(variables, image)
  tokens, every = module.apply(variables, image, show='all')
  np.testing.assert_array_equal(tokens, plain)
  assert every['attention'].shape == (2, 2, 4, 17, 17) and every['layers'] is None
  np.testing.assert_allclose(every['attention'].sum(-1), 1, atol=1e-5)
  _, both = module.apply(variables, image, taps=True, show='cls')
  assert both['layers'].shape == (2, 2, 17, 32)
  np.testing.assert_allclose(both['attention'], every['attention'][:, :, :, :1], atol=1e-6)


def test_kept_patches_take_their_positions_along_with_any_prefix():
  for options in ({'cls': False}, {'registers': 2}):
    module, variables, image = made(**options)
    keep_ids = jnp.array([[3, 0, 9], [5, 15, 2]])
    _, whole = module.apply(variables, image, taps=True)
    _, part = module.apply(variables, image, keep_ids, taps=True)
    rows = whole['input'][:, module.prefix :]
    np.testing.assert_allclose(
      part['input'][:, module.prefix :], jnp.take_along_axis(rows, keep_ids[..., None], 1), atol=1e-6
    )
    np.testing.assert_array_equal(part['input'][:, : module.prefix], whole['input'][:, : module.prefix])


def test_mlp_widths_that_are_no_whole_multiple():
  module = vit.ViT(
    width=1536, depth=1, heads=24, patch=(16, 16), grid=(1, 1), mlp_ratio=4096 / 1536, activation='swiglu'
  )
  shapes = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32))['params']
  assert shapes['blocks']['mlp']['fc1']['kernel'].shape == (1, 1536, 8192)
  assert shapes['blocks']['mlp']['fc2']['kernel'].shape == (1, 4096, 1536)


def test_drop_path_for_fine_tuning_is_drawn_from_a_key_per_example():
  module, variables, image = made()
  keys = jax.random.split(jax.random.key(0), len(image))
  assert vit.with_drop_path(module, None) == (module, None)
  dropping, uniforms = vit.with_drop_path(module, (keys, 0.5))
  assert dropping.drop_path == 0.5 and uniforms.shape == (len(image), module.depth, 2)
  np.testing.assert_array_equal(uniforms[1], jax.random.uniform(keys[1], (module.depth, 2)))
  dropped = dropping.apply(variables, image, drop=uniforms)
  assert np.any(dropped != module.apply(variables, image))
  still, uniforms = vit.with_drop_path(module, (keys, 0.0))
  np.testing.assert_allclose(still.apply(variables, image, drop=uniforms), module.apply(variables, image), atol=1e-6)
