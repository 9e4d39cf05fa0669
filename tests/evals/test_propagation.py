import eval_cases as cases
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.errors import ConfigError, UserError
from mim_jax.evals import features, propagation, suite


def slow_propagate(frames, labels, context, k, radius, temperature):
  """The protocol word by word: one place at a time."""
  unit = frames / np.linalg.norm(frames, axis=-1, keepdims=True)
  total, height, width, _ = frames.shape
  out = [labels]
  for t in range(1, total):
    made = np.zeros_like(labels)
    for y in range(height):
      for x in range(width):
        seen = [(0, False)] + [(max(t - back, 0), True) for back in range(1, context + 1)]
        values, sources = [], []
        for s, near in seen:
          for v in range(height):
            for u in range(width):
              if near and (y - v) ** 2 + (x - u) ** 2 >= radius**2:
                continue
              values.append(unit[t, y, x] @ unit[s, v, u] / temperature)
              sources.append(out[s][v, u])
        best = np.argsort(-np.array(values), kind='stable')[:k]
        weight = np.exp(np.array(values)[best] - max(values))
        made[y, x] = (weight / weight.sum()) @ np.array(sources)[best]
    out.append(made)
  return np.stack(out)


def test_it_is_the_protocol_word_by_word(rng, monkeypatch):
  monkeypatch.setattr(propagation, 'ROWS', 8)  # more places than rows, with a rest
  frames, labels = rng.normal(size=(5, 4, 5, 6)), rng.random((4, 5, 3))
  options = dict(context=3, k=4, radius=2, temperature=0.7)
  propagation._frame.clear_cache()
  mine = propagation.propagate(frames, labels, **options)
  propagation._frame.clear_cache()
  np.testing.assert_allclose(mine, slow_propagate(frames, labels, **options), atol=1e-5)
  np.testing.assert_array_equal(mine[0], labels.astype(np.float32))


def test_labels_follow_features_that_move(rng):
  """Places carry their features along as the picture scrolls, so the labels scroll as well."""
  first, labels = rng.normal(size=(6, 8, 16)), np.eye(3)[rng.integers(3, size=(6, 8))]
  frames = np.stack([np.roll(first, t, axis=1) for t in range(5)])
  made = propagation.propagate(frames, labels, context=2, k=1, radius=20)
  for t in range(5):
    np.testing.assert_array_equal(made[t].argmax(-1), np.roll(labels, t, axis=1).argmax(-1))
  near = propagation.propagate(
    frames, labels, context=2, k=1, radius=1
  )  # too near for the move, but the first frame has no radius
  np.testing.assert_allclose(near, made, atol=1e-6)


def test_jaccard_and_boundary():
  mask = np.zeros((60, 80), bool)
  mask[20:40, 30:50] = True
  assert propagation.jaccard(mask, mask) == propagation.boundary(mask, mask) == 1.0
  half = mask.copy()
  half[:, 40:] = False
  assert propagation.jaccard(half, mask) == 0.5
  moved = np.roll(mask, 1, axis=1)  # the diagonal is 100 pixels, so one pixel is within the tolerance
  assert propagation.boundary(moved, mask) == 1.0
  far = np.roll(mask, 15, axis=0)
  assert propagation.boundary(far, mask) < 0.5
  empty = np.zeros_like(mask)
  assert propagation.jaccard(empty, empty) == propagation.boundary(empty, empty) == 1.0
  assert propagation.jaccard(empty, mask) == propagation.boundary(empty, mask) == 0.0


def test_objects_are_those_of_the_first_frame_and_the_ends_do_not_count():
  truth = np.zeros((4, 10, 10), int)
  truth[:, 2:5, 2:5], truth[:, 6:9, 6:9] = 1, 2
  truth[2, 0, 0] = 3  # comes later, is nobody's
  predicted = truth.copy()
  predicted[0], predicted[3] = 0, 0
  predicted[1][truth[1] == 2] = 0
  assert propagation.objects_of(predicted, truth) == [(1.0, 1.0), (0.5, 0.5)]


def test_joints_come_back_from_their_maps():
  joints = np.array([[10.0, 20.0], [33.0, 44.0], [60.0, 5.0]])
  maps = propagation.joint_maps(joints, (64, 80), (16, 20))
  assert maps.shape == (16, 20, 3)
  np.testing.assert_allclose(propagation.joint_places(maps, (64, 80)), joints, atol=2.0)


def test_joints_are_measured_by_the_box_of_the_visible_ones():
  truth = np.array([[[0.0, 0.0], [30.0, 40.0], [500.0, 0.0]]] * 3)
  valid = np.array([[True, True, False]] * 3)
  found = truth + np.array([2.9, 0.0])  # 0.6 * 50 = 30, of which a tenth
  right, count = propagation.correct_joints(found, truth, valid, 0.1)
  assert right.tolist() == [2, 2, 0] and count.tolist() == [2, 2, 0]
  right, _ = propagation.correct_joints(truth + 3.1, truth, valid, 0.1)
  assert right.tolist() == [0, 0, 0]


