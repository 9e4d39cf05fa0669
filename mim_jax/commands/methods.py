"""mim-jax methods: what there is, and what is verified of it."""

import json
import re
from pathlib import Path

from mim_jax import method, records
from mim_jax.errors import UserError, nearest

HELP = """lists the methods: paper, arXiv id, modalities, recipe, and what is verified by the tests' own records

The columns after the recipe come from tests/records.json, which `pytest --record` writes: tests passed of those that
ran, and tensors within tolerance of those of the official code. '*' marks records of an earlier state of the method's
files, '-' what nobody recorded. With a name, everything recorded of that method: each test, its day and its figures.

  mim-jax methods
  mim-jax methods mae
  mim-jax methods --json
"""

UNRECORDED = 'nothing is recorded here: run the tests with --record (bash launch/test.sh --all --record)'


def add(parser):
  parser.add_argument('name', nargs='?', help='a method, for all that is recorded of it')
  parser.add_argument('--json', action='store_true', help='the same as JSON')


def run(args):
  if args.name and args.name not in method.names():
    raise UserError(f'method {args.name!r} is unknown; {nearest(args.name, method.names())}')
  path = records.find()
  found = records.summaries(records.read(path)) if path else {}
  rows = [describe(name, found.get(name, {})) for name in ([args.name] if args.name else method.names())]
  if args.json:
    print(json.dumps(rows, indent=2))
  elif args.name:
    print(page(rows[0], found.get(args.name, {})))
  else:
    print(table(rows))
    print(f'\nverified: {path}' if path else f'\n{UNRECORDED}')
    if any('*' in shown for row in rows for shown in row['verified'].values()):
      print("* recorded before the method's files changed")


def describe(name: str, verified: dict[str, records.Summary]) -> dict:
  """One row: slug, what it does, paper, arXiv id, modalities, recipe, and per kind what is verified."""
  title, paper = method.describe(name)
  authors, _, arxiv = paper.partition(', arXiv ')
  return {
    'name': name,
    'title': title,
    'paper': authors,
    'arxiv': arxiv if re.fullmatch(r'\d{4}\.\d{4,5}', arxiv) else '',
    'modalities': modalities(method.build(method.options(name)).fields),
    'config': recipe(name),
    'verified': {kind: str(summary) for kind, summary in verified.items()},
    'date': min((summary.date for summary in verified.values()), default=''),
  }


def modalities(fields) -> list[str]:
  """What a method reads, by the axes of its fields: image, volume, text, table; labels by their names."""
  found = []
  for name, field in fields.items():
    axes = set(field.dims.split()[1:])
    if {'H', 'W'} <= axes:
      found.append('volume' if 'D' in axes else 'image')
    elif 'table' in name:
      found.append('table')
    elif 'T' in axes:
      found.append('text')
    elif not axes:
      found.append(name)
  return list(dict.fromkeys(found))


def recipe(name: str) -> str:
  """'configs/NAME.py', where there is one."""
  places = (records.PACKAGE.parent, records.PACKAGE)
  return f'configs/{name}.py' if any(Path(place, 'configs', f'{name}.py').is_file() for place in places) else ''


def table(rows: list[dict]) -> str:
  """One line per method; the kinds of verification are those that any of them has."""
  kinds = list(dict.fromkeys(kind for row in rows for kind in row['verified']))
  kinds.sort(key=lambda kind: records.KINDS.index(kind) if kind in records.KINDS else len(records.KINDS))
  cells = [['method', 'paper', 'arXiv', 'reads', 'recipe', *kinds, *(['since'] if kinds else [])]]
  for row in rows:
    line = [row['name'], row['paper'], row['arxiv'], ', '.join(row['modalities']), row['config']]
    line += [row['verified'].get(kind, '') for kind in kinds] + ([row['date']] if kinds else [])
    cells.append([cell or '-' for cell in line])
  widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
  return '\n'.join(
    '  '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
  )


def page(row: dict, verified: dict[str, records.Summary]) -> str:
  """All that is recorded of one method."""
  lines = [
    row['title'],
    f'paper   {row["paper"]}' + (f', arXiv {row["arxiv"]}' if row['arxiv'] else ''),
    f'reads   {", ".join(row["modalities"])}',
    f'recipe  {row["config"] or "none"}',
  ]
  for kind, summary in verified.items():
    lines += ['', f'{kind}: {summary}']
    for result in summary.results:
      note = '' if result.current else '  (recorded of an earlier state of its files)'
      lines.append(f'  {result.outcome:7} {result.date}  {result.test.partition("::")[2]}{note}')
      lines += [f'            {name}: {_figure(value)}' for name, value in result.figures.items()]
  return '\n'.join(lines if verified else [*lines, '', UNRECORDED])


def _figure(value) -> str:
  if records.is_case(value):
    return f'{value["within"]} of {value["tensors"]} tensors within tolerance, largest error {value["error"]:.1e}'
  return f'{value:.4g}'
