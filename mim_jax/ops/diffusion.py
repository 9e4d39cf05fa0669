"""Gaussian diffusion: noise schedules, noising, and DDIM sampling from predicted noise.

Step s counts from 0; x_s = sqrt(a_s) x_0 + sqrt(1 - a_s) eps with a_s the product of 1 - beta up to s (Ho et al. 2020,
arXiv 2006.11239).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax.errors import ConfigError, nearest


def betas(name: str, steps: int) -> np.ndarray:
  """Variances [steps] float64: 'linear' (Ho et al., scaled to the steps) or 'cosine' (arXiv 2102.09672)."""
  if name == 'linear':
    return np.linspace(1e-4, 0.02, steps) * (1000 / steps)
  if name == 'cosine':
    alpha_bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
  raise ConfigError(f'noise schedule {name!r} is unknown; {nearest(name, ("linear", "cosine"))}')


def signal(name: str, steps: int) -> np.ndarray:
  """a_s [steps], float64: the share of the variance that is signal."""
  return np.cumprod(1 - betas(name, steps))


def _at(table, s, x):
  """Rows s [B] of a table, shaped to multiply x [B, ...], float32."""
  return jnp.asarray(table, jnp.float32)[s].reshape(-1, *[1] * (x.ndim - 1))


def add_noise(a, x, s, eps):
  """x_s [B, ...] of x_0 [B, ...] at steps s [B] with noise eps; a [steps] from `signal`."""
  return _at(np.sqrt(a), s, x) * x + _at(np.sqrt(1 - a), s, x) * eps


def clean_from_noise(a, x, s, eps):
  """x_0 that x at steps s [B] and its noise eps imply."""
  return _at(np.sqrt(1 / a), s, x) * x - _at(np.sqrt(1 / a - 1), s, x) * eps


def noise_from_clean(a, x, s, clean):
  """Noise that x at steps s [B] and its x_0 imply."""
  return (_at(np.sqrt(1 / a), s, x) * x - clean) / _at(np.sqrt(1 / a - 1), s, x)


def ddim_step(a, x, s, after, eps, noise, eta: float, clip: bool):
  """One step of DDIM (Song et al. 2021, arXiv 2010.02502, equation 12) -> (x at steps `after`, predicted x_0).

  Args:
    a: from `signal`.
    x: [B, ...] at steps s [B]; after: [B] steps, -1 for no noise at all.
    eps: predicted noise; noise: fresh noise, which counts by `eta` (0: none, 1: as much as ancestral sampling).
    clip: hold x_0 in [-1, 1]; the noise that goes on is the one that fits the clipped x_0.
  """
  clean = clean_from_noise(a, x, s, eps)
  if clip:
    clean = jnp.clip(clean, -1, 1)
  eps = noise_from_clean(a, x, s, clean)
  here, there = _at(a, s, x), jnp.where(_column(after, x) < 0, 1.0, _at(a, jnp.maximum(after, 0), x))
  sigma = eta * jnp.sqrt((1 - there) / (1 - here)) * jnp.sqrt(1 - here / there)
  mean = clean * jnp.sqrt(there) + jnp.sqrt(1 - there - sigma**2) * eps
  return mean + (_column(s, x) > 0) * sigma * noise, clean


def _column(s, x):
  return s.reshape(-1, *[1] * (x.ndim - 1))


def ddim_times(training: int, sampling: int) -> np.ndarray:
  """Steps [sampling + 1] that a sampler visits, from training - 1 down to 0, a whole stride apart.

  Where the stride does not come out even there are fewer of them, and 0 is repeated (philippe-eecs/small-vision,
  gaussian_diffusion.py).
  """
  if not 0 < sampling <= training:
    raise ConfigError(f'{sampling} sampling steps of {training} training steps; expected 1 to {training}')
  visited = np.arange(training - 1, 0, -training // sampling)
  return np.concatenate([visited, np.zeros(sampling + 1 - len(visited), np.int64)])


def ddim(a, predict: Callable, x, key, sampling: int, eta: float = 1.0, clip: bool = True):
  """Samples [B, ...] from noise x [B, ...]: `sampling` steps and a last look at step 0, whose x_0 is the sample.

  Args:
    a: from `signal`.
    predict: (x, s [B]) -> predicted noise.
    key: of the noise on the way; it is not used where eta is 0.
  """
  times = jnp.asarray(ddim_times(len(a), sampling), jnp.int32)

  def step(x, now):
    s, after, i = now
    s, after = (jnp.full(len(x), t) for t in (s, after))
    noise = jax.random.normal(jax.random.fold_in(key, i), x.shape) if eta else jnp.zeros_like(x)
    return ddim_step(a, x, s, after, predict(x, s), noise, eta, clip)[0], None

  x, _ = jax.lax.scan(step, x, (times[:-1], times[1:], jnp.arange(sampling)))
  s = jnp.zeros(len(x), jnp.int32)
  return ddim_step(a, x, s, s - 1, predict(x, s), jnp.zeros_like(x), 0.0, clip)[1]
