"""What a person sees while a run goes on: one live line on a terminal, a plain line about every ten seconds elsewhere.

Imports nothing slow, so that the first words can be out before jax is loaded.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Mapping
from time import monotonic

PLAIN_SECONDS = 10.0  # between plain lines with new numbers; twice that without any before one tells just the step
LIVE_SECONDS = 0.2  # between redraws of the live line
BAR = 20  # widest bar, characters


class Progress:
  """The line of a run: step, loss, learning rate, images/s, time left, device memory; as much as fits the terminal.

  Attributes:
    total: steps of the run, 0 as long as that is unknown; set it before the first `update`.
    batch_size: images per step, likewise.
    active: False prints nothing; for processes other than the first.
  """

  def __init__(self, total: int = 0, batch_size: int = 1, stream=None, active: bool = True):
    """stream: where to print, by default stderr, so that results on stdout stay clean."""
    self.total, self.batch_size, self.active = total, batch_size, active
    self._stream = sys.stderr if stream is None else stream
    self._terminal = self._stream.isatty() and os.environ.get('TERM') != 'dumb'
    self._encoding = getattr(self._stream, 'encoding', None) or 'ascii'
    self._lock = threading.RLock()  # threads that load data speak too
    self._live = ''  # text of the live line, '' when there is none
    self._drawn = self._updated = -float('inf')  # when the live line, and when a plain line with numbers was last shown
    self._printed = monotonic()  # when any plain line of progress was
    self._numbers = {}
    self._seconds_per_image = None

  def say(self, text: str):
    """Prints lines that stay, above the live line."""
    with self._lock:
      if self._terminal:
        self._put(f'\r\x1b[K{text}\n')
        self._draw(self._live)
      else:
        self._put(''.join(f'{time.strftime("%m-%d %H:%M:%S")} {line}\n' for line in text.split('\n')))

  @contextlib.contextmanager
  def stage(self, name: str):
    """Says at once that `name`, such as 'compiling the train step', has begun, and when it ends how long it took."""
    with self._lock:
      before, start = self._live, monotonic()
      if self._terminal:
        self._draw(f'{name} ...')
      else:
        self.say(f'{name} ...')
    outcome = 'stopped after '
    try:
      yield
      outcome = ''
    finally:
      with self._lock:
        self._live = before
        self.say(f'{name}: {outcome}{duration(monotonic() - start)}')

  def update(
    self,
    step: int,
    loss: float | None = None,
    lr: float | None = None,
    images_per_s: float | None = None,
    memory: Mapping[str, int] | None = None,
  ):
    """Shows new numbers; those not given are not shown.

    Args:
      step: steps done.
      loss: of this step.
      lr: learning rate of this step.
      images_per_s: since the last update, pauses left out; the time left follows from its running average.
      memory: bytes as `profile.device_memory` gives them.
    """
    self._numbers = {'loss': loss, 'lr': lr, 'images_per_s': images_per_s, 'memory': memory}
    if images_per_s:
      seconds, last = 1 / images_per_s, self._seconds_per_image
      self._seconds_per_image = seconds if last is None else 0.7 * last + 0.3 * seconds
    self._show(step, new=True)

  def tick(self, step: int):
    """Moves on between updates: a terminal keeps the last numbers, a plain line has the step and the time left."""
    self._show(step, new=False)

  def close(self):
    """Leaves the live line as it is and goes on below it."""
    with self._lock:
      if self._live:
        self._put('\n')
      self._live = ''

  def _show(self, step, new):
    with self._lock:
      now, last = monotonic(), new and step == self.total
      if self._terminal:
        if now - self._drawn >= LIVE_SECONDS or last:
          self._drawn = now
          self._draw(self._line(step, self._numbers, self._width() - 1))
      elif new and (now - self._updated >= PLAIN_SECONDS or last):
        self._updated = self._printed = now
        self.say(self._line(step, self._numbers))
      elif not new and now - self._printed >= 2 * PLAIN_SECONDS:
        self._printed = now
        self.say(self._line(step, {}))

  def _line(self, step, numbers, width=None):
    """The parts that fit into `width` characters, the least important left out first; without a width all, no bar."""
    digits = len(f'{self.total:,}')
    done = min(1.0, step / self.total) if self.total else 0.0
    loss, lr, rate, memory = (numbers.get(name) for name in ('loss', 'lr', 'images_per_s', 'memory'))
    parts = {'step': f'{step:>{digits},}/{self.total:,}', 'percent': f'{done:4.0%}'}
    if loss is not None:
      parts['loss'] = f'loss {short(loss)}'
    if lr is not None:
      parts['lr'] = f'lr {lr:.2e}'
    if rate is not None:
      parts['rate'] = f'{rate:,.0f} images/s' if rate >= 10 else f'{rate:.2g} images/s'
    if self._seconds_per_image is not None and step < self.total:
      parts['left'] = f'{duration((self.total - step) * self.batch_size * self._seconds_per_image)} left'
    if memory:
      parts['memory'] = '/'.join(f'{memory[key] / 2**30:.1f}' for key in ('in_use', 'limit') if key in memory) + ' GiB'
    text = '  '.join(parts.values())
    if width is None:
      return text
    for name in ('memory', 'lr', 'percent', 'rate', 'left', 'loss'):
      if len(text) > width:
        parts.pop(name, None)
        text = '  '.join(parts.values())
    bar = min(BAR, width - len(text) - 2)
    if bar < 5:
      return text
    full, empty = '━─' if self._encoding.lower().startswith('utf') else '=-'
    filled = int(done * bar)
    return '  '.join([parts.pop('step'), full * filled + empty * (bar - filled), *parts.values()])

  def _draw(self, text):
    self._live = text
    if text:
      self._put(f'\r{text[: self._width() - 1]}\x1b[K')

  def _width(self):
    try:
      columns = os.get_terminal_size(self._stream.fileno()).columns
    except (OSError, ValueError):  # a stream without a file, or a terminal that does not say
      columns = 0
    return columns or 80

  def _put(self, text):
    if self.active:
      self._stream.write(text.encode(self._encoding, 'replace').decode(self._encoding))
      self._stream.flush()


def short(value: float) -> str:
  """A loss in about six characters: 0.4123, 12.34, 1.23e-05."""
  if value and not 1e-3 <= abs(value) < 1e4:
    return f'{value:.2e}'
  return f'{value:.4f}' if abs(value) < 10 else f'{value:.2f}'


def duration(seconds: float) -> str:
  """Seconds as people say them: 0.4 s, 12 s, 3:21, 1:02:03, 2 d 03:00."""
  if seconds < 9.95:
    return f'{seconds:.1f} s'
  whole = round(seconds)
  if whole < 60:
    return f'{whole} s'
  minutes, hours = whole // 60, whole // 3600
  if hours == 0:
    return f'{minutes}:{whole % 60:02d}'
  if hours < 24:
    return f'{hours}:{minutes % 60:02d}:{whole % 60:02d}'
  return f'{hours // 24} d {hours % 24:02d}:{minutes % 60:02d}'
