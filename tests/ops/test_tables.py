import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.ops import tables


@pytest.mark.parametrize('columns, ratio, count', [(17, 0.5, 8), (75, 0.5, 38), (7, 0.5, 4), (12, 0.0, 0), (5, 1.0, 5)])
def test_hidden_columns_are_rounded_half_to_even(columns, ratio, count):
  assert tables.hidden_count(columns, ratio) == count
  hidden = tables.smallest(jax.random.uniform(jax.random.key(0), (20, columns)), count)
  assert set(np.asarray(hidden.sum(1))) == {count}


def test_ratios_that_cannot_be_are_refused():
  with pytest.raises(ValueError, match='1.5'):
    tables.hidden_count(4, 1.5)


def test_every_row_is_drawn_as_often_and_each_cell_for_itself():
  table = jnp.arange(8.0)[:, None] + 100 * jnp.arange(500.0)
  drawn = np.asarray(tables.from_marginals(table, jax.random.uniform(jax.random.key(0), table.shape)))
  rows = drawn - 100 * np.arange(500)
  assert set(np.unique(rows)) == set(range(8))
  assert np.abs(np.bincount(rows.astype(int).ravel()) / rows.size - 1 / 8).max() < 0.02
  assert len({tuple(row) for row in rows.T}) > 490


def test_lacking_cells_are_never_drawn():
  table = jnp.arange(6.0)[:, None] * jnp.ones((1, 300))
  missing = jnp.arange(6)[:, None] < jnp.array([[0] * 100 + [4] * 100 + [6] * 100])
  drawn = np.asarray(tables.from_marginals(table, jax.random.uniform(jax.random.key(0), table.shape), missing))
  assert set(np.unique(drawn[:, :100])) == set(range(6))
  assert set(np.unique(drawn[:, 100:200])) == {4, 5}
  np.testing.assert_array_equal(drawn[:, 200:], table[:, 200:])  # nobody has this column


def test_bars_are_as_long_as_the_values():
  values = jnp.array([[0.0, 3.0, 0.0, 50.0]])  # codes of columns with 2 and 4 categories, then the median and the end
  colours = jnp.zeros((1, 4, 3)).at[0, 1].set(jnp.array([0.0, 1.0, 0.0]))
  picture = np.asarray(tables.bars(values, (2, 4), colours, (40, 20)))[0]
  assert picture.shape == (40, 20, 3)
  dark = (picture < 1).any(-1)
  assert [int(dark[row].sum()) for row in (4, 14, 24, 34)] == [10, 20, 10, 20]
  assert not dark[9].any() and not dark[19].any()
  np.testing.assert_array_equal(picture[14, 3], [0, 1, 0])


def test_reconstruction_counts_the_marked_cells_of_each_kind(rng):
  logits = jnp.asarray(rng.normal(size=(3, 2, 5)), jnp.float32)
  values, table = jnp.asarray(rng.normal(size=(3, 1)), jnp.float32), jnp.array([[0, 2, 0.5], [1, 1, -1.0], [0, 0, 2.0]])
  target = jnp.array([[True, False, True], [True, True, False], [False, False, False]])
  chance = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  expected = -np.log([chance[0, 0, 0], chance[1, 0, 1], chance[1, 1, 2 + 1]]).mean()  # one softmax over all five
  categorical, continuous = tables.reconstruction(logits, values, table, target, (2, 3), (0, 2))
  np.testing.assert_allclose(categorical, expected, rtol=1e-5)
  np.testing.assert_allclose(continuous, (values[0, 0] - 0.5) ** 2, rtol=1e-5)
  assert tables.reconstruction(logits, values, table, jnp.zeros((3, 3), bool), (2, 3), (0, 2)) == (0, 0)
  codes = tables.best_codes(logits, (2, 3), (0, 2))
  np.testing.assert_array_equal(codes, np.stack([logits[:, 0, :2].argmax(-1), logits[:, 1, 2:].argmax(-1)], 1))
