"""M3AE: reference numbers, properties that its paper implies, initialisation, official weights, and that it learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mim_jax import method, parity, step
from mim_jax.checkpoint import files
from mim_jax.errors import CheckpointError, ConfigError
from mim_jax.methods import m3ae
from mim_jax.official import m3ae as official
from mim_jax.ops import losses, masking, patches, targets

TINY = dict(
  size='32/1/2',
  patch=8,
  image_size=32,
  text={'kind': 'bert', 'size': '24/1/2', 'vocab': 30, 'positions': 10, 'mlp_ratio': 2.0},
  length=8,
  fusion='32/2/2',
  fusion_mlp_ratio=2.0,
  decoder='24/1/3',
  mim_layer=1,
  dropout=0.0,
)


def texts(key, count):
  """Random sentences of the tiny vocabulary: 1 opens, 2 closes, 0 pads, 3 masks; word 2 of each is to be named."""
  lengths = 4 + jnp.arange(count) % 5
  mask = (jnp.arange(8) < lengths[:, None]).astype(jnp.int32)
  ids = jax.random.randint(key, (count, 8), 4, 30).at[:, 0].set(1)
  ids = jnp.where(jnp.arange(8) == lengths[:, None] - 1, 2, ids) * mask
  labels = jnp.full((count, 8), -100).at[:, 2].set(ids[:, 2])
  return {'text_ids': ids, 'text_mask': mask, 'text_ids_mlm': ids.at[:, 2].set(3), 'text_labels_mlm': labels}


@pytest.fixture(scope='module')
def tiny():
  cfg = method.options('m3ae', **TINY)
  built = method.build(cfg)
  images = jax.random.normal(jax.random.key(1), (2, 4, 32, 32, 3))
  batch = {'image': images[0], 'false_image': images[1], **texts(jax.random.key(4), 4)}
  params = jax.jit(built.init)(jax.random.key(2), batch)
  draws = built.draw(jax.random.key(3), batch)
  run = jax.jit(lambda params, batch, draws: built.loss(params, {}, {}, batch, draws, 0))
  return cfg, built, params, batch, draws, run


def test_reference_numbers(goldens):
  rows = parity.run(parity.read(goldens / 'm3ae.safetensors'))
  assert len(rows) > 30
  assert all(row.ok for row in rows), parity.table([row for row in rows if not row.ok])


def test_removed_pixels_are_targets_and_visible_ones_are_not(tiny):
  _, _, params, batch, draws, run = tiny
  mim = run(params, batch, draws)[1]['out']['mim']
  tokens, hidden = patches.patchify(batch['image'], (8, 8)), mim['mask'][..., None]
  loss = lambda tokens: losses.masked_mse(mim['logits'], targets.norm_pix(tokens), mim['mask'])
  changed = jax.random.normal(jax.random.key(9), tokens.shape)
  assert loss(tokens) == loss(jnp.where(hidden == 1, tokens, changed))
  assert loss(tokens) != loss(jnp.where(hidden == 1, changed, tokens))
  other = {**batch, 'image': patches.unpatchify(jnp.where(hidden == 1, changed, tokens), (4, 4), (8, 8))}
  again = run(params, other, draws)[1]['out']['mim']
  np.testing.assert_allclose(mim['logits'], again['logits'], atol=1e-6)  # nor do they reach the network


def test_pixels_teach_the_text_encoder_but_nothing_behind_their_layer(tiny):
  _, built, params, batch, draws, _ = tiny
  grads = jax.jit(jax.grad(lambda p: built.loss(p, {}, {}, batch, draws, 0)[1]['metrics']['loss/pixel']))(params)
  still = lambda tree: not any(np.any(leaf) for leaf in jax.tree.leaves(tree))
  assert still([grads[name] for name in ('pool_text', 'pool_image', 'words', 'match')])
  assert still(jax.tree.map(lambda x: x[1:], grads['fusion']))
  assert np.any(grads['fusion']['blocks']['image']['attn_cross']['query']['kernel'][0])
  assert not np.any(grads['fusion']['blocks']['text']['mlp']['fc1']['kernel'])  # too late for it
  assert np.any(grads['text']['blocks']['attn']['query']['kernel'])


def test_words_are_named_with_the_image_and_without_padding(tiny):
  _, _, params, batch, draws, run = tiny
  value = lambda **changed: run(params, {**batch, **changed}, draws)[1]['metrics']['loss/words']
  assert value() != value(image=batch['image'][::-1])
  assert value() == value(false_image=batch['false_image'][::-1])
  ids = jnp.where(batch['text_mask'] == 0, 17, batch['text_ids_mlm'])
  assert value() == value(text_ids_mlm=ids)


def test_the_order_of_visible_tokens_does_not_matter(tiny):
  _, _, params, batch, draws, run = tiny
  logits = run(params, batch, draws)[1]['out']['mim']['logits']
  keep_ids, _, hidden = masking.keep_smallest(draws['noise'], 4)
  rank = jnp.argsort(jnp.argsort(draws['noise'], axis=1), axis=1)
  noise = jnp.where(hidden == 1, draws['noise'], 1e-3 * (3 - rank))  # the same four, in the opposite order
  np.testing.assert_array_equal(masking.keep_smallest(noise, 4)[0], keep_ids[:, ::-1])
  other = run(params, batch, {**draws, 'noise': noise})[1]['out']['mim']['logits']
  np.testing.assert_allclose(logits, other, atol=1e-5)


@pytest.mark.parametrize('count', [2, 5, 8])
def test_half_of_the_pairs_stay_true(count):
  found = {tuple(np.asarray(m3ae.matches(jax.random.permutation(jax.random.key(i), count)))) for i in range(9)}
  assert {sum(row) for row in found} == {count // 2} and len(found) > 1
  assert m3ae.matches(jnp.array([3, 0, 4, 1, 2])).tolist() == [0, 1, 0, 1, 0]


def test_matching_sees_the_image_that_its_label_says(tiny):
  _, _, params, batch, draws, run = tiny
  logits = lambda batch, match: run(params, batch, {**draws, 'match': match})[1]['out']['itm']['logits']
  match = jnp.array([1, 0, 0, 1])
  same = {**batch, 'false_image': batch['image']}
  np.testing.assert_array_equal(logits(same, match), logits(same, 1 - match))
  mixed, true, false = (logits(batch, labels) for labels in (match, jnp.ones_like(match), jnp.zeros_like(match)))
  np.testing.assert_allclose(mixed, jnp.where(match[:, None] == 1, true, false), atol=1e-6)
  assert np.any(true != false)


def test_predictions_are_in_raster_order(tiny):
  """Content that moves along an otherwise equal image moves the strongest reactions of the decoder's output with it."""
  cfg, built, params, batch, draws, _ = tiny
  nets = m3ae.modules(cfg)
  keep_ids, restore_ids, _ = masking.keep_smallest(draws['noise'][:1], 4)
  stream = jax.random.normal(jax.random.key(0), (1, 5, 32))
  pred = jax.jit(lambda z: nets.run('decoder', params, z, keep_ids, restore_ids))
  for slot in range(4):
    change = jnp.abs(pred(stream.at[0, 1 + slot].add(1.0)) - pred(stream)).sum(-1)[0]
    assert int(jnp.argmax(change)) == int(keep_ids[0, slot])
  assert pred(stream).shape == (1, 16, 8 * 8 * 3)


