"""Checkpoints of a run: saved in the background, complete or absent, checked by content, readable on any mesh.

Orbax's `CheckpointManager` does the writing: it commits a step by a rename after every process has written its part,
deletes old steps only after that, and removes what a killed process left behind. Two things it does not do are added
here: a checksum of every array, so that damage is noticed even where the files still decompress, and the fall back to
the step before a damaged one.

A step on disk is `STEP/state` (one flat dictionary, tree path -> array) and `STEP/meta` (JSON: the caller's meta, the
metrics, and dtype, shape and checksum of every array, all under a CRC).

With several processes every function here that touches the disk is collective: all processes call it, in the same
order. Reading avoids Orbax's barriers, at which a process that found damage would leave the others waiting: each
process reads on its own, then they agree.
"""

import contextlib
import dataclasses
import errno
import functools
import gc
import json
import logging
import math
import os
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from mim_jax.errors import CheckpointError, ConfigError

Tree = Any
T = TypeVar('T')

log = logging.getLogger(__name__)


class Broken(Exception):
  """A checkpoint that is damaged; the text says how. Raised on all processes alike."""


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One stored array: name of its dtype, shape, and checksum of its content."""

  dtype: str
  shape: tuple[int, ...]
  checksum: int

  def __str__(self):
    return f'{self.dtype}{list(self.shape)}'


@dataclasses.dataclass(frozen=True)
class Contents:
  """What a step holds: the caller's meta, the metrics it was saved with (or None), and the leaf at every tree path."""

  directory: epath.Path
  meta: dict
  metrics: dict[str, float] | None
  leaves: dict[str, Leaf]

  def load(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Reads the arrays at the tree paths of `wanted` onto the shardings given there, verifying them. Collective.

    Shapes and dtypes in `wanted` are the stored ones. Raises Broken when an array is unreadable or not what was saved.
    """
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})

    def read():
      handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
      with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
        targets = ocp.checkpoint_utils.construct_restore_args(dict(wanted))
        args = ocp.args.PyTreeRestore(dict(wanted), restore_args=targets, partial_restore=True)
        arrays = reader.restore(self.directory / 'state', args=args)
      # Orbax leaves out what it does not find, and gives keys as plain integers when the file that says so is gone.
      lost = [path for path, x in arrays.items() if not isinstance(x, jax.Array) or x.dtype != wanted[path].dtype]
      if lost:
        raise ValueError(f'{_some(lost)} cannot be found')
      return arrays

    arrays = _together(read)
    differing = [path for path, value in checksums(arrays).items() if value != self.leaves[path].checksum]
    if differing:
      raise Broken(f'the content of {_some(differing)} is not what was saved')
    return arrays


def flatten(tree: Tree) -> dict[str, Any]:
  """Tree -> {path: leaf}, path parts (keys, field names, positions) joined by '/'."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}


def checksums(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
  """A 32-bit checksum of the bits of each array, whatever its sharding and the number of devices. Collective.

  Each word (narrow elements are widened to 32 bits) is combined with its position and scrambled by a bijection; the
  results are added modulo 2^32. A sum does not depend on the order, so every device adds up what it holds. One changed
  element always changes the sum.
  """
  if not arrays:
    return {}
  meshes = [x.sharding.mesh for x in arrays.values() if isinstance(x.sharding, NamedSharding)]
  everywhere = NamedSharding(meshes[0], PartitionSpec()) if meshes else None
  sums = _checksum_function(everywhere)(list(arrays.values()))
  return dict(zip(arrays, np.asarray(sums.addressable_data(0)).tolist(), strict=True))


@functools.cache
def _checksum_function(out_sharding):
  return jax.jit(lambda arrays: jnp.stack([_checksum(x) for x in arrays]), out_shardings=out_sharding)


def _checksum(x):
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  narrow = {1: jnp.uint8, 2: jnp.uint16}
  words = jax.lax.bitcast_convert_type(x, narrow.get(x.dtype.itemsize, jnp.uint32)).astype(jnp.uint32)
  position = jnp.zeros(words.shape, jnp.uint32)  # row-major, modulo 2^32
  for axis, size in enumerate(words.shape):
    position = position * np.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
  h = words ^ ((position + np.uint32(1)) * np.uint32(0x9E3779B9))
  h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)  # the finalizer of MurmurHash3
  h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
  return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)


