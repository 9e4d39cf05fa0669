import numpy as np
import pytest

from mim_jax.data import images
from mim_jax.errors import ConfigError


def run(text, example, seed=0):
  return images.parse(text).example(example, np.random.default_rng(seed))


def image(channels=3, size=8):
  return (np.arange(size * size * channels) % 251).reshape(size, size, channels).astype(np.uint8)


def test_channels_are_numbered_and_filled_up():
  made = run('type_channels(pad=5)', {'image': image(3), 'label': 1})
  assert made['image'].shape == (8, 8, 5) and made['label'] == 1
  np.testing.assert_array_equal(made['image'][..., :3], image(3))
  assert not made['image'][..., 3:].any()
  assert made['channel_ids'].tolist() == [0, 1, 2, -1, -1] and made['channel_ids'].dtype == np.int32
  assert made['channel_valid'].tolist() == [True, True, True, False, False]
  assert run('type_channels', {'image': image(3)})['channel_valid'].all()


def test_ids_of_the_source_are_kept_and_its_padding_is_made_anew():
  example = {'image': image(4), 'channel_ids': np.array([7, -1, 2, -1])}
  made = run('type_channels(pad=3)', example)
  assert made['channel_ids'].tolist() == [7, 2, -1]
  np.testing.assert_array_equal(made['image'][..., :2], image(4)[..., [0, 2]])


def test_some_channels_are_picked_by_their_type():
  example = {'image': image(4), 'channel_ids': np.array([7, 4, 2, -1])}
  made = run('pick_channels((2, 7, 9))', example)
  assert made['channel_ids'].tolist() == [7, 2]
  np.testing.assert_array_equal(made['image'], image(4)[..., [0, 2]])
  assert run('pick_channels((2,), pad=4)', example)['channel_ids'].tolist() == [2, -1, -1, -1]


def test_fields_are_joined():
  example = {'radar': image(2), 'light': image(3)}
  made = run("join_channels(('radar', 'light')) | type_channels", example)
  assert made['image'].shape == (8, 8, 5) and made['channel_ids'].tolist() == [0, 1, 2, 3, 4]


def test_all_eight_turns_come_up():
  seen = {run('dihedral', {'image': image(2)}, seed)['image'].tobytes() for seed in range(100)}
  assert len(seen) == 8
  assert (
    np.sort(run('dihedral', {'image': image(2)}, 3)['image'], axis=None).tobytes()
    == np.sort(image(2), axis=None).tobytes()
  )


def test_each_type_has_its_statistics_and_padding_stays_zero():
  chain = images.parse('normalize_channels(((0.0, 0.5, 0.25), (1.0, 0.5, 0.25)))')
  batch = {
    'image': np.full((2, 4, 4, 2), 255, np.uint8),
    'channel_ids': np.array([[2, 0], [1, -1]], np.int32),
  }
  made = chain.batch(batch)['image']
  assert made.dtype == np.float32
  np.testing.assert_allclose(made[:, 0, 0], [[3.0, 1.0], [1.0, 0.0]], rtol=1e-6)
  whole = chain.batch({'image': np.full((2, 4, 4, 3), 1.0, np.float32)})['image']
  np.testing.assert_allclose(whole[0, 0, 0], [1.0, 1.0, 3.0], rtol=1e-6)
  shown = chain.batch({'image': np.zeros((1, 4, 4, 2), np.uint8)})['image']
  np.testing.assert_allclose(shown, -0.25 / (1.75 / 3), rtol=1e-5)


def test_published_statistics_have_a_value_per_type():
  for name, types in (('so2sat', 18), ('chammi', 12)):
    mean, std = images.STATS[name]
    assert len(mean) == len(std) == types and min(std) > 0


@pytest.mark.parametrize(
  ('text', 'example', 'message'),
  [
    ('type_channels(pad=2)', {'image': image(3)}, '3 channels.*the 2'),
    ('type_channels', {'image': image(3), 'channel_ids': np.arange(2)}, r'\(2,\).*3 channels'),
    ('pick_channels((5, 6))', {'image': image(3)}, r'\(0, 1, 2\), none'),
    ("join_channels(('a', 'image'))", {'image': image(3)}, 'a not found.*image'),
  ],
)
def test_what_does_not_fit_is_told(text, example, message):
  with pytest.raises(ConfigError, match=message):
    run(text, example)


def test_unknown_types_and_wrong_options_are_errors():
  chain = images.parse('normalize_channels(((0.0, 0.5), (1.0, 0.5)))')
  with pytest.raises(ConfigError, match='2 types.*type 4'):
    chain.batch({'image': np.zeros((1, 4, 4, 1), np.uint8), 'channel_ids': np.array([[4]])})
  with pytest.raises(ConfigError, match='keep must be'):
    images.parse('pick_channels((1, 1))')
