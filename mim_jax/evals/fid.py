"""Samples against real images: Frechet distance of Gaussians fitted to features (Heusel et al. 2017, arXiv 1706.08500).

The features decide what the distance means, so say which with every figure:
- 'random': a fixed convolutional network with random weights (`random_features`): needs no file, sees texture and
  colour but no objects;
- 'pixels': means of an 8 x 8 grid: sees layout and colour alone;
- a path: an encoder in any format of `mim_jax.load_encoder`, its class token or else the mean of its tokens; with
  DINOv2 this is the FD-DINOv2 of Stein et al. 2023 (arXiv 2306.04675).
None of these is FID proper, whose features are those of one Inception network: figures do not compare with published
ones, only with each other. 'real' is the distance between two halves of the real images, each half as large as the set:
what is left of a figure when samples are perfect is below it.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mim_jax.errors import ConfigError, UserError
from mim_jax.evals.features import Context, Encoder, are_examples
from mim_jax.log import panels, pictures

DEFAULTS = {
  'test': ':test',  # real images; ':SPLIT' is that split of the run's own data.source
  'transforms': '',  # '' = the run's data.eval_transforms
  'batch_size': 0,  # images made at once; 0 = the run's batch_size
  'fields': ('image',),
  'samples': 10_000,  # made, and real images read at most
  'label': '',  # field whose classes, drawn evenly, condition the samples; '' for none
  'extractor': 'random',  # random | pixels | path of an encoder
  'seed': 0,
  'show': 16,  # samples in the picture; 0 for none
  'every': 'end',
  'baselines': ('untrained',),
}
BASELINES = ('untrained',)


def frechet(x, y) -> float:
  """|mean difference|^2 + tr(Cx + Cy - 2 (Cx Cy)^1/2) of features x [n, D] and y [m, D], in float64."""
  x, y = (np.asarray(v, np.float64) for v in (x, y))
  if min(len(x), len(y)) < 2:
    raise UserError(f'a covariance needs two images or more; found {len(x)} and {len(y)}')
  means, (cx, cy) = (x.mean(0), y.mean(0)), (np.atleast_2d(np.cov(v, rowvar=False)) for v in (x, y))
  values, vectors = np.linalg.eigh(cx)
  root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
  # (Cx Cy)^1/2 has the trace of (root Cy root)^1/2, which is symmetric.
  common = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cy @ root), 0)).sum()
  return float(np.square(means[0] - means[1]).sum() + np.trace(cx) + np.trace(cy) - 2 * common)


def pixel_features(image):
  """Means of an 8 x 8 grid: image [B, H, W, C] in [0, 1] -> [B, 64 C]."""
  small = jax.image.resize(image, (len(image), 8, 8, image.shape[-1]), 'linear')
  return small.reshape(len(image), -1)


def random_features(image):
  """Means and deviations of three random strided convolutions: image [B, H, W, C] in [0, 1] -> [B, 448]."""
  x, features = 2 * image - 1, []
  for i, width in enumerate((32, 64, 128)):
    key = jax.random.fold_in(jax.random.key(0), i)
    kernel = jax.random.normal(key, (3, 3, x.shape[-1], width)) * (2 / (9 * x.shape[-1])) ** 0.5
    x = jax.lax.conv_general_dilated(x, kernel, (2, 2), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    x = jax.nn.relu(x)
    features += [jnp.mean(x, (1, 2)), jnp.std(x, (1, 2))]
  return jnp.concatenate(features, axis=-1)


@functools.lru_cache(maxsize=4)
def extractor(name: str):
  """(function of weights and images [B, H, W, C] in [0, 1] -> features [B, D], weights). Raises CheckpointError."""
  known = {'random': random_features, 'pixels': pixel_features}
  if name in known:
    return (lambda weights, image: known[name](image)), {}
  from mim_jax import encoder  # reads files of any kind, which the others need not

  teacher, weights = encoder.load_teacher(name)

  def features(weights, image):
    seen = teacher(weights, image, 'none')
    return seen['cls'] if 'cls' in seen else jnp.mean(seen['tokens'], axis=1)

  return features, weights


@functools.lru_cache(maxsize=8)
def _programs(make, name, transforms, channels, mesh):
  """Compiled: features of real images, and samples with their features; whole on every device."""
  black, span = panels.pixel_scale(transforms, channels)
  features, _ = extractor(name)

  def real(weights, image):
    return features(weights, jnp.clip((image - black) / span, 0, 1))

  def sample(variables, weights, key, cond):
    image = jnp.clip((make(variables, key, cond) - black) / span, 0, 1)
    return image, features(weights, image)

  whole = NamedSharding(mesh, PartitionSpec())
  return jax.jit(real, out_shardings=whole), jax.jit(sample, out_shardings=whole)


def real_features(ctx: Context, cfg, program, weights, first):
  """Features of the first `samples` readable images; `first` is a batch that was read already, ahead of the rest."""
  rows, count = [], 0
  for batch in first:
    ctx.check_stop()
    keep = np.asarray(are_examples(batch))
    rows.append(np.asarray(program(weights, batch['image']))[keep])
    count += len(rows[-1])
    if count >= cfg.samples:
      break
  return np.concatenate(rows)[: cfg.samples]


def run(encoder: Encoder, cfg, ctx: Context) -> dict[str, float]:
  """'distance' of the samples to the real images, and 'real', that between the halves of the real ones.

  Raises ConfigError for a method that does not generate.
  """
  if encoder.generate is None:
    raise ConfigError('evals.fid needs a method that generates (Method.generate); take fid out of config.evals')
  source = ctx.open_source(cfg.test)
  classes = source.classes(cfg.label) if cfg.label else 0
  batches = ctx.open_batches(cfg.test, cfg.transforms, cfg.batch_size, cfg.fields)
  first = next(iter(batches))
  real, sample = _programs(encoder.generate, cfg.extractor, cfg.transforms, first['image'].shape[-1], ctx.mesh)
  weights = extractor(cfg.extractor)[1]
  known = real_features(ctx, cfg, real, weights, itertools.chain((first,), batches))

  spread = NamedSharding(ctx.mesh, PartitionSpec(ctx.mesh.axis_names))
  rng, made, shown = np.random.default_rng(cfg.seed), [], []
  labels = rng.permutation(np.arange(-(-cfg.samples // cfg.batch_size) * cfg.batch_size) % max(classes, 1))
  for i, rows in enumerate(labels.astype(np.int32).reshape(-1, cfg.batch_size)):
    ctx.check_stop()
    cond = {'label': jax.make_array_from_callback(rows.shape, spread, lambda index, rows=rows: rows[index])}
    image, features = sample(encoder.variables, weights, jax.random.fold_in(jax.random.key(cfg.seed), i), cond)
    made.append(np.asarray(features))
    if len(shown) < cfg.show:
      shown += list(np.asarray(image[: cfg.show - len(shown)]))
  if shown:
    side = max(1, int(len(shown) ** 0.5))
    cells = [pictures.to_uint8(image) for image in shown]
    ctx.picture(f'samples_{encoder.name}', pictures.grid([cells[k : k + side] for k in range(0, len(cells), side)]))
  made = np.concatenate(made)[: cfg.samples]
  return {'distance': frechet(made, known), 'real': frechet(known[::2], known[1::2])}
