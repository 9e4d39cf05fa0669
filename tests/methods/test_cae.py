"""CAE: reference numbers, properties, initialisation, and that predictions live in the encoder's space."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mim_jax import config, encoder, method, parity
from mim_jax.checkpoint.manager import Manager
from mim_jax.errors import CheckpointError, ConfigError
from mim_jax.methods import cae
from mim_jax.models import dvae, posemb, teachers
from mim_jax.official import cae as official
from mim_jax.ops import masking, patches, pixels

TINY = dict(
  size='32/2/4',
  decoder='32/2/4',
  regressor_depth=2,
  patch=8,
  image_size=32,
  masked=8,
  min_block=2,
  tokenizer='ids',
  codes=11,
  drop_path=0.0,
)


def build(**options):
  cfg = method.options('cae', **TINY | options)
  return cfg, method.build(cfg)


@pytest.fixture(scope='module')
def tiny():
  cfg, built = build()
  batch = {
    'image': jax.random.normal(jax.random.key(1), (4, 32, 32, 3)),
    'token_ids': jax.random.randint(jax.random.key(5), (4, 16), 0, 11),
  }
  params = jax.jit(built.init)(jax.random.key(2), batch)
  # Away from the start, where LayerScale makes every branch small.
  params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), params)
  return cfg, built, params, batch, built.draw(jax.random.key(3), batch)


def run(built, params, batch, draws, frozen=None):
  """(loss, aux), compiled."""
  return jax.jit(built.loss)(params, {}, frozen or {}, batch, draws, 0)


def out(built, params, batch, draws):
  return run(built, params, batch, draws)[1]['out']


def test_reference_numbers(goldens):
  rows = parity.run(parity.read(goldens / 'cae.safetensors'))
  assert len(rows) == 19
  assert all(row.ok for row in rows), parity.table([row for row in rows if not row.ok])


def test_hidden_pixels_reach_the_target_alone(tiny):
  cfg, built, params, batch, draws = tiny
  tokens = patches.patchify(batch['image'], (8, 8)) + draws['mask'][..., None] * 7.0
  before = out(built, params, batch, draws)
  after = out(built, params, batch | {'image': patches.unpatchify(tokens, (4, 4), (8, 8))}, draws)
  for name in ('encoded', 'predicted', 'logits'):
    np.testing.assert_array_equal(before[name], after[name])
  assert np.abs(before['target'] - after['target']).max() > 0.1


@pytest.mark.parametrize('decoder', ['32/2/4', '24/2/4'])
def test_no_gradient_flows_through_the_target(tiny, decoder):
  cfg, built = build(decoder=decoder)
  _, _, _, batch, draws = tiny
  params = jax.jit(built.init)(jax.random.key(2), batch)
  fixed = out(built, params, batch, draws)['target']

  def alignment(p):
    return built.loss(p, {}, {}, batch, draws, 0)[1]['metrics']['loss/align']

  def against_a_constant(p):
    return 2.0 * jnp.mean(jnp.square(out(built, p, batch, draws)['predicted'] - fixed))

  def through(p):
    """The same with the gradient let through."""
    encoder, projection, _, _ = cae.modules(cfg)
    _, hidden = masking.split(draws['mask'], cfg.masked)
    target = encoder.apply({'params': p['encoder']}, batch['image'], hidden)[:, 1:]
    target = target if projection is None else projection.apply({'params': p['projection']}, target)
    return 2.0 * jnp.mean(jnp.square(out(built, p, batch, draws)['predicted'] - target))

  found, right, wrong = (jax.jit(jax.grad(f))(params) for f in (alignment, against_a_constant, through))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, right)
  for part in ('encoder', 'projection') if decoder != cfg.size else ('encoder',):
    if part in params:
      assert optax.global_norm(jax.tree.map(jnp.subtract, found[part], wrong[part])) > 0.1 * optax.global_norm(
        found[part]
      )
  assert not any(map(np.any, jax.tree.leaves(found['decoder'])))
  main = jax.jit(jax.grad(lambda p: built.loss(p, {}, {}, batch, draws, 0)[1]['metrics']['loss/token']))(params)
  assert all(map(np.any, jax.tree.leaves(main['decoder'])))


def test_order_of_visible_tokens_does_not_matter_and_positions_tell_predictions_apart(tiny):
  cfg, _, params, *_ = tiny
  *_, regressor, _ = cae.modules(cfg)
  keys = jax.random.split(jax.random.key(0), 3)
  visible, pos_visible, pos_hidden = (jax.random.normal(k, (2, n, 32)) for k, n in zip(keys, (8, 8, 5), strict=True))
  regress = jax.jit(lambda *args: regressor.apply({'params': params['regressor']}, *args))
  latent = regress(visible, pos_hidden, pos_visible)
  order = jnp.array([3, 1, 0, 2, 7, 6, 5, 4])
  np.testing.assert_allclose(latent, regress(visible[:, order], pos_hidden, pos_visible[:, order]), atol=1e-5)
  swap = jnp.array([1, 0, 2, 3, 4])
  np.testing.assert_allclose(latent[:, swap], regress(visible, pos_hidden[:, swap], pos_visible), atol=1e-5)
  assert np.abs(latent[:, 0] - latent[:, 1]).max() > 0.1


def test_keys_have_no_bias_anywhere(tiny):
  *_, params, _, _ = tiny
  paths = [
    jax.tree_util.keystr(path, simple=True, separator='/') for path, _ in jax.tree_util.tree_leaves_with_path(params)
  ]
  assert 'encoder/blocks/attn/qkv/q_bias' in paths and 'decoder/blocks/attn/qkv/v_bias' in paths
  assert not [path for path in paths if path.endswith(('k_bias', 'key/bias', 'qkv/bias'))]


def test_target_is_a_plain_pass_over_the_hidden_patches(tiny):
  cfg, built, _, batch, draws = tiny
  params = jax.jit(built.init)(jax.random.key(2), batch)
  encoder, *_ = cae.modules(cfg)
  _, hidden = masking.split(draws['mask'], cfg.masked)
  np.testing.assert_array_equal(np.sort(hidden, axis=1), hidden)
  expected = jax.jit(encoder.apply)({'params': params['encoder']}, batch['image'], hidden)[:, 1:]
  np.testing.assert_allclose(out(built, params, batch, draws)['target'], expected, atol=1e-6)


@pytest.mark.parametrize('kind', ['block', 'random'])
def test_masks_hide_exactly_what_was_asked_and_differ(kind):
  _, built = build(masking=kind)
  batch = {'image': jnp.zeros((16, 32, 32, 3))}
  mask = np.asarray(built.draw(jax.random.key(3), batch)['mask'])
  assert mask.dtype == bool and set(mask.sum(1)) == {8}
  assert len({row.tobytes() for row in mask}) > 8
  assert np.any(mask != built.draw(jax.random.key(4), batch)['mask'])


def test_every_parameter_learns(tiny):
  _, built, params, batch, draws = tiny
  grads = jax.jit(jax.grad(lambda p: built.loss(p, {}, {}, batch, draws, 0)[0]))(params)
  still = [jax.tree_util.keystr(path) for path, g in jax.tree_util.tree_leaves_with_path(grads) if not np.any(g)]
  assert not still


def test_forms_of_the_loop_and_half_precision_agree(tiny):
  _, built, params, batch, draws = tiny
  value, _ = run(built, params, batch, draws)
  for options in ({'scan': False}, {'remat': 'full'}):
    other = build(**options)[1]
    np.testing.assert_allclose(run(other, params, batch, draws)[0], value, rtol=1e-5)
  half = run(build(dtype='bfloat16')[1], params, batch, draws)[0]
  assert half.dtype == jnp.float32
  np.testing.assert_allclose(half, value, rtol=0.03)


def test_drop_path_draws_are_apart_for_each_pass(tiny):
  _, _, params, batch, _ = tiny
  _, built = build(drop_path=0.5)
  draws = built.draw(jax.random.key(3), batch)
  assert {name: x.shape for name, x in draws['drop'].items()} == dict.fromkeys(
    ('encoder', 'target', 'regressor', 'decoder'), (4, 2, 2)
  )
  assert np.any(draws['drop']['encoder'] != draws['drop']['target'])
  before = out(built, params, batch, draws)
  after = out(built, params, batch, draws | {'drop': draws['drop'] | {'target': jnp.zeros((4, 2, 2))}})
  np.testing.assert_array_equal(before['predicted'], after['predicted'])
  assert np.any(before['target'] != after['target'])


@pytest.mark.parametrize(
  'pattern, std, largest',
  [
    ('encoder/patch_embed/kernel', 0.0108, 0.02),  # a normal of 0.02 cut at one standard deviation
    ('encoder/cls_token', 0.0108, 0.02),
    ('regressor/mask_token', 0.0108, 0.02),
    ('encoder/patch_embed/bias', 0.0, 0.0),
    ('encoder/blocks/attn/qkv/kernel', (2 / (256 + 768)) ** 0.5, (6 / (256 + 768)) ** 0.5),
    ('regressor/blocks/attn/query/kernel', (2 / 512) ** 0.5, (6 / 512) ** 0.5),
    ('decoder/blocks/mlp/fc2/kernel', (2 / (1024 + 256)) ** 0.5, (6 / (1024 + 256)) ** 0.5),
    ('encoder/blocks/attn/qkv/q_bias', 0.0, 0.0),
  ],
)
def test_initialisation_has_the_mean_and_spread_of_the_official_code(wide, pattern, std, largest):
  values = wide[pattern].ravel()
  error = 4 * max(std, 1e-9) / np.sqrt(len(values))
  assert abs(values.mean()) <= error and abs(values.std() - std) <= error
  assert np.abs(values).max() <= largest * 1.0001


@pytest.fixture(scope='module')
def wide():
  _, built = build(size='256/2/4', decoder='256/2/4')
  params = jax.jit(lambda key: built.init(key, built.abstract_batch(1)))(jax.random.key(0))
  assert set(np.unique(params['encoder']['blocks']['layer_scale1']['scale'])) == {np.float32(0.1)}
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }


@pytest.mark.parametrize(
  'options', [{}, {'decoder': '24/1/3'}, {'version': 2, 'teacher': '16/1/2', 'teacher_patch': 4}]
)
def test_official_names_go_both_ways(options):
  cfg, built = build(**options)
  shapes = jax.eval_shape(lambda key: built.init(key, built.abstract_batch(1)), jax.random.key(0))
  params = jax.tree.map(lambda x: np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32), shapes)
  weights = official.names.export(params, official.pretraining(cfg))
  copies = {f'alignment_{k}': v for k, v in weights.items() if k.startswith('encoder.')}
  assert 'encoder.blocks.1.attn.q_bias' in weights and 'regresser.regressor_blocks.0.gamma_1_cross' in weights
  back, unknown = official.load({f'module.{k}': v for k, v in {**weights, **copies}.items()}, cfg)
  assert not unknown
  jax.tree.map(np.testing.assert_array_equal, params, back)


def test_tokens_from_the_dvae_are_on_the_grid_of_patches():
  cfg, built = build(tokenizer='dvae', tokenizer_width=8, codes=19)
  assert built.fields['token_image'].shape == (32, 32, 3)  # 8 pixels per code, 4 x 4 patches
  batch = {name: jax.random.uniform(jax.random.key(1), (2, *field.shape)) for name, field in built.fields.items()}
  params, frozen = jax.jit(built.init)(jax.random.key(2), batch), jax.jit(built.frozen)(jax.random.key(3), batch)
  draws = built.draw(jax.random.key(4), batch)
  ids = dvae.codes(dvae.Encoder(8, 19), frozen['tokenizer'], batch['token_image'])
  same, _ = run(build(codes=19)[1], params, {**batch, 'token_ids': ids}, draws)
  np.testing.assert_allclose(run(built, params, batch, draws, frozen)[0], same, rtol=1e-6)


def test_colours_are_tokens():
  _, built = build(tokenizer='colours', codes=27)
  image = jnp.zeros((1, 32, 32, 3)).at[:, :8, :8].set(jnp.array([0.9, 0.5, 0.1])).at[:, 8:16, :8].set(1.0)
  ids = pixels.colour_codes(image, (8, 8), 3, 'none')
  np.testing.assert_array_equal(ids[0, :5], [2 * 9 + 1 * 3 + 0, 0, 0, 0, 26])
  colours = cae.palette(method.options('cae', **TINY | {'tokenizer': 'colours', 'codes': 27, 'stats': 'none'}))
  np.testing.assert_allclose(colours[ids[0, 0]], [5 / 6, 3 / 6, 1 / 6], atol=1e-6)


def test_panels_show_the_tokens_of_hidden_patches_alone():
  _, built = build(tokenizer='colours', codes=27)
  batch = {'image': jax.random.normal(jax.random.key(1), (2, 32, 32, 3))}
  params, draws = jax.jit(built.init)(jax.random.key(2), batch), built.draw(jax.random.key(3), batch)
  titles = []

  def draw(params):
    shown = built.panels(params, {}, {}, batch, draws)
    titles.extend(shown)  # a dict that leaves a compiled function is sorted
    return shown

  shown = jax.jit(draw)(params)
  assert titles == ['input', 'masked', 'tokens', 'predicted', 'from true latents']
  for name in titles[1:]:
    changed = patches.patchify(shown[name] - batch['image'], (8, 8)).any(-1)
    np.testing.assert_array_equal(changed, draws['mask'])


def test_second_version_pulls_all_tokens_to_the_projected_teacher():
  options = dict(version=2, teacher='16/1/2', teacher_patch=4, teacher_features=12)
  cfg, built = build(**options)
  assert set(built.fields) == {'image'}
  batch = {'image': jax.random.normal(jax.random.key(1), (2, 32, 32, 3))}
  params, frozen = jax.jit(built.init)(jax.random.key(2), batch), jax.jit(built.frozen)(jax.random.key(3), batch)
  assert 'blocks' not in params['decoder'] and 'norm' not in params['regressor']
  draws = built.draw(jax.random.key(4), batch)
  (value, aux), grads = jax.jit(jax.value_and_grad(built.loss, has_aux=True))(params, {}, frozen, batch, draws, 0)
  teacher = teachers.make('clip', '16/1/2', 4, 16)
  seen = jax.jit(teacher)(frozen, batch['image'])
  student, mask = np.asarray(aux['out']['student']), np.asarray(draws['mask'])
  rows = []
  for b in range(2):
    target = [seen['cls'][b], *seen['tokens'][b][~mask[b]], *seen['tokens'][b][mask[b]]] @ np.asarray(
      frozen['projection']
    )
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    rows.append(1 - (unit(student[b]) * unit(target)).sum(-1))
  np.testing.assert_allclose(value, np.mean(rows), rtol=1e-5)
  assert all(map(np.any, jax.tree.leaves(grads)))


def test_the_encoder_of_a_run_exports_with_its_own_table_and_biases(tmp_path):
  cfg = config.base()
  cfg.method, built = build()
  (tmp_path / 'checkpoints').mkdir()
  config.save(cfg, tmp_path / 'config.json')
  shapes = jax.eval_shape(lambda key: built.init(key, built.abstract_batch(1)), jax.random.key(0))
  params = jax.tree.map(lambda x: 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), shapes)
  manager = Manager(tmp_path / 'checkpoints', asynchronous=False)
  manager.save(1, {'step': jnp.int32(1), 'params': params, 'state': {}, 'ema': {}}, {})
  manager.close()
  bundle = encoder.bundle_of_run(tmp_path)
  assert bundle.encoder['pos'] == 'sincos_rows' and bundle.encoder['qkv_bias'] == 'qv'
  image = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
  tokens = jax.jit(bundle.module.apply)({'params': bundle.params['encoder']}, image)
  np.testing.assert_allclose(tokens[:, 1:], jax.jit(built.encode)(params, {'image': image})['tokens'], atol=1e-5)


@pytest.mark.parametrize(
  'argument', ['', 'size=L,epochs=1600', 'size=L,paper', 'version=2', 'version=2,size=Ti', 'debug']
)
def test_every_recipe_has_a_step_of_the_right_shapes(root, argument):
  cfg = config.load([f'--config={root}/configs/cae.py:{argument}'])
  built = method.build(cfg.method)
  batch = built.abstract_batch(4)

  def step(key):
    made = {name: jnp.zeros(spec.shape, spec.dtype) for name, spec in batch.items()}
    params, frozen = built.init(key, made), built.frozen(key, made)
    return built.loss(params, built.state(params), frozen, made, built.draw(key, made), 0)[0]

  value = jax.eval_shape(step, jax.random.key(0))
  assert value.shape == () and value.dtype == jnp.float32


@pytest.mark.parametrize(
  'options, told',
  [
    ({'masked': 16}, 'method.masked=16 of 16'),
    ({'masking': 'blocks'}, 'block, random'),
    ({'tokenizer': 'vqgan'}, 'dvae, ids, colours'),
    ({'tokenizer': 'colours'}, '27 colours'),
    ({'version': 3}, '1, 2'),
  ],
)
def test_options_that_do_not_fit_are_told(options, told):
  with pytest.raises(ConfigError, match=told):
    build(**options)


def test_a_file_that_is_no_dvae_is_told(tmp_path):
  official.files.write(tmp_path / 'other.safetensors', {'conv.weight': np.zeros((2, 2), np.float32)})
  with pytest.raises(CheckpointError, match='not the encoder of DALL-E'):
    official.load_tokenizer(tmp_path / 'other.safetensors')


def scenes(key, count):
  """Images [count, 32, 32, 3] in [0, 1]: two discs on a ground whose colour runs from one side to the other."""
  keys = jax.random.split(key, 4)
  axis = (jnp.arange(32) + 0.5) / 32
  ends = jax.random.uniform(keys[0], (2, count, 1, 1, 3))
  image = ends[0] + (ends[1] - ends[0]) * axis[None, :, None, None] * jnp.ones((1, 1, 32, 1))
  colours = jax.random.uniform(keys[1], (2, count, 1, 1, 3))
  centres = jax.random.uniform(keys[2], (2, 2, count, 1, 1), minval=0.2, maxval=0.8)
  radii = jax.random.uniform(keys[3], (2, count, 1, 1), minval=0.15, maxval=0.35)
  for colour, centre, radius in zip(colours, centres, radii, strict=True):
    inside = (axis[None, :, None] - centre[0]) ** 2 + (axis[None, None, :] - centre[1]) ** 2 < radius**2
    image = jnp.where(inside[..., None], colour, image)
  return image


def train(seed, align_weight):
  """Accuracy from predicted latents and from the encoder's own, share of the commonest token, their distance."""
  cfg = method.options(
    'cae',
    size='64/3/4',
    decoder='64/2/4',
    regressor_depth=2,
    patch=4,
    image_size=32,
    masked=32,
    masking='random',
    tokenizer='colours',
    codes=27,
    stats='none',
    drop_path=0.0,
    align_weight=align_weight,
  )
  built = method.build(cfg)
  *_, decoder = cae.modules(cfg)
  params = built.init(jax.random.key(seed), built.abstract_batch(1))
  schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, 50, 500)
  tx = optax.chain(optax.clip_by_global_norm(3.0), optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.05))

  @jax.jit
  def run(params):
    def step(carry, i):
      params, opt = carry
      keys = jax.random.split(jax.random.fold_in(jax.random.key(100 + seed), i))
      batch = {'image': scenes(keys[0], 64)}
      grads = jax.grad(lambda p: built.loss(p, {}, {}, batch, built.draw(keys[1], batch), i)[0])(params)
      updates, opt = tx.update(grads, opt, params)
      return (optax.apply_updates(params, updates), opt), None

    return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(500))[0][0]

  params = run(params)
  batch = {'image': scenes(jax.random.key(999), 256)}
  draws = built.draw(jax.random.key(998), batch)
  aux = built.loss(params, {}, {}, batch, draws, 0)[1]
  hidden, target = aux['out']['hidden'], aux['out']['target']
  ids = jnp.take_along_axis(pixels.colour_codes(batch['image'], (4, 4), 3, 'none'), hidden, axis=1)
  places = posemb.sincos((8, 8), 64, (0, 1))
  read = jnp.argmax(decoder.apply({'params': params['decoder']}, target + places[hidden]), axis=-1)
  return {
    'predicted': float(aux['metrics']['token_accuracy']),
    'own': float(jnp.mean(read == ids)),
    'majority': float(jnp.bincount(ids.ravel(), length=27).max() / ids.size),
    'distance': float(jnp.mean(jnp.square(aux['out']['predicted'] - target))),
  }


@pytest.mark.slow
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_the_decoder_reads_the_encoders_own_latents_only_with_alignment(seed, record):
  """The paper's claim: predictions lie where the encoder's own output lies, so the decoder understands that too."""
  aligned, free = train(seed, 2.0), train(seed, 0.0)
  record(**aligned, **{f'{name}, without alignment': value for name, value in free.items()})
  assert aligned['majority'] < 0.2
  assert aligned['predicted'] > 0.5 and free['predicted'] > 0.5
  assert aligned['own'] > 0.4 > 0.2 > free['own']
  assert aligned['distance'] < free['distance'] / 4
