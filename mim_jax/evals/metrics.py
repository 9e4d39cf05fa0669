"""Classification figures on host arrays, exact in float64: top-k, mean per class, confusion.

`weights` [n] counts each example (0 leaves it out); None counts each once. Accuracies are fractions in [0, 1].
"""

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
