"""Noticing that the run is to stop: SIGTERM from a scheduler or a preempted machine, Ctrl-C from a person."""

import signal
import threading

import jax
from jax.experimental import multihost_utils


class StopSignal:
  """Called between steps and between evaluation batches; True from the moment that all processes should save and leave.

  One process catches SIGTERM and the first Ctrl-C itself (a second Ctrl-C interrupts at once). With several processes a signal to any of
  them reaches all through JAX's coordination service, and all stop at the same call: each must call it equally often.
  """

  def __init__(self):
    self._asked = False
    self._calls = 0
    self._previous = {}
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._previous[number] = signal.signal(number, self._catch)

  def _catch(self, number, frame):
    del frame
    self._asked = True
    if number == signal.SIGINT:  # schedulers may repeat SIGTERM, a person who repeats Ctrl-C means it
      signal.signal(number, self._previous[number])

  def __call__(self) -> bool:
    if jax.process_count() > 1:
      self._calls += 1
      self._asked = self._asked or multihost_utils.reached_preemption_sync_point(self._calls)
    return self._asked

  def close(self):
    """Gives the signals back to their former handlers."""
    for number, handler in self._previous.items():
      signal.signal(number, handler)
