"""Figures on host arrays, exact in float64: classes, several labels at once, regions, pictures, numbers, and their intervals.

`weights` [n] counts each example (0 leaves it out); None counts each once. Accuracies are fractions in [0, 1]. No figure
is a mean over batches: evaluators gather what all examples gave, padding left out, and compute once.
"""

import warnings
from collections.abc import Callable, Mapping

import numpy as np


def rank_of_label(scores, labels) -> np.ndarray:
  """Place of the true class among the scores, 0 = first; scores [n, C], labels [n] int -> [n] int.

  Of equal scores the lower class is ahead.
  """
  scores, labels = np.asarray(scores), np.asarray(labels)
  if scores.ndim != 2 or labels.shape != scores.shape[:1]:
    raise ValueError(f'scores {scores.shape} and labels {labels.shape}: expected [n, C] and [n]')
  if len(labels) and not 0 <= labels.min() <= labels.max() < scores.shape[1]:
    raise ValueError(f'labels from {labels.min()} to {labels.max()}, scores for {scores.shape[1]} classes')
  own = np.take_along_axis(scores, labels[:, None], axis=1)
  ahead = (scores > own) | ((scores == own) & (np.arange(scores.shape[1]) < labels[:, None]))
  return ahead.sum(axis=1)


def _weighted_mean(values, weights) -> float:
  weights = np.ones(len(values)) if weights is None else np.asarray(weights, np.float64)
  if not weights.sum() > 0:
    raise ValueError(f'no example has a weight above 0 ({len(values)} examples)')
  return float(np.sum(np.asarray(values, np.float64) * weights) / np.sum(weights))


def topk_accuracy(scores, labels, k: int = 1, weights=None) -> float:
  """Share of examples whose true class is among the k best scores; scores [n, C], labels [n]."""
  return _weighted_mean(rank_of_label(scores, labels) < k, weights)


def confusion(predicted, labels, classes: int, weights=None) -> np.ndarray:
  """Summed weights by true class (row) and predicted class (column): [C, C] float64."""
  weights = np.ones(len(labels)) if weights is None else np.asarray(weights, np.float64)
  cells = np.asarray(labels) * classes + np.asarray(predicted)
  return np.bincount(cells, weights=weights, minlength=classes**2).reshape(classes, classes)


def mean_per_class(table) -> float:
  """Balanced accuracy: mean over the classes that occur of the share that is right; table [C, C] from `confusion`."""
  count = table.sum(axis=1)
  return float(np.mean(np.diag(table)[count > 0] / count[count > 0]))


def classification(scores, labels, weights=None) -> dict[str, float]:
  """What every classifier reports: top1, top5 and class_mean; no top5 with five classes or fewer, where it is 1."""
  scores = np.asarray(scores)
  classes = scores.shape[1]
  figures = {'top1': topk_accuracy(scores, labels, 1, weights)}
  if classes > 5:
    figures['top5'] = topk_accuracy(scores, labels, 5, weights)
  figures['class_mean'] = mean_per_class(confusion(scores.argmax(axis=1), labels, classes, weights))
  return figures


def dice(table) -> np.ndarray:
  """Dice of each class, 2 |A and B| / (|A| + |B|), from `confusion`: [C], NaN for a class that is absent from truth."""
  truth, both = table.sum(axis=1), table.sum(axis=0) + table.sum(axis=1)
  return np.where(truth > 0, 2 * np.diag(table) / np.maximum(both, 1), np.nan)


def auroc(scores, labels, weights=None) -> float:
  """Area under the ROC curve, ties counted half; scores [n], labels [n] (0 or 1). NaN where only one label occurs."""
  falls, hits = _curve(scores, labels, weights)
  if not falls[-1] > 0 or not hits[-1] > 0:
    return float('nan')
  return float(np.trapezoid(hits, falls) / (falls[-1] * hits[-1]))


