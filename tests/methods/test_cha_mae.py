"""ChA-MAE: reference numbers, the properties its paper implies, initialisation, and that it learns across channels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mim_jax import config, method, parity
from mim_jax.data import images
from mim_jax.errors import ConfigError
from mim_jax.evals import suite
from mim_jax.methods import cha_mae
from mim_jax.official import cha_mae as official
from mim_jax.official import names
from mim_jax.ops import patches

TINY = dict(
  size='32/1/4', decoder='1/4', patch=8, image_size=24, channels=4, channel_types=6, classes=5, memory_tokens=2
)
TINY |= dict(mask_ratio=0.5, ce_weight=0.01)


@functools.cache
def compiled(function):
  return jax.jit(function)


def run(built, params, batch, draws):
  return compiled(built.loss)(params, {}, {}, batch, draws, 0)


@pytest.fixture(scope='module')
def tiny():
  built = method.build(method.options('cha_mae', **TINY))
  ids = jnp.array([[0, 1, 2, -1], [3, 5, -1, -1], [4, 1, 0, 2]])
  image = jax.random.normal(jax.random.key(1), (3, 24, 24, 4)) * (ids >= 0)[:, None, None]
  batch = {'image': image, 'channel_ids': ids, 'channel_valid': ids >= 0, 'label': jnp.array([0, 4, 2])}
  params = jax.jit(built.init)(jax.random.key(2), batch)
  return built, params, batch


def forced(built, batch, strategy, hidden_count=None, kept=4, seed=3):
  """Draws of one strategy, complete."""
  draws = built.draw(jax.random.key(seed), batch)
  draws['strategy'] = jnp.full(3, strategy)
  if hidden_count is not None:
    draws['hidden_count'] = jnp.asarray(hidden_count)
  return cha_mae.completed(draws, batch['channel_ids'], batch['channel_valid'], kept, 6, False, False)


def tokens_of(image):
  return patches.patchify(jnp.moveaxis(image, -1, 1).reshape(-1, 24, 24, 1), (8, 8)).reshape(len(image), -1, 64)


def image_of(tokens):
  flat = patches.unpatchify(tokens.reshape(-1, 9, 64), (3, 3), (8, 8))
  return jnp.moveaxis(flat.reshape(len(tokens), -1, 24, 24), 1, -1)


def test_reference_numbers(goldens):
  rows = parity.run(parity.read(goldens / 'cha_mae.safetensors'))
  assert len(rows) == 133
  assert all(row.ok for row in rows), parity.table([row for row in rows if not row.ok])


def test_names_load_and_export(goldens):
  case = parity.read(goldens / 'cha_mae.safetensors')
  table = official.pretraining(official.config_of(case, case.config.cases['main'], 5, False))
  tree, unknown = names.load(case.weights, table)
  assert not unknown
  back = names.export(tree, table)
  assert set(back) == set(case.weights)
  assert all(np.array_equal(back[name], case.weights[name]) for name in back)


def test_order_of_the_channels_does_not_matter(tiny):
  built, params, batch = tiny
  one = {'image': batch['image'][2:], 'channel_ids': batch['channel_ids'][2:]}
  order = jnp.array([2, 0, 3, 1])
  other = {'image': one['image'][..., order], 'channel_ids': one['channel_ids'][:, order]}
  plain, permuted = compiled(built.encode)(params, one), compiled(built.encode)(params, other)
  np.testing.assert_allclose(plain['cls'], permuted['cls'], atol=1e-5)
  np.testing.assert_allclose(plain['logits'], permuted['logits'], atol=1e-5)
  tokens = plain['tokens'].reshape(1, 4, 9, -1)[:, order].reshape(1, 36, -1)
  np.testing.assert_allclose(tokens, permuted['tokens'], atol=1e-5)
  wrong = compiled(built.encode)(params, one | {'channel_ids': other['channel_ids']})
  assert np.abs(plain['cls'] - wrong['cls']).max() > 1e-4  # with other ids the same pixels mean something else


def test_hidden_pixels_are_not_seen(tiny):
  built, params, batch = tiny
  draws = forced(built, batch, cha_mae.BOTH, [1, 1, 2])
  value, aux = run(built, params, batch, draws)
  mask = aux['out']['mask'][..., None]
  changed = batch | {
    'image': image_of(tokens_of(batch['image']) + 5.0 * jax.random.normal(jax.random.key(0), (64,)) * mask)
  }
  other, after = run(built, params, changed, draws)
  np.testing.assert_array_equal(aux['out']['fused'], after['out']['fused'])
  np.testing.assert_array_equal(aux['out']['recon'], after['out']['recon'])
  assert value != other


@pytest.mark.parametrize(
  'strategy, expected',
  [(cha_mae.PATCH, [12, 8, 16]), (cha_mae.CHANNEL, [18, 9, 18]), (cha_mae.BOTH, [8, 4, 8])],
)
def test_as_many_tokens_are_seen_as_the_strategy_says(tiny, strategy, expected):
  built, _, batch = tiny
  draws = forced(built, batch, strategy, [1, 1, 2])
  visible, mask, _ = cha_mae.hide(draws, batch['channel_valid'], 4)
  assert visible.sum((1, 2)).tolist() == expected
  np.testing.assert_array_equal(visible | mask, jnp.broadcast_to(batch['channel_valid'][..., None], visible.shape))
  assert not np.any(visible & mask)
  assert float(draws['counts']['masked']) == 9 * 9 - sum(expected)


def test_padding_changes_nothing(tiny):
  built, params, batch = tiny
  wide = method.build(method.options('cha_mae', **TINY | {'channels': 5, 'token_weight': 0.0}))
  narrow = method.build(method.options('cha_mae', **TINY | {'token_weight': 0.0}))
  draws = forced(built, batch, cha_mae.BOTH, [1, 0, 2])
  more = {
    'image': jnp.pad(batch['image'], ((0, 0), (0, 0), (0, 0), (0, 1))),
    'channel_ids': jnp.pad(batch['channel_ids'], ((0, 0), (0, 1)), constant_values=-1),
    'channel_valid': jnp.pad(batch['channel_valid'], ((0, 0), (0, 1))),
    'label': batch['label'],
  }
  padded = draws | {
    'patch_noise': jnp.pad(draws['patch_noise'], ((0, 0), (0, 1), (0, 0))),
    'channel_noise': jnp.pad(draws['channel_noise'], ((0, 0), (0, 1))),
  }
  value, aux = run(narrow, params, batch, draws)
  other, after = run(wide, params, more, padded)
  np.testing.assert_allclose(aux['out']['fused'], after['out']['fused'], atol=1e-5)
  # The official spectrum is of runs of numbers over all channels, so it alone may see the padding.
  for name in ('loss/pixel', 'loss/proxy', 'loss/ce', 'loss/channels'):
    np.testing.assert_allclose(aux['metrics'][name], after['metrics'][name], rtol=1e-5)
  valid = np.asarray(jnp.repeat(batch['channel_valid'], 9, axis=1))
  np.testing.assert_allclose(aux['out']['recon'][valid], after['out']['recon'][:, :36][valid], atol=1e-5)


def test_only_the_scrambled_spectrum_sees_visible_targets():
  """Slices of 3 x 3 numbers cross the patches of 64, which 9 does not divide; those of the patch do not."""
  rng = np.random.default_rng(0)
  pred, target = rng.normal(size=(2, 1, 18, 64)).astype(np.float32)
  mask = np.arange(18)[None] % 2 == 0
  changed = np.where(mask[..., None], target, target + 1)
  mean = lambda error: float(cha_mae.masked_mean(error, mask, 9.0))
  square = lambda t: mean(jnp.mean((pred - t) ** 2, -1))
  assert square(target) == square(changed)
  official_, patch = ((3, 3), (8, 8))
  spectrum = lambda t, shape: mean(cha_mae.fourier_error(pred, t, shape))
  assert abs(spectrum(target, official_) - spectrum(changed, official_)) > 1e-3
  assert spectrum(target, patch) == spectrum(changed, patch)


def test_nothing_hidden_costs_nothing_and_gradients_are_finite(tiny):
  built, params, batch = tiny
  draws = forced(built, batch, cha_mae.CHANNEL, [0, 0, 0])
  (_, aux), grads = jax.jit(jax.value_and_grad(built.loss, has_aux=True), static_argnums=())(
    params, {}, {}, batch, draws, 0
  )
  assert aux['metrics']['loss/pixel'] == aux['metrics']['loss/fourier'] == 0
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))
  assert not np.any(grads['decoder']['pred']['kernel'])
  flat = jax.grad(lambda x: jnp.sum(cha_mae.amplitudes(x)))(jnp.zeros((3, 3)))
  assert not np.any(flat)  # and not NaN, where an amplitude is 0


def test_every_parameter_learns(tiny):
  built, params, batch = tiny
  draws = forced(built, batch, cha_mae.BOTH, [1, 1, 2])
  grads = jax.jit(jax.grad(lambda p: built.loss(p, {}, {}, batch, draws, 0)[0]))(params)
  still = [jax.tree_util.keystr(path) for path, g in jax.tree_util.tree_leaves_with_path(grads) if not np.any(g)]
  assert not still


def test_without_labels_it_is_self_supervised_and_needs_none():
  options = TINY | {'ce_weight': 0.0, 'proxy_weight': 0.0, 'same_channels': True, 'channels': 6}
  built = method.build(method.options('cha_mae', **options))
  assert set(built.fields) == {'image'}
  params = jax.eval_shape(lambda: built.init(jax.random.key(0), built.abstract_batch(2)))
  assert set(params) == {'encoder', 'decoder', 'channel_proxies'}
  out = jax.eval_shape(built.encode, params, built.abstract_batch(2))
  assert out['cls'].shape == (2, 32) and out['tokens'].shape == (2, 54, 32) and 'logits' not in out


def test_draws_are_shared_where_channels_are_and_own_elsewhere(tiny):
  built, _, batch = tiny
  same = method.build(method.options('cha_mae', **TINY | {'same_channels': True, 'channels': 6}))
  image = {'image': jnp.zeros((8, 24, 24, 6))}
  strategies, counts = set(), set()
  for seed in range(30):
    draws = same.draw(jax.random.key(seed), image)
    assert (
      np.ptp(draws['hidden_count']) == np.ptp(draws['strategy']) == np.ptp(draws['channel_noise'], axis=0).max() == 0
    )
    assert np.ptp(draws['patch_noise'], axis=0).min() > 0
    strategies.add(int(draws['strategy'][0]))
    counts.add(int(draws['hidden_count'][0]))
  assert strategies == {cha_mae.PATCH, cha_mae.CHANNEL} and counts == set(range(6))
  found = np.stack([built.draw(jax.random.key(seed), batch)['hidden_count'] for seed in range(40)])
  assert found.max(0).tolist() == [2, 1, 3] and found.min(0).tolist() == [0, 0, 0]
  least = cha_mae.hidden_counts(jnp.array([0.0, 0.99, 0.0]), jnp.array([3, 2, 1]), 1)
  assert least.tolist() == [1, 1, 0]  # one at least, but never all


def test_fewer_tokens_give_the_same_outputs():
  """Where every step hides patches, only as many tokens are computed as can be seen."""
  options = TINY | {'same_channels': True, 'channels': 6, 'p_patch': 0.0, 'p_channel': 0.0}
  built = method.build(method.options('cha_mae', **options))
  batch = {'image': jax.random.normal(jax.random.key(0), (2, 24, 24, 6)), 'label': jnp.array([1, 2])}
  params = jax.jit(built.init)(jax.random.key(1), batch)
  draws = built.draw(jax.random.key(2), batch)
  encoder = cha_mae.modules(method.options('cha_mae', **options))[0]
  visible = cha_mae.hide(draws, jnp.ones((2, 6), bool), 4)[0].reshape(2, -1)
  ids = jnp.broadcast_to(jnp.arange(6), (2, 6))
  encode = jax.jit(
    lambda budget: encoder.apply({'params': params['encoder']}, batch['image'], ids, visible, budget)['x'],
    static_argnums=0,
  )
  whole, short = encode(None), encode(24)
  seen = np.asarray(jnp.pad(visible, ((0, 0), (3, 0)), constant_values=True))
  np.testing.assert_allclose(whole[seen], short[seen], atol=1e-5)


def test_initialisation():
  options = TINY | {'size': '128/2/4', 'channels': 5, 'channel_types': 12}
  built = method.build(method.options('cha_mae', **options))
  params = jax.jit(built.init)(jax.random.key(0), {'image': jnp.zeros((1, 24, 24, 5))})
  tokens = np.asarray(params['encoder']['channel_tokens'])
  np.testing.assert_allclose(tokens @ tokens.T, np.eye(12), atol=1e-5)
  proxies = np.asarray(params['proxies'])
  np.testing.assert_allclose(proxies @ proxies.T, np.eye(5), atol=1e-5)
  projection = np.asarray(params['encoder']['patch_embed']['kernel'])
  assert np.abs(projection).max() <= 1 / 8 and abs(projection.std() - 1 / 8 / 3**0.5) < 2e-3
  for path in (('encoder', 'blocks', 'attn', 'qkv'), ('decoder', 'blocks', 'mlp', 'fc1'), ('classifier', 'fc1')):
    leaf = functools.reduce(lambda tree, key: tree[key], path, params)
    assert abs(np.std(leaf['kernel']) - 0.02) < 1e-3
  assert not np.any(params['encoder']['blocks']['attn']['qkv']['bias'])
  assert 'bias' not in params['decoder']['blocks']['attn']['qkv']
  assert abs(np.std(params['encoder']['pos_embed']) - 0.02) < 2e-3
  kernels = params['encoder']['blocks']['mlp']['fc1']['kernel']
  assert np.abs(kernels[0] - kernels[1]).max() > 0.01


def test_bfloat16_stays_near_float32_and_unrolled_equals_scanned(tiny):
  built, params, batch = tiny
  draws = forced(built, batch, cha_mae.BOTH, [1, 1, 2])
  value = run(built, params, batch, draws)[0]
  half = run(method.build(method.options('cha_mae', **TINY, dtype='bfloat16')), params, batch, draws)[0]
  assert half.dtype == jnp.float32
  np.testing.assert_allclose(half, value, rtol=0.03)
  flat = run(method.build(method.options('cha_mae', **TINY, scan=False)), params, batch, draws)[0]
  np.testing.assert_allclose(flat, value, rtol=1e-6)


def test_panels_paste_what_was_seen(tiny):
  built, params, batch = tiny
  draws = forced(built, batch, cha_mae.BOTH, [1, 1, 2])
  shown = jax.jit(built.panels)(params, {}, {}, batch, draws)
  assert {x.shape for x in shown.values()} == {(3, 24, 24, 4)}
  changed = np.asarray(tokens_of(shown['pasted'] - shown['input'])).any(-1)
  np.testing.assert_array_equal(changed, run(built, params, batch, draws)[1]['out']['mask'])


@pytest.mark.parametrize(
  'options, message',
  [
    ({'fusion': 'mean'}, 'sigmoid, add, cls'),
    ({'same_channels': True}, 'channels=4, channel_types=6'),
    ({'p_patch': 0.9}, '0.9 . 0.5'),
  ],
)
def test_wrong_options_are_told(options, message):
  with pytest.raises(ConfigError, match=message):
    method.build(method.options('cha_mae', **TINY | options))


def fields(key, count):
  """Images [count, 24, 24, 6] whose channels are fixed mixtures, some of them shifted, of two smooth random fields."""
  keys = jax.random.split(key, 2)
  coarse = jax.random.normal(keys[0], (count, 3, 3, 2))
  smooth = jax.image.resize(coarse, (count, 24, 24, 2), 'cubic')
  mixture = jnp.array([[1, 0], [0, 1], [0.7, 0.7], [0.7, -0.7], [1, 0.3], [-0.3, 1]]).T
  image = smooth @ mixture
  moved = jnp.roll(image[..., 4:], (2, -3), axis=(1, 2))
  return jnp.concatenate([image[..., :4], moved], axis=-1) + 0.02 * jax.random.normal(keys[1], image.shape)


@pytest.mark.slow
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_hiding_channels_teaches_to_look_across_them(seed, record):
  """Error of one hidden channel, in units of its target's variance: far below 1, and below that after training on hidden
  patches alone (which also learns across channels, since others stay visible at the same place).
  """
  options = dict(size='64/2/4', decoder='1/4', patch=8, image_size=24, channels=6, channel_types=6, memory_tokens=2)
  options |= dict(
    init_std=0.1, same_channels=True, proxy_weight=0.0, mask_ratio=0.25, token_weight=0.0, channel_weight=0.0
  )

  def trained(p_patch):
    built = method.build(method.options('cha_mae', **options, p_patch=p_patch, p_channel=0.0))
    params = built.init(jax.random.key(seed), {'image': jnp.zeros((1, 24, 24, 6))})
    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, 50, 2000)
    tx = optax.adamw(schedule, b1=0.9, b2=0.999, weight_decay=5e-5)

    @jax.jit
    def step(carry, i):
      params, opt = carry
      keys = jax.random.split(jax.random.fold_in(jax.random.key(100 + seed), i))
      batch = {'image': fields(keys[0], 32)}
      grads = jax.grad(lambda p: built.loss(p, {}, {}, batch, built.draw(keys[1], batch), i)[0])(params)
      updates, opt = tx.update(grads, opt, params)
      return (optax.apply_updates(params, updates), opt), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(2000))
    judge = method.build(method.options('cha_mae', **options, p_patch=0.0, p_channel=1.0))
    batch = {'image': fields(jax.random.key(999), 128)}
    draws = judge.draw(jax.random.key(998), batch)
    errors = []
    for channel in range(6):
      noise = jnp.broadcast_to(jnp.where(jnp.arange(6) == channel, 0.0, 1.0), (128, 6))
      one = draws | {'hidden_count': jnp.ones(128, jnp.int32), 'channel_noise': noise}
      ids, valid = jnp.broadcast_to(jnp.arange(6), (128, 6)), jnp.ones((128, 6), bool)
      one = cha_mae.completed(one, ids, valid, 4, 6, True, False)
      errors.append(float(run(judge, params, batch, one)[1]['metrics']['loss/pixel']))
    return np.mean(errors)

  across, alone = trained(0.0), trained(1.0)
  record(across=across, patches_alone=alone)
  assert across < 0.6 and across < 0.7 * alone


@pytest.mark.parametrize('argument, channels', [('', 4), (':data=so2sat', 0), (':data=jump_cp', 8), (':debug', 3)])
def test_recipes_are_whole(root, argument, channels, monkeypatch):
  monkeypatch.chdir(root)
  cfg = config.load([f'--config=configs/cha_mae.py{argument}'])
  built = method.build(cfg.method)
  size = built.fields['image'].shape[0]
  example = {'sentinel1': np.ones((32, 32, 8), np.float32), 'sentinel2': np.ones((32, 32, 10), np.float32)}
  if channels:
    example = {'image': np.zeros((size, size, channels), np.uint8)}
    if built.fields['image'].shape[-1] > channels:
      example['channel_ids'] = np.array([*range(channels), *[-1] * (built.fields['image'].shape[-1] - channels)])
      example['image'] = np.pad(example['image'], ((0, 0), (0, 0), (0, len(example['channel_ids']) - channels)))
  for transforms in (cfg.data.transforms, cfg.data.eval_transforms):
    chain = images.parse(transforms)
    made = chain.example(dict(example), np.random.default_rng(0))
    made = chain.batch({name: made[name][None] for name in ('image', 'channel_ids', 'channel_valid')})
    for name, field in built.fields.items():
      if name != 'label':
        assert made[name].shape[1:] == field.shape and made[name].dtype == field.dtype
  suite.build(cfg.evals, cfg.data.source, cfg.data.eval_transforms, cfg.batch_size)
