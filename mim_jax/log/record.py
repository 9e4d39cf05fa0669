"""What a run left in its folder, as reports and comparisons read it: config, environment, figures. No jax, no checkpoint."""

import dataclasses
import functools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mim_jax import config
from mim_jax.errors import UserError
from mim_jax.log.progress import short
from mim_jax.log.writer import read_metrics

BASELINES = ('untrained', 'pixels')  # as in mim_jax.evals.suite, which takes seconds to import

# What an evaluator is told by at a glance: the first of these that it gives.
FIRST = ('top1', 'miou', 'dice', 'auroc', 'r2')

# Begins a figure of one kind of features or of one class, such as 'layer3/mean/top1' or 'class2/dice'.
FEATURES = re.compile(r'(cls|mean|max|both|layer\d+|class\d+)/')


@dataclasses.dataclass(frozen=True)
class Record:
  """A run's folder.

  Attributes:
    path: the folder.
    config: values by dotted key.
    env: environment of its last start by dotted key; empty when the folder has no env.json.
    rows: lines of metrics.jsonl, in order.
  """

  path: Path
  config: dict[str, Any]
  env: dict[str, Any]
  rows: list[dict]

  @functools.cached_property
  def lines(self) -> dict[str, dict[int, float]]:
    """{metric: {step: value}}, steps rising; where a step was measured twice, as by `mim-jax eval`, the later value."""
    lines = {}
    for row in self.rows:
      for name, value in row.items():
        if name != 'step':
          lines.setdefault(name, {})[row['step']] = value
    return {name: dict(sorted(line.items())) for name, line in lines.items()}

  @property
  def last_step(self) -> int:
    """The last step that anything is known of."""
    return max(row['step'] for row in self.rows)

  @property
  def seed(self) -> int:
    return self.config['seed']

  def at(self, name: str, step: int | None = None) -> tuple[int, float] | None:
    """(step, value) of a metric as it stood at `step`, by default at the end: its last value up to there.

    None when it has none, or when the run did not get to `step`.
    """
    if step is not None and self.last_step < step:
      return None
    known = [s for s in self.lines.get(name, ()) if step is None or s <= step]
    return (known[-1], self.lines[name][known[-1]]) if known else None


def read(path: str | Path) -> Record:
  """The record in a run's folder. Raises UserError when it is none, or nothing was logged yet."""
  path = Path(path)
  if not (path / 'config.json').is_file():
    raise UserError(f'{path} is not the folder of a run: it has no config.json; give what --workdir was in training')
  env = path / 'env.json'
  rows = read_metrics(path)
  if not rows:
    raise UserError(
      f'{path} has no figures yet: its metrics.jsonl is empty; the run logs the first ones after log_every'
    )
  return Record(
    path=path,
    config=config.leaves(config.read(path / 'config.json')),
    env=config.leaves(json.loads(env.read_text())) if env.is_file() else {},
    rows=rows,
  )


def losses(records: Iterable[Record]) -> list[str]:
  """Losses that the records have: the total first, unless it is the only part under another name."""
  records = list(records)
  names = {name for record in records for name in record.lines if name == 'loss' or name.startswith('loss/')}
  parts = sorted(names - {'loss'})
  if 'loss' in names and len(parts) == 1 and all(r.lines.get('loss') == r.lines.get(parts[0]) for r in records):
    names.remove('loss')
  return sorted(names)


def evaluation(name: str) -> tuple[str, str, str] | None:
  """(evaluator, figure, encoder) of a metric 'eval/knn/top1' or 'eval/knn/untrained/top1'; None for other metrics.

  The encoder is 'trained' or one of BASELINES.
  """
  kind, _, rest = name.partition('/')
  evaluator, _, figure = rest.partition('/')
  if kind != 'eval' or not figure:
    return None
  which, _, of_baseline = figure.partition('/')
  return (evaluator, of_baseline, which) if which in BASELINES and of_baseline else (evaluator, figure, 'trained')


def headlines(names: Iterable[str]) -> list[str]:
  """Those metrics that are figures of the trained encoder, without figures of single kinds of its features."""
  parts = {name: evaluation(name) for name in names}
  return [name for name, found in parts.items() if found and found[2] == 'trained' and not FEATURES.match(found[1])]


def same(a, b) -> bool:
  """Whether two config values are equal, a list being as good as a tuple."""
  plain = lambda value: json.dumps(value, sort_keys=True, default=list)
  return plain(a) == plain(b)


def with_spread(mean: float, spread: float | None) -> str:
  """'0.4123 ± 0.0021', the spread with the decimals of the mean."""
  text = short(mean)
  if spread is None:
    return text
  if 'e' in text:
    return f'{text} ± {spread:.1e}'
  return f'{text} ± {spread:.{len(text.partition(".")[2])}f}'
