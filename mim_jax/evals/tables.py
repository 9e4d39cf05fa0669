"""Classifiers on an image and a table row of which more and more cells lack (TIP, arXiv 2407.07582, section 4.1).

A linear layer on the class token, trained with the whole encoder or, with `frozen`, alone; one training for each rate
of missing cells, which hold in training and test alike. Of the training table, `corruption` of the columns of every
row get the value of another row. Which cells lack (`how`, see `data.tables.missing_cells`): the paper's RVM is
'cells', RFM 'columns', MIFM 'most_important', LIFM 'least_important', where the importance is that of a random forest
on the complete training table.

The encoder gets the lacking cells in the field `missing`, those that the data lacks included. The data needs a field
that numbers its examples (`row`), so that a cell that lacks does so in every epoch.

Different from the official code: AdamW without decay, which is Adam, but for a fixed number of epochs in place of
early stopping on validation data (for a constant rate set min_lr to base_lr times train_batch / 256); BatchNorm keeps
the statistics of pre-training, where there they move even under a frozen encoder; augmentation is what
`train_transforms` says.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mim_jax.data import tables as generators
from mim_jax.errors import ConfigError
from mim_jax.evals import features, finetune, fit, metrics
from mim_jax.ops import tables

DEFAULTS = {
  **finetune.DEFAULTS,
  'fields': ('image', 'table', 'missing', 'row'),  # what the encoder reads, and the number of the example
  'table': 'table',
  'missing': 'missing',
  'row': 'row',
  'rates': (0.0, 0.5),  # of missing cells, a training for each
  'how': 'cells',  # cells | columns | most_important | least_important
  'order': (-1,),  # columns by falling importance; (-1,): by a random forest
  'corruption': 0.3,
  'pool': 'cls',
  'head_std': 0.01,
  'mixup': 0.0,
  'cutmix': 0.0,
  'smoothing': 0.0,
  'train_batch': 256,
  'warmup_epochs': 0,
  'base_lr': 1e-4,
  'min_lr': 1e-4,
  'wd': 0.0,
  'layer_decay': 1.0,
  'drop_path': 0.0,
}
BASELINES = fit.BASELINES
reads = fit.reads


def check(cfg, options):
  """Raises ConfigError for settings that cannot work."""
  finetune.check(cfg, options)
  needed = {cfg.table, cfg.missing, cfg.row}
  if cfg.how not in generators.GENERATORS or not cfg.rates or not all(0 <= rate < 1 for rate in cfg.rates):
    raise ConfigError(
      f'how is {cfg.how!r}, rates {tuple(cfg.rates)}; expected one of {", ".join(generators.GENERATORS)}, and rates from '
      '0 to below 1'
    )
  if cfg.task != 'single' or cfg.mixup or cfg.cutmix or not needed <= set(cfg.fields):
    raise ConfigError(
      f'task {cfg.task!r}, mixup {cfg.mixup}, cutmix {cfg.cutmix}, fields {tuple(cfg.fields)}: this evaluator classifies '
      f'without mixing, and reads {", ".join(sorted(needed))}'
    )


def run(encoder: features.Encoder, cfg, ctx: features.Context) -> dict[str, float]:
  """'missingNN/top1' and so on for each rate, in per cent, and 'top1', their mean over the rates.

  With two classes also 'missingNN/auroc'.
  """
  check(cfg, encoder.options)
  train, test = (ctx.open_source(source) for source in (cfg.train, cfg.test))
  classes, columns = train.classes(cfg.label), train.features[cfg.table].shape[0]
  order = _order(cfg, ctx, columns) if cfg.how.endswith('important') else ()
  result = {}
  for rate in cfg.rates:
    # Columns that are taken from everybody are the same in both sets, random cells are not.
    cells = [generators.missing_cells(len(s), columns, rate, cfg.how, order, cfg.seed) for s in (train, test)]
    whole = NamedSharding(ctx.mesh, PartitionSpec())
    hiding = dataclasses.replace(
      encoder,
      variables={**encoder.variables, 'lacking': jax.device_put(cells[1], whole)},
      encode=_hiding(encoder.encode, cfg.missing, cfg.row) if encoder.encode else None,
      options=frozenset(),
    )
    figures = fit.run(hiding, task_of(cfg, classes, cells[0]), cfg, ctx)
    result.update({f'missing{round(100 * rate)}/{name}': value for name, value in figures.items()})
  return {'top1': float(np.mean([value for name, value in result.items() if name.endswith('/top1')])), **result}


@functools.lru_cache(maxsize=16)
def _hiding(encode, missing, row):
  """`encode` of a batch without the cells variables['lacking'] [n, N] of its rows; rows below 0 keep theirs."""

  def hidden(variables, batch):
    batch = dict(batch)
    rows, lacking = batch.pop(row), variables['lacking']
    batch[missing] |= lacking[rows % len(lacking)] & (rows >= 0)[:, None]
    return encode({name: value for name, value in variables.items() if name != 'lacking'}, batch)

  return hidden


def task_of(cfg, classes: int, cells) -> fit.Task:
  """Classification whose training rows lack `cells` bool [n, N] and are corrupted."""
  task = finetune.task_of(cfg, classes)
  columns = cells.shape[1]
  cells = jnp.asarray(cells)

  def draw(key, batch):
    keys = jax.random.split(key)
    shape = (len(batch[cfg.table]), columns)
    return {'order': jax.random.uniform(keys[0], shape), 'source': jax.random.uniform(keys[1], shape)}

  def prepare(batch, draws):
    rest, target = task.prepare(batch, {})
    missing = rest[cfg.missing] | cells[rest[cfg.row] % len(cells)]
    others = tables.from_marginals(rest[cfg.table], draws['source'], missing)
    taken = tables.smallest(draws['order'], int(cfg.corruption * columns))
    table = jnp.where(taken, others, rest[cfg.table])
    return {**rest, cfg.table: table, cfg.missing: missing, cfg.row: jnp.full_like(rest[cfg.row], -1)}, target

  def figures(kept):
    found = task.figures(kept)
    if classes == 2:
      found['auroc'] = metrics.auroc(kept['prediction'][:, 1] - kept['prediction'][:, 0], kept['label'])
    return found

  return dataclasses.replace(task, draw=draw, prepare=prepare, figures=figures)


def _order(cfg, ctx, columns) -> tuple[int, ...]:
  """Columns by falling importance: as configured, or by a random forest on the training table."""
  if cfg.order != (-1,):
    return tuple(cfg.order)
  try:
    from sklearn import ensemble
  except ImportError as error:
    raise ConfigError(
      f'how={cfg.how!r} ranks the columns by a random forest, and scikit-learn is not installed; install it, or give '
      f'the {columns} columns by falling importance in `order`'
    ) from error
  rows, labels = [], []
  for batch in ctx.open_batches(cfg.train, cfg.transforms, cfg.batch_size, (*cfg.fields, cfg.label)):
    ctx.check_stop()
    keep = features.gathered(features.are_examples(batch), ctx.mesh)
    rows.append(features.gathered(batch[cfg.table], ctx.mesh)[keep])
    labels.append(features.gathered(batch[cfg.label], ctx.mesh)[keep])
  forest = ensemble.RandomForestClassifier(random_state=cfg.seed).fit(np.concatenate(rows), np.concatenate(labels))
  return tuple(np.argsort(-forest.feature_importances_, kind='stable').tolist())