def absolute(directory) -> epath.Path:
  """A local path made absolute, as Orbax wants it; bucket URLs are left alone."""
  return epath.Path(directory) if '://' in str(directory) else epath.Path(os.path.abspath(directory))


def list_steps(directory) -> list[int]:
  """Complete steps in `directory` (none if it does not exist), ascending: process 0 looks and tells. Collective."""
  steps = np.zeros(0, np.int32)
  if jax.process_index() == 0:
    found = ocp.path.step.standard_name_format().find_all(absolute(directory))
    steps = np.sort(np.array([step.step for step in found], np.int32))
  if jax.process_count() > 1:
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
    steps = multihost_utils.broadcast_one_to_all(np.resize(steps, count))
  return [int(step) for step in steps]


def read_contents(directory) -> Contents:
  """Contents of the step in `directory`. Collective. Raises Broken when its meta file cannot be read or trusted."""

  def read():
    body = dict(ocp.JsonCheckpointHandler().restore(absolute(directory) / 'meta'))
    if body.pop('crc32') != _crc(body):
      raise ValueError('the meta file does not match its CRC')
    leaves = {path: Leaf(dtype, tuple(shape), value) for path, (dtype, shape, value) in body['leaves'].items()}
    return Contents(absolute(directory), body['meta'], body['metrics'], leaves)

  return _together(read)


def newest_good(directory, steps: Sequence[int], use: Callable[[Contents], T], refused: list) -> T | None:
  """`use(contents)` of the newest of `steps` (ascending) for which it does not raise Broken. Collective.

  Damaged steps are named in a warning and added to `refused` as (step, reason). Returns None when there are no steps;
  raises CheckpointError when all are damaged.
  """
  for step in reversed(steps):
    path = absolute(directory) / str(step)
    try:
      return use(read_contents(path))
    except Broken as error:
      refused.append((step, str(error)))
      log.warning('checkpoint %s is damaged and not used, the one before is tried: %s', path, error)
  if steps:
    listed = '\n'.join(f'  step {step}: {reason}' for step, reason in refused)
    raise CheckpointError(
      f'every checkpoint in {directory} is damaged:\n{listed}\n'
      'Restore the folder from a copy, or move it away to start from step 0'
    )
  return None


def _together(read: Callable[[], T]) -> T:
  """`read()` on every process; where it fails on one, Broken is raised on all."""
  good, reason = True, 'another process could not read its part'
  with _quiet():
    try:
      result = read()
    except (MemoryError, PermissionError):  # these say nothing about the checkpoint
      raise
    except Exception as error:  # damaged files make Orbax and TensorStore raise nearly anything
      text = str(error).split(' [tensorstore_spec')[0]  # the settings take pages
      good, reason = False, f'{type(error).__name__}: {text}'
    if not good:
      gc.collect()  # the reads that Orbax abandons complain when they are collected: let them do it here
  if jax.process_count() > 1:
    good = bool(np.all(multihost_utils.process_allgather(np.array(good))))
  if not good:
    raise Broken(reason)
  return result


@contextlib.contextmanager
def _quiet():
  """Hides the pages that Orbax's other reads print when they fail after a first one has ended the wait for all."""
  logger, hook = logging.getLogger('asyncio'), sys.unraisablehook
  was, logger.disabled, sys.unraisablehook = logger.disabled, True, lambda _: None
  try:
    yield
  finally:
    logger.disabled, sys.unraisablehook = was, hook


def _crc(body: Mapping) -> int:
  return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _some(items: Sequence[str], count: int = 5) -> str:
  return ', '.join(items[:count]) + (f' and {len(items) - count} more' if len(items) > count else '')


