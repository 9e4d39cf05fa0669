"""Transforms of volumes: where crops lie, that masks move along, values."""

import numpy as np
import pytest

from mim_jax.data import folder, images, pipeline
from mim_jax.errors import ConfigError


def example(sides=(12, 10, 14), seed=0, channels=True):
  """A volume whose voxels are all different, with the same numbers as its mask."""
  values = np.random.default_rng(seed).permutation(np.prod(sides)).reshape(sides).astype(np.int16)
  return {'image': values[..., None] if channels else values, 'mask': values}


def through(text, given, seed=0):
  return images.parse(text).example(given, np.random.default_rng(seed))


def agree(made):
  np.testing.assert_array_equal(made['image'][..., 0], made['mask'])
  return made['mask']


def test_center_crop_is_in_the_middle():
  given = example()
  made = agree(through('crop_3d((4, 6, 8))', given))
  np.testing.assert_array_equal(made, given['mask'][4:8, 2:8, 3:11])
  assert agree(through('crop_3d(4)', example(channels=False))).shape == (4, 4, 4)


@pytest.mark.parametrize('move', ['random_crop_3d(6)', 'flip_3d(p=0.5)', 'crop_3d(10) | rot90_3d(p=1.0)', 'pad_3d(16)'])
def test_masks_move_with_images(move):
  given = example()
  made = [agree(through(move, given, seed)) for seed in range(8)]
  assert move.startswith('pad') or len({m.tobytes() for m in made}) > 2
  assert all(set(np.unique(m)) <= set(np.unique(given['mask'])) for m in made)


def test_flips_take_each_axis_with_its_own_draw():
  given = example()
  found = {agree(through('flip_3d(p=0.5)', given, seed)).tobytes() for seed in range(60)}
  assert len(found) == 8
  np.testing.assert_array_equal(agree(through('flip_3d(p=1)', given)), given['mask'][::-1, ::-1, ::-1])


def test_turns_are_about_the_last_axis():
  given = example((6, 6, 3))
  found = {agree(through('rot90_3d(p=1)', given, seed)).tobytes() for seed in range(30)}
  assert found == {np.rot90(given['mask'], k).tobytes() for k in (1, 2, 3)}
  with pytest.raises(ConfigError, match='rot90_3d got 12 x 10'):
    through('rot90_3d(p=1)', example())


@pytest.mark.parametrize('by', ['image', 'mask'])
def test_a_crop_is_around_the_kind_of_voxel_that_was_asked_for(by):
  values = np.zeros((20, 20, 20), np.int16)
  values[12:15, 9, 11] = 5
  given = {'image': values[..., None], 'mask': values}
  at = lambda p, seed: agree(through(f'random_crop_3d(5, p={p}, by={by!r})', given, seed))
  assert all(at(1.0, seed)[2, 2, 2] == 5 for seed in range(20))
  assert all(at(0.0, seed)[2, 2, 2] == 0 for seed in range(20))
  shares = np.mean([at(0.75, seed)[2, 2, 2] == 5 for seed in range(400)])
  assert 0.68 < shares < 0.82
  nothing = through('random_crop_3d(5, p=1.0, above=9)', given)  # no voxel is above 9: any place will do
  assert nothing['image'].shape == (5, 5, 5, 1)


def test_crops_at_the_border_are_moved_inside_and_reach_every_corner():
  values = np.zeros((8, 8, 8), np.uint8)
  values[0, 0, 0] = values[-1, -1, -1] = 1
  given = {'image': values[..., None], 'mask': np.arange(512).reshape(8, 8, 8)}
  found = {int(through('random_crop_3d(4, p=1.0)', given, seed)['mask'][0, 0, 0]) for seed in range(30)}
  assert found == {0, np.arange(512).reshape(8, 8, 8)[4, 4, 4]}


def test_padding_puts_the_volume_in_the_middle():
  given = example((4, 9, 5))
  made = through('pad_3d((8, 8, 6), value=-7)', given)
  assert made['image'].shape == (8, 9, 6, 1) and made['mask'].shape == (8, 9, 6)
  np.testing.assert_array_equal(made['image'][2:6, :, :5], given['image'])
  assert (made['image'][:2] == -7).all() and not made['mask'][:2].any()


def test_window_and_intensity():
  given = {'image': np.array([-1000, -175, 37, 250, 900], np.int16).reshape(5, 1, 1, 1)}
  chain = images.parse('window(-175, 250)')
  made = chain.batch({'image': given['image'][None]})['image']
  np.testing.assert_allclose(made.ravel(), [0, 0, 212 / 425, 1, 1], atol=1e-6)
  assert made.dtype == np.float32
  flat = {'image': np.full((2, 2, 2, 1), 0.5, np.float32)}
  found = [through('intensity_3d(0.1, p=0.5)', flat, seed)['image'][0, 0, 0, 0] for seed in range(1500)]
  assert min(found) >= 0.45 - 0.1 and max(found) <= 0.55 + 0.1 and 0.2 < np.mean(np.array(found) == 0.5) < 0.3
  with pytest.raises(ConfigError, match='write window or to_float before it'):
    through('intensity_3d', given)
  with pytest.raises(ConfigError, match='low must be less'):
    images.parse('window(2, 1)').batch(given)


def test_black_and_white_of_a_chain():
  levels = lambda text: [x.round(6).tolist() for x in images.parse(text).levels(2)]
  assert levels('crop_3d(4) | window(-175, 250)') == [[0, 0], [1, 1]]
  assert levels('crop_3d(4) | window(-175, 250) | intensity_3d') == [[0, 0], [1, 1]]
  assert levels('crop_3d(4) | to_float') == [[0, 0], [1, 1]]
  assert levels("crop_3d(4) | window(0, 9) | normalize('half')") == [[-1, -1], [1, 1]]


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('crop_3d(11)', r'crop_3d\(\(11, 11, 11\)\) got a volume of \(12, 10, 14\); write pad_3d'),
    ('random_crop_3d((2, 3))', 'sides must be a number of voxels or'),
    ("random_crop_3d(4, by='label')", "by must be 'image' or 'mask'"),
    ('intensity_3d(2.0)', 'amount must be a number from 0 to 1'),
    ("window('a', 1)", 'low must be a number'),
  ],
)
def test_wrong_options_and_sizes(text, words):
  with pytest.raises(ConfigError, match=words):
    through(text, example())
  with pytest.raises(ConfigError, match='a volume is'):
    through('pad_3d(4)', {'image': np.zeros((4, 4))})


def test_a_folder_of_volumes_is_mapped_and_only_crops_are_read(tmp_path):
  for name in 'ab':
    np.save(tmp_path / f'{name}.npy', example(channels=False)['image'])
  source = folder.FolderSource(tmp_path)
  assert isinstance(source[0]['image'], np.memmap)
  made = pipeline.Pipeline(source, images.parse('random_crop_3d(4) | window(0, 1680)'), 4, fields=('image',)).batch(0)
  assert made['image'].shape == (4, 4, 4, 4, 1) and made['image'].dtype == np.float32 and not made['corrupt'].any()
