"""Seconds from the start of the process to the end of the first training step, part by part.

  python benchmarks/startup.py [--config FILE.py[:ARGUMENT]] [--config.key=value ...]

Runs `mim_jax.train` (its default recipe here: configs/mae.py:debug) in processes of its own, stopped after their first step as by SIGTERM,
with hooks around the trainer's parts:

- cold: fresh run with an empty cache of compiled programs (JAX_COMPILATION_CACHE_DIR), once;
- fresh: fresh run with the cache that the first one filled;
- resumed: started again in that folder, from the checkpoint of step 1.

Printed: a table of seconds, medians over `--rounds` for fresh and resumed. Parts:

- interpreter: from the request for the process to the first line of Python;
- imports: `mim_jax.config` and `mim_jax.trainer`, all that they import included; later ones are in the parts that ask for them;
- config: the recipe with its overrides;
- devices: JAX's backend and the mesh;
- data: opening the source, the shapes of an example, opening it for evaluators. Synthetic worlds are rendered before anything is timed;
- method: `step.assemble`, which builds method, optimizer and abstract state;
- evaluators, folder (config.json, env.json, checks), writers: as they say;
- init / restore: parameters and optimizer state of step 0, or the newest checkpoint; compiling of their programs included;
- compile: lowering and compiling the train step, or reading it from the cache;
- first batch: what the loop waits for it;
- first step: from there to its result;
- rest: what none of these has.

Then the packages whose import takes longest, by `python -X importtime`: milliseconds of their own modules and their number.
"""

import argparse
import contextlib
import functools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

STARTED = time.monotonic()

PARTS = (
  *(
    'interpreter',
    'imports',
    'config',
    'devices',
    'data',
    'method',
    'evaluators',
    'folder',
    'init / restore',
    'writers',
  ),
  *('compile', 'first batch', 'first step', 'rest'),
)
IMPORTS = 'import mim_jax.train; from mim_jax import config, trainer'
LINE = re.compile(r'import time:\s+(\d+) \|\s+\d+ \|\s+([\w]+)')


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', default='configs/mae.py:debug', metavar='FILE.py[:ARGUMENT]')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--threads', type=int, default=2, help='cores that the process may use')
  parser.add_argument('--packages', type=int, default=10, help='slowest imports to name')
  parser.add_argument('--child', nargs=2, metavar=('WORKDIR', 'BEGAN'), help=argparse.SUPPRESS)
  args, overrides = parser.parse_known_args()
  if args.child:
    return measure(args.config, overrides, args.child[0], float(args.child[1]))

  import rounds

  rounds.pin(args.threads)
  with tempfile.TemporaryDirectory(prefix='startup_') as name:
    folder = Path(name)
    os.environ['JAX_COMPILATION_CACHE_DIR'] = str(folder / 'compiled')
    os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
    os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'
    prepare(args.config, overrides)
    kinds = {'cold': [one(args.config, overrides, folder / 'cold')], 'fresh': [], 'resumed': []}
    one(args.config, overrides, folder / 'cold')  # fills the cache with the programs of a resumed run
    for number in range(args.rounds):
      for kind in ('fresh', 'resumed'):
        kinds[kind].append(one(args.config, overrides, folder / str(number)))
  print(f'{args.config}, {args.threads} cores, {args.rounds} rounds; seconds\n')
  rounds.print_head(('', *kinds))
  for part in PARTS:
    rounds.print_row((part, *(f'{statistics.median(run[part] for run in runs):.2f}' for runs in kinds.values())))
  sums = [[sum(run.values()) for run in runs] for runs in kinds.values()]
  rounds.print_row(('sum, least to most', *(rounds.spread(values, '{:.2f}') for values in sums)))
  print(f'\nimports of {IMPORTS!r}, packages by the milliseconds in their own modules\n')
  rounds.print_head(('package', 'ms', 'modules'))
  spent, modules = imports()
  for package, micros in spent.most_common(args.packages):
    rounds.print_row((package, f'{micros / 1e3:.0f}', modules[package]))
  rounds.print_row(('all', f'{spent.total() / 1e3:.0f}', modules.total()))
  return None


