"""mim-jax sweep: every combination of some values, with several seeds."""

import dataclasses
import itertools
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

from mim_jax import cli, config
from mim_jax.errors import ConfigError, UserError
from mim_jax.log import compare, record
from mim_jax.log.progress import duration

HELP = """trains every combination of some config values, one run after another, each with several seeds

Each run has its folder in --workdir and its output in train.log there; given again, the sweep resumes what is unfinished. When a run
fails the others are still trained, and the exit code is 1. --print only prints a launch line per run, for a queue or other machines.

  mim-jax sweep --config=configs/mae.py:debug --workdir=runs/ratio --set method.mask_ratio=0.5,0.75,0.9 --seeds=3
  mim-jax sweep --config=configs/mae.py --workdir=runs/lr --set optim.base_lr=1e-4,2e-4 --set ema=0.0,0.999 --print
"""

TRAIN = (sys.executable, '-m', 'mim_jax.train')
LOG = 'train.log'
TAIL = 15  # lines of a failed run's output that are shown
LONGEST = 120  # characters of a folder's name; file systems allow 255 bytes


@dataclasses.dataclass(frozen=True)
class Launch:
  """One run: its folder, and the arguments of `python -m mim_jax.train`."""

  folder: Path
  arguments: tuple[str, ...]


def add(parser):
  cli.add_config(parser)
  parser.add_argument('--workdir', required=True, help='folder for the folders of the runs')
  parser.add_argument(
    '--set',
    action='append',
    default=[],
    metavar='KEY=A,B,C',
    help='values of a config key to try; several times for all combinations; a value with commas goes in brackets',
  )
  parser.add_argument('--seeds', type=int, default=1, help="how many seeds, from the config's own on")
  parser.add_argument('--print', action='store_true', dest='lines', help='print launch lines and run nothing')


def run(args):
  launches = plan(args.config, args.overrides, args.set, args.seeds, Path(args.workdir))
  if args.lines:
    for launch in launches:
      print(shlex.join(['python', '-m', 'mim_jax.train', *launch.arguments]))
    return 0
  failed = {}
  with Stop() as stop:
    for i, launch in enumerate(launches, 1):
      name = launch.folder.name
      print(f'[{i}/{len(launches)}] {name}: output in {launch.folder / LOG}', flush=True)
      began = time.monotonic()
      code = _train(launch, stop)
      if stop.asked:
        print(f'stopped in run {i} of {len(launches)}; the same command goes on from there')
        return 1
      print(f'[{i}/{len(launches)}] {name}: {_outcome(code)} after {duration(time.monotonic() - began)}', flush=True)
      if code:
        failed[name] = code
        lines = (launch.folder / LOG).read_text(errors='replace').splitlines()
        print('\n'.join(f'    {line}' for line in lines[-TAIL:]), flush=True)
  _results([launch.folder for launch in launches if launch.folder.name not in failed])
  if failed:
    print(f'\n{len(failed)} of {len(launches)} runs failed:', file=sys.stderr)
    for name, code in failed.items():
      print(f'  {name}: {_outcome(code)}; see {Path(args.workdir) / name / LOG}', file=sys.stderr)
  return 1 if failed else 0


def plan(recipe: str, overrides: Sequence[str], settings: Sequence[str], seeds: int, workdir: Path) -> list[Launch]:
  """The runs of a sweep: all combinations of `settings` ('KEY=A,B,C'), each with `seeds` seeds.

  Raises UserError for a malformed setting, and ConfigError for a key or a value that the recipe does not take: every
  run's config is made before the first one starts.
  """
  axes = dict(map(_axis, settings))
  if len(axes) < len(settings):
    raise UserError(f'a key is set twice in {", ".join(settings)}; give its values in one --set KEY=A,B,C')
  if seeds < 1:
    raise UserError(f'--seeds={seeds}: expected 1 or more')
  if 'seed' in axes:
    raise UserError('--set seed=...: seeds are given by --seeds=N, starting from --config.seed=FIRST')
  if not axes and seeds == 1:
    raise UserError('nothing to try: give --set KEY=A,B,C, or --seeds=N with N of 2 or more')
  own = [f'--config={recipe}', *overrides]
  first = config.load(own).seed
  launches = []
  for values in itertools.product(*axes.values()):
    chosen = dict(zip(axes, values, strict=True))
    for seed in range(first, first + seeds):
      given = [f'--config.{key}={value}' for key, value in {**chosen, 'seed': seed}.items()]
      _check([*own, *given], chosen)
      name = _name({**{_short(key, axes): value for key, value in chosen.items()}, 'seed': seed})
      launches.append(Launch(workdir / name, (f'--config={recipe}', f'--workdir={workdir / name}', *overrides, *given)))
  folders = [launch.folder for launch in launches]
  twice = sorted({folder.name for folder in folders if folders.count(folder) > 1})
  if twice:
    raise UserError(f'two runs would have the folder {twice[0]}; give each value once')
  return launches


