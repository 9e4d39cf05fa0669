import numpy as np
import pytest
import sklearn.metrics

from mim_jax.evals import metrics


@pytest.fixture
def case(rng):
  return rng.normal(size=(203, 9)), rng.integers(9, size=203), rng.uniform(size=203)


@pytest.mark.parametrize('k', [1, 3, 5])
def test_topk_is_that_of_sklearn(case, k):
  scores, labels, weights = case
  expected = sklearn.metrics.top_k_accuracy_score(labels, scores, k=k, sample_weight=weights, labels=range(9))
  assert metrics.topk_accuracy(scores, labels, k, weights) == pytest.approx(expected, abs=1e-12)


def test_confusion_and_class_mean_are_those_of_sklearn(case):
  scores, labels, weights = case
  labels[labels == 4] = 3  # a class that does not occur
  predicted = scores.argmax(axis=1)
  table = metrics.confusion(predicted, labels, 9, weights)
  np.testing.assert_allclose(
    table, sklearn.metrics.confusion_matrix(labels, predicted, labels=range(9), sample_weight=weights), atol=1e-12
  )
  expected = np.mean(
    [(weights * (predicted == labels))[labels == c].sum() / weights[labels == c].sum() for c in set(labels)]
  )
  assert metrics.mean_per_class(table) == pytest.approx(expected, abs=1e-12)
  unweighted = metrics.mean_per_class(metrics.confusion(predicted, labels, 9))
  assert unweighted == pytest.approx(
    sklearn.metrics.recall_score(labels, predicted, average='macro', labels=sorted(set(labels)))
  )


def test_padding_rows_change_nothing(case, rng):
  scores, labels, _ = case
  padded = np.concatenate([scores, rng.normal(size=(13, 9))]), np.concatenate([labels, np.zeros(13, int)])
  weights = np.concatenate([np.ones(203), np.zeros(13)])
  assert metrics.classification(*padded, weights) == metrics.classification(scores, labels)


def test_equal_scores_rank_by_class():
  scores = np.array([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]])
  assert metrics.rank_of_label(scores, [0, 1]).tolist() == [0, 1]
  assert metrics.topk_accuracy(scores, [0, 1]) == 0.5


def test_top5_is_left_out_where_it_says_nothing():
  assert set(metrics.classification(np.eye(5), np.arange(5))) == {'top1', 'class_mean'}
  assert set(metrics.classification(np.eye(6), np.arange(6))) == {'top1', 'top5', 'class_mean'}


@pytest.mark.parametrize(
  ('scores', 'labels'), [(np.zeros((3, 2)), [0, 1]), (np.zeros((2, 2)), [0, 2]), (np.zeros((2, 2)), [-1, 0])]
)
def test_scores_that_do_not_fit_the_labels_are_refused(scores, labels):
  with pytest.raises(ValueError, match='labels'):
    metrics.topk_accuracy(scores, labels)


def test_no_weight_is_refused():
  with pytest.raises(ValueError, match='weight'):
    metrics.topk_accuracy(np.zeros((2, 2)), [0, 1], weights=[0, 0])
