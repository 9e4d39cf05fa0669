"""The language of transforms: what a text means, and mistakes in one."""

import cv2
import image_cases as cases
import numpy as np
import pytest

from mim_jax.data import chain, images
from mim_jax.data.images import parse
from mim_jax.errors import ConfigError


def test_a_chain_does_single_examples_then_the_batch():
  both = parse('decode | random_resized_crop(16, scale=(0.2, 1.0)) | flip | normalize')
  rows = [both.example({'image': cases.photograph(20, 30, k), 'label': k}, cases.generator(k)) for k in range(3)]
  assert all(r['image'].dtype == np.uint8 and r['image'].shape == (16, 16, 3) for r in rows)
  batch = both.batch({'image': np.stack([r['image'] for r in rows]), 'label': np.arange(3)})
  assert batch['image'].dtype == np.float32 and batch['image'].shape == (3, 16, 16, 3)
  assert batch['label'].tolist() == [0, 1, 2]


def test_normalize_runs_per_example_when_a_single_transform_follows():
  erased = parse('normalize | random_erasing(p=1)')
  example = erased.example({'image': cases.photograph(20, 20)}, cases.generator())
  assert example['image'].dtype == np.float32
  assert erased.batch(example) is example


def test_line_breaks_and_an_empty_string_are_fine():
  assert (
    cases.run('flip(1)\n  | flip(1.0)', {'image': np.arange(12, dtype=np.uint8).reshape(2, 2, 3)})['image'][0, 0, 0]
    == 0
  )
  example = {'text': 'no picture'}
  assert cases.run('', example) is example


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('decode | random_resize_crop(224)', ["did you mean 'random_resized_crop'"]),
    ('qqqq', ['known:', 'normalize']),
    ('resize(224, sclae=1)', ['sclae', 'resize(size, method=']),
    ('random_resized_crop', ["missing a required argument: 'size'", 'scale=(0.08, 1.0)']),
    ('flip(1, 2)', ['too many', 'flip(p=0.5)']),
    ('flip(p=1.5)', ['flip', 'probability', '1.5']),
    ('resize(size)', ['plain values', 'resize(size)']),
    ('resize(-3)', ['size must be a number of pixels', '-3']),
    ('random_resized_crop(8, scale=(0.5, 0.2))', ['scale must be (low, high)']),
    ('random_resized_crop(8, method="nearest")', ["'bicubic' or 'bilinear'"]),
    ('gaussian_blur(12)', ['kernel must be an odd number']),
    ('normalize("imagnet")', ['imagenet, clip', 'imagnet']),
    ('decode(channels=4)', ["1, 3 or 'any'"]),
    ('decode |', ['cannot be read']),
    ('decode; flip', ['cannot be read']),
    ('decode | 3', ["'3' is not a transform"]),
    ('decode.flip', ['is not a transform']),
    ('decode | flip(**{})', ['is not a transform']),
    ('__import__("os")', ['unknown']),
  ],
)
def test_mistakes_are_named(text, words):
  with pytest.raises(ConfigError) as error:
    parse(text)
  for word in words:
    assert word in str(error.value)


def test_describe_lists_every_transform_with_its_options():
  lines = dict(line.split('(', 1) for line in images.describe().splitlines())
  assert set(lines) >= {
    'center_crop', 'color_jitter', 'decode', 'flip', 'gaussian_blur', 'grayscale', 'normalize', 'one_shot_crop',
    'rand_augment', 'random_crop', 'random_erasing', 'random_resized_crop', 'resize', 'to_float',
  }  # fmt: skip
  assert lines['flip'] == 'p=0.5): Swaps left and right with probability p.'


def test_a_registered_function_gets_its_place_in_the_language():
  @images.register
  def darken(example, rng, by=2):
    """Divides."""
    return {**example, 'image': example['image'] // by}

  try:
    example = cases.run('decode | darken(4)', {'image': cases.encoded(np.full((4, 4, 3), 200, np.uint8), '.png')})
    assert (example['image'] == 50).all()
  finally:
    del chain.TRANSFORMS['darken']


def test_an_image_is_needed_and_bytes_need_decode():
  with pytest.raises(ConfigError, match="need the field 'image', found label, text"):
    cases.run('flip', {'label': 1, 'text': ''})
  with pytest.raises(ConfigError, match="begin with 'decode'"):
    cases.run('flip', {'image': cases.jpeg(cases.photograph(8, 8))})


def test_the_result_follows_from_the_generator_and_the_example_is_left_alone():
  text = 'decode | random_resized_crop(24) | flip | color_jitter | rand_augment | normalize | random_erasing(p=0.9)'
  image = cases.photograph(40, 50)
  before = image.copy()
  first, again, other = (cases.run(text, {'image': image}, seed)['image'] for seed in (1, 1, 2))
  np.testing.assert_array_equal(first, again)
  assert not np.array_equal(first, other)
  np.testing.assert_array_equal(image, before)


def test_opencv_starts_no_threads_of_its_own():
  assert cv2.getNumThreads() <= 1
