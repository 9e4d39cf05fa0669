"""Training on top of an encoder, which learns with it or stays frozen: what `finetune`, `segment` and `attentive` share.

A task (a head, a loss, figures) becomes a `Method` whose batch has labels, so it is trained by the one train step of this
project (`step.step_function`): the same accumulation, the same guard against steps that are not finite, an average of the
parameters if asked for. Gradients flow through `Method.encode`; parameters that the prediction does not depend on, such
as those of a decoder, are found from the computation itself and left out.

Figures are exact: each test example counts once, padding and unreadable ones are left out, whatever the number of devices
and processes. Training adds up gradients over devices, so another number of them changes the last digits of the weights.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal
from jax.sharding import NamedSharding, PartitionSpec

from mim_jax import config, method, optim, step
from mim_jax.errors import ConfigError, UserError
from mim_jax.evals import features, metrics
from mim_jax.parallel import mesh as meshes
from mim_jax.parallel import rules

DEFAULTS = {
  'train': ':train',  # data source; ':SPLIT' is that split of the run's own data.source
  'test': ':test',
  'transforms': '',  # of test images; '' = the run's data.eval_transforms
  'train_transforms': '',  # of training images; '' = `transforms`, without augmentation
  'fields': ('image',),  # what the encoder reads
  'label': 'label',
  'batch_size': 0,  # test images at once; 0 = the run's batch_size
  'train_batch': 256,  # images per step
  'accumulate': 1,  # parts that a step's batch is computed in, one after another
  'epochs': 10,
  'schedule': 'cosine',  # cosine | linear | constant
  'warmup_epochs': 1,
  'warmup': '',  # the same as any duration, such as '10%'; '' = warmup_epochs
  'optimizer': 'adamw',  # adamw | sgd | lars
  'base_lr': 1e-3,  # per 256 images
  'min_lr': 0.0,  # at the end, as it is
  'wd': 0.05,
  'no_wd': r'bias$|scale$|pos_embed$|cls_token$',  # parameters without weight decay, by path
  'b1': 0.9,  # adamw
  'b2': 0.999,
  'momentum': 0.9,  # sgd, lars
  'nesterov': False,  # sgd
  'trust': 0.001,  # lars
  'clip': 0.0,  # largest global norm of the gradient; 0: no limit
  'lr_mult': (),  # (regex, factor) pairs for rates of parameters by path, the head being 'task/...'
  'layer_decay': 1.0,  # rate of a layer of the encoder over that of the next one
  'drop_path': 0.0,  # stochastic depth of the last block
  'ema': 0.0,  # momentum of an average of the parameters that is judged in place of the last ones; 0: none
  'frozen': False,  # only the head learns
  'seed': 0,  # of the head, the order, the augmentation and all draws
  'bootstrap': 0,  # resamples of the test set for 95 % intervals of its figures; 0 for none
  'every': 'end',  # 'end', a duration ('10 epochs', '5%'; also runs at the end) or 'never'
  'baselines': ('untrained',),  # the same training from initial weights
}
BASELINES = ('untrained',)  # raw pixels have no parameters to start from

MAX_BAD_STEPS = 10  # not finite, in a row

Tree = Any


@dataclasses.dataclass(frozen=True)
class Task:
  """What is trained on an encoder and how it is judged; all but `figures` are pure functions of device arrays.

  Attributes:
    init: (key, encoded, batch) -> parameters of the head, from the shapes of what `Method.encode` gives and of the batch.
    predict: (head, state, encoded, batch, train) -> (prediction [B, ...] float32, out {name: [B, ...]} for `after_step`).
    loss: (prediction, target, draws) -> scalar.
    prepare: (batch, draws) -> (what the encoder and `predict` see, target); the batch still has its label.
    measure: (prediction, batch) -> {name: [B, ...]}, what `figures` needs of each test example.
    figures: {name: numpy [n, ...]} of all test examples -> {figure: float}.
    draw: (key, batch) -> draws of a step, leading dim B, but for 'counts' (see `mim_jax.method`).
    state, after_step: carried from step to step, such as running statistics: initial tree from the head; (state, out) -> state.
    layers: whether `encoded` must have 'layers'.
    couples: examples of a batch enter each other's loss, so it cannot be accumulated in parts.
  """

  init: Callable[..., Tree]
  predict: Callable[..., tuple[jax.Array, dict]]
  loss: Callable[..., jax.Array]
  prepare: Callable[..., tuple[dict, Any]]
  measure: Callable[..., dict]
  figures: Callable[[Mapping[str, np.ndarray]], dict[str, float]]
  draw: Callable[..., dict] = lambda key, batch: {}
  state: Callable[[Tree], Tree] = lambda head: {}
  after_step: Callable[[Tree, dict], Tree] = lambda state, out: state
  layers: bool = False
  couples: bool = False


def reads(cfg) -> list[tuple[str, str, tuple[str, ...], int]]:
  """(source, transforms, fields, batch size) of everything that `run` will read."""
  fields = (*cfg.fields, cfg.label)
  return [
    (cfg.train, cfg.train_transforms or cfg.transforms, fields, cfg.train_batch // cfg.accumulate),
    (cfg.test, cfg.transforms, fields, cfg.batch_size),
  ]


def check(cfg, options: frozenset[str]):
  """Raises ConfigError for settings that cannot work with an encoder whose `encode` takes the keywords `options`."""
  if cfg.epochs <= cfg.warmup_epochs:
    raise ConfigError(f'epochs={cfg.epochs}, warmup_epochs={cfg.warmup_epochs}; epochs must be more')
  if cfg.accumulate < 1 or cfg.train_batch % cfg.accumulate:
    raise ConfigError(f'train_batch {cfg.train_batch} cannot be computed in accumulate={cfg.accumulate} equal parts')
  if cfg.drop_path and not cfg.frozen and 'drop' not in options:
    raise ConfigError(
      f'drop_path is {cfg.drop_path}, but the encode of this method takes no `drop` (see mim_jax/method.py); set it to 0'
    )


def run(encoder: features.Encoder, task: Task, cfg, ctx: features.Context) -> dict[str, float]:
  """Trains and judges: the figures of the task, and 'train_loss', the mean over the last tenth of the steps."""
  fitted, loss = trained(encoder, task, cfg, ctx)
  kept = fitted.test(ctx.open_batches(cfg.test, cfg.transforms, cfg.batch_size, (*cfg.fields, cfg.label)), ctx)
  count = len(next(iter(kept.values())))
  of_rows = lambda rows: task.figures({name: value[rows] for name, value in kept.items()})
  return {**metrics.with_intervals(of_rows, count, cfg.bootstrap), 'train_loss': loss}


def trained(encoder: features.Encoder, task: Task, cfg, ctx: features.Context) -> tuple['Fit', float]:
  """Trains: (what `test` and `predict` belong to, mean loss over the last tenth of the steps)."""
  if encoder.encode is None:
    raise ConfigError(f'the {encoder.name} encoder gives no tokens to train on')
  check(cfg, encoder.options)
  if task.layers and 'layers' not in encoder.options:
    raise ConfigError('the encode of this method gives no `layers` (see mim_jax/method.py)')
  if task.couples and cfg.accumulate > 1:
    raise ConfigError(f'accumulate={cfg.accumulate}: the head takes statistics over the whole batch; set it to 1')
  meshes.check_batch(ctx.mesh, cfg.train_batch // cfg.accumulate, 'train_batch / accumulate =')
  steps_per_epoch = len(ctx.open_source(cfg.train)) // cfg.train_batch
  if not steps_per_epoch:
    raise UserError(
      f'{cfg.train} has {len(ctx.open_source(cfg.train))} examples, fewer than train_batch {cfg.train_batch}'
    )
  fields = (*cfg.fields, cfg.label)
  given = ctx.open_batches(cfg.train, cfg.train_transforms or cfg.transforms, cfg.train_batch, fields, shuffle=cfg.seed)
  with contextlib.closing(given):
    fit = Fit(encoder, task, cfg, ctx.mesh, steps_per_epoch, next(given))
    return fit, fit.train(given, ctx)


def named(tree: Tree) -> dict[str, jax.Array]:
  """Leaves by path, 'encoder/blocks/mlp/fc1/kernel'."""
  return {rules.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def used(function, tree: Mapping[str, Any], *rest) -> list[str]:
  """Names of those leaves of a flat dict that `function(tree, *rest)` depends on; nothing is computed.

  What goes into a call or a loop whose result is used counts as used.
  """
  jaxpr = jax.make_jaxpr(function)(tree, *rest).jaxpr
  variables = lambda atoms: {atom for atom in atoms if not isinstance(atom, Literal)}
  needed = variables(jaxpr.outvars)
  for equation in reversed(jaxpr.eqns):
    if needed & variables(equation.outvars):
      needed |= variables(equation.invars)
  return [name for name, variable in zip(sorted(tree), jaxpr.invars, strict=False) if variable in needed]


class Fit:
  """One training: its compiled functions, and its train state in `state`."""

  def __init__(self, encoder, task, cfg, mesh, steps_per_epoch, batch):
    self.task, self.cfg, self.mesh = task, cfg, mesh
    self.total = cfg.epochs * steps_per_epoch
    self.first = batch
    self.encoder = encoder
    # Not saved and not trained: everything the encoder has. The parameters that are trained replace theirs in here.
    self.frozen = encoder.variables
    leaves = named(encoder.variables['params'])
    structure = jax.tree.structure(encoder.variables['params'])
    order = list(leaves)

    def forward(params, state, frozen, inputs, drop, train):
      own = named(frozen['params'])
      own = [params.get(name, own[name]) for name in order]
      variables = {**frozen, 'params': jax.tree.unflatten(structure, own)}
      options = {'layers': True} if 'layers' in encoder.options else {}
      options |= {'drop': drop} if drop is not None else {}
      seen = {name: value for name, value in inputs.items() if name in cfg.fields}
      encoded = encoder.encode(variables, seen, **options)
      if cfg.frozen:
        encoded = jax.lax.stop_gradient(encoded)
      return task.predict(params['task'], state, encoded, inputs, train)

    def draw(key, batch):
      keys = jax.random.split(key)
      draws = task.draw(keys[0], batch)
      if cfg.drop_path and not cfg.frozen:
        draws['drop'] = jax.random.split(keys[1], len(batch[cfg.label]))
      return draws

    def loss(params, state, frozen, batch, draws, step):
      del step
      inputs, target = task.prepare(batch, draws)
      drop = (draws['drop'], cfg.drop_path) if 'drop' in draws else None
      prediction, out = forward(params, state, frozen, inputs, drop, train=True)
      return task.loss(prediction, target, draws), {'metrics': {}, 'out': out}

    built = method.Method(
      fields={},
      init=lambda key, batch: {},
      draw=draw,
      loss=loss,
      encode=encoder.encode,
      after_step=lambda state, params, out, step: task.after_step(state, out),
    )
    self._build(built, forward, leaves, steps_per_epoch)

  def _build(self, built, forward, leaves, steps_per_epoch):
    cfg, task, mesh = self.cfg, self.task, self.mesh
    spec = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    batch = spec({name: value for name, value in self.first.items() if name not in features.MARKS})
    inputs = {name: batch[name] for name in cfg.fields}
    options = {'layers': True} if 'layers' in self.encoder.options else {}
    encoded = jax.eval_shape(lambda v, x: self.encoder.encode(v, x, **options), spec(self.frozen), inputs)
    head = jax.eval_shape(lambda: task.init(jax.random.key(0), encoded, batch))
    state = jax.eval_shape(task.state, head)

    def predicted(leaves, head, state, frozen, batch):
      return forward({**leaves, 'task': head}, state, frozen, batch, None, train=False)[0]

    chosen = [] if cfg.frozen else used(predicted, spec(leaves), head, state, spec(self.frozen), batch)
    optimizer = optim.make(
      config.section(
        'optim',
        name=cfg.optimizer,
        base_lr=cfg.base_lr,
        b1=cfg.b1,
        b2=cfg.b2,
        momentum=cfg.momentum,
        nesterov=cfg.nesterov,
        trust=cfg.trust,
        wd=cfg.wd,
        no_wd=cfg.no_wd,
        clip=cfg.clip,
        layer_decay=1.0 if cfg.frozen else cfg.layer_decay,
        lr_mult=cfg.lr_mult,
      ),
      config.section(
        'schedule',
        name=cfg.schedule,
        warmup=cfg.warmup or f'{cfg.warmup_epochs} epochs',
        min_lr=cfg.min_lr,
      ),
      batch_size=cfg.train_batch,
      total_steps=self.total,
      steps_per_epoch=steps_per_epoch,
      params={**{name: leaves[name] for name in chosen}, 'task': head},
    )

    def start(leaves):
      head = task.init(jax.random.key(cfg.seed), encoded, batch)
      params = {**jax.tree.map(jnp.copy, leaves), 'task': head}  # the encoder's own arrays must outlive the donation
      return step.first_state(params, optimizer, task.state(head), bool(cfg.ema))

    taken = {name: leaves[name] for name in chosen}
    abstract = jax.eval_shape(start, taken)
    placed = rules.shardings(mesh, abstract['params'])
    for name, leaf in taken.items():  # as the run has it
      if isinstance(getattr(leaf, 'sharding', None), NamedSharding) and leaf.sharding.mesh == mesh:
        placed[name] = leaf.sharding
    shardings = {name: rules.like_params(mesh, tree, abstract['params'], placed) for name, tree in abstract.items()}
    shardings['params'] = placed
    whole = NamedSharding(mesh, PartitionSpec())
    self.state = jax.jit(start, out_shardings=shardings)(taken)

    train_step = step.step_function(
      built,
      optimizer,
      seed=cfg.seed,
      accumulate=cfg.accumulate,
      ema_momentum=cfg.ema,
      max_bad_steps=MAX_BAD_STEPS,
    )

    def one(state, frozen, batch):
      size = len(batch[cfg.label])
      batch = {name: value for name, value in batch.items() if name != 'weight'}
      return train_step(state, frozen, {'corrupt': jnp.zeros(size, bool), **batch})

    def judge(params, state, frozen, batch):
      keep = features.are_examples(batch)
      batch = {name: value for name, value in batch.items() if name not in features.MARKS}
      prediction, _ = forward(params, state, frozen, batch, None, train=False)
      return task.measure(prediction, batch), keep

    def predict(params, state, frozen, inputs):
      return forward(params, state, frozen, inputs, None, train=False)[0]

    self._predict = jax.jit(predict, out_shardings=whole)
    self._step = jax.jit(one, donate_argnums=0, out_shardings=(shardings, whole))
    self._judge = jax.jit(judge, out_shardings=whole)

  def train(self, batches, ctx) -> float:
    batch, losses = self.first, []
    self.first = None
    tenth = -(-self.total // 10)
    for done in range(1, self.total + 1):
      ctx.check_stop()
      self.state, metrics = self._step(self.state, self.frozen, batch)
      losses.append(metrics['loss'])
      if done % tenth == 0 or done == self.total:
        mean = math.fsum(float(value) for value in losses) / len(losses)
        ctx.say(f'  {self.encoder.name}: step {done} of {self.total}, loss {mean:.4g}')
        if int(self.state['faults']['longest']) >= MAX_BAD_STEPS:
          raise UserError(
            f'loss or gradient was not finite in {MAX_BAD_STEPS} steps in a row, up to step '
            f'{int(self.state["faults"]["last_bad"]) + 1} of {self.total}; lower base_lr ({self.cfg.base_lr})'
          )
        if done < self.total:
          losses = []
      if done < self.total:
        batch = next(batches)
    return mean

  def predict(self, inputs: Mapping[str, jax.Array]) -> np.ndarray:
    """The prediction for a global batch of what the encoder reads, whole on every process. Collective."""
    return np.asarray(self._predict(self._judged, self.state['state'], self.frozen, inputs))

  @property
  def _judged(self):
    return self.state['ema'] if self.cfg.ema else self.state['params']

  def test(self, batches, ctx) -> dict[str, np.ndarray]:
    """What `Task.measure` gives of every test example, in order, the same on every process."""
    params = self._judged
    rows, pending = [], None

    def fetch(out):
      kept, keep = jax.tree.map(np.asarray, out)
      rows.append({name: value[keep] for name, value in kept.items()})

    for batch in batches:
      ctx.check_stop()
      if pending is not None:  # before the next pass starts: two at once may deadlock on CPU over several processes
        fetch(pending)
      pending = self._judge(params, self.state['state'], self.frozen, batch)
    if pending is not None:
      fetch(pending)
    if not sum(len(next(iter(part.values()))) for part in rows):
      raise UserError(f'{self.cfg.test} holds no example; check source and split')
    return {name: np.concatenate([part[name] for part in rows]) for name in rows[0]}
