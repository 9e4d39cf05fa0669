"""Prepares synthetic worlds: `python -m mim_jax.data.worlds shapes/size=128 [SPEC ...] [--data_dir=DIR]`."""

import argparse
import sys

from mim_jax.data import worlds
from mim_jax.errors import UserError


def main(argv=None):
  """Prepares each spec and prints its folder; 0 on success, 1 when something outside the program is wrong."""
  parser = argparse.ArgumentParser(
    prog='python -m mim_jax.data.worlds',
    description='Renders synthetic worlds to disk; one that is there already is left alone.',
    epilog=f'example: python -m mim_jax.data.worlds shapes/size=128,train=5000   (worlds: {", ".join(worlds.WORLDS)})',
  )
  parser.add_argument('spec', nargs='+', help='WORLD[/OPTION=VALUE,...]')
  parser.add_argument('--data_dir', default='', help='default: $MIM_JAX_DATA, else ~/.cache/mim_jax/data')
  parser.add_argument('--workers', type=int, help='processes; default: one per CPU')
  args = parser.parse_args(argv)
  try:
    for spec in args.spec:
      print(worlds.prepare(spec, args.data_dir, args.workers))
  except UserError as e:
    print(f'error: {e}', file=sys.stderr)
    return 1
  return 0


if __name__ == '__main__':
  sys.exit(main())
