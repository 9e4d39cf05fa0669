"""Mixup and cutmix: the reference's numbers, exact shares, and draws that are what they say."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from mim_jax.ops import mix

apply = jax.jit(mix.apply, static_argnames=('classes', 'smoothing'))


def batch(size=6, height=12, width=16):
  return {'image': jax.random.normal(jax.random.key(1), (size, height, width, 3)), 'label': jnp.arange(size) % 4}


def draws(size, cut, share=1.0, box=(0, 0, 0, 0)):
  rows = lambda v, dtype: jnp.broadcast_to(jnp.asarray(v, dtype), (size, *np.shape(v)))
  return {'cut': rows(cut, bool), 'share': rows(share, jnp.float32), 'box': rows(box, jnp.int32)}


def test_mixup_and_its_labels_are_those_of_the_reference(goldens):
  path = goldens / 'mae_vit.safetensors'
  if not path.exists():
    pytest.skip(f'{path} is absent')
  case, config = load_file(path), json.loads(path.with_suffix('.json').read_text())['config']
  x = np.moveaxis(case['in/imgs'], 1, -1)
  images, targets = apply(
    x, case['in/labels'], draws(len(x), False, config['mix_lam']), config['num_classes'], config['smoothing']
  )
  np.testing.assert_allclose(images, np.moveaxis(case['out/mix_imgs'], 1, -1), atol=1e-5)
  np.testing.assert_allclose(targets, case['out/mix_target'], atol=1e-6)


def test_smooth_labels():
  np.testing.assert_allclose(mix.smooth_labels(jnp.array([1, 0]), 2, 0.1), [[0.05, 0.95], [0.95, 0.05]], atol=1e-7)
  np.testing.assert_array_equal(mix.smooth_labels(jnp.array([1]), 3), [[0, 1, 0]])


def test_a_cut_takes_its_box_from_the_partner_and_counts_what_is_left():
  b = batch()
  images, targets = apply(b['image'], b['label'], draws(6, True, 0.123, (2, 3, 8, 13)), classes=4)
  inside = np.zeros((12, 16), bool)
  inside[2:8, 3:13] = True
  np.testing.assert_array_equal(images[:, inside], b['image'][::-1][:, inside])
  np.testing.assert_array_equal(images[:, ~inside], b['image'][:, ~inside])
  own, other = jax.nn.one_hot(b['label'], 4), jax.nn.one_hot(b['label'][::-1], 4)
  kept = 1 - 60 / 192
  np.testing.assert_allclose(targets, kept * own + (1 - kept) * other, atol=1e-6)


def test_no_mixing_leaves_images_and_smooths_labels():
  b = batch()
  for cut in (False, True):
    images, targets = apply(b['image'], b['label'], draws(6, cut), classes=4, smoothing=0.2)
    np.testing.assert_array_equal(images, b['image'])
    np.testing.assert_allclose(targets, mix.smooth_labels(b['label'], 4, 0.2), atol=1e-7)


def test_rows_of_the_draws_act_on_their_own_example():
  b = batch(2)
  first, second = draws(2, True, 0.5, (0, 0, 12, 16)), draws(2, False, 0.25)
  both = {k: jnp.stack([first[k][0], second[k][1]]) for k in first}
  images, targets = apply(b['image'], b['label'], both, classes=4)
  np.testing.assert_array_equal(images[0], b['image'][1])
  np.testing.assert_allclose(images[1], 0.25 * b['image'][1] + 0.75 * b['image'][0], atol=1e-6)
  np.testing.assert_allclose(targets, [[0, 1, 0, 0], [0.75, 0.25, 0, 0]], atol=1e-6)


def sample(n=3000, **options):
  keys = jax.random.split(jax.random.key(0), n)
  got = jax.jit(jax.vmap(lambda key: mix.draw(key, batch(2, 32, 40), **options)))(keys)
  for name, value in got.items():
    assert value.shape[:2] == (n, 2)
    np.testing.assert_array_equal(value[:, 0], value[:, 1], err_msg=name)  # one draw for the whole batch
  return {k: np.asarray(v[:, 0]) for k, v in got.items()}


def test_the_draws_switch_evenly_and_have_the_share_they_should():
  got = sample()
  cut = got['cut']
  assert abs(cut.mean() - 0.5) < 0.03
  share = got['share'][~cut]
  assert abs(share.mean() - 0.5) < 0.02 and abs(share.var() - 1 / (4 * (2 * 0.8 + 1))) < 0.01  # Beta(0.8, 0.8)
  y0, x0, y1, x1 = got['box'].T
  assert (y0 >= 0).all() and (y1 >= y0).all() and (y1 <= 32).all()
  assert (x0 >= 0).all() and (x1 >= x0).all() and (x1 <= 40).all()
  # A box away from the border has the aspect of the image; its area is uniform but for being cut at the border.
  free = (y0 > 0) & (x0 > 0) & (y1 < 32) & (x1 < 40)
  assert np.abs((y1 - y0) / 32 - (x1 - x0) / 40)[free].max() < 0.1
  assert 0.25 < ((y1 - y0) * (x1 - x0) / (32 * 40)).mean() < 0.4
  assert y0.max() > 24 and y1.min() < 8  # centres all over


def test_options_turn_the_parts_off():
  assert sample(200, mixup=0.0)['cut'].all()
  assert not sample(200, cutmix=0.0)['cut'].any()
  for options in ({'prob': 0.0}, {'mixup': 0.0, 'cutmix': 0.0}):
    got = sample(50, **options)
    assert (got['share'] == 1).all()
    assert ((got['box'][:, 2:] - got['box'][:, :2]) == 0).all()
  got = sample(2000, prob=0.3, cutmix=0.0)
  assert abs((got['share'] < 1).mean() - 0.3) < 0.04


def test_every_target_sums_to_one_under_jit():
  b = batch()
  step = jax.jit(lambda key: apply(b['image'], b['label'], mix.draw(key, b), 4, 0.1))
  for seed in range(20):
    images, targets = step(jax.random.key(seed))
    np.testing.assert_allclose(targets.sum(axis=-1), 1, atol=1e-6)
    assert images.shape == b['image'].shape and images.dtype == jnp.float32


def test_labels_that_are_shares_already_are_mixed_as_they_are():
  data = batch(4)
  several = jnp.array([[1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 0, 1]])
  _, targets = apply(data['image'], several, draws(4, False, 0.75), 3, 0.1)
  np.testing.assert_allclose(targets[0], [1.0, 0.75, 0.25], atol=1e-6)
  np.testing.assert_allclose(targets[2], [0.0, 0.25, 0.0], atol=1e-6)
