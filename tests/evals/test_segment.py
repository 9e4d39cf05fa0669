"""Segmentation: tables against scikit-learn, grids, decoders, and cases with a known answer."""

import eval_cases as cases
import jax
import numpy as np
import pytest
import sklearn.metrics

from mim_jax.errors import ConfigError, UserError
from mim_jax.evals import segment, suite


def settings(**given):
  return suite.settings('segment', {**cases.SHORT, 'train': 'a', 'test': 'b', 'classes': 3, 'epochs': 10, **given})


def run(count=1, mask=None, **given):
  sets = {'a': cases.scenes(161, 0), 'b': cases.scenes(83, 1)}
  if mask is not None:
    sets['b']['mask'][0, 0, 0, 0] = mask
  return segment.run(cases.token_encoder(), settings(**given), cases.Data(cases.mesh_of(count), sets).context())


@pytest.mark.parametrize('count', [1, 8])
@pytest.mark.parametrize(
  'given', [{}, {'decoder': 'conv', 'width': 16, 'frozen': False, 'base_lr': 0.03}], ids=['linear', 'conv']
)
def test_a_case_with_a_known_answer(given, count):
  figures = run(count, **given)
  least = 0.98 if 'decoder' in given else 0.9  # scores interpolated between single tokens err at corners
  assert figures['miou'] > least and figures['pixel_accuracy'] > least and 1 >= figures['dice'] >= figures['miou']


def test_tables_are_those_of_sklearn(rng):
  data = cases.scenes(5, 0)
  scores = rng.normal(size=(5, 6, 6, 3)).astype(np.float32)
  kept = segment.task_of(settings(), 3).measure(scores, data)
  truth, found = data['mask'].ravel(), scores.argmax(-1).ravel()
  counted = truth != 255
  assert not counted.all()
  table = sklearn.metrics.confusion_matrix(truth[counted], found[counted])
  np.testing.assert_array_equal(np.sum(kept['table'], axis=0), table)
  assert np.sum(kept['table'], axis=(1, 2)).tolist() == (data['mask'] != 255).sum((1, 2, 3)).tolist()
  assert not np.any(kept['unknown'])


def test_void_pixels_count_neither_in_the_loss_nor_in_its_denominator(rng):
  task = segment.task_of(settings(), 3)
  data = cases.scenes(5, 0)
  scores = rng.normal(size=(5, 6, 6, 3)).astype(np.float32)
  draws = task.draw(jax.random.key(0), data)
  _, target = task.prepare(data, draws)
  truth, found = data['mask'].ravel(), scores.reshape(-1, 3)
  counted = truth != 255
  probabilities = np.exp(found) / np.exp(found).sum(-1, keepdims=True)
  expected = sklearn.metrics.log_loss(truth[counted], probabilities[counted])
  assert float(task.loss(scores, target, draws)) == pytest.approx(expected, rel=1e-5)


def test_labels_that_are_no_class_say_so():
  with pytest.raises(UserError, match="1 pixels of 'mask' in b have a label outside 0 to 2"):
    run(mask=3, epochs=2)


@pytest.mark.parametrize(
  ('count', 'spatial', 'grid'),
  [(196, (224, 224), (14, 14)), (24, (32, 48), (4, 6)), (64, (32, 32, 32), (4, 4, 4)), (1, (16, 16), (1, 1))],
)
def test_grid_of_tokens(count, spatial, grid):
  assert segment.grid_of(count, spatial) == grid


@pytest.mark.parametrize(('count', 'spatial'), [(195, (224, 224)), (50, (32, 32)), (8, (32, 16, 16, 7))])
def test_tokens_that_tile_nothing_ask_for_the_grid(count, spatial):
  with pytest.raises(ConfigError, match='evals.segment.grid'):
    segment.grid_of(count, spatial)


@pytest.mark.parametrize(
  ('spatial', 'grid', 'width', 'stages'),
  [
    ((32, 32), (), 0, 0),
    ((32, 32), (), 6, 2),
    ((64, 64), (2, 2), 6, 4),
    ((16, 8, 8), (), 6, 1),
    ((8, 12), (4, 4), 6, 1),
  ],
)
def test_decoders_reach_the_size_of_the_picture(spatial, grid, width, stages):
  count = {(32, 32): 16, (64, 64): 4, (16, 8, 8): 16, (8, 12): 16}[spatial]
  encoded = {'tokens': np.ones((2, count, 8), np.float32)}
  module = segment.Decoder(5, spatial, grid, (), width)
  out, variables = module.init_with_output(jax.random.key(0), encoded)
  assert out.shape == (2, *spatial, 5)
  assert sum(name.startswith('conv_norm') for name in variables['params']) == stages


def test_taps_stand_side_by_side(rng):
  layers = rng.normal(size=(3, 2, 1 + 4, 8)).astype(np.float32)
  encoded = {'tokens': layers[-1, :, 1:], 'layers': layers}
  module = segment.Decoder(5, (4, 4), (), (1, 3), 0)
  out, variables = module.init_with_output(jax.random.key(0), encoded)
  assert variables['params']['head']['kernel'].shape == (16, 5)
  changed = module.apply(variables, {**encoded, 'layers': layers + np.array([0, 1, 0])[:, None, None, None] * layers})
  np.testing.assert_array_equal(out, changed)  # the second block is not looked at
  with pytest.raises(ConfigError, match='blocks 1 to 3'):
    segment.Decoder(5, (4, 4), (), (4,), 0).init(jax.random.key(0), encoded)
