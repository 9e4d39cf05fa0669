"""Grids, panels and curves: the right pixels in the right places."""

import cv2
import numpy as np
import pytest

from mim_jax.log import pictures


def images(rng, *shape):
  return rng.integers(0, 256, shape, dtype=np.uint8)


def find(page, image, factor):
  """Top left corner of `image`, enlarged by `factor`, in `page`; fails when it is not there pixel for pixel."""
  large = np.kron(image, np.ones((factor, factor, 1), np.uint8))
  score = cv2.matchTemplate(page, large, cv2.TM_SQDIFF)
  y, x = np.unravel_index(score.argmin(), score.shape)
  assert (page[y : y + large.shape[0], x : x + large.shape[1]] == large).all()
  return int(y), int(x)


def test_to_uint8_undoes_normalisation(rng):
  pixels = images(rng, 5, 8, 8, 3)
  mean, std = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
  normalised = (pixels / np.float32(255) - mean) / std
  assert (pictures.to_uint8(normalised, mean, std) == pixels).all()
  assert (pictures.to_uint8(pixels) == pixels).all()


def test_to_uint8_of_other_values():
  assert pictures.to_uint8(np.array([-1.0, 0.5, 2.0, np.nan, np.inf])).tolist() == [0, 128, 255, 0, 255]
  assert pictures.to_uint8(np.array([True, False])).tolist() == [255, 0]
  with pytest.raises(ValueError, match='uint16'):
    pictures.to_uint8(np.zeros(3, np.uint16))


def test_visible_shows_any_number_of_channels_and_slices(rng):
  grey = images(rng, 40, 40)
  assert (pictures.visible(grey) == grey[..., None]).all() and pictures.visible(grey).shape == (40, 40, 3)
  assert (pictures.visible(grey[..., None]) == grey[..., None]).all()
  colour = images(rng, 40, 40, 3)
  assert (pictures.visible(colour) == colour).all()
  five = images(rng, 40, 40, 5)
  mosaic = pictures.visible(five)
  assert mosaic.shape == (2 * 40 + 1, 3 * 40 + 2, 3)
  assert (mosaic[41:, 41:81] == five[..., 4:]).all()
  assert (mosaic[41:, 82:] == 255).all()
  assert pictures.visible(images(rng, 40, 40, 200)).shape == (4 * 40 + 3, 4 * 40 + 3, 3)
  volume = images(rng, 30, 40, 40, 1)
  mosaic = pictures.visible(volume)
  assert mosaic.shape == (3 * 40 + 2, 3 * 40 + 2, 3)
  assert (mosaic[41:81, 41:81] == volume[15]).all()  # the middle slice is in the middle
  with pytest.raises(ValueError, match='shape'):
    pictures.visible(np.zeros(3))


def test_panel_has_a_row_per_example_and_a_column_per_title(rng):
  columns = {'input': images(rng, 3, 32, 32, 3), 'prediction': images(rng, 3, 32, 32, 3)}
  page = pictures.panel(columns, count=2)
  corners = {(title, i): find(page, columns[title][i], 5) for title in columns for i in range(2)}
  assert corners['input', 0][0] == corners['prediction', 0][0] < corners['input', 1][0] == corners['prediction', 1][0]
  assert corners['input', 0][1] == corners['input', 1][1] < corners['prediction', 0][1]
  assert page.dtype == np.uint8 and (page[0] == 255).all() and (page[-1] == 255).all() and (page[:, -1] == 255).all()
  assert page.shape[0] < corners['input', 1][0] + 160 + 20  # the third example is not there


def test_texts_stand_where_they_belong(rng):
  columns = {'input': images(rng, 2, 32, 32, 3), 'pasted': images(rng, 2, 32, 32, 3)}
  page = pictures.panel(columns, labels=['cup', 'bicycle'])
  tops, lefts = zip(*(find(page, columns[title][i], 5) for title in columns for i in range(2)), strict=True)
  dark = page.min(axis=-1) < 100
  for x in lefts:
    assert dark[: tops[0] - 1, x : x + 160].any()  # a title over each column
  for y in tops[:2]:
    assert dark[y : y + 160, : lefts[0] - 1].any()  # a label left of each row
  assert not dark[: tops[0] - 1, : lefts[0] - 1].any()
  bare = pictures.grid([[image] for image in columns['input']])
  assert not (bare[: find(bare, columns['input'][0], 5)[0] - 1] < 255).any()


