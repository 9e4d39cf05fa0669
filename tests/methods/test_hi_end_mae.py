"""Hi-End-MAE: reference numbers, properties of its form, initialisation, official names, and that it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mim_jax import method, parity
from mim_jax.errors import ConfigError
from mim_jax.methods import hi_end_mae
from mim_jax.models import unetr, vit
from mim_jax.official import hi_end_mae as official
from mim_jax.official import names
from mim_jax.ops import patches

PATCH, GRID = (4, 4, 4), (2, 3, 2)
TINY = dict(size='24/4/2', decoder='24/1/4', taps=(0, 1, 2), patch=4, image_size=(8, 12, 8), mlp_ratio=2.0)
KEPT = 3


def made(**options):
  cfg = method.options('hi_end_mae', **TINY | options)
  built = method.build(cfg)
  batch = {'image': jax.random.uniform(jax.random.key(1), (3, *cfg.image_size, 1))}
  params = jax.jit(lambda: built.init(jax.random.key(2), batch))()
  return cfg, built, params, batch, built.draw(jax.random.key(3), batch)


@pytest.fixture(scope='module')
def tiny():
  """Options, method, params, batch, draws, and the loss, which keeps its gradients: one program serves all tests."""
  cfg, built, params, batch, draws = made()
  both = jax.jit(jax.value_and_grad(built.loss, has_aux=True))

  def loss(params, batch, draws):
    (value, aux), loss.grads = both(params, {}, {}, batch, draws, 0)
    return value, aux

  return cfg, built, params, batch, draws, loss


@pytest.mark.parametrize('case', ['hi_end_mae', 'hi_end_mae_seg'])
def test_reference_numbers(goldens, case):
  rows = parity.run(parity.read(goldens / f'{case}.safetensors'))
  assert len(rows) > 20
  assert all(row.ok for row in rows), parity.table([row for row in rows if not row.ok])


def test_position_tables_are_the_official_ones(goldens):
  case = parity.read(goldens / 'hi_end_mae.safetensors')
  encoder, decoder = hi_end_mae.modules(official.config_of(case))
  np.testing.assert_allclose(encoder.table[:, 1:], case.weights['encoder_pos_embed'], atol=1e-6)
  np.testing.assert_allclose(decoder.table, case.weights['decoder_pos_embed'], atol=1e-6)
  assert not encoder.table[:, 0].any()


def changed(batch, mask, change):
  """The batch with `change` done to the cubes where mask [B, N] is true."""
  cubes = patches.patchify(batch['image'], PATCH)
  return {'image': patches.unpatchify(jnp.where(mask[..., None], change(cubes), cubes), GRID, PATCH)}


def test_visible_cubes_are_no_target_and_masked_ones_no_input(tiny):
  _, _, params, batch, draws, loss = tiny
  before = loss(params, batch, draws)[1]['out']
  hidden = before['mask'] == 1
  assert hidden.sum(1).tolist() == [12 - KEPT] * 3
  after = loss(params, changed(batch, hidden, lambda x: x[:, ::-1] + 0.3), draws)[1]['out']
  np.testing.assert_array_equal(before['latent'], after['latent'])
  assert np.abs(before['target'] - after['target']).max() > 0.1
  after = loss(params, changed(batch, ~hidden, lambda x: x[:, ::-1] + 0.3), draws)[1]['out']
  np.testing.assert_array_equal(before['target'], after['target'])
  assert np.abs(before['latent'] - after['latent']).max() > 0.1


def test_contrast_and_brightness_of_a_masked_cube_do_not_matter(tiny):
  _, _, params, batch, draws, loss = tiny
  value, aux = loss(params, batch, draws)
  one = jnp.cumsum(aux['out']['mask'], axis=1) * aux['out']['mask'] == 2  # the second masked one of each volume
  other, after = loss(params, changed(batch, one, lambda x: 3 * x + 2), draws)
  assert abs(other - value) < 1e-4
  np.testing.assert_array_equal(aux['out']['latent'], after['out']['latent'])


def test_target_has_biased_variance_one(tiny):
  _, _, params, batch, draws, loss = tiny
  target = np.asarray(loss(params, batch, draws)[1]['out']['target'])
  np.testing.assert_allclose(target.mean(-1), 0, atol=1e-5)
  np.testing.assert_allclose(target.var(-1), 1, atol=1e-4)


def test_every_tap_has_its_own_way_to_the_prediction(tiny):
  cfg, built, params, batch, draws, loss = tiny
  before = loss(params, batch, draws)[1]['out']['pred']
  for block in range(3):
    kv = params['decoder']['blocks2']['cross_attn']['kv']
    cut = jax.tree.map(lambda x, block=block: x.at[block].set(0), kv)
    cross = params['decoder']['blocks2'] | {'cross_attn': params['decoder']['blocks2']['cross_attn'] | {'kv': cut}}
    after = loss(params | {'decoder': params['decoder'] | {'blocks2': cross}}, batch, draws)[1]['out']['pred']
    assert np.abs(after - before).max() > 1e-3
  other = method.build(method.options('hi_end_mae', **TINY | {'taps': (0, 1, 3)}))
  after = jax.jit(other.loss)(params, {}, {}, batch, draws, 0)[1]['out']['pred']
  assert np.abs(after - before).max() > 1e-3


def test_taps_are_outputs_of_blocks_counted_from_zero_deepest_first(tiny):
  cfg, _, params, batch, draws, _ = tiny
  encoder, decoder = hi_end_mae.modules(cfg)
  shuffle = jnp.argsort(draws['noise'], axis=1)
  encode = jax.jit(lambda params: encoder.apply({'params': params}, batch['image'], shuffle[:, :KEPT], taps=True))
  latent, seen = encode(params['encoder'])
  depth = lambda count: jax.tree.map(lambda x: x[:count], params['encoder']['blocks'])
  for tap in cfg.taps:  # the first tap + 1 blocks alone, without the norm after them
    short = encoder.clone(depth=tap + 1, final_norm=False)
    alone = short.apply({'params': params['encoder'] | {'blocks': depth(tap + 1)}}, batch['image'], shuffle[:, :KEPT])
    np.testing.assert_allclose(seen['layers'][tap], alone, atol=1e-5)
  layers = seen['layers'][jnp.asarray(cfg.taps)]
  _, inner = decoder.apply({'params': params['decoder']}, latent, layers, shuffle, taps=True)
  bridge = params['decoder']['bridge0']
  np.testing.assert_allclose(inner['context'][0], layers[0] @ bridge['kernel'] + bridge['bias'], atol=1e-5)


def test_the_last_block_of_the_decoder_reads_the_shallowest_layer(tiny):
  _, _, params, batch, draws, loss = tiny
  cross = params['decoder']['blocks2']
  for block, bridge in ((0, 'bridge2'), (1, 'bridge1'), (2, 'bridge0')):
    cut = jax.tree.map(lambda x, block=block: x.at[block].set(0), cross['cross_attn']['kv'])
    deaf = cross | {'cross_attn': cross['cross_attn'] | {'kv': cut}}
    loss(params | {'decoder': params['decoder'] | {'blocks2': deaf}}, batch, draws)
    heard = {name for name in ('bridge0', 'bridge1', 'bridge2') if np.any(loss.grads['decoder'][name]['kernel'])}
    assert heard == {'bridge0', 'bridge1', 'bridge2'} - {bridge}


def test_noise_of_one_sample_concerns_it_alone(tiny):
  _, _, params, batch, draws, loss = tiny
  noise = draws['noise'].at[1].set(draws['noise'][1, ::-1])
  before, after = loss(params, batch, draws)[1]['out'], loss(params, batch, {'noise': noise})[1]['out']
  for name in ('latent', 'pred', 'target'):
    np.testing.assert_array_equal(before[name][::2], after[name][::2])
    assert np.any(before[name][1] != after[name][1])


def test_axes_are_told_apart():
  _, built, params, batch, _ = made(image_size=(8, 8, 8))
  turned = {'image': batch['image'].swapaxes(1, 3)}
  encode = jax.jit(built.encode)
  straight, other = (encode(params, b)['tokens'] for b in (batch, turned))
  assert np.abs(straight - other.reshape(3, 2, 2, 2, -1).swapaxes(1, 3).reshape(straight.shape)).max() > 0.1


def test_every_parameter_learns(tiny):
  _, _, params, batch, draws, loss = tiny
  loss(params, batch, draws)
  leaves = jax.tree_util.tree_leaves_with_path(loss.grads)
  assert not [jax.tree_util.keystr(path) for path, gradient in leaves if not np.any(gradient)]


def test_learned_positions_leave_the_class_token_without_one():
  _, built, params, batch, _ = made(pos='learned')
  table = params['encoder']['pos_embed']
  assert table.shape == (1, 13, 24) and not np.any(table[:, 0])
  assert abs(np.std(table[:, 1:]) - 0.02) < 0.005
  encode = jax.jit(built.encode)
  cls = lambda table: encode({'encoder': params['encoder'] | {'pos_embed': table}}, batch)['cls']
  np.testing.assert_array_equal(cls(table), cls(table.at[:, 0].set(1.0)))  # nor can decay or a foreign file give it one
  assert np.any(cls(table) != cls(table.at[:, 1].set(1.0)))


@pytest.mark.parametrize(
  'options, words',
  [
    ({'taps': (1, 2, 4)}, 'from 0 to 3'),
    ({'taps': (2, 1)}, 'rising'),
    ({'taps': ()}, 'rising'),
    ({'pos': 'perceptron'}, "'sincos' or 'learned'"),
  ],
)
def test_options_that_do_not_fit(options, words):
  with pytest.raises(ConfigError, match=words):
    method.build(method.options('hi_end_mae', **TINY | options))


@pytest.mark.parametrize(
  'pattern, std',
  [
    ('encoder/patch_embed/kernel', (2 / (64 + 96)) ** 0.5),
    ('encoder/patch_embed/bias', 1 / (3 * 64) ** 0.5),
    ('encoder/blocks/attn/qkv/kernel', (2 / (96 + 288)) ** 0.5),
    ('decoder/bridge2/kernel', (2 / (96 + 48)) ** 0.5),
    ('decoder/bridge2/bias', 1 / (3 * 96) ** 0.5),
    ('decoder/blocks2/cross_attn/q/kernel', (2 / (48 + 48)) ** 0.5),
    ('decoder/blocks2/cross_attn/kv/kernel', (2 / (48 + 96)) ** 0.5),
    ('decoder/blocks2/cross_attn/proj/kernel', (2 / (48 + 48)) ** 0.5),
    ('decoder/blocks2/cross_attn/kv/bias', 0.0),
    ('decoder/mask_token', 0.02),
    ('encoder/cls_token', 0.02),
  ],
)
def test_initialisation(large, pattern, std):
  values = np.ravel(large[pattern])
  error = 4 * max(std, 1e-9) / np.sqrt(len(values))
  assert abs(values.mean()) <= error
  assert abs(values.std() - std) <= error


@pytest.fixture(scope='module')
def large():
  _, _, params, _, _ = made(size='96/3/4', decoder='48/1/4', mlp_ratio=4.0)
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(leaf) for path, leaf in leaves}


def test_forms_of_the_same_computation(tiny):
  _, _, params, batch, draws, loss = tiny
  value = loss(params, batch, draws)[0]
  for options, tolerance in (({'scan': False, 'remat': 'full'}, 1e-6), ({'dtype': 'bfloat16', 'remat': 'dots'}, 0.02)):
    built = method.build(method.options('hi_end_mae', **TINY, **options))
    other = jax.jit(built.loss)(params, {}, {}, batch, draws, 0)[0]
    assert other.dtype == jnp.float32
    np.testing.assert_allclose(other, value, rtol=tolerance)


def test_encode_gives_whole_volumes_and_layers(tiny):
  _, built, params, batch, _, _ = tiny
  found = jax.jit(lambda params: built.encode(params, batch, layers=True))(params)
  assert {name: value.shape for name, value in found.items()} == {
    'tokens': (3, 12, 24),
    'cls': (3, 24),
    'layers': (4, 3, 13, 24),
  }
  keys = jax.random.split(jax.random.key(0), 3)
  dropped = jax.jit(lambda params: built.encode(params, batch, drop=(keys, 0.9)))(params)
  assert set(dropped) == {'tokens', 'cls'} and np.any(dropped['tokens'] != found['tokens'])


def test_panels_are_slices_of_what_is_masked_and_pasted(tiny):
  _, built, params, batch, draws, loss = tiny
  titles = []

  def panels(params):
    columns = built.panels(params, {}, {}, batch, draws)
    titles.extend(columns)
    return columns

  shown = jax.jit(panels)(params)
  assert titles == ['input', 'masked', 'prediction', 'pasted']
  back = {name: jnp.moveaxis(volume, 1, 3) for name, volume in shown.items()}
  np.testing.assert_array_equal(back['input'], batch['image'])
  hidden = loss(params, batch, draws)[1]['out']['mask'] == 1
  differs = patches.patchify(back['pasted'] - batch['image'], PATCH).any(-1)
  np.testing.assert_array_equal(differs, hidden)
  np.testing.assert_array_equal(patches.patchify(back['masked'], PATCH).any(-1), ~hidden)


def test_official_names_both_ways(tiny):
  cfg, _, params, *_ = tiny
  table = official.pretraining(cfg)
  theirs = names.export(params, table)
  expected = {
    'decoder.cross_attention_blocks.2.cross_attn.kv.weight': (48, 24),
    'encoder_to_decoder.3.weight': (24, 24),
  }
  expected |= {'encoder.patch_embed.proj.weight': (24, 1, 4, 4, 4), 'decoder.head.weight': (64, 24)}
  assert {name: theirs[name].shape for name in expected} == expected
  files = {f'module.{name}': value for name, value in theirs.items()} | {'module.encoder_pos_embed': np.zeros(3)}
  back, unknown = official.load(files, cfg)
  assert not unknown
  jax.tree.map(np.testing.assert_array_equal, back, jax.device_get(params))


def test_pretrained_weights_fit_the_segmentation_network(tiny):
  cfg, built, params, batch, *_ = tiny
  encoder, _ = hi_end_mae.modules(cfg)
  model = unetr.Unetr(encoder.clone(cls=False, pos='learned', eps=1e-5), 5, taps=(0, 1, 2), features=2)
  taken = official.to_finetuning(params, cfg)
  fresh = jax.eval_shape(model.init, jax.random.key(0), batch['image'])['params']
  assert jax.tree.map(jnp.shape, taken) == jax.tree.map(lambda x: x.shape, fresh['encoder'])
  module = vit.ViT(
    **{f: getattr(model.encoder, f) for f in ('width', 'depth', 'heads', 'patch', 'grid', 'mlp_ratio', 'pos', 'cls')}
  )
  tokens = module.apply({'params': taken}, batch['image'])
  assert (
    np.corrcoef(np.ravel(tokens), np.ravel(built.encode(params, batch)['tokens']))[0, 1] > 0.9
  )  # but for the class token


def blobs(key, count):
  """Volumes [count, 16, 16, 16, 1]: sums of three Gaussian blobs of random place and width, and 1 % of noise."""
  keys = jax.random.split(key, 3)
  line = (jnp.arange(16) + 0.5) / 16
  middle = jax.random.uniform(keys[0], (count, 3, 3), minval=0.15, maxval=0.85)
  width = jax.random.uniform(keys[1], (count, 3, 1), minval=0.1, maxval=0.25)
  axis = jnp.exp(-jnp.square((line - middle[..., None]) / width[..., None]) / 2)  # [count, blob, axis, 16]
  volumes = jnp.einsum('nbx,nby,nbz->nxyz', axis[:, :, 0], axis[:, :, 1], axis[:, :, 2])
  return (volumes + 0.01 * jax.random.normal(keys[2], volumes.shape))[..., None]


@pytest.mark.slow
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_learns_sums_of_blobs(seed, record):
  """Loss on new volumes after 400 steps below 0.45; predicting zeros, the mean of every normalised cube, gives 1.0."""
  cfg = method.options('hi_end_mae', size='48/10/4', decoder='24/2/4', patch=4, image_size=16)
  built = method.build(cfg)
  params = built.init(jax.random.key(seed), built.abstract_batch(1))
  tx = optax.adamw(1e-3, b2=0.95, weight_decay=0.05)

  @jax.jit
  def step(carry, i):
    params, opt = carry
    keys = jax.random.split(jax.random.fold_in(jax.random.key(100 + seed), i))
    batch = {'image': blobs(keys[0], 16)}
    grads = jax.grad(lambda p: built.loss(p, {}, {}, batch, built.draw(keys[1], batch), i)[0])(params)
    updates, opt = tx.update(grads, opt, params)
    return (optax.apply_updates(params, updates), opt), None

  (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(400))
  batch = {'image': blobs(jax.random.key(999), 64)}
  draws = built.draw(jax.random.key(998), batch)
  end, aux = built.loss(params, {}, {}, batch, draws, 0)
  baseline = jnp.mean(jnp.square(aux['out']['target']))
  record(loss=end, zeros=baseline)
  assert 0.9 < baseline < 1.0001
  assert end < 0.45
