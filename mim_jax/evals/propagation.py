"""Label propagation through video with frozen features, as CropMAE is judged (arXiv 2403.17823, section 4).

DAVIS asks for objects, VIP for body parts, JHMDB for joints.

The labels of a video's first frame (objects, body parts or joints) are handed on from frame to frame: each place of the
feature grid takes the labels of the places of earlier frames that look most like it (`propagate`; Jabri et al. 2020,
arXiv 2006.14613). Nothing is trained.

What the figures are: `jf`, `j`, `f` (objects; Perazzi et al. 2016, Pont-Tuset et al. 2017): region similarity and
boundary accuracy, mean over the frames between the first and the last, then over the objects; `miou`: intersection over
union of classes, over all frames but first ones; `pck_0.1` and so on: share of joints that are nearer to the truth than
that part of 0.6 times the diagonal of the box around the frame's visible joints, mean over the joints, first frames
left out.
"""

import functools
import math

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mim_jax.data import images
from mim_jax.errors import ConfigError, UserError
from mim_jax.evals import features, metrics
from mim_jax.log import pictures
from mim_jax.ops import patches
from mim_jax.parallel import mesh as meshes

DEFAULTS = {
  'test': ':test',  # data source of videos, one per example
  'transforms': '',  # of each frame, which must stay whole: resize, normalize; '' = the run's data.eval_transforms
  'batch_size': 0,  # frames per pass of the encoder; 0 = the run's batch_size
  'frames': 'frames',  # field of the frames [T, H, W, C]
  'labels': 'masks',  # field of whole numbers [T, H, W], 0 = background; of pck: (x, y) in pixels [T, J, 2]
  'valid': '',  # field [T, J] of the joints that are visible; '' = all
  'metric': 'jf',  # jf | miou | pck
  'classes': 0,  # of miou, background included; 0 = as many as the labels show
  'context': 20,  # frames looked back at, besides the first; this and the next four as in the papers' protocol
  'k': 7,
  'radius': 20,
  'temperature': 0.7,
  'thresholds': (0.1, 0.2),  # of pck
  'pixel_patch': 8,  # side of the patches that the pixels baseline takes as features
  'every': 'end',
  'baselines': ('untrained', 'pixels'),
}

ROWS = 256  # places of a frame whose similarities to the whole context are held at a time
MASKED = -1e10
PEAK = 5  # places of a joint's map that its position is taken from


@functools.partial(jax.jit, static_argnames=('grid', 'k', 'radius', 'temperature'))
def _frame(query, first, first_labels, recent, recent_labels, grid, k, radius, temperature):
  """Labels [N, K] of one frame: query, first [N, D], recent [C, N, D] of unit length, first_labels [N, K],
  recent_labels [C, N, K].
  """
  count = math.prod(grid)
  keys = jnp.concatenate([first[None], recent]).reshape(-1, query.shape[-1])
  labels = jnp.concatenate([first_labels[None], recent_labels]).reshape(len(keys), -1)
  places = np.indices(grid).reshape(2, -1).T

  def rows(part):
    features, place = part
    similarity = jnp.matmul(features, keys.T, precision=jax.lax.Precision.HIGHEST) / temperature
    far = jnp.sum((place[:, None] - jnp.asarray(places)) ** 2, axis=-1) >= radius**2
    far = jnp.concatenate([jnp.zeros_like(far), *[far] * len(recent)], axis=1)  # the first frame is searched everywhere
    best, index = jax.lax.top_k(jnp.where(far, MASKED, similarity), k)
    return jnp.einsum('nk,nkc->nc', jax.nn.softmax(best), labels[index], precision=jax.lax.Precision.HIGHEST)

  size = min(ROWS, count)
  pad = -count % size
  parts = (jnp.pad(query, ((0, pad), (0, 0))), jnp.pad(jnp.asarray(places), ((0, pad), (0, 0))))
  parts = jax.tree.map(lambda x: x.reshape(-1, size, x.shape[-1]), parts)
  return jax.lax.map(rows, parts).reshape(count + pad, -1)[:count]


