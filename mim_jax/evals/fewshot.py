"""Few-shot linear classifier in closed form: ridge regression on `shots` examples of each class, over several seeds.

The protocol of big_vision's few-shot probe as UMD (arXiv 2406.17688) uses it with 100 shots: features whitened per
dimension by mean and standard deviation (+ 1e-5) of the shots, a constant of 100 appended as bias, targets +1 / -1 per
class, l2 = 1024, solved through an eigendecomposition. In float64 on the host, so the same on any device.
"""

import numpy as np

from mim_jax.errors import ConfigError, UserError
from mim_jax.evals import features, metrics

DEFAULTS = {
  **features.DEFAULTS,
  'shots': (10,),  # examples per class, each number a figure of its own
  'seeds': 5,  # draws of the shots
  'l2': 1024.0,
}

BIAS = 100.0  # large, so that the penalty hardly touches the bias


def ridge(x, labels, classes: int, l2: float):
  """One-against-rest ridge regression of x [n, D], labels [n] -> function from [m, D] to scores [m, classes] float64.

  Minimises |X W - Y|^2 + l2 |W|^2 with X the whitened features and the constant, Y in {-1, 1}. Solves in the smaller
  of D + 1 and n dimensions.
  """
  x = np.asarray(x, np.float64)
  mean, scale = x.mean(axis=0), x.std(axis=0) + 1e-5

  def whiten(rows):
    rows = (np.asarray(rows, np.float64) - mean) / scale
    return np.concatenate([rows, np.full((len(rows), 1), BIAS)], axis=1)

  design = whiten(x)
  target = np.where(np.asarray(labels)[:, None] == np.arange(classes), 1.0, -1.0)
  primal = len(design) >= design.shape[1]
  values, vectors = np.linalg.eigh(design.T @ design if primal else design @ design.T)
  right = design.T @ target if primal else target
  solution = vectors @ ((vectors.T @ right) / (values[:, None] + l2))  # (X^T X + l2)^-1 X^T Y, or (X X^T + l2)^-1 Y
  weights = solution if primal else design.T @ solution
  return lambda rows: whiten(rows) @ weights


def choose(labels, classes: int, shots: int, seed: int) -> np.ndarray:
  """Indices of `shots` examples of every class that occurs, a function of (labels, shots, seed).

  Raises UserError if a class has fewer.
  """
  rng = np.random.Generator(np.random.Philox(key=[seed, shots]))
  order = rng.permutation(len(labels))
  by_class = [order[labels[order] == c] for c in range(classes)]
  short = {c: len(index) for c, index in enumerate(by_class) if 0 < len(index) < shots}
  if short:
    c, n = min(short.items(), key=lambda item: item[1])
    raise UserError(
      f'few-shot: class {c} has {n} training examples, {shots} shots were asked; '
      f'set evals.fewshot.shots to {n} or fewer'
    )
  return np.sort(np.concatenate([index[:shots] for index in by_class]))


def run(encoder: features.Encoder, cfg, ctx: features.Context) -> dict[str, float]:
  """Mean 'NNshot/top1' over the seeds and their standard deviation 'NNshot/spread' (with two seeds or more)."""
  if cfg.l2 <= 0 or cfg.seeds < 1 or not cfg.shots or min(cfg.shots) < 1:
    raise ConfigError(
      'few-shot needs l2 > 0, seeds >= 1 and shots >= 1; '
      f'found l2={cfg.l2}, seeds={cfg.seeds}, shots={tuple(cfg.shots)}'
    )
  train, train_labels, test, test_labels, classes = features.train_and_test(encoder, ctx, cfg)

  def accuracy(name, shots, seed):
    ctx.check_stop()
    index = choose(train_labels, classes, shots, seed)
    scores = ridge(train[name][index], train_labels[index], classes, cfg.l2)(test[name])
    return metrics.topk_accuracy(scores, test_labels)

  def figures(name):
    result = {}
    for shots in cfg.shots:
      values = [accuracy(name, shots, seed) for seed in range(cfg.seeds)]
      result[f'{shots}shot/top1'] = float(np.mean(values))
      if cfg.seeds > 1:
        result[f'{shots}shot/spread'] = float(np.std(values, ddof=1))
    return result

  return features.best_of({name: figures(name) for name in train}, by=f'{cfg.shots[0]}shot/top1', say=ctx.say)
