"""Rows of tables beside images: which columns there are, their encoding, and which cells are lacking.

A raw row is [N] float32, NaN where a cell is lacking: first the categorical columns as codes 0, 1, ..., then the
continuous ones in their own units. A description of the columns is JSON, a list in their order or an object with that
list under 'table':

    [{"name": "colour", "categories": ["black", "red"]}, {"name": "mileage", "mean": 41000.0, "std": 22000.0}]

`metadata.json` beside a prepared data set has that form; mean and std are those of the training split.
"""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np

from mim_jax.data.chain import CHECKS, register
from mim_jax.errors import ConfigError, MissingData

GENERATORS = ('cells', 'columns', 'most_important', 'least_important')


@dataclasses.dataclass(frozen=True)
class Columns:
  """Columns of a table, the categorical ones first.

  Attributes:
    names: all of them, in order.
    lengths: number of categories of each categorical column.
    mean, std: of each continuous column.
  """

  names: tuple[str, ...]
  lengths: tuple[int, ...]
  mean: np.ndarray
  std: np.ndarray

  @property
  def continuous(self) -> int:
    return len(self.names) - len(self.lengths)

  def encode(self, row) -> tuple[np.ndarray, np.ndarray]:
    """Raw row [N] -> (codes and standardised values [N] float32, 0 where lacking; lacking [N] bool).

    Raises ConfigError for another number of columns, or for a code that its column does not have.
    """
    row = np.asarray(row, np.float32)
    if row.shape != (len(self.names),):
      raise ConfigError(f'a table row is {row.shape}, {len(self.names)} columns are described: {", ".join(self.names)}')
    missing = ~np.isfinite(row)
    count = len(self.lengths)
    codes = np.where(missing[:count], 0, row[:count])
    wrong = (codes < 0) | (codes >= self.lengths) | (codes != np.floor(codes))
    if wrong.any():
      j = int(np.flatnonzero(wrong)[0])
      raise ConfigError(
        f'column {self.names[j]!r} holds {codes[j]:g}; expected a code from 0 to {self.lengths[j] - 1}. The '
        'categorical columns come first, in the order of their description'
      )
    values = np.where(missing[count:], 0, (row[count:] - self.mean) / self.std)
    return np.concatenate([codes, values]).astype(np.float32), missing


def parse(entries, where: str) -> Columns:
  """Columns from their description; raises ConfigError, naming `where` it is from, for one that cannot be used."""
  lengths = [len(entry['categories']) for entry in entries if 'categories' in entry]
  rest = [entry for entry in entries if 'categories' not in entry]
  if any('categories' not in entry for entry in entries[: len(lengths)]):
    raise ConfigError(f'{where}: categorical columns must come first, found {[entry["name"] for entry in entries]}')
  for entry in rest:
    if not {'mean', 'std'} <= set(entry) or not entry['std'] > 0:
      raise ConfigError(f'{where}: continuous column {entry["name"]!r} needs a mean and a std above 0, found {entry}')
  mean, std = (np.array([entry[key] for entry in rest], np.float32) for key in ('mean', 'std'))
  return Columns(tuple(entry['name'] for entry in entries), tuple(lengths), mean, std)


@functools.lru_cache(maxsize=16)
def read(source: str) -> Columns:
  """The columns of a JSON file, or of 'synthetic:WORLD[/OPTIONS]', whose description needs no prepared data.

  Raises MissingData if there is no such file, ConfigError if it describes no table.
  """
  if source.startswith('synthetic:'):
    from mim_jax.data import worlds

    world, options, _ = worlds.parse(source)
    described = world.metadata(options)
  else:
    path = Path(source).expanduser()
    if not path.is_file():
      raise MissingData(
        f'there is no description of columns at {path.absolute()}; give the metadata.json of the data set '
        '(python -m mim_jax.data.csv_tables writes it) or synthetic:WORLD'
      )
    try:
      described = json.loads(path.read_text())
    except ValueError as error:
      raise ConfigError(f'{path} is no JSON: {error}') from error
  entries = described.get('table') if isinstance(described, dict) else described
  if not isinstance(entries, list) or not all(isinstance(entry, dict) and 'name' in entry for entry in entries):
    raise ConfigError(f'{source} describes no table: expected a list of columns, each with a name')
  return parse(entries, source)


CHECKS['columns'] = ("a path or 'synthetic:WORLD'", lambda v: isinstance(v, str) and bool(v))


@register(field='table')
def table(example, rng, columns, complete=False):
  """Codes and standardised values of the field `table`, 0 where lacking, and `missing`, which cells those are.

  columns: where they are described, a metadata.json or 'synthetic:WORLD'.
  complete: a lacking cell is an error, for who does not read `missing` and would take it for a 0.
  """
  described = read(columns)
  values, missing = described.encode(example['table'])
  if complete and missing.any():
    raise ConfigError(
      f'column {described.names[int(np.argmax(missing))]!r} lacks in a row that is to be complete; fill it in, or take '
      'complete=True out and let the method read the field `missing` (method.missing)'
    )
  return {**example, 'table': values, 'missing': missing}


def missing_cells(rows: int, columns: int, rate: float, how: str, order=(), seed: int = 0) -> np.ndarray:
  """Cells of a table that are taken away, bool [rows, columns] (TIP, arXiv 2407.07582, section 4.1).

  how: 'cells': int(rate * rows * columns) random cells. The others take int(rate * columns) columns from every row:
  'columns' random ones, 'most_important' and 'least_important' the first and the last of `order`, all columns by
  falling importance.
  """
  if how not in GENERATORS:
    raise ConfigError(f'missing cells of kind {how!r} are unknown; known: {", ".join(GENERATORS)}')
  if not 0 <= rate <= 1:
    raise ConfigError(f'a rate of missing cells of {rate}; expected 0 to 1')
  rng = np.random.Generator(np.random.Philox(key=[seed, 0]))
  gone = np.zeros((rows, columns), bool)
  if how == 'cells':
    gone.reshape(-1)[rng.permutation(rows * columns)[: int(rate * rows * columns)]] = True
    return gone
  if how == 'columns':
    order = rng.permutation(columns)
  elif sorted(order) != list(range(columns)):
    raise ConfigError(f'{how}: order {tuple(order)} must name each of the {columns} columns once')
  elif how == 'least_important':
    order = order[::-1]
  gone[:, list(order)[: int(rate * columns)]] = True
  return gone
