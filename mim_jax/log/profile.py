"""Where the time and the memory of a run go: a trace of chosen steps, seconds waited for data, bytes on the devices."""

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from time import monotonic

import jax

from mim_jax.errors import ConfigError
from mim_jax.log.progress import duration


class Profiler:
  """Traces steps FIRST to LAST of a run into `workdir/profile`, on the first process only.

  `with profiler.step(step, state): state = train_step(state)` goes around every step. The devices are waited for before
  the first traced step and after the last one, so that the trace holds these steps alone; other steps cost nothing.
  """

  def __init__(self, steps: str, workdir: str | Path, say: Callable[[str], None] = print):
    """Takes the steps as 'FIRST:LAST', both included, counted from 0, or '' for none.

    Raises ConfigError for anything else.
    """
    self._steps, self._folder, self._say = steps, Path(workdir) / 'profile', say
    self._active = bool(steps) and jax.process_index() == 0
    self._running = False
    self._start = 0.0
    if steps:
      match = re.fullmatch(r'(\d+):(\d+)', steps)
      if not match or int(match[1]) > int(match[2]):
        raise ConfigError(f'log.profile is {steps!r}; expected FIRST:LAST, FIRST <= LAST, such as 100:105, or nothing')
      self._first, self._last = int(match[1]), int(match[2])

  @contextlib.contextmanager
  def step(self, step: int, state):
    """Around the step that begins with the tree `state`; a run that resumes among the traced steps traces the rest."""
    if not self._active:
      yield
      return
    if step > self._last:
      self._active = False
      if self._running:
        self._stop(state)
    elif not self._running and step >= self._first:
      jax.block_until_ready(state)
      self._say(f'profiling steps {step} to {self._last}')
      self._start = monotonic()
      jax.profiler.start_trace(str(self._folder))
      self._running = True
    with jax.profiler.StepTraceAnnotation('train', step_num=step):
      yield

  def close(self, state=None):
    """Ends a trace that still runs, after waiting for the tree `state`; says so when there was none."""
    if self._running:
      self._stop(state)
    elif self._active:
      self._say(f'log.profile={self._steps}: no such step was run, nothing was traced')

  def _stop(self, state):
    jax.block_until_ready(state)
    jax.profiler.stop_trace()
    self._running = False
    self._say(
      f'profile of {duration(monotonic() - self._start)} is in {self._folder}; to look at it: '
      f'pip install xprof && xprof --logdir={self._folder}'
    )


class Timer:
  """Splits the wall time between two log points into waiting for data and the rest, without waiting for a device.

  Steps are dispatched and not waited for, so the host does not know the time of one step. It knows the time between two
  points at which it did wait, to fetch the metrics, and the number of steps in between.
  """

  def __init__(self, batch_size: int):
    self._batch_size = batch_size
    self._begin()

  def _begin(self):
    self._start, self._steps, self._data, self._paused = monotonic(), 0, 0.0, 0.0

  @contextlib.contextmanager
  def data(self, running: jax.Array | None = None):
    """Around the wait for the next batch; `running` is a result of the step that was dispatched last.

    The host runs ahead of the devices, so most waits end while they are still at work, and cost nothing: only a wait
    that outlasts the step is counted, and then whole, which is the most that it can have cost.
    """
    start = monotonic()
    try:
      yield
    finally:
      if running is None or running.is_ready():
        self._data += monotonic() - start

  @contextlib.contextmanager
  def pause(self, running):
    """Around what is not training: panels, evaluations, saving.

    `running` is a tree of results of the step that was dispatched last; the time until they are there still is training.
    """
    jax.block_until_ready(running)
    start = monotonic()
    try:
      yield
    finally:
      self._paused += monotonic() - start

  def step(self):
    """Counts one step."""
    self._steps += 1

  def read(self) -> dict[str, float]:
    """Metrics of the steps since the last call, which begins the next interval; call it after waiting for the devices.

    'time/step': seconds per step; 'time/data': the most of them that the devices can have waited for a batch;
    'time/images_per_s'. Empty when there was no step.
    """
    seconds, steps, data = monotonic() - self._start - self._paused, self._steps, self._data
    self._begin()
    if not steps:
      return {}
    return {
      'time/step': seconds / steps,
      'time/data': data / steps,
      'time/images_per_s': self._batch_size * steps / max(seconds, 1e-9),  # 0 s where the clock is coarse
    }


def device_memory() -> dict[str, int]:
  """Bytes on the fullest device of this process: 'in_use', 'peak', 'limit'; absent where a backend tells none (CPU)."""
  found = {}
  for device in jax.local_devices():
    stats = device.memory_stats() or {}
    for name, key in (('in_use', 'bytes_in_use'), ('peak', 'peak_bytes_in_use'), ('limit', 'bytes_limit')):
      if key in stats:
        found[name] = max(found.get(name, 0), int(stats[key]))
  return found
