"""A run of twelve steps on arrays, with an evaluation and a checkpoint every four; its data is named by $DRILL_DATA."""

import os

from mim_jax import config, method
from mim_jax.evals import suite


def get_config(arg=''):
  del arg
  cfg = config.base()
  cfg.method = method.options('mae', size='32/1/2', decoder='32/1/2', patch=8, image_size=16)
  cfg.data.source = f'arrays:{os.environ["DRILL_DATA"]}'
  cfg.data.transforms = 'random_resized_crop(16, scale=(0.5, 1.0)) | flip | normalize'
  cfg.data.eval_transforms = 'normalize'
  cfg.batch_size = 16
  cfg.duration = '12 steps'
  cfg.schedule.warmup = '2 steps'
  cfg.optim.base_lr, cfg.optim.lr_batch = 1e-3, 0
  cfg.log_every = '2 steps'
  cfg.checkpoint.every = '4 steps'
  cfg.panels.every = 'never'
  cfg.ema = 0.9
  cfg.max_bad_steps = 3
  cfg.evals = {'knn': suite.settings('knn', {'every': '4 steps', 'test': ':train', 'k': 3, 'baselines': ()})}
  return cfg
