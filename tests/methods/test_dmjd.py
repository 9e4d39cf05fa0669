"""DMJD: reference numbers, the properties of its two views and two branches, initialisation, and that it learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mim_jax import method, parity
from mim_jax.errors import ConfigError
from mim_jax.methods import dmjd
from mim_jax.official import dmjd as official
from mim_jax.official import names
from mim_jax.ops import hog, patches

TINY = dict(size='8,12,16/1,1,1/2', decoder='16/1/2', conv_mlp_ratios=(2.0, 2.0), decoder_mlp_ratio=2.0, image_size=96)
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def batch_of(pixels):
  """uint8 [B, H, W, 3] as the two fields of the batch."""
  return {'image': ((pixels / 255 - MEAN) / STD).astype(jnp.float32), 'image_u8': pixels}


def random_pixels(count, size=96, seed=1):
  return jax.random.randint(jax.random.key(seed), (count, size, size, 3), 0, 256).astype(jnp.uint8)


class Tiny:
  """A built method with params, a batch of three and its draws; `aux` is the second result of the jitted loss."""

  def __init__(self, **options):
    self.cfg = method.options('dmjd', **{**TINY, **options})
    self.built = method.build(self.cfg)
    self.batch = batch_of(random_pixels(3))
    self.params = jax.jit(self.built.init)(jax.random.key(2), self.batch)
    self.draws = self.built.draw(jax.random.key(3), self.batch)
    self._loss = jax.jit(self.built.loss)

  def aux(self, batch=None, draws=None, params=None):
    return self._loss(params or self.params, {}, {}, batch or self.batch, draws or self.draws, 0)[1]


@pytest.fixture(scope='module')
def tiny():
  return Tiny()


def test_reference_numbers(goldens):
  rows = parity.run(parity.read(goldens / 'dmjd.safetensors'))
  assert len(rows) > 30
  assert all(row.ok for row in rows), parity.table([row for row in rows if not row.ok])


def test_weights_go_out_under_their_official_names(goldens):
  case = parity.read(goldens / 'dmjd.safetensors')
  weights = {name: value for name, value in case.weights.items() if name not in official.TABLES}
  table = official.pretraining(official.config_of(case))
  back = names.export(names.load(weights, table)[0], table)
  assert set(back) == set(weights)
  for name, value in weights.items():
    np.testing.assert_array_equal(back[name], value)


@pytest.mark.parametrize(
  'unit, ratio, pred_ratio', [(2, 0.6, 1.0), (2, 0.75, 1.0), (1, 0.6, 1.0), (1, 0.4, 1.0), (2, 0.5, 0.8)]
)
def test_the_second_view_hides_what_the_first_one_shows(unit, ratio, pred_ratio):
  """Every row hides as many; with `swapped` = `kept` no token is visible twice, and each is hidden at least once."""
  grid = (6, 8)
  count = 48 // unit**2
  kept, swapped = dmjd.unit_counts(count, ratio, pred_ratio)
  noise = jax.random.uniform(jax.random.key(0), (5, count))
  keep_ids, restore_ids, mask = dmjd.disjoint_views(noise, grid, unit, kept, swapped)
  assert keep_ids.shape == (5, 2, kept * unit**2) and mask.shape == (5, 2, 48)
  assert set(np.asarray(mask.sum(-1)).ravel()) == {48 - kept * unit**2}
  np.testing.assert_array_equal(np.take_along_axis(mask, keep_ids, -1), 0)
  np.testing.assert_array_equal(np.sort(restore_ids, -1), np.broadcast_to(np.arange(48), (5, 2, 48)))
  shared = np.sum((mask[:, 0] == 0) & (mask[:, 1] == 0), axis=1)
  np.testing.assert_array_equal(shared, (kept - swapped) * unit**2)
  if kept == swapped:
    assert np.all(mask.max(axis=1) == 1)
  squares = mask.reshape(5, 2, 6 // unit, unit, 8 // unit, unit)
  np.testing.assert_array_equal(squares.min((3, 5)), squares.max((3, 5)))


@pytest.mark.parametrize('ratio, kept', [(0.6, 19), (0.75, 12)])
def test_published_counts(ratio, kept):
  assert dmjd.unit_counts(49, ratio, 1.0) == (kept, kept)


def test_order_of_visible_tokens_is_by_place_in_the_unit_first():
  keep_ids, _, _ = dmjd.disjoint_views(jnp.array([[0.3, 0.1, 0.2, 0.4]]), (4, 4), 2, 2, 2)
  assert keep_ids[0].tolist() == [[2, 8, 3, 9, 6, 12, 7, 13], [0, 10, 1, 11, 4, 14, 5, 15]]


def test_units_are_uniform_and_differ_between_examples_and_steps(tiny):
  assert np.any(tiny.built.draw(jax.random.key(4), tiny.batch)['noise'] != tiny.draws['noise'])
  noise = jax.random.uniform(jax.random.key(0), (4000, 9))
  _, _, mask = dmjd.disjoint_views(noise, (6, 6), 2, 3, 3)
  np.testing.assert_allclose(mask.mean(0), 6 / 9, atol=0.03)


def test_pixels_that_a_view_hides_reach_it_not_and_the_other_view_does(tiny):
  before = tiny.aux()['out']
  tokens = patches.patchify(tiny.batch['image'], (16, 16)) + 7.0 * before['mask'][:, 0, :, None]
  changed = {**tiny.batch, 'image': patches.unpatchify(tokens, (6, 6), (16, 16))}
  after = tiny.aux(changed)['out']
  np.testing.assert_array_equal(after['latent'][:, 0], before['latent'][:, 0])
  assert np.all(np.any(after['latent'][:, 1] != before['latent'][:, 1], axis=(1, 2)))


def test_order_of_visible_tokens_matters_only_to_the_raster_form(tiny):
  """The same sets, visited in another order: permuting the noise among the shown units."""
  raster = Tiny(visible_targets='raster')
  shown = jnp.argsort(tiny.draws['noise'], axis=1)[:, :3]
  values = jnp.take_along_axis(tiny.draws['noise'], shown, 1)
  rows = jnp.arange(3)[:, None]
  permuted = {'noise': tiny.draws['noise'].at[rows, shown].set(values[:, ::-1])}
  losses = {}
  for name, form in (('aligned', tiny), ('raster', raster)):
    losses[name] = [form.aux(draws=draws)['metrics'] for draws in (tiny.draws, permuted)]
    np.testing.assert_allclose(losses[name][0]['loss/hidden'], losses[name][1]['loss/hidden'], rtol=1e-5)
  aligned, other = ([float(each['loss/visible']) for each in losses[name]] for name in ('aligned', 'raster'))
  assert abs(aligned[0] - aligned[1]) < 1e-5 * aligned[0]
  assert abs(other[0] - other[1]) > 1e-4 * other[0]


def test_each_branch_trains_its_own_head_and_both_the_encoder(tiny):
  def of(name):
    return jax.jit(jax.grad(lambda p: tiny.built.loss(p, {}, {}, tiny.batch, tiny.draws, 0)[1]['metrics'][name]))(
      tiny.params
    )

  hidden, visible = of('loss/hidden'), of('loss/visible')
  assert not any(np.any(leaf) for leaf in jax.tree.leaves((hidden['visible'], visible['decoder'])))
  for grads in (hidden['encoder'], visible['encoder'], hidden['decoder'], visible['visible']):
    paths = jax.tree_util.tree_leaves_with_path(grads)
    assert not [jax.tree_util.keystr(path) for path, leaf in paths if not np.any(leaf)]


def test_the_target_is_the_whitened_histogram_of_the_bytes(tiny):
  target = np.asarray(tiny.aux()['out']['target'])
  cells = np.asarray(hog.whiten(hog.histograms(tiny.batch['image_u8'])))  # [3, 12, 12, 9, 3]
  assert target.shape == (3, 36, 108)
  for token, (row, column) in ((0, (0, 0)), (7, (2, 2)), (35, (10, 10))):
    np.testing.assert_allclose(
      target[:, token].reshape(3, 2, 2, 9, 3), cells[:, row : row + 2, column : column + 2], atol=1e-4
    )
  brighter = {**tiny.batch, 'image': tiny.batch['image'] + 1.0}
  np.testing.assert_array_equal(tiny.aux(brighter)['out']['target'], target)


def test_hidden_loss_counts_hidden_tokens_and_visible_loss_visible_ones(tiny):
  aux = tiny.aux()
  out = {name: np.asarray(value) for name, value in aux['out'].items()}
  error = out['pred'] - out['target'][:, None]
  expected = ((error**2).mean(-1) * out['mask']).sum() / out['mask'].sum()
  np.testing.assert_allclose(aux['metrics']['loss/hidden'], expected, rtol=1e-5)
  own = np.take_along_axis(np.stack([out['target']] * 2, 1), out['keep_ids'][..., None], 2)
  distance = np.abs(out['pred_visible'] - own)
  expected = np.where(distance < 2, distance**2 / 4, distance - 1).mean()
  np.testing.assert_allclose(aux['metrics']['loss/visible'], expected, rtol=1e-5)


def test_losses_and_weight_are_options(tiny):
  plain = tiny.aux()['metrics']
  other = Tiny(hidden_loss='smooth_l1', visible_loss='l2', visible_weight=0.5)
  value, aux = other._loss(tiny.params, {}, {}, tiny.batch, tiny.draws, 0)
  assert aux['metrics']['loss/hidden'] < 0.5 * plain['loss/hidden'] < aux['metrics']['loss/visible']
  np.testing.assert_allclose(value, aux['metrics']['loss/hidden'] + 0.5 * aux['metrics']['loss/visible'], rtol=1e-6)


def test_examples_are_independent(tiny):
  order = jnp.array([2, 0, 1])
  straight = tiny.aux()['out']['pred']
  permuted = tiny.aux({k: v[order] for k, v in tiny.batch.items()}, {'noise': tiny.draws['noise'][order]})['out'][
    'pred'
  ]
  np.testing.assert_allclose(straight[order], permuted, atol=1e-5)


def test_encode_sees_the_whole_image_without_fusion_and_norm(tiny):
  found = tiny.built.encode(tiny.params, tiny.batch, layers=True)
  assert found['tokens'].shape == (3, 36, 16) and found['layers'].shape == (1, 3, 36, 16)
  np.testing.assert_array_equal(found['tokens'], found['layers'][-1])
  without = {
    **tiny.params,
    'encoder': {k: v for k, v in tiny.params['encoder'].items() if k not in ('fuse1', 'fuse2', 'norm')},
  }
  np.testing.assert_array_equal(tiny.built.encode(without, {'image': tiny.batch['image']})['tokens'], found['tokens'])
  dropped = tiny.built.encode(tiny.params, tiny.batch, drop=(jax.random.split(jax.random.key(0), 3), 0.9))['tokens']
  assert np.any(dropped != found['tokens'])


def test_initialisation_of_the_heads():
  cfg = method.options('dmjd', size='mu', decoder='128/1/4', image_size=32, unit=1)
  params = jax.jit(method.build(cfg).init)(jax.random.key(0), method.build(cfg).abstract_batch(1))
  for name, fan in (('fc1', 32 + 128), ('fc2', 256), ('fc3', 256), ('pred', 128 + 108)):
    kernel = np.asarray(params['visible'][name]['kernel'])
    assert np.abs(kernel).max() <= (6 / fan) ** 0.5 and abs(kernel.std() / (2 / fan) ** 0.5 - 1) < 0.05
    assert not np.any(params['visible'][name]['bias'])
  assert abs(params['decoder']['mask_token'].std() - 0.02) < 0.006
  assert params['decoder']['blocks']['mlp']['fc1']['kernel'].shape == (
    1,
    128,
    8 * 128,
  )  # the official ratio of the decoder
  assert 'norm3' not in params['visible']


def test_plain_vit_has_the_same_branches():
  vit = Tiny(backbone='vit', size='16/1/2')
  out = vit.aux()['out']
  assert out['latent'].shape == (3, 2, 13, 16) and out['pred_visible'].shape == (3, 2, 12, 108)
  encoded = vit.built.encode(vit.params, vit.batch)
  assert encoded['tokens'].shape == (3, 36, 16) and encoded['cls'].shape == (3, 16)
  grads = jax.jit(jax.grad(lambda p: vit.built.loss(p, {}, {}, vit.batch, vit.draws, 0)[0]))(vit.params)
  assert not [p for p, g in jax.tree_util.tree_leaves_with_path(grads) if not np.any(g)]


def test_non_square_images_other_cells_and_channels():
  cfg = method.options('dmjd', **TINY | dict(image_size=(32, 64), patch=(8, 16), cell=4, bins=6, channels=2))
  built = method.build(cfg)
  batch = {'image': jnp.ones((2, 32, 64, 2)), 'image_u8': jnp.ones((2, 32, 64, 2), jnp.uint8)}
  draws = built.draw(jax.random.key(0), batch)
  _, aux = jax.eval_shape(lambda: built.loss(built.init(jax.random.key(0), batch), {}, {}, batch, draws, 0))
  assert aux['out']['pred'].shape == (2, 2, 16, 2 * 4 * 6 * 2)


def test_half_precision_stays_near(tiny):
  half = Tiny(dtype='bfloat16')
  value = half._loss(tiny.params, {}, {}, tiny.batch, tiny.draws, 0)[0]
  assert value.dtype == jnp.float32
  np.testing.assert_allclose(value, tiny._loss(tiny.params, {}, {}, tiny.batch, tiny.draws, 0)[0], rtol=0.03)


def test_panels_show_both_views(tiny):
  shown = jax.jit(lambda *trees: tiny.built.panels(*trees))(tiny.params, {}, {}, tiny.batch, tiny.draws)
  assert set(shown) == {'input', 'HOG', 'view 1', 'predicted 1', 'view 2', 'predicted 2'}
  assert all(value.shape == (3, 96, 96, 3) for value in shown.values())
  mask = tiny.aux()['out']['mask']
  for view in (0, 1):
    kept = patches.patchify(shown[f'view {view + 1}'] == tiny.batch['image'], (16, 16)).all(-1)
    np.testing.assert_array_equal(kept, mask[:, view] == 0)


@pytest.mark.parametrize(
  'options, message',
  [
    ({'pred_ratio': 0.5}, 'from mask_ratio 0.6'),
    ({'visible_targets': 'other'}, 'aligned or raster'),
    ({'backbone': 'resnet'}, 'convmae or vit'),
    ({'image_size': 80}, 'method.unit=2'),
    ({'cell': 5}, 'method.cell=5'),
    ({'size': 'Ti'}, "size 'Ti'"),
  ],
)
def test_options_that_do_not_work_are_named(options, message):
  with pytest.raises(ConfigError, match=message):
    method.build(method.options('dmjd', **{**TINY, **options}))


def gratings(key, count, size=96):
  """Grey uint8 [count, size, size, 3]: gratings of period 6, each half with a direction and a phase of its own."""
  angle, phase = jnp.moveaxis(jax.random.uniform(key, (count, 2, 2)) * jnp.array([jnp.pi, 2 * jnp.pi]), -1, 0)
  y, x = jnp.arange(size)[:, None], jnp.arange(size)[None]
  side = (x >= size // 2).astype(jnp.int32)
  angle, phase = angle[:, side[0]][:, None], phase[:, side[0]][:, None]  # [count, 1, size]
  wave = 0.5 + 0.4 * jnp.sin(2 * jnp.pi / 6 * (x * jnp.cos(angle) + y * jnp.sin(angle)) + phase)
  return jnp.broadcast_to(jnp.round(255 * wave).astype(jnp.uint8)[..., None], (count, size, size, 3))


@functools.cache
def trained(seed, visible_targets):
  """Held-out losses after 350 steps; the visible one against each token's own target in either case."""
  sizes = dict(
    size='16,32,64/1,1,2/4', decoder='64/2/4', conv_mlp_ratios=(2.0, 2.0), decoder_mlp_ratio=2.0, image_size=96
  )
  built = {name: method.build(method.options('dmjd', **sizes, visible_targets=name)) for name in ('aligned', 'raster')}
  learning = built[visible_targets]
  params = learning.init(jax.random.key(seed), learning.abstract_batch(1))
  tx = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1.5e-3, 30, 350), b1=0.9, b2=0.95, weight_decay=0.05)

  @jax.jit
  def step(carry, i):
    params, opt = carry
    keys = jax.random.split(jax.random.fold_in(jax.random.key(100 + seed), i))
    batch = batch_of(gratings(keys[0], 24))
    draws = learning.draw(keys[1], batch)
    grads = jax.grad(lambda p: learning.loss(p, {}, {}, batch, draws, i)[0])(params)
    updates, opt = tx.update(grads, opt, params)
    return optax.apply_updates(params, updates), opt

  carry = params, tx.init(params)
  for i in range(350):
    carry = step(carry, i)
  batch = batch_of(gratings(jax.random.key(999), 96))
  draws = learning.draw(jax.random.key(998), batch)
  aux = jax.jit(built['aligned'].loss)(carry[0], {}, {}, batch, draws, 0)[1]
  target = aux['out']['target']
  mean = target.mean((0, 1))
  baseline = dmjd.DISTANCES['l2'](mean, target).mean(), dmjd.DISTANCES['smooth_l1'](mean, target).mean()
  return *(float(aux['metrics'][f'loss/{name}']) for name in ('hidden', 'visible')), *map(float, baseline)


@pytest.mark.slow
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_learns_gratings_and_its_own_order_of_targets_beats_the_official_one(seed, record):
  """Predicting the mean target gives 1.0 (hidden) and 0.23 (visible); one token tells the direction of its half."""
  hidden, visible, mean_hidden, mean_visible = trained(seed, 'aligned')
  record(hidden=hidden, visible=visible, mean_target_hidden=mean_hidden, mean_target_visible=mean_visible)
  assert mean_hidden > 0.9 and mean_visible > 0.2
  assert hidden < 0.15
  assert visible < 0.03
  raster_hidden, raster_visible, _, _ = trained(seed, 'raster')
  record(raster_hidden=raster_hidden, raster_visible=raster_visible)
  assert visible < raster_visible / 4
