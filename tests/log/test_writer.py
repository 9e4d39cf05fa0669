"""The record of a run: exact numbers, legal JSON, and the same file after any kill."""

import json
import os
import signal
import subprocess
import sys
import time
import types

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.errors import UserError
from mim_jax.log.writer import Writer, read_metrics, series


def train(writer, steps):
  """What a run writes: a line per step, and an evaluation at every third."""
  for step in steps:
    writer.write(step, {'loss/pixel': np.float32(1 / (step + 1)), 'bad/total': step})
    if step % 3 == 0:
      writer.write(step, {'eval/knn/top1': step / 7})


def reference(folder):
  with Writer(folder) as writer:
    train(writer, range(1, 10))
  return (folder / 'metrics.jsonl').read_bytes()


def strict(line):
  def refuse(word):
    raise AssertionError(f'{word} is not JSON')

  return json.loads(line, parse_constant=refuse)


def test_numbers_keep_their_kind_and_every_digit(tmp_path, rng):
  single = np.float32(0.1)
  given = {
    'loss/jax': jnp.float32(0.1),
    'loss/half': jnp.bfloat16(0.1),
    'loss/numpy': single,
    'loss/double': 0.1 + 1e-16,
    'count/python': 2**60 + 1,
    'count/numpy': np.int64(2**60 + 1),
    'count/jax': jnp.int32(7),
    'count/bool': np.True_,
  }
  exponents = rng.integers(-300, 300, 200)
  doubles = {f'x/{i}': float(value) for i, value in enumerate(rng.standard_normal(200) * 10.0**exponents)}
  with Writer(tmp_path) as writer:
    writer.write(np.int64(3), given)
    writer.write(4, doubles)
  first, second = read_metrics(tmp_path)
  assert list(first) == ['step', *given]
  assert first['step'] == 3 and isinstance(first['step'], int)
  assert first['loss/jax'] == first['loss/numpy'] == float(single)
  assert first['loss/half'] == float(jnp.bfloat16(0.1))
  assert first['loss/double'] == 0.1 + 1e-16
  assert all(isinstance(first[name], int) for name in given if name.startswith('count'))
  assert first['count/python'] == first['count/numpy'] == 2**60 + 1 and first['count/bool'] == 1
  assert second == {'step': 4, **doubles}


def test_nan_and_infinity_are_legal_json_and_come_back(tmp_path):
  with Writer(tmp_path) as writer:
    writer.write(1, {'a': jnp.float32(jnp.nan), 'b': np.inf, 'c': -np.inf})
  line = (tmp_path / 'metrics.jsonl').read_text()
  assert strict(line) == {'step': 1, 'a': 'nan', 'b': 'inf', 'c': '-inf'}
  (record,) = read_metrics(tmp_path)
  assert np.isnan(record['a']) and record['b'] == np.inf and record['c'] == -np.inf


@pytest.mark.parametrize('value', [np.zeros(1), jnp.zeros((2, 2)), '0.5', None, 1j])
def test_what_is_no_number_is_refused_by_name(tmp_path, value):
  with Writer(tmp_path) as writer:
    with pytest.raises(ValueError, match='loss/odd'):
      writer.write(1, {'loss/odd': value})
    with pytest.raises(ValueError, match='step'):
      writer.write(1, {'step': 2})
  assert (tmp_path / 'metrics.jsonl').read_bytes() == b''


def test_resumed_file_equals_the_uninterrupted_one_wherever_the_kill_fell(tmp_path):
  whole = reference(tmp_path / 'whole')
  saved = whole.index(b'{"step": 7')  # the checkpoint is of step 6: its lines are there
  folder = tmp_path / 'killed'
  folder.mkdir()
  for cut in range(saved, len(whole) + 1):
    (folder / 'metrics.jsonl').write_bytes(whole[:cut])
    with Writer(folder, resume_step=6) as writer:
      train(writer, range(7, 10))
    assert (folder / 'metrics.jsonl').read_bytes() == whole, f'killed after byte {cut}'
  assert [path.name for path in folder.iterdir()] == ['metrics.jsonl']


