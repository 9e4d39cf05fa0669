"""The page of a comparison: figures, curves, verdicts of references, runs, differences of configs and environments."""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mim_jax.errors import UserError
from mim_jax.log import compare, curves, page
from mim_jax.log.page import Html

ENVIRONMENT = re.compile(
  r'versions\.|git\.|devices\.(kind|count)$|processes$|python$|flags\.'
)  # keys that may change figures


def write(comparison: compare.Comparison, folder: str | Path) -> list[Path]:
  """Writes index.html and, where there are lines to draw, curves.png into `folder`; returns their paths."""
  folder = Path(folder)
  drawn = [chart for metric in comparison.metrics if (chart := _chart(comparison, metric)) and chart.points > 1]
  files = {'index.html': _page(comparison, drawn).encode()}
  if drawn:
    files['curves.png'] = curves.sheet(drawn)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
      (folder / name).write_bytes(content)
  except OSError as error:
    raise UserError(f'cannot write into {folder}: {error.strerror}; give another --out') from error
  return [folder / name for name in files]


def _page(comparison: compare.Comparison, drawn: Sequence[curves.Chart]) -> str:
  groups, references, step = comparison.groups, comparison.references, comparison.step
  labels = [members.label for members in groups]
  count = sum(len(members.runs) for members in groups)
  where = 'at the end of each run' if step is None else f'at step {step:,}'
  of = f' in {_plural(len(groups), "group")}' if count > len(groups) else ''
  lead = f'{_plural(count, "run")}{of}; figures {where}.'
  if len(labels) == 1:
    title = f'{labels[0]} against {references[0].name}' if references else labels[0]
  else:
    names, what = ' · '.join(labels), 'runs' if count == len(groups) else 'groups of runs'
    title = names if len(names) <= 60 else f'{len(groups)} {what} compared'
  areas = dict.fromkeys(band.label for chart in drawn for band in chart.bands)
  lines = page.join([page.legend(labels, list(areas)), page.charts(drawn)]) if drawn else Html('')
  found = [compare.state(runs) for *_, runs in comparison.verdicts()]
  if found:
    kind = 'good' if comparison.good else 'bad'
    lead = Html(f'{lead} <span class="{kind}">{found.count("inside")} of {len(found)} inside the reference.</span>')
  sections = [
    ('Figures', _figures(comparison)),
    ('Curves', lines),
    ('References', _references(comparison)),
    ('Runs', _runs(groups)),
    ('Config', _configs(groups)),
    ('Environment', _environments(groups)),
  ]
  return page.document(title, lead, sections)


def _figures(comparison: compare.Comparison) -> Html:
  """A small table per metric, side by side as far as there is room."""
  tables = []
  for metric in comparison.metrics:
    figures = [members.figure(metric, comparison.step) for members in comparison.groups]
    steps = [compare.span(figure.steps) if figure else '' for figure in figures]
    same_step = len({step for step in steps if step}) == 1
    rows = []
    for i, (members, figure, step) in enumerate(zip(comparison.groups, figures, steps, strict=True)):
      cells = [compare.counted(figure, members) if figure else '–'] + ([] if same_step else [step and f'step {step}'])
      rows.append([page.join([page.dot(i), page.name(members.label)]), *cells])
    where = f' <span class="soft">step {max(steps)}</span>' if same_step else ''
    tables.append(
      Html(f'<div><h3>{page.code(metric)}{where}</h3>{page.table([], rows, numbers=(1, 2), kind="full")}</div>')
    )
  counts = {len(members.runs) for members in comparison.groups}
  note = Html('')
  if counts != {1}:
    of = f' {_plural(*counts, "run")} each' if len(counts) == 1 else ' the runs of each group'
    note = Html(f'<p class="soft">Mean ± standard deviation over{of}, which differ in their seed only.</p>')
  return Html(f'{note}<div class="tables">{page.join(tables)}</div>')


