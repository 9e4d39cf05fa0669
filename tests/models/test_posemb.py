"""Position tables against reference codes and by their definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from mim_jax.models import posemb


def golden(goldens, name):
  path = goldens / f'{name}.safetensors'
  if not path.is_file():
    pytest.skip(f'no reference case {path}')
  return load_file(path)


def test_sincos_is_the_table_of_the_mae_checkpoints(goldens):
  case = golden(goldens, 'mae')
  for name in ('pos_embed', 'decoder_pos_embed'):
    expected = case[f'w/{name}']
    side = round((expected.shape[1] - 1) ** 0.5)
    table = posemb.sincos((side, side), expected.shape[2], cls=True)
    assert table.dtype == np.float32
    np.testing.assert_array_equal(table, expected[0])


def test_sincos_by_its_definition():
  grid, width = (3, 2), 8
  w = 10000.0 ** -np.array([0, 1 / 2])
  parts = {}
  for order in ((1, 0), (0, 1)):
    parts[order] = np.stack(
      [
        np.concatenate([f(where[axis] * w) for axis in order for f in (np.sin, np.cos)])
        for where in [(row, column) for row in range(3) for column in range(2)]
      ]
    )
  np.testing.assert_allclose(posemb.sincos(grid, width), parts[1, 0], rtol=0, atol=1e-7)
  np.testing.assert_allclose(posemb.sincos(grid, width, order=(0, 1)), parts[0, 1], rtol=0, atol=1e-7)
  assert np.abs(parts[1, 0] - parts[0, 1]).max() > 0.5
  with_cls = posemb.sincos(grid, width, cls=True)
  assert with_cls.shape == (7, 8) and not with_cls[0].any()
  np.testing.assert_array_equal(with_cls[1:], posemb.sincos(grid, width))


def test_sincos_of_lines_and_volumes():
  line = posemb.sincos((5,), 4)
  np.testing.assert_allclose(line[3], [np.sin(3), np.sin(0.03), np.cos(3), np.cos(0.03)], atol=1e-7)
  volume = posemb.sincos((4, 3, 2), 24)
  assert volume.shape == (24, 24)
  w = 10000.0 ** -(np.arange(4) / 4)
  h, r, d = 2, 1, 1
  expected = np.concatenate([f(x * w) for x in (h, r, d) for f in (np.sin, np.cos)])
  np.testing.assert_allclose(volume[(h * 3 + r) * 2 + d], expected, atol=1e-7)


def test_sincos_rejects_what_it_cannot_make():
  with pytest.raises(ValueError, match='multiple of 4'):
    posemb.sincos((2, 2), 10)
  with pytest.raises(ValueError, match='multiple of 6'):
    posemb.sincos((2, 2, 2), 16)
  with pytest.raises(ValueError, match='order'):
    posemb.sincos((2, 2), 8, order=(0, 0))


def test_resample_is_torchs_bicubic(goldens):
  case = golden(goldens, 'mae_vit')
  table, expected = case['in/pos_ckpt'], case['out/pos_resized']
  old, new = (round((x.shape[1] - 1) ** 0.5) for x in (table, expected))
  resized = posemb.resample(table, (old, old), (new, new), cls_rows=1)
  np.testing.assert_allclose(resized, expected, rtol=0, atol=1e-5)
  np.testing.assert_array_equal(resized[:, 0], table[:, 0])


def test_cubic_weights():
  for old, new in ((4, 7), (7, 4), (14, 24), (5, 1), (1, 3)):
    weights = posemb.cubic_matrix(old, new)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
  # doubling: the first output lies at -0.25, so its taps are -2 to 1, three of them clamped to the border
  distances = np.array([1.75, 0.75, 0.25, 1.25])
  a = -0.75
  near = (a + 2) * distances**3 - (a + 3) * distances**2 + 1
  far = a * distances**3 - 5 * a * distances**2 + 8 * a * distances - 4 * a
  taps = np.where(distances <= 1, near, far)
  np.testing.assert_allclose(posemb.cubic_matrix(4, 8)[0], [taps[:3].sum(), taps[3], 0, 0], atol=1e-6)
  # shrinking takes four neighbours only: no antialiasing
  assert (posemb.cubic_matrix(32, 4) != 0).sum(1).max() <= 4


def test_resample_of_other_grids_and_ranks(rng):
  table = rng.normal(size=(1, 2 + 12, 3)).astype(np.float32)
  wide = posemb.resample(table, (3, 4), (5, 2), cls_rows=2)
  assert wide.shape == (1, 12, 3)
  rows, columns = posemb.cubic_matrix(3, 5), posemb.cubic_matrix(4, 2)
  by_hand = np.einsum('ph,qw,hwd->pqd', rows, columns, table[0, 2:].reshape(3, 4, 3))
  np.testing.assert_allclose(wide[0, 2:], by_hand.reshape(10, 3), atol=1e-6)
  assert posemb.resample(table, (3, 4), (3, 4), cls_rows=2) is table
  volume = rng.normal(size=(24, 2)).astype(np.float32)
  assert posemb.resample(volume, (2, 3, 4), (3, 3, 2)).shape == (18, 2)


def test_resample_under_jit_and_its_gradient(rng):
  table = rng.normal(size=(1, 17, 4)).astype(np.float32)
  resize = jax.jit(lambda x: posemb.resample(x, (4, 4), (3, 5), 1))
  np.testing.assert_allclose(resize(table), posemb.resample(table, (4, 4), (3, 5), 1), atol=1e-6)
  assert resize(jnp.asarray(table, jnp.bfloat16)).dtype == jnp.bfloat16
  gradient = jax.grad(lambda x: resize(x).sum())(table)
  columns = np.outer(posemb.cubic_matrix(4, 3).sum(0), posemb.cubic_matrix(4, 5).sum(0)).reshape(-1)
  np.testing.assert_allclose(gradient[0, 1:, 0], columns, atol=1e-5)


def test_resample_rejects_tables_of_another_size(rng):
  table = rng.normal(size=(1, 17, 4))
  with pytest.raises(ValueError, match='17 rows'):
    posemb.resample(table, (4, 4), (5, 5))
  with pytest.raises(ValueError, match='axes'):
    posemb.resample(table, (4, 4), (2, 2, 2), 1)


def test_a_nudge_moves_rows_also_on_their_own_grid(goldens):
  """The table that facebookresearch/dino's resampling gives on the grid it came from, as ChA-MAE uses it (its reference case)."""
  case = golden(goldens, 'cha_mae')
  table, expected = case['w/pos_embed'], case['out/pos_embed_seen']
  places = expected.shape[1] - 9  # a grid of 3 x 3 behind class and memory tokens
  matrix = posemb.cubic_matrix(3, 3, nudge=0.1)
  moved = np.einsum('ya,xb,abd->yxd', matrix, matrix, table[0, places:].reshape(3, 3, -1))
  np.testing.assert_allclose(moved.reshape(9, -1), expected[0, places:], atol=1e-6)
  assert np.abs(matrix - np.eye(3)).max() > 0.01
  np.testing.assert_allclose(posemb.cubic_matrix(3, 3), np.eye(3), atol=1e-7)
  grid = posemb.sincos((4, 4), 16)
  assert posemb.resample(grid, (4, 4), (4, 4), nudge=0.1) is grid  # a table that stays is left alone
  nudged, plain = (posemb.resample(grid, (4, 4), (8, 8), nudge=nudge) for nudge in (0.1, 0.0))
  assert 1e-3 < np.abs(nudged - plain).max() < 0.1
