"""UMD's official code (philippe-eecs/small-vision): names, and replays of `umd` and of `umd_labels`.

No weights are published. A checkpoint of that code is a tree `params` whose paths are the names below, in Flax layout;
blocks that were scanned are one array each with depth in front, blocks that were not are numbered.
"""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax import method
from mim_jax.errors import CheckpointError
from mim_jax.methods import umd
from mim_jax.models import vit
from mim_jax.official import names
from mim_jax.ops import diffusion, patches

SCANNED, NUMBERED = 'ScanCheckpointEncoder1DBlock_0', 'Encoder1DBlock_{i}'


def dense(theirs: str, ours: str, kernel: names.Form = names.SAME) -> list[names.Entry]:
  return [names.Entry(f'{theirs}/kernel', f'{ours}/kernel', kernel), names.Entry(f'{theirs}/bias', f'{ours}/bias')]


def norm(theirs: str, ours: str) -> list[names.Entry]:
  return [names.Entry(f'{theirs}/{part}', f'{ours}/{part}') for part in ('scale', 'bias')]


def stack(theirs: str, ours: str, form: str) -> list[names.Entry]:
  """Blocks and norm of an `Encoder`; `form` is SCANNED or NUMBERED."""
  block, attn = f'{theirs}/{form}', 'MultiHeadDotProductAttention_0'
  return [
    *dense(f'{block}/Dense_0', f'{ours}/blocks/modulation'),
    *[entry for i in (0, 1) for entry in norm(f'{block}/LayerNorm_{i}', f'{ours}/blocks/norm{i + 1}')],
    *[entry for i in (0, 1) for entry in dense(f'{block}/MlpBlock_0/Dense_{i}', f'{ours}/blocks/mlp/fc{i + 1}')],
    *[entry for p in ('query', 'key', 'value') for entry in dense(f'{block}/{attn}/{p}', f'{ours}/blocks/attn/{p}')],
    *dense(f'{block}/{attn}/out', f'{ours}/blocks/attn/proj'),
    *norm(f'{theirs}/encoder_norm', f'{ours}/norm'),
  ]


def pretraining(cfg, form: str = SCANNED) -> list[names.Entry]:
  """Names of `_ViTAE` for the options of `mim_jax.methods.umd`."""
  patch = vit.sides(cfg.patch, 2)
  embed = names.Form(lambda w: w.reshape(-1, w.shape[-1]), lambda w: w.reshape(*patch, -1, w.shape[-1]))
  # A transposed convolution of Flax lays its kernel down turned by 180 degrees.
  head = names.Form(
    lambda w: w[::-1, ::-1].transpose(2, 0, 1, 3).reshape(w.shape[2], -1),
    lambda w: w.reshape(w.shape[0], *patch, -1).transpose(1, 2, 0, 3)[::-1, ::-1],
  )
  trunks = [('time_trunk', 'condition/time'), ('label_trunk', 'condition/label')]
  return [
    *dense('embedding', 'encoder/patch_embed', embed),
    names.Entry('cls', 'encoder/cls_tokens'),
    names.Entry('pos_embedding', 'encoder/pos_embed'),
    names.Entry('dec_pos_embedding', 'decoder/pos_embed'),
    names.Entry('image_mask_embedding', 'decoder/mask_token'),
    *[e for theirs, ours in trunks for i in (0, 1) for e in dense(f'{theirs}/Dense_{i}', f'{ours}/fc{i + 1}')],
    names.Entry('label_emb/embedding/embedding', 'condition/labels/embedding'),
    *stack('Encoder', 'encoder/stack', form),
    *stack('Decoder', 'decoder/stack', form),
    *dense('final_modulation', 'decoder/modulation'),
    names.Entry('final_conv/kernel', 'decoder/kernel', head),
    names.Entry('final_conv/bias', 'decoder/bias'),
  ]


def form_of(weights) -> str:
  """How the blocks of a checkpoint are laid out. Raises CheckpointError when it has none."""
  for part, form in ((f'Encoder/{SCANNED}/', SCANNED), ('Encoder/Encoder1DBlock_0/', NUMBERED)):
    if any(name.startswith(part) for name in weights):
      return form
  raise CheckpointError(
    f'no blocks of UMD: expected Encoder/{SCANNED}/... or Encoder/Encoder1DBlock_0/..., found {sorted(weights)[:3]}'
  )


def load(weights, cfg) -> tuple[dict, list[str]]:
  """Flat official names -> (our params, names that were not taken)."""
  return names.load(weights, pretraining(cfg, form_of(weights)))


