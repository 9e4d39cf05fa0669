"""The story of one run on one HTML page: figures, curves, pictures, time, faults, config, environment."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mim_jax import config, method
from mim_jax.errors import ConfigError, UserError
from mim_jax.evals import suite
from mim_jax.log import curves, page
from mim_jax.log.page import Html
from mim_jax.log.progress import duration, short
from mim_jax.log.record import BASELINES, FIRST, Record, evaluation, headlines, losses, same

PANELS = 4  # pictures of a kind that are shown: the first, the last, and some in between
FAULTS = 20  # faults that are listed
PICTURE = re.compile(r'(.+)_(\d{8,})\.png')  # as the writer names them
SHARES = ('top1', 'top5', 'class_mean')  # figures between 0 and 1 that are told in percent


def write(record: Record, path: str | Path):
  """Writes the page about a run. Raises UserError when the file cannot be written."""
  path = Path(path)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(record), encoding='utf-8')
  except OSError as error:
    raise UserError(f'cannot write {path}: {error.strerror}; give another --out') from error


def render(record: Record) -> str:
  """The page as text. A run that goes on may be shown as well."""
  name = record.config.get('method.name', 'unknown method')
  lead = f'{name}, {record.config["duration"]} on {record.config["data.source"]}, batch {record.config["batch_size"]:,}, seed {record.seed}'
  sections = [
    ('Evaluation', _evaluation(record)),
    ('Losses', page.charts([_chart(record, metric) for metric in losses([record])])),
    ('Pictures', _pictures(record.path / 'panels')),
    ('Optimisation', page.charts([_chart(record, metric) for metric in _others(record)])),
    ('Time', _time(record)),
    ('Faults', _faults(record)),
    ('Checkpoints', _checkpoints(record.path / 'checkpoints')),
    ('Config', _config(record.config)),
    ('Environment', _environment(record.env)),
  ]
  return page.document(record.path.resolve().name, lead, sections, top=page.facts(_glance(record)))


# ---- figures ----


def _glance(record: Record) -> list[tuple]:
  facts = [('Steps', f'{record.last_step:,}', f'of {record.config["duration"]}')]
  for metric in losses([record])[:1]:
    step, value = record.at(metric)
    first = next(iter(record.lines[metric].values()))
    facts.append((metric, short(value), f'{short(first)} at first'))
  shown = set()
  for metric in headlines(record.lines):
    evaluator, figure, _ = evaluation(metric)
    if figure in FIRST and evaluator not in shown:
      shown.add(evaluator)
      baselines = {which: record.at(f'eval/{evaluator}/{which}/{figure}') for which in BASELINES}
      beside = ', '.join(f'{which} {_figure(figure, at[1])}' for which, at in baselines.items() if at)
      facts.append((f'{evaluator} {figure}', _figure(figure, record.at(metric)[1]), beside))
  spent = _spent(record)
  if spent:
    facts.append(('Images per second', f'{spent["images_per_s"]:,.0f}', 'median'))
    facts.append(('Training', duration(spent['seconds']), f'{spent["waiting"]:.0%} waiting for data'))
  return facts


def _evaluation(record: Record) -> Html:
  """Every figure of the newest evaluation next to its baselines, and its curve where there are several."""
  figures: dict[str, dict[str, dict[str, float]]] = {}
  for name in record.lines:
    if parts := evaluation(name):
      evaluator, figure, which = parts
      figures.setdefault(evaluator, {}).setdefault(figure, {})[which] = record.at(name)
  rows, strong = [], []
  used = [which for which in BASELINES if any(which in of for by in figures.values() for of in by.values())]
  for evaluator, by_figure in sorted(figures.items()):
    steps = {of['trained'][0] for of in by_figure.values() if 'trained' in of}
    rows.append([f'{evaluator}, step {max(steps):,}' if steps else evaluator])
    for figure, of in by_figure.items():
      if figure == 'top1':
        strong.append(len(rows))
      rows.append([figure, *(_figure(figure, of[which][1]) if which in of else '–' for which in ('trained', *used))])
  if not rows:
    return Html('')
  table = page.table(['', 'trained', *used], rows, numbers=range(1, 2 + len(used)), strong=strong)
  drawn = [_chart(record, name) for name in headlines(record.lines) if len(record.lines[name]) > 1]
  return page.join([table, Html('<h3>While training</h3>') if drawn else '', page.charts(drawn)])


def _figure(figure: str, value: float) -> str:
  return f'{value:.1%}' if figure.rpartition('/')[2] in SHARES and math.isfinite(value) else short(value)


def _chart(record: Record, metric: str) -> curves.Chart:
  line = record.lines[metric]
  levels = ()
  if parts := evaluation(metric):
    evaluator, figure, _ = parts
    beside = {which: record.at(f'eval/{evaluator}/{which}/{figure}') for which in BASELINES}
    levels = tuple((which, at[1]) for which, at in beside.items() if at)
  return curves.Chart(
    metric, (curves.Line(metric, list(line), list(line.values())),), levels=levels, linear=metric == 'lr'
  )


def _others(record: Record) -> list[str]:
  """Metrics of the step that have no place elsewhere: learning rate and norms first, then what the method tells."""
  known = ('loss', 'eval', 'time', 'memory', 'faults')
  names = [name for name in record.lines if name.partition('/')[0] not in known]
  return sorted(names, key=lambda name: (name != 'lr', not name.startswith('norm/'), name))


# ---- pictures ----


def _pictures(folder: Path) -> Html:
  """Some pictures of each kind over time; a click on a step shows its picture as large as it goes."""
  kinds: dict[str, list[tuple[int, Path]]] = {}
  for path in sorted(folder.glob('*.png')):
    if match := PICTURE.fullmatch(path.name):
      kinds.setdefault(match[1], []).append((int(match[2]), path))
  parts = []
  for kind, found in kinds.items():
    figures = []
    for step, path in spread(sorted(found), PANELS):
      anchor = f'{kind}-{step}'
      caption = Html(f'<figcaption><a href="#{anchor}" title="enlarge">step {step:,}</a></figcaption>')
      figures.append(
        Html(f'<figure id="{anchor}">{caption}{page.photo(path.read_bytes(), f"{kind} at step {step}")}</figure>')
      )
    heading = Html(f'<h3>{page.text(kind)}</h3>') if len(kinds) > 1 else Html('')
    parts.append(Html(f'{heading}<div class="panels">{page.join(figures)}</div>'))
  hint = Html('<p class="soft">A click on a step enlarges its picture.</p>') if parts else ''
  return page.join([hint, *parts])


def spread(items: Sequence, most: int) -> list:
  """The first, the last and evenly spaced ones between, `most` at the most."""
  if len(items) <= most:
    return list(items)
  return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


# ---- time and faults ----


def _spent(record: Record) -> dict[str, float]:
  """'seconds' of all logged steps, 'waiting' as a share of them, median 'step' [s] and 'images_per_s'; empty without any."""
  total = waited = 0.0
  before, steps = 0, []
  for row in record.rows:
    if 'time/step' in row:
      count = row['step'] - before
      total += row['time/step'] * count
      waited += row['time/data'] * count
      before = row['step']
      steps.append((row['time/step'], row['time/images_per_s']))
  if not total:
    return {}
  step, rate = np.median(steps, axis=0)
  return {'seconds': total, 'waiting': waited / total, 'step': float(step), 'images_per_s': float(rate)}


def _time(record: Record) -> Html:
  spent = _spent(record)
  if not spent:
    return Html('')
  wait = spent['waiting']
  entries = [
    ('Step', f'{spent["step"] * 1e3:,.0f} ms', 'median'),
    ('Images per second', f'{spent["images_per_s"]:,.0f}', 'median'),
    ('All steps', duration(spent['seconds']), 'without start-up, evaluation and saving'),
  ]
  peak = record.lines.get('memory/peak')
  if peak:
    limit = record.at('memory/limit')
    remark = f'of {limit[1] / 2**30:.1f} GiB' if limit else 'on the fullest device'
    entries.append(('Memory at its peak', f'{max(peak.values()) / 2**30:.1f} GiB', remark))
  shares = Html(
    f'<div class="split" role="img" aria-label="{wait:.1%} of the time waiting for data"><i style="width: {wait:.2%}; margin-left: auto"></i></div>'
    f'{page.legend([f"computing {1 - wait:.1%}", f"waiting for data {wait:.1%}"])}'
  )
  drawn = [_chart(record, name) for name in ('time/images_per_s', 'time/step', 'time/data') if name in record.lines]
  return page.join([page.facts(entries), Html('<h3>Where a step’s time goes</h3>'), shares, page.charts(drawn[:1])])


def faults(record: Record) -> list[tuple[str, str]]:
  """(when, what) of everything that went wrong and is on record, in order of steps.

  The counters are of the whole run, so a rise between two lines is what happened in those steps.
  """
  words = {'faults/bad_steps': 'step|not finite, left out', 'faults/corrupt': 'example|unreadable, replaced'}
  found, before = [], dict.fromkeys(words, (0, 0))
  for row in record.rows:
    for name, text in words.items():
      if name in row:
        step, count = before[name]
        if row[name] > count:
          noun, what = text.split('|')
          new = row[name] - count
          found.append((row['step'], f'{step + 1:,} to {row["step"]:,}', f'{new} {noun}{"s" * (new > 1)} {what}'))
        before[name] = (row['step'], row[name])
    broken = sorted(name for name, value in row.items() if not math.isfinite(value))
    if broken:
      found.append((row['step'], f'{row["step"]:,}', f'not finite: {", ".join(broken)}'))
  return [(when, what) for _, when, what in sorted(found, key=lambda entry: entry[0])]


def _faults(record: Record) -> Html:
  found = faults(record)
  parts = []
  dump = record.path / 'dump'
  if dump.is_dir():
    parts.append(
      Html(
        f'<p class="bad">Stopped after too many steps that were not finite.</p><p>{page.code(f"mim-jax replay {dump}")} runs the last of them again.</p>'
      )
    )
  if not found and not parts:
    return Html('<p>None: every logged step was finite and every example was read.</p>')
  if found:
    parts.append(page.table(['steps', 'what'], found[:FAULTS]))
  if len(found) > FAULTS:
    parts.append(Html(f'<p class="soft">and {len(found) - FAULTS} more.</p>'))
  return page.join(parts)


# ---- what there is on disk ----


def _checkpoints(folder: Path) -> Html:
  rows = []
  for path in sorted((p for p in folder.glob('*') if p.name.isdigit()), key=lambda p: int(p.name)):
    files = [file.stat().st_size for file in path.rglob('*') if file.is_file()]
    rows.append([f'{int(path.name):,}', size(sum(files)), len(files)])
  if not rows:
    return Html('<p class="soft">None on disk.</p>')
  return page.table(['step', 'size', 'files'], rows, numbers=(0, 1, 2))


def size(count: int) -> str:
  """Bytes for people, 1 MB being 1e6 bytes: '812 kB', '24.1 MB'."""
  for unit, name in ((1e9, 'GB'), (1e6, 'MB'), (1e3, 'kB')):
    if count >= unit:
      return f'{count / unit:.1f} {name}'
  return f'{count} B'


# ---- config and environment ----


def defaults(values: Mapping[str, Any]) -> dict[str, Any]:
  """Default of every key of a config: of the trainer, of its method and of its evaluators, by dotted key.

  Keys of a method or an evaluator that this version does not know have none.
  """
  known = config.leaves(config.base())
  name = values.get('method.name')
  if name in method.names():
    known |= config.leaves(method.defaults(name), 'method.')
  for evaluator in {key.split('.')[1] for key in values if key.startswith('evals.')}:
    kind = values.get(f'evals.{evaluator}.kind', evaluator)
    try:
      known |= config.leaves(suite.settings(evaluator, {'kind': kind}), f'evals.{evaluator}.')
    except ConfigError:  # an evaluator of another version
      continue
  return known


def _config(values: dict[str, Any]) -> Html:
  known = defaults(values)
  changed = [
    [
      page.code(key),
      page.code(repr(value)),
      page.code(repr(known[key])) if key in known else Html('<span class="soft">no default</span>'),
    ]
    for key, value in sorted(values.items())
    if key not in known or not same(known[key], value)
  ]
  everything = page.table(
    [], [[page.code(key), page.code(repr(value))] for key, value in sorted(values.items())], kind='keys stack'
  )
  intro = Html(
    '<p class="soft">What differs from the defaults of trainer, method and evaluators: this run on the left, the default on the right.</p>'
  )
  table = (
    page.table(['key', 'this run', 'default'], changed, kind='keys stack')
    if changed
    else Html('<p>All values are the defaults.</p>')
  )
  return Html(f'{intro}{table}<details><summary>All {len(values)} values</summary>{everything}</details>')


def _environment(env: dict[str, Any]) -> Html:
  if not env:
    return Html('<p class="soft">The folder has no env.json.</p>')
  get = env.get
  commit, changed = get('git.commit'), ', with changes that are not committed' if get('git.dirty') else ''
  flags = list(_pairs(env, 'flags.', '='))
  rows = [
    ['started', get('time')],
    [
      'devices',
      f'{get("devices.count")} × {get("devices.kind")} ({get("devices.platform")}), {get("processes")} process(es)',
    ],
    ['host', f'{get("host")}, {get("cpus")} CPUs, {get("system")}'],
    ['code', page.join([page.code(commit), changed]) if commit else 'not a git checkout'],
    ['Python', get('python')],
    ['packages', ', '.join(_pairs(env, 'versions.'))],
    ['flags', page.code(' '.join(flags)) if flags else 'none'],
  ]
  return page.join([page.command(get('command', '')), page.table([], rows, kind='keys')])


def _pairs(env: Mapping[str, Any], prefix: str, between: str = ' ') -> Iterable[str]:
  return (
    f'{key.removeprefix(prefix)}{between}{value}'
    for key, value in env.items()
    if key.startswith(prefix) and value is not None
  )
