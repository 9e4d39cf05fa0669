"""Optimizers and learning-rate schedules.

One update is: clip, coupled decay, LARS ratio, momentum, decoupled decay, and at the very end times -lr. The rate
follows from the train step and not from a counter of the optimizer, so a step that the trainer discards is discarded
everywhere.

Parameters of blocks are stacked over depth (`rules.STACKED`), while recipes speak of single layers: "1-D tensors",
"layer i", "the norm of a tensor" are taken per layer here.
"""

import functools
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mim_jax import durations
from mim_jax.errors import ConfigError, nearest
from mim_jax.parallel import rules

# Parameters without weight decay in most recipes: biases and scales of norms. Class and mask tokens are [1, 1, D] and
# not 1-D, so facebookresearch/mae decays them in pretraining; its fine-tuning adds pos_embed and cls_token to the list.
NO_WD = r'bias$|scale$'

# 1-D in the papers' sense, whatever shape it has here (the bias of queries, keys and values is [3, H, d]).
VECTOR = re.compile(r'(^|/)([qkv]_)?(bias|scale)$')

# Layer 0 of layer-wise decay, and the layers 1 to L (facebookresearch/mae, util/lr_decay.py).
EMBEDDING = re.compile(r'(cls_token|pos_embed|patch_embed\d*|blocks\d+)(/|$)')  # with numbers: a stem of several stages
BLOCKS = re.compile(r'blocks/')

Tree = Any
Schedule = Callable[[Any], jax.Array]


class Optimizer(NamedTuple):
  """A whole optimizer.

  Attributes:
    init: params -> opt, a dict of counters and of trees like params.
    update: (grads, opt, params, step) -> (params, opt, info); info has float32 scalars 'lr', 'norm/grad' (global norm
      before clipping), 'norm/update' (of what was added) and 'norm/param' (of the result).
    schedule: step -> lr.
  """

  init: Callable[[Tree], dict]
  update: Callable[[Tree, dict, Tree, Any], tuple[Tree, dict, dict]]
  schedule: Schedule


# Name -> the piece that has a state, made from config.optim and the dtype of its first moment.
CORES = {
  'adamw': lambda cfg, dtype: optax.scale_by_adam(cfg['b1'], cfg['b2'], cfg['eps'], mu_dtype=dtype),
  'adam': lambda cfg, dtype: optax.scale_by_adam(cfg['b1'], cfg['b2'], cfg['eps'], mu_dtype=dtype),
  'lars': lambda cfg, dtype: optax.trace(cfg['momentum'], accumulator_dtype=dtype),
  'sgd': lambda cfg, dtype: optax.trace(cfg['momentum'], cfg.get('nesterov', False), accumulator_dtype=dtype),
  'lion': lambda cfg, dtype: optax.scale_by_lion(cfg['b1'], cfg['b2'], mu_dtype=dtype),
}
DECOUPLED = ('adamw', 'lion')  # weight decay beside the momentum; the others add it to the gradient (L2)

# Share of the way to min_lr that is left, against the share of time that is gone.
SHAPES = {
  'cosine': lambda gone: 0.5 * (1 + jnp.cos(math.pi * gone)),
  'linear': lambda gone: 1 - gone,
  'constant': jnp.ones_like,
}