def config_of(case):
  """Our options for a case's `config`."""
  c = case.config
  model = SimpleNamespace(**c.model)
  return method.options(
    'umd',
    size=f'{model.width}/{model.depth}/{model.num_heads}',
    decoder_depth=model.dec_depth,
    patch=tuple(model.patch_size),
    image_size=model.img_size,
    channels=model.channels,
    mlp_ratio=(getattr(model, 'mlp_dim', None) or 4 * model.width) / model.width,
    cls_tokens=getattr(model, 'num_cls', 4),
    adaln=model.adaln,
    scan=model.scan,
    classes=model.num_classes or 0,
    clean=float(c.no_noise_prob),
    mask_ratio=float(c.mask_ratio),
    clean_mask_ratio=float(c.mask_ratio_no_noise),
    timesteps=c.timesteps,
    schedule=c.beta_schedule,
    sampling_steps=c.ddim_steps,
    eta=0.0,
    clip=c.clip_denoised,
  )


def replay(case) -> dict[str, np.ndarray]:
  """Outputs and gradients of a reference case under its own names."""
  cfg, given = config_of(case), {name: jnp.asarray(value) for name, value in case.inputs.items()}
  params = names.complete(*load(case.weights, cfg))
  built, net = method.build(cfg), umd.network(cfg)
  batch, draws = step_of(cfg, given)
  run = jax.jit(jax.value_and_grad(built.loss, has_aux=True))
  (loss, aux), grads = run(params, {}, {}, batch, draws, 0)
  seen, metrics = aux['out'], aux['metrics']
  a, images, label = diffusion.signal(cfg.schedule, cfg.timesteps), given['images'], given.get('sample_labels')
  pred_eval, summary = jax.jit(net)(params, images, jnp.zeros(len(images), jnp.int32))
  out = {
    'x_t': seen.get('noised'),
    **{f'pred_{branch}': seen.get(f'pred_{branch}') for branch in ('clean', 'noised')},
    **{f'mask_{branch}': seen.get(f'mask_{branch}') for branch in ('clean', 'noised')},
    **{f'rep_{branch}': seen.get(f'summary_{branch}') for branch in ('clean', 'noised')},
    'loss_mae': metrics.get('loss/pixel', 0.0),
    'loss_eps': metrics.get('loss/noise', 0.0),
    'loss_x0': metrics.get('loss/clean_from_noised', 0.0),
    'loss': loss,
    'rep_eval': summary,
    'pred_eval': pred_eval,
    'gd_sqrt_alphas_cumprod': np.sqrt(a),
    'gd_sqrt_one_minus_alphas_cumprod': np.sqrt(1 - a),
    **(sampling(case, cfg, net, params, given, a, label) if 'sample_init' in given else {}),
  }
  table = pretraining(cfg, form_of(case.weights))
  return {
    **{f'out/{name}': np.asarray(value) for name, value in out.items() if value is not None},
    **names.grads(grads, table),
  }


def step_of(cfg, given):
  """Batch and draws of the whole step from those of its two parts; what was not given is 0."""
  rows, count = len(given['images']), math.prod(patches.grid_of(given['images'].shape[1:3], vit.sides(cfg.patch, 2)))
  clean = int(rows * cfg.clean)

  def joined(shape, dtype=jnp.float32, first='', last=''):
    parts = [(first, rows - clean), (last, clean)]
    return jnp.concatenate(
      [given[name].reshape(n, *shape) if name in given else jnp.zeros((n, *shape), dtype) for name, n in parts]
    )

  draws = {
    't': joined((), jnp.int32, 't'),
    'eps': joined(given['images'].shape[1:], first='eps'),
    'noise': joined((count,), first='mask_noise_noised', last='mask_noise_clean'),
  }
  batch = {'image': given['images']}
  if cfg.classes:
    batch['label'], draws['drop_label'] = given['labels'].astype(jnp.int32), jnp.zeros(rows, bool)
  return batch, draws


def sampling(case, cfg, net, params, given, a, label):
  """The samplers of the case, and guidance."""
  scale, start = getattr(case.config, 'cfg_scale', None) or 1.0, given['sample_init']
  predict = lambda x, s: net.guided(params, x, s, label, scale)
  noise = lambda x, s: predict(x, s)[..., cfg.channels :]
  sample = jax.jit(lambda x: diffusion.ddim(a, noise, x, jax.random.key(0), cfg.sampling_steps, 0.0, cfg.clip))(start)
  s, after = given['ddim_t'].reshape(-1), given['ddim_t_next'].reshape(-1)
  step = jax.jit(lambda x: diffusion.ddim_step(a, x, s, after, noise(x, s), given['ddim_noise'], 1.0, cfg.clip))
  one, clean = step(start)
  return {
    'ddim_sample': sample,
    'ddim_step_sample': one,
    'ddim_step_x0': clean,
    **({'pred_cfg': predict(start, s)} if label is not None else {}),
  }
