import eval_cases as cases
import numpy as np
import pytest
from sklearn.linear_model import Ridge

from mim_jax.errors import ConfigError, UserError
from mim_jax.evals import features, fewshot, suite


@pytest.mark.parametrize('count', [12, 200], ids=['fewer examples than dims', 'more'])
@pytest.mark.parametrize('l2', [0.5, 1024.0])
def test_scores_are_those_of_ridge_regression(rng, count, l2):
  x, labels, test = rng.normal(2, 3, size=(count, 30)), rng.integers(4, size=count), rng.normal(2, 3, size=(17, 30))

  def design(rows):
    return np.concatenate([(rows - x.mean(0)) / (x.std(0) + 1e-5), np.full((len(rows), 1), 100.0)], axis=1)

  expected = (
    Ridge(alpha=l2, fit_intercept=False, solver='cholesky')
    .fit(design(x), 2 * np.eye(4)[labels] - 1)
    .predict(design(test))
  )
  np.testing.assert_allclose(fewshot.ridge(x, labels, 4, l2)(test), expected, atol=1e-8)


def test_shots_are_balanced_and_a_function_of_the_seed(rng):
  labels = rng.integers(5, size=200)
  labels[labels == 2] = 4  # a class without examples
  chosen = fewshot.choose(labels, 5, 7, seed=3)
  assert np.bincount(labels[chosen], minlength=5).tolist() == [7, 7, 0, 7, 7]
  assert len(set(chosen)) == 28
  np.testing.assert_array_equal(chosen, fewshot.choose(labels, 5, 7, seed=3))
  assert set(chosen) != set(fewshot.choose(labels, 5, 7, seed=4))


def settings(**given):
  return suite.settings('fewshot', {'train': 'a', 'test': 'b', 'batch_size': 16, **given})


@pytest.mark.parametrize('count', [1, 8])
def test_a_case_with_a_known_answer(count):
  data = cases.Data(cases.mesh_of(count), {'a': cases.images(301, 0, noise=0.05), 'b': cases.images(53, 1, noise=0.05)})
  figures = fewshot.run(features.raw_pixels(), settings(shots=(1, 5)), data.context())
  assert figures == {'1shot/top1': 1.0, '1shot/spread': 0.0, '5shot/top1': 1.0, '5shot/spread': 0.0}


def test_mean_and_spread_over_seeds():
  data = cases.Data(cases.mesh_of(1), {'a': cases.images(301, 0, noise=2), 'b': cases.images(153, 1, noise=2)})
  ctx = data.context()
  single = []
  for seeds in (1, 2, 3):
    single.append(fewshot.run(cases.encoder(), settings(shots=2, seeds=seeds), ctx))
  assert set(single[0]) == {'2shot/top1'}
  first = single[0]['2shot/top1']
  second = 2 * single[1]['2shot/top1'] - first
  third = 3 * single[2]['2shot/top1'] - first - second
  assert (
    single[2]['2shot/spread'] == pytest.approx(np.std([first, second, third], ddof=1)) and single[2]['2shot/spread'] > 0
  )


def test_several_features_in_one_pass():
  data = cases.Data(cases.mesh_of(1), {'a': cases.images(301, 0, noise=2), 'b': cases.images(153, 1, noise=2)})
  figures = fewshot.run(cases.encoder(), settings(shots=2, seeds=2, features='cls,mean'), data.context())
  assert figures['2shot/top1'] == max(figures['cls/2shot/top1'], figures['mean/2shot/top1'])
  assert len(data.opened) == 2


def test_too_few_examples_of_a_class_say_so():
  with pytest.raises(UserError, match='class 1 has 2 training examples, 3 shots.*to 2 or fewer'):
    fewshot.choose(np.array([0, 0, 0, 1, 1]), 2, 3, seed=0)


@pytest.mark.parametrize('given', [{'l2': 0.0}, {'seeds': 0}, {'shots': ()}, {'shots': (0,)}])
def test_settings_that_cannot_work_are_refused(given):
  with pytest.raises(ConfigError, match='few-shot needs'):
    fewshot.run(cases.encoder(), settings(**given), None)
