import numpy as np
import pytest

from mim_jax.data.worlds import build, moving, shapes

OPTIONS = {**moving.WORLD.defaults, 'size': 32, 'frames': 8, 'train': 4, 'validation': 4}


@pytest.fixture(scope='module')
def clips():
  return [moving.clip(OPTIONS, 'train', i) for i in range(16)]


def test_a_clip_is_a_function_of_seed_split_and_index(clips):
  again = moving.example(OPTIONS, 'train', 3)
  assert again['frames'] == moving.example({**OPTIONS, 'train': 9}, 'train', 3)['frames']
  assert again['image'] == again['frames'][0] and again['label'] == clips[3][3]
  others = [
    moving.example(OPTIONS, 'train', 4),
    moving.example(OPTIONS, 'validation', 3),
    moving.example({**OPTIONS, 'seed': 1}, 'train', 3),
  ]
  assert all(other['image'] != again['image'] for other in others)


def test_what_there_is(clips):
  frames, masks, joints, label = clips[0]
  assert frames.shape == (8, 32, 32, 3) and frames.dtype == np.uint8
  assert masks.shape == (8, 32, 32) and masks.dtype == np.uint8
  assert joints.shape == (8, len(moving.JOINTS), 2) and joints.dtype == np.float32
  assert 0 <= label < len(shapes.CLASSES)
  assert set(moving.example(OPTIONS, 'train', 0)) == set(moving._features(OPTIONS))


def test_size_changes_only_the_resolution(clips):
  _, masks, joints, label = moving.clip({**OPTIONS, 'size': 64}, 'train', 5)
  np.testing.assert_allclose(joints, 2 * clips[5][2], rtol=1e-4)
  assert label == clips[5][3]
  assert np.mean(masks[:, ::2, ::2] != clips[5][1]) < 0.06


def overlap(a, b):
  return np.count_nonzero(a & b) / max(np.count_nonzero(a | b), 1)


def test_objects_leave_their_place_but_move_little_between_frames(clips):
  still, step = [], []
  for _, masks, _, _ in clips:
    main = masks == 1
    still.append(np.mean([overlap(main[0], mask) for mask in main[1:]]))
    step.append(np.mean([overlap(a, b) for a, b in zip(main, main[1:], strict=False)]))
  assert np.mean(still) < 0.65 and np.mean(step) > 0.75


def test_the_light_changes_what_the_same_place_looks_like(clips):
  change = [
    np.abs(f[0][m[0] == 1].mean(0) - f[-1][m[-1] == 1].mean(0)).max() for f, m, _, _ in clips if (m[-1] == 1).any()
  ]
  assert np.median(change) > 10


def test_joints_stay_on_the_main_object(clips):
  """In the frame they lie on its silhouette or at its edge, as they may be hidden by it or by what stands before it."""
  inside = []
  for _, masks, joints, _ in clips:
    for mask, places in zip(masks, joints, strict=True):
      y, x = np.nonzero(mask == 1)
      for px, py in places:
        if len(y) and 0 <= px < 32 and 0 <= py < 32:
          inside.append(np.min((x + 0.5 - px) ** 2 + (y + 0.5 - py) ** 2) <= 3**2)
  assert np.mean(inside) > 0.9


def test_objects_never_touch():
  for i in range(60):
    rng = build.stream(0, 'moving/train', i)
    scene = shapes.scene(rng, True, 3)
    motion = moving._motion(rng, scene)
    for share in (-0.5, -0.25, 0, 0.25, 0.5):
      objects = moving._moved(scene, motion, share).objects
      for a in range(len(objects)):
        for b in range(a):
          reach = 0.4 * (objects[a].extent + objects[b].extent)
          assert np.linalg.norm(objects[a].middle[:2] - objects[b].middle[:2]) > reach
