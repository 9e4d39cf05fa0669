"""mim-jax eval: evaluators on a checkpoint."""

import contextlib

import jax
import numpy as np

from mim_jax import runs
from mim_jax.evals import features, suite
from mim_jax.log.writer import Writer

HELP = """runs evaluators on the newest checkpoint of a run

Figures are printed and added to its metrics.jsonl.

  mim-jax eval --workdir=runs/mae --evals=knn,linear
"""


def add(parser):
  parser.add_argument('--workdir', required=True, help="a run's folder")
  parser.add_argument('--evals', default='', help='names from its config, with commas; all by default')
  parser.add_argument('--data_dir', help='where its data lies on this machine')


def run(args):
  opened = runs.open_run(args.workdir, {'data_dir': args.data_dir} if args.data_dir else None)
  cfg, program = opened.cfg, opened.program
  evaluators = suite.build(cfg.evals, cfg.data.source, cfg.data.eval_transforms, cfg.batch_size)
  chosen = evaluators.select([name for name in args.evals.split(',') if name]) if args.evals else evaluators.evaluators

  def untrained():
    fresh = program.init(np.uint32(cfg.seed))
    return features.from_method(program.method, fresh['params'], fresh['state'], name='untrained')

  with contextlib.closing(Writer(opened.workdir)) as writer:
    context = features.Context(
      mesh=program.mesh,
      open_source=opened.feeds.source,
      open_batches=opened.feeds.evaluation,
      picture=lambda name, image: writer.picture(opened.step, name, image),
    )
    encoder = features.from_method(program.method, opened.params, opened.train['state'])
    results = evaluators.run(chosen, encoder, untrained, context)
    writer.write(opened.step, suite.flat(results))
  if jax.process_index() == 0:
    print(f'{args.workdir}, step {opened.step}\n{suite.table(results)}')