def test_an_evaluation_at_the_resume_step_is_written_once(tmp_path):
  whole = reference(tmp_path / 'whole')
  for done in (b'{"step": 6, "eval', b'{"step": 7'):  # killed before, and after the evaluation of step 6
    (tmp_path / 'metrics.jsonl').write_bytes(whole[: whole.index(done)])
    with Writer(tmp_path, resume_step=6) as writer:
      assert ('eval/knn/top1' in writer.recorded) == (b'7' in done)
      writer.write(6, {'eval/knn/top1': 6 / 7})
      train(writer, range(7, 10))
    assert (tmp_path / 'metrics.jsonl').read_bytes() == whole


def test_new_run_drops_all_and_a_later_command_drops_nothing(tmp_path):
  whole = reference(tmp_path)
  with Writer(tmp_path) as writer:
    writer.write(9, {'eval/linear/top1': 0.5})
  assert (tmp_path / 'metrics.jsonl').read_bytes() == whole + b'{"step": 9, "eval/linear/top1": 0.5}\n'
  Writer(tmp_path, resume_step=-1).close()
  assert read_metrics(tmp_path) == []


def test_a_failed_rewrite_leaves_the_old_file(tmp_path, monkeypatch):
  whole = reference(tmp_path)

  def fail(*paths):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'replace', fail)
  with pytest.raises(UserError, match='No space left on device; make room'):
    Writer(tmp_path, resume_step=3)
  assert (tmp_path / 'metrics.jsonl').read_bytes() == whole


def test_full_disk_is_explained(tmp_path):
  writer = Writer(tmp_path)
  writer._file = open('/dev/full', 'ab', buffering=0)  # noqa: SIM115
  with pytest.raises(UserError, match='metrics.jsonl: No space left on device.*same command again'):
    writer.write(1, {'loss': 1.0})


def test_broken_line_in_the_middle_is_named(tmp_path):
  (tmp_path / 'metrics.jsonl').write_bytes(b'{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n')
  for use in (read_metrics, Writer):
    with pytest.raises(UserError, match='line 2'):
      use(tmp_path)


def test_reading_a_running_record_and_a_missing_one(tmp_path):
  with pytest.raises(UserError, match='no metrics there'):
    read_metrics(tmp_path)
  torn = b'{"step": 1, "loss": 2}\n{"step": 2}\n{"step": 3, "loss": 4}\n{"step": 4, "lo'
  (tmp_path / 'metrics.jsonl').write_bytes(torn)
  assert series(read_metrics(tmp_path / 'metrics.jsonl'), 'loss') == ([1, 3], [2, 4])


def test_kill_minus_nine_loses_no_written_line(tmp_path):
  code = """
import sys
from mim_jax.log.writer import Writer
writer = Writer(sys.argv[1])
for step in range(10**6):
  writer.write(step, {'loss': 1 / (step + 1)})
  if step == 300:
    print(step, flush=True)
"""
  process = subprocess.Popen([sys.executable, '-c', code, str(tmp_path)], stdout=subprocess.PIPE)
  assert process.stdout.readline().strip() == b'300'
  process.send_signal(signal.SIGKILL)
  process.communicate()
  with Writer(tmp_path, resume_step=10**6):
    steps = [record['step'] for record in read_metrics(tmp_path)]
  assert len(steps) > 300 and steps == list(range(len(steps)))


def test_other_processes_write_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  with Writer(tmp_path / 'run', resume_step=3, tensorboard=True, wandb='project') as writer:
    writer.write(4, {'loss': 1.0})
    writer.picture(4, 'panel', np.zeros((4, 4, 3), np.uint8))
    assert writer.recorded == frozenset()
  assert not (tmp_path / 'run').exists()


def test_picture_is_rgb_png_under_name_and_step(tmp_path):
  image = np.zeros((5, 6, 3), np.uint8)
  image[..., 0] = 250  # red
  with Writer(tmp_path) as writer:
    writer.picture(120, 'eval/panel', image)
  (path,) = (tmp_path / 'panels').iterdir()
  assert path.name == 'eval_panel_00000120.png'
  assert (cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB) == image).all()


