"""Timing, tracing and device memory."""

import types

import jax
import jax.numpy as jnp
import pytest

from mim_jax.errors import ConfigError
from mim_jax.log import profile
from mim_jax.log.profile import Profiler, Timer, device_memory


@pytest.fixture
def clock(monkeypatch):
  now = [5.0]
  monkeypatch.setattr(profile, 'monotonic', lambda: now[0])
  return now


def test_timer_splits_data_from_the_rest_and_leaves_pauses_out(clock):
  timer = Timer(batch_size=32)
  with timer.pause({}):
    clock[0] += 60  # an evaluation
  for _ in range(4):
    with timer.data():
      clock[0] += 0.5
    timer.step()
    clock[0] += 1.5
  assert timer.read() == pytest.approx({'time/step': 2.0, 'time/data': 0.5, 'time/images_per_s': 16.0})
  assert timer.read() == {}
  timer.step()
  clock[0] += 4.0
  assert timer.read() == pytest.approx({'time/step': 4.0, 'time/data': 0.0, 'time/images_per_s': 8.0})


def test_time_until_dispatched_steps_are_done_is_training_also_when_a_pause_begins(clock):
  class Running:
    def block_until_ready(self):
      clock[0] += 6.0

  timer = Timer(batch_size=1)
  timer.step()
  with timer.pause({'loss': Running()}):
    clock[0] += 60
  assert timer.read()['time/step'] == 6.0


def test_timer_counts_no_wait_that_the_devices_outlast(clock):
  timer = Timer(batch_size=1)
  for ready, seconds in ((False, 7.0), (True, 3.0)):
    with timer.data(types.SimpleNamespace(is_ready=lambda ready=ready: ready)):
      clock[0] += seconds
    timer.step()
  assert timer.read() == {'time/step': 5.0, 'time/data': 1.5, 'time/images_per_s': 0.2}


def test_timer_counts_a_wait_that_fails(clock):
  timer = Timer(batch_size=1)
  with pytest.raises(StopIteration):
    with timer.data():
      clock[0] += 3.0
      raise StopIteration
  timer.step()
  assert timer.read()['time/data'] == 3.0


@pytest.fixture
def traces(monkeypatch):
  """What is asked of the jax profiler, without tracing."""
  calls = []
  monkeypatch.setattr(jax.profiler, 'start_trace', lambda folder: calls.append(('start', folder)))
  monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: calls.append(('stop',)))
  return calls


@pytest.mark.parametrize(('first', 'expected'), [(0, 2), (3, 3), (4, 4), (5, None)])
def test_profiler_traces_the_chosen_steps_also_when_resumed_among_them(tmp_path, traces, first, expected):
  said = []
  profiler = Profiler('2:4', tmp_path, said.append)
  for step in range(first, 8):
    with profiler.step(step, jnp.zeros(3)):
      traces.append(step)
  profiler.close()
  traced = traces[traces.index(('start', str(tmp_path / 'profile'))) + 1 : traces.index(('stop',))] if expected else []
  assert traced == ([*range(expected, 5)] if expected else [])
  assert sum(isinstance(call, tuple) for call in traces) == (2 if expected else 0)
  if expected:
    assert said[0] == f'profiling steps {expected} to 4' and str(tmp_path / 'profile') in said[1]
  else:
    assert said == []


def test_profiler_ends_with_the_run(tmp_path, traces):
  said = []
  profiler = Profiler('2:9', tmp_path, said.append)
  for step in range(4):
    with profiler.step(step, {}):
      pass
  profiler.close({'x': jnp.ones(2)})
  assert [call[0] for call in traces] == ['start', 'stop'] and len(said) == 2
  late = Profiler('50:60', tmp_path, said.append)
  with late.step(0, {}):
    pass
  late.close()
  assert 'nothing was traced' in said[-1] and len(traces) == 2


def test_profiler_is_off_by_default_and_on_other_processes(tmp_path, traces, monkeypatch):
  said = []
  off = Profiler('', tmp_path, said.append)
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  for profiler in (off, Profiler('0:3', tmp_path, said.append)):
    with profiler.step(0, {}):
      pass
    profiler.close()
  assert traces == [] and said == []


@pytest.mark.parametrize('steps', ['100', '5:4', 'a:b', '1:', ':3', '-1:2', '1:2:3'])
def test_wrong_steps_are_refused(tmp_path, steps):
  with pytest.raises(ConfigError, match='log.profile'):
    Profiler(steps, tmp_path)


def test_trace_is_written(tmp_path):
  profiler = Profiler('1:2', tmp_path, lambda text: None)
  state, double = jnp.ones(4), jax.jit(lambda x: x * 2)
  for step in range(4):
    with profiler.step(step, state):
      state = double(state)
  profiler.close(state)
  assert list((tmp_path / 'profile').rglob('*.xplane.pb'))


def test_memory_is_of_the_fullest_device_and_absent_where_unknown(monkeypatch):
  assert device_memory() == {}  # the CPU backend tells none
  stats = [{'bytes_in_use': 5, 'bytes_limit': 16, 'peak_bytes_in_use': 9}, {'bytes_in_use': 7, 'bytes_limit': 16}, None]
  monkeypatch.setattr(jax, 'local_devices', lambda: [types.SimpleNamespace(memory_stats=lambda s=s: s) for s in stats])
  assert device_memory() == {'in_use': 7, 'peak': 9, 'limit': 16}
