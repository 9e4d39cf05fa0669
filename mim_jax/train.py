"""One run: `python -m mim_jax.train --config=configs/mae.py:debug --workdir=runs/mae [--config.key=value ...]`.

Started again with the same arguments it goes on where the newest good checkpoint of the folder stands. Exit codes: 0 done, 2 the config, data
or checkpoint cannot be used, 143 asked to stop and saved.
"""

import argparse
import sys
import time

START = time.monotonic()  # before the slow imports, so that start-up can be measured


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(
    prog='python -m mim_jax.train',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument(
    '--config', required=True, metavar='FILE.py[:ARGUMENT]', help='recipe, such as configs/mae.py:size=L'
  )
  parser.add_argument('--workdir', required=True, help='folder of the run: config, metrics, panels, checkpoints')
  args, overrides = parser.parse_known_args(argv)
  print(f'mim_jax: {args.config} -> {args.workdir}', flush=True)  # seconds before jax is there

  from mim_jax import config, trainer
  from mim_jax.errors import UserError

  try:
    trainer.run(config.load([f'--config={args.config}', *overrides]), args.workdir, began=START)
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  except trainer.Stopped as stop:
    print(stop)
    return 143  # as a process ended by SIGTERM, so that a scheduler does not take the run for a finished one
  return 0


if __name__ == '__main__':
  sys.exit(main())
