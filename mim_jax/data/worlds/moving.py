"""`synthetic:moving`: short clips of the solids of `shapes` that slide and turn while the camera circles and zooms and
the light changes.

Options: `size` of a frame's side in pixels, `frames` of a clip, `train` and `validation` number of clips, `seed`, and
`textures` and `others` as in `shapes`. A clip is a function of (seed, split, index); `size` only changes its
resolution.

What makes it hard: an object leaves the place where it was (labels of the first frame that stay where they are lose
most of their overlap), shows other sides of itself, changes in size and is hidden in part; the light turns and changes
in colour and strength, so that neither a surface nor the ground keeps its values (nearest patches of raw pixels drift
away).

| field | shape, dtype | meaning |
|---|---|---|
| image | H W 3 uint8 | PNG; the first frame |
| label | int64 | shape of the main object, one of 12 |
| frames | T H W 3 uint8 | PNGs |
| masks | T H W 1 uint8 | PNGs; 0 = ground, 1 + number of the object seen, the main one 1 |
| joints | T J 2 float32 | x, y in pixels of vertices of the main object, see `JOINTS` |
| joint_valid | T J bool | the point lies in the image, hidden or not |
"""

import dataclasses
import math

import numpy as np

from mim_jax.data.worlds import build, render, shapes

JOINTS = ('top', 'foot', 'left', 'right')  # highest, lowest, outermost on either side before it turns
SLIDE = 0.9  # most that an object slides over a clip, of its extent
TURN = 0.8  # most radians that it turns
ORBIT = 0.5  # most radians that the camera circles
ZOOM = 0.25  # most that the field of view changes, as a share
LIGHT = 1.2  # most radians that the light turns
TINT = 0.45  # most that the strength of each of its colours changes, as a share


@dataclasses.dataclass(frozen=True)
class Motion:
  """Change over the whole clip, which is at half of it in the middle frame."""

  slides: list[np.ndarray]  # [2] metres, per object
  turns: list[float]  # radians, per object
  orbit: float
  zoom: float
  light: float
  tint: np.ndarray  # [3]


def _motion(rng, scene) -> Motion:
  """A random motion under which no two objects touch; one that would touch another stands still."""
  slides, turns = [], []
  for number, item in enumerate(scene.objects):
    direction = rng.random() * 2 * math.pi
    length = (0.4 + 0.6 * rng.random()) * SLIDE * item.extent
    slide = length * np.array([math.cos(direction), 0.6 * math.sin(direction)])  # less towards the camera than across
    turns.append((2 * rng.random() - 1) * TURN)
    ends = [item.middle[:2] + slide * share for share in (-0.5, 0, 0.5)]
    others = [other for k, other in enumerate(scene.objects) if k != number]
    # Others may slide towards it, so it must keep clear of the whole of their ways.
    if any(
      math.dist(end, other.middle[:2]) < 0.65 * (item.extent + other.extent) + SLIDE / 2 * other.extent
      for end in ends
      for other in others
    ):
      slide = np.zeros(2)
    slides.append(slide)
  signed = lambda least, most: (least + (most - least) * rng.random()) * (1 if rng.random() < 0.5 else -1)
  return Motion(
    slides,
    turns,
    signed(0.3 * ORBIT, ORBIT),
    signed(0, ZOOM),
    signed(0.3 * LIGHT, LIGHT),
    (2 * rng.random(3) - 1) * TINT,
  )


