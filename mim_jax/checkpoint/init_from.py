"""Starting from the weights of another run or file: renamed, moved to another grid, and accounted for leaf by leaf."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from mim_jax.checkpoint import bundle, files, manager
from mim_jax.errors import CheckpointError, ConfigError
from mim_jax.models import posemb

Tree = Any


@dataclasses.dataclass(frozen=True)
class Report:
  """What became of every leaf; each field but the first maps a path to a few words, such as its shape.

  Attributes:
    source: the step or file that was read.
    loaded: taken as they are there.
    resized: position tables moved to another grid.
    missing: left as they were, because the source lacks them or has them in another shape.
    unused: in the source (by the name they have after renaming) and not taken.
  """

  source: str
  loaded: dict[str, str]
  resized: dict[str, str]
  missing: dict[str, str]
  unused: dict[str, str]

  def __str__(self):
    groups = {name: getattr(self, name) for name in ('loaded', 'resized', 'missing', 'unused')}
    width = max((len(path) for group in groups.values() for path in group), default=0)
    counts = ', '.join(f'{len(group)} {name}' for name, group in groups.items())
    rows = [f'  {name:8}{path:{width}}  {text}' for name, group in groups.items() for path, text in group.items()]
    return '\n'.join([f'weights from {self.source}: {counts}', *rows])


@dataclasses.dataclass(frozen=True)
class _Source:
  """Weights to choose from.

  Attributes:
    shapes: shape by name.
    fetch: puts the arrays of the names given on the shardings given.
    grid: that of its position tables, where the source tells.
  """

  name: str
  shapes: Mapping[str, tuple[int, ...]]
  fetch: Callable[[Mapping[str, Sharding]], dict[str, jax.Array]]
  grid: tuple[int, ...] | None = None


def load_into(
  params: Tree,
  path,
  *,
  which: str = 'params',
  rename: Sequence[tuple[str, str]] = (),
  allow_missing: str = '',
  grid: Sequence[int] | None = None,
  old_grid: Sequence[int] | None = None,
) -> tuple[Tree, Report]:
  """Puts the weights found at `path` into `params` wherever names and shapes agree. Collective.

  Position tables, `pos_embed` [1, class rows + N, D], that belong to another grid are resized (`posemb.resample`). The
  result has the dtypes and shardings of `params`.

  Args:
    params: tree of arrays.
    path: the folder of a run (its newest undamaged checkpoint counts), one step of it (RUN/checkpoints/STEP), or a
      .safetensors file with names of ours, parts joined by '/'. A file may hold several trees, told apart by the first
      part of their names, 'params' or 'ema'.
    which: 'params' or 'ema'.
    rename: (regex, replacement) pairs, put through `re.sub` one after the other on every name of the source.
    allow_missing: regex of paths that may keep the values they have in `params`, whether the source lacks them or has
      them in another shape. Without it the source may lack any path that is not within an `encoder`.
    grid: patches per axis of the position tables here; by default those of a square image.
    old_grid: the same for the source; files made by mim-jax convert tell it themselves.

  Raises:
    CheckpointError: there is nothing to read, weights are missing that may not be, shapes differ, or nothing fits.
    ConfigError: a regex is not valid, or a rename changes no name, or it makes two names equal.
  """
  if which not in ('params', 'ema'):
    raise ConfigError(f"init_from.which is {which!r}; expected 'params' or 'ema'")

  def use(source: _Source):
    return _load(params, source, rename, allow_missing, grid, old_grid or source.grid)

  place = manager.absolute(path)
  if place.is_file():
    return use(_file(place, which))
  steps, folder = manager.list_steps(place / 'checkpoints'), place / 'checkpoints'
  if not steps and place.name.isdigit():
    steps, folder = [step for step in manager.list_steps(place.parent) if step == int(place.name)], place.parent
  if not steps:
    raise CheckpointError(
      f'no weights at {path}: expected the folder of a run (with checkpoints/STEP in it), such a STEP, or a file of '
      'safetensors'
    )
  return manager.newest_good(folder, steps, lambda contents: use(_step(contents, which)), refused=[])


def _step(contents: manager.Contents, which: str) -> _Source:
  prefix = f'{which}/'
  leaves = {path.removeprefix(prefix): leaf for path, leaf in contents.leaves.items() if path.startswith(prefix)}
  if not leaves:
    raise CheckpointError(
      f'{contents.directory} holds no {which}' + (': that run kept no average; use params' if which == 'ema' else '')
    )

  def fetch(shardings):
    specs = {
      prefix + name: jax.ShapeDtypeStruct(leaves[name].shape, leaves[name].dtype, sharding=sharding)
      for name, sharding in shardings.items()
    }
    return {path.removeprefix(prefix): x for path, x in contents.load(specs).items()}

  return _Source(f'{contents.directory}, {which}', {name: leaf.shape for name, leaf in leaves.items()}, fetch)


def _file(path, which: str) -> _Source:
  weights = files.read(path)
  if weights.kind == 'torch':
    raise CheckpointError(f'{path} is a PyTorch file with names of another code: put it through mim-jax convert first')
  prefix = f'{which}/' if any(name.startswith(f'{which}/') for name in weights) else ''
  if which == 'ema' and not prefix:
    raise CheckpointError(f'{path} holds no ema: none of its {len(weights)} names starts with ema/')
  grid = bundle.describe(weights)['encoder']['grid'] if bundle.is_bundle(weights) else None

  def fetch(shardings):
    return {name: _put(weights[prefix + name], sharding) for name, sharding in shardings.items()}

  shapes = {name.removeprefix(prefix): weights.shape(name) for name in weights if name.startswith(prefix)}
  return _Source(str(path), shapes, fetch, grid)


def _load(params, source: _Source, rename, allow_missing, grid, old_grid) -> tuple[Tree, Report]:
  """`load_into` once it is known what to read."""
  may_miss = _compile('allow_missing', allow_missing).search if allow_missing else lambda name: None
  ours, theirs = manager.flatten(params), _renamed(source.shapes, rename)
  loaded, resized, missing, wrong, moves = {}, {}, {}, {}, {}
  for name, leaf in ours.items():
    here = str(list(leaf.shape))
    if name not in theirs:
      needed = 'encoder' in name.split('/') and not may_miss(name)
      (wrong if needed else missing)[name] = f'{here}, not in the source'
      continue
    shape = source.shapes[theirs[name]]
    moves[name] = _move(name, shape, leaf.shape, old_grid, grid)
    if moves[name]:
      resized[name] = f'{list(shape)} -> {here}'
    elif shape == leaf.shape:
      loaded[name] = here
    else:
      text = f'{here}, the source has {list(shape)}{_hint(name, shape, leaf.shape)}'
      (missing if may_miss(name) else wrong)[name] = text
  taken = sorted({*loaded, *resized})
  unused = {name: str(list(source.shapes[old])) for name, old in sorted(theirs.items()) if name not in taken}
  if wrong or not taken:
    raise CheckpointError(_refusal(source.name, wrong, ours, unused))
  shardings = {theirs[name]: _whole(ours[name].sharding) if moves[name] else ours[name].sharding for name in taken}
  arrays = source.fetch(shardings)
  new = ours | {name: _fit(arrays[theirs[name]], ours[name], moves[name]) for name in taken}
  tree = jax.tree.unflatten(jax.tree.structure(params), new.values())
  return tree, Report(source.name, loaded, resized, missing, unused)


def _compile(option: str, regex: str) -> re.Pattern:
  try:
    return re.compile(regex)
  except re.error as error:
    raise ConfigError(f'init_from.{option}: {regex!r} is not a regular expression: {error}') from error


def _renamed(names, rename) -> dict[str, str]:
  """{name after renaming: name in the source}."""
  new = {name: name for name in names}
  for regex, replacement in rename:
    pattern = _compile('rename', regex)
    before, new = new, {name: pattern.sub(replacement, now) for name, now in new.items()}
    if before == new:
      raise ConfigError(f'init_from.rename: {regex!r} matches no name of the source, such as {_few(before.values())}')
  back = {}
  for name, now in new.items():
    if now in back:
      raise ConfigError(f'init_from.rename makes both {back[now]} and {name} of the source {now}')
    back[now] = name
  return back


def _move(name, old_shape, new_shape, old_grid, new_grid):
  """(old grid, new grid, class rows) when `name` is a position table to be resized, else None."""
  tail = (len(old_shape) == len(new_shape) >= 2) and old_shape[:-2] == new_shape[:-2] and old_shape[-1] == new_shape[-1]
  if not name.endswith('pos_embed') or not tail:
    return None
  old_rows, new_rows, old_given, new_given = old_shape[-2], new_shape[-2], old_grid is not None, new_grid is not None
  if not new_given:
    class_rows = 0 if _root(new_rows, 2) else 1
    new_grid = (_root(new_rows - class_rows, 2),) * 2
  else:
    class_rows = new_rows - math.prod(new_grid)
  if old_rows == new_rows and not (old_given and new_given):
    return None  # the same grid, as far as anyone knows
  rank = len(new_grid)
  old_grid = old_grid if old_given else (_root(old_rows - class_rows, rank),) * rank
  known = class_rows >= 0 and all(new_grid) and all(old_grid) and len(old_grid) == rank
  fits = known and old_rows == class_rows + math.prod(old_grid)
  return (tuple(old_grid), tuple(new_grid), class_rows) if fits and tuple(old_grid) != tuple(new_grid) else None


def _root(count: int, rank: int) -> int:
  """Side of a square (cube, ...) of `count` cells, 0 when there is none."""
  side = round(max(count, 0) ** (1 / rank))
  return side if side**rank == count else 0


def _hint(name, old_shape, new_shape) -> str:
  if name.endswith('pos_embed'):
    return '; it is resized by itself between square grids with as many class rows, else give grid and old_grid'
  if '/blocks/' in name and old_shape[1:] == new_shape[1:]:
    return f'; {old_shape[0]} blocks do not make {new_shape[0]}'
  return ''


def _refusal(source, wrong, ours, unused) -> str:
  if not wrong:
    return (
      f'nothing in {source} fits: its names are such as {_few(unused)}, those needed such as {_few(ours)}; '
      'map them with init_from.rename'
    )
  rows = '\n'.join(f'  {name} {text}' for name, text in wrong.items())
  rest = f'Not used of the source: {_few(unused, 8)}. ' if unused else ''
  return (
    f'{len(wrong)} weights of {len(ours)} cannot be taken from {source}:\n{rows}\n{rest}'
    'Map names with init_from.rename, or name what may keep its first values with init_from.allow_missing (a regex)'
  )


def _few(names, count: int = 3) -> str:
  names = list(names)
  return ', '.join(names[:count]) + (f' and {len(names) - count} more' if len(names) > count else '')


def _whole(sharding: Sharding) -> Sharding:
  return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding


def _put(value: np.ndarray, sharding: Sharding) -> jax.Array:
  return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def _fit(array: jax.Array, leaf: jax.Array, move) -> jax.Array:
  """The array as `leaf` wants it: grid, dtype and sharding."""
  if move:
    whole = np.asarray(array.addressable_data(0))
    return _put(posemb.resample(whole, *move).astype(leaf.dtype), leaf.sharding)
  return array if array.dtype == leaf.dtype else jax.device_put(array.astype(leaf.dtype), leaf.sharding)
