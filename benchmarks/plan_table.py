"""The tables of docs/performance.md: recipes on topologies, each compiled by `mim-jax plan`.

  python benchmarks/plan_table.py configs/mae.py:size=B configs/mae.py:size=L configs/mae.py:size=H
  python benchmarks/plan_table.py --topologies v5e:16x16,h100:8 configs/cae.py configs/dmjd.py [--config.key=value ...]

`--json FILE` adds a line with the whole plan of every program to FILE as it is compiled. Needs pip install "mim-jax[plan]". A program takes
from one to ten minutes; one that does not fit is compiled again in more parts.
"""

import argparse
import json
import sys
from pathlib import Path

from mim_jax import config
from mim_jax.errors import UserError
from mim_jax.parallel import topology as topologies
from mim_jax.plan import examples, jobs

COLUMNS = (
  'recipe',
  'topology',
  'parameters',
  'images/chip',
  'kept/image',
  'memory',
  'with',
  'M cycles',
  'step',
  'of peak',
  'images/s',
  'device-hours',
  'compile',
)


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('recipes', nargs='+', metavar='FILE.py[:ARGUMENT]')
  parser.add_argument('--topologies', default='v5e:4x4,v5e:16x16,v5p:4x4x4,v6e:16x16,h100:8')
  parser.add_argument('--examples', type=int, default=0, help='of data sets whose size is not known here')
  parser.add_argument('--json', type=Path, metavar='FILE', help='keep whole plans there, a line each')
  args, overrides = parser.parse_known_args()
  print('| ' + ' | '.join(COLUMNS) + ' |\n|' + '---|' * len(COLUMNS))
  for recipe in args.recipes:
    for name in args.topologies.split(','):
      cfg = config.load([f'--config={recipe}', *overrides])
      count = args.examples or examples.count(cfg.data)
      found = jobs.fitting_plan(cfg, topologies.parse(name), count, lambda line: print(line, file=sys.stderr))
      print('| ' + ' | '.join(row(recipe, found)) + ' |', flush=True)
      if args.json:
        with args.json.open('a') as file:
          file.write(json.dumps({'recipe': recipe, 'arguments': overrides} | found) + '\n')


def row(recipe: str, found: dict) -> list[str]:
  kept = found['kept_bytes_per_image']
  cells = [
    recipe,
    found['topology'],
    f'{found["parameters"] / 1e6:,.0f} M',
    f'{found["images_per_device"]:g}',
    '' if kept is None else jobs.size(kept),
    jobs.size(found['hbm_bytes']),
  ]
  compiled = f'{found["compile_seconds"]:.0f} s'
  if not found['estimated_step_seconds']:
    return [*cells, 'does not fit' if not found['fits'] else '', *[''] * 5, compiled]
  fit = (
    f'{" ".join(found["fits_with"]).replace("--config.", "")}: {jobs.size(found["fits_with_hbm_bytes"])}'
    if found['fits_with']
    else ''
  )
  return [
    *cells,
    fit,
    f'{found["estimated_cycles"] / 1e6:,.1f}',
    f'{1e3 * found["estimated_step_seconds"]:,.1f} ms',
    f'{found["estimated_utilisation"]:.1%}',
    f'{found["images_per_second"]:,.0f}',
    f'{found["device_hours"]:,.0f}',
    compiled,
  ]


if __name__ == '__main__':
  try:
    main()
  except UserError as error:
    sys.exit(f'error: {error}')
