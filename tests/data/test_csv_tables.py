import csv
import json

import cv2
import numpy as np
import pytest

from mim_jax.data import csv_tables, sources, tables
from mim_jax.errors import MissingData, UserError

HEADER = ['file', 'model', 'colour', 'gearbox', 'width', 'price']


@pytest.fixture
def adverts(tmp_path):
  """A folder with 40 pictures and a CSV file; arguments for it."""
  rng = np.random.default_rng(0)
  with (tmp_path / 'adverts.csv').open('w', newline='') as file:
    writer = csv.writer(file)
    writer.writerow(HEADER)
    for i in range(40):
      cv2.imwrite(str(tmp_path / f'{i}.png'), np.full((6 + i % 3, 8, 3), 5 * i, np.uint8))
      colour = '' if i % 8 == 0 else ['red', 'blue', 'black'][i % 3]
      writer.writerow(
        [f'{i}.png', 'ab'[i % 2], colour, ['auto', 'manual'][i % 2], 1800 + i, rng.normal() if i % 5 else '']
      )
  return dict(
    path=tmp_path / 'adverts.csv',
    images=tmp_path,
    image='file',
    label='model',
    categorical=('colour', 'gearbox'),
    continuous=('width', 'price'),
    name='adverts',
    data_dir=tmp_path / 'tfds',
  )


def test_a_file_becomes_a_data_set_that_the_transform_reads(adverts):
  folder = csv_tables.prepare(**adverts)
  described = json.loads((folder / 'metadata.json').read_text())['table']
  assert described[0] == {'name': 'colour', 'categories': ['black', 'blue', 'red']}
  found = [sources.open_source(f'tfds:adverts:{s}', str(adverts['data_dir'])) for s in ('train', 'validation', 'test')]
  assert [len(source) for source in found] == [16, 4, 20]
  assert found[0].classes('label') == 2
  columns = tables.read(str(folder / 'metadata.json'))
  rows = [columns.encode(found[0][i]['table']) for i in range(16)]
  assert [found[0][i]['row'] for i in range(16)] == list(range(16))
  values, missing = (np.stack(part) for part in zip(*rows, strict=True))
  for j in (2, 3):
    present = values[~missing[:, j], j]
    assert abs(present.mean()) < 1e-4 and present.std() == pytest.approx(1, abs=1e-4)
  assert missing.any(0).tolist() == [True, False, False, True]


def test_splits_of_the_file_and_variation(adverts, tmp_path):
  rows = list(csv.DictReader(adverts['path'].open()))
  with adverts['path'].open('w', newline='') as file:
    writer = csv.DictWriter(file, [*HEADER, 'part'])
    writer.writeheader()
    writer.writerows([{**row, 'part': 'train' if i < 30 else 'test'} for i, row in enumerate(rows)])
  csv_tables.prepare(**adverts, split='part', jitter=('width',), jitter_by=50)
  train = sources.open_source('tfds:adverts:train', str(adverts['data_dir']))
  width = np.array([train[i]['table'][2] for i in range(30)])
  moved = width - 1800 - np.arange(30)
  assert len(train) == 30 and np.abs(moved).max() <= 50 and len(set(moved)) > 15
  np.testing.assert_array_equal(moved, np.round(moved))


def test_splits_are_drawn_class_by_class():
  labels = np.repeat([0, 1], [100, 20])
  split = csv_tables.draw_splits(labels)
  for label, count in ((0, 100), (1, 20)):
    mine = split[labels == label]
    assert [(mine == s).sum() for s in ('test', 'validation')] == [count // 2, count // 10]


@pytest.mark.parametrize(
  'given, words',
  [
    ({'label': 'modl'}, "did you mean 'model'"),
    ({'continuous': ('colour',)}, 'name it in --categorical'),
    ({'categorical': ()}, 'none may be empty'),
    ({'jitter': ('colour',)}, 'only continuous'),
  ],
)
def test_arguments_that_do_not_fit_say_so(adverts, given, words):
  with pytest.raises(UserError, match=words):
    csv_tables.prepare(**{**adverts, **given})


def test_absent_pictures_are_named(adverts):
  (adverts['images'] / '7.png').unlink()
  with pytest.raises(MissingData, match=r'1 of 40 images.*7\.png'):
    csv_tables.prepare(**adverts)
