"""Reference curves: bands that the figures of a run should lie in, with where they come from.

A reference is a JSON file:

  {
    "name": "MAE debug recipe",                              optional, the name of the file by default
    "source": "ten runs, seeds 0 to 9, commit 1a2b3c, 2 CPU cores",
    "command": "python -m mim_jax.train ...",              optional, what made it
    "metrics": {
      "loss/pixel": [[200, 0.61, 0.66], [1500, 0.38, 0.41]],          step, lowest, highest; straight lines in between
      "eval/knn/top1": {"mean": 0.41, "spread": 0.02, "step": 1500},  0.39 to 0.43 at that step
      "eval/linear/top1": {"mean": 0.45, "spread": 0.02}              without a step: at the end of a run
    }
  }
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mim_jax.errors import UserError, nearest
from mim_jax.log.record import Record

CONFIDENCE = 0.99  # that another seed lies in a band made from runs
FEWEST = 3  # runs that a band can be made from
POINTS = 100  # most points that a band is written with
ROUNDING = 1e-5  # smallest half-width of a band, relative to its middle: other machines add in another order


@dataclasses.dataclass(frozen=True)
class Band:
  """Where a metric should be: `low` to `high` at `steps`, rising; steps is empty for a band of the end of a run."""

  steps: tuple[int, ...]
  low: tuple[float, ...]
  high: tuple[float, ...]

  def at(self, step: int) -> tuple[float, float] | None:
    """Lowest and highest good value at a step, None before the first and after the last point."""
    if not self.steps[0] <= step <= self.steps[-1]:
      return None
    return float(np.interp(step, self.steps, self.low)), float(np.interp(step, self.steps, self.high))


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What a reference says of one metric of one run.

  Attributes:
    state: 'inside', 'outside', 'no value' (the run does not have it at that step) or 'no band' (the reference has none
      there).
    value, step: what was judged, None without a value.
    low, high: the band at that step, None without one.
    inside, judged: points of the whole curve in the band, and points where there is a band.
  """

  state: str
  value: float | None = None
  step: int | None = None
  low: float | None = None
  high: float | None = None
  inside: int = 0
  judged: int = 0


@dataclasses.dataclass(frozen=True)
class Reference:
  """Bands by metric, and where they come from."""

  name: str
  source: str
  bands: dict[str, Band]
  command: str = ''

  def judge(self, record: Record, metric: str, step: int | None = None) -> Verdict:
    """Whether a metric of a run lies in its band at `step`.

    Without `step` it is judged at the last logged step that the band covers, and a band of the end of a run by the last
    value.
    """
    band, found = self.bands[metric], record.at(metric, step)
    if found is None:
      return Verdict('no value')
    if not band.steps:
      if step is not None:
        return Verdict('no band', found[1], found[0])
      (low,), (high,) = band.low, band.high
      good = low <= found[1] <= high
      return Verdict('inside' if good else 'outside', found[1], found[0], low, high, int(good), 1)
    covered = [(s, value, *band.at(s)) for s, value in record.lines[metric].items() if band.at(s)]
    judged, inside = len(covered), sum(low <= value <= high for _, value, low, high in covered)
    here = [point for point in covered if step is None or point[0] == found[0]]
    if not here:
      return Verdict('no band', found[1], found[0], inside=inside, judged=judged)
    s, value, low, high = here[-1]
    return Verdict('inside' if low <= value <= high else 'outside', value, s, low, high, inside, judged)


def read(path: str | Path) -> Reference:
  """The reference in a JSON file. Raises UserError saying which entry does not fit, and what would."""
  path = Path(path)
  try:
    found = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise UserError(f'{path} cannot be read as a reference: {error}; expected the JSON of docs/compare.md') from error
  if not isinstance(found, dict):
    raise UserError(f'{path}: expected an object with "source" and "metrics", found {_kind(found)}')
  _keys(found, ('source', 'metrics'), ('name', 'command'), path)
  for key in ('source', 'name', 'command'):
    if key in found and not (isinstance(found[key], str) and found[key].strip()):
      raise UserError(f'{path}: "{key}" is {json.dumps(found[key])}; expected text that says it')
  if not isinstance(found['metrics'], dict) or not found['metrics']:
    raise UserError(f'{path}: "metrics" is {found["metrics"]!r}; expected an object of metric name and band')
  bands = {name: _band(entry, f'{path}, metric {name!r}') for name, entry in found['metrics'].items()}
  return Reference(found.get('name', path.stem), found['source'], bands, found.get('command', ''))


