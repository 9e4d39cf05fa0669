"""The record of a run: `metrics.jsonl` and `panels/*.png` always, TensorBoard and wandb when asked for.

`metrics.jsonl` has one JSON object per call of `Writer.write`: 'step' first, then names such as 'loss/pixel',
'eval/knn/top1', 'time/step'. Integers stay integers and floats have all digits of their float64. JSON has no NaN and no
infinity: they are the strings 'nan', 'inf' and '-inf', which `float` and `read_metrics` understand.
"""

import contextlib
import json
import math
import os
import secrets
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from mim_jax.errors import UserError
from mim_jax.log import pictures

FILE = 'metrics.jsonl'


class Writer:
  """Writes the record of one run; on all processes but the first every call does nothing.

  A line is with the operating system when `write` returns, so a kill tears at most the line being written; a torn line
  is removed when the file is opened again.
  """

  def __init__(
    self,
    workdir: str | Path,
    resume_step: int | None = None,
    tensorboard: bool = False,
    wandb: str = '',
    config: Mapping | None = None,
    shared: bool = False,
  ):
    """Opens the record in `workdir`.

    Args:
      workdir: the run's folder.
      resume_step: step of the state that the run goes on from; later lines are dropped, they will be written again.
        A run that starts anew passes -1, which drops all. None keeps all: for a command that adds to a finished run.
      tensorboard: also write `events*` there.
      wandb: also send to this wandb project ('project' or 'entity/project'); '' for none.
      config: shown by wandb.
      shared: the run itself may be writing the same file, so what is in it stays untouched; lines are only added.

    Raises UserError when the folder cannot be written, a line before the last is no record, or wandb is not installed.
    """
    import jax  # not needed to read a record

    self.active = jax.process_index() == 0
    self.resume_step = resume_step
    self.recorded = frozenset()  # names the file already has at resume_step; writing them again is skipped
    self._events = self._wandb = None
    if not self.active:
      return
    self.workdir = Path(workdir)
    self._path = self.workdir / FILE
    with _explained(self._path):
      self.workdir.mkdir(parents=True, exist_ok=True)
      lines = _lines(self._path) if self._path.exists() else []
      kept = [(line, record) for line, record in lines if resume_step is None or record['step'] <= resume_step]
      self.recorded = frozenset().union(*(record for _, record in kept if record['step'] == resume_step)) - {'step'}
      if not shared:
        self._rewrite(line for line, _ in kept)
      elif self._path.exists() and not self._path.read_bytes().endswith(b'\n'):
        raise UserError(f'{self._path} ends within a line; the run mends it when it is started again')
      self._file = self._path.open('ab', buffering=0)
    if tensorboard:
      from tensorboardX import SummaryWriter

      purge = None if resume_step is None else resume_step + 1  # from there on TensorBoard hides what older files say
      suffix = f'.{time.time_ns()}'  # names begin with the second only; readers go through the files by name
      self._events = SummaryWriter(str(self.workdir), purge_step=purge, flush_secs=10, filename_suffix=suffix)
    if wandb:
      self._wandb = self._start_wandb(wandb, config)

  def write(self, step: int, numbers: Mapping[str, object]):
    """Adds one line with `numbers`: Python, numpy or jax scalars by name.

    Names already `recorded` at the resume step are left out. Raises ValueError for anything but a real scalar.
    """
    if not self.active:
      return
    step = int(step)
    if step == self.resume_step:
      numbers = {name: value for name, value in numbers.items() if name not in self.recorded}
    if not numbers:
      return
    values = {name: _number(name, value) for name, value in numbers.items()}
    line = json.dumps({'step': step} | {name: _legal(value) for name, value in values.items()}, allow_nan=False)
    with _explained(self._path):
      rest = line.encode() + b'\n'
      while rest:  # a nearly full disk takes a part, and says why at the next try
        rest = rest[self._file.write(rest) :]
    if self._events:
      for name, value in values.items():
        self._events.add_scalar(name, value, step)
    if self._wandb:
      self._wandb.log({'step': step, **values})

  def picture(self, step: int, name: str, image: np.ndarray):
    """Writes uint8 [H, W], [H, W, 1] or [H, W, 3] as `panels/NAME_STEP.png`, '_' for '/', 8 digits for the step."""
    if not self.active:
      return
    path = self.workdir / 'panels' / f'{name.replace("/", "_")}_{int(step):08d}.png'
    with _explained(path):
      pictures.save(path, image)
    if self._events:
      self._events.add_image(name, image, int(step), dataformats='HWC' if np.ndim(image) == 3 else 'HW')
    if self._wandb:
      import wandb

      self._wandb.log({'step': int(step), f'panels/{name}': wandb.Image(str(path))})

  def close(self):
    """Ends TensorBoard and wandb, waiting for what they still have to write."""
    if not self.active:
      return
    self._file.close()
    if self._events:
      self._events.close()
    if self._wandb:
      self._wandb.finish()

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self.close()

  def _rewrite(self, kept: Iterable[bytes]):
    """Makes the file hold just these lines; a kill leaves either the old file or the new one."""
    content = b''.join(line + b'\n' for line in kept)
    if self._path.exists() and self._path.read_bytes() == content:
      return
    part = self._path.with_name(f'.{FILE}.part')
    with part.open('wb') as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    os.replace(part, self._path)

  def _start_wandb(self, project, config):
    try:
      import wandb
    except ImportError as error:
      raise UserError(
        f"log.wandb is {project!r} but wandb is not installed: pip install 'mim-jax[wandb]', or leave log.wandb empty"
      ) from error
    path = self.workdir / 'wandb_id'  # a run that goes on is the same run there
    with _explained(path):
      if not path.exists():
        path.write_text(secrets.token_hex(4))
    entity, _, name = project.rpartition('/')
    run = wandb.init(
      project=name,
      entity=entity or None,
      name=self.workdir.resolve().name,
      id=path.read_text().strip(),
      resume='allow',
      dir=str(self.workdir),
      config=dict(config or {}),
    )
    run.define_metric('*', step_metric='step')  # wandb's own count only grows, ours goes back to the last checkpoint
    return run


