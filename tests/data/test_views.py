import numpy as np
import pytest

from mim_jax.data import decoding, images
from mim_jax.errors import ConfigError

SIDE = 96


def ramp(height=SIDE, width=SIDE):
  """Its two channels say where a pixel comes from: x and y over the image, as floats, so that views keep the place
  exactly.
  """
  y, x = np.mgrid[:height, :width].astype(np.float32) + 0.5
  return np.stack([x / width, y / height, np.ones_like(x)], axis=-1)


def views(text, example, seed=0):
  return images.parse(text).example(example, np.random.default_rng(seed))


def affine(image, axis):
  """(slope per pixel, value at the first pixel, largest error) of the channel that is linear along `axis`, 1 = x, 0 =
  y.
  """
  values = image[..., 0 if axis else 1].mean(1 - axis)
  place = np.arange(len(values))
  inner = slice(3, -3)  # scaled pixels at the edge repeat
  slope, start = np.polyfit(place[inner], values[inner], 1)
  return slope, start, np.abs(np.polyval([slope, start], place) - values)[inner].max()


@pytest.mark.parametrize('seed', range(12))
def test_the_local_view_is_a_window_of_the_global_one(seed):
  made = views('two_views(64, scale=(0.5, 1.0), p=0.0)', {'image': ramp()}, seed)['views']
  shares, spans = [], []
  for axis in (1, 0):  # x, then y
    whole, part = (affine(view, axis) for view in made)
    assert max(whole[2], part[2]) < 0.01
    low, high = (sorted([start, start + 63 * slope]) for slope, start, _ in (whole, part))
    assert high[0] > low[0] - 0.02 and high[1] < low[1] + 0.02
    shares.append(part[0] / whole[0])
    spans.append(abs(whole[0]) * 64)
  assert 0.28 < np.prod(shares) < 0.62
  assert 0.75 * 0.93 < shares[0] / shares[1] < 4 / 3 * 1.07
  assert 0.45 < np.prod(spans) < 1.02


def test_flips_are_independent_and_undo():
  plain = [views('two_views(32, p=0.0)', {'image': ramp()}, seed)['views'] for seed in range(40)]
  turned = [views('two_views(32, p=0.5)', {'image': ramp()}, seed)['views'] for seed in range(40)]
  flips = []
  for straight, other in zip(plain, turned, strict=True):
    flips.append([not np.array_equal(a, b) for a, b in zip(straight, other, strict=True)])
    for a, b, flipped in zip(straight, other, flips[-1], strict=True):
      np.testing.assert_array_equal(a, b[:, ::-1] if flipped else b)
  assert {tuple(f) for f in flips} == {(False, False), (False, True), (True, False), (True, True)}


def test_strategies():
  example = {'image': ramp(), 'label': 3}
  one = views('two_views(32)', example)
  swapped = views("two_views(32, strategy='local_to_global')", example)
  np.testing.assert_array_equal(one['views'], swapped['views'][::-1])
  assert one['label'] == 3 and one['image'] is example['image']
  same = views("two_views(32, strategy='same')", example)['views']
  np.testing.assert_array_equal(same[0], same[1])
  spans = [
    abs(affine(views("two_views(32, scale=(0.1, 1.0), p=0.0, strategy='random')", example, seed)['views'][1], 1)[0])
    * 32
    for seed in range(20)
  ]
  assert max(spans) > 0.85  # the second view is not a part of the first


def test_jitter_changes_the_global_view_alone():
  image = (ramp() * 255).astype(np.uint8)
  plain, jittered = (views(f'two_views(32, p=0.0, jitter={on})', {'image': image})['views'] for on in (False, True))
  np.testing.assert_array_equal(plain[1], jittered[1])
  assert np.abs(plain[0].astype(int) - jittered[0]).max() > 5


def test_normalize_works_on_views_as_on_images():
  chain = images.parse('decode | two_views(16) | normalize')
  made = [chain.example({'image': (ramp() * 255).astype(np.uint8)}, np.random.default_rng(i)) for i in range(3)]
  pairs = np.stack([m['views'] for m in made])
  batch = chain.batch({'views': pairs})
  assert batch['views'].shape == (3, 2, 16, 16, 3) and batch['views'].dtype == np.float32
  np.testing.assert_array_equal(batch['views'][:, 1], chain.batch({'image': pairs[:, 1]})['image'])
  with pytest.raises(ConfigError, match='views.*label'):
    chain.batch({'label': np.arange(3)})


def test_a_jpeg_is_not_decoded_whole_for_its_views(monkeypatch):
  import cv2

  data = cv2.imencode('.jpg', (ramp(400, 400) * 255).astype(np.uint8))[1].tobytes()
  asked = []
  pixels = decoding.Jpeg.pixels
  monkeypatch.setattr(decoding.Jpeg, 'pixels', lambda self, reduce=1: asked.append(reduce) or pixels(self, reduce))
  made = views('decode | two_views(64, scale=(1.0, 1.0), p=0.0)', {'image': data})
  assert asked == [4]
  np.testing.assert_array_equal(made['image'], made['views'][0])


def clip(length):
  frame = ramp(40, 60)
  return np.stack([np.concatenate([frame[..., :2], np.full_like(frame[..., :1], t)], -1) for t in range(length)])


def test_a_pair_of_frames_shares_crop_and_flip_and_is_as_far_apart_as_asked():
  gaps = set()
  for seed in range(200):
    first, second = views(
      'frame_pair(16, gap=(2, 5))', {'image': np.zeros((4, 4, 3), np.uint8), 'frames': clip(9)}, seed
    )['views']
    np.testing.assert_array_equal(first[..., :2], second[..., :2])
    gaps.add(int(round(second[..., 2].mean() - first[..., 2].mean())))
  assert gaps == {2, 3, 4}
  gaps = [views('frame_pair(16)', {'frames': clip(6)}, seed)['views'][..., 2].mean((1, 2)) for seed in range(50)]
  assert {round(float(b - a)) for a, b in gaps} == {4, 5}  # no more than the clip has


def test_a_random_frame_is_the_image():
  found = {int(views('random_frame', {'frames': clip(5)}, seed)['image'][0, 0, 2]) for seed in range(60)}
  assert found == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
  ('text', 'example', 'message'),
  [
    ('frame_pair(16)', {'frames': clip(4)}, '4 frames.*gap'),
    ('frame_pair(16)', {'image': ramp()}, "'frames'.*nothing.*image"),
    ('random_frame', {'frames': ramp()}, r'\[T, H, W, C\].*\(96, 96, 3\)'),
  ],
)
def test_what_does_not_fit_is_told(text, example, message):
  with pytest.raises(ConfigError, match=message):
    views(text, example)


@pytest.mark.parametrize(
  'text', ["two_views(16, strategy='both')", 'two_views(16, local_scale=(0.5, 2.0))', 'frame_pair(16, gap=(4, 4))']
)
def test_wrong_options_are_errors(text):
  with pytest.raises(ConfigError, match='must be'):
    images.parse(text)


def test_the_long_side_is_resized_and_the_other_rounded_down():
  sizes = {
    (480, 854): (448, 880),
    (100, 50): (880, 384),
    (64, 64): (832, 880),
  }
  for size, expected in sizes.items():
    made = views('resize_long(880, multiple=64)', {'image': np.zeros((*size, 3), np.uint8)})
    assert made['image'].shape[:2] == expected
