"""TIP: reference numbers, properties of its paper, batch statistics as state, initialisation, and that it learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mim_jax import config, method, optim, parity, step
from mim_jax.data import images
from mim_jax.errors import CheckpointError, ConfigError
from mim_jax.evals import linear, suite
from mim_jax.official import tip as official
from mim_jax.ops import contrast
from mim_jax.parallel import mesh as meshes

LENGTHS, CONTINUOUS, BATCH = (4, 3), 3, 6
TINY = dict(
  image_encoder='basic/1,1/8',
  image_size=32,
  cat_lengths=LENGTHS,
  num_con=CONTINUOUS,
  tabular='16/2/2',
  multimodal='16/1/2',
  projection=8,
)


@functools.partial(jax.jit, static_argnames='size')
def rows(key, size=BATCH):
  codes = [jax.random.randint(k, (size, 1), 0, n) for k, n in zip(jax.random.split(key, 2), LENGTHS, strict=True)]
  return jnp.concatenate([*codes, jax.random.normal(key, (size, CONTINUOUS))], axis=1).astype(jnp.float32)


def begin(built, seed):
  """Parameters, by one program: computed one operation after another they take many times as long to compile."""
  return jax.jit(lambda key: built.init(key, built.abstract_batch(2)))(jax.random.key(seed))


def case(**options):
  """Built method, params, state, batch and draws; parameters are three times their start: effects above rounding."""
  cfg = method.options('tip', **TINY, **options)
  built = method.build(cfg)

  @jax.jit
  def make(key):
    keys = jax.random.split(key, 5)
    batch = {'image': jax.random.uniform(keys[0], (BATCH, 32, 32, 3)), 'table': rows(keys[1])}
    if cfg.missing:
      batch['missing'] = jax.random.bernoulli(keys[2], 0.3, batch['table'].shape)
    params = jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x, built.init(keys[3], batch))
    return params, built.state(params), batch, built.draw(keys[4], batch)

  return built, *make(jax.random.key(5))


@pytest.fixture(scope='module')
def still():
  """By running statistics, so that examples do not touch each other in the image encoder."""
  built, *rest = case(bn_train=False)
  return built, jax.jit(lambda *args: built.loss(*args[:2], {}, *args[2:], 0)), *rest


def test_reference_numbers(goldens):
  found = parity.run(parity.read(goldens / 'tip.safetensors'))
  assert len(found) == 45
  assert all(row.ok for row in found), parity.table([row for row in found if not row.ok])


@pytest.mark.parametrize('image_encoder', ['basic/1,2/8', 'bottleneck/1,1/4', 'vit:16/1/2'])
def test_official_names_both_ways(image_encoder):
  cfg = method.options('tip', **{**TINY, 'image_encoder': image_encoder})
  built = method.build(cfg)
  params = begin(built, 0)
  state = jax.tree.map(lambda x: x + 0.5, built.state(params))
  weights = official.export(params, state, cfg)
  assert 'encoder_multimodal.transformer_blocks.0.cross_attn.kv_proj.weight' in weights
  others = {'encoder_imaging.bn1.num_batches_tracked': np.array(7), 'acc_train.tp': np.zeros(3)}
  for prefix in ('', 'state_dict.'):
    loaded = official.load({prefix + name: value for name, value in {**weights, **others}.items()}, cfg)
    jax.tree.map(np.testing.assert_array_equal, loaded, (params, state))
  with pytest.raises(CheckpointError, match='con_regressor'):
    official.load({name: value for name, value in weights.items() if 'con_regressor' not in name}, cfg)
  with pytest.raises(CheckpointError, match='cat_(embedding|classifier)'):
    official.load(weights, method.options('tip', **{**TINY, 'image_encoder': image_encoder, 'cat_lengths': (4, 4)}))


def test_values_of_masked_columns_do_not_leak(still):
  built, loss, params, state, batch, draws = still
  mask = draws['mask']
  other = {**batch, 'table': jnp.where(mask, rows(jax.random.key(9)), batch['table'])}
  before, after = (loss(params, state, b, draws)[1]['out'] for b in (batch, other))
  np.testing.assert_array_equal(before['masked_tokens'], after['masked_tokens'])
  visible = {**batch, 'table': jnp.where(mask, batch['table'], rows(jax.random.key(9)))}
  assert np.abs(before['masked_tokens'] - loss(params, state, visible, draws)[1]['out']['masked_tokens']).max() > 1e-3


def test_with_all_columns_masked_nothing_depends_on_the_table(still):
  built, loss, params, state, batch, draws = still
  every = {**draws, 'mask': jnp.ones_like(draws['mask'])}
  tokens = loss(params, state, batch, every)[1]['out']['masked_tokens']
  other = loss(params, state, {**batch, 'table': rows(jax.random.key(9))}, every)[1]['out']['masked_tokens']
  assert np.isfinite(tokens).all()
  np.testing.assert_array_equal(tokens, other)
  np.testing.assert_allclose(tokens[0], tokens[1], atol=1e-6)


def test_masks_hide_exactly_half_of_the_columns_rounded_to_even(still):
  built, _, params, state, batch, draws = still
  assert set(np.asarray(draws['mask'].sum(1))) == {2}  # of 5
  wide = method.build(method.options('tip', **{**TINY, 'num_con': 15}))
  mask = jax.jit(wide.draw)(jax.random.key(0), {'table': jnp.zeros((40, 17))})['mask']
  assert set(np.asarray(mask.sum(1))) == {8}
  assert len({row.tobytes() for row in np.asarray(mask)}) > 30


def test_corruption_takes_values_of_the_same_column(still):
  built, _, params, state, batch, draws = still
  changed = np.asarray(draws['corrupted'] != batch['table'])
  assert changed.sum(1).max() == 1 and changed.any()  # int(0.3 * 5) = 1; another row may hold the same value
  for b, j in zip(*np.nonzero(changed), strict=True):
    assert draws['corrupted'][b, j] in batch['table'][:, j]


def test_loss_does_not_depend_on_the_order_of_the_batch(still):
  built, loss, params, state, batch, draws = still
  order = jnp.array([3, 0, 5, 1, 4, 2])
  pick = lambda tree: jax.tree.map(lambda x: x[order], tree)
  moved = pick(draws) | {name: draws[name][order][:, order] for name in ('table_gumbel', 'image_gumbel')}
  np.testing.assert_allclose(
    loss(params, state, batch, draws)[0], loss(params, state, pick(batch), moved)[0], rtol=1e-5
  )


def test_negatives_come_from_the_drawn_rows_and_gradients_reach_them(still):
  built, loss, params, state, batch, draws = still
  aux = loss(params, state, batch, draws)[1]['out']
  chosen = contrast.pick(aux['weights_image_to_table'], draws['table_gumbel'])
  assert (chosen != jnp.arange(BATCH)).all()
  # Only the matching of row 0 sees the table that it got as negative, when that table is in no pair of its own.
  itm = lambda b: loss(params, state, batch, {**draws, 'corrupted': b})[1]['metrics']['loss/itm']
  grads = jax.grad(itm)(draws['corrupted'])
  assert np.abs(grads[:, len(LENGTHS) :]).max() > 0


def test_which_loss_reaches_which_parameters(still):
  built, _, params, state, batch, draws = still
  names = ('itc', 'itm', 'mtr')

  def terms(params):
    metrics = built.loss(params, state, {}, batch, draws, 0)[1]['metrics']
    return jnp.stack([metrics[f'loss/{name}'] for name in names])

  each = jax.jit(jax.jacrev(terms))(params)
  found = {name: jax.tree.map(lambda g, i=i: np.asarray(g[i]), each) for i, name in enumerate(names)}
  touched = lambda name, *path: bool(np.any(jax.tree.leaves(_at(found[name], path))[0]))
  assert touched('mtr', 'image_encoder', 'conv1')  # through the cross-attention
  assert [touched(name, 'tabular_encoder', 'mask_token') for name in names] == [False, False, True]
  assert not touched('itc', 'itm_head') and not touched('itc', 'multimodal_encoder')
  total = jax.tree.map(lambda g: np.asarray(g).sum(0), each)
  assert not [path for path, g in jax.tree_util.tree_leaves_with_path(total) if not np.any(g)]


def _at(tree, path):
  for name in path:
    tree = tree[name]
  return tree


def test_batch_statistics_are_state_that_a_step_moves():
  built, params, state, batch, draws = case()
  assert built.couples
  assert jax.tree.structure(state) == jax.tree.structure(built.after_step(state, params, {'state': state}, 0))
  loss = jax.jit(lambda s: built.loss(params, s, {}, batch, draws, 0))
  value, aux = loss(state)
  new = built.after_step(state, params, aux['out'], 0)
  mean = new['image_encoder']['bn1']['mean']
  assert np.any(mean) and np.any(new['image_encoder']['bn1']['var'] != 1)
  assert loss(new)[0] == value  # training sees the statistics of the batch alone
  encode = jax.jit(built.encode)
  seen = [encode(params, batch, s)['cls'] for s in (state, new)]
  assert np.abs(seen[0] - seen[1]).max() > 1e-3  # encoding sees the running ones
  one = encode(params, jax.tree.map(lambda x: x[:1], batch), new)['cls']
  np.testing.assert_allclose(one, seen[1][:1], atol=1e-5)
  with pytest.raises(ValueError, match='needs the state'):
    built.encode(params, batch)


def assembled(accumulate=1, mesh=None, **options):
  cfg = config.base()
  cfg.method = method.options('tip', **TINY | options)
  cfg.batch_size, cfg.accumulate, cfg.duration = 8, accumulate, '4 steps'
  cfg.optim.name, cfg.optim.no_wd = 'adam', ''
  return step.assemble(cfg, mesh or meshes.make_mesh(cfg.mesh), 100)


def test_a_batch_cannot_be_accumulated_in_parts():
  with pytest.raises(ConfigError, match='ties the examples of a batch together'):
    assembled(accumulate=2)


def test_one_and_eight_devices_agree(devices):
  batch = {
    'image': jax.random.uniform(jax.random.key(0), (8, 32, 32, 3)),
    'table': rows(jax.random.key(1), 8),
    'corrupt': jnp.zeros(8, bool),
  }
  results = []
  for shape in ((1, 1, 1), (4, 2, 1)):  # data, fsdp, tensor
    mesh = jax.make_mesh(
      shape,
      ('data', 'fsdp', 'tensor'),
      devices=devices[: np.prod(shape)],
      axis_types=(jax.sharding.AxisType.Auto,) * 3,
    )
    program = assembled(mesh=mesh, image_encoder='basic/1/4', tabular='8/1/2', multimodal='8/1/2')
    train, losses = program.init(np.uint32(3)), []
    for _ in range(2):
      placed = {name: jax.device_put(value, program.batch_sharding) for name, value in batch.items()}
      train, metrics = program.step(train, {}, placed)
      losses.append(float(metrics['loss']))
    results.append((losses, jax.device_get(train['state'])))
  np.testing.assert_allclose(results[0][0], results[1][0], rtol=2e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), results[0][1], results[1][1])


def test_cells_that_lack_are_hidden_everywhere_and_no_targets():
  built, params, state, batch, draws = case(missing=True, bn_train=False)
  loss = jax.jit(lambda b, d: built.loss(params, state, {}, b, d, 0))
  other = {**batch, 'table': jnp.where(batch['missing'], rows(jax.random.key(9)), batch['table'])}
  before, aux = loss(batch, draws)
  after, _ = loss(other, {**draws, 'corrupted': jnp.where(batch['missing'], other['table'], draws['corrupted'])})
  np.testing.assert_allclose(before, after, rtol=1e-6)
  assert not (aux['out']['target'] & batch['missing']).any()
  drawn = jax.jit(built.draw)(jax.random.key(3), batch)['corrupted']
  changed = np.asarray(drawn != batch['table'])
  for b, j in zip(*np.nonzero(changed), strict=True):
    assert drawn[b, j] in batch['table'][:, j][~batch['missing'][:, j]]
  nothing = {**batch, 'missing': jnp.ones_like(batch['missing'])}
  value, aux = loss(nothing, draws)
  assert np.isfinite(value) and aux['metrics']['loss/mtr'] == 0


@pytest.mark.parametrize(
  'options', [{'scan': False}, {'remat': 'full'}, {'remat': 'dots', 'scan': False}], ids=['unrolled', 'full', 'dots']
)
def test_scan_and_remat_change_nothing(still, options):
  _, loss, params, state, batch, draws = still
  other = method.build(method.options('tip', **TINY, bn_train=False, **options))
  value = jax.jit(lambda p: other.loss(p, state, {}, batch, draws, 0)[0])(params)
  np.testing.assert_allclose(value, loss(params, state, batch, draws)[0], rtol=1e-5)


def test_bfloat16_stays_near_float32(still):
  _, loss, params, state, batch, draws = still
  half = method.build(method.options('tip', **TINY, bn_train=False, dtype='bfloat16'))
  value = jax.jit(lambda p: half.loss(p, state, {}, batch, draws, 0)[0])(params)
  assert value.dtype == jnp.float32
  np.testing.assert_allclose(value, loss(params, state, batch, draws)[0], rtol=0.05)


@pytest.mark.parametrize(
  'options', [{'image_encoder': 'vit:16/1/2', 'patch': (8, 16)}, {'multimodal': '24/1/2'}], ids=['vit', 'widths differ']
)
def test_other_encoders(options):
  built = method.build(method.options('tip', **TINY | options))
  batch = {'image': jnp.ones((3, 32, 32, 3)), 'table': rows(jax.random.key(0), 3)}
  params = begin(built, 0)
  state, draws = built.state(params), jax.jit(built.draw)(jax.random.key(1), batch)
  assert np.isfinite(jax.jit(lambda p: built.loss(p, state, {}, batch, draws, 0)[0])(params))
  assert (state == {}) == ('image_encoder' in options)
  width = 24 if 'multimodal' in options else 16
  assert jax.eval_shape(built.encode, params, batch, state)['tokens'].shape == (3, 5, width)


def test_initialisation():
  built = method.build(method.options('tip', image_size=64, tabular='256/2/4', multimodal='256/2/4'))
  params = begin(built, 0)
  std = lambda *path: float(np.std(_at(params, path)))
  for path in (
    ('tabular_encoder', 'cat_embedding'),
    ('tabular_encoder', 'column_embedding'),
    ('tabular_encoder', 'blocks', 'attn', 'qkv', 'kernel'),
    ('multimodal_encoder', 'blocks', 'cross_attn', 'kv', 'kernel'),
    ('multimodal_encoder', 'blocks', 'mlp', 'fc2', 'kernel'),
    ('image_projection', 'image_proj', 'kernel'),
    ('predictor', 'cat_classifier', 'kernel'),
  ):
    assert std(*path) == pytest.approx(0.02, rel=0.05), path
  assert not np.any(params['multimodal_encoder']['blocks']['mlp']['fc1']['bias'])
  assert std('image_projector', 'fc1', 'kernel') == pytest.approx((3 * 2048) ** -0.5, rel=0.02)
  assert 0 < np.abs(params['image_projector']['fc2']['bias']).max() <= 2048**-0.5
  assert std('image_encoder', 'layer2_1', 'conv2', 'kernel') == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)
  assert (params['image_encoder']['layer4_2']['bn3']['scale'] == 1).all()
  blocks = params['tabular_encoder']['blocks']['attn']['proj']['kernel']
  assert np.abs(blocks[0] - blocks[1]).max() > 0.02


@pytest.mark.parametrize(
  'options', [{'cat_lengths': ()}, {'num_con': 0}, {'cat_lengths': (1, 3)}, {'image_encoder': 'x'}]
)
def test_options_that_cannot_work_are_refused(options):
  with pytest.raises(ConfigError):
    method.build(method.options('tip', **{**TINY, **options}))


def test_panels_show_the_table(still):
  built, _, params, state, batch, draws = still
  shown = jax.jit(lambda p: built.panels(p, state, {}, batch, draws))(params)
  assert set(shown) == {'image', 'table', 'masked', 'predicted', 'found by table'}
  assert all(value.shape == (BATCH, 32, 32, 3) for value in shown.values())
  grey = np.isclose(shown['masked'], 0.6).all(-1).any(-1)  # lines of pixels in hidden columns
  assert grey.any() and not grey.all()


@pytest.mark.parametrize('arg', ['', 'data=cardiac', 'missing', 'debug'])
def test_recipes_are_complete(arg, root):
  cfg = config.load([f'--config={root}/configs/tip.py:{arg}'])
  for text in (
    cfg.data.transforms,
    cfg.data.eval_transforms,
    *(e.train_transforms for e in cfg.evals.values() if 'train_transforms' in e),
  ):
    images.parse(text)
  fields = method.build(cfg.method).fields
  assert ('missing' in fields) == (arg in ('missing', 'debug'))
  assert ('complete=True' in cfg.data.transforms) == (arg in ('', 'data=cardiac'))
  suite.build(cfg.evals, cfg.data.source, cfg.data.eval_transforms, cfg.batch_size)


@pytest.mark.parametrize('arg, rate', [('', 3e-4), ('data=cardiac', 3e-4)])
def test_rate_of_the_paper(arg, rate, root):
  """By epochs: 0, then e / 9 of the rate, which is whole in epoch 9, then half a cosine to 0."""
  cfg = config.load([f'--config={root}/configs/tip.py:{arg}'])
  at = optim.make_schedule(
    cfg.schedule, cfg.optim.base_lr, total_steps=500 * 50, steps_per_epoch=50, batch_size=cfg.batch_size
  )
  assert [float(at(step)) for step in (0, 49)] == [0, 0]
  np.testing.assert_allclose([at(50), at(9 * 50), at(10 * 50)], [rate / 9, rate, rate], rtol=1e-6)
  np.testing.assert_allclose(at(255 * 50), rate / 2, rtol=1e-3)
  assert cfg.optim.name == 'adam' and cfg.optim.no_wd == '' and cfg.optim.lr_batch == 0


# The learning check: colour and place of a square; a table of them, functions of both, and distractors.
COLOURS, PLACES, SIDE = 4, 4, 32


def squares(key, count):
  """Images [count, 32, 32, 3] and rows: colour, place, distractor; two noisy functions of both, distractor."""
  keys = jax.random.split(key, 6)
  colour, place = jax.random.randint(keys[0], (count,), 0, COLOURS), jax.random.randint(keys[1], (count,), 0, PLACES)
  top = (place // 2 * 16 + jax.random.randint(keys[2], (count,), 0, 8))[:, None, None]
  left = (place % 2 * 16 + jax.random.randint(keys[3], (count,), 0, 8))[:, None, None]
  y, x = jnp.arange(SIDE)[:, None], jnp.arange(SIDE)
  inside = ((y >= top) & (y < top + 8) & (x >= left) & (x < left + 8))[..., None]
  rgb = jnp.array([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [1.0, 1.0, 0]])[colour][:, None, None]
  noise = jax.random.normal(keys[4], (count, 4))
  image = jnp.where(inside, rgb, 0.4) + 0.05 * jax.random.normal(keys[5], (count, SIDE, SIDE, 3))
  a, b = colour.astype(jnp.float32), place.astype(jnp.float32)
  columns = [a, b, jnp.floor(jnp.abs(noise[:, 0]) * 2) % 3, (a - b) / 2 + 0.3 * noise[:, 1], (a + b - 3) / 2]
  columns[4] += 0.3 * noise[:, 2]
  return {'image': image, 'table': jnp.stack([*columns, noise[:, 3]], axis=1)}, colour * PLACES + place


@pytest.mark.slow
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_learns_the_table_from_the_image(seed, record):
  """Masked categories above majority and above other images; retrieval; probe with missing cells above untrained."""
  larger = dict(init_std=0.1, image_encoder='basic/1,1,1/8', tabular='32/2/4', multimodal='32/2/4')
  options = TINY | larger | dict(cat_lengths=(COLOURS, PLACES, 3))
  built, fixed = (method.build(method.options('tip', **options, bn_train=train)) for train in (True, False))
  start = begin(built, seed)
  tx = optax.adam(optax.warmup_cosine_decay_schedule(0.0, 2e-3, 30, 600))

  @jax.jit
  def train(carry, i):
    params, state, opt = carry
    keys = jax.random.split(jax.random.fold_in(jax.random.key(100 + seed), i))
    batch, _ = squares(keys[0], 64)
    loss = lambda p: built.loss(p, state, {}, batch, built.draw(keys[1], batch), i)
    grads, aux = jax.grad(loss, has_aux=True)(params)
    updates, opt = tx.update(grads, opt, params)
    params = optax.apply_updates(params, updates)
    return (params, built.after_step(state, params, aux['out'], i), opt), None

  (params, state, _), _ = jax.lax.scan(train, (start, built.state(start), tx.init(start)), jnp.arange(600))
  batch, _ = squares(jax.random.key(999), 512)
  draws = jax.jit(built.draw)(jax.random.key(998), batch)
  judge = jax.jit(lambda batch, draws: fixed.loss(params, state, {}, batch, draws, 0)[1])

  def filled(image):  # share of hidden colours and places that are filled in rightly
    out = judge({**batch, 'image': image}, draws)['out']
    right = [
      (jnp.argmax(out['pred_cat'][:, j, lo : lo + 4], -1) == batch['table'][:, j]) for j, lo in ((0, 0), (1, COLOURS))
    ]
    hidden = draws['mask'][:, :2]
    return float(jnp.sum(jnp.stack(right, 1) & hidden) / jnp.sum(hidden))

  own, others = filled(batch['image']), filled(jnp.roll(batch['image'], 1, axis=0))
  retrieved = []
  for i in range(8):
    part = jax.tree.map(lambda x, i=i: x[64 * i : 64 * i + 64], batch)
    part_draws = jax.jit(built.draw)(jax.random.key(i), part) | {'corrupted': part['table']}
    retrieved.append(float(judge(part, part_draws)['metrics']['accuracy/itc']))

  def probe(params, state):
    encode = jax.jit(lambda b: built.encode(params, b, state)['cls'])
    sets = []
    for k in (7, 8):
      data, labels = squares(jax.random.key(k), 1000)
      data['missing'] = jax.random.bernoulli(jax.random.key(10 + k), 0.5, data['table'].shape)
      sets.append((np.asarray(encode(data), np.float32), np.asarray(labels)))
    settings = config.merge(linear.DEFAULTS, {'epochs': 40, 'trust': 0.03, 'train': '', 'test': ''}, 'probe')
    fitted, _ = linear.train(*sets[0], COLOURS * PLACES, settings, jax.devices()[0])
    return float(np.mean(np.argmax(linear.logits(fitted, sets[1][0]), 1) == sets[1][1]))

  fresh = built.state(start)
  trained, untrained = probe(params, state), probe(start, fresh)
  record(filled=own, other_images=others, retrieval=np.mean(retrieved), probe=trained, probe_untrained=untrained)
  assert own > 0.9 and own > others + 0.2
  assert np.mean(retrieved) > 6 / 64
  assert trained > untrained + 0.15
