"""The hybrid encoder: what a mask may and may not do, views, stochastic depth, initialisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import optim
from mim_jax.errors import ConfigError
from mim_jax.models import convmae, vit
from mim_jax.ops import masking, patches

TINY = dict(**convmae.size('8,12,16/1,1,2/4'), patch=(16, 16), grid=(3, 4))


def images(count=2, seed=0):
  return jax.random.normal(jax.random.key(seed), (count, 48, 64, 3))


@pytest.fixture(scope='module')
def tiny():
  encoder = convmae.ConvMAE(**TINY)
  params = jax.jit(encoder.init)(jax.random.key(1), images())
  return encoder, params, jax.jit(encoder.apply)


KEEP_IDS = jnp.array([[0, 7, 5], [11, 2, 3]])


def test_masked_pixels_do_not_reach_the_latent_and_visible_ones_do(tiny):
  _, params, apply = tiny
  before = apply(params, images(), KEEP_IDS)
  hidden = 1 - masking.visible(KEEP_IDS, 12)
  changed = patches.patchify(images(), (16, 16)) + 3.0 * hidden[..., None]
  np.testing.assert_array_equal(apply(params, patches.unpatchify(changed, (3, 4), (16, 16)), KEEP_IDS), before)
  changed = patches.patchify(images(), (16, 16)).at[0, 7].add(3.0)
  after = apply(params, patches.unpatchify(changed, (3, 4), (16, 16)), KEEP_IDS)
  assert np.all(np.any(after[0] != before[0], axis=-1)) and np.array_equal(after[1], before[1])


def test_without_a_mask_neighbours_are_seen(tiny):
  encoder, params, _ = tiny
  stage1 = jax.jit(lambda image: encoder.apply(params, image, taps=True)[1]['stage1'])
  changed = images().at[:, 16:32, 16:32].add(3.0)  # one token
  moved = np.any(stage1(changed) != stage1(images()), axis=(0, 3))
  assert moved.shape == (12, 16)
  # Its 4 x 4 cells and two around them, which is how far one block looks.
  assert moved[2:10, 2:10].all() and not moved[:, 10:].any() and not moved[10:].any()


def test_views_are_separate_masks_of_one_image(tiny):
  _, params, apply = tiny
  both = jnp.stack([KEEP_IDS, KEEP_IDS[::-1]], axis=1)
  together = apply(params, images(), both)
  assert together.shape == (2, 2, 3, 16)
  for view in (0, 1):
    np.testing.assert_allclose(together[:, view], apply(params, images(), both[:, view]), atol=1e-6)


def test_all_tokens_kept_is_no_mask(tiny):
  _, params, apply = tiny
  everything = jnp.broadcast_to(jnp.arange(12), (2, 12))
  np.testing.assert_allclose(apply(params, images(), everything), apply(params, images()), atol=1e-6)


@pytest.mark.parametrize('options', [{'scan': False}, {'remat': 'dots'}])
def test_scan_and_remat_change_nothing(tiny, options):
  encoder, params, _ = tiny
  encoder = encoder.clone(depths=(2, 1, 1))
  params = jax.tree_util.tree_map_with_path(
    lambda path, leaf: (
      jnp.repeat(leaf, 2, 0) if path[1].key == 'blocks1' else leaf[:1] if path[1].key == 'blocks' else leaf
    ),
    params,
  )

  def gradient(module):
    return jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(module.apply(p, images(), KEEP_IDS)))))(params)

  plain, other = gradient(encoder), gradient(encoder.clone(**options))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), plain, other)


def test_both_forms_of_the_depthwise_convolution_agree():
  x, kernel = jax.random.normal(jax.random.key(0), (2, 6, 7, 3)), jax.random.normal(jax.random.key(1), (5, 5, 1, 3))
  np.testing.assert_allclose(convmae._grouped(x, kernel), convmae._shifted_sum(x, kernel), atol=1e-5)
  weight = jax.random.normal(jax.random.key(2), x.shape)
  grads = [
    jax.jit(jax.grad(lambda x, k, form=form: jnp.sum(form(x, k) * weight), (0, 1)))(x, kernel)
    for form in (convmae._grouped, convmae._shifted_sum)
  ]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *grads)


def test_stochastic_depth_grows_over_all_stages(tiny):
  encoder, params, apply = tiny
  assert encoder.depth == 4
  dropping = jax.jit(lambda rate, drop: encoder.clone(drop_path=rate).apply(params, images(), drop=drop))
  below_one = jnp.full((2, 4, 2), 0.9999)  # floor(1 - rate + uniform): kept at rate 0, dropped or kept elsewhere
  np.testing.assert_allclose(dropping(0.0, 0 * below_one), apply(params, images()), atol=1e-6)
  kept = dropping(0.5, below_one)
  np.testing.assert_array_equal(
    dropping(0.5, below_one.at[:, 0].set(0.0)), kept
  )  # the first block of stage 1 has rate 0
  for block in (1, 2, 3):  # stage 2 and both of the transformer
    after = dropping(0.5, below_one.at[0, block].set(0.0))
    assert np.any(after[0] != kept[0]) and np.array_equal(after[1], kept[1])


def test_the_downstream_form_has_its_own_table_and_no_fusion(tiny):
  encoder, params, _ = tiny
  plain = encoder.clone(pos='learned', fusion=False, final_norm=False)
  made = jax.eval_shape(plain.init, jax.random.key(0), images())['params']
  assert set(params['params']) - set(made) == {'fuse1', 'fuse2', 'norm'} and set(made) - set(params['params']) == {
    'pos_embed'
  }
  with_table = {'params': params['params'] | {'pos_embed': jnp.asarray(plain.table)}}
  tokens, seen = jax.jit(lambda p: plain.apply(p, images(), taps=True))(with_table)
  np.testing.assert_array_equal(tokens, seen['layers'][-1])
  whole = jax.jit(lambda p: encoder.apply(p, images(), taps=True))(params)[1]
  np.testing.assert_allclose(seen['layers'], whole['layers'], atol=1e-6)


def test_layer_decay_puts_everything_ahead_of_the_transformer_into_layer_0(tiny):
  _, params, _ = tiny
  factors = optim.lr_multipliers(
    {'encoder': params['params'] | {'pos_embed': jnp.zeros((1, 12, 16))}}, layer_decay=0.65
  )['encoder']
  first = [factors[name] for name in factors if name.startswith(('patch_embed', 'blocks1', 'blocks2', 'pos_embed'))]
  assert len(first) == 7 and set(jax.tree.leaves(first)) == {0.65**3}
  for leaf in jax.tree.leaves(factors['blocks']):
    np.testing.assert_allclose(leaf.ravel(), [0.65**2, 0.65], rtol=1e-6)
  assert set(jax.tree.leaves(factors['norm'])) == {1.0}


@pytest.mark.parametrize(
  'pattern, bound',
  [
    ('patch_embed1/proj/(kernel|bias)', 48**-0.5),
    ('patch_embed2/proj/kernel', (4 * 48) ** -0.5),
    ('patch_embed3/proj/kernel', (6 / (4 * 64 + 96)) ** 0.5),  # the one convolution that starts xavier-uniform
    ('patch_embed3/proj/bias', (4 * 64) ** -0.5),
    ('patch_embed4/kernel', (6 / (96 + 96)) ** 0.5),
    ('blocks1/conv[12]/kernel', 48**-0.5),
    ('blocks2/depthwise/(kernel|bias)', 25**-0.5),
    ('blocks2/mlp/fc2/(kernel|bias)', (4 * 64) ** -0.5),
    ('fuse1/kernel', (16 * 48) ** -0.5),
    ('blocks/mlp/fc1/kernel', (6 / (5 * 96)) ** 0.5),
  ],
)
def test_initialisation(pattern, bound):
  import re

  found = [leaf for name, leaf in started().items() if re.fullmatch(pattern, name)]
  values = np.concatenate([np.ravel(leaf) for leaf in found])
  assert np.abs(values).max() <= bound * 1.0001
  assert abs(values.std() - bound / 3**0.5) <= 4 * bound / 3**0.5 / len(values) ** 0.5
  assert abs(values.mean()) <= 4 * bound / len(values) ** 0.5


def started(memo={}):  # noqa: B006, made once
  if not memo:
    encoder = convmae.ConvMAE(**convmae.size('48,64,96/2,2,2/4'), patch=(16, 16), grid=(2, 2))
    params = jax.jit(encoder.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))['params']
    memo |= {
      jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(leaf)
      for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
  return memo


def test_parameters_of_the_published_size():
  encoder = convmae.ConvMAE(**convmae.size('B'), patch=(16, 16), grid=(14, 14))
  made = jax.eval_shape(encoder.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))
  count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(made))
  assert abs(count - 88.78e6) < 5e3  # counted on the official class


def test_half_precision_stays_near(tiny):
  encoder, params, apply = tiny
  half = jax.jit(encoder.clone(dtype='bfloat16').apply)(params, images(), KEEP_IDS)
  assert half.dtype == jnp.bfloat16
  np.testing.assert_allclose(half.astype(jnp.float32), apply(params, images(), KEEP_IDS), atol=0.15)


@pytest.mark.parametrize('name', ['M', '8,12/1,1/2', '8,12,16/1,1,2', '8,12,16/1,x,2/2', '8,12,15/1,1,2/2'])
def test_sizes_that_are_none(name):
  with pytest.raises(ConfigError, match='size'):
    convmae.size(name)
  assert vit.sides(16, 2) == (16, 16)


def test_an_image_of_another_size_is_named(tiny):
  encoder, params, _ = tiny
  with pytest.raises(ValueError, match='64, 64'):
    encoder.apply(params, jnp.zeros((1, 64, 64, 3)))
