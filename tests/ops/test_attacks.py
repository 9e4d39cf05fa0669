"""Attacks on small classifiers: where they may go, known answers on a linear one, and how they rank."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog

from mim_jax.ops import attacks

EPS = 0.05
SHAPE = (8, 6, 6, 2)


@pytest.fixture(scope='module')
def net():
  """A small network with six classes, images it is right about, and their classes."""
  keys = jax.random.split(jax.random.key(0), 3)
  w1 = 0.3 * jax.random.normal(keys[0], (72, 32))
  w2 = 0.5 * jax.random.normal(keys[1], (32, 6))
  logits_of = lambda x: jnp.tanh((x.reshape(len(x), -1) - 0.5) @ w1) @ w2
  x = jax.random.uniform(keys[2], SHAPE, minval=0.02, maxval=0.98)
  return logits_of, x, jnp.argmax(logits_of(x), axis=1)


def uniform(*shape, seed=3):
  return jax.random.uniform(jax.random.key(seed), shape)


def attempts(logits_of, x, y):
  """Every attack within eps, by name."""
  start = EPS * (2 * uniform(*SHAPE) - 1)
  target = attacks.targets_of(logits_of(x), y, 2)
  sign = lambda *shape: 2.0 * (uniform(*shape) > 0.5) - 1
  apgd = lambda loss, target=None: attacks.apgd(logits_of, x, y, uniform(*SHAPE), EPS, 30, loss, target)
  return {
    'fgsm': lambda: attacks.fgsm(logits_of, x, y, EPS),
    'pgd': lambda: attacks.pgd(logits_of, x, y, start, EPS, EPS / 4, 20),
    'restarts': lambda: attacks.pgd_restarts(logits_of, x, y, jnp.stack([0 * start, start]), EPS, EPS / 4, 10),
    'cw_linf': lambda: attacks.pgd(logits_of, x, y, start, EPS, EPS / 4, 10, 'margin'),
    'apgd_ce': lambda: apgd('ce')['best'],
    'apgd_dlr': lambda: apgd('dlr')['adversarial'],
    'apgd_t': lambda: apgd('dlr_targeted', target[0])['best'],
    'fab': lambda: attacks.fab_targeted(logits_of, x, y, target[0], EPS, 20),
    'square': lambda: attacks.square(logits_of, x, y, sign(8, 6, 2), uniform(150, 8, 2), sign(150, 8, 2), EPS),
  }


@pytest.fixture(scope='module')
def found(net):
  return jax.jit(lambda: {name: attempt() for name, attempt in attempts(*net).items()})()


def test_every_attack_stays_within_eps_and_the_range(net, found):
  _, x, _ = net
  for name, adv in found.items():
    assert adv.shape == x.shape
    assert jnp.abs(adv - x).max() <= EPS + 1e-6, name
    assert adv.min() >= 0 and adv.max() <= 1, name
    assert jnp.abs(adv - x).max() > 0, name


def test_more_effort_is_never_weaker(net, found):
  logits_of, x, y = net
  loss = {name: attacks.cross_entropy(logits_of(adv), y) for name, adv in found.items()}
  clean = attacks.cross_entropy(logits_of(x), y)
  assert all(np.mean(value >= clean) >= 0.75 for name, value in loss.items() if name != 'fab')
  assert np.mean(loss['pgd'] >= loss['fgsm'] - 1e-3) > 0.8 and loss['apgd_ce'].mean() > loss['fgsm'].mean()
  assert loss['square'].mean() < loss['apgd_ce'].mean()  # without gradients
  right = {name: int(attacks.correct(logits_of, adv, y).sum()) for name, adv in found.items()}
  assert right['apgd_ce'] <= right['fgsm'] and right['square'] >= right['apgd_ce'], right


def test_auto_pgd_says_what_it_found(net):
  logits_of, x, y = net
  out = attacks.apgd(logits_of, x, y, uniform(*SHAPE), EPS, 12, 'dlr')
  np.testing.assert_allclose(out['loss'], attacks.dlr(logits_of(out['best']), y), atol=1e-5)
  fooled = ~attacks.correct(logits_of, out['adversarial'], y)
  np.testing.assert_array_equal(fooled, ~out['correct'])
  assert np.all(out['loss'] >= attacks.dlr(logits_of(x), y) - 0.5)


def test_checks_of_auto_pgd_come_closer_and_closer():
  checks = attacks.apgd_checks(100)
  assert np.flatnonzero(checks).tolist() == [21, 40, 56, 69, 79, 86, 92, 98]
  assert checks[checks > 0].tolist() == [22, 19, 16, 13, 10, 7, 6, 6]


def test_windows_of_the_square_attack_shrink():
  sides = attacks.square_sides(5000, 24, 32)
  assert sides[0] == 24 and sides[-1] == 1 and np.all(np.diff(sides) <= 0)
  assert sides[0] == min(round((0.8 * 24 * 32) ** 0.5), 24) and sides[6] == round((0.4 * 24 * 32) ** 0.5)


def test_projection_onto_a_plane_in_the_box_is_the_smallest(rng):
  x, w = rng.random((6, 10)).astype(np.float32), rng.normal(size=(6, 10)).astype(np.float32)
  c = np.float32([0.3, -0.8, 2.0, -0.05, 1.0, 100])
  d = np.asarray(attacks.project_to_plane(jnp.asarray(x), jnp.asarray(w), jnp.asarray(c)))
  assert np.all(x + d >= -1e-6) and np.all(x + d <= 1 + 1e-6)
  for i in range(5):  # minimise t subject to |d| <= t, w d = -c, 0 <= x + d <= 1
    bounds = [(-v, 1 - v) for v in x[i]] + [(0, None)]
    a = np.concatenate([np.block([[np.eye(10)], [-np.eye(10)]]), -np.ones((20, 1))], axis=1)
    best = linprog([0] * 10 + [1], A_ub=a, b_ub=np.zeros(20), A_eq=[[*w[i], 0]], b_eq=[-c[i]], bounds=bounds)
    np.testing.assert_allclose(w[i] @ d[i], -c[i], atol=1e-5)
    np.testing.assert_allclose(np.abs(d[i]).max(), best.fun, atol=1e-5)
  np.testing.assert_allclose(x[5] + d[5], w[5] < 0)  # out of reach: every coordinate goes to its end


@pytest.fixture(scope='module')
def linear():
  """Two classes parted by a plane, and the distances of the images to it in l-infinity and l2."""
  w = jax.random.normal(jax.random.key(5), (72,))
  x = jnp.clip(0.5 + 0.1 * jax.random.normal(jax.random.key(6), SHAPE), 0, 1)
  height = lambda x: (x.reshape(len(x), -1) - 0.5) @ w
  logits_of = lambda x: jnp.stack([height(x), -height(x)], axis=1)
  y = jnp.argmax(logits_of(x), axis=1)
  return logits_of, x, y, jnp.abs(height(x)) / jnp.abs(w).sum(), jnp.abs(height(x)) / jnp.linalg.norm(w)


def test_fab_finds_the_nearest_point_of_a_plane(linear):
  logits_of, x, y, away, _ = linear
  adv = jax.jit(lambda: attacks.fab_targeted(logits_of, x, y, 1 - y, 1.0, 30))()
  assert not attacks.correct(logits_of, adv, y).any()
  np.testing.assert_allclose(jnp.abs(adv - x).max((1, 2, 3)), away, rtol=0.12)
  near = attacks.fab_targeted(logits_of, x, y, 1 - y, float(away.min()) / 2, 5)
  np.testing.assert_array_equal(near, x)  # nothing within eps: the image itself


def test_carlini_wagner_finds_a_small_change(linear):
  logits_of, x, y, _, away = linear
  adv = jax.jit(lambda: attacks.cw_l2(logits_of, x, y, c=5.0, steps=200))()
  fooled = ~attacks.correct(logits_of, adv, y)
  length = jnp.sqrt(jnp.sum((adv - x) ** 2, axis=(1, 2, 3)))
  assert fooled.sum() >= 7 and adv.min() >= 0 and adv.max() <= 1
  assert np.all(length[fooled] >= away[fooled] - 1e-4) and np.all(length[fooled] < 1.6 * away[fooled] + 0.05)
  np.testing.assert_allclose(adv[~fooled], x[~fooled])


def test_the_ratio_of_logits_ignores_shift_and_scale(rng):
  logits, y = jnp.asarray(rng.normal(size=(5, 6)), jnp.float32), jnp.arange(5)
  np.testing.assert_allclose(attacks.dlr(3 * logits + 7, y), attacks.dlr(logits, y), rtol=1e-4)
  target = (y + 1) % 6
  np.testing.assert_allclose(
    attacks.dlr_targeted(3 * logits + 7, y, target), attacks.dlr_targeted(logits, y, target), rtol=1e-4
  )
  order = np.argsort(-logits, axis=1)
  np.testing.assert_array_equal(attacks.targets_of(logits, jnp.asarray(order[:, 0]), 3).T, order[:, 1:4])


def test_clipping_passes_the_gradient_at_its_ends():
  grad = jax.grad(lambda x: jnp.sum(attacks.clip(x)))(jnp.array([-0.1, 0.0, 0.5, 1.0, 1.1]))
  np.testing.assert_array_equal(grad, [0, 1, 1, 1, 0])


def test_the_first_success_counts(net):
  logits_of, x, y = net
  flip = jnp.flip(x, axis=0)
  adv = attacks.first_success(logits_of, x, y, [lambda: x, lambda: flip, lambda: 0 * x])
  for i in range(len(x)):
    options = [v[i] for v in (flip, 0 * x) if not attacks.correct(logits_of, v, y)[i]]
    np.testing.assert_array_equal(adv[i], options[0] if options else x[i])
