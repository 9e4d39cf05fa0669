import json

import numpy as np
import pytest

from mim_jax.data import images, tables
from mim_jax.data.worlds import get
from mim_jax.errors import ConfigError, MissingData

DESCRIBED = [
  {'name': 'colour', 'categories': ['red', 'blue', 'white']},
  {'name': 'year', 'mean': 2010.0, 'std': 5.0},
  {'name': 'price', 'unit': 'thousand', 'mean': 20.0, 'std': 4.0},
]


@pytest.fixture
def described(tmp_path):
  path = tmp_path / 'metadata.json'
  path.write_text(json.dumps({'table': DESCRIBED, 'options': {}}))
  return str(path)


def test_rows_are_standardised_and_lacking_cells_are_marked(described):
  columns = tables.read(described)
  assert (columns.names, columns.lengths, columns.continuous) == (('colour', 'year', 'price'), (3,), 2)
  values, missing = columns.encode([2, 2015, np.nan])
  np.testing.assert_array_equal(values, np.float32([2, 1, 0]))
  np.testing.assert_array_equal(missing, [False, False, True])
  values, missing = columns.encode([np.nan, 2010, 16])
  np.testing.assert_array_equal(values, np.float32([0, 0, -1]))
  assert values.dtype == np.float32 and missing.tolist() == [True, False, False]


@pytest.mark.parametrize('row', [[3, 2010, 20], [-1, 2010, 20], [0.5, 2010, 20], [0, 2010]])
def test_rows_that_do_not_fit_are_refused(described, row):
  with pytest.raises(ConfigError, match="colour' holds .*0 to 2|table row is"):
    tables.read(described).encode(row)


@pytest.mark.parametrize(
  'content, words',
  [
    ('{', 'no JSON'),
    ('{"columns": []}', 'describes no table'),
    (json.dumps(DESCRIBED[::-1]), 'must come first'),
    (json.dumps([{'name': 'year', 'mean': 1.0}]), 'needs a mean and a std'),
    (json.dumps([{'name': 'year', 'mean': 1.0, 'std': 0.0}]), 'needs a mean and a std'),
  ],
)
def test_descriptions_that_cannot_be_used_say_why(tmp_path, content, words):
  path = tmp_path / 'columns.json'
  path.write_text(content)
  with pytest.raises(ConfigError, match=words):
    tables.read(str(path))


def test_an_absent_description_says_how_to_get_one(tmp_path):
  with pytest.raises(MissingData, match='csv_tables'):
    tables.read(str(tmp_path / 'none.json'))


def test_the_transform_reads_a_world_without_its_data():
  world = get('tables')
  raw = world.example({**world.defaults, 'missing': 0.5}, 'train', 0)
  chain = images.parse("decode | table('synthetic:tables') | to_float")
  example = chain.example(raw, np.random.default_rng(0))
  assert example['table'].shape == example['missing'].shape == (12,)
  np.testing.assert_array_equal(example['missing'], np.isnan(raw['table']))
  assert np.isfinite(example['table']).all() and np.abs(example['table'][5:]).max() < 6
  with pytest.raises(ConfigError, match='is to be complete'):
    whole = images.parse("decode | table('synthetic:tables', complete=True)")
    whole.example(raw, np.random.default_rng(0))
  with pytest.raises(ConfigError, match="need the field 'table'"):
    chain.example({'image': raw['image']}, np.random.default_rng(0))


@pytest.mark.parametrize('rate', [0.0, 0.3, 0.9])
def test_cells_and_columns_that_are_taken_away_are_counted_exactly(rate):
  cells = tables.missing_cells(101, 7, rate, 'cells', seed=3)
  assert cells.sum() == int(rate * 101 * 7)
  columns = tables.missing_cells(101, 7, rate, 'columns', seed=3)
  assert columns.all(0).sum() == columns.any(0).sum() == int(rate * 7)
  order = (4, 2, 0, 1, 3, 5, 6)
  most, least = (tables.missing_cells(3, 7, rate, how, order) for how in ('most_important', 'least_important'))
  count = int(rate * 7)
  assert set(np.flatnonzero(most[0])) == set(order[:count]) and set(np.flatnonzero(least[0])) == set(order[7 - count :])


def test_random_cells_follow_the_seed():
  cells = tables.missing_cells(50, 6, 0.5, 'cells', seed=0)
  np.testing.assert_array_equal(cells, tables.missing_cells(50, 6, 0.5, 'cells', seed=0))
  assert (cells != tables.missing_cells(50, 6, 0.5, 'cells', seed=1)).any()
  assert np.abs(cells.mean(0) - 0.5).max() < 0.25


@pytest.mark.parametrize(
  'given', [{'how': 'rows'}, {'rate': 1.2}, {'how': 'most_important'}, {'how': 'least_important', 'order': (0, 0, 1)}]
)
def test_missing_cells_that_cannot_be_made_are_refused(given):
  with pytest.raises(ConfigError):
    tables.missing_cells(**{'rows': 4, 'columns': 3, 'rate': 0.5, 'how': 'cells', **given})
