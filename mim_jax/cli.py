"""`mim-jax VERB ...`, also `python -m mim_jax.cli VERB ...`.

Exit codes: 0 done, 1 the answer is no (out of tolerance, does not fit), 2 the request cannot be carried out.
"""

import argparse
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence

from mim_jax import commands
from mim_jax.errors import UserError

CONFIG_EPILOG = 'Config values are overridden as in training: --config.key=value.'


def main(argv: Sequence[str] | None = None) -> int:
  argv = list(sys.argv[1:] if argv is None else argv)
  verbs = sorted(module.name for module in pkgutil.iter_modules(commands.__path__))
  if not argv or argv[0] in ('-h', '--help', 'help'):
    print('usage: mim-jax VERB [...]\n')
    for verb in verbs:
      print(f'  {verb:<9} {_module(verb).HELP.splitlines()[0]}')
    print('\nmim-jax VERB --help shows options and an example.')
    return 0 if argv else 2
  verb, *rest = argv
  if verb not in verbs:
    from mim_jax.errors import nearest

    return _fail(f'unknown verb {verb!r}; {nearest(verb, verbs)}')
  module = _module(verb)
  parser = argparse.ArgumentParser(
    prog=f'mim-jax {verb}',
    description=module.HELP,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  module.add(parser)
  try:
    args, overrides = parser.parse_known_args(rest)
    if overrides and not hasattr(args, 'config'):
      parser.error(f'unknown argument {overrides[0]!r}')
    args.overrides = overrides
    return module.run(args) or 0
  except UserError as error:
    return _fail(error)
  except SystemExit as stop:  # argparse
    return stop.code or 0
  except BrokenPipeError:  # the reader of our output went away, as in `mim-jax methods | head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def add_config(parser: argparse.ArgumentParser, required: bool = True):
  """Adds --config; `config_of` reads it together with the --config.key=value overrides."""
  parser.add_argument(
    '--config', required=required, metavar='FILE.py[:ARGUMENT]', help='recipe, such as configs/mae.py:debug'
  )
  parser.epilog = CONFIG_EPILOG


def config_of(args):
  """The config that --config and its overrides describe."""
  from mim_jax import config

  return config.load([f'--config={args.config}', *args.overrides])


def _module(verb: str):
  return importlib.import_module(f'mim_jax.commands.{verb}')


def _fail(error) -> int:
  print(f'error: {error}', file=sys.stderr)
  return 2


if __name__ == '__main__':
  sys.exit(main())
