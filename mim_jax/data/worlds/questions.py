"""`synthetic:questions`: a question about a scene of `synthetic:shapes`, answered by one of a closed list.

Options: those of shapes (`size`, `train`, `validation`, `seed`, `textures`, `others`), of which `others` is 0 unless
  given, so that "the ball" is one. Example i shows another scene than example i of shapes.

Hard is that the question alone tells nothing: answers of a kind of question are as good as equally frequent, colours
  and shapes are independent of each other, of place and ground, and half of the closed questions are to be denied. The
  most frequent answer to each kind of question, the best that a model without eyes can do, is right in about 1 of 11
  open and 1 of 2 closed questions (0.27 of all).

| field | shape, dtype | meaning |
|---|---|---|
| image | H W 3 uint8 | PNG |
| question | string | about the main object or the ground |
| answer | int64 | index into `ANSWERS`: yes, no, colours, shapes, places |
| closed | bool | to be answered by yes or no |
"""

import numpy as np

from mim_jax.data.worlds import build, shapes

COLOURS = tuple(shapes.COLOURS)
ANSWERS = ('yes', 'no', *COLOURS, *shapes.CLASSES, *shapes.PLACES)
OPEN = ('colour', 'shape', 'place', 'ground')
CLOSED = ('is_colour', 'is_shape', 'is_ground')
# Words of captions and questions; their order gives token ids.
WORDS = (*shapes.WORDS, '?', 'colour', 'is', 'what', 'where', 'thing')


def _other(rng, code, count):
  """Another code than `code`, of `count`."""
  return int((code + 1 + rng.integers(count - 1)) % count)


def ask(rng, scene) -> tuple[str, str, bool]:
  """A random question about a scene, its answer, and whether it is closed (as one in two is)."""
  name = shapes.CLASSES[scene.objects[0].label]
  colour, ground = (COLOURS[dress.colour] for dress in (scene.dresses[0], scene.ground))
  if rng.random() < 0.5:
    kind = OPEN[rng.integers(len(OPEN))]
    question, answer = {
      'colour': (f'what colour is the {name} ?', colour),
      'shape': ('what is the thing ?', name),
      'place': (f'where is the {name} ?', shapes.PLACES[scene.place()[0]]),
      'ground': ('what colour is the ground ?', ground),
    }[kind]
    return question, answer, False
  kind, true = CLOSED[rng.integers(len(CLOSED))], rng.random() < 0.5
  own, names = {
    'is_colour': (colour, COLOURS),
    'is_shape': (name, shapes.CLASSES),
    'is_ground': (ground, COLOURS),
  }[kind]
  said = own if true else names[_other(rng, names.index(own), len(names))]
  subject = {'is_colour': f'the {name}', 'is_shape': 'the thing', 'is_ground': 'the ground'}[kind]
  return f'is {subject} {said} ?', 'yes' if true else 'no', True


def example(options, split, index):
  """Example `index` of a split as a dict of the features."""
  rng = build.stream(options['seed'], f'questions/{split}', index)
  scene = shapes.scene(rng, options['textures'], options['others'])
  question, answer, closed = ask(rng, scene)
  image, _, _ = shapes.picture(scene, options['size'])
  return {'image': build.png(image), 'question': question, 'answer': ANSWERS.index(answer), 'closed': closed}


def _features(options):
  import tensorflow_datasets as tfds

  size = options['size']
  return {
    'image': tfds.features.Image(shape=(size, size, 3), encoding_format='png'),
    'question': tfds.features.Text(),
    'answer': tfds.features.ClassLabel(names=list(ANSWERS)),
    'closed': tfds.features.Tensor(shape=(), dtype=np.bool_),
  }


WORLD = build.World(
  name='questions',
  version='1.0.0',
  description='Scenes of synthetic:shapes, each with a question about colours, shape or place and its answer.',
  defaults={**shapes.WORLD.defaults, 'train': 10_000, 'validation': 1_000, 'others': 0},
  limits=shapes.WORLD.limits,
  splits=('train', 'validation'),
  features=_features,
  example=example,
  metadata=lambda options: {'closed': list(ANSWERS[:2])},
)
