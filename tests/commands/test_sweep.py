"""Sweeps: which runs they consist of, that they are checked first, and that one failure stops no other run."""

import os
import re
import shlex
import signal
import sys
import threading
import time

import numpy as np
import pytest

from mim_jax import cli, config
from mim_jax.commands import sweep

RECIPE = """
from mim_jax import config


def get_config(arg=''):
  cfg = config.base()
  cfg.method = {'name': 'mae', 'mask_ratio': 0.75}
  cfg.seed = 5
  return cfg
"""

TRAINER = """
import json, pathlib, signal, sys, time
from mim_jax import config

args = dict(arg[2:].split('=', 1) for arg in sys.argv[1:])
folder = pathlib.Path(args['workdir'])
cfg = config.load([arg for arg in sys.argv[1:] if arg.startswith('--config')])
with (folder / 'starts').open('a') as file:
  file.write('x')
if cfg.method.mask_ratio == 0.9:
  print('error: it is too dark', file=sys.stderr)
  sys.exit(3)
if cfg.method.mask_ratio == 0.1:
  signal.signal(signal.SIGTERM, lambda *_: ((folder / 'saved').touch(), sys.exit(0)))
  (folder / 'ready').touch()
  time.sleep(60)
config.save(cfg, folder / 'config.json')
loss = cfg.method.mask_ratio + cfg.seed / 100
(folder / 'metrics.jsonl').write_text(''.join(json.dumps({'step': s, 'loss': loss}) + '\\n' for s in (1, 2)))
"""


@pytest.fixture
def recipe(tmp_path):
  path = tmp_path / 'recipe.py'
  path.write_text(RECIPE)
  return path


@pytest.fixture
def fake_training(tmp_path, monkeypatch, root):
  """Runs are a small program that writes the record of a run at once."""
  path = tmp_path / 'trainer.py'
  path.write_text(TRAINER)
  monkeypatch.setattr(sweep, 'TRAIN', (sys.executable, str(path)))
  monkeypatch.setenv('PYTHONPATH', str(root))


def arguments(recipe, *more):
  return ['sweep', f'--config={recipe}', f'--workdir={recipe.parent / "runs"}', *more]


def test_plan_is_every_combination_with_every_seed(recipe, tmp_path):
  settings = ['method.mask_ratio=0.5,0.75', 'optim.lr_mult=(),(("head",0.1),)']
  launches = sweep.plan(str(recipe), ['--config.batch_size=8'], settings, 2, tmp_path)
  assert len({launch.folder for launch in launches}) == len(launches) == 2 * 2 * 2
  loaded = [config.load([arg for arg in launch.arguments if arg.startswith('--config')]) for launch in launches]
  found = [(cfg.method.mask_ratio, cfg.optim.lr_mult, cfg.seed, cfg.batch_size) for cfg in loaded]
  expected = [(m, r, s, 8) for m in (0.5, 0.75) for r in ((), (('head', 0.1),)) for s in (5, 6)]
  assert found == expected
  assert all(re.fullmatch(r'[\w.=,+-]{1,120}', launch.folder.name) for launch in launches)


def test_names_of_folders_are_short_and_differ(recipe, tmp_path):
  names = lambda *settings: [x.folder.name for x in sweep.plan(str(recipe), [], settings, 1, tmp_path)]
  assert names('method.mask_ratio=0.5,0.75') == ['mask_ratio=0.5,seed=5', 'mask_ratio=0.75,seed=5']
  assert names('optim.wd=0.1', 'method.name=a') == ['wd=0.1,name=a,seed=5']
  assert names('optim.name=sgd', 'method.name=a') == ['optim.name=sgd,method.name=a,seed=5']
  long = names('data.transforms=' + ','.join(f'decode | resize({"2" * 200}{i})' for i in range(2)))
  assert len(set(long)) == 2 and max(map(len, long)) <= sweep.LONGEST
  odd = names('data.source=folder:/a b,folder:/a_b')
  assert len(set(odd)) == 2 and not any('/' in name for name in odd)


@pytest.mark.parametrize(
  ('more', 'words'),
  [
    (['--set', 'method.mask_rato=0.5'], "did you mean 'method.mask_ratio'"),
    (['--set', 'method.mask_ratio=0.5,dark'], '--set method.mask_ratio=dark: flag --config.method.mask_ratio=dark'),
    (['--set', 'method.mask_ratio'], 'expected KEY=A,B,C'),
    (['--set', 'method.mask_ratio=0.5,'], 'expected KEY=A,B,C'),
    (['--set', 'optim.lr_mult=(('], 'brackets closed'),
    (['--set', 'method.mask_ratio=0.5,0.5'], 'two runs would have the folder mask_ratio=0.5,seed=5'),
    (['--set', 'ema=0.9', '--set', 'ema=0.99'], 'a key is set twice'),
    (['--set', 'seed=1,2'], 'seeds are given by --seeds=N'),
    (['--seeds=0'], 'expected 1 or more'),
    ([], 'nothing to try'),
  ],
)
def test_mistakes_are_found_before_anything_runs(recipe, fake_training, capsys, more, words):
  assert cli.main(arguments(recipe, *more)) == 2
  assert words in capsys.readouterr().err
  assert not (recipe.parent / 'runs').exists()