def propagate(frames, labels, context=20, k=7, radius=20, temperature=0.7, check_stop=lambda: None) -> np.ndarray:
  """Soft labels of every frame of a video from those of the first one -> [T, h, w, K] float32.

  A place of frame t looks at the whole first frame and, in each of the `context` frames before t, at the places nearer
  than `radius`; before the video begins stand copies of the first frame. The `k` most similar of all of these give
  their labels, weighted by the softmax of cosine / temperature. Labels are not renormalised, and the first frame keeps
  its own.

  Args:
    frames: features [T, h, w, D].
    labels: of the first frame, [h, w, K].
    radius: in places of the grid.
    check_stop: called before each frame.
  """
  total, *grid, width = frames.shape
  tokens = np.asarray(frames, np.float32).reshape(total, -1, width)
  tokens = tokens / np.maximum(np.linalg.norm(tokens, axis=-1, keepdims=True), 1e-12)
  given = jnp.asarray(labels, jnp.float32).reshape(tokens.shape[1], -1)
  first = jnp.asarray(tokens[0])
  recent, recent_labels = (jnp.broadcast_to(x, (context, *x.shape)) for x in (first, given))
  out = [given]
  for token in map(jnp.asarray, tokens[1:]):
    check_stop()
    out.append(_frame(token, first, given, recent, recent_labels, tuple(grid), k, radius, temperature))
    recent = jnp.concatenate([recent[1:], token[None]])
    recent_labels = jnp.concatenate([recent_labels[1:], out[-1][None]])
  return np.stack(out).reshape(total, *grid, -1)


# ---- features of frames ----


@functools.lru_cache(maxsize=16)
def _program(encode, mesh, pixel_patch):
  """(variables, frames [B, H, W, C]) -> tokens [B, N, D] float32, whole on every device."""

  def program(variables, frames):
    if encode is None:
      return patches.patchify(frames, (pixel_patch,) * 2)
    return encode(variables, {'image': frames})['tokens'].astype(jnp.float32)

  return jax.jit(program, out_shardings=NamedSharding(mesh, PartitionSpec()))