class Videos:
  """Two clips of a bright square that moves by a patch a frame, its label map, and its corners."""

  def __init__(self, size=32, count=5):
    self.size, self.count = size, count

  def __len__(self):
    return 2

  def __getitem__(self, index):
    masks = np.zeros((self.count, self.size, self.size, 1), np.uint8)
    corners = np.zeros((self.count, 4, 2), np.float32)
    for t in range(self.count):
      x = y = 4 + 4 * t
      y = y if index else 8
      masks[t, y : y + 12, x : x + 12] = 1
      corners[t] = [[x + 2, y + 2], [x + 10, y + 2], [x + 2, y + 10], [x + 10, y + 10]]
    shade = np.linspace(0, 60, self.size).astype(np.uint8)
    frames = np.where(masks > 0, np.array([200, 40, 40], np.uint8), np.stack([shade, shade, shade], -1))
    return {'frames': frames.astype(np.uint8), 'masks': masks, 'joints': corners, 'label': index}


def settings(**given):
  return suite.settings(
    'propagation', {'test': 'clips', 'transforms': 'decode | normalize', 'batch_size': 2, 'pixel_patch': 4, **given}
  )


def context(mesh):
  pictures = {}
  ctx = features.Context(mesh, lambda spec: Videos(), None, picture=pictures.__setitem__, say=lambda line: None)
  return ctx, pictures


@pytest.mark.parametrize('devices', [1, 8])
def test_a_square_is_followed_by_its_colour(devices):
  ctx, pictures = context(cases.mesh_of(devices))
  figures = propagation.run(features.raw_pixels(), settings(), ctx)
  assert set(figures) == {'jf', 'j', 'f'} and figures['j'] > 0.95 and figures['f'] > 0.95
  assert figures['jf'] == pytest.approx((figures['j'] + figures['f']) / 2)
  assert list(pictures) == ['propagation_pixels'] and pictures['propagation_pixels'].dtype == np.uint8
  assert propagation.run(features.raw_pixels(), settings(metric='miou'), ctx)['miou'] > 0.95


def test_joints_of_a_square():
  ctx, _ = context(cases.mesh_of(1))
  options = settings(metric='pck', labels='joints', thresholds=(0.2, 0.8), k=1)
  figures = propagation.run(features.raw_pixels(), options, ctx)
  assert set(figures) == {'pck_0.2', 'pck_0.8'} and figures['pck_0.2'] <= figures['pck_0.8']


def test_features_of_an_encoder_are_put_on_their_grid():
  ctx, _ = context(cases.mesh_of(2))

  def encode(variables, batch):
    x = batch['image']
    return {'tokens': x.reshape(len(x), 4, 8, 2, 16, 3).mean((2, 4)).reshape(len(x), 8, 3) * variables}

  encoder = features.Encoder('trained', None, jnp.float32(2), encode)
  frames = np.random.default_rng(0).normal(size=(5, 32, 32, 3)).astype(np.float32)
  with pytest.raises(UserError, match='8 tokens of frames of 32 x 32'):
    propagation.frame_features(encoder, frames, ctx, 2, 8)
  wide = np.repeat(frames, 2, axis=2)[:, :, :64].reshape(5, 32, 64, 3)

  def encode_wide(variables, batch):
    x = batch['image']
    return {'tokens': x.reshape(len(x), 2, 16, 4, 16, 3).mean((2, 4)).reshape(len(x), 8, 3) * variables}

  made = propagation.frame_features(features.Encoder('t', None, jnp.float32(2), encode_wide), wide, ctx, 2, 8)
  assert made.shape == (5, 2, 4, 3)
  np.testing.assert_allclose(made[3, 1, 2], 2 * wide[3, 16:32, 32:48].mean((0, 1)), atol=1e-5)


@pytest.mark.parametrize(
  ('given', 'message'), [({'metric': 'iou'}, 'jf, miou or pck'), ({'labels': 'segments'}, "'segments'.*masks")]
)
def test_wrong_settings_are_told(given, message):
  ctx, _ = context(cases.mesh_of(1))
  with pytest.raises(ConfigError, match=message):
    propagation.run(features.raw_pixels(), settings(**given), ctx)


def test_it_needs_no_training_data():
  built = suite.build({'propagation': {'test': 'synthetic:moving:validation'}}, 'synthetic:shapes:train', 'decode', 8)
  assert built.sources() == {'propagation': ['synthetic:moving:validation']}
