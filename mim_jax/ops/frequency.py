"""Images [..., H, W, C] in the frequency domain: centred Fourier transform, cosine transform, and their bands."""

import jax.numpy as jnp
import numpy as np


def fft2(x):
  """Orthonormal Fourier transform over H and W, frequency 0 at (H // 2, W // 2): [..., H, W, C] -> complex64."""
  return jnp.fft.fftshift(jnp.fft.fft2(x, axes=(-3, -2), norm='ortho'), axes=(-3, -2))


def ifft2(z):
  """Real part of the inverse of `fft2`: only the Hermitian-symmetric part of z counts."""
  return jnp.fft.ifft2(jnp.fft.ifftshift(z, axes=(-3, -2)), axes=(-3, -2), norm='ortho').real


def dct_matrix(n: int) -> np.ndarray:
  """Orthonormal DCT-II [n, n] float32: row k is sqrt(2 / n) cos(pi (i + 1/2) k / n), row 0 over sqrt(2)."""
  k, i = np.arange(n)[:, None], np.arange(n)[None]
  matrix = np.sqrt(2 / n) * np.cos(np.pi * (i + 0.5) * k / n)
  matrix[0] /= np.sqrt(2)
  return matrix.astype(np.float32)


def dct2(x):
  """Orthonormal 2-D cosine transform over H and W; frequency (0, 0) comes first."""
  return jnp.einsum('uh,...hwc,vw->...uvc', dct_matrix(x.shape[-3]), x, dct_matrix(x.shape[-2]))


def idct2(z):
  """Inverse of `dct2`."""
  return jnp.einsum('uh,...uvc,vw->...hwc', dct_matrix(z.shape[-3]), z, dct_matrix(z.shape[-2]))


def radii(height: int, width: int) -> np.ndarray:
  """Distance [H, W] of every coefficient of `fft2` from frequency 0, in cycles per image."""
  u, v = np.arange(height) - height // 2, np.arange(width) - width // 2
  return np.sqrt(u[:, None] ** 2 + v[None] ** 2)


def fft_band(height: int, width: int, radius: float) -> np.ndarray:
  """Mask [H, W] float32 of `fft2`: 1 where a coefficient lies farther than `radius` from frequency 0."""
  return (radii(height, width) > radius).astype(np.float32)


def dct_band(height: int, width: int, cutoff: float) -> np.ndarray:
  """Mask [H, W] float32 of `dct2`: 1 where u + v is `cutoff` or more. Index k has k / 2 cycles per image."""
  return (np.arange(height)[:, None] + np.arange(width)[None] >= cutoff).astype(np.float32)


def low_pass(x, radius: float):
  """x without the frequencies beyond `radius`."""
  return ifft2(fft2(x) * (1 - fft_band(*x.shape[-3:-1], radius))[..., None])


def high_share(x, radius: float):
  """Share of the energy of x [..., H, W, C] beyond `radius`, over all channels -> [...]; 0 for an image of zeros."""
  energy = jnp.square(jnp.abs(fft2(x)))
  high = jnp.sum(energy * fft_band(*x.shape[-3:-1], radius)[..., None], axis=(-3, -2, -1))
  return high / jnp.maximum(jnp.sum(energy, axis=(-3, -2, -1)), 1e-20)
