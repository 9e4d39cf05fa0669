"""Linear probe of the MAE paper: BatchNorm without scale and shift, one linear layer, LARS.

He et al. 2022, arXiv 2111.06377, appendix A.1; facebookresearch/mae, main_linprobe.py. Two protocols:
- `augment=False` (default): each image passes the encoder once, unaugmented, and the probe trains on the stored
  features. Cheap enough to run during training. Figures are comparable between checkpoints and encoders, not with
  published ones.
- `augment=True`: the paper's. Every epoch sends newly augmented training images through the encoder, so it costs
  `epochs` passes over the training set. For the published recipe also set train_batch=16384 and trust=0.001 (the
  defaults have its 90 epochs, 10 of them warmup, and base_lr), features='cls', and random crops of area (0.08, 1) and
  flips as train_transforms.

The official code normalises by the statistics of each device's part of the batch; here they are those of the whole.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax import config, optim
from mim_jax.errors import ConfigError, UserError
from mim_jax.evals import features, metrics
from mim_jax.ops import losses

DEFAULTS = {
  **features.DEFAULTS,
  'augment': False,
  'train_transforms': '',  # random ones for augment=True
  'train_batch': 256,  # examples per step of the probe; 16384 in the paper
  'epochs': 90,
  'warmup_epochs': 10,
  'base_lr': 0.1,  # per 256 examples
  'wd': 0.0,
  'momentum': 0.9,
  'trust': 0.01,  # 0.001 in the paper, which leaves sets much smaller than ImageNet untrained after 90 epochs
  'seed': 0,
  'bootstrap': 0,  # resamples of the test set for 95 % intervals of its figures; 0 for none
}

NORM_EPS = 1e-6
NORM_MOMENTUM = 0.1  # weight of the newest batch in the running statistics
HEAD_STD = 0.01


def _optimizer(head, lr, wd, momentum, trust):
  cfg = config.section('optim', name='lars', lr_batch=0, wd=wd, momentum=momentum, trust=trust).to_dict()
  constant = config.section('schedule', name='constant', warmup='0 steps')
  return optim.make({**cfg, 'base_lr': lr}, constant, batch_size=1, total_steps=1, steps_per_epoch=None, params=head)


def start(head):
  """State of a probe from head {'kernel' [D, C], 'bias' [C]}: running mean 0 and variance 1, momentum 0."""
  head = jax.tree.map(jnp.asarray, head)
  width = head['kernel'].shape[0]
  opt = _optimizer(head, lr=0.0, wd=0.0, momentum=0.0, trust=0.0).init(head)
  return {'head': head, 'norm': {'mean': jnp.zeros(width), 'var': jnp.ones(width)}, 'opt': opt}


def init(key, width: int, classes: int):
  """A fresh probe: kernel N(0, 0.01), bias 0. (The official truncation at +-2 is 200 standard deviations away.)"""
  return start({'kernel': HEAD_STD * jax.random.normal(key, (width, classes)), 'bias': jnp.zeros(classes)})


def _apply(head, x, mean, var):
  x = (x - mean) / jnp.sqrt(var + NORM_EPS)
  return jnp.matmul(x, head['kernel'], precision=jax.lax.Precision.HIGHEST) + head['bias']


def logits(state, x):
  """Logits [B, C] of features x [B, D] with the running statistics."""
  return _apply(state['head'], x, **state['norm'])


def running(norm, x):
  """Running statistics {'mean', 'var'} [D] after one more batch x [B, D]; its variance enters without bias."""
  seen = {'mean': jnp.mean(x, axis=0), 'var': jnp.var(x, axis=0, ddof=1)}
  return jax.tree.map(lambda old, new: (1 - NORM_MOMENTUM) * old + NORM_MOMENTUM * new, norm, seen)


def probe_step(state, x, labels, lr, wd=0.0, momentum=0.9, trust=0.001):
  """One training step on features x [B, D], labels [B] int -> (state, {'loss', 'logits' [B, C] before the update}).

  The batch is normalised by its own mean and biased variance; the running variance takes the unbiased one.
  """
  mean, var = jnp.mean(x, axis=0), jnp.var(x, axis=0)

  def loss_of(head):
    out = _apply(head, x, mean, var)
    return losses.cross_entropy(out, labels), out

  (loss, out), grads = jax.value_and_grad(loss_of, has_aux=True)(state['head'])
  norm = running(state['norm'], x)
  head, opt, _ = _optimizer(state['head'], lr, wd, momentum, trust).update(grads, state['opt'], state['head'], 0)
  return {'head': head, 'norm': norm, 'opt': opt}, {'loss': loss, 'logits': out}


def rates(cfg, batch_size: int, steps_per_epoch: int) -> np.ndarray:
  """Learning rate of every step [epochs, steps_per_epoch]: linear from 0 over the warmup, then half a cosine to 0."""
  total = cfg.epochs * steps_per_epoch
  peak = cfg.base_lr * batch_size / 256
  cosine = config.section('schedule', name='cosine', warmup=f'{cfg.warmup_epochs} epochs')
  schedule = optim.make_schedule(cosine, peak, total, steps_per_epoch)
  return np.asarray(schedule(np.arange(total))).reshape(cfg.epochs, steps_per_epoch)


@functools.partial(jax.jit, static_argnames=('wd', 'momentum', 'trust'))
def _epoch(state, x, labels, order, rate, wd, momentum, trust):
  """All steps of an epoch in one program: order [S, B] rows of x [n, D], rate [S] -> (state, mean loss)."""

  def step(state, now):
    rows, lr = now
    state, info = probe_step(state, x[rows], labels[rows], lr, wd, momentum, trust)
    return state, info['loss']

  state, loss = jax.lax.scan(step, state, (order, rate))
  return state, jnp.mean(loss)


_step = jax.jit(probe_step, static_argnames=('wd', 'momentum', 'trust'))
_logits = jax.jit(logits)


def train(x, labels, classes: int, cfg, device, check_stop=lambda: None):
  """Trains a probe on stored features x [n, D], labels [n]; returns (state, mean loss of the last epoch).

  Every epoch has a new order, and drops its incomplete last batch.
  """
  batch = min(cfg.train_batch, len(x))
  if batch < 2:
    raise UserError(f'the linear probe needs two training examples or more; {cfg.train} holds {len(x)}')
  count = len(x) // batch
  with jax.default_device(device):
    state = init(jax.random.key(cfg.seed), x.shape[1], classes)
    x, labels = jax.device_put((x, labels), device)
    for epoch, rate in enumerate(rates(cfg, batch, count)):
      check_stop()
      rng = np.random.Generator(np.random.Philox(key=[cfg.seed, epoch]))
      order = rng.permutation(len(x))[: count * batch].reshape(count, batch).astype(np.int32)
      state, loss = _epoch(state, x, labels, order, rate, wd=cfg.wd, momentum=cfg.momentum, trust=cfg.trust)
  return state, float(loss)


def train_augmented(encoder: features.Encoder, cfg, ctx: features.Context):
  """Trains on images augmented anew every epoch, one probe per kind of features.

  Returns:
    {kind: state}, {kind: loss of the last step}.
  """
  source = ctx.open_source(cfg.train)
  parts = min(cfg.train_batch, len(source)) // cfg.batch_size  # passes of the encoder per step of the probe
  if not cfg.train_transforms or not parts:
    raise ConfigError(
      f'augment=True needs train_transforms (found {cfg.train_transforms!r}) and a batch_size (found {cfg.batch_size}) '
      f'of at most train_batch {cfg.train_batch} and {len(source)} training examples'
    )
  classes, batch = source.classes(cfg.label), parts * cfg.batch_size
  fields = (*cfg.fields, cfg.label)
  batches = iter(ctx.open_batches(cfg.train, cfg.train_transforms, cfg.batch_size, fields, shuffle=cfg.seed))
  names, states, loss, whole = (), {}, {}, None
  for rate in rates(cfg, batch, len(source) // batch).reshape(-1):
    seen = []
    for _ in range(parts):
      ctx.check_stop()
      images = next(batches)
      names = names or features.resolve(encoder, cfg.features, images, cfg.label)
      jax.block_until_ready(whole)  # on CPU, two passes at once that talk to other processes may deadlock
      whole = features.of_batch(encoder, images, ctx.mesh, names, cfg.label)
      seen.append(jax.tree.map(lambda value: value.addressable_data(0), whole))  # from the mesh to the probe's device
    labels = jnp.concatenate([target for _, target, _ in seen])
    for name in names:
      x = jnp.concatenate([part[name] for part, _, _ in seen])
      state = states.get(name) or init(jax.random.key(cfg.seed), x.shape[1], classes)
      states[name], info = _step(state, x, labels, rate, wd=cfg.wd, momentum=cfg.momentum, trust=cfg.trust)
      loss[name] = info['loss']
  return states, {name: float(value) for name, value in loss.items()}


def run(encoder: features.Encoder, cfg, ctx: features.Context) -> dict[str, float]:
  """top1, top5, class_mean (fractions) and train_loss, see `features.best_of` for several kinds of features."""
  if cfg.epochs <= cfg.warmup_epochs:
    raise ConfigError(
      f'the linear probe has epochs={cfg.epochs}, warmup_epochs={cfg.warmup_epochs}; epochs must be more'
    )
  device = ctx.mesh.local_devices[0]  # the probe is small: every process trains the same one, on one device
  if cfg.augment:
    test, test_labels = features.of_source(encoder, ctx, cfg, cfg.test)
    test_labels = features.class_labels(test_labels, cfg.test)
    with jax.default_device(device):
      states, loss = train_augmented(encoder, cfg, ctx)
  else:
    stored, labels, test, test_labels, classes = features.train_and_test(encoder, ctx, cfg)
    states, loss = {}, {}
    for name, x in stored.items():
      states[name], loss[name] = train(x, labels, classes, cfg, device, ctx.check_stop)

  def figures(name):
    scores = np.asarray(_logits(states[name], jax.device_put(test[name], device)))
    of_rows = lambda rows: metrics.classification(scores[rows], test_labels[rows])
    return {**metrics.with_intervals(of_rows, len(scores), cfg.bootstrap), 'train_loss': loss[name]}

  return features.best_of({name: figures(name) for name in states}, say=ctx.say)