def make(optim: Mapping, schedule: Mapping, batch_size: int, total_steps: int, steps_per_epoch, params) -> Optimizer:
  """The optimizer of config.optim and config.schedule; reads only those keys that the chosen names use.

  Args:
    optim: section of `config.base`, or any mapping with name, base_lr, lr_batch, wd and what the core takes; `no_wd`
      is `NO_WD` if absent, all other features are off then.
    schedule: likewise, see `make_schedule`.
    batch_size: examples per update, over all devices and accumulated parts.
    total_steps: updates of the whole run.
    steps_per_epoch: may be fractional; None if nothing is said in epochs.
    params: tree of arrays or ShapeDtypeStructs.

  Raises:
    ConfigError: an unknown name, a regex that is none or that matches nothing, layer decay without layers.
  """
  name, wd = optim['name'], optim['wd']
  if name not in CORES:
    raise ConfigError(f'optim.name {name!r} is unknown; {nearest(name, CORES)}')
  core = CORES[name](optim, optim.get('mu_dtype', 'float32'))
  clip = optax.clip_by_global_norm(optim['clip']) if optim.get('clip', 0) else optax.identity()
  mask = decay_mask(params, optim.get('no_wd', NO_WD), optim.get('no_wd_1d', False))
  decay = optax.add_decayed_weights(wd, mask) if wd else optax.identity()
  ratio = scale_by_layer_ratio(optim['trust']) if name == 'lars' else optax.identity()
  before = optax.chain(clip, optax.identity() if name in DECOUPLED else decay, ratio)
  after = decay if name in DECOUPLED else optax.identity()
  multipliers = lr_multipliers(params, optim.get('lr_mult', ()), optim.get('layer_decay', 1))
  peak = peak_lr(optim['base_lr'], optim['lr_batch'], batch_size)
  rate_at = make_schedule(schedule, peak, total_steps, steps_per_epoch, batch_size)
  core_state = type(jax.eval_shape(core.init, params))

  # Only the core has a state. It is a dict, so that a checkpoint does not depend on which other pieces there are.
  def init(params):
    return core.init(params)._asdict()

  def update(grads, opt, params, step):
    direction, _ = before.update(grads, before.init(params), params)
    direction, state = core.update(direction, core_state(**opt), params)
    direction, _ = after.update(direction, after.init(params), params)
    lr = rate_at(step)
    change = jax.tree.map(lambda d, mult, p: (-lr * mult * d).astype(p.dtype), direction, multipliers, params)
    new = jax.tree.map(operator.add, params, change)
    norms = {'norm/grad': grads, 'norm/update': change, 'norm/param': new}
    return new, state._asdict(), {'lr': lr, **{key: optax.tree.norm(tree) for key, tree in norms.items()}}

  return Optimizer(init, update, rate_at)


def peak_lr(base_lr: float, lr_batch: int, batch_size: int) -> float:
  """base_lr per `lr_batch` examples (the linear rule, Goyal et al. 2017), or base_lr itself where lr_batch is 0."""
  return base_lr * batch_size / lr_batch if lr_batch else base_lr


def make_schedule(cfg: Mapping, peak: float, total_steps: int, steps_per_epoch=None, batch_size=None) -> Schedule:
  """step (int or traced int32) -> learning rate, float32.

  Linear from start_lr to the peak over the warm-up, then constant, or linear or half a cosine down to min_lr, which is
  reached at `total_steps`, one past the last update. By default this is facebookresearch/mae, util/lr_sched.py, with
  the fractional epoch step / steps_per_epoch.

  Args:
    cfg: config.schedule; what is absent is 0 or False.
      name: cosine | linear | constant.
      warmup: a duration.
      min_lr: the rate at the end, as it is (not scaled by the batch).
      per_epoch: the rate changes at the starts of epochs only.
      start_lr: the rate of step 0 if there is a warm-up, as it is.
      warmup_to_peak: the last step (epoch) of the warm-up has the peak already, n - 1 intervals for n steps, as in
        pl_bolts' LinearWarmupCosineAnnealingLR and in BEiT.
    peak: highest rate.
    total_steps: updates of the whole run.
    steps_per_epoch: may be fractional; None if nothing is said in epochs.
    batch_size: for a warm-up in examples.

  Raises:
    ConfigError: an unknown name, a warm-up longer than the run, epochs of unknown length.
  """
  name, per_epoch, start, end = cfg['name'], cfg.get('per_epoch', False), cfg.get('start_lr', 0), cfg.get('min_lr', 0)
  if name not in SHAPES:
    raise ConfigError(f'schedule.name {name!r} is unknown; {nearest(name, SHAPES)}')
  if per_epoch and steps_per_epoch is None:
    raise ConfigError('schedule.per_epoch: the length of the data set is not known; set it to False')
  length = cfg.get('warmup', 0)
  warmup = durations.steps(
    length, total=total_steps, steps_per_epoch=steps_per_epoch, batch_size=batch_size, key='schedule.warmup'
  )
  if warmup > total_steps:
    raise ConfigError(f'schedule.warmup {length!r} is {warmup} steps, but the whole run has {total_steps}; shorten it')
  unit = steps_per_epoch if per_epoch else 1
  warm, total = round(warmup / unit), round(total_steps / unit)
  rise = max(1, warm - 1 if cfg.get('warmup_to_peak', False) else warm)
  fall = max(1, total - warm)
  shape = SHAPES[name]

  def schedule(step):
    time = jnp.asarray(step, jnp.float32)
    if per_epoch:
      time = jnp.floor((time + 0.5) / unit)  # without the half, float32 division may fall just short of a new epoch
    up = start + (peak - start) * time / rise
    down = end + (peak - end) * shape(jnp.clip((time - warm) / fall, 0, 1))
    return jnp.where(time < warm, up, down).astype(jnp.float32)

  return schedule


