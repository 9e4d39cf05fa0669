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


@pytest.fixture
def several(rng):
  """Scores with ties, labels of four classes of which the third never occurs, weights."""
  labels = (rng.random((203, 4)) < [0.5, 0.1, 0.0, 0.9]).astype(int)
  return np.round(labels + rng.normal(size=labels.shape), 1), labels, rng.uniform(size=203)


@pytest.mark.parametrize('weighted', [False, True])
def test_several_labels_are_those_of_sklearn(several, weighted):
  scores, labels, weights = several
  weights = weights if weighted else None
  theirs = {
    'auroc': lambda c: sklearn.metrics.roc_auc_score(labels[:, c], scores[:, c], sample_weight=weights),
    'map': lambda c: sklearn.metrics.average_precision_score(labels[:, c], scores[:, c], sample_weight=weights),
  }
  ours = {'auroc': metrics.auroc, 'map': metrics.average_precision}
  figures = metrics.multilabel(scores, labels, weights)
  for name in theirs:
    each = [theirs[name](c) for c in (0, 1, 3)]
    found = [ours[name](scores[:, c], labels[:, c], weights) for c in (0, 1, 3)]
    np.testing.assert_allclose(found, each, atol=1e-12)
    assert np.isnan(ours[name](scores[:, 2], labels[:, 2], weights))
    assert figures[name] == pytest.approx(np.mean(each), abs=1e-12)  # the class that never occurs is left out


def test_only_the_order_of_scores_counts_for_several_labels(several):
  scores, labels, _ = several
  assert metrics.multilabel(np.exp(scores), labels) == metrics.multilabel(scores, labels)
  assert np.isnan(metrics.multilabel(scores[:, 2:3], labels[:, 2:3])['auroc'])
  assert metrics.auroc(np.zeros(4), np.array([0, 1, 1, 0])) == 0.5


def test_padding_rows_change_nothing_for_several_labels(several):
  scores, labels, _ = several
  padded = np.concatenate([scores, scores[:13]]), np.concatenate([labels, labels[:13]])
  weights = np.concatenate([np.ones(203), np.zeros(13)])
  assert metrics.multilabel(*padded, weights) == pytest.approx(metrics.multilabel(scores, labels), abs=1e-12)


def test_regions_are_those_of_sklearn(rng):
  truth, found = rng.integers(5, size=999), rng.integers(5, size=999)
  truth[truth == 3] = 2  # found but never true
  found[found == 4], truth[truth == 4] = 0, 1  # neither
  figures = metrics.regions(metrics.confusion(found, truth, 5))
  assert figures['miou'] == pytest.approx(sklearn.metrics.jaccard_score(truth, found, average='macro', labels=range(4)))
  assert figures['dice'] == pytest.approx(
    sklearn.metrics.f1_score(truth, found, average='macro', labels=range(4), zero_division=0)
  )
  assert figures['pixel_accuracy'] == pytest.approx(sklearn.metrics.accuracy_score(truth, found))
  inner = metrics.regions(metrics.confusion(found, truth, 5), background=0)
  assert inner['miou'] == pytest.approx(sklearn.metrics.jaccard_score(truth, found, average='macro', labels=[1, 2, 3]))
  with pytest.raises(ValueError, match='no pixel'):
    metrics.regions(np.zeros((2, 2)))


def test_regression_is_that_of_sklearn(rng):
  values = rng.normal(size=(50, 3)) * [1, 10, 100]
  found, weights = values + rng.normal(size=(50, 3)), rng.uniform(size=50)
  figures = metrics.regression(found, values, weights)
  theirs = {
    'mae': sklearn.metrics.mean_absolute_error,
    'rmse': lambda *a, **k: np.sqrt(sklearn.metrics.mean_squared_error(*a, **k)),
    'r2': sklearn.metrics.r2_score,
  }
  for name, function in theirs.items():
    assert figures[name] == pytest.approx(function(values, found, sample_weight=weights), abs=1e-12)
  assert metrics.regression([1.0, 2.0], [1.0, 4.0])['mae'] == 1.0


def test_psnr_in_closed_form(rng):
  images = rng.uniform(size=(3, 8, 8, 2))
  shift = np.array([0.1, 0.01, 0.0])[:, None, None, None]
  np.testing.assert_allclose(metrics.psnr(images + shift, images), [20, 40, np.inf], atol=1e-9)
  np.testing.assert_allclose(metrics.psnr(255 * images + 1, 255 * images, span=255), 20 * np.log10(255), atol=1e-9)


def test_ssim_in_closed_form(rng):
  images = rng.uniform(size=(2, 15, 16, 3))
  np.testing.assert_allclose(metrics.ssim(images, images), 1, atol=1e-12)
  # Between flat pictures only the means differ: (2 a b + c) / (a^2 + b^2 + c).
  a, b, c = 0.3, 0.5, 0.01**2
  flat = np.ones((1, 12, 12, 1))
  np.testing.assert_allclose(metrics.ssim(a * flat, b * flat), (2 * a * b + c) / (a * a + b * b + c), atol=1e-12)
  # A window that just fits: one place, whose statistics are weighted moments.
  x, y = images[:1, :11, :11, :1], images[1:, :11, :11, :1]
  w = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
  w = np.outer(w, w) / w.sum() ** 2
  mean = lambda z: np.sum(w * z[0, ..., 0])
  cov = lambda p, q: mean(p * q) - mean(p) * mean(q)
  expected = (2 * mean(x) * mean(y) + c) * (2 * cov(x, y) + 0.03**2)
  expected /= (mean(x) ** 2 + mean(y) ** 2 + c) * (cov(x, x) + cov(y, y) + 0.03**2)
  np.testing.assert_allclose(metrics.ssim(x, y), expected, atol=1e-12)
  with pytest.raises(ValueError, match='smaller than the window of 11'):
    metrics.ssim(images[:, :10], images[:, :10])


def test_intervals_hold_the_truth_as_often_as_they_say():
  """Of 200 test sets of 100 examples that are right in 70 %, about 95 % give an interval around 0.7."""
  inside, widths = 0, []
  for i in range(200):
    right = np.random.default_rng(i).random(100) < 0.7
    figures = metrics.with_intervals(lambda rows, right=right: {'top1': right[rows].mean()}, 100, 400, seed=i)
    inside += figures['top1_low'] <= 0.7 <= figures['top1_high']
    widths.append(figures['top1_high'] - figures['top1_low'])
  assert 180 <= inside <= 198
  assert np.mean(widths) == pytest.approx(2 * 1.96 * np.sqrt(0.21 / 100), rel=0.1)


def test_intervals_are_a_function_of_the_seed_and_may_be_left_out(rng):
  right = rng.random(50) < 0.5
  of_rows = lambda rows: {'top1': right[rows].mean()}
  assert metrics.with_intervals(of_rows, 50, 100) == metrics.with_intervals(of_rows, 50, 100)
  assert set(metrics.with_intervals(of_rows, 50, 0)) == {'top1'}


def test_dice_is_one_for_a_perfect_answer_and_nan_for_an_absent_class():
  labels = np.array([0, 0, 1, 3, 3])
  np.testing.assert_array_equal(metrics.dice(metrics.confusion(labels, labels, 4)), [1, 1, np.nan, 1])
  found = np.array([0, 1, 1, 2, 3])  # class 2 is found where it is not: no figure of its own, but class 3 pays
  expected = [2 * 1 / 3, 2 * 1 / 3, np.nan, 2 * 1 / 3]
  np.testing.assert_allclose(metrics.dice(metrics.confusion(found, labels, 4)), expected)
