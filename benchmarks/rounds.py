"""What the benchmarks have in common: commands that print a rate, run in turns, and the spread of their ratios.

The machine's clock and its other work drift over minutes, so two rates that are to be compared are taken in turns (A B A B ...) and
compared within a round. A command that is measured ends its output with one line `images_per_second N`.
"""

import os
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

PEERS = Path(__file__).parent / 'peers'
LAST_LINE = re.compile(r'^images_per_second (\S+)$')


def pin(cores: int) -> list[int]:
  """Keeps this process and all that it starts on the first `cores` of those it may use, and says so to thread pools.

  Returns the numbers of these cores. Call before anything starts threads. Exits when there are fewer.
  """
  usable = sorted(os.sched_getaffinity(0))
  if len(usable) < cores:
    sys.exit(f'error: {cores} cores are asked for, this process may use {len(usable)}')
  os.sched_setaffinity(0, usable[:cores])
  for name in ('NPROC', 'OMP_NUM_THREADS', 'MKL_NUM_THREADS'):  # the first is XLA's
    os.environ[name] = str(cores)
  os.environ['JAX_PLATFORMS'] = 'cpu'
  return usable[:cores]


def run(command: str | Sequence[str]) -> tuple[float, list[str]]:
  """Runs a command to its end -> (N of its last line `images_per_second N`, the lines before). Exits when there is none."""
  words = shlex.split(command) if isinstance(command, str) else [str(word) for word in command]
  try:
    done = subprocess.run(words, capture_output=True, text=True)
  except OSError as error:
    sys.exit(f'error: {shlex.join(words)}: {error}')
  lines = done.stdout.strip().splitlines()
  found = LAST_LINE.match(lines[-1]) if lines else None
  if done.returncode or not found:
    told = '\n'.join((done.stdout + done.stderr).splitlines()[-20:])
    sys.exit(
      f'error: expected a last line "images_per_second N" and exit code 0 ({done.returncode}) of:\n{shlex.join(words)}\n{told}'
    )
  return float(found[1]), lines[:-1]


def spread(values: Iterable[float], form: str = '{:.1f}') -> str:
  """'median (least to most)'."""
  values = list(values)
  least, most = form.format(min(values)), form.format(max(values))
  return f'{form.format(statistics.median(values))} ({least} to {most})'


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
  """ours / theirs, round by round."""
  return [a / b for a, b in zip(ours, theirs, strict=True)]


def print_row(cells: Iterable):
  """One row of a Markdown table."""
  print('| ' + ' | '.join(map(str, cells)) + ' |', flush=True)


def print_head(cells: Sequence[str]):
  print_row(cells)
  print('|' + '---|' * len(cells), flush=True)
