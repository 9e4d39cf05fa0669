"""Adversarial attacks on a classifier x [B, H, W, C] in [0, 1] -> logits [B, classes], each image on its own.

An attack is `attack(logits_of, x, y, ..., eps)` -> x_adv. All but `cw_l2` stay within eps of x in every pixel.
Randomness comes in as arguments (`start`, `uniforms`, ...), so attacks are pure; loops have static lengths and images
drop out by `where`, so they are jitted, and batches may be spread over devices. Whatever normalisation a network needs
happens inside `logits_of`: eps is in pixels.

Sources: FGSM Goodfellow et al. 2015 (arXiv 1412.6572); PGD Madry et al. 2018 (1706.06083); CW Carlini and Wagner 2017
(1608.04644); APGD, DLR and AutoAttack Croce and Hein 2020 (2003.01690); FAB Croce and Hein 2020 (1907.02044); Square
Andriushchenko et al. 2020 (1912.00049). FGSM, PGD, CW and APGD follow torchattacks 3.5.1 step by step, its
peculiarities included where said.
"""

import jax
import jax.numpy as jnp
import numpy as np


def clip(x, low=0.0, high=1.0):
  """x within [low, high]; the gradient is 1 at the ends as well, where `jnp.clip` halves it."""
  return jnp.where(x < low, low, jnp.where(x > high, high, x))


def project(x, origin, eps):
  """x brought within eps of `origin` in every pixel, and into [0, 1]."""
  return jnp.clip(origin + jnp.clip(x - origin, -eps, eps), 0, 1)


def _column(values, x):
  """values [B] -> [B, 1, ...] of the rank of x."""
  return values.reshape(-1, *[1] * (x.ndim - 1))


def _pick(logits, ids):
  return jnp.take_along_axis(logits, ids[:, None], axis=1)[:, 0]


def margin(logits, y):
  """z_y - max_{j != y} z_j, [B]: negative for a misclassified image."""
  others = jnp.where(jax.nn.one_hot(y, logits.shape[1], dtype=bool), -jnp.inf, logits)
  return _pick(logits, y) - jnp.max(others, axis=1)


def cross_entropy(logits, y):
  """-log softmax(z)_y, [B]."""
  return -_pick(jax.nn.log_softmax(logits), y)


def dlr(logits, y):
  """Difference of logits ratio, [B]: -(z_y - max_{j != y} z_j) / (z_(1) - z_(3)), sorted descending."""
  ranked = -jnp.sort(-logits, axis=1)
  return -margin(logits, y) / (ranked[:, 0] - ranked[:, 2] + 1e-12)


def dlr_targeted(logits, y, target):
  """The same towards the classes `target` [B]: -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2)."""
  ranked = -jnp.sort(-logits, axis=1)
  return -(_pick(logits, y) - _pick(logits, target)) / (ranked[:, 0] - (ranked[:, 2] + ranked[:, 3]) / 2 + 1e-12)


# What an attack climbs, by name: (logits, y) -> [B].
OBJECTIVES = {'ce': cross_entropy, 'margin': lambda logits, y: -margin(logits, y), 'dlr': dlr}


def correct(logits_of, x, y):
  """Whether each image is classified as y, [B] bool."""
  return jnp.argmax(logits_of(x), axis=1) == y


def objective_gradient(logits_of, x, y, objective='ce', mean=True):
  """Gradient for x of the mean (or sum) of an objective over the images."""
  reduce = jnp.mean if mean else jnp.sum
  return jax.grad(lambda x: reduce(OBJECTIVES[objective](logits_of(x), y)))(x)


def fgsm(logits_of, x, y, eps):
  """One step of eps along the sign of the gradient."""
  return jnp.clip(x + eps * jnp.sign(objective_gradient(logits_of, x, y)), 0, 1)


def pgd(logits_of, x, y, start, eps, alpha, steps, objective='ce'):
  """Steps of size alpha along the sign of the gradient, each projected, from x + start, `start` in [-eps, eps] or 0."""

  def step(adv, _):
    grad = objective_gradient(logits_of, adv, y, objective)
    return project(adv + alpha * jnp.sign(grad), x, eps), None

  return jax.lax.scan(step, jnp.clip(x + start, 0, 1), None, steps)[0]


