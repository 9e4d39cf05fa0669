"""Runs next to each other and next to references: groups over seeds, their figures, what differs in their configs."""

import dataclasses
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mim_jax.errors import UserError, nearest
from mim_jax.log.progress import short
from mim_jax.log.record import Record, headlines, losses, same, with_spread
from mim_jax.log.reference import Reference, Verdict


@dataclasses.dataclass(frozen=True)
class Group:
  """Runs whose configs differ in nothing but the seed.

  Attributes:
    label: name of the run's folder, or what the names of several have in common.
    runs: their records.
    names: of their folders, as short as they are unique.
  """

  label: str
  runs: tuple[Record, ...]
  names: tuple[str, ...]

  @property
  def config(self) -> dict[str, Any]:
    """Values by dotted key, without the seed."""
    return _unseeded(self.runs[0])

  @property
  def seeds(self) -> str:
    return ', '.join(str(seed) for seed in sorted(record.seed for record in self.runs))

  def figure(self, metric: str, step: int | None = None) -> 'Figure | None':
    """A metric at `step`, by default at the end of each run; None when no run has it there."""
    found = [at for record in self.runs if (at := record.at(metric, step)) is not None]
    return Figure(tuple(value for _, value in found), tuple(s for s, _ in found)) if found else None


@dataclasses.dataclass(frozen=True)
class Figure:
  """One metric over the seeds of a group: its value in every run that has it, and the step that value is of."""

  values: tuple[float, ...]
  steps: tuple[int, ...]

  @property
  def mean(self) -> float:
    return float(np.mean(self.values))

  @property
  def spread(self) -> float | None:
    """Standard deviation over the runs (n - 1); None for one run."""
    return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else None

  def __str__(self):
    return with_spread(self.mean, self.spread)


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Everything a comparison is made of.

  Attributes:
    metrics: what is compared, in order.
    step: where; None is the end of each run.
  """

  groups: tuple[Group, ...]
  references: tuple[Reference, ...]
  metrics: tuple[str, ...]
  step: int | None = None

  def verdicts(self) -> list[tuple[Reference, str, Group, list[Verdict]]]:
    """What each reference says of each of its metrics in each group, a verdict per run."""
    return [
      (reference, metric, group, [reference.judge(record, metric, self.step) for record in group.runs])
      for reference in self.references
      for metric in reference.bands
      for group in self.groups
    ]

  @property
  def good(self) -> bool:
    """Whether nothing is outside its band or missing, and every reference could judge something of every group."""
    found = self.verdicts()
    if any(v.state in ('outside', 'no value') for *_, runs in found for v in runs):
      return False
    judged = {(id(reference), id(group)) for reference, _, group, runs in found if any(v.low is not None for v in runs)}
    return len(judged) == len(self.references) * len(self.groups)


def compare(
  records: Sequence[Record], references: Sequence[Reference] = (), pattern: str | None = None, step: int | None = None
) -> Comparison:
  """Groups runs and chooses metrics.

  Args:
    pattern: regex of the metrics to compare, searched in their names. By default losses and the figures of evaluators,
      without their baselines and single kinds of features, and everything that a reference has.
    step: compare there; by default at the end of each run.

  Raises UserError for the same folder twice, a pattern that is no regex or fits no metric, or a step no run has reached.
  """
  if step is not None and all(record.last_step < step for record in records):
    reached = max(record.last_step for record in records)
    raise UserError(f'no run has reached step {step}; the furthest is at step {reached}')
  return Comparison(tuple(group(records)), tuple(references), _metrics(records, references, pattern), step)


def group(records: Sequence[Record]) -> list[Group]:
  """Groups of runs whose configs differ in `seed` only, in the order of their first runs, each by rising seed.

  Raises UserError when a folder is given twice.
  """
  folders = [record.path.resolve() for record in records]
  for folder in folders:
    if folders.count(folder) > 1:
      raise UserError(f'{folder} is given {folders.count(folder)} times; give each run once')
  root = Path(os.path.commonpath([folder.parent for folder in folders]))
  groups: list[list[tuple[str, Record]]] = []
  for folder, record in zip(folders, records, strict=True):
    entry = (folder.relative_to(root).as_posix(), record)
    for members in groups:
      if same(_unseeded(members[0][1]), _unseeded(record)):
        members.append(entry)
        break
    else:
      groups.append([entry])
  groups = [sorted(members, key=lambda entry: entry[1].seed) for members in groups]
  labels = [_common([name for name, _ in members]) for members in groups]
  return [
    Group(
      label
      if labels.count(label) == 1
      else f'{members[0][0]} (+{len(members) - 1})'
      if len(members) > 1
      else members[0][0],
      tuple(record for _, record in members),
      tuple(name for name, _ in members),
    )
    for label, members in zip(labels, groups, strict=True)
  ]


def differences(entries: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, list[tuple[str, list[str]]]]:
  """{key: [(value, labels of the entries that have it), ...]} for the keys in which entries (label, values) differ."""
  found = {}
  for key in sorted(set().union(*(values for _, values in entries))):
    texts = {}
    for label, values in entries:
      texts.setdefault(_value(values[key]) if key in values else 'not set', []).append(label)
    if len(texts) > 1:
      found[key] = list(texts.items())
  return found


def table(comparison: Comparison, width: int = 120) -> str:
  """Text table: a row per group, a column per metric, mean ± standard deviation over seeds; broken into blocks of `width`."""
  rows = [['', 'runs', 'step', *comparison.metrics]]
  for members in comparison.groups:
    figures = [members.figure(metric, comparison.step) for metric in comparison.metrics]
    steps = span([s for figure in figures if figure for s in figure.steps])
    cells = [counted(figure, members) if figure else '-' for figure in figures]
    rows.append([members.label, str(len(members.runs)), steps, *cells])
  widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
  blocks, columns = [], []
  for c in range(3, len(widths)):
    if columns and sum(widths[k] + 2 for k in (0, 1, 2, *columns, c)) > width:
      blocks.append(columns)
      columns = []
    columns.append(c)
  blocks.append(columns)
  lines = []
  for columns in blocks:
    for row in rows:
      cells = [row[0].ljust(widths[0]), *(row[c].rjust(widths[c]) for c in (1, 2, *columns))]
      lines.append('  '.join(cells).rstrip())
    lines.append('')
  return '\n'.join(lines[:-1])


def verdict_lines(comparison: Comparison) -> list[str]:
  """A line per reference, metric and group that says whether its runs lie in the band."""
  lines = []
  for reference, found in itertools.groupby(comparison.verdicts(), key=lambda entry: entry[0]):
    lines.append(f'reference {reference.name}: {reference.source}')
    for _, metric, members, runs in found:
      lines.append(f'  {state(runs):<9} {metric}, {members.label}: {", ".join(filter(None, told(runs)))}')
  return lines


# ---- choosing and naming ----


def _metrics(records, references, pattern) -> tuple[str, ...]:
  names = list(dict.fromkeys(name for record in records for name in record.lines))
  if pattern is None:
    wanted = [metric for reference in references for metric in reference.bands if metric in names]
    return tuple(dict.fromkeys([*losses(records), *headlines(names), *wanted]))
  try:
    chosen = tuple(name for name in names if re.search(pattern, name))
  except re.error as error:
    raise UserError(f'--metrics={pattern} is no regular expression: {error}') from error
  if not chosen:
    raise UserError(f'no metric of these runs fits --metrics={pattern}; {nearest(pattern, names)}')
  return chosen


def _unseeded(record: Record) -> dict[str, Any]:
  return {key: value for key, value in record.config.items() if key != 'seed'}


def _common(names: list[str]) -> str:
  """What names of runs have in common, without the seed at its end: 'mae,seed=10', 'mae,seed=11' -> 'mae'."""
  if len(names) == 1:
    return re.sub(r'(?<=\w)[\W_]+seed\W?\d+$', '', names[0])
  prefix = os.path.commonprefix(names)
  if all(rest[:1].isdigit() or not rest for rest in (name[len(prefix) :] for name in names)):
    prefix = prefix.rstrip('0123456789')
  prefix = re.sub(r'([\W_]+(seed|run|s)?)[\W_]*$', '', prefix)
  return prefix or f'{names[0]} (+{len(names) - 1})'


def _value(value) -> str:
  return repr(tuple(value) if isinstance(value, list) else value)


def span(steps: Sequence[int]) -> str:
  """'1,500', or '40-60' where the steps differ."""
  if not steps:
    return '-'
  low, high = min(steps), max(steps)
  return f'{low:,}' if low == high else f'{low:,}-{high:,}'


def counted(figure: Figure, members: Group) -> str:
  """The figure, with how many runs have it where that is not all."""
  missing = len(figure.values) < len(members.runs)
  return f'{figure} (of {len(figure.values)})' if missing else str(figure)


# ---- verdicts in words ----


def state(runs: Sequence[Verdict]) -> str:
  """The verdict on the runs of a group together: the worst one that there is."""
  found = {v.state for v in runs}
  return next((worst for worst in ('outside', 'no value', 'inside') if worst in found), 'no band')


def told(runs: Sequence[Verdict]) -> tuple[str, str, str]:
  """What was found, the band, and how much of the runs is inside, for people; '' for what there is not."""
  judged, measured = [v for v in runs if v.low is not None], [v for v in runs if v.value is not None]
  if not judged:
    where = f'no band at step {span([v.step for v in measured])}' if measured else 'not measured there'
    return where, '', ''
  figure = Figure(tuple(v.value for v in judged), tuple(v.step for v in judged))
  inside = []
  if len(runs) > 1:
    inside.append(f'{sum(v.state == "inside" for v in runs)} of {len(runs)} runs')
  points = sum(v.judged for v in judged)
  if points > len(judged):
    inside.append(f'{sum(v.inside for v in judged) / points:.0%} of the curve')
  band = f'band {short(judged[0].low)} to {short(judged[0].high)}'
  return f'{figure} at step {span(figure.steps)}', band, f'{", ".join(inside)} inside' if inside else ''
