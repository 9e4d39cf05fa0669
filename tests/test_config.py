"""Recipes, overrides, and the proof that no key is misspelt or ignored."""

import pytest

from mim_jax import config, method
from mim_jax.errors import ConfigError

RECIPE = '--config=configs/mae.py:debug'


@pytest.fixture(autouse=True)
def at_root(monkeypatch, root):
  monkeypatch.chdir(root)


def test_overrides_keep_types_and_reach_everything():
  cfg = config.load(
    [
      RECIPE,
      '--config.batch_size=64',
      '--config.method.mask_ratio=0.9',
      '--config.data.source=folder:/x',
      '--config.evals.knn.k=5',
    ]
  )
  assert (
    cfg.batch_size == 64 and cfg.method.mask_ratio == 0.9 and cfg.data.source == 'folder:/x' and cfg.evals.knn.k == 5
  )


@pytest.mark.parametrize(
  'args, message',
  [
    ([], '--config=FILE'),
    (['--config=configs/nope.py'], 'no such recipe'),
    (['--config=configs/mae.py:debg'], "did you mean 'debug'"),
    (['--config=configs/mae.py:epochs=many'], 'expected a int'),
    ([RECIPE, '--config.optim.base_rl=1'], "did you mean 'optim.base_lr'"),
    ([RECIPE, '--config.batch_size=many'], 'many'),
    ([RECIPE, '--confg.batch_size=1'], 'unknown argument'),
    ([RECIPE, '--config.method.mask_rato=0.5'], "did you mean 'method.mask_ratio'"),
  ],
)
def test_mistakes_name_what_was_meant(args, message):
  with pytest.raises(ConfigError, match=message):
    config.load(args)


def test_recipe_arguments():
  large = config.load(['--config=configs/mae.py:size=L,epochs=1600'])
  assert large.method.size == 'L' and large.duration == '1600 epochs' and large.method.patch == 16
  assert config.load(['--config=configs/mae.py:size=H']).method.patch == 14


def test_keys_that_nothing_read_are_named():
  cfg = config.base()
  cfg.method = method.options('mae', size='Ti')
  cfg.optim.momentum = 0.5
  cfg.seed = 3
  recorded = config.Recorded(cfg)
  assert recorded.seed == 3 and recorded.optim.name == 'adamw' and 'momentum' in recorded.optim
  defaults = config.leaves(config.base()) | {f'method.{k}': v for k, v in method.defaults('mae').items()}
  assert config.unread(recorded, defaults) == ['method.size', 'optim.momentum']
  with pytest.raises(ConfigError, match='optim.momentum = 0.5'):
    config.require_read(recorded, defaults)
  method.build(recorded.method)
  assert recorded.optim.momentum == 0.5
  config.require_read(recorded, defaults)


def test_a_saved_config_comes_back(tmp_path):
  cfg = config.load([RECIPE, "--config.optim.lr_mult=(('encoder', 0.5),)"])
  config.save(cfg, tmp_path / 'config.json')
  back = config.read(tmp_path / 'config.json')
  assert back.to_dict() == cfg.to_dict() and config.digest(back) == config.digest(cfg)


def test_the_digest_covers_numbers_and_not_logging():
  cfg = config.load([RECIPE])
  assert config.digest(config.load([RECIPE, '--config.log.tensorboard=True', '--config.mesh.data=2'])) == config.digest(
    cfg
  )
  assert config.digest(config.load([RECIPE, '--config.seed=1'])) != config.digest(cfg)


def test_unknown_options_of_a_method():
  with pytest.raises(ConfigError, match="did you mean 'norm_pix'"):
    method.options('mae', norm_pixel=True)
  with pytest.raises(ConfigError, match='unknown'):
    method.options('mea')
