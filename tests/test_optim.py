import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from mim_jax import config, optim
from mim_jax.errors import ConfigError
from mim_jax.parallel import mesh as meshes
from mim_jax.parallel import rules

DEPTH, WIDTH, HEADS = 3, 8, 2


def vit(seed=0):
  """A tiny tree with the paths of the project. In numpy, so that only what is tested gets compiled."""
  rng = np.random.default_rng(seed)
  array = lambda *shape: rng.normal(size=shape).astype(np.float32)
  layer = lambda *shape: {'kernel': array(DEPTH, *shape), 'bias': array(DEPTH, shape[-1])}
  norm = lambda *lead: {'scale': array(*lead, WIDTH), 'bias': array(*lead, WIDTH)}
  return {
    'encoder': {
      'patch_embed': {'kernel': array(12, WIDTH), 'bias': array(WIDTH)},
      'cls_token': array(1, 1, WIDTH),
      'pos_embed': array(1, 5, WIDTH),
      'blocks': {
        'norm1': norm(DEPTH),
        'attn': {
          'qkv': {
            'kernel': array(DEPTH, WIDTH, 3, HEADS, WIDTH // HEADS),
            'bias': array(DEPTH, 3, HEADS, WIDTH // HEADS),
          },
          'proj': {'kernel': array(DEPTH, HEADS, WIDTH // HEADS, WIDTH), 'bias': array(DEPTH, WIDTH)},
        },
        'norm2': norm(DEPTH),
        'mlp': {'fc1': layer(WIDTH, 4 * WIDTH), 'fc2': layer(4 * WIDTH, WIDTH)},
      },
      'norm': norm(),
    },
    'fc_norm': norm(),
    'head': {'kernel': array(WIDTH, 10), 'bias': array(10)},
  }


def named(tree):
  return {rules.path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def official(name):
  """Path of ours and block index, or None, for a name of facebookresearch/mae."""
  parts = name.split('.')
  decoder = parts[0].startswith('decoder_') or parts[0] == 'mask_token'
  top = 'decoder/' if decoder else '' if parts[0] in ('head', 'fc_norm') else 'encoder/'
  parts[0] = parts[0].removeprefix('decoder_')
  index = int(parts.pop(1)) if parts[0] == 'blocks' else None
  if parts[-1] == 'weight':
    parts[-1] = 'scale' if 'norm' in parts[-2] else 'kernel'
  return top + '/'.join(part for part in parts if (parts[0], part) != ('patch_embed', 'proj')), index


def golden(folder, name):
  path = folder / f'{name}.json'
  if not path.is_file():
    pytest.skip(f'reference case {path.name} is not in {folder}')
  return json.loads(path.read_text()), safetensors.numpy.load_file(path.with_suffix('.safetensors'))


def build(params, schedule=None, total=10, **options):
  """An optimizer with a constant rate base_lr, without decay, unless `options` and `schedule` say otherwise."""
  core = {'b1': 0.9, 'b2': 0.999, 'eps': 1e-8, 'momentum': 0.9, 'trust': 0.001}
  options = {'name': 'adamw', 'base_lr': 0.1, 'lr_batch': 0, 'wd': 0.0} | core | options
  return optim.make(options, schedule or {'name': 'constant'}, 256, total, None, params)


def run(optimizer, params, grads):
  """Parameters after one update per gradient tree, and the info of the last."""
  update, opt = jax.jit(optimizer.update), optimizer.init(params)
  for step, grad in enumerate(grads):
    params, opt, info = update(grad, opt, params, step)
  return jax.device_get((params, info))


def gradients(params, count=4):
  rng = np.random.default_rng(7)
  return [jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params) for _ in range(count)]


def expect(rule, params, grads):
  """Parameters by a reference rule(name, w, list of gradients) in float64, for each layer of a stack alone."""

  def one(name, w, *gs):
    w, gs = np.asarray(w, np.float64), [np.asarray(g, np.float64) for g in gs]
    if 'blocks/' in name:
      return np.stack([rule(name, w[i], [g[i] for g in gs]) for i in range(DEPTH)])
    return rule(name, w, gs)

  return rules.map_named(one, params, *grads)


def same(got, expected, tolerance=2e-6):
  for (name, a), b in zip(named(got).items(), named(expected).values(), strict=True):
    np.testing.assert_allclose(a, b, atol=tolerance, err_msg=name)


def length(tree):
  return np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(tree)))


def is_1d(name):
  return name.endswith(('bias', 'scale'))


def adam(gs, b1, b2, eps=1e-8):
  m = v = 0
  for g in gs:
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
  return m / (1 - b1 ** len(gs)) / (np.sqrt(v / (1 - b2 ** len(gs))) + eps)


def test_adamw_is_the_published_rule():
  params = vit()
  grads = gradients(params)

  def rule(name, w, gs):
    for count in range(1, len(gs) + 1):
      w = w * (1 - 0.1 * (0 if is_1d(name) else 0.05)) - 0.1 * adam(gs[:count], 0.9, 0.95)
    return w

  got, _ = run(build(params, name='adamw', b1=0.9, b2=0.95, wd=0.05), params, grads)
  same(got, expect(rule, params, grads))


def test_adam_adds_the_decay_to_the_gradient():
  params = vit()
  grads = gradients(params)

  def rule(name, w, gs):
    seen = []
    for g in gs:
      seen.append(g + 0.05 * w)
      w = w - 0.1 * adam(seen, 0.9, 0.999)
    return w

  got, _ = run(build(params, name='adam', b1=0.9, b2=0.999, wd=0.05, no_wd=''), params, grads)
  same(got, expect(rule, params, grads), tolerance=1e-5)  # 1 - 0.999 has four digits in float32


@pytest.mark.parametrize('nesterov', [False, True])
def test_sgd_is_torch_sgd(nesterov):
  params = vit()
  grads = gradients(params)

  def rule(name, w, gs):
    momentum = 0
    for g in gs:
      d = g + (0 if is_1d(name) else 0.05) * w
      momentum = 0.9 * momentum + d
      w = w - 0.1 * (d + 0.9 * momentum if nesterov else momentum)
    return w

  got, _ = run(build(params, name='sgd', momentum=0.9, nesterov=nesterov, wd=0.05), params, grads)
  same(got, expect(rule, params, grads))


def test_lion_is_the_published_rule():
  params = vit()
  grads = gradients(params)

  def rule(name, w, gs):
    m = 0
    for g in gs:
      w = w - 0.1 * (np.sign(0.9 * m + 0.1 * g) + (0 if is_1d(name) else 0.05) * w)
      m = 0.99 * m + 0.01 * g
    return w

  got, _ = run(build(params, name='lion', b1=0.9, b2=0.99, wd=0.05), params, grads)
  same(got, expect(rule, params, grads))


@pytest.mark.parametrize('wd', [0.0, 0.01])
def test_lars_takes_its_ratio_per_layer(wd):
  params = vit()
  params['encoder']['blocks']['mlp']['fc1']['kernel'] *= np.array([0.0, 1.0, 10.0], np.float32).reshape(3, 1, 1)
  grads = gradients(params)
  grads[0]['head']['kernel'] *= 0

  def rule(name, w, gs):
    momentum = 0
    for g in gs:
      d = g if is_1d(name) else g + wd * w
      norms = np.linalg.norm(w), np.linalg.norm(d)
      q = 0.001 * norms[0] / norms[1] if min(norms) > 0 and not is_1d(name) else 1
      momentum = 0.9 * momentum + q * d
      w = w - 0.1 * momentum
    return w

  got, _ = run(build(params, name='lars', momentum=0.9, trust=0.001, wd=wd), params, grads)
  same(got, expect(rule, params, grads))
  # and a zero layer in the middle of a stack makes no NaN
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))


