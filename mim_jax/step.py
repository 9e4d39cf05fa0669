"""One training step as one jitted function, the same for every method: gradients, clip, update, guard, metrics.

`assemble` builds everything that the config and the mesh decide and that needs no data and no device work: training, `mim-jax check` and
`mim-jax plan` all start from it, so what is checked and planned is what runs.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mim_jax import durations, method, optim
from mim_jax.errors import ConfigError
from mim_jax.ops import ema, placement
from mim_jax.parallel import mesh as meshes
from mim_jax.parallel import rules

Tree = Any


# By platform of the mesh. On TPUs XLA may break the gather of a weight and the product with it into a ring of small products; those of
# a transformer layer are too small for that: it doubled the estimated cycles of MAE's step on 16 chips.
COMPILER_OPTIONS = {'tpu': {'xla_jf_spmd_threshold_for_windowed_einsum_mib': '1000000'}}
# Initialisation runs once. With fewer passes over its code it compiles in less than half the time and gives the same bits.
INIT_COMPILER_OPTIONS = {'cpu': {'xla_backend_optimization_level': 1}}


@dataclasses.dataclass(frozen=True)
class Program:
  """What a run computes, before any of it ran.

  Attributes:
    method, optimizer: as built from the config.
    mesh, batch_sharding: where things lie; batches are split over the data and fsdp axes.
    train: abstract train state with shardings: {'step', 'params', 'opt', 'state', 'ema', 'faults': {'bad_steps', 'streak', 'longest', 'last_bad', 'corrupt'}}.
    frozen: abstract frozen tree with shardings.
    batch: abstract global batch with shardings, the pipeline's `corrupt` [B] bool included.
    total_steps, steps_per_epoch: of the run.
    init: jitted, (seed) -> train state in its shardings.
    step: jitted, (train, frozen, batch) -> (train, metrics); the train state is donated.
  """

  method: method.Method
  optimizer: optim.Optimizer
  mesh: Mesh
  batch_sharding: NamedSharding
  train: Tree
  frozen: Tree
  batch: dict[str, jax.ShapeDtypeStruct]
  total_steps: int
  steps_per_epoch: int
  init: Callable[[int], Tree]
  step: Callable[[Tree, Tree, Tree], tuple[Tree, dict]]


def assemble(cfg, mesh: Mesh, examples: int) -> Program:
  """The program of a run over a data set of `examples`; nothing is allocated or compiled. Raises ConfigError."""
  platform = mesh.devices.flat[0].platform
  built = method.build(cfg.method)
  if cfg.accumulate > 1 and built.couples:
    raise ConfigError(
      f'accumulate={cfg.accumulate}: the loss of {cfg.method.name} ties the examples of a batch together; use more devices or a smaller batch_size'
    )
  if cfg.batch_size % cfg.accumulate:
    raise ConfigError(f'batch_size {cfg.batch_size} cannot be computed in accumulate={cfg.accumulate} equal parts')
  meshes.check_batch(mesh, cfg.batch_size // cfg.accumulate, 'batch_size / accumulate =')
  steps_per_epoch = max(1, examples // cfg.batch_size)
  total_steps = durations.steps(cfg.duration, steps_per_epoch=steps_per_epoch, batch_size=cfg.batch_size)
  batch = built.abstract_batch(cfg.batch_size)

  params = jax.eval_shape(lambda: built.init(jax.random.key(0), batch))
  optimizer = optim.make(
    cfg.optim,
    cfg.schedule,
    batch_size=cfg.batch_size,
    total_steps=total_steps,
    steps_per_epoch=steps_per_epoch,
    params=params,
  )

  def init(seed):
    params = built.init(jax.random.key(seed), batch)
    return first_state(params, optimizer, built.state(params), bool(cfg.ema))

  train = jax.eval_shape(init, jnp.uint32(cfg.seed))
  param_shardings = rules.shardings(mesh, train['params'], (*cfg.rules, *rules.DEFAULT_RULES))
  train_shardings = {
    name: rules.like_params(mesh, tree, train['params'], param_shardings) for name, tree in train.items()
  }
  train_shardings['params'] = param_shardings
  frozen = jax.eval_shape(lambda: built.frozen(jax.random.key(0), batch))
  frozen_shardings = rules.shardings(mesh, frozen, (*cfg.rules, *rules.DEFAULT_RULES))
  batch_sharding = meshes.batch_sharding(mesh)
  whole = NamedSharding(mesh, PartitionSpec())

  step = step_function(
    built, optimizer, seed=cfg.seed, accumulate=cfg.accumulate, ema_momentum=cfg.ema, max_bad_steps=cfg.max_bad_steps
  )
  batch = batch | {'corrupt': jax.ShapeDtypeStruct((cfg.batch_size,), jnp.bool_)}
  return Program(
    method=built,
    optimizer=optimizer,
    mesh=mesh,
    batch_sharding=batch_sharding,
    train=place(train, train_shardings),
    frozen=place(frozen, frozen_shardings),
    batch={name: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=batch_sharding) for name, spec in batch.items()},
    total_steps=total_steps,
    steps_per_epoch=steps_per_epoch,
    init=jax.jit(init, out_shardings=train_shardings, compiler_options=INIT_COMPILER_OPTIONS.get(platform)),
    step=jax.jit(
      traced_on(mesh, step, cfg.fused_attention),
      donate_argnums=0,
      out_shardings=(train_shardings, whole),
      compiler_options=COMPILER_OPTIONS.get(platform),
    ),
  )


def traced_on(mesh: Mesh, function, fused_attention: bool):
  """`function` traced with `mesh` known to its operations, see `mim_jax.ops.placement`."""

  def traced(*args):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), placement.fused_attention(fused_attention):
      return function(*args)

  return traced


def first_state(params: Tree, optimizer: optim.Optimizer, state: Tree, ema: bool) -> Tree:
  """The train state of step 0: what `step_function` carries on."""
  return {
    'step': jnp.int32(0),
    'params': params,
    'opt': optimizer.init(params),
    'state': state,
    'ema': jax.tree.map(jnp.copy, params) if ema else {},
    'faults': {name: jnp.int32(0) for name in ('bad_steps', 'streak', 'longest', 'last_bad', 'corrupt')},
  }


def place(abstract: Tree, shardings: Tree) -> Tree:
  """Abstract arrays with their shardings."""
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings
  )


def step_function(
  built: method.Method,
  optimizer: optim.Optimizer,
  *,
  seed: int,
  accumulate: int,
  ema_momentum: float,
  max_bad_steps: int,
):
  """(train, frozen, batch) -> (train, metrics), pure.

  A step whose loss or gradient is not finite changes neither params, optimizer, state nor EMA; it is counted. After `max_bad_steps` of
  them in a row every later step is skipped as well, so the state stays as it was when the run should have stopped, however late the
  host looks.
  """

  def step(train, frozen, batch):
    batch = dict(batch)
    corrupt = batch.pop('corrupt')
    draws = built.draw(jax.random.fold_in(jax.random.key(seed), train['step']), batch)
    (loss, aux), grads = gradients(built, train, frozen, batch, draws, accumulate)
    params, opt, info = optimizer.update(grads, train['opt'], train['params'], train['step'])
    new = {
      'params': params,
      'opt': opt,
      'state': built.after_step(train['state'], params, aux['out'], train['step']),
      'ema': ema.blend(train['ema'], params, ema_momentum) if ema_momentum else {},
    }
    old = train['faults']
    good = jnp.isfinite(loss) & jnp.isfinite(info['norm/grad'])
    halted = old['longest'] >= max_bad_steps
    keep = good & ~halted
    new = {
      name: jax.tree.map(lambda fresh, kept: jnp.where(keep, fresh, kept), tree, train[name])
      for name, tree in new.items()
    }
    streak = jnp.where(good, 0, old['streak'] + 1)
    faults = {
      'bad_steps': old['bad_steps'] + ~good,
      'streak': streak,
      'longest': jnp.maximum(old['longest'], streak),
      'last_bad': jnp.where(good, old['last_bad'], train['step']),
      'corrupt': old['corrupt'] + jnp.sum(corrupt, dtype=jnp.int32),
    }
    faults = jax.tree.map(lambda fresh, kept: jnp.where(halted, kept, fresh), faults, old)
    metrics = {
      'loss': loss,
      **aux['metrics'],
      **info,
      'faults/bad_steps': faults['bad_steps'],
      'faults/corrupt': faults['corrupt'],
    }
    return {'step': train['step'] + 1, **new, 'faults': faults}, metrics

  return step


def gradients(built: method.Method, train: Tree, frozen: Tree, batch: dict, draws: dict, accumulate: int):
  """((loss, aux), gradient) of the whole batch, computed in `accumulate` parts one after another.

  Part j holds rows j, j + k, j + 2k, ... so that every device keeps its own rows. Losses, metrics and gradients are means over the parts;
  `draws['counts']` reach the parts divided by k (see `mim_jax.method`). `out` is put together again in the order of the batch.
  """

  def of(batch, draws):
    if built.grads is not None:
      return built.grads(train['params'], train['state'], frozen, batch, draws, train['step'])
    return jax.value_and_grad(built.loss, has_aux=True)(
      train['params'], train['state'], frozen, batch, draws, train['step']
    )

  if accumulate == 1:
    return of(batch, draws)
  counts = {
    name: jax.tree.map(lambda count: count / accumulate, value) for name, value in draws.items() if name == 'counts'
  }
  per_example = {name: value for name, value in draws.items() if name != 'counts'}
  split = lambda x: x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1)
  join = lambda x: x.swapaxes(0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])

  def part(total, rows):
    batch, draws = rows
    (loss, aux), grads = of(batch, draws | counts)
    mean = jax.tree.map(lambda sum_, x: sum_ + x / accumulate, total, (loss, aux['metrics'], grads))
    return mean, aux['out']

  rows = jax.tree.map(split, (batch, per_example))
  (loss, aux), grads = jax.eval_shape(
    lambda batch, draws: of(batch, draws | counts), *jax.tree.map(lambda x: x[0], rows)
  )
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (loss, aux['metrics'], grads))
  (loss, metrics, grads), out = jax.lax.scan(part, zeros, rows)
  return (loss, {'metrics': metrics, 'out': jax.tree.map(join, out)}), grads