def _moved(scene, motion, share) -> shapes.Scene:
  """The scene at `share` of the motion, in [-0.5, 0.5]."""
  objects = []
  for item, slide, turn in zip(scene.objects, motion.slides, motion.turns, strict=True):
    foot = np.append(item.middle[:2], 0.0)
    here = foot + np.append(slide * share, 0.0)
    mesh = item.mesh.placed(offset=-foot).placed(yaw=turn * share, offset=here)
    objects.append(dataclasses.replace(item, mesh=mesh, middle=item.middle + np.append(slide * share, 0.0)))
  c, s = math.cos(motion.orbit * share), math.sin(motion.orbit * share)
  around = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]], np.float32)
  camera = render.Camera(
    around @ scene.camera.position,
    (scene.camera.rotation @ around.T).astype(np.float32),
    scene.camera.slope * math.exp(motion.zoom * share),
  )
  c, s = math.cos(motion.light * share), math.sin(motion.light * share)
  turned = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]], np.float32)
  light = dataclasses.replace(
    scene.light,
    direction=(turned @ scene.light.direction).astype(np.float32),
    tint=(scene.light.tint * np.exp(motion.tint * 2 * share)).astype(np.float32),
  )
  return dataclasses.replace(scene, objects=objects, camera=camera, light=light)


def _joints(item, camera) -> np.ndarray:
  """[J, 2] fractions of the image's sides: vertices of the object, the same ones however it is turned."""
  local = item.local.vertices.reshape(-1, 3)
  chosen = [local[:, 2].argmax(), local[:, 2].argmin(), local[:, 0].argmin(), local[:, 0].argmax()]
  return camera.project(camera.see(item.mesh.vertices.reshape(-1, 3)[chosen]))


def clip(options, split, index):
  """(frames [T, H, W, 3], masks [T, H, W] uint8, joints [T, J, 2] in pixels, label)."""
  rng = build.stream(options['seed'], f'moving/{split}', index)
  scene = shapes.scene(rng, options['textures'], options['others'])
  motion = _motion(rng, scene)
  frames, masks, joints = [], [], []
  for share in np.linspace(-0.5, 0.5, options['frames']):
    moved = _moved(scene, motion, float(share))
    image, instances, _ = shapes.picture(moved, options['size'])
    frames.append(image)
    masks.append(instances)
    joints.append(_joints(moved.objects[0], moved.camera) * options['size'])
  return np.stack(frames), np.stack(masks), np.stack(joints).astype(np.float32), scene.objects[0].label


def example(options, split, index):
  """Example `index` of a split as a dict of the features; pictures as PNG bytes."""
  frames, masks, joints, label = clip(options, split, index)
  frames, size = [build.png(frame) for frame in frames], options['size']
  return {
    'image': frames[0],
    'label': label,
    'frames': frames,
    'masks': [build.png(mask) for mask in masks],
    'joints': joints,
    'joint_valid': ((joints >= 0) & (joints < size)).all(-1),
  }


def _features(options):
  import tensorflow_datasets as tfds

  size, count = options['size'], options['frames']
  picture = lambda channels: tfds.features.Image(shape=(size, size, channels), encoding_format='png')
  return {
    'image': picture(3),
    'label': tfds.features.ClassLabel(names=list(shapes.CLASSES)),
    'frames': tfds.features.Sequence(picture(3), length=count),
    'masks': tfds.features.Sequence(picture(1), length=count),
    'joints': tfds.features.Tensor(shape=(count, len(JOINTS), 2), dtype=np.float32),
    'joint_valid': tfds.features.Tensor(shape=(count, len(JOINTS)), dtype=np.bool_),
  }


WORLD = build.World(
  name='moving',
  version='1.0.0',
  description='Clips of solids that slide and turn before a circling camera, with object masks and joints.',
  defaults={
    'size': 64,
    'frames': 16,
    'train': 500,
    'validation': 50,
    'seed': 0,
    'textures': True,
    'others': shapes.OBJECTS - 1,
  },
  limits={
    'size': (16, 1024),
    'frames': (2, 1000),
    'train': (0, 10**7),
    'validation': (0, 10**7),
    'seed': (0, 2**63 - 1),
    'others': (0, shapes.OBJECTS - 1),
  },
  splits=('train', 'validation'),
  features=_features,
  example=example,
  metadata=lambda options: {'joints': list(JOINTS)},
)
