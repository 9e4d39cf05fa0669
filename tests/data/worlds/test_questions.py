"""Questions about scenes: true answers, a vocabulary that covers them, and little to gain without the image."""

import collections

import numpy as np

from mim_jax.data import text
from mim_jax.data.worlds import build, questions, shapes


def asked(count):
  for index in range(count):
    rng = build.stream(0, 'questions/train', index)
    scene = shapes.scene(rng, False, 0)
    yield scene, *questions.ask(rng, scene)


def test_answers_are_true():
  for scene, question, answer, closed in asked(200):
    colour, ground = (list(shapes.COLOURS)[dress.colour] for dress in (scene.dresses[0], scene.ground))
    name = shapes.CLASSES[scene.objects[0].label]
    facts = {'ground': ground, 'thing': name, name: colour}
    subject = next(word for word in question.split() if word in facts)
    if closed:
      assert answer == ('yes' if question.split()[-2] == facts[subject] else 'no')
    elif question.startswith('where'):
      assert answer == shapes.PLACES[scene.place()[0]]
    else:
      assert answer == facts[subject]


def test_every_word_is_in_the_vocabulary():
  tokenizer = text.load('words:questions')
  for _, question, _, _ in asked(100):
    ids, mask = tokenizer.encode(question, 12)
    assert tokenizer.unknown not in ids and mask.sum() < 12
  assert list(tokenizer.vocab)[: 5 + len(shapes.WORDS)] == list(text.load('words:shapes').vocab)


def test_questions_alone_tell_little():
  """The best guess from the question: its kind's most frequent answer."""
  seen = collections.defaultdict(collections.Counter)
  for _, question, answer, closed in asked(3000):
    kind = (
      'closed' if closed else 'place' if question.startswith('where') else question if 'ground' in question else 'open'
    )
    kind = 'thing' if 'what is' in question else kind
    seen[kind][answer] += 1
  best = sum(counter.most_common(1)[0][1] for counter in seen.values()) / 3000
  print('best guess', best)
  assert 0.25 < best < 0.36
  assert 0.45 < seen['closed']['yes'] / seen['closed'].total() < 0.55


def test_examples_have_the_features(tmp_path):
  options = questions.WORLD.options(size=32, train=2, validation=1)
  example = questions.example(options, 'train', 0)
  assert set(example) == set(questions._features(options))
  again = questions.example(options, 'train', 0)
  assert example['image'] == again['image'] and example['question'] == again['question']
  assert 0 <= example['answer'] < len(questions.ANSWERS) and isinstance(example['closed'], bool | np.bool_)