def test_pretraining_groups_of_the_official_code(goldens):
  case, _ = golden(goldens, 'mae')
  tree = vit()
  del tree['fc_norm'], tree['head'], tree['encoder']['pos_embed']
  decoder = {key: tree['encoder'][key] for key in ('blocks', 'norm')}
  tree['decoder'] = decoder | {
    'mask_token': jnp.zeros((1, 1, 4)),
    'embed': {'kernel': jnp.zeros((8, 4)), 'bias': jnp.zeros(4)},
  }
  tree['decoder']['pred'] = tree['decoder']['embed']
  mask = named(optim.decay_mask(tree))
  assert {official(name)[0] for name in case['optim_groups']['decay']} == {
    name for name, decayed in mask.items() if decayed
  }
  assert {official(name)[0] for name in case['optim_groups']['no_decay']} == {
    name for name, decayed in mask.items() if not decayed
  }
  assert mask == named(optim.decay_mask(tree, no_wd='', no_wd_1d=True))


def test_layer_decay_table_of_the_official_code(goldens):
  case, _ = golden(goldens, 'mae_vit')
  tree, decay, wd = vit(), case['config']['layer_decay'], case['config']['weight_decay']
  mult = named(optim.lr_multipliers(tree, layer_decay=decay))
  mask = named(optim.decay_mask(tree, no_wd='bias$|scale$|pos_embed|cls_token'))
  seen = set()
  for name, (expected, expected_wd) in case['layer_decay'].items():
    path, index = official(name)
    got = mult[path] if index is None else mult[path][index].item()
    np.testing.assert_allclose(got, expected, rtol=1e-6, err_msg=name)
    assert wd * mask[path] == expected_wd, name
    seen.add(path)
  assert seen == set(mult)


