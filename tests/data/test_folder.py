import cv2
import numpy as np
import pytest

from mim_jax.data import folder, images, pipeline, sources
from mim_jax.errors import ConfigError, MissingData


def write(path, image):
  path.parent.mkdir(parents=True, exist_ok=True)
  if path.suffix.lower() == '.npy':
    np.save(path, image)
  else:
    path.write_bytes(cv2.imencode(path.suffix.lower(), image)[1].tobytes())


def picture(channels=3, size=(10, 12), seed=0):
  return np.random.default_rng(seed).integers(0, 256, (*size, channels), np.uint8)


def test_every_kind_of_file_at_any_depth_in_sorted_order(tmp_path):
  names = ['b.PNG', 'a.jpg', 'deep/er/c.webp', 'deep/d.jpeg', 'deep/notes.txt', '.hidden.png', 'Z.png']
  for name in names:
    write(tmp_path / name, picture()) if not name.endswith('txt') else (tmp_path / name).write_text('no image')
  source = folder.FolderSource(tmp_path)
  assert source.paths == ['Z.png', 'a.jpg', 'b.PNG', 'deep/d.jpeg', 'deep/er/c.webp']
  assert source.key(3) == 'deep/d.jpeg'
  assert source[0]['image'] == (tmp_path / 'Z.png').read_bytes()  # encoded, for the decode transform
  assert source.features.keys() == {'image'} and source.features['image'].shape == (None, None, 3)


def test_first_level_folders_are_classes(tmp_path):
  for name in ('dog/1.png', 'cat/deep/2.png', 'cat/3.png', 'empty_class/readme.txt'):
    write(tmp_path / name, picture()) if name.endswith('png') else (tmp_path / name).parent.mkdir()
  source = folder.FolderSource(tmp_path)
  assert source.features['label'].names == ('cat', 'dog') and source.classes() == 2
  assert [int(e['label']) for e in source.getmany(range(3))] == [0, 0, 1]


@pytest.mark.parametrize('names', [('dog/1.png', 'cat/2.png', 'loose.png'), ('images/1.png', 'images/2.png')])
def test_no_labels_unless_folders_tell_images_apart(tmp_path, names):
  for name in names:
    write(tmp_path / name, picture())
  source = folder.FolderSource(tmp_path)
  assert source[0].keys() == {'image'}
  with pytest.raises(ConfigError, match='fields with classes: none'):
    source.classes()


@pytest.mark.parametrize('suffix', ['.npy', '.tif'])
def test_many_channels(tmp_path, suffix):
  shots = [picture(13, seed=k) for k in range(3)]
  for k, shot in enumerate(shots):
    path = tmp_path / f'{k}{suffix}'
    if suffix == '.tif':
      cv2.imwritemulti(str(path), [np.ascontiguousarray(shot[..., c]) for c in range(13)])
    else:
      write(path, shot)
  source = folder.FolderSource(tmp_path)
  assert source.features['image'].shape == (None, None, 13)
  made = pipeline.Pipeline(source, images.parse('random_crop(8) | flip'), 3, shuffle=False)
  assert made.batch(0)['image'].shape == (3, 8, 8, 13)
  np.testing.assert_array_equal(source[1]['image'], shots[1])


def test_grey_array_gets_a_channel_axis_and_a_volume_keeps_its_depth(tmp_path):
  write(tmp_path / 'grey' / '0.npy', picture(1)[..., 0])
  write(tmp_path / 'volume' / '0.npy', np.zeros((4, 5, 6, 2), np.int16))
  assert folder.FolderSource(tmp_path / 'grey')[0]['image'].shape == (10, 12, 1)
  volume = folder.FolderSource(tmp_path / 'volume')
  assert volume[0]['image'].shape == (4, 5, 6, 2)
  assert volume.features['image'] == sources.Feature((None, None, None, 2), np.dtype(np.int16))


def test_corrupt_files_are_tolerated_until_read(tmp_path):
  for k in range(6):
    write(tmp_path / f'{k}.png', picture(seed=k))
  whole = (tmp_path / '1.png').read_bytes()
  (tmp_path / '1.png').write_bytes(whole[: len(whole) // 2])
  (tmp_path / '3.png').write_bytes(b'')
  (tmp_path / '4.png').unlink()
  write(tmp_path / '4.npy', picture())
  (tmp_path / '5.npy').write_bytes(b'\x93NUMPY broken')
  source = folder.FolderSource(tmp_path)
  made = pipeline.Pipeline(source, images.parse('decode'), 7, shuffle=False)
  batch = made.batch(0)
  assert [source.key(i) for i in np.flatnonzero(batch['corrupt'])] == ['1.png', '3.png', '5.npy']
  assert [f.key for f in made.faults] == ['1.png', '3.png', '5.npy']


def test_missing_and_empty_folders(tmp_path):
  with pytest.raises(MissingData, match='is not a folder.*set data.source'):
    folder.FolderSource(tmp_path / 'nowhere')
  with pytest.raises(MissingData, match='holds no image.*.webp'):
    folder.FolderSource(tmp_path)
  (tmp_path / 'x.npy').write_bytes(b'broken')
  with pytest.raises(ConfigError, match='x.npy'):
    folder.FolderSource(tmp_path)


def test_a_link_in_a_circle_ends(tmp_path):
  write(tmp_path / 'a' / '1.png', picture())
  (tmp_path / 'a' / 'again').symlink_to(tmp_path)
  assert folder.FolderSource(tmp_path).paths == ['a/1.png']


def test_images_and_masks_in_folders_of_these_names_belong_together(tmp_path):
  for k, name in enumerate(('b', 'deep/a')):
    write(tmp_path / 'images' / f'{name}.jpg', picture(seed=k))
    write(tmp_path / 'masks' / f'{name}.png', picture(1, seed=k))
  source = folder.FolderSource(tmp_path)
  assert source.paths == ['images/b.jpg', 'images/deep/a.jpg'] and set(source.features) == {'image', 'mask'}
  for k, example in enumerate(source.getmany(range(2))):
    assert isinstance(example['image'], bytes)
    np.testing.assert_array_equal(example['mask'], picture(1, seed=k))
  write(tmp_path / 'images' / 'c.jpg', picture())
  with pytest.raises(ConfigError, match='3 images and 2 masks; images/c.jpg has none'):
    folder.FolderSource(tmp_path)
  write(tmp_path / 'masks' / 'c.png', picture(3))
  with pytest.raises(ConfigError, match='one whole number for each place'):
    folder.FolderSource(tmp_path)[1]


def test_volumes_with_masks(tmp_path):
  volume, mask = np.zeros((4, 5, 6), np.int16), np.ones((4, 5, 6), np.uint8)
  write(tmp_path / 'images' / '1.npy', volume)
  write(tmp_path / 'masks' / '1.npy', mask)
  source = folder.FolderSource(tmp_path)
  assert source.features['mask'] == sources.Feature((None,) * 3, np.dtype(np.uint8))
  np.testing.assert_array_equal(source[0]['mask'], mask)
  assert source[0]['image'].shape == (4, 5, 6)