def average_precision(scores, labels, weights=None) -> float:
  """Sum of precision times the step of recall, by descending score, equal scores at once. NaN without a positive.

  scores [n], labels [n] (0 or 1). Not interpolated, as in scikit-learn.
  """
  falls, hits = _curve(scores, labels, weights)
  if not hits[-1] > 0:
    return float('nan')
  with np.errstate(invalid='ignore'):
    precision = np.where(falls + hits > 0, hits / (falls + hits), 0.0)
  return float(np.sum(np.diff(hits) * precision[1:]) / hits[-1])


def _curve(scores, labels, weights):
  """Weight of negatives and of positives scored at or above each threshold, thresholds descending; both start with 0."""
  scores, labels = np.asarray(scores), np.asarray(labels)
  if scores.ndim != 1 or labels.shape != scores.shape or not np.isin(labels, (0, 1)).all():
    raise ValueError(f'scores {scores.shape} and labels {labels.shape}: expected [n] and [n] of 0 and 1')
  weights = np.ones(len(labels)) if weights is None else np.asarray(weights, np.float64)
  order = np.argsort(-scores, kind='stable')
  last = np.append(np.diff(scores[order]) != 0, True)  # of a run of equal scores
  positive = labels[order] == 1
  count = lambda chosen: np.append(0.0, np.cumsum(np.where(chosen, weights[order], 0.0))[last])
  return count(~positive), count(positive)


def multilabel(scores, labels, weights=None) -> dict[str, float]:
  """auroc and map: means over the classes of `auroc` and `average_precision`; scores, labels [n, C], labels 0 or 1.

  A class for which a figure is not defined (no positive, or for auroc no negative) is left out of its mean.
  """
  scores, labels = np.asarray(scores), np.asarray(labels)
  if scores.ndim != 2 or labels.shape != scores.shape:
    raise ValueError(f'scores {scores.shape} and labels {labels.shape}: expected [n, C] both')
  each = {
    'auroc': [auroc(scores[:, c], labels[:, c], weights) for c in range(scores.shape[1])],
    'map': [average_precision(scores[:, c], labels[:, c], weights) for c in range(scores.shape[1])],
  }
  return {name: _mean_defined(values) for name, values in each.items()}


def _mean_defined(values) -> float:
  """Mean of those that are not NaN; NaN if none is left."""
  values = np.asarray(values, np.float64)
  return float(np.mean(values[~np.isnan(values)])) if not np.isnan(values).all() else float('nan')


def regions(table, background: int = -1) -> dict[str, float]:
  """miou, dice and pixel_accuracy of a segmentation; table [C, C] from `confusion` over all its pixels.

  IoU and Dice are those of each class over the whole set, then their mean over the classes that occur in truth or
  prediction, without the class `background` if one is named.
  """
  table = np.asarray(table, np.float64)
  right, truth, found = np.diag(table), table.sum(axis=1), table.sum(axis=0)
  counted = truth + found > 0
  if background >= 0:
    counted[background] = False
  if not table.sum() > 0:
    raise ValueError('no pixel is counted')
  with np.errstate(invalid='ignore', divide='ignore'):
    iou, dice = right / (truth + found - right), 2 * right / (truth + found)
  return {
    'miou': _mean_defined(np.where(counted, iou, np.nan)),
    'dice': _mean_defined(np.where(counted, dice, np.nan)),
    'pixel_accuracy': float(right.sum() / table.sum()),
  }


def regression(predicted, values, weights=None) -> dict[str, float]:
  """mae, rmse and r2 over all examples and outputs; predicted, values [n] or [n, K].

  r2 is 1 - squared error / squared distance from the mean of its output, a mean over the outputs that vary.
  """
  predicted, values = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (predicted, values))
  if predicted.shape != values.shape:
    raise ValueError(f'predicted {predicted.shape} and values {values.shape} differ in shape')
  weights = np.ones(len(values)) if weights is None else np.asarray(weights, np.float64)
  error = predicted - values
  spread = _weighted_columns((values - _weighted_columns(values, weights)) ** 2, weights)
  squared = _weighted_columns(error**2, weights)
  with np.errstate(invalid='ignore', divide='ignore'):
    explained = np.where(spread > 0, 1 - squared / spread, np.nan)
  return {
    'mae': float(np.mean(_weighted_columns(np.abs(error), weights))),
    'rmse': float(np.sqrt(np.mean(squared))),
    'r2': _mean_defined(explained),
  }


