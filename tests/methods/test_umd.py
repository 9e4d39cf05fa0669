"""UMD: reference numbers, the properties its paper implies, initialisation, sampling, and that it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mim_jax import config, method, parity
from mim_jax.errors import CheckpointError, ConfigError
from mim_jax.evals import fewshot
from mim_jax.methods import umd
from mim_jax.official import umd as official
from mim_jax.ops import patches

TINY = dict(size='32/2/4', decoder_depth=1, patch=4, image_size=16, timesteps=100, sampling_steps=4)


def build(**options):
  cfg = method.options('umd', **TINY | options)
  return cfg, method.build(cfg)


def started(built, seed=2):
  """Params away from the start, where every block is the identity."""
  params = jax.jit(lambda key: built.init(key, built.abstract_batch(1)))(jax.random.key(seed))
  return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), params)


def batch_of(built, rows=4):
  batch = {'image': jax.random.uniform(jax.random.key(1), (rows, *built.fields['image'].shape), minval=-1)}
  if 'label' in built.fields:
    batch['label'] = jnp.arange(rows, dtype=jnp.int32)
  return batch


def run(built, params, batch, draws):
  return jax.jit(built.loss)(params, {}, {}, batch, draws, 0)


@pytest.fixture(scope='module')
def tiny():
  _, built = build()
  batch = batch_of(built)
  return built, started(built), batch, built.draw(jax.random.key(3), batch)


@pytest.mark.parametrize('case', ['umd', 'umd_labels'])
def test_reference_numbers(goldens, case):
  rows = parity.run(parity.read(goldens / f'{case}.safetensors'))
  assert len(rows) > 25
  assert all(row.ok for row in rows), parity.table([row for row in rows if not row.ok])


def on_hidden(mask, value, count):
  """`value` on the hidden pixels of the first rows, 0 elsewhere: as many rows as there are in all."""
  return jnp.concatenate([mask * value, jnp.zeros((count - len(mask), *mask.shape[1:]))])


def test_hidden_patches_of_noised_images_reach_neither_the_network_nor_the_loss_of_noise(tiny):
  built, params, batch, draws = tiny
  value, aux = run(built, params, batch, draws)
  hidden = on_hidden(aux['out']['mask_noised'], 3.0, 4)
  # The noise in hidden patches is not asked for, and what the network sees does not contain it.
  other, _ = run(built, params, batch, draws | {'eps': draws['eps'] + hidden})
  np.testing.assert_allclose(other, value, rtol=1e-6)
  # What hidden patches show when clean is what is asked for there, and nothing else.
  _, changed = run(built, params, {'image': batch['image'] + hidden}, draws)
  for name in ('pred_noised', 'summary_noised'):
    np.testing.assert_array_equal(changed['out'][name], aux['out'][name])
  assert changed['metrics']['loss/noise'] == aux['metrics']['loss/noise']
  assert changed['metrics']['loss/clean_from_noised'] > aux['metrics']['loss/clean_from_noised'] + 1


def test_hidden_patches_of_clean_images_reach_the_target_alone(tiny):
  built, params, batch, draws = tiny
  _, aux = run(built, params, batch, draws)
  hidden = jnp.concatenate([jnp.zeros((2, 16, 16, 1)), aux['out']['mask_clean'] * 3.0])
  _, changed = run(built, params, {'image': batch['image'] + hidden}, draws)
  np.testing.assert_array_equal(changed['out']['pred_clean'], aux['out']['pred_clean'])
  assert changed['metrics']['loss/pixel'] > aux['metrics']['loss/pixel'] + 1
  assert changed['metrics']['loss/noise'] == aux['metrics']['loss/noise']


def test_the_two_halves_of_the_batch_are_not_the_same(tiny):
  built, params, batch, draws = tiny
  swapped = {'image': jnp.roll(batch['image'], 2, axis=0)}
  assert abs(run(built, params, batch, draws)[0] - run(built, params, swapped, draws)[0]) > 1e-4


def test_groups_split_each_part_of_the_batch_for_itself(tiny):
  built, params, _, _ = tiny
  batch = batch_of(built, 8)
  draws = built.draw(jax.random.key(3), batch)
  order = jnp.array([0, 1, 4, 5, 2, 3, 6, 7])  # noised rows of both groups, then their clean ones
  take = lambda tree: jax.tree.map(lambda x: x[order], tree)
  grouped = run(build(groups=2)[1], params, batch, draws)[0]
  np.testing.assert_allclose(grouped, run(built, params, take(batch), take(draws))[0], rtol=1e-6)
  with pytest.raises(ConfigError, match='groups=3'):
    build(groups=3)[1].loss(params, {}, {}, batch, draws, 0)


def test_a_mae_never_trains_the_head_of_noise():
  _, built = build(clean=1.0, adaln=False)
  params, batch = started(built), batch_of(built)
  (_, aux), grads = jax.jit(jax.value_and_grad(built.loss, has_aux=True))(
    params, {}, {}, batch, built.draw(jax.random.key(3), batch), 0
  )
  assert list(aux['metrics']) == ['loss/pixel']
  kernel = np.asarray(grads['decoder']['kernel']).reshape(32, 4, 4, 6)
  assert not np.any(kernel[..., 3:]) and not np.any(grads['decoder']['bias'][3:])
  assert np.any(kernel[..., :3])
  assert 'modulation' not in params['decoder']


def test_a_dit_hides_nothing_and_counts_every_patch():
  _, built = build(clean=0.0, mask_ratio=0.0)
  params, batch = started(built), batch_of(built)
  draws = built.draw(jax.random.key(3), batch)
  value, aux = run(built, params, batch, draws)
  pred = aux['out']['pred_noised']
  errors = [jnp.mean(jnp.square(pred[..., 3:] - draws['eps'])), jnp.mean(jnp.square(pred[..., :3] - batch['image']))]
  np.testing.assert_allclose(value, sum(errors) / 2, rtol=1e-5)


def test_at_the_start_blocks_are_the_identity_and_the_summary_is_blind():
  _, built = build()
  params = built.init(jax.random.key(2), built.abstract_batch(1))
  batch = batch_of(built)
  summary = jax.jit(built.encode)(params, batch)['cls']
  np.testing.assert_array_equal(summary, jnp.broadcast_to(summary[:1], summary.shape))


def test_time_of_clean_images_is_no_step_of_diffusion(tiny):
  """Step s is told as s + 1; 0 is for images without noise."""
  _, params, batch, _ = tiny
  net = umd.network(build()[0])
  at = lambda t: jax.jit(net)(params, batch['image'], jnp.full(4, t))[0]
  np.testing.assert_allclose(net.guided(params, batch['image'], jnp.zeros(4, jnp.int32)), at(1), atol=1e-5)
  assert np.abs(at(0) - at(1)).max() > 1e-4


def test_labels_condition_and_guidance_moves_away_from_none():
  cfg, built = build(classes=5, clean=0.0, mask_ratio=0.0)
  net, params, batch = umd.network(cfg), started(built), batch_of(built)
  s = jnp.array([3, 10, 40, 90])
  told, untold, none, guided = jax.jit(
    lambda p, x: (
      net.guided(p, x, s, batch['label']),
      net.guided(p, x, s, jnp.full(4, 5)),
      net(p, x, s + 1)[0],
      net.guided(p, x, s, batch['label'], 3.0),
    )
  )(params, batch['image'])
  np.testing.assert_allclose(untold, none, atol=1e-6)
  np.testing.assert_allclose(guided, untold + 3 * (told - untold), atol=1e-4)
  assert np.abs(told - untold).max() > 1e-3
  draws = built.draw(jax.random.key(3), batch)
  drop = lambda flag: run(built, params, batch, draws | {'drop_label': jnp.full(4, flag)})[0]
  null = run(built, params, batch | {'label': jnp.full(4, 5)}, draws | {'drop_label': jnp.zeros(4, bool)})[0]
  assert drop(True) == null != drop(False)


def test_samples_follow_from_key_and_label():
  _, built = build(classes=5, clean=0.0, guidance=2.0)
  params, cond = started(built), {'label': jnp.array([0, 4])}
  generate = jax.jit(built.generate)
  sample = generate(params, {}, {}, jax.random.key(0), cond)
  assert sample.shape == (2, 16, 16, 3) and np.abs(sample).max() <= 1
  np.testing.assert_array_equal(sample, generate(params, {}, {}, jax.random.key(0), cond))
  assert np.any(sample != generate(params, {}, {}, jax.random.key(1), cond))
  other = generate(params, {}, {}, jax.random.key(0), {'label': jnp.array([1, 4])})
  assert np.any(sample[0] != other[0])
  np.testing.assert_allclose(sample[1], other[1], atol=1e-5)


def test_probes_may_look_at_noised_images(tiny):
  built, params, batch, _ = tiny
  _, noised = build(probe_step=50)
  clean, seen = (jax.jit(b.encode)(params, batch) for b in (built, noised))
  assert clean['tokens'].shape == (4, 16, 32) and clean['cls'].shape == (4, 32)
  assert np.abs(clean['cls'] - seen['cls']).max() > 1e-3
  alone = jax.jit(noised.encode)(params, {'image': batch['image'][2:3]})
  np.testing.assert_allclose(seen['cls'][2:3], alone['cls'], atol=1e-5)  # the noise belongs to no example


@pytest.mark.parametrize('options', [{}, {'adaln': False}, {'classes': 3}])
def test_every_parameter_learns_and_forms_of_the_loop_agree(options):
  _, built = build(**options)
  params, batch = started(built), batch_of(built)
  draws = built.draw(jax.random.key(3), batch)
  value, grads = jax.jit(jax.value_and_grad(lambda p: built.loss(p, {}, {}, batch, draws, 0)[0]))(params)
  still = [jax.tree_util.keystr(path) for path, g in jax.tree_util.tree_leaves_with_path(grads) if not np.any(g)]
  assert not still
  for other in ({'scan': False}, {'remat': 'full'}):
    np.testing.assert_allclose(run(build(**options, **other)[1], params, batch, draws)[0], value, rtol=1e-5)
  half = run(build(**options, dtype='bfloat16')[1], params, batch, draws)[0]
  assert half.dtype == jnp.float32
  np.testing.assert_allclose(half, value, rtol=0.03)


def test_initialisation_is_that_of_the_official_code():
  _, built = build(size='256/2/4', image_size=32, classes=50)
  params = jax.jit(lambda key: built.init(key, built.abstract_batch(1)))(jax.random.key(0))
  block = params['encoder']['stack']['blocks']
  spreads = {
    'pos': (params['encoder']['pos_embed'], 1 / 8),  # of the number of patches, 64, and not of the width
    'mask': (params['decoder']['mask_token'], 0.02),
    'head': (params['decoder']['kernel'], 0.02),
    'patch': (params['encoder']['patch_embed']['kernel'], 48**-0.5),
    'query': (block['attn']['query']['kernel'], (2 / 512) ** 0.5),
    'fc1': (block['mlp']['fc1']['kernel'], (2 / (256 + 1024)) ** 0.5),
    'time': (params['condition']['time']['fc1']['kernel'], 256**-0.5),
    'labels': (params['condition']['labels']['embedding'], 256**-0.5),
    'cls': (params['encoder']['cls_tokens'], 0.0),
    'adaln': (block['modulation']['kernel'], 0.0),
    'last': (params['decoder']['modulation']['kernel'], 0.0),
  }
  for name, (value, std) in spreads.items():
    # The lecun normals of Flax are cut at two deviations and scaled up again, so the spread is nearly that asked for.
    assert abs(np.std(value) - std) <= 0.03 * std + 4 * std / np.sqrt(value.size), name


@pytest.mark.parametrize('form', [official.SCANNED, official.NUMBERED])
@pytest.mark.parametrize('options', [{'classes': 4}, {'adaln': False}])
def test_official_names_go_both_ways(form, options):
  cfg, built = build(**options)
  shapes = jax.eval_shape(lambda key: built.init(key, built.abstract_batch(1)), jax.random.key(0))
  params = jax.tree.map(lambda x: np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32), shapes)
  weights = official.names.export(params, official.pretraining(cfg, form))
  assert weights['final_conv/kernel'].shape == (4, 4, 32, 6)
  assert f'Encoder/{form.replace("{i}", "0")}/MlpBlock_0/Dense_1/kernel' in weights
  back, unknown = official.load(weights, cfg)
  assert not unknown
  jax.tree.map(np.testing.assert_array_equal, params, back)


def test_weights_of_something_else_are_told():
  with pytest.raises(CheckpointError, match='no blocks of UMD'):
    official.form_of({'cls': 0})


def test_the_head_is_a_transposed_convolution():
  """Flax lays the kernel of `ConvTranspose` down turned by 180 degrees; the name table undoes that."""
  import flax.linen as nn

  cfg, _ = build()
  conv = nn.ConvTranspose(6, (4, 4), (4, 4), padding='VALID')
  x = jax.random.normal(jax.random.key(0), (1, 4, 4, 32))
  theirs = conv.init(jax.random.key(1), x)['params']
  entry = next(e for e in official.pretraining(cfg) if e.theirs == 'final_conv/kernel')
  tokens = x.reshape(1, 16, 32) @ entry.form.load(np.asarray(theirs['kernel']))
  np.testing.assert_allclose(patches.unpatchify(tokens, (4, 4), (4, 4)), conv.apply({'params': theirs}, x), atol=1e-5)


def test_panels_show_both_halves(tiny):
  built, params, batch, draws = tiny
  titles = []

  def draw(params):
    shown = built.panels(params, {}, {}, batch, draws)
    titles.extend(shown)
    return shown

  shown = jax.jit(draw)(params)
  assert titles == ['input', 'masked', 'prediction', 'noised', 'by both heads']
  kept = patches.patchify(shown['prediction'] == batch['image'], (4, 4)).all(-1)
  assert set(np.asarray(kept.sum(1))) == {4}


@pytest.mark.parametrize('argument', ['', 'kind=mae', 'kind=dit', 'kind=maskdit', 'space=latent', 'labels', 'debug'])
def test_every_recipe_has_a_step_of_the_right_shapes(root, argument):
  cfg = config.load([f'--config={root}/configs/umd.py:{argument}'])
  built = method.build(cfg.method)
  batch = built.abstract_batch(4)

  def step(key):
    made = {name: jnp.zeros(spec.shape, spec.dtype) for name, spec in batch.items()}
    params, frozen = built.init(key, made), built.frozen(key, made)
    return built.loss(params, built.state(params), frozen, made, built.draw(key, made), 0)[0]

  value = jax.eval_shape(step, jax.random.key(0))
  assert value.shape == () and value.dtype == jnp.float32


@pytest.mark.parametrize(
  'options, told', [({'clean': 1.5}, 'share of the batch'), ({'sampling_steps': 500}, '1 to 100')]
)
def test_options_that_do_not_fit_are_told(options, told):
  with pytest.raises(ConfigError, match=told):
    build(**options)


FIGURES, STEPS = 6, 600


def figures(key, count):
  """Images [count, 32, 32, 3] in [-1, 1] of one turned figure on a ground, and its kind [count].

  Kinds: disc, ring, square, frame, cross, triangle. Colour, size and place tell nothing of the kind.
  """
  keys = jax.random.split(key, 6)
  kind = jax.random.randint(keys[0], (count,), 0, FIGURES)
  centre = jax.random.uniform(keys[1], (2, count, 1, 1), minval=11, maxval=21)
  size = jax.random.uniform(keys[2], (count, 1, 1), minval=6, maxval=10)
  angle = jax.random.uniform(keys[3], (count, 1, 1), maxval=2 * jnp.pi)
  axis = jnp.arange(32) + 0.5
  y, x = (axis[None, :, None] - centre[0]) / size, (axis[None, None, :] - centre[1]) / size
  y, x = jnp.cos(angle) * y - jnp.sin(angle) * x, jnp.sin(angle) * y + jnp.cos(angle) * x
  radius, square = jnp.hypot(x, y), jnp.maximum(jnp.abs(x), jnp.abs(y))
  thin = jnp.minimum(jnp.abs(x), jnp.abs(y))
  triangle = jnp.maximum(-y, jnp.maximum(y / 2 + 0.866 * x, y / 2 - 0.866 * x)) * 1.6
  outside = jnp.stack(
    [
      radius - 1,
      jnp.maximum(radius - 1, 0.55 - radius),
      square - 0.85,
      jnp.maximum(square - 0.85, 0.5 - square),
      jnp.maximum(square - 1, thin - 0.3),
      triangle - 1,
    ]
  )
  inside = jax.nn.sigmoid(-8 * jnp.take_along_axis(outside, kind[None, :, None, None], axis=0)[0])[..., None]
  ground = jax.random.uniform(keys[4], (count, 1, 1, 3), minval=-1)
  colour = ground + jnp.where(ground > 0, -1, 1) * jax.random.uniform(keys[5], (count, 1, 1, 3), minval=0.4, maxval=1)
  return ground + inside * (colour - ground), kind


@pytest.mark.slow
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_learns_to_tell_figures_apart_and_to_denoise(seed, record):
  """Ridge probe, 100 examples a class, against the untrained network; error of noise against predicting none (1).

  At the start adaLN-Zero makes every block the identity, so the probe is also held against random gates, whose summary
  sees the image. That is the harder baseline, for which the margin is smaller.
  """
  cfg, built = build(size='96/4/4', decoder_depth=1, image_size=32, timesteps=1000)
  params = jax.jit(lambda key: built.init(key, built.abstract_batch(1)))(jax.random.key(seed))
  schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 60, STEPS)
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.05))

  @jax.jit
  def train(params):
    def step(carry, i):
      params, opt = carry
      keys = jax.random.split(jax.random.fold_in(jax.random.key(100 + seed), i))
      batch = {'image': figures(keys[0], 64)[0]}
      grads = jax.grad(lambda p: built.loss(p, {}, {}, batch, built.draw(keys[1], batch), i)[0])(params)
      updates, opt = tx.update(grads, opt, params)
      return (optax.apply_updates(params, updates), opt), None

    return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(STEPS))[0][0]

  trained = train(params)
  image, kind = figures(jax.random.key(999), 4000)
  image, kind = np.asarray(image), np.asarray(kind)
  encode = jax.jit(built.encode)

  def accuracy(params):
    seen = encode(params, {'image': image})
    features = np.concatenate([seen['cls'], seen['tokens'].mean(1)], axis=1)
    shots = fewshot.choose(kind[:1000], FIGURES, 100, 0)
    scores = fewshot.ridge(features[shots], kind[shots], FIGURES, 1.0)(features[1000:])
    return float(np.mean(scores.argmax(1) == kind[1000:]))

  batch = {'image': jnp.asarray(image[:256])}
  draws = built.draw(jax.random.key(998), batch) | {'t': jnp.full(256, 500)}
  noise = float(run(built, trained, batch, draws)[1]['metrics']['loss/noise'])
  random = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), params)
  figures_of = {'trained': accuracy(trained), 'untrained': accuracy(params), 'random gates': accuracy(random)}
  record(**figures_of, noise=noise)
  assert figures_of['trained'] > figures_of['untrained'] + 0.1
  assert figures_of['trained'] > figures_of['random gates'] + 0.02
  assert noise < 0.5
