"""Transforms that keep energy and invert, and bands that part an image in two."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import fft as reference

from mim_jax.ops import frequency


@pytest.fixture
def image(rng):
  return jnp.asarray(rng.random((2, 12, 8, 3)), jnp.float32)


def test_transforms_invert_and_keep_energy(image):
  for there, back in ((frequency.fft2, frequency.ifft2), (frequency.dct2, frequency.idct2)):
    z = there(image)
    np.testing.assert_allclose(back(z), image, atol=1e-6)
    np.testing.assert_allclose(jnp.sum(jnp.abs(z) ** 2), jnp.sum(image**2), rtol=1e-5)
  np.testing.assert_allclose(frequency.dct2(image), reference.dctn(image, axes=(1, 2), norm='ortho'), atol=1e-5)
  np.testing.assert_allclose(frequency.fft2(image)[:, 6, 4], image.sum((1, 2)) / np.sqrt(96), atol=1e-5)


def test_only_the_hermitian_part_of_a_spectrum_counts(rng):
  z = jnp.asarray(rng.normal(size=(8, 8, 1)) + 1j * rng.normal(size=(8, 8, 1)), jnp.complex64)
  x = frequency.ifft2(z)
  assert x.dtype == jnp.float32 and jnp.sum(x**2) < jnp.sum(jnp.abs(z) ** 2)
  np.testing.assert_allclose(frequency.ifft2(frequency.fft2(x)), x, atol=1e-6)


def test_bands():
  assert frequency.fft_band(8, 8, 2)[4].tolist() == [1, 1, 0, 0, 0, 0, 0, 1]
  assert frequency.dct_band(4, 4, 3)[1].tolist() == [0, 0, 1, 1]
  wave = lambda cycles: jnp.broadcast_to(jnp.cos(2 * np.pi * cycles * np.arange(16) / 16)[:, None, None], (16, 16, 3))
  slow, fast = wave(2), wave(6)
  np.testing.assert_allclose(frequency.low_pass(0.5 + slow + fast, 3), 0.5 + slow, atol=1e-5)
  np.testing.assert_allclose(frequency.high_share(jnp.stack([slow, fast, slow + fast]), 3), [0, 1, 0.5], atol=1e-5)
  assert frequency.high_share(jnp.zeros((4, 4, 3)), 1) == 0
  assert np.isfinite(jax.grad(lambda x: jnp.sum(frequency.low_pass(x, 3) ** 2))(slow)).all()