def test_layer_decay_scales_what_each_layer_moves():
  params = vit()
  grads = gradients(params, 1)
  plain, _ = run(build(params, name='sgd'), params, grads)
  decayed, _ = run(build(params, name='sgd', layer_decay=0.5), params, grads)
  moved = lambda new: named(jax.tree.map(np.subtract, new, params))
  one, other = moved(plain), moved(decayed)
  np.testing.assert_allclose(other['head/kernel'], one['head/kernel'], atol=1e-7)
  np.testing.assert_allclose(other['encoder/patch_embed/kernel'], one['encoder/patch_embed/kernel'] / 16, atol=1e-6)
  for i in range(DEPTH):
    name = 'encoder/blocks/attn/qkv/bias'
    np.testing.assert_allclose(other[name][i], one[name][i] / 2 ** (DEPTH - i), atol=1e-6)


def test_lr_groups_by_name():
  params = vit()
  grads = gradients(params, 1)
  groups = (('head/bias', 1.0), ('head|fc_norm', 5.0), ('patch_embed', 0.0))
  plain, _ = run(build(params, name='sgd'), params, grads)
  grouped, _ = run(build(params, name='sgd', lr_mult=groups), params, grads)
  for name, moved in named(jax.tree.map(np.subtract, plain, params)).items():
    factor = 0 if 'patch_embed' in name else 5 if name.startswith(('head/kernel', 'fc_norm')) else 1
    np.testing.assert_allclose(named(grouped)[name], named(params)[name] + factor * moved, atol=1e-6, err_msg=name)
  np.testing.assert_array_equal(grouped['encoder']['patch_embed']['kernel'], params['encoder']['patch_embed']['kernel'])


@pytest.mark.parametrize(
  'options, message',
  [
    ({'name': 'lasr'}, "optim.name 'lasr' is unknown; did you mean 'lars'"),
    ({'lr_mult': (('hed', 2.0),)}, "'hed' matches no parameter; there are .*head/kernel"),
    ({'lr_mult': (('(', 2.0),)}, 'optim.lr_mult: .* not a regular expression'),
    ({'no_wd': '*bias'}, 'optim.no_wd: .* not a regular expression'),
  ],
)
def test_options_that_cannot_be(options, message):
  with pytest.raises(ConfigError, match=message):
    build(vit(), **options)


def test_layer_decay_needs_layers():
  with pytest.raises(ConfigError, match='one stack of blocks at encoder/blocks/, found depths none'):
    build({'encoder': {'kernel': jnp.zeros((2, 2))}}, layer_decay=0.75)


def test_clip_by_global_norm():
  params = vit()
  grads = gradients(params, 1)
  norm = length(grads[0])
  got, info = run(build(params, name='sgd', clip=norm / 4), params, grads)
  same(got, jax.tree.map(lambda w, g: w - 0.1 * g / 4, params, grads[0]))
  np.testing.assert_allclose(info['norm/grad'], norm, rtol=1e-5)  # as it was before clipping
  np.testing.assert_allclose(info['norm/update'], 0.1 * norm / 4, rtol=1e-5)
  kept, _ = run(build(params, name='sgd', clip=norm * 2), params, grads)
  same(kept, jax.tree.map(lambda w, g: w - 0.1 * g, params, grads[0]))


