"""mim-jax parity: our numbers against those of official code."""

from mim_jax import parity

HELP = """replays reference cases of official code and compares every output and gradient

Each FILE.safetensors has FILE.json beside it. Exit code 1 if any tensor is out of tolerance.

  mim-jax parity tests/goldens/mae.safetensors tests/goldens/mae_vit.safetensors
"""


def add(parser):
  parser.add_argument('files', nargs='+', metavar='FILE.safetensors')


def run(args):
  import jax

  jax.config.update('jax_platforms', 'cpu')  # references were computed in float32 on a CPU
  failed = 0
  for file in args.files:
    rows = parity.run(parity.read(file))
    bad = sum(not row.ok for row in rows)
    failed += bad
    print(f'{file}\n{parity.table(rows)}\n{len(rows) - bad} of {len(rows)} tensors within tolerance\n')
  return 1 if failed else 0
