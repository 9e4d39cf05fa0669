"""The world of volumes: a function of its index, labels where the organs are, and no shortcut."""

import numpy as np
import pytest

from mim_jax.data import sources, worlds
from mim_jax.data.worlds import organs

OPTIONS = organs.WORLD.options(size=32)
CLASSES = 1 + len(organs.ORGANS)


@pytest.fixture(scope='module')
def examples():
  return [organs.example(OPTIONS, 'train', i) for i in range(40)]


def test_an_example_is_a_function_of_seed_split_and_index(examples):
  again = organs.example({**OPTIONS, 'train': 10**6}, 'train', 7)
  assert all(np.array_equal(again[name], examples[7][name]) for name in again)
  for other in (organs.example(OPTIONS, 'validation', 7), organs.example({**OPTIONS, 'seed': 1}, 'train', 7)):
    assert not np.array_equal(other['image'], examples[7]['image'])


def test_findings_are_in_the_volumes(examples):
  names = [organs.FINDINGS[e['label']] for e in examples]
  assert set(names) == set(organs.FINDINGS)
  share = lambda e, organ: np.mean(e['mask'] == 1 + list(organs.ORGANS).index(organ))
  for e, name in zip(examples, names, strict=True):
    kidneys = sum(share(e, organ) > 0 for organ in ('left kidney', 'right kidney'))
    assert kidneys == (1 if name == 'one kidney' else 2)
    assert all(share(e, organ) > 0 for organ in ('liver', 'spleen', 'aorta'))
  spleens = {
    name: np.mean([share(e, 'spleen') for e, n in zip(examples, names, strict=True) if n == name])
    for name in set(names)
  }
  assert spleens['large spleen'] > 1.6 * spleens['none']


def _dice(found, examples):
  tables = []
  for e, labels in zip(examples, found, strict=True):
    both = [np.sum((labels == c) & (e['mask'] == c)) for c in range(1, CLASSES)]
    sizes = [np.sum(labels == c) + np.sum(e['mask'] == c) for c in range(1, CLASSES)]
    tables.append(2 * np.array(both) / np.maximum(sizes, 1))
  return np.mean(tables)


def test_neither_grey_values_nor_places_tell_the_organs(examples):
  """Tables of the best class per grey value and per voxel, with classes weighed alike, as else background wins."""
  greys, places = np.zeros((256, CLASSES)), np.zeros((32, 32, 32, CLASSES))
  for e in examples[:30]:
    np.add.at(greys, (e['image'][..., 0].ravel(), e['mask'].ravel()), 1)
    places += np.eye(CLASSES)[e['mask']]
  greys, places = greys / greys.sum(0), places / places.sum((0, 1, 2))
  held_out = examples[30:]
  assert _dice([greys.argmax(1)[e['image'][..., 0]] for e in held_out], held_out) < 0.15
  assert _dice([places.argmax(-1)] * len(held_out), held_out) < 0.45


def test_read_back(tmp_path):
  spec = 'organs/size=16,train=3,validation=1'
  worlds.prepare(spec, tmp_path, workers=1)
  source = sources.open_source(f'synthetic:{spec}:train', str(tmp_path))
  assert len(source) == 3 and source.classes('label') == 4
  assert source.features['image'].shape == (16, 16, 16, 1)
  expected = organs.example(organs.WORLD.options(size=16), 'train', 2)
  for name, value in source[2].items():
    np.testing.assert_array_equal(value, expected[name])
