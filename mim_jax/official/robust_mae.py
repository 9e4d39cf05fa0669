"""Robust MAE (Huang et al. 2023): no official code; `robust_mae` pins our reading, and torchattacks' attacks.

The network is a fine-tuned MAE with the names of facebookresearch/mae models_vit.py, which in the case have `vit.`
before them.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax import method
from mim_jax.methods import robust_mae
from mim_jax.models import vit
from mim_jax.official import mae, names
from mim_jax.ops import attacks, clustering, losses

# An attack adds up steps along signs of gradients, and rounding turns a sign where its gradient is near 0. So a whole
# attack is compared by the share of pixels that agree, to what is beside it, and its steps one by one (`pgd_grad{i}` at
# `pgd_x{i}`) to the usual tolerance.
WHOLE = [
  'fgsm_adv',
  'pgd_adv',
  'pgd_nostart_adv',
  'pgd_prompt_adv',
  'cw_linf_adv',
  'apgd_ce_best',
  'apgd_dlr_best',
  'train_adv',
]
AGREEMENT = {f'out/{name}': (0.995, 2e-6) for name in WHOLE} | {'out/cw_l2_adv': (0.995, 1e-4)}

# The loss of an iterate of which 99.5 % of the pixels agree.
TOLERANCES = {'out/apgd_ce_loss': 1e-3, 'out/apgd_dlr_loss': 1e-3}

CHANNELS_FIRST = names.Form(lambda w: np.moveaxis(w, -3, -1), lambda w: np.moveaxis(w, -1, -3))


def downstream(cfg) -> list[names.Entry]:
  """Names of the classifier, and of the prompts [K, (2,) C, H, W], for the options of `mim_jax.methods.robust_mae`."""
  table = mae.downstream(vit.sides(cfg.patch, 2), vit.size(cfg.size)['heads'])
  return [*table, names.Entry('prompt', 'prompt', CHANNELS_FIRST)]


def config_of(case, transform: str):
  """Our options for a case's `config`."""
  c = case.config
  return method.options(
    'robust_mae',
    size=f'{c.embed_dim}/{c.depth}/{c.num_heads}',
    patch=c.patch_size,
    image_size=c.img_size,
    channels=case.inputs['x'].shape[1],
    classes=c.num_classes,
    pool='mean' if c.global_pool else 'cls',
    transform=transform,
    radius=float(c.radius),
    cutoff=float(c.dct_cutoff),
    clusters=c.K,
    bank=c.K,
    eps=c.eps,
    attack_steps=c.train_steps,
    attack_rate=c.alpha / c.eps,
    clean=float(c.lam),
  )


def replay(case) -> dict[str, np.ndarray]:
  """Outputs and gradients of a reference case under its own names."""
  out, grads = {}, {}
  for transform in ('fft', 'dct'):
    made, gradient = _replay_prompts(case, transform)
    out |= made
    grads[f'grad/prompt_{transform}'] = gradient
  out |= _replay_attacks(case)
  c, given = case.config, case.inputs
  centroids, assigned = clustering.lloyd(jnp.asarray(given['km_feats']), given['km_init'], c.km_iters)
  out |= {'km_centroids': centroids, 'km_assign': assigned}
  return {**{f'out/{name}': np.asarray(value) for name, value in out.items()}, **grads}


def _network(case, transform: str):
  """(config, params, network) of a case, with the prompts of `transform`."""
  cfg = config_of(case, transform)
  weights = {name.removeprefix('vit.'): value for name, value in case.weights.items()}
  params = names.complete(*names.load({**weights, 'prompt': case.inputs[f'prompt_{transform}']}, downstream(cfg)))
  return cfg, params, robust_mae.defence(cfg)


def _first(images):
  return np.moveaxis(np.asarray(images), -1, -3)


