import numpy as np
import pytest

from mim_jax.data.worlds import stains

OPTIONS = {**stains.WORLD.defaults, 'train': 8, 'validation': 8}


@pytest.fixture(scope='module')
def examples():
  return [stains.example(OPTIONS, 'train', i) for i in range(200)]


def test_an_example_is_a_function_of_seed_split_and_index(examples):
  again = stains.example({**OPTIONS, 'train': 99}, 'train', 7)
  np.testing.assert_array_equal(again['image'], examples[7]['image'])
  for options, split, index in (
    (OPTIONS, 'train', 8),
    (OPTIONS, 'validation', 7),
    ({**OPTIONS, 'seed': 1}, 'train', 7),
  ):
    assert not np.array_equal(stains.example(options, split, index)['image'], examples[7]['image'])


def test_what_there_is(examples):
  e = examples[0]
  assert e['image'].shape == (32, 32, 6) and e['image'].dtype == np.uint8
  assert e['channel_ids'].tolist() == list(range(6))
  assert set(np.unique([e['label'] for e in examples])) == set(range(9))
  large = stains.example({**OPTIONS, 'size': 64}, 'train', 0)
  shrunk = large['image'].astype(float).reshape(32, 2, 32, 2, 6).mean((1, 3))
  assert np.abs(shrunk - e['image']).mean() < 3


def test_microscopes_have_other_channels():
  made = [stains.example({**OPTIONS, 'varying': True}, 'train', i) for i in range(60)]
  found = {tuple(e['channel_ids'].tolist()) for e in made}
  assert found == {(*types, *[-1] * (4 - len(types))) for types in stains.MICROSCOPES}
  for e in made:
    assert e['image'].shape == (32, 32, 4)
    assert not e['image'][..., e['channel_ids'] < 0].any() and e['image'][..., e['channel_ids'] >= 0].any((0, 1)).all()


def test_channels_follow_from_each_other_in_part_and_differ_in_what_they_tell():
  """The membrane is the outline of the body whatever the class; granules are not to be had from the nucleus."""
  correlation = lambda a, b: np.corrcoef(a.ravel(), b.ravel())[0, 1]
  rng = np.random.default_rng(0)
  outline, granules, bleed = [], [], []
  for i in range(40):
    nucleus, body, dots, membrane, mixed, _ = np.moveaxis(stains.channels(rng, i % 9), -1, 0)
    dy, dx = np.gradient(body)
    outline.append(correlation(np.hypot(dx, dy), membrane))
    granules.append(abs(correlation(nucleus, dots)))
    bleed.append(correlation(0.5 * nucleus + 0.5 * dots, np.roll(mixed, (-2, -1), (0, 1))))
  assert np.mean(outline) > 0.9 and np.mean(granules) < 0.3 and np.mean(bleed) > 0.9


def test_channel_means_do_not_tell_the_class():
  """Nearest class mean of the means and deviations of all channels, against one in nine."""
  sets = [[stains.example(OPTIONS, split, i) for i in range(900)] for split in ('train', 'validation')]
  x, y = zip(
    *[
      (
        np.stack([np.concatenate([e['image'].mean((0, 1)), e['image'].std((0, 1))]) for e in part]),
        np.array([e['label'] for e in part]),
      )
      for part in sets
    ],
    strict=True,
  )
  scale = x[0].std(0)
  middle = np.stack([x[0][y[0] == c].mean(0) for c in range(9)]) / scale
  guess = np.linalg.norm(x[1][:, None] / scale - middle, axis=-1).argmin(1)
  assert np.mean(guess == y[1]) < 0.35