def test_clipping_comes_before_coupled_decay():
  params, grads = {'kernel': np.full((1, 2), 2.0, np.float32)}, {'kernel': np.array([[3.0, 4.0]], np.float32)}
  got, _ = run(build(params, name='sgd', clip=1.0, wd=0.5), params, [grads])
  np.testing.assert_allclose(got['kernel'], 2 - 0.1 * (np.array([[0.6, 0.8]]) + 0.5 * 2), rtol=1e-6)


def test_sharded_updates_equal_whole_ones():
  params = vit()
  grads = gradients(params, 2)
  optimizer = build(params, name='lars', wd=0.05, clip=1.0, layer_decay=0.75)
  mesh = meshes.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
  placed = rules.shardings(mesh, params, whole_below=0)
  assert sum(not sharding.is_fully_replicated for sharding in jax.tree.leaves(placed)) > 10
  whole, info = run(optimizer, params, grads)
  got, sharded_info = run(optimizer, jax.device_put(params, placed), jax.device_put(grads, [placed] * 2))
  same(got, whole, tolerance=1e-6)
  for key, value in info.items():
    np.testing.assert_allclose(sharded_info[key], value, rtol=1e-5)


def test_info():
  params = vit()
  got, info = run(build(params, name='adamw'), params, gradients(params, 1))
  assert set(info) == {'lr', 'norm/grad', 'norm/update', 'norm/param'}
  assert all(value.shape == () and value.dtype == jnp.float32 for value in info.values())
  np.testing.assert_allclose(info['norm/param'], length(got), rtol=1e-5)


def test_first_moment_in_bfloat16():
  params = vit()
  grads = gradients(params)
  optimizer = build(params, name='adamw', mu_dtype='bfloat16')
  opt = jax.eval_shape(optimizer.init, params)
  assert {leaf.dtype for leaf in jax.tree.leaves(opt['mu'])} == {jnp.bfloat16.dtype}
  assert {leaf.dtype for leaf in jax.tree.leaves(opt['nu'])} == {jnp.float32.dtype}
  got, _ = run(optimizer, params, grads)
  exact, _ = run(build(params, name='adamw'), params, grads)
  same(got, exact, tolerance=0.02)
  assert any((a != b).any() for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True))


def test_the_state_is_a_dict_of_trees_like_params():
  params = vit()
  for name, keys in {'adamw': {'count', 'mu', 'nu'}, 'lars': {'trace'}, 'lion': {'count', 'mu'}}.items():
    for clip in (0.0, 1.0):
      opt = jax.eval_shape(build(params, name=name, clip=clip).init, params)
      assert type(opt) is dict
      assert set(opt) == keys
      assert all(jax.tree.structure(opt[key]) == jax.tree.structure(params) for key in keys - {'count'})


def test_the_rate_follows_the_step_and_not_the_count_of_updates():
  params = {'kernel': jnp.ones((2, 2))}
  optimizer = build(params, {'name': 'linear'}, total=10)
  opt = optimizer.init(params)
  _, opt, info = optimizer.update(params, opt, params, jnp.int32(6))
  np.testing.assert_allclose(info['lr'], 0.1 * 0.4, rtol=1e-6)
  assert opt['count'] == 1


def test_only_keys_with_an_effect_are_read():
  base = config.base()
  base.optim.name = 'lars'
  cfg = config.Recorded(base)
  optim.make(cfg.optim, cfg.schedule, 256, 10_000, 100, vit())
  read = {key.removeprefix('optim.') for key in cfg.reads}
  assert {'name', 'base_lr', 'lr_batch', 'momentum', 'trust', 'wd', 'no_wd', 'lr_mult', 'layer_decay', 'clip'} <= read
  assert not {'b1', 'b2', 'eps', 'nesterov'} & read


def rates(total, steps_per_epoch=None, peak=1.0, **cfg):
  schedule = jax.jit(optim.make_schedule(cfg, peak, total, steps_per_epoch))
  return np.asarray(schedule(np.arange(total + 1)))