def _band(entry: Any, where: str) -> Band:
  if isinstance(entry, dict):
    _keys(entry, ('mean', 'spread'), ('step',), where)
    mean, spread = (_number(entry[key], f'{where}: "{key}"') for key in ('mean', 'spread'))
    if spread < 0:
      raise UserError(f'{where}: "spread" is {spread}; expected the half-width of the band, 0 or more')
    steps = (_step(entry['step'], where),) if 'step' in entry else ()
    return Band(steps, (mean - spread,), (mean + spread,))
  if not isinstance(entry, list) or not entry:
    raise UserError(f'{where}: found {_kind(entry)}; expected [[step, low, high], ...] or {{"mean": m, "spread": s}}')
  points = []
  for i, point in enumerate(entry):
    if not isinstance(point, list) or len(point) != 3:
      raise UserError(f'{where}, point {i}: found {json.dumps(point)}; expected [step, low, high]')
    step = _step(point[0], f'{where}, point {i}')
    low, high = (_number(value, f'{where}, point {i}') for value in point[1:])
    if low > high:
      raise UserError(f'{where}, point {i}: low {low} is above high {high}; expected [step, low, high]')
    if points and step <= points[-1][0]:
      raise UserError(f'{where}, point {i}: step {step} comes after step {points[-1][0]}; steps must rise')
    points.append((step, low, high))
  return Band(*map(tuple, zip(*points, strict=True)))


def _keys(found: dict, needed: Sequence[str], optional: Sequence[str], where):
  for key in found:
    if key not in (*needed, *optional):
      raise UserError(f'{where} has no place for the key {key!r}; {nearest(key, (*needed, *optional))}')
  missing = [key for key in needed if key not in found]
  if missing:
    raise UserError(f'{where} lacks {" and ".join(map(repr, missing))}; it has {", ".join(found) or "nothing"}')


def _number(value, where: str) -> float:
  if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
    raise UserError(f'{where}: found {json.dumps(value)}; expected a finite number')
  return float(value)


def _step(value, where: str) -> int:
  number = _number(value, f'{where}, step')
  if number < 0 or number != int(number):
    raise UserError(f'{where}: step {value} is none; expected a whole number, 0 or more')
  return int(number)


def _kind(value) -> str:
  names = {dict: 'an object', list: 'a list', str: 'text', type(None): 'null', bool: 'a truth value'}
  return 'an empty list' if value == [] else names.get(type(value), 'a number')


def of(records: Sequence[Record], metrics: Sequence[str], name: str) -> dict[str, Any]:
  """A reference as JSON from runs that differ in their seeds: bands that another seed lies in with 99 % probability.

  The band at a step is the prediction interval for one more normally distributed value, mean ± t s sqrt(1 + 1/n), so
  that it is wide where it rests on few runs. s^2 is averaged over neighbouring steps, 1/20 of the curve, as that of a
  few values jumps. A metric is taken at steps that all runs have it at, a hundred of them at the most.

  Raises UserError for fewer than three runs, twice the same seed, or a value that is not finite.
  """
  from scipy.stats import t  # jax brings scipy along

  n, seeds = len(records), sorted(record.seed for record in records)
  if n < FEWEST or len(set(seeds)) < n:
    raise UserError(f'a reference needs {FEWEST} runs or more of different seeds; found {n} with seeds {seeds}')
  factor = t.ppf(0.5 + CONFIDENCE / 2, n - 1) * math.sqrt(1 + 1 / n)
  bands = {}
  for metric in metrics:
    lines = [record.lines.get(metric, {}) for record in records]
    steps = sorted(set.intersection(*map(set, lines)))
    if not steps:
      continue
    values = np.array([[line[step] for line in lines] for step in steps])
    if not np.isfinite(values).all():
      bad = np.argmax(~np.isfinite(values).all(axis=1))
      raise UserError(f'{metric} at step {steps[bad]} is {values[bad].tolist()}; a band needs finite values')
    middle, variance = values.mean(axis=1), values.var(axis=1, ddof=1)
    reach = len(steps) // 40
    smooth = np.array([variance[max(0, i - reach) : i + reach + 1].mean() for i in range(len(steps))])
    half = np.maximum(factor * np.sqrt(smooth), ROUNDING * np.abs(middle))
    kept = np.unique(np.linspace(0, len(steps) - 1, min(POINTS, len(steps))).round().astype(int))
    bands[metric] = [[steps[i], float(middle[i] - half[i]), float(middle[i] + half[i])] for i in kept]
  if not bands:
    raise UserError('these runs have no metric at a step that all of them have')
  told = lambda key: ' and '.join(sorted({str(record.env.get(key, 'unknown')) for record in records}))
  dirty = any(record.env.get('git.dirty') for record in records)
  made = {
    'name': name,
    'source': f'{n} runs, seeds {", ".join(map(str, seeds))}; commit {told("git.commit")}{" with changes" if dirty else ""}; '
    f'{told("devices.count")} x {told("devices.kind")}; jax {told("versions.jax")}; another seed is inside with probability {CONFIDENCE}',
  }
  if command := records[0].env.get('command'):
    made['command'] = command
  return made | {'metrics': bands}


def text(made: Mapping[str, Any]) -> str:
  """A reference as the text of its file, a line per point."""
  entries = []
  for metric, points in made['metrics'].items():
    lines = ',\n'.join(f'      {json.dumps(point)}' for point in points)
    entries.append(f'    {json.dumps(metric)}: [\n{lines}\n    ]')
  head = ''.join(f'  {json.dumps(key)}: {json.dumps(value)},\n' for key, value in made.items() if key != 'metrics')
  return '{\n' + head + '  "metrics": {\n' + ',\n'.join(entries) + '\n  }\n}\n'
