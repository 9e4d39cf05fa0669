"""Accuracy under adversarial attack, of any classifier: one that the encoder brings, or a linear probe on its features.

An encoder whose `encode` gives 'logits' is attacked as it is, through everything that it does with the image (a defence
included). Of any other the features are read by a linear probe, trained as `linear` trains it, and encoder and probe
are attacked together. Attacks are those of `ops.attacks`, with eps in pixels of [0, 1]; what is random about them
follows from `seed` and the batch. `transfer` names other logits of the encoder: its images are attacked for those
instead, and shown to the classifier. A defence that looks strong only then hides its gradient.

Figures: top1 (clean); ATTACK_E with E the eps in 255ths, such as pgd_2; for a classifier NAME in `transfer` also
NAME/top1 and NAME/ATTACK_E (attacked itself) and transfer/ATTACK_E (its attacks on the classifier); low_pass and
high_pass, accuracy on images without the frequencies beyond or up to `radius`; ATTACK_E/high, the share of that
attack's energy beyond it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mim_jax.errors import ConfigError, UserError, nearest
from mim_jax.evals import features, linear
from mim_jax.ops import attacks, frequency, pixels

PROBE = ('train_batch', 'epochs', 'warmup_epochs', 'base_lr', 'wd', 'momentum', 'trust')  # of `linear`

DEFAULTS = {
  **features.DEFAULTS,
  **{key: linear.DEFAULTS[key] for key in PROBE},
  'attacks': ('fgsm', 'pgd'),  # of ATTACKS
  'eps': (1 / 255, 2 / 255, 4 / 255),  # networks not trained against attacks have about 0 % at 8 / 255
  'count': 1000,  # first test images; 0 for all
  'transfer': '',  # name of other logits of the encoder whose attacks are tried as well; '' for none
  'stats': 'imagenet',  # how the transforms normalise: imagenet, clip, half or none
  'radius': 0.0,  # between low and high frequencies, in cycles per image; 0: an eighth of the height
  'pgd_steps': 10,
  'pgd_rate': 0.25,  # step over eps
  'pgd_restarts': 1,
  'apgd_steps': 100,
  'fab_steps': 100,
  'targets': 9,  # classes that targeted attacks aim at
  'square_queries': 5000,
  'cw_steps': 50,
  'cw_c': 1.0,
  'seed': 0,
}


def _fgsm(f, x, y, eps, key, cfg):
  del key, cfg
  return attacks.fgsm(f, x, y, eps)


def _pgd(f, x, y, eps, key, cfg, objective='ce'):
  starts = eps * jax.random.uniform(key, (cfg.pgd_restarts, *x.shape), minval=-1.0)
  return attacks.pgd_restarts(f, x, y, starts, eps, cfg.pgd_rate * eps, cfg.pgd_steps, objective)


def _cw_linf(f, x, y, eps, key, cfg):
  return _pgd(f, x, y, eps, key, cfg, 'margin')


def _cw_l2(f, x, y, eps, key, cfg):
  """The smallest change in l2, where it is within eps per pixel in root mean square."""
  del key
  inside = jnp.clip(x, 1e-4, 1 - 1e-4)  # the attack's variable is infinite at 0 and 1
  adv = attacks.cw_l2(f, inside, y, c=cfg.cw_c, steps=cfg.cw_steps)
  rms = jnp.sqrt(jnp.mean(jnp.square(adv - x), axis=(1, 2, 3), keepdims=True))
  return jnp.where(rms <= eps, adv, x)


def _apgd(f, x, y, eps, key, cfg, loss='ce'):
  return attacks.apgd(f, x, y, jax.random.uniform(key, x.shape), eps, cfg.apgd_steps, loss)['adversarial']


def _targeted(f, x, y, cfg, attack):
  """First success of attack(target [B], number) towards the most likely other classes."""
  logits = f(x)
  targets = attacks.targets_of(logits, y, min(cfg.targets, logits.shape[1] - 1))
  tries = [functools.partial(attack, target, i) for i, target in enumerate(targets)]
  return attacks.first_success(f, x, y, tries)


def _apgd_targeted(f, x, y, eps, key, cfg):
  def attack(target, i):
    uniforms = jax.random.uniform(jax.random.fold_in(key, i), x.shape)
    return attacks.apgd(f, x, y, uniforms, eps, cfg.apgd_steps, 'dlr_targeted', target)['adversarial']

  return _targeted(f, x, y, cfg, attack)


def _fab(f, x, y, eps, key, cfg):
  del key
  attack = lambda target, i: attacks.fab_targeted(f, x, y, target, eps, cfg.fab_steps)
  return _targeted(f, x, y, cfg, attack)


def _square(f, x, y, eps, key, cfg):
  keys, (batch, _, width, channels) = jax.random.split(key, 3), x.shape
  stripes = jax.random.rademacher(keys[0], (batch, width, channels), jnp.float32)
  places = jax.random.uniform(keys[1], (cfg.square_queries, batch, 2))
  signs = jax.random.rademacher(keys[2], (cfg.square_queries, batch, channels), jnp.float32)
  return attacks.square(f, x, y, stripes, places, signs, eps)


def _first_of(*members):
  """An attack that tries others in turn, each on what is still classified correctly."""

  def attack(f, x, y, eps, key, cfg):
    tries = [lambda m=m, i=i: m(f, x, y, eps, jax.random.fold_in(key, i), cfg) for i, m in enumerate(members)]
    return attacks.first_success(f, x, y, tries)

  return attack


# Name -> attack (logits_of, x, y, eps, key, settings) -> x_adv.
ATTACKS = {
  'fgsm': _fgsm,
  'pgd': _pgd,
  'cw_linf': _cw_linf,
  'cw_l2': _cw_l2,
  'apgd_ce': _apgd,
  'apgd_dlr': functools.partial(_apgd, loss='dlr'),
  'apgd_t': _apgd_targeted,
  'fab_t': _fab,
  'square': _square,
  'aa_lite': _first_of(_apgd, _apgd_targeted),  # AutoAttack without its slow half
  'autoattack': _first_of(_apgd, _apgd_targeted, _fab, _square),  # standard: in this order
}
# Attacks that need this many classes: the differences of logits ratio compare with the third and fourth.
CLASSES = {'apgd_dlr': 3, 'apgd_t': 4, 'aa_lite': 4, 'autoattack': 4}


def check(cfg, options):
  """Raises ConfigError for an unknown attack or normalisation."""
  del options
  for name in cfg.attacks:
    if name not in ATTACKS:
      raise ConfigError(f'attack {name!r} is unknown; {nearest(name, ATTACKS)}')
  if cfg.stats not in pixels.STATS:
    raise ConfigError(f'stats is {cfg.stats!r}; {nearest(cfg.stats, pixels.STATS)}')


def run(encoder: features.Encoder, cfg, ctx: features.Context) -> dict[str, float]:
  """Figures as above, as fractions of the first `count` test images."""
  check(cfg, encoder.options)
  logits_of, variables = _classifiers(encoder, cfg, ctx)
  sharding = NamedSharding(ctx.mesh, PartitionSpec())
  program = jax.jit(functools.partial(_judge, logits_of, cfg), out_shardings=sharding)
  rows, done = [], 0
  batches = ctx.open_batches(cfg.test, cfg.transforms, cfg.batch_size, (*cfg.fields, cfg.label))
  for i, batch in enumerate(batches):
    ctx.check_stop()
    keep, seen = program(variables, batch, jnp.int32(i))
    keep, seen = np.asarray(keep), jax.tree.map(np.asarray, seen)
    if not np.all(seen.pop('in_range')[keep]):
      raise ConfigError(
        f'images of {cfg.transforms!r} are not in [0, 1] when the normalisation {cfg.stats!r} is undone; '
        'set evals.<name>.stats to what the transforms normalise with'
      )
    rows.append({name: value[keep] for name, value in seen.items()})
    done += int(keep.sum())
    if cfg.count and done >= cfg.count:
      break
  if not done:
    raise UserError(f'{cfg.test} holds no example that can be read')
  whole = {name: np.concatenate([row[name] for row in rows])[: cfg.count or None] for name in rows[0]}
  return {name: float(np.mean(value)) for name, value in whole.items()}


def _classifiers(encoder, cfg, ctx):
  """({name: (variables, images as the encoder takes them) -> logits}, variables); '' is the classifier itself."""
  image = next(iter(ctx.open_batches(cfg.test, cfg.transforms, cfg.batch_size, (*cfg.fields, cfg.label))))
  given = {name: value for name, value in image.items() if name not in (cfg.label, *features.MARKS)}
  brings = {} if encoder.encode is None else jax.eval_shape(encoder.encode, encoder.variables, given)
  if 'logits' not in brings:
    if cfg.transfer:
      raise ConfigError(f'transfer={cfg.transfer!r} needs an encoder with logits; the {encoder.name} one has none')
    return _probe(encoder, cfg, ctx)
  names = {'': 'logits', **({cfg.transfer: cfg.transfer} if cfg.transfer else {})}
  for name in names.values():
    if name not in brings:
      raise ConfigError(f'transfer={name!r} is nothing that the encoder gives; {nearest(name, brings)}')
  made = {
    short: lambda variables, batch, name=name: encoder.encode(variables, batch)[name] for short, name in names.items()
  }
  return made, encoder.variables


def _probe(encoder, cfg, ctx):
  """The linear probe on one kind of features, as a classifier."""
  train, labels = features.of_source(encoder, ctx, cfg, cfg.train)
  if len(train) != 1:
    raise ConfigError(f'features={cfg.features!r} names {len(train)} kinds; a classifier to attack needs one')
  (name, x), labels = next(iter(train.items())), features.class_labels(labels, cfg.train)
  classes = max(int(labels.max()) + 1, ctx.open_source(cfg.test).classes(cfg.label))
  state, _ = linear.train(x, labels, classes, cfg, ctx.mesh.local_devices[0], ctx.check_stop)
  state = jax.device_put(jax.tree.map(np.asarray, state), NamedSharding(ctx.mesh, PartitionSpec()))
  logits_of = lambda both, batch: linear.logits(both['probe'], encoder.apply(both['encoder'], batch)[name])
  return {'': logits_of}, {'encoder': encoder.variables, 'probe': state}


def _judge(logits_of, cfg, variables, batch, index):
  """(which rows are examples [B], {figure: [B]}) of a batch."""
  label = batch[cfg.label]
  keep = features.are_examples(batch)
  x = pixels.renormalize(batch['image'].astype(jnp.float32), cfg.stats, 'none')
  in_range = jnp.all((x >= -1e-3) & (x <= 1 + 1e-3), axis=(1, 2, 3))
  x = jnp.where(keep[:, None, None, None], jnp.clip(x, 0, 1), 0)  # padding may hold anything
  rest = {name: value for name, value in batch.items() if name not in ('image', cfg.label, *features.MARKS)}

  def classifier(name):
    return lambda x: logits_of[name](variables, {**rest, 'image': pixels.renormalize(x, 'none', cfg.stats)})

  f, radius = classifier(''), cfg.radius or x.shape[1] / 8
  classes = jax.eval_shape(f, x).shape[1]
  few = [name for name in cfg.attacks if classes < CLASSES.get(name, 2)]
  if few:
    raise ConfigError(f'attacks {few} need {max(CLASSES[name] for name in few)} classes; this classifier has {classes}')
  low = frequency.low_pass(x, radius)
  right = lambda f, x: attacks.correct(f, x, label)
  figures = {'in_range': in_range, 'top1': right(f, x)}
  figures |= {'low_pass': right(f, jnp.clip(low, 0, 1)), 'high_pass': right(f, jnp.clip(x - low + 0.5, 0, 1))}
  other = {name: classifier(name) for name in logits_of if name}
  figures |= {f'{name}/top1': right(g, x) for name, g in other.items()}
  for at, attack in enumerate(cfg.attacks):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(cfg.seed), at), index)
    # One compiled attack for every eps.
    each = lambda g, attack=attack, key=key: jax.lax.map(
      lambda eps: ATTACKS[attack](g, x, label, eps, key, cfg), jnp.asarray(cfg.eps, jnp.float32)
    )
    found = {'': each(f), **{name: each(g) for name, g in other.items()}}
    for i, eps in enumerate(cfg.eps):
      name = f'{attack}_{255 * eps:.3g}'
      figures[name] = right(f, found[''][i])
      figures[f'{name}/high'] = frequency.high_share(found[''][i] - x, radius)
      for g in other:
        figures |= {f'{g}/{name}': right(other[g], found[g][i]), f'transfer/{name}': right(f, found[g][i])}
  return keep, figures