def _references(comparison: compare.Comparison) -> Html:
  parts = []
  for reference, found in itertools.groupby(comparison.verdicts(), key=lambda entry: entry[0]):
    rows = []
    for metric, of_metric in itertools.groupby(found, key=lambda entry: entry[1]):
      rows.append([page.code(metric)])
      for *_, members, runs in of_metric:
        state = compare.state(runs)
        kind = {'inside': 'good', 'outside': 'bad', 'no value': 'bad'}.get(state, 'soft')
        rows.append([page.name(members.label), Html(f'<span class="{kind}">{state}</span>'), *compare.told(runs)])
    command = (
      Html(f'<details><summary>Command</summary>{page.command(reference.command)}</details>')
      if reference.command
      else ''
    )
    heading = Html(f'<h3>{page.text(reference.name)}</h3><p class="soft">{page.text(reference.source)}</p>')
    parts.append(page.join([heading, command, page.table([], rows, kind='stack')]))
  return page.join(parts)


def _runs(groups: Sequence[compare.Group]) -> Html:
  rows = []
  for i, members in enumerate(groups):
    one = len(members.runs) == 1
    if not one:
      rows.append([page.join([page.dot(i), page.name(members.label)])])
    for name, record in zip(members.names, members.runs, strict=True):
      device = f'{record.env["devices.count"]} × {record.env["devices.kind"]}' if 'devices.kind' in record.env else '–'
      rows.append(
        [
          page.join([page.dot(i), page.name(name)]) if one else page.name(name),
          record.seed,
          f'{record.last_step:,}',
          device,
        ]
      )
  return page.table(['run', 'seed', 'last step', 'devices'], rows, numbers=(1, 2, 3))


def _configs(groups: Sequence[compare.Group]) -> Html:
  found = compare.differences([(members.label, members.config) for members in groups])
  return _differing(found) if len(groups) > 1 else Html('')


def _environments(groups: Sequence[compare.Group]) -> Html:
  """Where versions, code and devices differ; a group stands for its runs where they agree."""
  of_run = {
    name: {key: value for key, value in record.env.items() if ENVIRONMENT.match(key)}
    for members in groups
    for name, record in zip(members.names, members.runs, strict=True)
    if record.env
  }
  found = {}
  for key, by_value in compare.differences(list(of_run.items())).items():
    found[key] = []
    for value, names in by_value:
      whole = [members for members in groups if set(members.names) <= set(names)]
      rest = [name for name in names if not any(name in members.names for members in whole)]
      found[key].append((value, [*(members.label for members in whole), *rest]))
  if len(of_run) < 2:
    return Html('')
  return _differing(found) if found else Html('<p class="soft">The same versions, code and devices everywhere.</p>')


def _differing(found: Mapping[str, Sequence[tuple[str, Sequence[str]]]]) -> Html:
  rows = []
  for key, by_value in found.items():
    rows.append([page.code(key)])
    rows += [[page.code(value), page.join(map(page.name, having), ', ')] for value, having in by_value]
  return page.table([], rows)


def _chart(comparison: compare.Comparison, metric: str) -> curves.Chart | None:
  """Runs faint and the mean of each group on top, over the bands of references; None when no run has the metric."""
  lines = []
  for i, members in enumerate(comparison.groups):
    of_runs = [record.lines[metric] for record in members.runs if metric in record.lines]
    if not of_runs:
      continue
    if len(of_runs) > 1:
      lines += [curves.Line(members.label, list(line), list(line.values()), i, faint=True) for line in of_runs]
    shared = sorted(set.intersection(*map(set, of_runs)))
    means = [float(np.mean([line[step] for line in of_runs])) for step in shared]
    lines.append(curves.Line(members.label, shared, means, i))
  bands = [
    curves.Band(f'reference {reference.name}', band.steps, band.low, band.high)
    for reference in comparison.references
    if (band := reference.bands.get(metric))
  ]
  return curves.Chart(metric, tuple(lines), tuple(bands)) if lines else None


def _plural(count: int, noun: str) -> str:
  return f'{count} {noun}' if count == 1 else f'{count} {noun}s'
