"""The progress line: never torn, never wider than the terminal, plain where there is no terminal."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading

import pytest

from mim_jax.log import progress as module
from mim_jax.log.progress import Progress, duration, short

MEMORY = {'in_use': 3 * 2**30, 'peak': 5 * 2**30, 'limit': 16 * 2**30}


class Terminal(io.StringIO):
  encoding = 'utf-8'

  def isatty(self):
    return True

  def screen(self):
    """The lines that a person sees: carriage return, erase to end of line and overwriting are carried out."""
    lines, column = [''], 0
    for token in re.findall(r'\x1b\[K|\r|\n|[^\r\n\x1b]+', self.getvalue()):
      if token == '\x1b[K':
        lines[-1] = lines[-1][:column]
      elif token == '\r':
        column = 0
      elif token == '\n':
        lines.append('')
        column = 0
      else:
        lines[-1] = lines[-1][:column] + token + lines[-1][column + len(token) :]
        column += len(token)
    return lines


@pytest.fixture
def clock(monkeypatch):
  """A clock that tests move by hand."""
  now = [100.0]
  monkeypatch.setattr(module, 'monotonic', lambda: now[0])
  return now


def test_first_words_need_no_jax():
  code = (
    "import sys; from mim_jax.log.progress import Progress; Progress().say('hello'); "
    "sys.exit(bool({'jax', 'numpy', 'cv2', 'absl'} & set(sys.modules)))"
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  assert done.returncode == 0 and done.stderr.endswith(' hello\n')


def test_saying_does_not_tear_the_live_line(clock):
  stream = Terminal()
  progress = Progress(total=100, batch_size=8, stream=stream)
  progress.update(10, loss=0.5)
  progress.say('image 3 is corrupt')
  clock[0] += 1
  progress.update(20, loss=0.25)
  first, live = stream.screen()
  assert first == 'image 3 is corrupt'
  assert re.match(r' 20/100  ━+─+   20%  loss 0\.2500$', live)
  progress.close()
  assert stream.screen()[1:] == [live, '']


def test_line_shows_everything_and_time_left_follows_from_the_rate(clock):
  stream = Terminal()
  progress = Progress(total=1000, batch_size=10, stream=stream)
  progress.update(100, loss=0.5, lr=1e-3, images_per_s=50.0)
  progress.update(400, loss=0.5, lr=1e-3, images_per_s=50.0)  # too soon to redraw
  line = progress._line(400, progress._numbers | {'memory': MEMORY}, 200)
  assert '100/1,000' in stream.screen()[-1] and '400/1,000' in line
  for part in ('40%', 'loss 0.5000', 'lr 1.00e-03', '50 images/s', '2:00 left', '3.0/16.0 GiB'):
    assert part in line
  progress.update(1000, loss=0.4)
  assert '1,000/1,000' in stream.screen()[-1] and 'left' not in stream.screen()[-1]


@pytest.mark.parametrize('columns', [20, 30, 40, 60, 80, 100, 160])
def test_line_fits_a_real_terminal(columns):
  master, slave = pty.openpty()
  fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 24, columns, 0, 0))
  with os.fdopen(slave, 'w', encoding='utf-8') as stream:
    progress = Progress(total=125000, batch_size=4096, stream=stream)
    progress.update(1234, loss=0.4321, lr=2.4e-3, images_per_s=12345.0, memory=MEMORY)
    text = os.read(master, 4096).decode()
  os.close(master)
  line = text.removeprefix('\r').removesuffix('\x1b[K')
  assert len(line) < columns
  assert '1,234/125,000' in line
  shown = [part in line for part in ('loss 0.4321', '11:24:25 left', '12,345 images/s', '1%', 'lr 2.40e-03', 'GiB')]
  assert shown == sorted(shown, reverse=True)  # the least important is the first to go
  assert sum(shown) >= min(6, columns // 20 - 1)
  assert columns < 160 or '─' in line


def test_ticks_move_the_live_line_with_the_last_numbers(clock):
  stream = Terminal()
  progress = Progress(total=100, batch_size=8, stream=stream)
  progress.update(10, loss=0.5)
  for step in range(11, 31):
    clock[0] += 0.05
    progress.tick(step)
  assert re.match(r' 30/100 .* loss 0\.5000$', stream.screen()[-1])
  assert 4 <= stream.getvalue().count('\r') <= 6  # redrawn each 0.2 s of the one second


@pytest.mark.parametrize(('every', 'loss_lines', 'other_lines'), [(5, 21, 0), (7, 15, 0), (35, 6, 6), (200, 1, 9)])
def test_plain_lines_come_every_ten_seconds_with_a_time(clock, every, loss_lines, other_lines):
  stream = io.StringIO()
  progress = Progress(total=200, batch_size=8, stream=stream)
  for step in range(1, 201):
    clock[0] += 1
    if step % every == 0 or step == 200:
      progress.update(step, loss=1 / step, images_per_s=8.0)
    else:
      progress.tick(step)
  assert '\r' not in stream.getvalue() and '\x1b' not in stream.getvalue()
  lines = stream.getvalue().splitlines()
  assert all(re.match(r'\d\d-\d\d \d\d:\d\d:\d\d ', line) for line in lines)
  assert '200/200' in lines[-1] and 'loss 0.0050' in lines[-1]
  told = [line for line in lines if 'loss' in line]  # between updates no old loss is passed off as new
  assert (len(told), len(lines) - len(told)) == (loss_lines, other_lines)


def test_stage_tells_begin_and_duration(clock):
  plain, terminal = io.StringIO(), Terminal()
  for stream in (plain, terminal):
    progress = Progress(total=9, stream=stream)
    progress.update(3, loss=0.5)
    with progress.stage('compiling the train step'):
      assert 'compiling the train step ...' in stream.getvalue().replace('\r', '\n').splitlines()[-1]
      progress.say('a word in between')
      clock[0] += 75
  assert [line[15:] for line in plain.getvalue().splitlines()][1:] == [
    'compiling the train step ...',
    'a word in between',
    'compiling the train step: 1:15',
  ]
  screen = terminal.screen()
  assert screen[:2] == ['a word in between', 'compiling the train step: 1:15']
  assert screen[2].startswith('3/9') and len(screen) == 3


def test_stage_that_fails_says_so(clock):
  stream = Terminal()
  with pytest.raises(KeyError):
    with Progress(stream=stream).stage('evaluating'):
      clock[0] += 2
      raise KeyError
  assert stream.screen() == ['evaluating: stopped after 2.0 s', '']


def test_inactive_process_is_silent():
  for stream in (io.StringIO(), Terminal()):
    progress = Progress(total=5, stream=stream, active=False)
    with progress.stage('compiling'):
      progress.say('x')
    progress.update(1, loss=1.0)
    progress.tick(2)
    progress.close()
    assert stream.getvalue() == ''


def test_terminal_without_utf8_gets_ascii(clock):
  stream = Terminal()
  stream.encoding = 'ascii'
  progress = Progress(total=10, stream=stream)
  progress.say('größe')
  progress.update(5)
  assert stream.getvalue().isascii() and '=' in stream.screen()[-1] and stream.screen()[0] == 'gr??e'


def test_threads_may_speak():
  stream = Terminal()
  progress = Progress(total=100, stream=stream)
  speak = lambda name: [progress.say(f'{name} {i}') for i in range(50)]
  threads = [threading.Thread(target=speak, args=(name,)) for name in 'abc']
  for thread in threads:
    thread.start()
  for step in range(100):
    progress.update(step, loss=1.0)
  for thread in threads:
    thread.join()
  said = [line for line in stream.screen() if re.fullmatch(r'[abc] \d+', line)]
  assert sorted(said) == sorted(f'{name} {i}' for name in 'abc' for i in range(50))


def test_durations_and_losses_are_short():
  seconds = {0.04: '0.0 s', 9.94: '9.9 s', 9.96: '10 s', 59.6: '1:00', 201: '3:21', 3599.7: '1:00:00', 3723: '1:02:03'}
  assert {value: duration(value) for value in seconds} == seconds
  assert duration(2 * 86400 + 3 * 3600) == '2 d 03:00'
  losses = {0.0: '0.0000', 0.41234: '0.4123', 12.34: '12.34', -2.5: '-2.5000', 1.23e-5: '1.23e-05', 5e4: '5.00e+04'}
  assert {value: short(value) for value in losses} == losses
  assert short(float('nan')) == 'nan' and short(float('inf')) == 'inf'
