"""MAE: reference numbers, the properties its paper implies, initialisation, and that it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mim_jax import method, parity
from mim_jax.methods import mae
from mim_jax.ops import masking, patches, targets

TINY = dict(size='32/2/4', decoder='24/1/3', patch=8, image_size=32)


@pytest.fixture(scope='module')
def tiny():
  cfg = method.options('mae', **TINY)
  built = method.build(cfg)
  batch = {'image': jax.random.normal(jax.random.key(1), (4, 32, 32, 3))}
  params = built.init(jax.random.key(2), batch)
  draws = built.draw(jax.random.key(3), batch)
  return cfg, built, params, batch, draws


def out(built, params, batch, draws):
  return built.loss(params, {}, {}, batch, draws, 0)[1]['out']


@pytest.mark.parametrize('case', ['mae', 'mae_vit'])
def test_reference_numbers(goldens, case):
  rows = parity.run(parity.read(goldens / f'{case}.safetensors'))
  assert len(rows) > 30
  assert all(row.ok for row in rows), parity.table([row for row in rows if not row.ok])


def test_hidden_pixels_do_not_reach_the_encoder(tiny):
  cfg, built, params, batch, draws = tiny
  before = out(built, params, batch, draws)
  tokens = patches.patchify(batch['image'], (8, 8)) + before['mask'][..., None] * 7.0
  after = out(built, params, {'image': patches.unpatchify(tokens, (4, 4), (8, 8))}, draws)
  np.testing.assert_array_equal(before['latent'], after['latent'])


def test_visible_targets_do_not_count(tiny):
  from mim_jax.ops.losses import masked_mse

  _, built, params, batch, draws = tiny
  aux = out(built, params, batch, draws)
  target = patches.patchify(batch['image'], (8, 8))
  changed = target + (1 - aux['mask'])[..., None] * 3.0
  assert masked_mse(aux['pred'], target, aux['mask']) == masked_mse(aux['pred'], changed, aux['mask'])
  assert masked_mse(aux['pred'], target, aux['mask']) != masked_mse(aux['pred'], target + 3.0, aux['mask'])


def test_only_the_order_of_the_noise_matters(tiny):
  _, built, params, batch, draws = tiny
  squared = {'noise': draws['noise'] ** 2}
  assert built.loss(params, {}, {}, batch, draws, 0)[0] == built.loss(params, {}, {}, batch, squared, 0)[0]


def test_examples_are_independent_and_equivariant(tiny):
  _, built, params, batch, draws = tiny
  order = jnp.array([2, 0, 3, 1])
  straight = out(built, params, batch, draws)['pred']
  permuted = out(built, params, {'image': batch['image'][order]}, {'noise': draws['noise'][order]})['pred']
  np.testing.assert_allclose(straight[order], permuted, atol=1e-6)
  other = batch['image'].at[1:].set(0.0)
  np.testing.assert_allclose(straight[0], out(built, params, {'image': other}, draws)['pred'][0], atol=1e-6)


def test_normalised_target_ignores_contrast_and_brightness():
  patch = jax.random.normal(jax.random.key(0), (2, 5, 192))
  np.testing.assert_allclose(targets.norm_pix(3 * patch + 2), targets.norm_pix(patch), atol=1e-4)
  np.testing.assert_allclose(targets.undo_norm_pix(targets.norm_pix(patch), patch), patch, atol=1e-5)


def test_draws_differ_between_steps_and_examples_and_hide_exactly_the_ratio(tiny):
  cfg, built, params, batch, draws = tiny
  mask = out(built, params, batch, draws)['mask']
  assert set(np.asarray(mask.sum(1))) == {16 - masking.keep_count(16, cfg.mask_ratio)}
  assert len({row.tobytes() for row in np.asarray(mask)}) == len(mask)
  assert np.any(built.draw(jax.random.key(4), batch)['noise'] != draws['noise'])


def test_every_parameter_learns(tiny):
  _, built, params, batch, draws = tiny
  grads = jax.grad(lambda p: built.loss(p, {}, {}, batch, draws, 0)[0])(params)
  still = [jax.tree_util.keystr(path) for path, g in jax.tree_util.tree_leaves_with_path(grads) if not np.any(g)]
  assert not still


def test_position_table_of_the_decoder_is_added_in_raster_order(tiny):
  cfg, _, params, batch, draws = tiny
  encoder, decoder = mae.modules(cfg)
  keep_ids, restore_ids, _ = masking.keep_smallest(draws['noise'], 4)
  z = encoder.apply({'params': params['encoder']}, batch['image'], keep_ids)
  _, seen = decoder.apply({'params': params['decoder']}, z, keep_ids, restore_ids, taps=True)
  y = z[:, 1:] @ params['decoder']['embed']['kernel'] + params['decoder']['embed']['bias']
  for b in range(len(z)):
    for j, place in enumerate(keep_ids[b]):
      row = decoder.apply({'params': params['decoder']}, method=lambda m: m.table)[0, 1 + place]
      np.testing.assert_allclose(seen['input'][b, 1 + place], y[b, j] + row, atol=1e-5)


@pytest.mark.parametrize(
  'pattern, std',
  [
    ('patch_embed/kernel', (2 / (768 + 256)) ** 0.5),
    ('patch_embed/bias', 1 / (3 * 768) ** 0.5),
    ('attn/qkv/kernel', (2 / (256 + 768)) ** 0.5),
    ('attn/proj/kernel', (2 / (256 + 256)) ** 0.5),
    ('mlp/fc1/kernel', (2 / (256 + 1024)) ** 0.5),
    ('mlp/fc2/kernel', (2 / (1024 + 256)) ** 0.5),
    ('cls_token', 0.02),
    ('attn/qkv/bias', 0.0),
    ('mlp/fc1/bias', 0.0),
  ],
)
def test_initialisation_has_the_mean_and_spread_of_the_paper(pattern, std):
  built = method.build(method.options('mae', size='256/4/4', decoder='64/1/4', image_size=64))
  params = built.init(jax.random.key(0), built.abstract_batch(1))
  found = {
    jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params['encoder'])
  }
  values = np.concatenate([leaf.ravel() for path, leaf in found.items() if path.endswith(pattern)])
  error = 4 * max(std, 1e-9) / np.sqrt(len(values))
  assert abs(values.mean()) <= error
  assert abs(values.std() - std) <= error
  if std and 'token' not in pattern:
    assert np.abs(values).max() <= 3**0.5 * std * 1.0001  # uniform, so bounded


def test_layers_differ_at_the_start_and_scanned_equals_unrolled(tiny):
  cfg, built, params, batch, draws = tiny
  kernels = params['encoder']['blocks']['mlp']['fc1']['kernel']
  assert np.abs(kernels[0] - kernels[1]).max() > 0.05
  value = built.loss(params, {}, {}, batch, draws, 0)[0]
  for options in ({'scan': False}, {'remat': 'dots'}, {'remat': 'full', 'scan': False}):
    other = method.build(method.options('mae', **TINY, **options))
    np.testing.assert_allclose(other.loss(params, {}, {}, batch, draws, 0)[0], value, rtol=1e-6)


def test_non_square_images_and_patches():
  built = method.build(
    method.options('mae', size='mu', decoder='24/1/3', patch=(4, 8), image_size=(16, 48), channels=5)
  )
  batch = {'image': jnp.ones((2, 16, 48, 5))}
  params = built.init(jax.random.key(0), batch)
  aux = out(built, params, batch, built.draw(jax.random.key(1), batch))
  assert aux['pred'].shape == (2, 24, 4 * 8 * 5)
  assert built.encode(params, batch)['tokens'].shape == (2, 24, 32)


def test_encode_gives_layers_and_drops_paths_when_asked(tiny):
  cfg, built, params, batch, _ = tiny
  plain, more = built.encode(params, batch), built.encode(params, batch, layers=True)
  assert set(plain) == {'tokens', 'cls'} and more['layers'].shape == (2, 4, 17, 32)
  encoder, _ = mae.modules(cfg)
  normed = encoder.apply({'params': params['encoder']}, batch['image'])
  np.testing.assert_array_equal(plain['tokens'], normed[:, 1:])
  last = more['layers'][-1]  # ahead of the final norm
  last = (last - last.mean(-1, keepdims=True)) / jnp.sqrt(last.var(-1, keepdims=True) + cfg.ln_eps)
  np.testing.assert_allclose(last[:, 0], plain['cls'], atol=1e-5)
  dropped = built.encode(params, batch, drop=(jax.random.split(jax.random.key(0), 4), 0.9))
  assert np.any(dropped['tokens'] != plain['tokens'])


def test_bfloat16_stays_near_float32(tiny):
  _, built, params, batch, draws = tiny
  half = method.build(method.options('mae', **TINY, dtype='bfloat16'))
  value = half.loss(params, {}, {}, batch, draws, 0)[0]
  assert value.dtype == jnp.float32
  np.testing.assert_allclose(value, built.loss(params, {}, {}, batch, draws, 0)[0], rtol=0.02)


def test_panels_paste_visible_pixels(tiny):
  _, built, params, batch, draws = tiny
  shown = built.panels(params, {}, {}, batch, draws)
  assert list(shown) == ['input', 'masked', 'prediction', 'pasted']
  hidden = patches.patchify(shown['pasted'] - batch['image'], (8, 8)).any(-1)
  np.testing.assert_array_equal(hidden, out(built, params, batch, draws)['mask'] == 1)


def ramps(key, count):
  """Images [count, 32, 32, 3] whose channels are offset + slope_y y + slope_x x with coefficients uniform in [-1, 1]."""
  axis = (jnp.arange(32) + 0.5) / 16 - 1
  c = jax.random.uniform(key, (count, 1, 1, 3, 3), minval=-1)
  return c[..., 0] + c[..., 1] * axis[:, None, None] + c[..., 2] * axis[None, :, None]


@pytest.mark.slow
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_learns_ramps_from_four_patches(seed, record):
  """Held-out loss far below predicting the visible mean, and the latent belongs to its image (baseline 0.27; swapped latents 1.0)."""
  cfg = method.options('mae', size='48/2/4', decoder='48/1/4', patch=8, image_size=32, mlp_ratio=2.0, norm_pix=False)
  built = method.build(cfg)
  encoder, decoder = mae.modules(cfg)
  params = built.init(jax.random.key(seed), built.abstract_batch(1))
  tx = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 2e-3, 50, 500), b1=0.9, b2=0.95, weight_decay=0.05)

  @jax.jit
  def step(carry, i):
    params, opt = carry
    keys = jax.random.split(jax.random.fold_in(jax.random.key(100 + seed), i))
    batch = {'image': ramps(keys[0], 64)}
    grads = jax.grad(lambda p: built.loss(p, {}, {}, batch, built.draw(keys[1], batch), i)[0])(params)
    updates, opt = tx.update(grads, opt, params)
    return (optax.apply_updates(params, updates), opt), None

  (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(500))
  batch = {'image': ramps(jax.random.key(999), 256)}
  draws = built.draw(jax.random.key(998), batch)
  end = built.loss(params, {}, {}, batch, draws, 0)[0]
  keep_ids, restore_ids, mask = masking.keep_smallest(draws['noise'], 4)
  z = encoder.apply({'params': params['encoder']}, batch['image'], keep_ids)
  swapped = decoder.apply({'params': params['decoder']}, jnp.roll(z, 1, axis=0), keep_ids, restore_ids)
  target = patches.patchify(batch['image'], (8, 8))
  wrong = jnp.sum(jnp.mean((swapped - target) ** 2, -1) * mask) / mask.sum()
  visible_mean = jnp.sum(target * (1 - mask)[..., None], axis=1, keepdims=True) / 4
  baseline = (
    jnp.sum(
      jnp.mean(
        (visible_mean.reshape(256, 1, 64, 3).mean(2, keepdims=True) - target.reshape(256, 16, 64, 3)) ** 2, (-1, -2)
      )
      * mask
    )
    / mask.sum()
  )
  record(end=end, visible_mean=baseline, swapped=wrong)
  assert 0.2 < baseline < 0.35
  assert end < 0.1 and end < baseline / 2
  assert wrong > 5 * end