def _replay_prompts(case, transform: str):
  """(outputs, gradient of the prompts) of one transform: prompted images, their logits, and a step of training."""
  cfg, params, net = _network(case, transform)
  given, expected = case.inputs, case.group('out')
  image, edge = names.channels_last(given['x']), names.channels_last(given['x_edge'])
  label, prototypes = jnp.asarray(given['y']), jnp.asarray(given['prototypes'])
  state = {'prototypes': prototypes, 'filled': jnp.int32(cfg.bank), 'bank': prototypes}
  batch, built = {'image': image, 'label': label}, method.build(cfg)

  @jax.jit
  def forward(params):
    logits, features = net.classify(params, image)
    cluster = net.select(params, prototypes, image)
    return {
      'features': features,
      'cluster': cluster,
      'logits_clean': logits,
      f'prompted_{transform}': net.prompted(params, image, cluster),
      f'prompted_{transform}_edge': net.prompted(params, edge, net.select(params, prototypes, edge)),
      f'logits_prompted_{transform}': built.encode(params, batch, state)['logits'],
    }

  out = dict(forward(params))
  for name in (f'prompted_{transform}', f'prompted_{transform}_edge'):
    out[name] = _first(out[name])
  out['hp_mask' if transform == 'fft' else 'dct_mask'] = net.mask

  if transform == 'dct':  # of the other form the reference has the clean term alone
    clean = lambda params: losses.cross_entropy(net.logits(params, prototypes, image), label)
    out['train_loss_clean_dct'], grads = jax.jit(jax.value_and_grad(clean))(params)
    return out, _first(grads['prompt'])
  start = names.channels_last(given['pgd_start']) / cfg.eps
  step = jax.jit(jax.value_and_grad(built.loss, has_aux=True))
  adversarial = names.channels_last(expected['train_adv'])
  (loss, aux), grads = step(params, state, {}, batch, {'start': start, 'adversarial': adversarial}, 0)
  own = step(params, state, {}, batch, {'start': start}, 0)[0][1]['out']['adversarial']
  out |= {
    'train_adv': _first(own),
    'train_loss': loss,
    'train_loss_adv': aux['metrics']['loss/adversarial'],
    'train_loss_clean': aux['metrics']['loss/clean'],
  }
  return out, _first(grads['prompt'])


def _replay_attacks(case):
  """Attacks on the bare network, and on the defended one where the name says so."""
  _, params, net = _network(case, 'fft')
  c, given, expected = case.config, case.inputs, case.group('out')
  image, label = names.channels_last(given['x']), jnp.asarray(given['y'])
  start, uniforms = names.channels_last(given['pgd_start']), names.channels_last(given['apgd_start'])
  iterates = [f'pgd_x{i}' for i in range(c.steps)]

  @jax.jit
  def attack(params, image):
    plain = lambda x: net.classify(params, x)[0]
    defended = lambda x: net.logits(params, jnp.asarray(given['prototypes']), x)
    out = {
      'fgsm_adv': attacks.fgsm(plain, image, label, c.eps),
      'pgd_adv': attacks.pgd(plain, image, label, start, c.eps, c.alpha, c.steps),
      'pgd_nostart_adv': attacks.pgd(plain, image, label, 0 * start, c.eps, c.alpha, c.steps),
      'pgd_prompt_adv': attacks.pgd(defended, image, label, start, c.eps, c.alpha, c.steps),
      'cw_linf_adv': attacks.pgd(plain, image, label, start, c.eps, c.alpha, c.steps, 'margin'),
      'cw_l2_adv': attacks.cw_l2(plain, image, label, **c.cw_l2),
    }
    rest = {'dlr_loss': attacks.dlr(plain(image), label)}
    for loss in ('ce', 'dlr'):
      found = attacks.apgd(plain, image, label, uniforms, c.apgd_eps, c.apgd_steps, loss)
      out[f'apgd_{loss}_best'] = found['best']
      rest |= {f'apgd_{loss}_loss': found['loss'], f'apgd_{loss}_still_correct': found['correct']}
    # Where a pixel of an iterate differs, so does all that follows: steps are replayed from the reference's iterates.
    for name in iterates:
      x = names.channels_last(expected[name])
      out[name.replace('x', 'grad')] = attacks.objective_gradient(plain, x, label)
    rest['logits_pgd_prompt'] = defended(names.channels_last(expected['pgd_prompt_adv']))
    return {name: jnp.moveaxis(x, -1, -3) for name, x in out.items()}, rest

  out, rest = attack(params, image)
  x = jnp.clip(image + start, 0, 1)
  for name in iterates:
    rest[name] = jnp.moveaxis(x, -1, -3)
    before, grad = (names.channels_last(expected[key]) for key in (name, name.replace('x', 'grad')))
    x = attacks.project(before + c.alpha * jnp.sign(grad), image, c.eps)
  return {**out, **rest}