def test_cosine_is_the_official_schedule(goldens):
  case, tensors = golden(goldens, 'mae')
  train = case['config']['train']
  total = train['epochs'] * train['steps_per_epoch']
  warmup = f'{train["warmup_epochs"]} epochs'
  got = rates(total, train['steps_per_epoch'], train['lr'], name='cosine', warmup=warmup, min_lr=train['min_lr'])
  np.testing.assert_allclose(got[: train['steps']], tensors['out/train_lr'], atol=1e-9)


def test_cosine_with_warmup():
  got = rates(400, 10, peak=2.4e-3, name='cosine', warmup='5 epochs', min_lr=1e-6)
  epoch = np.arange(401) / 10
  fall = 1e-6 + (2.4e-3 - 1e-6) * 0.5 * (1 + np.cos(np.pi * (epoch - 5) / 35))
  np.testing.assert_allclose(got, np.where(epoch < 5, 2.4e-3 * epoch / 5, fall), atol=1e-9)
  assert got[0] == 0
  np.testing.assert_allclose(got[-1], 1e-6, rtol=1e-3)


def test_linear_and_constant():
  # HuggingFace's get_linear_schedule_with_warmup
  got = rates(100, name='linear', warmup='10%')
  step = np.arange(101)
  np.testing.assert_allclose(got, np.minimum(step / 10, (100 - step) / 90), atol=1e-6)
  np.testing.assert_allclose(rates(100, name='constant', warmup=10), np.minimum(step / 10, 1), atol=1e-6)
  np.testing.assert_array_equal(rates(5, name='constant'), 1)
  np.testing.assert_allclose(
    rates(20, name='constant', warmup=10, start_lr=0.5)[:11], 0.5 + 0.05 * step[:11], atol=1e-6
  )


def test_a_rate_per_epoch_with_the_peak_at_the_end_of_the_warmup():
  # pl_bolts' LinearWarmupCosineAnnealingLR(warmup_epochs=10, max_epochs=50): epochs 9 and 10 have the peak
  got = rates(50 * 49, 49, name='cosine', warmup='10 epochs', per_epoch=True, warmup_to_peak=True)
  epoch = np.arange(50 * 49 + 1) // 49
  fall = 0.5 * (1 + np.cos(np.pi * (epoch - 10) / 40))
  np.testing.assert_allclose(got, np.where(epoch < 10, epoch / 9, fall), atol=1e-6)


def test_epochs_of_fractional_length():
  got = rates(100, 12.5, name='linear', per_epoch=True)
  assert len(set(got[:100].tolist())) == 8
  assert [step for step in range(1, 100) if got[step] != got[step - 1]] == [12, 25, 37, 50, 62, 75, 87]


def test_steps_stay_exact_far_into_a_run():
  schedule = optim.make_schedule({'name': 'linear', 'per_epoch': True}, 1.0, 4_000_000, 4000)
  steps = np.array([3_999_999, 3_996_000, 3_995_999, 2_000_000, 1_999_999])
  np.testing.assert_allclose(schedule(steps), 1 - (steps // 4000) / 1000, atol=1e-6)


def test_the_rate_is_scaled_by_the_batch():
  assert optim.peak_lr(1.5e-4, 256, 4096) == pytest.approx(2.4e-3)
  assert optim.peak_lr(1e-4, 0, 4096) == 1e-4


@pytest.mark.parametrize(
  'cfg, message',
  [
    ({'name': 'cosinus'}, "schedule.name 'cosinus' is unknown; did you mean 'cosine'"),
    ({'name': 'cosine', 'warmup': 101}, '101 steps, but the whole run has 100'),
    ({'name': 'cosine', 'warmup': '1 epochs'}, 'schedule.warmup is .* length of the data set is not known'),
    ({'name': 'cosine', 'per_epoch': True}, 'schedule.per_epoch'),
  ],
)
def test_schedules_that_cannot_be(cfg, message):
  with pytest.raises(ConfigError, match=message):
    optim.make_schedule(cfg, 1.0, 100)


def test_a_warmup_as_long_as_the_run():
  np.testing.assert_allclose(rates(10, name='cosine', warmup=10)[:10], np.arange(10) / 10, atol=1e-6)