def prepare(recipe, overrides):
  """Renders the synthetic worlds of the recipe, in a process of its own as this one is not to import JAX."""
  code = (
    'import sys; from mim_jax import config; from mim_jax.data import mixtures; data = config.load(sys.argv[1:]).data; '
    'mixtures.prepare(data.source, data.data_dir)'
  )
  subprocess.run([sys.executable, '-c', code, f'--config={recipe}', *overrides], check=True)


def one(recipe, overrides, workdir) -> dict[str, float]:
  """Seconds by part of a run in `workdir`, up to its first step."""
  command = [sys.executable, __file__, f'--config={recipe}', *overrides, '--child', str(workdir)]
  done = subprocess.run([*command, str(time.monotonic())], capture_output=True, text=True)
  lines = done.stdout.strip().splitlines()
  if done.returncode or not lines or not lines[-1].startswith('{'):
    sys.exit(f'error: no first step, exit code {done.returncode}:\n{done.stdout}{done.stderr}')
  return json.loads(lines[-1])


def imports():
  """(microseconds, number of modules) by package, of an interpreter that imports what training imports."""
  done = subprocess.run([sys.executable, '-X', 'importtime', '-c', IMPORTS], capture_output=True, text=True, check=True)
  spent, modules = Counter(), Counter()
  for own, package in LINE.findall(done.stderr):
    spent[package] += int(own)
    modules[package] += 1
  return spent, modules


class Parts:
  """Seconds by part; of parts within each other only the outermost counts, so that nothing counts twice."""

  def __init__(self):
    self.seconds = dict.fromkeys(PARTS, 0.0)
    self._open = ''

  @contextlib.contextmanager
  def part(self, name):
    if self._open:
      yield
      return
    self._open, start = name, time.monotonic()
    try:
      yield
    finally:
      self.seconds[name] += time.monotonic() - start
      self._open = ''

  def hook(self, owner, attribute, name):
    """Counts every call of `owner.attribute` to a part."""
    function = getattr(owner, attribute)

    @functools.wraps(function)
    def timed(*args, **kwargs):
      with self.part(name):
        return function(*args, **kwargs)

    setattr(owner, attribute, timed)


def measure(recipe, overrides, workdir, began):
  """One run up to its first step; prints its parts as JSON."""
  parts = Parts()
  parts.seconds['interpreter'] = STARTED - began
  with parts.part('imports'):
    from mim_jax import config, trainer
    from mim_jax.data.pipeline import Pipeline
  # What the trainer calls, by the names under which it knows them.
  for owner, attribute, name in (
    (trainer.meshes, 'start', 'devices'),
    (trainer.meshes, 'make_mesh', 'devices'),
    (trainer.Feeds, 'source', 'data'),
    (trainer.Feeds, 'training', 'data'),
    (Pipeline, 'spec', 'data'),
    (trainer, 'assemble', 'method'),
    (trainer.suite, 'build', 'evaluators'),
    (trainer.suite.Suite, 'check', 'evaluators'),
    (trainer.Trainer, '_check_folder', 'folder'),
    (trainer, 'Manager', 'init / restore'),
    (trainer.Trainer, '_restore', 'init / restore'),
    (trainer, 'Writer', 'writers'),
  ):
    parts.hook(owner, attribute, name)

  stage, say, waiting = trainer.Progress.stage, trainer.Progress.say, trainer.Timer.data
  batch_is_there = [0.0]

  @contextlib.contextmanager
  def timed_stage(self, name):
    with parts.part('compile') if name.startswith('compiling') else contextlib.nullcontext(), stage(self, name):
      yield

  @contextlib.contextmanager
  def timed_waiting(self, running=None):
    with parts.part('first batch'), waiting(self, running):
      yield
    batch_is_there[0] = time.monotonic()

  def listening_say(self, text):
    if text.startswith('first step after'):
      now = time.monotonic()
      parts.seconds['first step'] = now - batch_is_there[0]
      parts.seconds['rest'] = now - began - sum(parts.seconds.values())
      os.kill(os.getpid(), signal.SIGTERM)  # the trainer saves this step and leaves
    say(self, text)

  trainer.Progress.stage, trainer.Progress.say, trainer.Timer.data = timed_stage, listening_say, timed_waiting
  with parts.part('config'):
    cfg = config.load([f'--config={recipe}', *overrides])
  with contextlib.suppress(trainer.Stopped):
    trainer.run(cfg, workdir, began=began)
  print(json.dumps(parts.seconds))


if __name__ == '__main__':
  main()