def events(folder):
  """Per events file its list of Event messages (a record: 8 bytes length, 4 checksum, the message, 4 checksum)."""
  from tensorboardX.proto.event_pb2 import Event

  for path in sorted(folder.glob('events*')):
    data, messages = path.read_bytes(), []
    while data:
      size = int.from_bytes(data[:8], 'little')
      messages.append(Event.FromString(data[12 : 12 + size]))
      data = data[16 + size :]
    yield messages


def test_tensorboard_has_the_same_numbers_and_hides_what_a_resume_repeats(tmp_path):
  with Writer(tmp_path, tensorboard=True) as writer:
    train(writer, range(1, 10))
    writer.picture(9, 'panel', np.full((4, 5, 3), 200, np.uint8))
  with Writer(tmp_path, resume_step=6, tensorboard=True) as writer:
    train(writer, range(7, 10))
  first, second = events(tmp_path)
  values = {(event.step, value.tag): value for event in first for value in event.summary.value}
  for step in range(1, 10):
    assert values[step, 'loss/pixel'].simple_value == np.float32(1 / (step + 1))
  assert (values[9, 'panel'].image.height, values[9, 'panel'].image.width) == (4, 5)
  assert [event.step for event in second if event.HasField('session_log')] == [7]
  assert {event.step for event in second if event.summary.value} == {7, 8, 9}


def test_tensorboard_files_are_in_order_when_the_second_changes_between_two_looks_at_the_clock(tmp_path, monkeypatch):
  now = iter((10.9999, 11.2))  # the first file is named by second 11 too
  monkeypatch.setattr(time, 'time_ns', lambda: int(next(now) * 1e9))
  monkeypatch.setattr(time, 'time', lambda: 1_111_111_111.5)
  for resume_step in (None, 6):
    with Writer(tmp_path, resume_step=resume_step, tensorboard=True) as writer:
      writer.write(7, {'loss': 0.5})
  first, second = events(tmp_path)
  assert not any(event.HasField('session_log') for event in first)
  assert any(event.HasField('session_log') for event in second)


def test_missing_wandb_names_the_extra(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(UserError, match=r"pip install 'mim-jax\[wandb\]'"):
    Writer(tmp_path, wandb='team/project')


def test_wandb_run_keeps_its_id(tmp_path, monkeypatch):
  started, logged = [], []
  finish = lambda: logged.append('end')
  run = types.SimpleNamespace(define_metric=lambda *a, **k: None, log=logged.append, finish=finish)

  def init(**options):
    started.append(options)
    return run

  monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=init, Image=lambda path: path))
  for resume in (-1, 6):
    with Writer(tmp_path, resume_step=resume, wandb='team/project', config={'seed': 0}) as writer:
      writer.write(resume + 1, {'loss': np.float32(0.5), 'bad': np.nan})
      writer.picture(resume + 1, 'panel', np.zeros((2, 2), np.uint8))
  assert started[0] == started[1]
  assert (started[0]['entity'], started[0]['project'], started[0]['resume']) == ('team', 'project', 'allow')
  assert started[0]['config'] == {'seed': 0} and len(started[0]['id']) >= 8
  assert logged[0]['step'] == 0 and logged[0]['loss'] == 0.5 and np.isnan(logged[0]['bad'])
  assert logged[1] == {'step': 0, 'panels/panel': str(tmp_path / 'panels' / 'panel_00000000.png')}
  assert logged[2] == 'end'


def test_a_second_writer_adds_to_the_file_of_a_running_one(tmp_path):
  with Writer(tmp_path) as trainer:
    trainer.write(1, {'loss': 1.0})
    with Writer(tmp_path, shared=True) as evaluator:
      trainer.write(2, {'loss': 0.5})
      evaluator.write(1, {'eval/knn/top1': 0.25})
    trainer.write(3, {'loss': 0.25})
  assert [row['step'] for row in read_metrics(tmp_path)] == [1, 2, 1, 3]
  with (tmp_path / 'metrics.jsonl').open('ab') as file:
    file.write(b'{"step": 4')
  with pytest.raises(UserError, match='ends within a line'):
    Writer(tmp_path, shared=True)
  assert (tmp_path / 'metrics.jsonl').read_bytes().endswith(b'{"step": 4')  # which the running one may be completing
