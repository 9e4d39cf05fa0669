"""mim-jax eval: evaluators on a checkpoint, or on every new one of a running job."""

import ast
import contextlib
import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mim_jax import runs, step
from mim_jax.checkpoint.manager import list_steps
from mim_jax.data.feeds import Feeds
from mim_jax.errors import CheckpointError, UserError
from mim_jax.evals import features, suite
from mim_jax.log.writer import FILE, Writer, read_metrics
from mim_jax.parallel import mesh as meshes

HELP = """runs evaluators on the newest checkpoint of a run, or on each new one

Figures are printed and added to its metrics.jsonl. Evaluators are those of its config, 'never' ones too, and any kind
by its name; --set changes their settings. --follow stays beside a running job until its last checkpoint.

  mim-jax eval --workdir=runs/mae --evals=knn,linear
  mim-jax eval --workdir=runs/mae --evals=segment --set segment.classes=13 --set segment.decoder=conv
  mim-jax eval --workdir=runs/mae --evals=linear --follow
"""

POLL = 5.0  # seconds between two looks for a new checkpoint


def add(parser):
  parser.add_argument('--workdir', required=True, help="a run's folder")
  parser.add_argument(
    '--evals', default='', help='names from its config, or kinds, with commas; all of its config by default'
  )
  parser.add_argument(
    '--set', action='append', default=[], metavar='NAME.KEY=VALUE', help='a setting of an evaluator; may be repeated'
  )
  parser.add_argument('--data_dir', help='where its data lies on this machine')
  parser.add_argument('--follow', action='store_true', help='evaluate each new checkpoint until the run is complete')
  parser.add_argument(
    '--wait', type=float, default=3600, metavar='SECONDS', help='how long --follow waits for the next one'
  )


def run(args):
  meshes.start()
  cfg, program, feeds = runs.prepare(args.workdir, {'data_dir': args.data_dir} if args.data_dir else None)
  names = [name for name in args.evals.split(',') if name] or list(cfg.evals)
  if not names:
    raise UserError(f'{args.workdir} has no evaluator in its config; name some: --evals={",".join(suite.KINDS)}')
  given = settings({name: cfg.evals[name].to_dict() if name in cfg.evals else {} for name in names}, args.set)
  built = suite.build(given, cfg.data.source, cfg.data.eval_transforms, cfg.batch_size)
  built.check(feeds, features.options_of(program.method.encode), built.evaluators)
  judge = Judge(Path(args.workdir), cfg, program, feeds, built, shared=args.follow)
  if args.follow:
    return follow(judge, args.wait)
  judge(*runs.restore(args.workdir, cfg, program))
  return 0


def settings(evals: dict[str, dict[str, Any]], changes: list[str]) -> dict[str, dict[str, Any]]:
  """Settings by evaluator with the changes NAME.KEY=VALUE put over them; values are Python literals or plain words."""
  evals = {name: dict(given) for name, given in evals.items()}
  for change in changes:
    path, equals, value = change.partition('=')
    name, dot, key = path.partition('.')
    if not equals or not dot or name not in evals:
      raise UserError(f'--set {change}: expected NAME.KEY=VALUE with NAME one of {", ".join(evals)}')
    with contextlib.suppress(ValueError, SyntaxError):
      value = ast.literal_eval(value)
    evals[name][key] = value
  return evals


@dataclasses.dataclass
class Judge:
  """Runs the evaluators of `built` on a train state, prints the figures and adds them to the run's record."""

  workdir: Path
  cfg: Any
  program: step.Program
  feeds: Feeds
  built: suite.Suite
  shared: bool  # the run may be writing its record at the same time

  @functools.cached_property
  def frozen(self):
    return runs.frozen_networks(self.program, self.cfg.seed, self.cfg.frozen.path)[0]

  def __call__(self, train, at: int):
    method = self.program.method

    def untrained():
      fresh = self.program.init(np.uint32(self.cfg.seed))
      return features.from_method(method, fresh['params'], fresh['state'], name='untrained', frozen=self.frozen)

    with contextlib.closing(Writer(self.workdir, shared=self.shared)) as writer:
      context = features.Context(
        mesh=self.program.mesh,
        open_source=self.feeds.source,
        open_batches=self.feeds.evaluation,
        picture=lambda name, image: writer.picture(at, name, image),
      )
      shown = train['ema'] if self.cfg.ema else train['params']
      encoder = features.from_method(method, shown, train['state'], frozen=self.frozen)
      results = self.built.run(self.built.evaluators, encoder, untrained, context)
      writer.write(at, suite.flat(results))
    if jax.process_index() == 0:
      print(f'{self.workdir}, step {at}\n{suite.table(results)}', flush=True)


def follow(judge: Judge, wait: float) -> int:
  """Judges each checkpoint that is there or comes, oldest first; ends with the run's last step.

  Checkpoints that the run removed before their turn are left out, and those whose figures are in its record. Returns 1
  when `wait` seconds passed without a new one.
  """
  folder, total = judge.workdir / 'checkpoints', judge.program.total_steps
  seen, since = recorded(judge.workdir, [e.name for e in judge.built.evaluators]), time.monotonic()
  while True:
    steps = [at for at in list_steps(folder) if at not in seen]
    if steps:
      at = steps[0]
      seen.add(at)
      try:
        judge(*runs.restore(judge.workdir, judge.cfg, judge.program, at))
      except CheckpointError:
        if at in list_steps(folder):
          raise
        print(f'step {at}: the run removed this checkpoint before it was read; checkpoint.keep_every keeps them')
      since = time.monotonic()
    elif total in seen:
      return 0
    elif _of_first_process(time.monotonic() - since) > wait:
      print(f'no new checkpoint in {wait:g} s; evaluated up to step {max(seen, default=0)} of {total}')
      return 1
    else:
      time.sleep(min(POLL, wait))


def _of_first_process(seconds: float) -> float:
  """Its clock decides, so that all processes stop waiting together. Collective."""
  if jax.process_count() == 1:
    return seconds
  return float(multihost_utils.broadcast_one_to_all(np.float32(seconds)))


def recorded(workdir: Path, names: list[str]) -> set[int]:
  """Steps for which the run's record holds figures of all these evaluators; none with several processes.

  They might read it at different moments, and would then evaluate different steps.
  """
  if jax.process_count() > 1 or not (workdir / FILE).is_file():
    return set()
  found: dict[int, set[str]] = {}
  for row in read_metrics(workdir):
    found.setdefault(row['step'], set()).update(key.split('/')[1] for key in row if key.startswith('eval/'))
  return {at for at, evaluators in found.items() if set(names) <= evaluators}