def test_columns_of_other_sizes_and_kinds_get_the_same_height(rng):
  image, mask = images(rng, 1, 64, 64, 3), rng.random((1, 8, 8)) < 0.5
  page = pictures.panel({'input': image, 'mask': mask, 'volume': images(rng, 1, 9, 16, 16, 1)})
  y, x = find(page, image[0], 2)
  assert find(page, pictures.visible(mask[0]), 16)[0] == y
  wide = pictures.grid([[images(rng, 20, 80, 3)]])
  assert wide.shape == (40 + 2 * pictures.GAP, 160 + 2 * pictures.GAP, 3)
  large = pictures.grid([[images(rng, 1000, 500, 3)]])
  assert large.shape == (384 + 2 * pictures.GAP, 192 + 2 * pictures.GAP, 3)


def test_long_titles_and_captions_widen_their_column(rng):
  image = images(rng, 32, 32, 3)
  title = 'prediction of what the encoder never saw'
  page = pictures.grid([[image, (image, 'class 3')], [image]], titles=[title, 'b'])
  assert page.shape[1] > 160 * 2 + 3 * pictures.GAP + 60
  ink = (page[: pictures.LINE + pictures.GAP].min(axis=(0, 2)) < 100).nonzero()[0]
  assert ink.min() >= pictures.GAP and ink.max() < page.shape[1] - pictures.GAP


def test_what_cannot_be_shown_is_refused(rng):
  with pytest.raises(ValueError, match='at least one'):
    pictures.grid([[]])
  with pytest.raises(ValueError, match="'b': 3"):
    pictures.panel({'a': images(rng, 2, 8, 8, 3), 'b': images(rng, 3, 8, 8, 3)})
  with pytest.raises(ValueError, match='float64'):
    pictures.save('x.png', np.zeros((3, 3)))
  with pytest.raises(ValueError, match='expected uint8'):
    pictures.save('x.png', np.zeros((3, 3, 4), np.uint8))


def test_save_makes_folders_and_leaves_no_part(tmp_path, rng):
  image = images(rng, 7, 9, 3)
  pictures.save(tmp_path / 'a' / 'b.png', image)
  assert (cv2.imread(str(tmp_path / 'a' / 'b.png'))[..., ::-1] == image).all()
  assert [path.name for path in (tmp_path / 'a').iterdir()] == ['b.png']


def test_running_mean_against_its_definition(rng):
  y = rng.standard_normal(60)
  y[20:24] = np.nan
  expected = []
  for i in range(60):
    reach = min(5, i)
    around = y[i - reach : i + reach + 1]
    expected.append(np.nan if np.isnan(y[i]) else np.nanmean(around))
  np.testing.assert_allclose(pictures._running_mean(y, 5), expected, rtol=1e-12)


def colour_columns(page, colour, tolerance=12):
  rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
  return (np.abs(page.astype(int) - rgb).max(axis=-1) <= tolerance).any(axis=0)


def test_curve_draws_each_run_and_leaves_gaps(tmp_path, rng):
  x = np.arange(0, 4000, 10)
  y = np.exp(-x / 800) + 0.05 * rng.random(len(x))
  gap = np.where((x > 1500) & (x < 2500), np.nan, y)
  page = pictures.curve({'whole': (x, y), 'gap': (x, gap + 0.5)}, tmp_path / 'c.png', title='t', log_y=True)
  assert (cv2.imread(str(tmp_path / 'c.png'))[..., ::-1] == page).all()
  whole, broken = (colour_columns(page, colour) for colour in pictures.COLORS[:2])
  width = page.shape[1]
  assert whole[width // 3 : 2 * width // 3].mean() > 0.9
  assert broken[width // 8 : width // 4].mean() > 0.9
  assert broken[int(0.46 * width) : int(0.58 * width)].mean() < 0.1
  assert page.dtype == np.uint8 and page.shape[1] > page.shape[0] > 300


def test_curve_of_few_points_and_of_none():
  few = pictures.curve({'a': ([0, 10], [0.1, 0.2]), 'b': ([5], [0.3])})
  assert colour_columns(few, pictures.COLORS[1]).any()  # a single point is a dot
  assert pictures.curve({}).shape == few.shape
