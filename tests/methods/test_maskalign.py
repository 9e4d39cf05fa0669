"""MaskAlign: reference numbers, the properties its paper implies, initialisation, its teacher, and that it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mim_jax import method, optim, parity
from mim_jax.checkpoint import bundle as bundles
from mim_jax.checkpoint import init_from
from mim_jax.errors import CheckpointError, ConfigError
from mim_jax.methods import maskalign
from mim_jax.models import teachers
from mim_jax.official import maskalign as official
from mim_jax.official import names
from mim_jax.ops import masking, patches

TINY = dict(size='32/3/4', patch=8, image_size=32, levels='top2', teacher=dict(size='24/3/4', patch=8, image_size=32))
GIVEN = TINY | {'teacher': dict(kind='batch', size='24/3/4'), 'drop_path': 0.0}


def given_batch(seed=1, count=4):
  """Images and the features of a teacher that are just noise."""
  keys = jax.random.split(jax.random.key(seed), 3)
  return {
    'image': jax.random.normal(keys[0], (count, 32, 32, 3)),
    'teacher_hidden': jax.random.normal(keys[1], (count, 3, 17, 24)),
    'teacher_importance': jax.nn.softmax(jax.random.normal(keys[2], (count, 16))),
  }


@pytest.fixture(scope='module')
def given():
  """The method with a teacher whose features come with the batch."""
  built = method.build(method.options('maskalign', **GIVEN))
  batch = given_batch()
  return built, start(built, batch), batch, built.draw(jax.random.key(3), batch)


@pytest.fixture(scope='module')
def taught():
  """The method with its own frozen CLIP tower."""
  built = method.build(method.options('maskalign', **TINY))
  batch = {'image': given_batch()['image']}
  params, frozen = start(built, batch), jax.jit(built.frozen)(jax.random.key(5), batch)
  return built, params, frozen, batch, built.draw(jax.random.key(3), batch)


def start(built, batch, seed=2):
  return jax.jit(built.init)(jax.random.key(seed), batch)


def run(built, params, batch, draws, frozen=None):
  return jax.jit(built.loss)(params, {}, frozen or {}, batch, draws, 0)


def value(built, params, batch, draws, frozen=None):
  return run(built, params, batch, draws, frozen)[0]


def gradient(built, params, batch, draws):
  return jax.jit(jax.grad(lambda p: built.loss(p, {}, {}, batch, draws, 0)[0]))(params)


@pytest.mark.parametrize('case', ['maskalign', 'maskalign_clip'])
def test_reference_numbers(goldens, case):
  rows = parity.run(parity.read(goldens / f'{case}.safetensors'))
  assert len(rows) == {'maskalign': 43, 'maskalign_clip': 10}[case]
  assert all(row.ok for row in rows), parity.table([row for row in rows if not row.ok])


def test_pixels_of_dropped_patches_change_nothing(given):
  built, params, batch, draws = given
  loss, aux = run(built, params, batch, draws)
  assert aux['out']['keep_ids'].shape == (4, 4) and set(np.asarray(aux['out']['mask'].sum(1))) == {12.0}
  tokens = patches.patchify(batch['image'], (8, 8)) + aux['out']['mask'][..., None] * 7.0
  other = batch | {'image': patches.unpatchify(tokens, (4, 4), (8, 8))}
  assert value(built, params, other, draws) == loss


@pytest.mark.parametrize('norm, same', [('whiten', True), ('none', False)])
def test_whitened_targets_ignore_offset_and_scale_of_a_token(given, norm, same):
  _, params, batch, draws = given
  built = method.build(method.options('maskalign', **GIVEN, target_norm=norm))
  scale = jnp.linspace(0.5, 3.0, 17)[:, None]
  other = batch | {'teacher_hidden': batch['teacher_hidden'] * scale + 5 * scale}
  difference = abs(value(built, params, batch, draws) - value(built, params, other, draws))
  assert difference < 1e-4 if same else difference > 0.1


def test_the_order_of_the_kept_patches_does_not_matter(given):
  _, params, batch, _ = given
  built = method.build(method.options('maskalign', **GIVEN, masking='random'))
  noise = jax.random.uniform(jax.random.key(0), (4, 16))
  ids = masking.keep_smallest(noise, 4)[0]
  rows = jnp.arange(4)[:, None]
  swapped = noise.at[rows, ids].set(noise[rows, ids[:, ::-1]])
  np.testing.assert_array_equal(masking.keep_smallest(swapped, 4)[0], ids[:, ::-1])
  straight, turned = (value(built, params, batch, {'noise': n}) for n in (noise, swapped))
  np.testing.assert_allclose(straight, turned, rtol=1e-6)


def test_patches_are_drawn_in_proportion_to_the_attention(given):
  built, _, _, _ = given
  importance = jnp.array([8.0, 4, 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]) / 16
  noise = built.draw(jax.random.key(0), {'image': jnp.zeros((20000, 1))})['noise']
  assert abs(float(noise.mean()) - 1) < 0.01 and abs(float(noise.var()) - 1) < 0.05
  keep_ids, _, _ = masking.keep_smallest(maskalign.attentive_order(importance, noise), 4)
  first = np.bincount(keep_ids[:, 0], minlength=16) / 20000
  np.testing.assert_allclose(first, importance, atol=0.012)  # more than three standard errors
  second = np.bincount(keep_ids[keep_ids[:, 0] == 0, 1], minlength=16)  # without replacement: the rest, renormalised
  np.testing.assert_allclose(second[1:5] / second.sum(), np.array([4, 2, 1, 1]) / 8, atol=0.02)


def test_only_live_levels_get_a_gradient(given):
  built, params, batch, draws = given
  grads = gradient(built, params, batch, draws)
  assert not np.any(grads['mix'][0]) and not np.any(grads['heads']['out']['kernel'][0])
  assert np.all(grads['mix'][1:] != 0)  # off the diagonal too
  still = [jax.tree_util.keystr(path) for path, g in jax.tree_util.tree_leaves_with_path(grads) if not np.any(g)]
  assert all('norm' in path and 'blocks' not in path for path in still) and len(still) == 2  # the final norm is unused


def test_the_teacher_is_frozen(taught):
  built, params, frozen, batch, draws = taught
  assert 'encoder' in frozen and 'pos_embed' in frozen['encoder'] and 'pos_embed' not in params['encoder']
  grads = jax.jit(jax.grad(lambda f: built.loss(params, {}, f, batch, draws, 0)[0]))(frozen)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))
  other = jax.tree.map(lambda leaf: leaf * 1.5, frozen)
  assert value(built, params, batch, draws, frozen) != value(built, params, batch, draws, other)
  assert set(params) == {'encoder', 'heads', 'mix'}


def test_the_teacher_sees_the_whole_image_and_decides_what_is_visible(taught):
  built, params, frozen, batch, draws = taught
  out = run(built, params, batch, draws, frozen)[1]['out']
  teacher = teachers.make('clip', '24/3/4', 8, 32)
  seen = jax.jit(lambda f, x: teacher(f, x, attention=True))(frozen, batch['image'])
  keep_ids, _, _ = masking.keep_smallest(
    maskalign.attentive_order(seen['attention'].mean(1), draws['noise']), out['keep_ids'].shape[1]
  )
  np.testing.assert_array_equal(out['keep_ids'], keep_ids)
  whole = maskalign.normalise(seen['layers'], 'whiten')[1:]
  for i in range(2):
    np.testing.assert_allclose(out['target'][:, i, 0], whole[i, :, 0], atol=1e-5)
    np.testing.assert_allclose(out['target'][:, i, 1:], masking.take(whole[i, :, 1:], keep_ids), atol=1e-5)
  np.testing.assert_allclose(whole.mean(-1), 0, atol=1e-5)
  np.testing.assert_allclose(whole.std(-1), 1, atol=1e-3)


def test_initialisation():
  built = method.build(method.options('maskalign', **TINY | {'size': '96/3/4', 'levels': 'mean'}))
  params = jax.jit(lambda key: built.init(key, None))(jax.random.key(0))
  np.testing.assert_allclose(params['mix'], np.eye(3) + 0.01, atol=1e-7)
  kernel = np.asarray(params['heads']['out']['kernel'])
  assert kernel.shape == (3, 96, 24) and np.abs(kernel[0] - kernel[1]).max() > 0.1
  np.testing.assert_allclose(kernel.std(), (2 / (96 + 24)) ** 0.5, rtol=0.03)
  assert not np.any(params['heads']['out']['bias'])
  mixture = maskalign.initial_mix('sum', 3, 5)
  np.testing.assert_allclose(mixture, np.full((3, 5), 0.2), rtol=1e-6)


def test_the_mixture_is_not_decayed(given):
  _, params, _, _ = given
  mask = optim.decay_mask(params, r'bias$|scale$|^mix$')
  assert not mask['mix'] and mask['heads']['out']['kernel'] and not mask['heads']['out']['bias']


@pytest.mark.parametrize('head', maskalign.CHOICES['head'])
def test_every_head_learns_and_has_official_names(head, given):
  _, _, batch, draws = given
  cfg = method.options('maskalign', **GIVEN | {'head': head, 'levels': 'mean'})
  built = method.build(cfg)
  params = start(built, batch)
  grads = gradient(built, params, batch, draws)
  assert all(np.any(g) for g in jax.tree.leaves(grads['heads']))
  table = official.pretraining(cfg)
  weights = names.export(params, table)
  assert weights['distill_weights'].shape == (3, 3)
  again, unknown = names.load(weights, table)
  assert not unknown
  jax.tree.map(np.testing.assert_array_equal, again, jax.tree.map(np.asarray, params))
  assert official.TEACHER.match('clip_model.vision_model.post_layernorm.bias') and not any(
    official.TEACHER.match(name) for name in weights
  )


def test_sum_fusion_takes_any_depths(given):
  _, _, batch, draws = given
  built = method.build(method.options('maskalign', **GIVEN | {'size': '32/5/4', 'fusion': 'sum'}))
  params = start(built, batch)
  assert params['mix'].shape == (3, 5) and np.isfinite(value(built, params, batch, draws))


def test_level_weights():
  np.testing.assert_allclose(maskalign.level_weights('top5', 12), [0] * 7 + [0.2] * 5)
  np.testing.assert_allclose(maskalign.level_weights('linear_decay', 3), [0, 1 / 3, 2 / 3])
  np.testing.assert_allclose(maskalign.level_weights('mid0', 2), [1, 0])
  np.testing.assert_allclose(maskalign.distance(jnp.array([0.0, 0.5, 1, 3]), 0.0, 'smoothl1'), [0, 0.25, 1, 5])


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'levels': 'top4'}, "'topK'"),
    ({'levels': 'last'}, 'linear_decay'),
    ({'fusion': 'lineal'}, 'did you mean'),
    ({'size': '32/5/4'}, "fusion='sum'"),
    ({'teacher': dict(kind='clip', size='24/3/4', patch=4, image_size=32)}, r'image_size to \(16, 16\)'),
  ],
)
def test_options_that_cannot_work_are_refused(options, message):
  with pytest.raises(ConfigError, match=message):
    method.build(method.options('maskalign', **TINY | options))


def test_stochastic_depth_is_drawn_and_only_in_training(taught):
  built, params, frozen, batch, draws = taught
  assert draws['drop'].shape == (4, 3, 2)
  kept = draws | {'drop': jnp.ones_like(draws['drop']) - 1e-3}
  dropped = draws | {'drop': kept['drop'].at[:, 2].set(0.0)}
  assert value(built, params, batch, kept, frozen) != value(built, params, batch, dropped, frozen)
  still = method.build(method.options('maskalign', **TINY, drop_path=0.0))
  assert set(still.draw(jax.random.key(0), batch)) == {'noise'}
  encoded = jax.jit(built.encode)(params, batch)
  assert encoded['tokens'].shape == (4, 16, 32) and encoded['cls'].shape == (4, 32)


@pytest.mark.parametrize('options', [{'scan': False}, {'remat': 'full'}, {'dtype': 'bfloat16'}])
def test_other_forms_of_computation_agree(taught, options):
  built, params, frozen, batch, draws = taught
  other = method.build(method.options('maskalign', **TINY, **options))
  tolerance = 0.03 if 'dtype' in options else 1e-6
  found = value(other, params, batch, draws, frozen)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, value(built, params, batch, draws, frozen), rtol=tolerance)


def test_teacher_weights_come_from_a_file_and_move_to_its_grid(taught, tmp_path):
  """The published CLIP-L/14 has 16 x 16 positions and is fed 14 x 14 patches; here 5 x 5 become 4 x 4."""
  built, _, frozen, batch, _ = taught
  wider = teachers.make('clip', '24/3/4', 8, 40)
  module = wider.encoder
  options = {key: getattr(module, key) for key in ('width', 'depth', 'heads', 'patch', 'grid', 'pos', 'eps')}
  options |= {key: getattr(module, key) for key in ('patch_bias', 'embed_norm', 'activation')}
  params = {'encoder': jax.tree.map(np.asarray, jax.jit(wider.init)(jax.random.key(9))['encoder'])}
  bundles.write(tmp_path / 'clip.safetensors', bundles.Bundle(options, params, stats='clip'))
  loaded, report = init_from.load_into(frozen, tmp_path / 'clip.safetensors')
  assert list(report.resized) == ['encoder/pos_embed'] and not report.missing
  np.testing.assert_array_equal(loaded['encoder']['pos_embed'][:, 0], params['encoder']['pos_embed'][:, 0])
  shallow = TINY | {'teacher': dict(size='24/2/4', patch=8, image_size=32), 'fusion': 'sum'}
  other = method.build(method.options('maskalign', **shallow))
  with pytest.raises(CheckpointError, match='3 blocks do not make 2'):
    init_from.load_into(jax.jit(other.frozen)(jax.random.key(0), batch), tmp_path / 'clip.safetensors')


def test_panels(taught, given):
  built, params, frozen, batch, draws = taught
  jitted = jax.jit(built.panels)(params, {}, frozen, batch, draws)
  assert sorted(jitted) == sorted(['input', 'visible', 'teacher attention', 'teacher', 'student', 'error (white: 1)'])
  assert all(picture.shape == (4, 32, 32, 3) for picture in jitted.values())
  built, params, batch, draws = given
  assert len(jax.jit(built.panels)(params, {}, {}, batch, draws)) == 6


def ramps(key, count):
  """Images [count, 32, 32, 3] of offset + slope_y y + slope_x x, and these coefficients [count, 9] in [-1, 1]."""
  axis = (jnp.arange(32) + 0.5) / 16 - 1
  c = jax.random.uniform(key, (count, 1, 1, 3, 3), minval=-1)
  return c[..., 0] + c[..., 1] * axis[:, None, None] + c[..., 2] * axis[None, :, None], c.reshape(count, 9)


@pytest.mark.slow
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_infers_the_whole_from_a_quarter(seed, record):
  """Every target depends on the coefficients of the whole image; the student sees 4 patches of 16.

  Baseline: predicting the mean target of every level and place, 0.86; features of another image, 1.3.
  """
  cfg = method.options(
    'maskalign',
    **GIVEN | {'size': '48/3/4', 'mask_ratio': 0.75, 'masking': 'random', 'mlp_ratio': 2.0},
  )
  built = method.build(cfg)
  keys = jax.random.split(jax.random.key(7), 2)
  a = 0.8 * jax.random.normal(keys[0], (3, 9, 24))
  p = 0.5 * jax.random.normal(keys[1], (3, 17, 24))

  def examples(key, count):
    image, coefficients = ramps(key, count)
    hidden = jnp.sin(jnp.einsum('bk,lkd->bld', coefficients, a)[:, :, None] + p)
    return {'image': image, 'teacher_hidden': hidden}

  params = built.init(jax.random.key(seed), examples(jax.random.key(0), 1))
  start = params['mix']
  tx = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 2e-3, 50, 400), b1=0.9, b2=0.95, weight_decay=0.05)

  @jax.jit
  def step(carry, i):
    params, opt = carry
    keys = jax.random.split(jax.random.fold_in(jax.random.key(100 + seed), i))
    batch = examples(keys[0], 64)
    grads = jax.grad(lambda p: built.loss(p, {}, {}, batch, built.draw(keys[1], batch), i)[0])(params)
    updates, opt = tx.update(grads, opt, params)
    return (optax.apply_updates(params, updates), opt), None

  batch = examples(jax.random.key(999), 256)
  draws = built.draw(jax.random.key(998), batch)
  before = value(built, params, batch, draws)
  (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(400))
  end, aux = built.loss(params, {}, {}, batch, draws, 0)
  target = aux['out']['target']
  many = maskalign.normalise(jnp.moveaxis(examples(jax.random.key(5), 1024)['teacher_hidden'], 1, 0)[1:], 'whiten')
  mean = jnp.mean(many, axis=1)  # [2, 17, 24]
  ids = jnp.concatenate([jnp.zeros((256, 1), int), 1 + aux['out']['keep_ids']], axis=1)
  baseline = jnp.mean(maskalign.distance(jnp.moveaxis(mean[:, ids], 1, 0), target, 'smoothl1'))
  wrong = jnp.mean(maskalign.distance(jnp.roll(aux['out']['pred'], 1, axis=0), target, 'smoothl1'))
  record(before=before, end=end, mean_target=baseline, another_image=wrong)
  assert end < 0.5 and end < 0.6 * baseline and wrong > 2 * end
  assert jnp.abs(params['mix'] - start).max() > 0.05