@dataclasses.dataclass
class _Retention:
  """Which steps stay: the last `keep`, those divisible by `every`, the best. Damaged ones neither stay nor count."""

  keep: int | None
  every: int | None
  sign: int  # 1: the highest score is best, -1: the lowest
  scores: dict[int, float] = dataclasses.field(default_factory=dict)  # by step
  damaged: set[int] = dataclasses.field(default_factory=set)

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    del context
    steps = sorted(info.step for info in checkpoints if info.step not in self.damaged)
    stay = set(steps if self.keep is None else steps[-self.keep :])
    stay.update(step for step in steps if self.every and step % self.every == 0)
    scored = [step for step in steps if step in self.scores]
    if scored:
      stay.add(max(scored, key=lambda step: (self.sign * self.scores[step], step)))
    return [info.step in stay for info in checkpoints]


class Manager:
  """The checkpoints of one run. Making and restoring write nothing; the first save makes and tidies the folder.

  Attributes:
    directory: holds one folder per step.
    refused: (step, reason) of every damaged checkpoint that `restore` met.

  Args:
    keep: how many of the newest steps to keep; None for all.
    keep_every: also keep steps divisible by this.
    best: also keep the step with the best value of this metric.
    best_mode: 'max' or 'min'.
    asynchronous: write in the background.
  """

  def __init__(
    self,
    directory,
    keep: int | None = 3,
    keep_every: int | None = None,
    best: str | None = None,
    best_mode: str = 'max',
    asynchronous: bool = True,
  ):
    if keep is not None and keep < 1:
      raise ConfigError(f'checkpoint.keep is {keep}; keep at least 1, or None for all')
    if keep_every is not None and keep_every < 1:
      raise ConfigError(f'checkpoint.keep_every is {keep_every} steps; give 1 or more, or None')
    if best_mode not in ('max', 'min'):
      raise ConfigError(f"checkpoint.best_mode is {best_mode!r}; expected 'max' or 'min'")
    self.directory = absolute(directory)
    self.refused: list[tuple[int, str]] = []
    self._best = best
    self._retention = _Retention(keep, keep_every, 1 if best_mode == 'max' else -1)
    self._asynchronous = asynchronous
    self._orbax = None
    self._saving = ''  # what is being saved, for an error that comes later

  def steps(self) -> list[int]:
    """Complete steps, ascending, without those that `restore` found damaged. Collective."""
    return [step for step in list_steps(self.directory) if step not in self._retention.damaged]

  def save(
    self, step: int, train_state: Tree, meta: Mapping[str, Any], metrics: Mapping[str, float] | None = None
  ) -> bool:
    """Saves a tree of arrays; returns once it is copied to the host, so its buffers may be donated. Collective.

    A step that exists already is left as it is (False is returned), unless it is damaged: then it is replaced.

    Args:
      meta: anything JSON can hold, the same on all processes; comes back from `restore` together with 'step'.
      metrics: values of which `best` may be one.

    Raises:
      CheckpointError: this save, or the one before while it was still being written, failed. Older steps are intact.
    """
    self.wait()
    older = self.steps()
    if step in older:
      return False
    arrays = flatten(train_state)
    metrics = None if metrics is None else {name: float(value) for name, value in metrics.items()}
    leaves = {path: (str(arrays[path].dtype), arrays[path].shape, value) for path, value in checksums(arrays).items()}
    body = json.loads(json.dumps({'meta': {'step': step, **meta}, 'metrics': metrics, 'leaves': leaves}))
    body['crc32'] = _crc(body)
    size = sum(x.nbytes for x in arrays.values()) / 1e6
    newest = f'step {older[-1]} is the newest complete one and intact' if older else 'there is no older one'
    self._saving = f'the checkpoint of step {step} ({size:.1f} MB before compression) in {self.directory}; {newest}'
    with self._explained():
      if self._orbax is None:
        self._orbax = self._open()
      if step in self._retention.damaged:
        self._orbax.delete(step)
        self._retention.damaged.discard(step)
      self._score(step, metrics)
      args = ocp.args.Composite(state=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(body))
      self._orbax.save(step, args=args, force=True)
    return True

  def restore(self, abstract_state: Tree, step: int | None = None) -> tuple[Tree, dict] | None:
    """The newest undamaged checkpoint as (train state, meta), or None when there is no checkpoint. Collective.

    Args:
      abstract_state: tree of arrays or ShapeDtypeStructs that carry the shardings wanted; any mesh will do.
      step: only the checkpoint of this step will do.

    Raises:
      CheckpointError: the checkpoint holds other arrays than `abstract_state`, or every checkpoint is damaged.
    """
    self.wait()
    wanted = {
      path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for path, x in flatten(abstract_state).items()
    }
    refused = []

    def use(contents: Contents):
      _check_fit(contents, wanted)
      arrays = contents.load(wanted)
      return jax.tree.unflatten(jax.tree.structure(abstract_state), [arrays[path] for path in wanted]), contents.meta

    try:
      return newest_good(self.directory, self.steps() if step is None else [step], use, refused)
    finally:
      self.refused += refused
      self._retention.damaged.update(step for step, _ in refused)

  def wait(self):
    """Returns when the save under way, if any, is complete on disk. Collective. Raises CheckpointError if it failed."""
    if self._orbax is not None:
      with self._explained():
        self._orbax.wait_until_finished()

  def close(self):
    """Waits, then frees Orbax's threads. Collective. Raises as `wait` does; a failure told before is not told again."""
    if self._orbax is not None:
      with self._explained():
        self._orbax.close()  # waits first
      self._orbax = None

  def _open(self):
    """Orbax's manager, which on its start removes the folders of saves that never completed."""
    steps = self.steps()
    options = ocp.CheckpointManagerOptions(
      preservation_policy=self._retention,
      enable_async_checkpointing=self._asynchronous,
      cleanup_tmp_directories=True,
      lightweight_initialize=True,  # scores come from our own meta, whose CRC is checked
      save_root_metadata=False,
    )
    manager = ocp.CheckpointManager(self.directory, options=options)
    for step in steps if self._best else ():
      with contextlib.suppress(Broken):  # no score to be had; whether the step is used is for `restore` to decide
        self._score(step, read_contents(self.directory / str(step)).metrics)
    return manager

  def _let_go(self):
    """Closes Orbax's manager after a failed save, without a word: what else of that save fails is no news."""
    orbax, self._orbax = self._orbax, None
    for _ in range(4 if orbax else 0):  # each of its three parts raises its error once and leaves the next ones open
      try:
        orbax.close()
        break
      except Exception:
        log.debug('closing after a failed save', exc_info=True)

  def _score(self, step: int, metrics: Mapping[str, float] | None):
    value = (metrics or {}).get(self._best, math.nan)
    if not math.isnan(value):
      self._retention.scores[step] = value

  @contextlib.contextmanager
  def _explained(self):
    """Turns the errors of a save into one CheckpointError; the next save opens Orbax's manager anew."""
    try:
      yield
    except (OSError, ValueError, RuntimeError) as error:
      self._let_go()
      if _disk_is_full(error):
        raise CheckpointError(
          f'no space left on the disk for {self._saving}. Free space there (or lower checkpoint.keep), then start the '
          'same command again: it goes on from the newest complete checkpoint'
        ) from error
      raise CheckpointError(f'could not write {self._saving}. The reason: {error}') from error


def _check_fit(contents: Contents, wanted: Mapping[str, Any]):
  """Raises CheckpointError naming the first paths at which a checkpoint and the arrays wanted differ, params first."""
  here = {path: f'{x.dtype}{list(x.shape)}' for path, x in wanted.items()}
  there = {path: str(leaf) for path, leaf in contents.leaves.items()}
  paths = sorted(here.keys() | there.keys(), key=lambda path: (not path.startswith('params/'), path))
  differing = [path for path in paths if here.get(path) != there.get(path)]
  if differing:
    none = 'has none'
    lines = '\n'.join(f'  {p}: checkpoint {there.get(p, none)}, config {here.get(p, none)}' for p in differing[:8])
    raise CheckpointError(
      f'checkpoint {contents.directory} is not of this config: {len(differing)} of {len(paths)} arrays differ, first\n'
      f'{lines}\nTrain in another --workdir, or take what fits with --config.init_from.path={contents.directory}'
    )


def _disk_is_full(error: BaseException) -> bool:
  codes = (errno.ENOSPC, errno.EDQUOT)  # TensorStore raises ValueError with the system's words for them
  return getattr(error, 'errno', None) in codes or any(os.strerror(code) in str(error) for code in codes)
