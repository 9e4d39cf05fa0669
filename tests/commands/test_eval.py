"""mim-jax eval: evaluators on a finished run, on kinds its config does not name, and beside a running job."""

import re
import shutil

import numpy as np
import pytest

from mim_jax import cli, config, method, trainer
from mim_jax.commands import eval as command
from mim_jax.errors import UserError
from mim_jax.evals import suite
from mim_jax.log.writer import read_metrics


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """The folder of a run of twelve steps with checkpoints of steps 4, 8 and 12, which evaluated nothing."""
  folder = tmp_path_factory.mktemp('eval')
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (48, 16, 16, 3), dtype=np.uint8)
  np.savez(folder / 'images.npz', image=image, label=np.arange(48) % 3, mask=(image[..., :1] > 127).astype(np.uint8))
  cfg = config.base()
  cfg.method = method.options('mae', size='32/1/2', decoder='32/1/2', patch=8, image_size=16)
  cfg.data.source = f'arrays:{folder / "images.npz"}'
  cfg.data.transforms = cfg.data.eval_transforms = 'normalize'
  cfg.batch_size, cfg.duration, cfg.log_every = 16, '12 steps', '4 steps'
  cfg.checkpoint.every, cfg.checkpoint.keep = '4 steps', 3
  cfg.panels.every = 'never'
  cfg.evals = suite.config(knn={'every': 'never', 'test': ':train', 'k': 3, 'baselines': ()})
  trainer.run(cfg, folder / 'run')
  return folder / 'run'


@pytest.fixture
def run(finished, tmp_path):
  return shutil.copytree(finished, tmp_path / 'run')


def evaluate(run, *arguments):
  return cli.main(['eval', f'--workdir={run}', *arguments])


def evaluated(run, figure='eval/knn/top1'):
  return [row['step'] for row in read_metrics(run) if figure in row]


def test_evaluators_of_the_config_run_on_the_newest_checkpoint_even_if_training_left_them_out(run, capsys):
  assert evaluate(run) == 0
  assert evaluated(run) == [12] and 'knn/top1' in capsys.readouterr().out


def test_any_kind_may_be_named_and_set(run):
  assert evaluate(
    run,
    '--evals=segment,knn',
    '--set', 'segment.test=:train',
    '--set', 'segment.classes=2',
    '--set', 'segment.train_batch=16',
    '--set', 'segment.epochs=2',
    '--set', 'knn.k=1',
  ) == 0  # fmt: skip
  row = read_metrics(run)[-1]
  assert row['eval/knn/top1'] == 1.0  # each image finds itself
  assert {'eval/segment/miou', 'eval/segment/untrained/miou', 'eval/segment/train_loss'} <= set(row)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--evals=knn', '--set', 'knn.test=arrays:absent.npz'], r'numpy.savez(.|\n)*--config.evals.knn.every=never'),
    (['--evals=segment', '--set', 'segment.label=masks', '--set', 'segment.test=:train'], "field 'masks' is missing"),
    (['--evals=knn', '--set', 'linear.k=3'], 'NAME one of knn'),
    (['--evals=knnn'], "did you mean 'knn'"),
  ],
)
def test_what_is_missing_is_told_before_anything_is_computed(run, monkeypatch, capsys, arguments, message):
  monkeypatch.setattr(command.runs, 'restore', lambda *args: pytest.fail('a checkpoint was read'))
  assert evaluate(run, *arguments) == 2
  assert re.search(message, capsys.readouterr().err)


def test_settings_are_literals_or_words():
  given = command.settings(
    {'knn': {'k': 3}}, ['knn.k=5', 'knn.features=cls,mean', 'knn.baselines=()', 'knn.every=never']
  )
  assert given == {'knn': {'k': 5, 'features': 'cls,mean', 'baselines': (), 'every': 'never'}}
  with pytest.raises(UserError, match='expected NAME.KEY=VALUE'):
    command.settings({'knn': {}}, ['knn=5'])


def test_follow_evaluates_each_checkpoint_as_it_comes_and_ends_with_the_last(run, monkeypatch):
  checkpoints, stash = run / 'checkpoints', run / 'later'
  stash.mkdir()
  for step in ('8', '12'):
    shutil.move(checkpoints / step, stash / step)
  coming = iter(('8', '12'))

  def sleep(seconds):
    step = next(coming)
    shutil.move(stash / step, checkpoints / step)

  monkeypatch.setattr(command.time, 'sleep', sleep)
  assert evaluate(run, '--follow') == 0
  assert evaluated(run) == [4, 8, 12]
  assert evaluate(run, '--follow') == 0  # all of it is in the record
  assert evaluated(run) == [4, 8, 12]


def test_follow_stops_waiting_for_a_run_that_stays_away(run, monkeypatch, capsys):
  shutil.rmtree(run / 'checkpoints' / '12')
  monkeypatch.setattr(command.time, 'sleep', lambda seconds: None)
  assert evaluate(run, '--follow', '--wait=0.05') == 1
  assert evaluated(run) == [4, 8]
  assert 'evaluated up to step 8 of 12' in capsys.readouterr().out


def test_a_checkpoint_that_went_before_its_turn_is_left_out(run, monkeypatch):
  restore = command.runs.restore

  def slow(workdir, cfg, program, at):
    if at == 4:
      shutil.rmtree(run / 'checkpoints' / '4')
    return restore(workdir, cfg, program, at)

  monkeypatch.setattr(command.runs, 'restore', slow)
  assert evaluate(run, '--follow') == 0
  assert evaluated(run) == [8, 12]