def read_metrics(path: str | Path) -> list[dict]:
  """Records of a `metrics.jsonl` or of the run folder that holds it, in order; a torn last line is left out.

  Raises UserError when there is no such file, or when a line before the last is no record.
  """
  path = Path(path)
  path = path / FILE if path.is_dir() else path
  if not path.is_file():
    raise UserError(f'{path}: no metrics there; expected {FILE} or a run folder that holds one')
  numbers = lambda record: {name: float(value) if isinstance(value, str) else value for name, value in record.items()}
  return [numbers(record) for _, record in _lines(path)]


def series(records: Iterable[Mapping], name: str) -> tuple[list[int], list[float]]:
  """Steps and values of one metric, from the records that have it."""
  found = [(record['step'], record[name]) for record in records if name in record]
  return [step for step, _ in found], [value for _, value in found]


def _lines(path):
  """Complete lines of the file, each as (bytes, record); after the last line break is only what a kill cut short."""
  lines = []
  for number, line in enumerate(path.read_bytes().split(b'\n')[:-1], 1):
    try:
      record = json.loads(line)
      record['step'] + 0  # a record is an object with a step
    except (ValueError, TypeError, KeyError) as error:
      raise UserError(
        f'{path}, line {number}: expected a JSON object with a step, found {line[:60]!r}; mend or remove that line'
      ) from error
    lines.append((line, record))
  return lines


def _number(name, value) -> int | float:
  array = np.asarray(value)
  if name == 'step':
    raise ValueError("metric 'step': expected another name, this one is the line's own")
  if array.shape != () or array.dtype.kind in 'cOSUmM':
    raise ValueError(f'metric {name!r}: expected a real scalar, got {array.dtype} of shape {array.shape}')
  return int(array) if array.dtype.kind in 'biu' else float(array)


def _legal(value):
  return value if math.isfinite(value) else str(value)


@contextlib.contextmanager
def _explained(path):
  """Turns an error of the file system into one that says what to do."""
  try:
    yield
  except OSError as error:
    raise UserError(
      f'cannot write {path}: {error.strerror}; make room or change permissions, then give the same command again: '
      'the run goes on from its last checkpoint'
    ) from error