def test_print_gives_a_launch_line_each_and_runs_nothing(recipe, capsys):
  lines = ['--set', 'data.source=folder:/a b,folder:/c', '--seeds=2', '--print', '--config.batch_size=8']
  assert cli.main(arguments(recipe, *lines)) == 0
  printed = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
  assert len(printed) == 4 and all(line[:3] == ['python', '-m', 'mim_jax.train'] for line in printed)
  assert '--config.data.source=folder:/a b' in printed[0] and '--config.seed=6' in printed[1]
  assert not (recipe.parent / 'runs').exists()


def test_results_are_one_table_over_seeds(recipe, fake_training, capsys):
  assert cli.main(arguments(recipe, '--set', 'method.mask_ratio=0.5,0.75', '--seeds=2')) == 0
  out = capsys.readouterr().out
  assert re.search(r'^mask_ratio=0\.5 +2 +2 +0\.5550 ± 0\.0071$', out, re.MULTILINE)
  assert re.search(r'^mask_ratio=0\.75 +2 +2 +0\.8050 ± 0\.0071$', out, re.MULTILINE)
  assert out.count('done after') == 4 and 'mim-jax compare' in out


def test_a_failing_run_is_told_and_the_others_go_on(recipe, fake_training, capsys):
  assert cli.main(arguments(recipe, '--set', 'method.mask_ratio=0.5,0.9,0.75')) == 1
  out, err = capsys.readouterr()
  assert 'mask_ratio=0.9,seed=5: failed with exit code 3' in out and '    error: it is too dark' in out
  assert re.findall(r'^mask_ratio=([\d.]+) +1 +2 ', out, re.MULTILINE) == ['0.5', '0.75']
  log = recipe.parent / 'runs' / 'mask_ratio=0.9,seed=5' / sweep.LOG
  assert '1 of 3 runs failed' in err and str(log) in err and 'too dark' in log.read_text()


def test_a_signal_lets_the_run_save_itself_and_starts_no_other(recipe, fake_training, capsys):
  running = recipe.parent / 'runs' / 'mask_ratio=0.1,seed=5'

  def interrupt():
    end = time.monotonic() + 60
    while not (running / 'ready').exists() and time.monotonic() < end:
      time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)

  before = signal.getsignal(signal.SIGINT)
  thread = threading.Thread(target=interrupt)
  thread.start()
  try:
    assert cli.main(arguments(recipe, '--set', 'method.mask_ratio=0.1,0.5')) == 1
  finally:
    thread.join()
  assert (running / 'saved').exists() and not (recipe.parent / 'runs' / 'mask_ratio=0.5,seed=5').exists()
  assert 'stopped in run 1 of 2' in capsys.readouterr().out
  assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_real_runs(tmp_path, root, monkeypatch, capsys):
  rng = np.random.default_rng(0)
  np.savez(tmp_path / 'data.npz', image=rng.integers(0, 256, (48, 16, 16, 3), dtype=np.uint8), label=np.arange(48) % 3)
  monkeypatch.setenv('PYTHONPATH', str(root))
  monkeypatch.setenv('XLA_FLAGS', '')
  more = ['method.size=32/1/2', 'method.decoder=32/1/2', 'method.image_size=16', 'data.eval_transforms=normalize']
  more += [
    'data.transforms=flip | normalize',
    'batch_size=16',
    'duration=4 steps',
    'log_every=2 steps',
    'panels.every=',
  ]
  more += ['evals.knn.every=never', 'evals.linear.every=never', 'evals.knn.test=:train', 'evals.linear.test=:train']
  command = ['sweep', f'--config={root / "configs" / "mae.py"}:debug', f'--workdir={tmp_path / "runs"}']
  sources = f'data.source=arrays:{tmp_path / "data.npz"},arrays:{tmp_path / "none.npz"}'
  assert cli.main([*command, '--set', sources, *(f'--config.{entry}' for entry in more)]) == 1
  out, err = capsys.readouterr()
  assert '1 of 2 runs failed' in err and 'none.npz' in out
  assert re.search(r'data.npz.* 1 +4 +\d\.\d{4}', out)
