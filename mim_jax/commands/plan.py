"""mim-jax plan: the train step compiled for hardware that one does not have."""

import json
import sys

from mim_jax import cli
from mim_jax.errors import UserError

HELP = """compiles the real train step for a TPU slice or GPU node, and says whether it fits and how long it takes

Needs the compilers, not the devices nor the data: pip install "mim-jax[plan]". Exit code 1 if the step does not fit.

  mim-jax plan --config=configs/mae.py --topology=v5e:4x4
  mim-jax plan --config=configs/mae.py:size=L --topology=h100:8 --json
  mim-jax plan --config=configs/mae.py --topology=v5e:16x16 --search
  mim-jax plan --config=configs/mae.py --topology=v5e:4x4 --scaling=16,64,256 --plot=scaling.png
"""


def add(parser):
  cli.add_config(parser)
  parser.add_argument('--topology', required=True, help='v5e:4x4, v5p:4x4x4, v6e:16x16, 4*v5e:16x16, h100:8, cpu:8')
  parser.add_argument('--json', action='store_true', help='one JSON object on standard output')
  parser.add_argument('--examples', type=int, help='size of the data set, when it is neither known nor on this machine')
  parser.add_argument('--hlo', default='', metavar='FILE', help='also writes the compiled program as text')
  parser.add_argument('--search', action='store_true', help='looks for the fastest arguments that fit')
  parser.add_argument('--scaling', default='', metavar='N,N,...', help='the same recipe on these numbers of chips')
  parser.add_argument('--plot', default='', metavar='FILE.png', help='of --scaling')


def run(args):
  from mim_jax.parallel import topology as topologies
  from mim_jax.plan import examples as sizes
  from mim_jax.plan import jobs, report

  topology = topologies.parse(args.topology)
  topologies.require_compiler(topology)
  if args.examples is not None and args.examples < 1:
    raise UserError(f'--examples={args.examples}: expected the number of examples of the data set')
  cfg = cli.config_of(args)
  examples = args.examples or sizes.count(cfg.data)
  if args.search or args.scaling:
    return _many(args, cfg, topology, examples)
  _say(f'{topology}: compiling the train step of {args.config}')
  found = jobs.fitting_plan(cfg, topology, examples, _say, args.hlo)
  print(json.dumps(found) if args.json else report.text(found))
  return 0 if found['fits'] else 1


def _many(args, cfg, topology, examples):
  from mim_jax.plan import scaling, search

  if args.search and args.scaling:
    raise UserError('--search and --scaling are two questions; ask them one after the other')
  if args.search:
    found = search.run(cfg, topology, examples, _say)
    print(json.dumps(found) if args.json else search.table(found))
    return 0 if found['best'] else 1
  counts = scaling.counts(args.scaling)
  found = scaling.run(cfg, topology.chip, counts, examples, _say)
  print(json.dumps(found) if args.json else scaling.table(found))
  if args.plot:
    scaling.plot(found, args.plot)
    _say(f'plot: {args.plot}')
  return 0


def _say(line: str):
  print(line, file=sys.stderr, flush=True)
