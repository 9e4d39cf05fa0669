import cv2
import numpy as np
import pytest

from mim_jax.data.worlds import build, tables

OPTIONS = {'size': 64, 'train': 8, 'validation': 4, 'seed': 0, 'missing': 0.1}


def decode(data):
  return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)


@pytest.fixture(scope='module')
def cars():
  """(attributes, rows) of two thousand cars, unrendered."""
  made = [tables.attributes(build.stream(0, 'tables/train', i)) for i in range(2000)]
  return {k: np.array([car[k] for car, _ in made]) for k in made[0][0]}, np.stack([row for _, row in made])


def test_an_example_is_a_function_of_seed_split_and_index():
  first = tables.example(OPTIONS, 'train', 7)
  again = tables.example({**OPTIONS, 'train': 10**6}, 'train', 7)
  assert all(np.array_equal(first[k], again[k], equal_nan=k == 'table') for k in first)
  assert first['row'] == 7
  for other in (tables.example(OPTIONS, 'validation', 7), tables.example({**OPTIONS, 'seed': 1}, 'train', 7)):
    assert other['image'] != first['image']


def test_size_changes_only_the_resolution_of_the_car():
  large = tables.example({**OPTIONS, 'size': 128}, 'train', 3)
  small = tables.example(OPTIONS, 'train', 3)
  assert decode(large['image']).shape == (128, 128, 3)
  np.testing.assert_array_equal(large['table'], small['table'])
  assert large['label'] == small['label']


def test_cells_lack_as_often_as_asked():
  for share in (0.0, 0.4):
    rows = np.stack(
      [tables.example({**OPTIONS, 'missing': share, 'size': 16}, 'train', i)['table'] for i in range(300)]
    )
    assert np.isnan(rows).mean() == pytest.approx(share, abs=0.03)
    assert np.isnan(rows).any(0).all() == (share > 0)


def test_neither_field_tells_the_class_alone(cars):
  """The picture shows nothing of the trim; a nearest-mean classifier of the continuous columns confuses bodies."""
  car, rows = cars
  label = 3 * car['body'] + car['trim']
  assert np.bincount(label, minlength=12).min() > 100
  for seen in ('colour', 'ground'):  # what else the picture shows is independent of the trim
    counts = np.array([np.bincount(car[seen][car['trim'] == t], minlength=4) for t in range(3)])
    assert np.abs(counts / counts.sum(1, keepdims=True) - counts.sum(0) / counts.sum()).max() < 0.06
  for continuous in ('age', 'length'):
    means = [car[continuous][car['trim'] == t].mean() for t in range(3)]
    assert np.ptp(means) < 0.15 * car[continuous].std()
  right = rows[:, 2] == car['body']
  assert 0.58 < right.mean() < 0.67  # half, and a quarter of the other half
  height = rows[:, 6]
  nearest = np.argmin(np.abs(height[:, None] - np.array(tables.HEIGHTS)), axis=1)
  assert 0.4 < (nearest == car['body']).mean() < 0.75


def test_the_picture_shows_colour_length_and_ground():
  errors, lengths = [], []
  for i in range(40):
    rng = build.stream(0, 'tables/train', i)
    car, _ = tables.attributes(rng)
    image = tables.picture({**car, 'ground': 3, 'colour': 0, 'age': 0}, rng, 64).astype(float) / 255
    red = (image[..., 0] > 2 * image[..., 1]) & (image[..., 0] > 0.3)
    errors.append(np.abs(image[red].mean(0) / image[red].mean(0)[0] - np.array([1, 0.15, 0.15])).max())
    lengths.append((np.ptp(np.nonzero(red)[1]) / 64, car['length']))
  assert np.max(errors) < 0.15
  assert np.corrcoef(np.array(lengths).T)[0, 1] > 0.9


def test_columns_are_described_with_their_statistics(cars):
  _, rows = cars
  columns = tables.WORLD.metadata(OPTIONS)['table']
  assert [column['name'] for column in columns] == list(tables.COLUMNS)
  for j, column in enumerate(columns):
    if 'categories' in column:
      assert set(rows[:, j]) == set(range(len(column['categories'])))
    else:
      standard = (rows[:, j] - column['mean']) / column['std']
      assert abs(standard.mean()) < 0.1 and standard.std() == pytest.approx(1, abs=0.1)