def test_every_parameter_learns(tiny):
  _, built, params, batch, draws, _ = tiny
  grads = jax.jit(jax.grad(lambda p: built.loss(p, {}, {}, batch, draws, 0)[0]))(params)
  leaves = jax.tree_util.tree_leaves_with_path(grads)
  assert not [jax.tree_util.keystr(path) for path, grad in leaves if not np.any(grad)]


@pytest.fixture(scope='module')
def dropped(tiny):
  """The same with dropout, and its draws."""
  _, _, params, batch, _, _ = tiny
  built = method.build(method.options('m3ae', **{**TINY, 'dropout': 0.2}))
  return built, jax.jit(lambda batch, draws: built.loss(params, {}, {}, batch, draws, 0)[0])


def test_dropout_comes_from_the_draws(tiny, dropped):
  _, _, params, batch, draws, run = tiny
  built, loss = dropped
  one, two = built.draw(jax.random.key(3), batch), built.draw(jax.random.key(4), batch)
  assert loss(batch, one) == loss(batch, one) != loss(batch, {**one, 'drop': two['drop']})
  assert loss(batch, one) != run(params, batch, draws)[0]
  assert one['drop'].shape == (4,) and 'drop' not in draws


def test_accumulated_parts_add_up_to_the_whole(tiny, dropped):
  """Although they hold unequal numbers of hidden words, and pairs that stay true in one part only; dropout included."""
  _, _, params, batch, _, _ = tiny
  built, loss = dropped
  batch = {**batch, 'text_labels_mlm': batch['text_labels_mlm'].at[0].set(-100).at[1, 3].set(7)}
  draws = {**built.draw(jax.random.key(3), batch), 'match': jnp.array([1, 0, 1, 0])}
  train = {'params': params, 'state': {}, 'step': 0}
  parts = jax.jit(lambda batch, draws: step.gradients(built, train, {}, batch, draws, accumulate=2)[0][0])
  np.testing.assert_allclose(loss(batch, draws), parts(batch, draws), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('count', [2, 8])
def test_any_number_of_devices_agrees(dropped, count):
  built, loss = dropped
  images = jax.random.normal(jax.random.key(1), (2, 8, 32, 32, 3))
  batch = {'image': images[0], 'false_image': images[1], **texts(jax.random.key(4), 8)}
  draws = built.draw(jax.random.key(3), batch)
  mesh = jax.make_mesh((count,), ('data',), devices=jax.devices()[:count], axis_types=(jax.sharding.AxisType.Auto,))
  spread = jax.device_put(batch, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data')))
  np.testing.assert_allclose(loss(batch, draws), loss(spread, draws), rtol=1e-5)


def test_encode_of_images_and_of_pairs(tiny):
  _, built, params, batch, draws, run = tiny
  out = run(params, batch, {**draws, 'match': jnp.ones(4, jnp.int32)})[1]['out']
  encode = jax.jit(built.encode, static_argnames='layers')
  alone = encode(params, {'image': batch['image']}, layers=True)
  np.testing.assert_allclose(alone['tokens'], out['mlm']['tokens'][:, 1:], atol=1e-6)
  assert alone['layers'].shape == (1, 4, 17, 32)
  pair = encode(params, {name: batch[name] for name in ('image', 'text_ids', 'text_mask')})
  np.testing.assert_allclose(pair['cls'], out['features'], atol=1e-6)
  np.testing.assert_allclose(pair['match'], out['itm']['logits'][:, 1], atol=1e-6)


@pytest.mark.parametrize('options', [{'scan': False}, {'remat': 'full'}, {'dtype': 'bfloat16'}])
def test_ways_to_compute_agree(tiny, options):
  _, _, params, batch, draws, run = tiny
  built = method.build(method.options('m3ae', **TINY, **options))
  value, aux = jax.jit(lambda: built.loss(params, {}, {}, batch, draws, 0))()
  assert value.dtype == jnp.float32
  np.testing.assert_allclose(value, run(params, batch, draws)[0], rtol=0.02 if 'dtype' in options else 1e-5)


@pytest.mark.parametrize('layer', [0, 2, -1])
def test_pixels_may_be_decoded_from_any_layer(layer):
  built = method.build(method.options('m3ae', **{**TINY, 'mim_layer': layer}))
  batch = built.abstract_batch(2)
  params = jax.eval_shape(lambda: built.init(jax.random.key(0), batch))
  draws = jax.eval_shape(lambda batch: built.draw(jax.random.key(0), batch), batch)
  assert jax.eval_shape(lambda *a: built.loss(*a, 0), params, {}, {}, batch, draws)[0].shape == ()


def test_what_does_not_fit_is_said():
  with pytest.raises(ConfigError, match='mim_layer is 3'):
    method.build(method.options('m3ae', **{**TINY, 'mim_layer': 3}))
  with pytest.raises(ConfigError, match='roberta'):
    method.build(method.options('m3ae', **{**TINY, 'text': {**TINY['text'], 'kind': 'robert'}}))


def test_start_of_the_new_parts():
  built = method.build(method.options('m3ae', **{**TINY, 'fusion': '128/2/4', 'decoder': '128/1/4'}))
  params = jax.jit(built.init)(jax.random.key(0), built.abstract_batch(1))
  std = lambda leaf: float(np.std(leaf))
  for leaf in (params['fusion']['blocks']['image']['attn_cross']['value']['kernel'], params['join']['text']['kernel']):
    assert abs(std(leaf) - 0.02) < 0.002
  assert abs(std(params['decoder']['blocks']['mlp']['fc1']['kernel']) - 0.02) < 0.001
  qkv = params['decoder']['blocks']['attn']['qkv']
  assert abs(std(qkv['kernel']) - (2 / (4 * 128)) ** 0.5) < 0.002 and not np.any(qkv['bias'])
  assert abs(std(params['words']['decoder']) - 0.02) < 0.001 and params['words']['decoder'].shape == (128, 30)


def test_official_checkpoints_load_and_export(tmp_path, goldens):
  case = parity.read(goldens / 'm3ae.safetensors')
  cfg = official.config_of(case)
  lightning = {f'state_dict.{name}': value for name, value in case.weights.items()}
  lightning |= {'optimizer_states.0.state.1.exp_avg': np.zeros(3), 'state_dict.something.else': np.zeros(2)}
  params, unknown = official.load(lightning, cfg)
  assert unknown == ['something.else']
  again = official.export(params, cfg)
  for name, value in again.items():
    np.testing.assert_array_equal(value, case.weights[name])
  assert all(official.UNUSED.match(name) for name in set(case.weights) - set(again))
  larger = cfg.copy_and_resolve_references()
  larger.image_size = 2 * case.config.image_size
  moved, _ = official.load(case.weights, larger)
  assert moved['encoder']['pos_embed'].shape[1] == 4 * (params['encoder']['pos_embed'].shape[1] - 1) + 1
  with pytest.raises(CheckpointError, match='not M3AE'):
    official.load({'a': np.zeros(2)}, cfg)


def test_both_encoders_start_from_published_weights(tmp_path, goldens):
  """CLIP's tower without its last blocks and with its positions moved; a text encoder with the names of older files."""
  case = parity.read(goldens / 'm3ae.safetensors')
  cfg = official.config_of(case)
  prefix = 'vision_encoder.'
  clip = {name.removeprefix(prefix): v for name, v in case.weights.items() if name.startswith(prefix + 'visual.')}
  last = {name: name.replace('resblocks.1.', 'resblocks.2.') for name in clip if 'resblocks.1.' in name}
  clip |= {new: clip[old] + 1 for old, new in last.items()} | {'visual.proj': np.zeros((32, 4), np.float32)}
  files.write(tmp_path / 'clip.safetensors', {name: v.astype(np.float16) for name, v in clip.items()})
  bert = {
    name.replace('language_encoder.', 'roberta.').replace('LayerNorm.weight', 'LayerNorm.gamma'): v
    for name, v in case.weights.items()
    if name.startswith('language_encoder.') and 'pooler' not in name
  } | {'roberta.embeddings.position_ids': np.arange(14), 'lm_head.bias': np.zeros(60, np.float32)}
  files.write(tmp_path / 'text.safetensors', bert)
  heads = case.config.vit_heads
  parts = official.published_parts(cfg, text=str(tmp_path / 'text.safetensors'))
  exact, _ = official.load(case.weights, cfg)
  jax.tree.map(np.testing.assert_array_equal, parts['text'], exact['text'])
  if heads * 64 == case.config.vit_width:
    pytest.fail('the case has heads of 64 now: compare the tower too')
  with pytest.raises(CheckpointError, match='heads'):  # heads of 32 cannot be told from shapes
    official.published_parts(cfg, clip=str(tmp_path / 'clip.safetensors'))


def test_the_program_writes_what_a_run_starts_from(tmp_path, goldens, root, monkeypatch, capsys):
  monkeypatch.chdir(root)
  case = parity.read(goldens / 'm3ae.safetensors')
  cfg = official.config_of(case)
  files.write(tmp_path / 'theirs.safetensors', case.weights)
  sizes = {'size': cfg.size, 'text.size': cfg.text.size, 'fusion': cfg.fusion, 'decoder': cfg.decoder}
  sizes |= {'patch': cfg.patch, 'image_size': cfg.image_size, 'mim_layer': cfg.mim_layer}
  given = ['--config=configs/m3ae.py', *(f'--config.method.{name}={value}' for name, value in sizes.items())]
  out = tmp_path / 'ours.safetensors'
  assert official.main([*given, f'--checkpoint={tmp_path}/theirs.safetensors', f'--out={out}']) == 0
  written, (params, _) = files.read(out), official.load(case.weights, cfg)
  np.testing.assert_array_equal(
    written['fusion/blocks/text/mlp/fc1/kernel'], params['fusion']['blocks']['text']['mlp']['fc1']['kernel']
  )
  assert 'not taken: nothing' in capsys.readouterr().out
  assert official.main([*given, f'--out={out}']) == 2
  assert '--checkpoint, or --clip and --text' in capsys.readouterr().err


@functools.cache
def places():
  """Vocabulary of the learning check: specials, then colours, shapes, places and the small words."""
  return {'colour': range(4, 8), 'shape': range(8, 11), 'place': range(11, 15)}


def pairs(key, count):
  """Images [count, 32, 32, 3] of a shape in a quarter, and 'colour shape in the place' with one word hidden."""
  keys = jax.random.split(key, 5)
  colour, shape, place = (
    jax.random.randint(keys[i], (count,), 0, len(words)) for i, words in enumerate(places().values())
  )
  y, x = jnp.meshgrid(jnp.arange(16) - 7.5, jnp.arange(16) - 7.5, indexing='ij')
  forms = jnp.stack([jnp.maximum(abs(y), abs(x)) < 5.5, jnp.hypot(y, x) < 6, (abs(x) < 2) | (abs(y) < 2)])
  palette = jnp.array([[1.5, -1, -1], [-1, 1.5, -1], [-1, -1, 1.5], [1.5, 1.5, -1]])
  inside = forms[shape][..., None] * palette[colour][:, None, None]
  slots = jax.nn.one_hot(place, 4).reshape(count, 2, 1, 2, 1, 1) * inside[:, None, :, None]
  turn = 2 * jnp.pi * jax.random.uniform(keys[3], (count, 1, 1))
  axis = jnp.linspace(-1, 1, 32)
  shade = jnp.cos(turn) * axis[:, None] + jnp.sin(turn) * axis  # something to predict where no shape is
  images = slots.reshape(count, 32, 32, 3) + 0.3 * shade[..., None]
  words = [first + code for first, code in zip((4, 8, 11), (colour, shape, place), strict=True)]
  one = jnp.ones_like(colour)
  ids = jnp.stack([one, words[0], words[1], 15 * one, 16 * one, words[2], 2 * one, 0 * one], axis=1)
  hidden = jnp.arange(8) == jnp.array([1, 2, 5])[jax.random.randint(keys[4], (count,), 0, 3)][:, None]
  return {
    'image': images,
    'false_image': jnp.roll(images, 1, axis=0),  # the examples are independent of each other
    'text_ids': ids,
    'text_mask': (ids > 0).astype(jnp.int32),
    'text_ids_mlm': jnp.where(hidden, 3, ids),
    'text_labels_mlm': jnp.where(hidden, ids, -100),
  }


@pytest.mark.slow
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_learns_words_pixels_and_matches_of_coloured_shapes(seed, record):
  """Hidden words above 0.8 with their image, no better than chance with another; matches above 0.8; pixels better than zeros."""
  cfg = method.options(
    'm3ae',
    **{
      **TINY,
      'size': '64/2/4',
      'text': {'kind': 'bert', 'size': '64/2/4', 'vocab': 17, 'positions': 8, 'mlp_ratio': 2.0},
      'mlp_ratio': 2.0,
      'fusion': '64/4/4',
      'decoder': '48/1/4',
      'mim_layer': 2,
      'init_std': 0.1,
    },
  )
  built = method.build(cfg)
  steps, size = 800, 32
  params = jax.jit(built.init)(jax.random.key(seed), built.abstract_batch(1))
  tx = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-3, 100, steps), b1=0.9, b2=0.98, weight_decay=0.01)

  @jax.jit
  def train_step(params, opt, i):
    keys = jax.random.split(jax.random.fold_in(jax.random.key(100 + seed), i))
    batch = pairs(keys[0], size)
    grads, _ = jax.grad(built.loss, has_aux=True)(params, {}, {}, batch, built.draw(keys[1], batch), i)
    updates, opt = tx.update(grads, opt, params)
    return optax.apply_updates(params, updates), opt

  opt = tx.init(params)
  for i in range(steps):
    params, opt = train_step(params, opt, i)
  batch = pairs(jax.random.key(999), 512)
  draws = built.draw(jax.random.key(998), batch)
  run = jax.jit(lambda batch: built.loss(params, {}, {}, batch, draws, 0)[1])
  aux, other = run(batch), run({**batch, 'image': jnp.roll(batch['image'], 7, axis=0)})
  chances = {}
  for (kind, words), slot in zip(places().items(), (1, 2, 5), strict=True):
    asked = batch['text_labels_mlm'][:, slot] >= 0
    right = lambda out: out['out']['mlm']['logits'][:, slot].argmax(-1) == batch['text_labels_mlm'][:, slot]
    true, wrong = (float(jnp.sum(right(out) & asked) / jnp.sum(asked)) for out in (aux, other))
    chances[kind] = true, wrong, 1 / len(words)
  mim = aux['out']['mim']
  zero = losses.masked_mse(jnp.zeros_like(mim['target']), mim['target'], mim['mask'])
  found = {name: float(aux['metrics'][name]) for name in ('loss/pixel', 'accuracy/match')}
  shares = {
    f'{kind}{told}': value[i] for kind, value in chances.items() for i, told in ((0, ''), (1, ', another image'))
  }
  record(**shares, **found, zeros=zero)
  for true, wrong, chance in chances.values():
    assert true > 0.8
    assert wrong < chance + 0.1
  assert found['accuracy/match'] > 0.8
  assert zero > 0.95 and found['loss/pixel'] < 0.8 * zero
