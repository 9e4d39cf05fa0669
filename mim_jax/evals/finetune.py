"""Fine-tuning of a whole encoder on labels: MAE's recipe (He et al. 2022, arXiv 2111.06377, table 9) on any method's tokens.

Layer-wise decay of the learning rate, stochastic depth, mixup and cutmix, label smoothing; RandAugment and random erasing
by name in `train_transforms`. The defaults are those of facebookresearch/mae for ViT-B (main_finetune.py, FINETUNE.md);
for L and H: 50 epochs, base_lr 1e-3, layer_decay 0.75, drop_path 0.2 and 0.3.

| task | label | loss | figures |
|---|---|---|---|
| single | class [B] int | cross-entropy with soft labels | top1, top5, class_mean |
| multi | [B, C] of 0 and 1 | sigmoid cross-entropy, mean over examples and classes | auroc, map (means over the classes) |
| regression | [B] or [B, K] numbers | squared error of standardised values | mae, rmse, r2, in the units of the label |

Where the official code trains the table of positions, here the positions stay what the method makes of them: its layer has
1/270 of the rate in that recipe (0.65^13).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mim_jax.errors import ConfigError, UserError
from mim_jax.evals import features, fit, metrics
from mim_jax.models import blocks
from mim_jax.ops import losses, mix

DEFAULTS = {
  **fit.DEFAULTS,
  'task': 'single',  # single | multi | regression
  'pool': 'mean',  # mean: patch tokens ahead of the encoder's final norm, where encode gives `layers`, then a norm; or cls
  'head_std': 2e-5,  # of the head's initial kernel
  'mixup': 0.8,  # alpha of Beta(alpha, alpha); 0 for none
  'cutmix': 1.0,
  'smoothing': 0.1,  # of class labels
  'train_batch': 1024,
  'epochs': 100,
  'warmup_epochs': 5,
  'base_lr': 5e-4,
  'min_lr': 1e-6,
  'layer_decay': 0.65,
  'drop_path': 0.1,
}
BASELINES = fit.BASELINES
reads = fit.reads

TASKS = ('single', 'multi', 'regression')
STATISTICS = 16  # batches of labels that mean and deviation of a regression are taken from


class Head(nn.Module):
  """What `Method.encode` gives -> [B, outputs] float32; `models.heads.Classifier` without its encoder."""

  outputs: int
  pool: str
  head_std: float

  @nn.compact
  def __call__(self, encoded):
    if self.pool == 'cls':
      x = encoded['cls'].astype(jnp.float32)
    else:
      count = encoded['tokens'].shape[1]
      tokens = encoded['layers'][-1][:, -count:] if 'layers' in encoded else encoded['tokens']
      x = blocks.LayerNorm(name='fc_norm')(jnp.mean(tokens.astype(jnp.float32), axis=1))
    return nn.Dense(self.outputs, kernel_init=nn.initializers.truncated_normal(self.head_std), name='head')(x)


def check(cfg, options):
  """Raises ConfigError for settings that cannot work, see `fit.check`."""
  fit.check(cfg, options)
  if cfg.task not in TASKS or cfg.pool not in ('mean', 'cls'):
    raise ConfigError(f'task is {cfg.task!r}, pool {cfg.pool!r}; expected one of {", ".join(TASKS)}, and mean or cls')
  mixed = cfg.mixup > 0 or cfg.cutmix > 0
  if cfg.task != 'single' and cfg.smoothing or cfg.task == 'regression' and mixed:
    raise ConfigError(
      f'task {cfg.task!r} with smoothing={cfg.smoothing}, mixup={cfg.mixup}, cutmix={cfg.cutmix}: smoothing is for class '
      'labels, and a regression takes neither mixup nor cutmix; set them to 0'
    )


def run(encoder: features.Encoder, cfg, ctx: features.Context) -> dict[str, float]:
  """Figures of the task on the test set, and train_loss; see `fit.run`."""
  check(cfg, encoder.options)
  if cfg.task == 'single':
    outputs, mean, std = ctx.open_source(cfg.train).classes(cfg.label), 0.0, 1.0
  else:
    outputs, mean, std = _label_statistics(cfg, ctx)
  return fit.run(encoder, task_of(cfg, outputs, mean, std), cfg, ctx)


def _label_statistics(cfg, ctx):
  """(outputs, mean [K], deviation [K]) of the training labels, from some batches; 0 and 1 unless they are for a regression."""
  transforms, fields = cfg.train_transforms or cfg.transforms, (*cfg.fields, cfg.label)
  given = ctx.open_batches(cfg.train, transforms, cfg.train_batch, fields, shuffle=cfg.seed)
  wanted = min(STATISTICS, len(ctx.open_source(cfg.train)) // cfg.train_batch) if cfg.task == 'regression' else 1
  labels = []
  for _ in range(max(1, wanted)):
    labels.append(np.asarray(features.gathered(next(given)[cfg.label], ctx.mesh), np.float64))
  given.close()
  labels = np.concatenate(labels)
  if cfg.task == 'multi':
    if labels.ndim != 2 or not np.isin(labels, (0, 1)).all():
      raise UserError(
        f'labels {cfg.label!r} of {cfg.train} have shape {labels.shape} and values from {labels.min()} to {labels.max()}; '
        'task multi needs 0 and 1 for each class, [B, C]; name another field in evals.<name>.label'
      )
    return labels.shape[1], 0.0, 1.0
  if labels.ndim > 2 or not np.isfinite(labels).all():
    raise UserError(f'labels {cfg.label!r} of {cfg.train} have shape {labels.shape}; a regression needs [B] or [B, K]')
  labels = labels.reshape(len(labels), -1)
  std = labels.std(axis=0)
  return labels.shape[1], labels.mean(axis=0), np.where(std > 0, std, 1.0)


def task_of(cfg, outputs: int, mean=0.0, std=1.0) -> fit.Task:
  """The task that `cfg` describes; `outputs` classes or numbers; mean, std: of the labels of a regression."""
  head = Head(outputs, cfg.pool, cfg.head_std)
  mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
  mixed = cfg.mixup > 0 or cfg.cutmix > 0

  def init(key, encoded, batch):
    del batch
    if cfg.pool == 'cls' and 'cls' not in encoded:
      raise ConfigError("pool is 'cls', but this encoder has no class token; set it to 'mean'")
    return head.init(key, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), encoded))['params']

  def predict(params, state, encoded, batch, train):
    del state, batch, train
    return head.apply({'params': params}, encoded), {}

  def draw(key, batch):
    return mix.draw(key, batch, cfg.mixup, cfg.cutmix) if mixed else {}

  def prepare(batch, draws):
    labels = batch[cfg.label]
    rest = {name: value for name, value in batch.items() if name != cfg.label}
    if cfg.task == 'regression':
      return rest, (labels.astype(jnp.float32).reshape(len(labels), -1) - mean) / std
    if mixed:
      images, target = mix.apply(batch['image'], labels, draws, outputs, cfg.smoothing)
      return {**rest, 'image': images}, target
    return rest, mix.smooth_labels(labels, outputs, cfg.smoothing) if cfg.task == 'single' else labels

  def loss(prediction, target, draws):
    del draws
    if cfg.task == 'single':
      return losses.cross_entropy(prediction, target)
    if cfg.task == 'multi':
      return losses.sigmoid_cross_entropy(prediction, target)
    return jnp.mean(jnp.square(prediction - target))

  def measure(prediction, batch):
    prediction = prediction * std + mean if cfg.task == 'regression' else prediction
    return {'prediction': prediction, 'label': batch[cfg.label]}

  def figures(kept):
    prediction, labels = kept['prediction'], kept['label']
    if cfg.task == 'single':
      return metrics.classification(prediction, features.class_labels(labels, cfg.test))
    return metrics.multilabel(prediction, labels) if cfg.task == 'multi' else metrics.regression(prediction, labels)

  return fit.Task(init, predict, loss, prepare, measure, figures, draw)
