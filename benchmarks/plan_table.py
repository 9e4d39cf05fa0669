"""The table of docs/performance.md: one recipe in several sizes on several topologies, each compiled by `mim-jax plan`.

  python benchmarks/plan_table.py --sizes B,L,H --topologies v5e:4x4,v5e:16x16,v5p:4x4x4,v6e:16x16,h100:8
  [--config.key=value ...]

Needs pip install "mim-jax[plan]"; fifteen programs take half an hour to an hour on two cores.
"""

import argparse
import sys

from mim_jax import config
from mim_jax.errors import UserError
from mim_jax.parallel import topology as topologies
from mim_jax.plan import examples, jobs

COLUMNS = (
  'size',
  'topology',
  'images/chip',
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
  parser.add_argument('--recipe', default='configs/mae.py')
  parser.add_argument('--sizes', default='B,L,H')
  parser.add_argument('--topologies', default='v5e:4x4,v5e:16x16,v5p:4x4x4,v6e:16x16,h100:8')
  args, overrides = parser.parse_known_args()
  print('| ' + ' | '.join(COLUMNS) + ' |\n|' + '---|' * len(COLUMNS))
  for name in args.topologies.split(','):
    for size in args.sizes.split(','):
      cfg = config.load([f'--config={args.recipe}:size={size}', *overrides])
      topology = topologies.parse(name)
      found = jobs.fitting_plan(cfg, topology, examples.count(cfg.data), lambda line: print(line, file=sys.stderr))
      print('| ' + ' | '.join(row(size, found)) + ' |', flush=True)


def row(size: str, found: dict) -> list[str]:
  cells = [size, found['topology'], f'{found["images_per_device"]:g}', jobs.size(found['hbm_bytes'])]
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
