"""Schedules, noising and DDIM."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.errors import ConfigError
from mim_jax.ops import diffusion


@pytest.mark.parametrize('name, first, last', [('linear', 0.9999, 4.04e-5), ('cosine', 0.99996, 2.4e-9)])
def test_signal_falls_from_all_to_nearly_none(name, first, last):
  a = diffusion.signal(name, 1000)
  assert np.all(np.diff(a) < 0)
  np.testing.assert_allclose([a[0], a[-1]], [first, last], rtol=0.02)


def test_cosine_variances_are_held_below_one():
  assert diffusion.betas('cosine', 1000).max() == 0.999


def test_an_unknown_schedule_is_told():
  with pytest.raises(ConfigError, match="did you mean 'cosine'"):
    diffusion.betas('cosinus', 10)


def test_noising_keeps_unit_variance_and_is_undone():
  a = diffusion.signal('cosine', 1000)
  keys = jax.random.split(jax.random.key(0))
  x, eps = jax.random.normal(keys[0], (3, 40, 40, 3)), jax.random.normal(keys[1], (3, 40, 40, 3))
  s = jnp.array([0, 300, 900])
  noised = diffusion.add_noise(a, x, s, eps)
  np.testing.assert_allclose(noised.std((1, 2, 3)), 1, atol=0.03)
  np.testing.assert_allclose(diffusion.clean_from_noise(a, noised, s, eps)[:2], x[:2], atol=1e-4)
  np.testing.assert_allclose(diffusion.noise_from_clean(a, noised, s, x)[1:], eps[1:], atol=1e-4)


def test_the_sampler_visits_whole_strides_down_to_zero():
  times = diffusion.ddim_times(1000, 250)
  assert len(times) == 251 and times[0] == 999 and times[1] == 995 and times[-2:].tolist() == [3, 0]
  odd = diffusion.ddim_times(1000, 62)  # a stride of 17: 59 steps, and zeros for the rest
  assert len(odd) == 63 and (odd > 0).sum() == 59
  with pytest.raises(ConfigError, match='1 to 10'):
    diffusion.ddim_times(10, 11)


@pytest.mark.parametrize('eta, clip', [(0.0, True), (1.0, True), (0.0, False)])
def test_a_perfect_predictor_leads_to_its_image_from_any_noise(eta, clip):
  a = diffusion.signal('cosine', 100)
  image = jnp.linspace(-0.9, 0.9, 2 * 4).reshape(2, 2, 2, 1)
  perfect = lambda x, s: diffusion.noise_from_clean(a, x, s, image)
  start = jax.random.normal(jax.random.key(0), image.shape)
  sample = jax.jit(lambda x: diffusion.ddim(a, perfect, x, jax.random.key(1), 20, eta, clip))(start)
  np.testing.assert_allclose(sample, image, atol=2e-3)


def test_noise_of_a_step_counts_by_eta_and_not_at_the_end():
  a = diffusion.signal('linear', 100)
  x, eps, noise = jax.random.normal(jax.random.key(0), (3, 2, 4))
  step = lambda s, after, eta, noise: diffusion.ddim_step(
    a, x, jnp.full(2, s), jnp.full(2, after), eps, noise, eta, False
  )[0]
  np.testing.assert_array_equal(step(50, 40, 0.0, noise), step(50, 40, 0.0, 2 * noise))
  change = step(50, 40, 1.0, 2 * noise) - step(50, 40, 1.0, noise)
  sigma = np.sqrt((1 - a[40]) / (1 - a[50]) * (1 - a[50] / a[40]))
  np.testing.assert_allclose(change, sigma * noise, rtol=1e-4)
  np.testing.assert_array_equal(step(0, -1, 1.0, noise), step(0, -1, 1.0, 2 * noise))
