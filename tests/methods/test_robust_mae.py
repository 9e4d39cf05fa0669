"""Robust MAE: reference numbers, what its prompts can and cannot do, the phases of a run, and what they are worth."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mim_jax import method, optim, parity
from mim_jax.checkpoint import files, init_from
from mim_jax.errors import ConfigError
from mim_jax.methods import robust_mae
from mim_jax.official import names
from mim_jax.official import robust_mae as official
from mim_jax.ops import attacks, frequency

TINY = dict(size='32/2/4', patch=4, image_size=16, classes=5, clusters=3, bank=12, head_std=0.3, eps=8 / 255)


def settings(**changes):
  return method.options('robust_mae', **TINY | changes)


@pytest.fixture(scope='module', params=['fft', 'dct'])
def tiny(request):
  """(config, method, params with random prompts, state with prototypes, batch, draws, network) of either transform."""
  cfg = settings(transform=request.param)
  built = method.build(cfg)
  keys = jax.random.split(jax.random.key(0), 6)
  batch = {'image': jax.random.uniform(keys[0], (4, 16, 16, 3)), 'label': jnp.array([0, 1, 2, 3])}
  params = jax.jit(lambda key: built.init(key, None))(keys[1])
  params['prompt'] = 0.1 * jax.random.normal(keys[2], params['prompt'].shape)
  net = robust_mae.defence(cfg)
  features = jax.jit(net.classify)(params, batch['image'])[1]
  state = built.state(params) | {'prototypes': features[jnp.array([2, 0, 1])], 'filled': jnp.int32(cfg.bank)}
  return cfg, built, params, state, batch, built.draw(keys[3], batch), net


@pytest.mark.parametrize('case', ['robust_mae'])
def test_reference_numbers(goldens, case):
  rows = parity.run(parity.read(goldens / f'{case}.safetensors'))
  assert len(rows) == 44
  assert all(row.ok for row in rows), parity.table([row for row in rows if not row.ok])


def test_a_prompt_of_zeros_changes_nothing(tiny):
  cfg, built, params, state, batch, _, net = tiny
  fresh = jax.jit(lambda key: built.init(key, None))(jax.random.key(1))
  assert not np.any(fresh['prompt'])
  out = jax.jit(net.prompted)(fresh, batch['image'], jnp.zeros(4, jnp.int32))
  np.testing.assert_allclose(out, batch['image'], atol=1e-6)
  encoded = jax.jit(built.encode)(fresh, batch, state)
  np.testing.assert_allclose(encoded['logits'], encoded['undefended'], atol=1e-4)


def test_prompts_leave_the_low_band_alone(tiny):
  cfg, _, params, _, batch, _, net = tiny
  cluster = jnp.array([0, 1, 2, 0])
  grey = 0.5 + 0.1 * (batch['image'] - 0.5)  # so that nothing is clipped
  weak = params['prompt'][cluster] * 0.1
  there = frequency.fft2 if cfg.transform == 'fft' else frequency.dct2
  change = there(robust_mae.apply_prompt(grey, weak, net.mask, cfg.transform) - grey)
  outside = 1 - net.mask[..., None]
  if cfg.transform == 'fft':  # the band is not quite symmetric at the highest frequency, which has no mirror image
    outside = outside * jnp.flip(jnp.roll(outside, (-1, -1), (0, 1)), (0, 1))
  assert jnp.abs(change * outside).max() < 1e-5 and jnp.abs(change).max() > 1e-2
  assert net.mask.min() == 0 and 0.5 < net.mask.mean() < 1


def test_only_the_prompts_that_were_used_learn_and_only_in_their_band(tiny):
  _, built, params, state, batch, draws, net = tiny
  state = state | {'prototypes': state['prototypes'].at[0].set(1e3)}  # nobody is near this one
  grads = jax.jit(jax.grad(lambda p: built.loss(p, state, {}, batch, draws, 0)[0]))(params)
  assert not np.any(grads['prompt'][0]) and np.any(grads['prompt'][1]) and np.any(grads['prompt'][2])
  assert not np.any(grads['prompt'] * (1 - net.mask[..., None]))
  rest = {name: part for name, part in grads.items() if name != 'prompt'}
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(rest))


def test_selection_is_by_the_image_as_it_is_and_has_no_gradient(tiny):
  _, _, params, state, batch, _, net = tiny
  cluster = jax.jit(net.select)(params, state['prototypes'], batch['image'])
  np.testing.assert_array_equal(cluster[:3], [1, 2, 0])
  grad = jax.jit(
    jax.grad(lambda prototypes: jnp.sum(net.logits(params, prototypes, batch['image'])))
  )(state['prototypes'])  # fmt: skip
  assert not np.any(grad)
  image_grad = jax.jit(jax.grad(lambda x: jnp.sum(net.logits(params, state['prototypes'], x) ** 2)))(batch['image'])
  assert np.abs(image_grad).max() > 0  # an attack reaches the pixels through prompt and clip


def test_both_transforms_reach_the_same_images(rng):
  image, wanted = (jnp.asarray(0.25 + 0.5 * rng.random((2, 8, 8, 3)), jnp.float32) for _ in range(2))
  whole, change = np.ones((8, 8), np.float32), wanted - image
  spectrum = frequency.fft2(change)
  by_fft = robust_mae.apply_prompt(image, jnp.stack([spectrum.real, spectrum.imag], 1), whole, 'fft')
  by_dct = robust_mae.apply_prompt(image, frequency.dct2(change), whole, 'dct')
  np.testing.assert_allclose(by_fft, wanted, atol=1e-6)
  np.testing.assert_allclose(by_dct, wanted, atol=1e-6)


def test_the_inner_attack_raises_the_loss_within_eps(tiny):
  cfg, built, params, state, batch, draws, net = tiny
  _, aux = jax.jit(built.loss)(params, state, {}, batch, draws, 0)
  adversarial, metrics = aux['out']['adversarial'], aux['metrics']
  assert jnp.abs(adversarial - batch['image']).max() <= cfg.eps + 1e-6 and adversarial.min() >= 0
  assert metrics['loss/adversarial'] > metrics['loss/clean'] and metrics['phase'] == 2
  given = jax.jit(built.loss)(params, state, {}, batch, draws | {'adversarial': batch['image']}, 0)
  np.testing.assert_allclose(given[1]['metrics']['loss/adversarial'], given[1]['metrics']['loss/clean'], rtol=1e-5)


def test_phases_follow_each_other():
  cfg = settings(classifier_steps=2, bank=8)
  built = method.build(cfg)
  batch = {'image': jax.random.uniform(jax.random.key(0), (4, 16, 16, 3)), 'label': jnp.array([0, 1, 2, 3])}
  params = jax.jit(lambda key: built.init(key, None))(jax.random.key(1))
  state = built.state(params)
  step = jax.jit(jax.value_and_grad(built.loss, has_aux=True))
  after = jax.jit(built.after_step)
  phases = []
  for i in range(6):
    image = (batch['image'] + 0.1 * i) % 1
    (_, aux), grads = step(params, state, {}, batch | {'image': image}, built.draw(jax.random.key(i), batch), i)
    phases.append(int(aux['metrics']['phase']))
    moves = {name: any(np.any(leaf) for leaf in jax.tree.leaves(part)) for name, part in grads.items()}
    assert moves['encoder'] == moves['head'] == (phases[-1] == 0) and moves['prompt'] == (phases[-1] == 2)
    before, state = state, after(state, params, aux['out'], i)
    if phases[-1] != 1:
      jax.tree.map(np.testing.assert_array_equal, before, state)
  assert phases == [0, 0, 1, 1, 2, 2]
  assert int(state['filled']) == 8 and len(np.unique(np.asarray(state['prototypes']), axis=0)) == 3
  assert len(np.unique(np.asarray(state['bank']), axis=0)) == 8


def test_a_bank_that_batches_do_not_divide_is_filled(tiny):
  _, built, params, _, batch, _, _ = tiny
  state = built.state(params) | {'filled': jnp.int32(11)}
  rows = 1.0 + jnp.arange(4 * 32, dtype=jnp.float32).reshape(4, 32)
  state = jax.jit(built.after_step)(state, params, {'features': rows, 'adversarial': batch['image']}, 5)
  assert int(state['filled']) == 12
  np.testing.assert_array_equal(state['bank'][8:], rows)


def test_devices_agree(tiny):
  """A step of prompts and a step that fills the bank, on 8 devices as on one."""
  cfg, built, params, state, batch, draws, _ = tiny
  sharding = NamedSharding(jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,)), PartitionSpec('data'))
  twice = lambda x: jnp.concatenate([x, x[::-1] * 0.5 if x.dtype == jnp.float32 else x])
  draws = {'start': draws['start'], 'adversarial': jnp.clip(batch['image'] + cfg.eps * draws['start'], 0, 1)}
  batch, draws = jax.tree.map(twice, (batch, draws))  # with attacked images: signs of gradients are not exact
  filling = state | {'filled': jnp.int32(cfg.bank - 8)}

  def both(state, filling, batch, draws):
    value, aux = built.loss(params, state, {}, batch, draws, 0)
    gathered = built.loss(params, filling, {}, batch, draws, 0)[1]
    return value, aux['metrics'], built.after_step(filling, params, gathered['out'], 0)

  alone = jax.jit(both)(state, filling, batch, draws)
  spread = jax.jit(both)(state, filling, *jax.device_put((batch, draws), sharding))
  assert int(alone[2]['filled']) == cfg.bank and np.any(alone[2]['prototypes'] != state['prototypes'])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), alone, spread)


def test_the_network_is_frozen_by_the_recipe_and_comes_from_a_file(tiny, tmp_path):
  cfg, built, params, _, _, _, _ = tiny
  multipliers = optim.lr_multipliers(params, ((r'^(encoder|fc_norm|head)/', 0.0),))
  assert multipliers['prompt'] == 1 and set(jax.tree.leaves(multipliers['encoder'])) == {0.0}
  assert multipliers['head']['kernel'] == multipliers['fc_norm']['scale'] == 0
  weights = names.export(params, official.downstream(cfg))
  assert {'cls_token', 'pos_embed', 'fc_norm.weight', 'head.bias', 'blocks.1.mlp.fc2.weight'} <= set(weights)
  assert weights['prompt'].shape[-3:] == (3, 16, 16)
  again, unknown = names.load(weights, official.downstream(cfg))
  assert not unknown
  jax.tree.map(np.testing.assert_array_equal, again, jax.tree.map(np.asarray, params))
  flat = {'/'.join(k.key for k in path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
  files.write(tmp_path / 'ft.safetensors', {k: v for k, v in flat.items() if k != 'prompt'}, {})
  fresh = jax.jit(lambda key: built.init(key, None))(jax.random.key(8))
  loaded, report = init_from.load_into(fresh, tmp_path / 'ft.safetensors', allow_missing='^prompt$')
  assert list(report.missing) == ['prompt'] and not np.any(loaded['prompt'])
  np.testing.assert_array_equal(loaded['head']['kernel'], params['head']['kernel'])


def test_other_forms_of_computation_agree(tiny):
  cfg, built, params, state, batch, draws, _ = tiny
  draws = draws | {'adversarial': batch['image']}
  value = jax.jit(built.loss)(params, state, {}, batch, draws, 0)[0]
  for change, tolerance in (({'scan': False}, 1e-5), ({'dtype': 'bfloat16'}, 0.05)):
    other = method.build(settings(transform=cfg.transform, **change))
    np.testing.assert_allclose(jax.jit(other.loss)(params, state, {}, batch, draws, 0)[0], value, rtol=tolerance)


def test_panels_and_features(tiny):
  _, built, params, state, batch, draws, _ = tiny
  shown = jax.jit(built.panels)(params, state, {}, batch, draws)
  assert len(shown) == 7 and all(picture.shape == (4, 16, 16, 3) for picture in shown.values())
  encode = functools.partial(built.encode, layers=True)
  out = jax.jit(encode)(params, batch, state)
  assert out['tokens'].shape == (4, 16, 32) and out['layers'].shape == (2, 4, 17, 32) and out['logits'].shape == (4, 5)


@pytest.mark.parametrize(
  ('options', 'message'),
  [({'transform': 'fftt'}, 'did you mean'), ({'pool': 'max'}, 'pool'), ({'bank': 2}, 'clusters=3')],
)
def test_options_that_cannot_work_are_refused(options, message):
  with pytest.raises(ConfigError, match=message):
    method.build(settings(**options))


EPS = 4 / 255
STEPS = {'classifier': 300, 'clusters': 4, 'prompts': 150}


def scenes(key, count):
  """Images [count, 16, 16, 3] of four classes that two features tell.

  One is robust: a smooth pattern in smooth noise twice as strong. One is brittle: a fine pattern of 5 / 255 in white
  noise of 8 / 255, which many pixels average out, and which an attack of 4 / 255 can paint over.
  """
  unit = lambda x: x / jnp.sqrt(jnp.mean(x**2, axis=(1, 2, 3), keepdims=True))
  smooth = lambda key, n: unit(frequency.low_pass(jax.random.normal(key, (n, 16, 16, 3)), 2.0))
  fixed, keys = jax.random.split(jax.random.key(42)), jax.random.split(key, 3)
  fine = jax.random.normal(fixed[1], (4, 16, 16, 3))
  fine = unit(fine - frequency.low_pass(fine, 4.0))
  label = jax.random.randint(keys[0], (count,), 0, 4)
  image = 0.5 + 0.08 * smooth(fixed[0], 4)[label] + 0.15 * smooth(keys[1], count) + 0.02 * fine[label]
  return {'image': jnp.clip(image + 0.03 * jax.random.normal(keys[2], image.shape), 0, 1), 'label': label}


def trained(seed):
  """(network, params, prototypes) after the three phases of a run; the classifier is left alone after the first."""
  cfg = settings(
    size='32/2/4',
    mlp_ratio=2.0,
    pos='sincos',
    classes=4,
    clusters=4,
    bank=256,
    head_std=0.02,
    eps=EPS,
    classifier_steps=STEPS['classifier'],
  )
  built = method.build(cfg)
  adam = optax.scale_by_adam()
  fall = lambda i, first, count: 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip((i - first) / count, 0, 1)))

  def step(carry, i):
    params, opt, state = carry
    keys = jax.random.split(jax.random.fold_in(jax.random.key(100 + seed), i))
    batch = scenes(keys[0], 64)
    grads, aux = jax.grad(built.loss, has_aux=True)(params, state, {}, batch, built.draw(keys[1], batch), i)
    direction, opt = adam.update(grads, opt)
    first = STEPS['classifier'] + STEPS['clusters']
    network = jnp.where(i < STEPS['classifier'], 2e-3 * fall(i, 0, STEPS['classifier']), 0.0)
    rates = {name: 2e-2 * fall(i, first, STEPS['prompts']) if name == 'prompt' else network for name in params}
    new = {name: jax.tree.map(lambda p, d, r=r: p - r * d, params[name], direction[name]) for name, r in rates.items()}
    return (new, opt, built.after_step(state, new, aux['out'], i)), None

  @jax.jit
  def run():
    params = built.init(jax.random.key(seed), None)
    start = (params, adam.init(params), built.state(params))
    return jax.lax.scan(step, start, jnp.arange(sum(STEPS.values())))[0]

  params, _, state = run()
  return robust_mae.defence(cfg), params, state['prototypes']


@pytest.mark.slow
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_prompts_help_against_an_attack_that_knows_them(seed, record):
  """Accuracy under PGD-20 through selection and prompt, against that of the bare network under its own."""
  net, params, prototypes = trained(seed)
  batch = scenes(jax.random.key(999), 512)
  x, y = batch['image'], batch['label']

  @jax.jit
  def judge(params):
    bare, defended = (lambda x: net.classify(params, x)[0]), (lambda x: net.logits(params, prototypes, x))
    start = EPS * jax.random.uniform(jax.random.key(1), x.shape, minval=-1.0)
    attack = lambda f: attacks.pgd(f, x, y, start, EPS, EPS / 4, 20)
    right = lambda f, x: jnp.mean(attacks.correct(f, x, y))
    on_bare, on_defended = attack(bare), attack(defended)
    return {
      'clean, bare': right(bare, x),
      'clean, defended': right(defended, x),
      'attacked, bare': right(bare, on_bare),
      'attacked, defended': right(defended, on_defended),
      'transferred': right(defended, on_bare),
    }

  figures = {name: float(value) for name, value in judge(params).items()}
  record(**figures)
  assert figures['clean, bare'] > 0.7 and figures['clean, defended'] > figures['clean, bare'] - 0.02
  assert figures['attacked, defended'] > figures['attacked, bare']