def _weighted_columns(values, weights):
  if not weights.sum() > 0:
    raise ValueError(f'no example has a weight above 0 ({len(values)} examples)')
  return weights @ values / weights.sum()


def psnr(predicted, images, span: float = 1.0) -> np.ndarray:
  """Peak signal-to-noise ratio of each image in dB, [n]; predicted, images [n, ...]; span: largest minus smallest value.

  Infinite for images that are equal.
  """
  predicted, images = np.asarray(predicted, np.float64), np.asarray(images, np.float64)
  squared = np.mean((predicted - images).reshape(len(images), -1) ** 2, axis=1)
  with np.errstate(divide='ignore'):
    return 10 * np.log10(span**2 / squared)


def ssim(predicted, images, span: float = 1.0, sigma: float = 1.5) -> np.ndarray:
  """Structural similarity of each image, [n]; predicted, images [n, *spatial, C] (Wang et al. 2004, section III.C).

  Gaussian window of `sigma`, cut at 3.5 sigma (11 wide for 1.5) and normalised, population variances, K1 0.01 and K2
  0.03; the mean over the places where the window fits, and over the channels. scikit-image's structural_similarity with
  gaussian_weights=True, use_sample_covariance=False.
  """
  x, y = np.asarray(predicted, np.float64), np.asarray(images, np.float64)
  if x.shape != y.shape or x.ndim < 3:
    raise ValueError(f'predicted {x.shape} and images {y.shape}: expected [n, *spatial, C] both')
  radius = int(3.5 * sigma + 0.5)
  if min(x.shape[1:-1]) <= 2 * radius:
    raise ValueError(f'images of {x.shape[1:-1]} are smaller than the window of {2 * radius + 1}; lower sigma')
  window = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
  window /= window.sum()

  def smooth(image):
    for axis in range(1, image.ndim - 1):
      image = np.lib.stride_tricks.sliding_window_view(image, len(window), axis=axis) @ window
    return image

  c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
  mean_x, mean_y = smooth(x), smooth(y)
  var_x, var_y = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2
  both = smooth(x * y) - mean_x * mean_y
  value = (2 * mean_x * mean_y + c1) * (2 * both + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
  return value.reshape(len(x), -1).mean(axis=1)


def with_intervals(
  figures_of: Callable[[np.ndarray], Mapping[str, float]],
  count: int,
  resamples: int,
  level: float = 0.95,
  seed: int = 0,
) -> dict[str, float]:
  """Figures of a test set of `count` examples, with NAME_low and NAME_high by the percentile bootstrap over its examples.

  The interval says how much a figure would move with another test set of this size; it says nothing about another seed
  of training.

  Args:
    figures_of: rows [m] int, some repeated -> {name: figure}; called once with all rows, once per resample.
    resamples: 0 gives the figures alone.
  """
  result = dict(figures_of(np.arange(count)))
  if not resamples:
    return result
  rng = np.random.Generator(np.random.Philox(key=[seed, count]))
  drawn = [figures_of(rng.integers(count, size=count)) for _ in range(resamples)]
  tail = (1 - level) / 2
  for name in list(result):
    values = [figures.get(name, float('nan')) for figures in drawn]
    with warnings.catch_warnings():  # a figure that no resample defines has no interval
      warnings.simplefilter('ignore', RuntimeWarning)
      result[f'{name}_low'], result[f'{name}_high'] = (float(v) for v in np.nanquantile(values, [tail, 1 - tail]))
  return result
