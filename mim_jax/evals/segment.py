"""Semantic segmentation from the tokens of an encoder: a linear head or a light convolutional decoder, frozen or fine-tuned.

- `linear`: a class per token, brought to the size of the picture by linear interpolation, where the loss is taken.
- `conv`: SETR-PUP's shape (Zheng et al. 2021, arXiv 2012.15840, section 3.3): 3 x 3 convolution, norm, GELU and twice the
  size, until one place stands for no more than two pixels a side or four times at most; then a class per place. LayerNorm
  over channels stands where SETR has BatchNorm over devices.

Pictures or volumes: sides may be two or three. Tokens must form a grid in raster order, as those of a ViT do; its sides
follow from the picture for patches that are square, else say `grid`. Fine-tuning is frozen=False, with the settings of
`finetune` (layer_decay, drop_path).

Figures are those of the whole test set, from one table of true and predicted class over all its pixels: miou, dice (means
over the classes that occur), pixel_accuracy.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mim_jax.errors import ConfigError, UserError
from mim_jax.evals import features, fit, metrics
from mim_jax.models import blocks

DEFAULTS = {
  **fit.DEFAULTS,
  'label': 'mask',  # [B, *spatial] or [B, *spatial, 1], class numbers
  'classes': 0,  # 0: as many as the data source says the label has
  'ignore': 255,  # label of pixels that count neither in the loss nor in figures; -1: none
  'background': -1,  # class that is left out of the means over classes; -1: none
  'decoder': 'linear',  # linear | conv
  'width': 64,  # channels of the convolutional decoder
  'taps': (),  # blocks whose outputs are used side by side, such as (3, 6, 9, 12); () = the final tokens
  'grid': (),  # tokens per side; () = found out
  'frozen': True,
  'train_batch': 64,
  'epochs': 20,
}
BASELINES = fit.BASELINES
reads = fit.reads

DECODERS = ('linear', 'conv')
STAGES = 4  # of doubling, at most


def grid_of(count: int, spatial) -> tuple[int, ...]:
  """Tokens per side for `count` tokens of patches with equal sides that tile a picture of `spatial` pixels.

  Raises ConfigError if there is no such patch.
  """
  side = round((math.prod(spatial) / count) ** (1 / len(spatial)))
  grid = tuple(n // side for n in spatial) if side else ()
  if not side or math.prod(grid) != count or any(n % side for n in spatial):
    raise ConfigError(
      f'{count} tokens do not tile a picture of {" x ".join(map(str, spatial))} with patches of equal sides; '
      'say how they lie, as in evals.segment.grid=(14, 14)'
    )
  return grid


class Decoder(nn.Module):
  """What `Method.encode` gives -> class scores [B, *spatial, classes] float32.

  Attributes:
    spatial: sides of the result in pixels.
    grid: tokens per side, () to find it out.
    taps: see DEFAULTS. Outputs of blocks get a LayerNorm of their own; final tokens had theirs in the encoder.
    width: channels of the convolutional decoder; 0 for the linear one.
  """

  classes: int
  spatial: tuple[int, ...]
  grid: tuple[int, ...]
  taps: tuple[int, ...]
  width: int

  @nn.compact
  def __call__(self, encoded):
    x = encoded['tokens'].astype(jnp.float32)
    size, count = x.shape[:2]
    grid = self.grid or grid_of(count, self.spatial)
    if len(grid) != len(self.spatial) or math.prod(grid) != count:
      raise ConfigError(f'evals.segment.grid is {grid}, but there are {count} tokens for sides {self.spatial}')
    if self.taps:
      layers = encoded['layers']
      if not 1 <= min(self.taps) <= max(self.taps) <= len(layers):
        raise ConfigError(f'evals.segment.taps is {self.taps}; this encoder has blocks 1 to {len(layers)}')
      parts = [layers[tap - 1][:, -count:].astype(jnp.float32) for tap in self.taps]
      norms = [blocks.LayerNorm(name=f'norm{tap}') for tap in self.taps]
      x = jnp.concatenate([norm(part) for norm, part in zip(norms, parts, strict=True)], axis=-1)
    x = x.reshape(size, *grid, x.shape[-1])
    if self.width:
      shrink = min(n // g for n, g in zip(self.spatial, grid, strict=True))
      for stage in range(min(STAGES, max(1, round(math.log2(max(1, shrink / 2)))))):
        x = nn.Conv(self.width, (3,) * len(grid), name=f'conv{stage + 1}')(x)
        x = nn.gelu(blocks.LayerNorm(name=f'conv_norm{stage + 1}')(x), approximate=False)
        x = jax.image.resize(x, (size, *(2 * n for n in x.shape[1:-1]), x.shape[-1]), 'linear')
    x = nn.Dense(self.classes, name='head')(x)
    return jax.image.resize(x, (size, *self.spatial, self.classes), 'linear')


def check(cfg, options):
  """Raises ConfigError for settings that cannot work, see `fit.check`."""
  fit.check(cfg, options)
  if cfg.decoder not in DECODERS:
    raise ConfigError(f'decoder is {cfg.decoder!r}; expected one of {", ".join(DECODERS)}')
  if cfg.taps and 'layers' not in options:
    raise ConfigError(f'taps is {tuple(cfg.taps)}, but the encode of this method gives no `layers`; set it to ()')


def run(encoder: features.Encoder, cfg, ctx: features.Context) -> dict[str, float]:
  """miou, dice, pixel_accuracy and train_loss; see `fit.run`."""
  check(cfg, encoder.options)
  classes = cfg.classes or ctx.open_source(cfg.train).classes(cfg.label)
  return fit.run(encoder, task_of(cfg, classes), cfg, ctx)


def task_of(cfg, classes: int) -> fit.Task:
  """The task that `cfg` describes."""

  def decoder_of(spatial):
    width = cfg.width if cfg.decoder == 'conv' else 0
    return Decoder(classes, tuple(spatial), tuple(cfg.grid), tuple(cfg.taps), width)

  def places(batch):
    """Labels [B, *spatial] int32 and which of them count."""
    labels, image = batch[cfg.label], batch[cfg.fields[0]]
    if labels.ndim == image.ndim and labels.shape[-1] == 1:
      labels = labels[..., 0]
    if labels.shape != image.shape[:-1]:
      raise UserError(
        f'{cfg.label!r} {labels.shape} does not lie on {cfg.fields[0]!r} {image.shape}: a mask has a class number per pixel'
      )
    labels = labels.astype(jnp.int32)
    return labels, labels != cfg.ignore

  def init(key, encoded, batch):
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), encoded)
    return decoder_of(batch[cfg.fields[0]].shape[1:-1]).init(key, zeros)['params']

  def predict(params, state, encoded, batch, train):
    del state, train
    return decoder_of(batch[cfg.fields[0]].shape[1:-1]).apply({'params': params}, encoded), {}

  def draw(key, batch):
    del key
    return {'counts': {'pixels': jnp.sum(places(batch)[1], dtype=jnp.float32)}}

  def prepare(batch, draws):
    del draws
    return {name: value for name, value in batch.items() if name != cfg.label}, places(batch)

  def loss(prediction, target, draws):
    labels, counted = target
    log_probs = jax.nn.log_softmax(prediction)
    own = jnp.take_along_axis(log_probs, jnp.clip(labels, 0, classes - 1)[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(counted, own, 0.0)) / jnp.maximum(draws['counts']['pixels'], 1.0)

  def measure(prediction, batch):
    labels, counted = places(batch)
    known = (labels >= 0) & (labels < classes)
    true = jax.nn.one_hot(jnp.where(counted & known, labels, -1), classes).reshape(len(labels), -1, classes)
    found = jax.nn.one_hot(jnp.argmax(prediction, axis=-1), classes).reshape(len(labels), -1, classes)
    table = jnp.einsum(
      'bpc,bpd->bcd', true, found, preferred_element_type=jnp.float32
    )  # whole numbers below 2^24: exact
    return {'table': table.astype(jnp.int32), 'unknown': jnp.sum(counted & ~known, axis=range(1, labels.ndim))}

  def figures(kept):
    unknown = int(np.sum(kept['unknown'], dtype=np.int64))
    if unknown:
      raise UserError(
        f'{unknown} pixels of {cfg.label!r} in {cfg.test} have a label outside 0 to {classes - 1} that is not '
        f'evals.<name>.ignore={cfg.ignore}; set evals.<name>.classes or ignore'
      )
    return metrics.regions(np.sum(kept['table'], axis=0, dtype=np.int64), cfg.background)

  return fit.Task(init, predict, loss, prepare, measure, figures, draw, layers=bool(cfg.taps))
