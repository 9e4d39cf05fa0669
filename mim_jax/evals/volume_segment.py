"""Segmentation of volumes: UNETR on layers of the encoder, trained on crops, judged by sliding windows on all of them.

The protocol of Hi-End-MAE (arXiv 2502.08347; FengheTan9/Hi-End-MAE, downstream/) on any method's layers: Dice plus
cross-entropy with equal weights, and windows of the size of the training crops whose scores are averaged where they
overlap. Dice is that of each volume and class, left out where the class is absent, its mean over the classes of a
volume and then over the volumes. The official figure counts the background as a class and is that of the last volume
only: the one with background is `dice_all` here, over all volumes.

Official recipe: AdamW, rate 1e-4 for 4 crops (base_lr=6.4e-3), wd=1e-5, 500 epochs of 4 crops of each volume, that is
epochs=2000 and warmup_epochs=200 with train_batch=4, width=32. The official network drops the class token, trains the
positions and has eps 1e-5 (`models.unetr.Unetr` with the names of `official.hi_end_mae`); here the encoder stays what
the method makes of it.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from mim_jax.data import images
from mim_jax.data.sources import CorruptExample
from mim_jax.errors import ConfigError, UserError
from mim_jax.evals import features, fit, metrics, segment
from mim_jax.log import pictures
from mim_jax.models import unetr
from mim_jax.ops import losses
from mim_jax.parallel import mesh as meshes

DEFAULTS = {
  **fit.DEFAULTS,  # `transforms` must leave test volumes whole, `train_transforms` must crop; batch_size counts windows
  'label': 'mask',  # [B, *spatial] or [B, *spatial, 1], class numbers, 0 = background
  'classes': 0,  # background included; 0: as many as the data source says the label has
  'taps': (4, 7, 10),  # three blocks, counted from one, shallow first, that the decoder takes beside the final tokens
  'grid': (),  # tokens per side of a crop; () = found out
  'width': 32,  # channels of the decoder at full size
  'overlap': 0.5,  # of neighbouring windows, as a share of their side
  'train_batch': 4,
  'epochs': 2000,
  'warmup_epochs': 200,
  'base_lr': 1e-4 * 256 / 4,
  'wd': 1e-5,
  'pictures': 4,  # volumes that are drawn
}
BASELINES = fit.BASELINES
reads = fit.reads

COLORS = np.array([[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in pictures.COLORS], np.uint8)


def check(cfg, options):
  """Raises ConfigError for settings that cannot work, see `fit.check`."""
  fit.check(cfg, options)
  if 'layers' not in options:
    raise ConfigError(
      'a UNETR decoder needs `layers`, which the encode of this method does not give (see mim_jax/method.py)'
    )
  if len(cfg.taps) != 3 or not 0 <= cfg.overlap < 1:
    raise ConfigError(f'taps is {tuple(cfg.taps)}, overlap {cfg.overlap}; expected three blocks and a share below 1')


def run(encoder: features.Encoder, cfg, ctx: features.Context) -> dict[str, float]:
  """dice, dice_all (with background), class1/dice and so on, and train_loss."""
  check(cfg, encoder.options)
  classes = cfg.classes or ctx.open_source(cfg.train).classes(cfg.label)
  seen = {}  # sides of the crops, known once the first batch is there
  fitted, loss = fit.trained(encoder, task_of(cfg, classes, seen), cfg, ctx)
  predict = lambda windows: _predicted(fitted, windows, cfg, ctx.mesh)
  tables, shown = [], []
  for image, labels in _volumes(cfg, ctx):
    scores = sliding_window(predict, image, seen['sides'], cfg.overlap, cfg.batch_size)
    found = scores.argmax(axis=-1)
    tables.append(_table(found, labels, classes, cfg))
    if len(shown) < cfg.pictures:
      shown.append(_picture(image, labels, found))
    ctx.check_stop()
  if not tables:
    raise UserError(f'{cfg.test} holds no volume that can be read; check source and split')
  if shown:
    rows = [[np.moveaxis(part, 2, 0) for part in row] for row in shown]  # slices across the last axis
    ctx.picture(f'volume_segment_{encoder.name}', pictures.grid(rows, titles=['input', 'truth', 'found']))
  dice = np.stack([metrics.dice(table) for table in tables])
  return {**metrics.with_intervals(lambda rows: figures(dice[rows]), len(dice), cfg.bootstrap), 'train_loss': loss}


def figures(dice) -> dict[str, float]:
  """dice [volumes, classes], NaN where absent -> means without and with background, and those of single classes."""
  present = ~np.isnan(dice)
  known = np.where(present, dice, 0.0)
  mean = lambda first: known[:, first:].sum(axis=1) / np.maximum(present[:, first:].sum(axis=1), 1)
  some = present[:, 1:].any(axis=1)  # a volume without any organ says nothing about them
  out = {'dice': float(mean(1)[some].mean()) if some.any() else math.nan, 'dice_all': float(mean(0).mean())}
  for number in range(1, dice.shape[1]):
    if present[:, number].any():
      out[f'class{number}/dice'] = float(dice[present[:, number], number].mean())
  return out


def _volumes(cfg, ctx):
  """(image [*spatial, C] float32, labels [*spatial]) of the test volumes, of any sizes, without broken ones."""
  source, chain = ctx.open_source(cfg.test), images.parse(cfg.transforms)
  for index in range(len(source)):
    try:
      example = chain.example(source[index], np.random.default_rng(0))  # evaluation draws nothing
    except (CorruptExample, images.DecodeError) as error:
      ctx.say(f'{source.key(index)} cannot be read and is left out: {error}')
      continue
    batch = chain.batch({name: np.asarray(example[name])[None] for name in (cfg.fields[0], cfg.label)})
    image, labels = batch[cfg.fields[0]][0], batch[cfg.label][0]
    image = image[..., None] if image.ndim == 3 else image
    yield image.astype(np.float32), labels.reshape(image.shape[:-1])


def _table(found, labels, classes, cfg):
  if not 0 <= labels.min() <= labels.max() < classes:
    raise UserError(
      f'{cfg.label!r} of {cfg.test} has labels from {labels.min()} to {labels.max()}; expected 0 to {classes - 1}: '
      'set evals.<name>.classes'
    )
  return metrics.confusion(found.ravel(), labels.ravel(), classes)


def starts(length: int, side: int, overlap: float) -> list[int]:
  """Where windows of `side` begin on an axis of `length` >= side: steps of (1 - overlap) side, the last at the end."""
  step = max(1, int(side * (1 - overlap)))
  return [min(start, length - side) for start in range(0, length - side + step, step)]


def sliding_window(predict, volume, sides, overlap: float, batch: int) -> np.ndarray:
  """Scores of a whole volume: the mean over the windows that cover a voxel.

  Args:
    predict: windows [batch, *sides, C] float32 -> scores [batch, *sides, classes].
    volume: [*spatial, C] of any size; smaller axes are filled up with zeros and cut again.
    sides: of a window.
    overlap: share that neighbours have in common, at least.
  """
  spatial = volume.shape[:-1]
  missing = [max(side - n, 0) for n, side in zip(spatial, sides, strict=True)]
  around = [(n // 2, n - n // 2) for n in missing]
  volume = np.pad(volume, [*around, (0, 0)])
  corners = list(
    itertools.product(*(starts(n, side, overlap) for n, side in zip(volume.shape[:-1], sides, strict=True)))
  )
  place = lambda corner: tuple(slice(a, a + side) for a, side in zip(corner, sides, strict=True))
  total, count = None, np.zeros((*volume.shape[:-1], 1), np.float32)
  for first in range(0, len(corners), batch):
    part = corners[first : first + batch]
    windows = np.stack([volume[place(corner)] for corner in part])
    short = batch - len(part)
    scores = predict(np.pad(windows, [(0, short)] + [(0, 0)] * (windows.ndim - 1)))
    total = np.zeros((*volume.shape[:-1], scores.shape[-1]), np.float32) if total is None else total
    for corner, values in zip(part, scores, strict=False):
      total[place(corner)] += values
      count[place(corner)] += 1
  inner = tuple(slice(a, a + n) for (a, _), n in zip(around, spatial, strict=True))
  return (total / count)[inner]


def _predicted(fitted, windows, cfg, mesh):
  sharding = NamedSharding(mesh, meshes.batch_sharding(mesh).spec)
  array = jax.make_array_from_callback(windows.shape, sharding, lambda index: windows[index])
  return fitted.predict({cfg.fields[0]: array})


def _picture(image, labels, found):
  """One row of the picture: the volume and the two labelled ones, [*spatial, 3] uint8."""
  grey = pictures.to_uint8(np.repeat(image[..., :1], 3, axis=-1))
  paint = lambda numbers: np.where(numbers[..., None] > 0, COLORS[(numbers - 1) % len(COLORS)], grey // 2)
  return [grey, *(paint(numbers.astype(np.int64)).astype(np.uint8) for numbers in (labels, found))]


def task_of(cfg, classes: int, seen: dict | None = None) -> fit.Task:
  """UNETR's decoder, with Dice and cross-entropy as its loss; `seen['sides']` becomes the sides of a crop."""

  def decoder_of(encoded, batch):
    spatial = batch[cfg.fields[0]].shape[1:-1]
    grid = tuple(cfg.grid) or segment.grid_of(encoded['tokens'].shape[1], spatial)
    return unetr.Decoder(grid, classes, cfg.width, str(encoded['tokens'].dtype))

  def layers_of(encoded):
    depth, count = len(encoded['layers']), encoded['tokens'].shape[1]
    if not 1 <= min(cfg.taps) <= max(cfg.taps) <= depth:
      raise ConfigError(f'taps is {tuple(cfg.taps)}; this encoder has blocks 1 to {depth}')
    return [*(encoded['layers'][tap - 1][:, -count:] for tap in cfg.taps), encoded['tokens']]

  def init(key, encoded, batch):
    image = batch[cfg.fields[0]]
    if seen is not None:
      seen['sides'] = image.shape[1:-1]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), encoded)
    return decoder_of(encoded, batch).init(key, jnp.zeros(image.shape, image.dtype), layers_of(zeros))['params']

  def predict(params, state, encoded, batch, train):
    del state, train
    decoder = decoder_of(encoded, batch)
    return decoder.apply({'params': params}, batch[cfg.fields[0]], layers_of(encoded)), {}

  def labels_of(batch):
    image = batch[cfg.fields[0]]
    if math.prod(batch[cfg.label].shape) != math.prod(image.shape[:-1]):
      raise UserError(
        f'{cfg.label!r} {batch[cfg.label].shape} does not lie on {cfg.fields[0]!r} {image.shape}: '
        'a mask has a class number per voxel'
      )
    return batch[cfg.label].reshape(image.shape[:-1]).astype(jnp.int32)

  def prepare(batch, draws):
    del draws
    return {name: value for name, value in batch.items() if name != cfg.label}, labels_of(batch)

  def loss(prediction, target, draws):
    del draws
    return losses.dice(prediction, target) + losses.cross_entropy(prediction, target)

  def measure(prediction, batch):
    return {'found': jnp.argmax(prediction, axis=-1), 'label': labels_of(batch)}

  def of_crops(kept):
    tables = [
      metrics.confusion(*map(np.ravel, pair), classes) for pair in zip(kept['found'], kept['label'], strict=True)
    ]
    return figures(np.stack([metrics.dice(table) for table in tables]))

  return fit.Task(init, predict, loss, prepare, measure, of_crops, layers=True)