def scale_by_layer_ratio(trust: float) -> optax.GradientTransformation:
  """LARS (You et al. 2017): a tensor's update times trust * |w| / |update|, or times 1 if either norm is 0.

  Tensors that are 1-D in their layer are left alone, as in facebookresearch/mae, util/lars.py.
  """

  def scale(name, update, param):
    if is_vector(name, param.shape):
      return update
    axes = (*range(1 if rules.STACKED.search(name) else 0, param.ndim),)
    weight, length = (jnp.sqrt(jnp.sum(jnp.square(x), axes, keepdims=True)) for x in (param, update))
    counts = (weight > 0) & (length > 0)
    return update * jnp.where(counts, trust * weight / jnp.where(counts, length, 1), 1)

  return optax.stateless(functools.partial(rules.map_named, scale))


def is_vector(name: str, shape) -> bool:
  """Whether a parameter is 1-D, or a scalar, in its layer: by its name, or by its shape without depth."""
  return bool(VECTOR.search(name)) or len(shape) - bool(rules.STACKED.search(name)) <= 1


def decay_mask(params, no_wd: str = NO_WD, no_wd_1d: bool = False):
  """Tree of bool like params: True where weight decay applies.

  Args:
    params: tree of arrays or ShapeDtypeStructs.
    no_wd: regex of paths that are not decayed; '' for none.
    no_wd_1d: nor anything else that is 1-D in its layer, however it is called.
  """
  pattern = rules.compiled(no_wd, 'optim.no_wd') if no_wd else None

  def decayed(name, leaf):
    return not (pattern and pattern.search(name)) and not (no_wd_1d and is_vector(name, leaf.shape))

  return rules.map_named(decayed, params)


def lr_multipliers(params, lr_mult=(), layer_decay: float = 1.0):
  """Tree like params of factors of the learning rate: floats, or arrays [L, 1, ...] for stacked blocks.

  Args:
    params: tree of arrays or ShapeDtypeStructs.
    lr_mult: (regex, factor) pairs, the first that matches counts; a factor of 0 freezes.
    layer_decay: d^(L + 1 - id) with id 0 for the embeddings of the encoder, i + 1 for its block i, L + 1 for everything
      else (BEiT, Bao et al. 2021). The encoder is `params['encoder']`, or the whole tree if there is none.

  Raises:
    ConfigError: a regex of lr_mult matches nothing, or there is no stack of blocks to decay over.
  """
  groups = [(rules.compiled(regex, 'optim.lr_mult'), factor) for regex, factor in lr_mult]
  shapes = {}
  rules.map_named(lambda name, leaf: shapes.setdefault(name, leaf.shape), params)
  for pattern, _ in groups:
    if not any(pattern.search(name) for name in shapes):
      raise ConfigError(f'optim.lr_mult: {pattern.pattern!r} matches no parameter; there are {", ".join(shapes)}')
  prefix = 'encoder/' if any(name.startswith('encoder/') for name in shapes) else ''
  depth = _depth(shapes, prefix) if layer_decay != 1 else 0

  def multiplier(name, leaf):
    factor = next((factor for pattern, factor in groups if pattern.search(name)), 1.0)
    if layer_decay == 1 or not name.startswith(prefix):
      return factor
    if BLOCKS.match(name, len(prefix)):
      powers = layer_decay ** np.arange(depth, 0, -1, dtype=np.float64)
      return (factor * powers).astype(np.float32).reshape(depth, *[1] * (len(leaf.shape) - 1))
    return factor * layer_decay ** (depth + 1) if EMBEDDING.match(name, len(prefix)) else factor

  return rules.map_named(multiplier, params)


def _depth(shapes, prefix) -> int:
  depths = {shape[0] for name, shape in shapes.items() if BLOCKS.match(name, len(prefix))}
  if len(depths) != 1:
    found = sorted(depths) or 'none'
    raise ConfigError(
      f'optim.layer_decay needs one stack of blocks at {prefix}blocks/, found depths {found}; set it to 1'
    )
  return depths.pop()
