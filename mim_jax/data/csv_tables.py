"""Images and a CSV file with a row for each -> a data set in the layout of TFDS: image, table, label and row.

  python -m mim_jax.data.csv_tables adverts.csv --images=pictures --image=file --label=model --name=dvm_car \\
    --categorical=colour,body,gearbox,fuel --continuous=wheelbase,height,width,length,year,price \\
    --jitter=wheelbase,height,width,length --jitter_by=50 --data_dir=~/tensorflow_datasets

Then `data.source = 'tfds:dvm_car:train'`, and the transform `table('DATA_DIR/dvm_car/1.0.0/metadata.json')` encodes
the rows. An empty cell of the file lacks. Means and deviations are those of the training split. Splits are those that
the column `--split` names, or are drawn class by class: half of the examples for test, a fifth of the rest for
validation (TIP, arXiv 2407.07582, section 4).
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np

from mim_jax.data.worlds import build
from mim_jax.errors import ConfigError, MissingData, UserError, nearest

SPLITS = ('train', 'validation', 'test')
VERSION = '1.0.0'


def encode(rows, categorical, continuous, jitter=(), jitter_by=0, seed=0):
  """Text cells -> (raw table [n, N] float32, NaN where a cell is empty; sorted categories of each categorical column).

  Args:
    rows: dicts of text by column name.
    categorical, continuous: names of columns, in the order they get.
    jitter: continuous columns that get a whole number uniform in [-jitter_by, jitter_by] added, so that they do not
      identify a class.
  """
  categories = {name: sorted({row[name] for row in rows if row[name]}) for name in categorical}
  code = {name: {value: i for i, value in enumerate(values)} for name, values in categories.items()}

  def number(row, name):
    try:
      return float(row[name]) if row[name] else np.nan
    except ValueError:
      raise ConfigError(
        f'column {name!r} is to be continuous and holds {row[name]!r}; name it in --categorical'
      ) from None

  columns = [[code[name].get(row[name], np.nan) for row in rows] for name in categorical]
  columns += [[number(row, name) for row in rows] for name in continuous]
  table = np.array(columns, np.float64).T
  rng = np.random.Generator(np.random.Philox(key=[seed, 0]))
  for name in jitter:
    table[:, len(categorical) + continuous.index(name)] += rng.integers(-jitter_by, jitter_by, len(rows), endpoint=True)
  return table.astype(np.float32), categories


def draw_splits(labels, test=0.5, validation=0.2, seed=0) -> np.ndarray:
  """Name of the split of each example: of every class the share `test`, and of its rest the share `validation`."""
  rng = np.random.Generator(np.random.Philox(key=[seed, 1]))
  split = np.full(len(labels), 'train', object)
  for label in np.unique(labels):
    members = rng.permutation(np.flatnonzero(labels == label))
    tested = round(test * len(members))
    split[members[:tested]] = 'test'
    split[members[tested : tested + round(validation * (len(members) - tested))]] = 'validation'
  return split


def world_of(name, images, table, labels, classes, splits, described):
  """A `build.World` of these examples; what its example needs is in memory, so it is written by one process."""
  members = {split: np.flatnonzero(splits == split) for split in SPLITS}

  def example(options, split, index):
    i = members[split][index]
    return {'image': Path(images[i]).read_bytes(), 'label': int(labels[i]), 'table': table[i], 'row': index}

  def features(options):
    import tensorflow_datasets as tfds

    return {
      'image': tfds.features.Image(shape=(None, None, 3)),
      'label': tfds.features.ClassLabel(names=list(classes)),
      'table': tfds.features.Tensor(shape=(table.shape[1],), dtype=np.float32),
      'row': tfds.features.Scalar(dtype=np.int64),
    }

  sizes = {split: len(rows) for split, rows in members.items()}
  return build.World(
    name, VERSION, f'Images and table rows, {len(labels)} examples', sizes, {}, SPLITS, features, example, described
  )


def prepare(
  path, images, image, label, categorical, continuous, name, data_dir, split='', jitter=(), jitter_by=0, seed=0
):
  """Writes the data set and gives its folder. Raises UserError for a file that does not fit the arguments."""
  path, images = Path(path).expanduser(), Path(images).expanduser()
  if not path.is_file():
    raise MissingData(f'there is no {path.absolute()}; give a CSV file with a header')
  with path.open(newline='') as file:
    rows = list(csv.DictReader(file))
  if not rows or not categorical or not continuous:
    raise UserError(
      f'{path} has {len(rows)} rows, --categorical={categorical}, --continuous={continuous}: none may be empty'
    )
  for wanted in (image, label, *filter(None, [split]), *categorical, *continuous):
    if wanted not in rows[0]:
      raise UserError(f'{path} has no column {wanted!r}; {nearest(wanted, rows[0])}')
  if set(jitter) - set(continuous):
    raise UserError(f'--jitter={tuple(jitter)}: only continuous columns can be varied, {", ".join(continuous)}')
  files = [images / row[image] for row in rows]
  absent = [str(file) for file in files if not file.is_file()]
  if absent:
    raise MissingData(
      f'{len(absent)} of {len(files)} images are not there, the first {absent[0]}; --images is where they lie'
    )
  table, categories = encode(rows, categorical, continuous, jitter, jitter_by, seed)
  classes = sorted({row[label] for row in rows})
  labels = np.array([classes.index(row[label]) for row in rows])
  splits = np.array([row[split] for row in rows], object) if split else draw_splits(labels, seed=seed)
  if set(splits) - set(SPLITS) or 'train' not in splits:
    raise UserError(
      f'{path}: column {split!r} holds {sorted(set(splits))}; expected {", ".join(SPLITS)}, train among them'
    )
  train = table[splits == 'train', len(categorical) :].astype(np.float64)
  mean, std = np.nanmean(train, axis=0), np.nanstd(train, axis=0)
  if not (std > 0).all():
    raise UserError(f'column {continuous[int(np.argmin(std > 0))]!r} does not vary in the training split; leave it out')
  columns = [{'name': n, 'categories': values} for n, values in categories.items()]
  columns += [{'name': n, 'mean': float(m), 'std': float(s)} for n, m, s in zip(continuous, mean, std, strict=True)]
  world = world_of(name, files, table, labels, classes, splits, lambda options: {'table': columns})
  return build.prepare(world, world.options(), Path(data_dir).expanduser() / name / VERSION, workers=1)


def main(argv=None):
  parser = argparse.ArgumentParser(prog='python -m mim_jax.data.csv_tables', description=__doc__.splitlines()[0])
  names = lambda text: tuple(part for part in text.split(',') if part)
  parser.add_argument('path', metavar='FILE.csv')
  parser.add_argument('--images', required=True, help='folder that the paths in the file start from')
  parser.add_argument('--image', required=True, help='column with the path of the image')
  parser.add_argument('--label', required=True, help='column with the class')
  parser.add_argument('--categorical', required=True, type=names, help='columns, separated by commas')
  parser.add_argument('--continuous', required=True, type=names, help='columns, separated by commas')
  parser.add_argument('--name', required=True, help='of the data set')
  parser.add_argument('--data_dir', default='~/tensorflow_datasets')
  parser.add_argument('--split', default='', help='column that names the split; drawn class by class by default')
  parser.add_argument('--jitter', default=(), type=names, help='continuous columns that are varied')
  parser.add_argument('--jitter_by', default=0, type=int, help='by at most this whole number')
  parser.add_argument('--seed', default=0, type=int, help='of splits and variation')
  try:
    print(prepare(**vars(parser.parse_args(argv))))
  except UserError as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  main()