class Stop:
  """SIGINT and SIGTERM: the run at work is asked to save itself, and no other one is started."""

  def __init__(self):
    self.asked = False
    self._process = None

  def __enter__(self):
    self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
    return self

  def __exit__(self, *exception):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def wait(self, process: subprocess.Popen) -> int:
    """Exit code of a run, which is asked to save itself when a signal has come or comes."""
    self._process = process
    if self.asked:
      process.terminate()
    code = process.wait()
    self._process = None
    return code

  def _ask(self, number, frame):
    del number, frame
    self.asked = True
    if self._process:
      self._process.terminate()


def _train(launch: Launch, stop: Stop) -> int:
  """Trains and returns the exit code. The run is in a session of its own, so that Ctrl-C reaches it once, through `stop`."""
  command = [*TRAIN, *launch.arguments]
  try:
    launch.folder.mkdir(parents=True, exist_ok=True)
    with (launch.folder / LOG).open('ab') as log:
      process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
      )
  except OSError as error:
    raise UserError(f'cannot start a run in {launch.folder}: {error.strerror}; give another --workdir') from error
  return stop.wait(process)


def _results(folders: Sequence[Path]):
  """Prints the table of the runs that have figures, and names those that have none."""
  records = []
  for folder in folders:
    try:
      records.append(record.read(folder))
    except UserError as error:
      print(error)
  if records:
    comparison = compare.compare(records)
    print(f'\n{compare.table(comparison, shutil.get_terminal_size((120, 24)).columns)}')
    print(f'\ncurves: {shlex.join(["mim-jax", "compare", *(str(found.path) for found in records)])}')


def _axis(setting: str) -> tuple[str, list[str]]:
  """'KEY=A,B,(C,D)' -> (KEY, [A, B, (C,D)])."""
  key, equals, text = setting.partition('=')
  key = key.removeprefix('config.')
  values, depth = [''], 0
  for letter in text:
    depth += (letter in '([{') - (letter in ')]}')
    if letter == ',' and depth == 0:
      values.append('')
    else:
      values[-1] += letter
  if not key or not equals or depth or not all(values):
    raise UserError(f'--set {setting}: expected KEY=A,B,C, such as method.mask_ratio=0.5,0.75, brackets closed')
  return key, values


def _check(arguments: Sequence[str], chosen: dict[str, str]):
  try:
    config.load(arguments)
  except ConfigError as error:
    values = ', '.join(f'{key}={value}' for key, value in chosen.items())
    raise ConfigError(f'--set {values}: {error}' if values else str(error)) from error


def _short(key: str, keys) -> str:
  """The last part of a key, or all of it where two keys share that."""
  last = key.rpartition('.')[2]
  return last if sum(other.rpartition('.')[2] == last for other in keys) == 1 else key


def _name(values: dict[str, object]) -> str:
  """Folder of a run: 'mask_ratio=0.5,seed=0', other characters than those of file names as '_'."""
  text = ','.join(f'{key}={value}' for key, value in values.items())
  name = re.sub(r'[^\w.=,+-]+', '_', text, flags=re.ASCII)
  if name != text or len(name) > LONGEST:  # what was lost keeps names apart, and the seed stays readable
    digest = f'{zlib.crc32(text.rpartition(",seed=")[0].encode()):08x}'
    head, _, seed = name.rpartition(',seed=')
    name = f'{head[: LONGEST - 30]}-{digest},seed={seed}'
  return name


def _outcome(code: int) -> str:
  if code < 0:
    return f'killed by {signal.Signals(-code).name}'
  return f'failed with exit code {code}' if code else 'done'