def frame_features(encoder, frames, ctx, batch_size: int, pixel_patch: int) -> np.ndarray:
  """Tokens of frames [T, H, W, C] as `transforms` made them -> [T, h, w, D]; `batch_size` is rounded up to fill the
  devices.
  """
  batch_size = -(-batch_size // ctx.mesh.size) * ctx.mesh.size
  program = _program(encoder.encode, ctx.mesh, pixel_patch)
  sharding = meshes.batch_sharding(ctx.mesh)
  rows = []
  for start in range(0, len(frames), batch_size):
    ctx.check_stop()
    part = frames[start : start + batch_size]
    padded = np.concatenate([part, np.zeros((batch_size - len(part), *part.shape[1:]), part.dtype)])
    batch = jax.make_array_from_callback(padded.shape, sharding, lambda index: padded[index])
    rows.append(np.asarray(program(encoder.variables, batch))[: len(part)])
  tokens = np.concatenate(rows)
  height, width = frames.shape[1:3]
  side = math.sqrt(height * width / tokens.shape[1])
  grid = round(height / side), round(width / side)
  if math.prod(grid) != tokens.shape[1]:
    raise UserError(f'{tokens.shape[1]} tokens of frames of {height} x {width} are no grid of square patches')
  return tokens.reshape(len(tokens), *grid, -1)


# ---- labels and their grid ----


def resize(maps, size) -> np.ndarray:
  """Maps [h, w, K] float -> [*size, K], bilinear with half-pixel centres and without antialiasing."""
  return cv2.resize(np.asarray(maps, np.float32), tuple(size)[::-1], interpolation=cv2.INTER_LINEAR).reshape(*size, -1)


def joint_maps(joints, size, grid) -> np.ndarray:
  """Joints [J, 2] (x, y) in a frame of `size` -> [*grid, J]: a Gaussian of half a place around each."""
  rows, columns = (np.arange(n) + 0.5 for n in grid)
  x, y = joints[:, 0] * grid[1] / size[1], joints[:, 1] * grid[0] / size[0]
  squared = (rows[:, None, None] - y) ** 2 + (columns[None, :, None] - x) ** 2
  return np.exp(-squared / (2 * 0.5**2))


def joint_places(maps, size) -> np.ndarray:
  """Maps [h, w, J] -> [J, 2] (x, y) in a frame of `size`: the mean of the highest `PEAK` places, weighted by their
  values.
  """
  height, width, count = maps.shape
  flat = maps.reshape(-1, count)
  best = np.argsort(-flat, axis=0, kind='stable')[:PEAK]  # [PEAK, J]
  weight = np.take_along_axis(flat, best, axis=0)
  weight = weight / np.maximum(weight.sum(0), 1e-12)
  x, y = best % width + 0.5, best // width + 0.5
  return np.stack([(weight * x).sum(0) * size[1] / width, (weight * y).sum(0) * size[0] / height], axis=-1)


# ---- figures ----


def jaccard(predicted, truth) -> float:
  """Intersection over union of two masks [H, W] bool; 1 where both are empty."""
  union = np.count_nonzero(predicted | truth)
  return np.count_nonzero(predicted & truth) / union if union else 1.0


def _outline(mask) -> np.ndarray:
  """Pixels of a mask [H, W] that differ from the one to the right, below or both."""
  east, south, both = mask.copy(), mask.copy(), mask.copy()
  east[:, :-1], south[:-1], both[:-1, :-1] = mask[:, 1:], mask[1:], mask[1:, 1:]
  return (mask ^ east) | (mask ^ south) | (mask ^ both)


def boundary(predicted, truth, tolerance=0.008) -> float:
  """F measure of the outlines of two masks [H, W] bool, which match within `tolerance` of the image's diagonal; 1
  where both are empty.
  """
  radius = math.ceil(tolerance * math.hypot(*truth.shape))
  disk = (np.hypot(*np.mgrid[-radius : radius + 1, -radius : radius + 1]) <= radius).astype(np.uint8)
  outlines = [_outline(mask).astype(np.uint8) for mask in (predicted, truth)]
  near = [cv2.dilate(outline, disk).astype(bool) for outline in outlines]
  counts = [outline.sum() for outline in outlines]
  if not all(counts):
    return float(not any(counts))
  precision, recall = (np.count_nonzero(outlines[i].astype(bool) & near[1 - i]) / counts[i] for i in (0, 1))
  return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def objects_of(predicted, truth) -> list[tuple[float, float]]:
  """(j, f) of each object of the first frame: predicted, truth [T, H, W] int; the first and the last frame do not
  count.
  """
  numbers = [n for n in np.unique(truth[0]) if n]
  frames = range(1, len(truth) - 1)
  return [
    tuple(np.mean([measure(predicted[t] == n, truth[t] == n) for t in frames]) for measure in (jaccard, boundary))
    for n in numbers
  ]


def correct_joints(predicted, truth, valid, threshold: float) -> tuple[np.ndarray, np.ndarray]:
  """Right ones and all of each joint [J]: predicted, truth [T, J, 2], valid [T, J]; the first frame does not count."""
  right, count = np.zeros(truth.shape[1]), np.zeros(truth.shape[1])
  for found, places, seen in zip(predicted[1:], truth[1:], valid[1:], strict=True):
    if not seen.any():
      continue
    size = 0.6 * np.linalg.norm(np.ptp(places[seen], axis=0))
    error = np.linalg.norm(found - places, axis=-1) / max(size, 1e-12)
    right += seen & (error <= threshold)
    count += seen
  return right, count


# ---- the evaluator ----


def _read(source, index, cfg):
  """(frames [T, H, W, C], labels [T, ...], valid [T, J] or None) of a video."""
  example = source[index]
  for name in filter(None, (cfg.frames, cfg.labels, cfg.valid)):
    if name not in example:
      raise ConfigError(
        f'{cfg.test} has no field {name!r}, found {", ".join(sorted(example))}; '
        'name the right ones in frames, labels and valid of the evaluator'
      )
  frames, labels = np.asarray(example[cfg.frames]), np.asarray(example[cfg.labels])
  if cfg.metric == 'pck':
    valid = np.asarray(example[cfg.valid], bool) if cfg.valid else np.ones(labels.shape[:2], bool)
    return frames, labels.astype(np.float64), valid
  return frames, (labels[..., 0] if labels.ndim == 4 else labels).astype(np.int64), None


def _prepared(frames, chain) -> np.ndarray:
  made = [chain.example({'image': frame}, np.random.default_rng(0))['image'] for frame in frames]
  return chain.batch({'image': np.stack(made)})['image']


def run(encoder: features.Encoder, cfg, ctx: features.Context) -> dict[str, float]:
  """Figures of `cfg.metric`, see the head of this file; a picture of the first video beside them."""
  if cfg.metric not in ('jf', 'miou', 'pck'):
    raise ConfigError(f'propagation: metric {cfg.metric!r} is unknown; expected jf, miou or pck')
  source, chain = ctx.open_source(cfg.test), images.parse(cfg.transforms)
  objects, table, joints = [], 0, dict.fromkeys(cfg.thresholds, 0)
  for index in range(len(source)):
    frames, labels, valid = _read(source, index, cfg)
    size = frames.shape[1:3]
    tokens = frame_features(encoder, _prepared(frames, chain), ctx, cfg.batch_size, cfg.pixel_patch)
    grid = tokens.shape[1:3]
    if cfg.metric == 'pck':
      given = joint_maps(labels[0], size, grid)
    else:
      numbers = np.unique(labels[0]) if cfg.metric == 'jf' else np.arange(cfg.classes or labels.max() + 1)
      given = resize(labels[0][..., None] == numbers, grid)
    soft = propagate(tokens, given, cfg.context, cfg.k, cfg.radius, cfg.temperature, ctx.check_stop)
    if cfg.metric == 'pck':
      found = np.stack([joint_places(maps, size) for maps in soft])
      for threshold in cfg.thresholds:
        joints[threshold] = joints[threshold] + np.stack(correct_joints(found, labels, valid, threshold))
      continue
    found = np.stack([labels[0], *[numbers[resize(maps, size).argmax(-1)] for maps in soft[1:]]])
    if index == 0:
      ctx.picture(f'propagation_{encoder.name}', _picture(frames, labels, found))
    if cfg.metric == 'jf':
      objects += objects_of(found, labels)
    else:
      classes = cfg.classes or 256
      table = table + metrics.confusion(found[1:].ravel(), labels[1:].ravel(), classes)
  if cfg.metric == 'pck':
    return {
      f'pck_{t:g}': float(np.mean((right / np.maximum(count, 1))[count > 0])) for t, (right, count) in joints.items()
    }
  if cfg.metric == 'miou':
    return {'miou': metrics.regions(table)['miou']}
  if not objects:
    raise UserError(f'{cfg.test} shows no object in the first frame of any video')
  j, f = (float(np.mean(values)) for values in zip(*objects, strict=True))
  return {'jf': (j + f) / 2, 'j': j, 'f': f}


def _picture(frames, truth, found, count=6) -> np.ndarray:
  """Frames of a video with the true labels laid over them, and below with the propagated ones."""
  shown = np.linspace(0, len(frames) - 1, min(count, len(frames))).astype(int)
  colours = np.array([[0, 0, 0], *[[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in pictures.COLORS]])

  def over(frame, labels):
    tint = colours[np.where(labels > 0, 1 + (labels - 1) % (len(colours) - 1), 0)]
    return np.where((labels > 0)[..., None], frame // 2 + tint // 2, frame).astype(np.uint8)

  rows = [[over(frames[t], labels[t].astype(int)) for t in shown] for labels in (truth, found)]
  return pictures.grid(rows, titles=[f'frame {t}' for t in shown], labels=['true', 'propagated'])
