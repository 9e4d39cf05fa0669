"""mim-jax compare: runs against each other and against references."""

import shutil
from pathlib import Path

from mim_jax.errors import UserError
from mim_jax.log import compare, compare_page, record, reference

HELP = """puts runs over each other and into the bands of reference curves

Runs whose configs differ in `seed` only are one group: mean and standard deviation over its seeds. Writes index.html, one page with
curves, figures and differences of configs, and curves.png. Exit code 1 if a run is outside the band of a reference.

  mim-jax compare runs/mae_a runs/mae_b
  mim-jax compare runs/mae_seed* reference.json --step=1000
  mim-jax compare runs/mae_seed* --save_reference=reference.json
"""


def add(parser):
  parser.add_argument(
    'paths', nargs='+', metavar='RUN|REFERENCE.json', help='folders of runs, and references they are to be like'
  )
  parser.add_argument('--out', default='comparison', metavar='DIR', help='folder for index.html and curves.png')
  parser.add_argument('--step', type=int, help='compare there; by default at the end of each run')
  parser.add_argument(
    '--metrics',
    metavar='REGEX',
    help='metrics to compare, such as "loss|knn"; by default losses and figures of evaluators',
  )
  parser.add_argument(
    '--save_reference',
    metavar='FILE.json',
    help='write the bands of these runs (one group, three seeds or more) as a reference',
  )


def run(args):
  files = [path for path in args.paths if Path(path).is_file() or path.endswith('.json')]
  references = [reference.read(path) for path in files]
  records = [record.read(path) for path in args.paths if path not in files]
  if not records:
    raise UserError('found references only; give the folder of a run to compare with them')
  comparison = compare.compare(records, references, args.metrics, args.step)
  saved = _save_reference(comparison, Path(args.save_reference)) if args.save_reference else []
  written = compare_page.write(comparison, args.out)
  print(compare.table(comparison, shutil.get_terminal_size((120, 24)).columns))
  lines = compare.verdict_lines(comparison)
  print('\n'.join(['', *lines, ''] if lines else ['']))
  print('\n'.join(map(str, [*saved, *written])))
  return 0 if comparison.good else 1


def _save_reference(comparison: compare.Comparison, path: Path) -> list[Path]:
  if len(comparison.groups) > 1:
    labels = ', '.join(group.label for group in comparison.groups)
    raise UserError(f'a reference is made of one group of runs; found {len(comparison.groups)}: {labels}')
  (group,) = comparison.groups
  found = reference.of(group.runs, comparison.metrics, group.label)
  try:
    path.write_text(reference.text(found))
  except OSError as error:
    raise UserError(f'cannot write {path}: {error.strerror}; give another --save_reference') from error
  return [path]