def pgd_restarts(logits_of, x, y, starts, eps, alpha, steps, objective='ce'):
  """PGD from each of `starts` [R, B, ...]; an image takes its first success, or else the last try."""

  def attempt(adv, start):
    tried = pgd(logits_of, x, y, start, eps, alpha, steps, objective)
    return jnp.where(_column(correct(logits_of, adv, y), x), tried, adv), None

  return jax.lax.scan(attempt, x, starts)[0]


def cw_l2(logits_of, x, y, c=1.0, kappa=0.0, lr=0.01, steps=50):
  """Smallest change in l2 that is misclassified, by Adam on w, x = (tanh(w) + 1) / 2; x itself where none is found.

  x must lie inside (0, 1). Two peculiarities are torchattacks': logits of other classes and of the own one compare
  against 0 (`other`, `own`), and the whole batch stops when its cost has risen, looked at ten times.
  """
  one_hot = jax.nn.one_hot(y, jax.eval_shape(logits_of, x).shape[1])
  axes = tuple(range(1, x.ndim))
  looks = max(steps // 10, 1)

  def cost_of(w):
    adv = (jnp.tanh(w) + 1) / 2
    distance = jnp.sum(jnp.square(adv - x), axis=axes)
    logits = logits_of(adv)
    other, own = jnp.max((1 - one_hot) * logits, axis=1), jnp.max(one_hot * logits, axis=1)
    excess = jnp.where(own - other >= -kappa, own - other, -kappa)
    return jnp.sum(distance) + c * jnp.sum(excess), (adv, distance, logits)

  def step(carry, i):
    w, m, v, best, best_distance, last, done = carry
    (cost, (adv, distance, logits)), grad = jax.value_and_grad(cost_of, has_aux=True)(w)
    m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * jnp.square(grad)
    w = w - lr * (m / (1 - 0.9 ** (i + 1))) / (jnp.sqrt(v / (1 - 0.999 ** (i + 1))) + 1e-8)
    better = (jnp.argmax(logits, axis=1) != y) & (distance < best_distance) & ~done
    best = jnp.where(_column(better, x), adv, best)
    best_distance = jnp.where(better, distance, best_distance)
    look = i % looks == 0
    done |= look & (cost > last)
    return (w, m, v, best, best_distance, jnp.where(look, cost, last), done), None

  w = jnp.arctanh(jnp.clip(2 * x - 1, -1, 1))
  zeros = jnp.zeros_like(x)
  carry = (w, zeros, zeros, x, jnp.full(len(x), 1e10), jnp.float32(1e10), jnp.bool_(False))
  return jax.lax.scan(step, carry, jnp.arange(steps))[0][3]


def apgd_checks(steps: int) -> np.ndarray:
  """Length of the window that ends after each iteration, [steps] int32; 0 where none does."""
  window, shrink, least = max(int(0.22 * steps), 1), max(int(0.03 * steps), 1), max(int(0.06 * steps), 1)
  checks, since = np.zeros(steps, np.int32), 0
  for i in range(steps):
    since += 1
    if since == window:
      checks[i], since, window = window, 0, max(window - shrink, least)
  return checks


def apgd(logits_of, x, y, uniforms, eps, steps=100, loss='ce', target=None):
  """Auto-PGD: momentum, and a step size per image that halves where the loss stalls.

  Args:
    uniforms: [B, ...] in [0, 1), of which the start is made.
    loss: 'ce', 'dlr', or 'dlr_targeted' towards the classes `target` [B].

  Returns:
    {'best' [B, ...]: iterate of highest loss, 'loss' [B]: that loss, 'correct' [B]: every iterate was classified as y,
    'adversarial' [B, ...]: the last misclassified iterate, or the start}.
  """
  checks, batch = apgd_checks(steps), len(x)

  def losses_of(adv):
    logits = logits_of(adv)
    each = dlr_targeted(logits, y, target) if loss == 'dlr_targeted' else OBJECTIVES[loss](logits, y)
    return jnp.sum(each), (each, jnp.argmax(logits, axis=1) == y)

  def look(adv):
    (_, (each, right)), grad = jax.value_and_grad(losses_of, has_aux=True)(adv)
    return each, right, grad

  within = lambda adv: jnp.clip(jnp.clip(adv, x - eps, x + eps), 0, 1)
  t = 2 * uniforms - 1
  start = jnp.clip(x + eps * t / jnp.max(jnp.abs(t), axis=tuple(range(1, x.ndim)), keepdims=True), 0, 1)
  each, right, grad = look(start)
  carry = {
    'adv': start,
    'old': start,
    'grad': grad,
    'best': start,
    'best_grad': grad,
    'best_loss': each,
    'adversarial': start,
    'correct': right,
    'size': jnp.full(batch, 2.0 * eps),
    'history': jnp.zeros((steps, batch)),
    'checked_loss': each,
    'halved': jnp.ones(batch, bool),  # so that the first check does not ask for a better best
  }

  def step(s, at):
    i, window = at
    momentum = jnp.where(i == 0, 1.0, 0.75)
    moved = within(s['adv'] + _column(s['size'], x) * jnp.sign(s['grad']))
    adv = within(s['adv'] + (moved - s['adv']) * momentum + (s['adv'] - s['old']) * (1 - momentum))
    each, right, grad = look(adv)
    history = s['history'].at[i].set(each)
    better = each > s['best_loss']
    best, best_grad = (
      jnp.where(_column(better, x), new, s[name]) for name, new in (('best', adv), ('best_grad', grad))
    )
    best_loss = jnp.where(better, each, s['best_loss'])
    # Rises of the loss within the window. Before iteration 0 stands the last row, not yet written: 0, as in
    # torchattacks.
    rises = history > jnp.roll(history, 1, axis=0)
    inside = (jnp.arange(steps) > i - window) & (jnp.arange(steps) <= i)
    stalls = jnp.sum(rises & inside[:, None], axis=0) <= 0.75 * window
    halve = (stalls | (~s['halved'] & (s['checked_loss'] >= best_loss))) & (window > 0)
    new = {
      'adv': jnp.where(_column(halve, x), best, adv),
      'old': s['adv'],
      'grad': jnp.where(_column(halve, x), best_grad, grad),
      'best': best,
      'best_grad': best_grad,
      'best_loss': best_loss,
      'adversarial': jnp.where(_column(right, x), s['adversarial'], adv),
      'correct': s['correct'] & right,
      'size': jnp.where(halve, s['size'] / 2, s['size']),
      'history': history,
      'checked_loss': jnp.where(window > 0, best_loss, s['checked_loss']),
      'halved': jnp.where(window > 0, halve, s['halved']),
    }
    return new, None

  s, _ = jax.lax.scan(step, carry, (jnp.arange(steps), jnp.asarray(checks)))
  return {'best': s['best'], 'loss': s['best_loss'], 'correct': s['correct'], 'adversarial': s['adversarial']}


def targets_of(logits, y, count):
  """The `count` most likely classes but y for each image, [count, B]."""
  others = jnp.where(jax.nn.one_hot(y, logits.shape[1], dtype=bool), -jnp.inf, logits)
  return jax.lax.top_k(others, count)[1].T


def project_to_plane(x, w, c):
  """Smallest step d in l-infinity with w . d = -c that keeps x + d in [0, 1]; x, w [B, n], c [B] -> d [B, n].

  Coordinate i can give |w_i| times its room, at a level that is the same for all that have not run out. The level is
  found among the sorted rooms. Where all rooms together fall short, each is used up.
  """
  sign = jnp.where(c >= 0, 1.0, -1.0)[:, None]
  w, need = w * sign, jnp.abs(c)
  room = jnp.where(w > 0, x, 1 - x)  # against the sign of w
  weight = jnp.abs(w)
  order = jnp.argsort(room, axis=1)
  room_sorted, weight_sorted = (jnp.take_along_axis(v, order, axis=1) for v in (room, weight))
  spent = jnp.cumsum(weight_sorted * room_sorted, axis=1)  # by the coordinates that ran out
  open_weight = jnp.sum(weight_sorted, axis=1, keepdims=True) - jnp.cumsum(weight_sorted, axis=1)
  reached = spent + room_sorted * open_weight  # given in all when the level is the k-th room; rises with k
  k = jnp.sum(reached < need[:, None], axis=1, keepdims=True)
  last = x.shape[1] - 1
  at = jnp.minimum(k, last)
  before = jnp.where(k > 0, jnp.take_along_axis(spent, jnp.maximum(at - 1, 0), axis=1), 0.0)
  here = jnp.take_along_axis(open_weight + weight_sorted, at, axis=1)
  level = jnp.where(k > last, jnp.inf, (need[:, None] - before) / jnp.maximum(here, 1e-20))
  return -jnp.sign(w) * jnp.minimum(room, jnp.maximum(level, 0))


def fab_targeted(logits_of, x, y, target, eps, steps=100, alpha_max=0.1, eta=1.05, beta=0.9):
  """FAB towards the classes `target` [B]: the nearest misclassified image found, or x where none lies within eps.

  Each step goes to the boundary between y and the target as it looks from here, biased towards the boundary as seen
  from x, and a success is pulled back to x.
  """
  flat = lambda v: v.reshape(len(x), -1)
  biggest = lambda v: jnp.max(jnp.abs(v), axis=1)
  origin = flat(x)

  def difference(adv):
    logits = logits_of(adv)
    each = _pick(logits, target) - _pick(logits, y)
    return jnp.sum(each), each

  def step(carry, _):
    adv, best, distance = carry
    (_, f), grad = jax.value_and_grad(difference, has_aux=True)(adv)
    here, w = flat(adv), flat(grad)
    d1 = project_to_plane(here, w, f)
    d2 = project_to_plane(origin, w, f + jnp.sum(w * (origin - here), axis=1))
    a1, a2 = jnp.maximum(biggest(d1), 1e-8), jnp.maximum(biggest(d2), 1e-8)
    alpha = jnp.minimum(a1 / (a1 + a2), alpha_max)[:, None]
    moved = jnp.clip((here + eta * d1) * (1 - alpha) + (origin + eta * d2) * alpha, 0, 1)
    fooled = ~correct(logits_of, moved.reshape(x.shape), y)
    away = biggest(moved - origin)
    closer = fooled & (away < distance)
    best = jnp.where(closer[:, None], moved, best)
    distance = jnp.where(closer, away, distance)
    moved = jnp.where(fooled[:, None], origin + (moved - origin) * beta, moved)
    return (moved.reshape(x.shape), best, distance), None

  (_, best, distance), _ = jax.lax.scan(step, (x, origin, jnp.full(len(x), jnp.inf)), None, steps)
  return jnp.where(_column(distance <= eps, x), best.reshape(x.shape), x)


def square_sides(queries: int, height: int, width: int, share=0.8) -> np.ndarray:
  """Side of the window of every query of `square`, [queries] int32; its share of the image halves again and again."""
  at = (np.arange(queries) / queries * 10000).astype(int)
  halvings = np.sum(at[:, None] > np.array([10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000]), axis=1)
  sides = np.maximum(np.round(np.sqrt(share / 2.0**halvings * height * width)), 1)
  return np.minimum(sides, min(height, width)).astype(np.int32)


def square(logits_of, x, y, stripes, places, signs, eps):
  """Square attack without gradients: random windows of +-2 eps, kept where the margin falls.

  Args:
    stripes: [B, W, C] of -1 and 1, the start.
    places: [queries, B, 2] uniforms in [0, 1) for the corner of the window.
    signs: [queries, B, C] of -1 and 1.
  """
  height, width = x.shape[1:3]
  sides = square_sides(len(places), height, width)

  def step(carry, query):
    best, least = carry
    side, place, sign = query
    top, left = jnp.floor(place[:, 0] * (height - side + 1)), jnp.floor(place[:, 1] * (width - side + 1))
    rows = (jnp.arange(height) >= top[:, None]) & (jnp.arange(height) < top[:, None] + side)
    columns = (jnp.arange(width) >= left[:, None]) & (jnp.arange(width) < left[:, None] + side)
    window = (rows[:, :, None] & columns[:, None, :])[..., None]
    tried = project(best + 2 * eps * window * sign[:, None, None, :], x, eps)
    value = margin(logits_of(tried), y)
    take = ((value < least) | (value <= 0)) & (least > 0)
    return (jnp.where(_column(take, x), tried, best), jnp.where(take, value, least)), None

  start = jnp.clip(x + eps * stripes[:, None], 0, 1)
  carry = (start, margin(logits_of(start), y))
  return jax.lax.scan(step, carry, (jnp.asarray(sides), places, signs))[0][0]


def first_success(logits_of, x, y, tries):
  """The first of `tries` (functions () -> x_adv) that is misclassified, per image; x where none is."""
  adv = x
  for attempt in tries:
    adv = jnp.where(_column(correct(logits_of, adv, y), x), attempt(), adv)
  return jnp.where(_column(correct(logits_of, adv, y), x), x, adv)
