"""From a world to a data set on disk: options, random streams, parallel writing, atomic preparation.

The result is what TFDS itself would write (features.json, dataset_info.json, label names, ArrayRecord shards), without
TensorFlow. Example i of a split is record i of that split: nothing is shuffled on the way.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import queue
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Mapping

import cv2
import numpy as np

from mim_jax.errors import ConfigError, UserError, nearest

SHARD = 1024  # most examples in a file
_BEAT = 64  # examples between two words of progress from a worker


@dataclasses.dataclass(frozen=True)
class World:
  """A synthetic data set: what is in an example, and how example number `index` is made.

  Attributes:
    name: also the name of its module, which holds it as WORLD.
    version: three numbers; a change of any example for the same options needs a new one.
    description: one or two sentences.
    defaults: option -> default value, whose type every value must have. `seed` is among them, and for each split an
      option of its name with the number of examples.
    limits: option -> (least, greatest), both allowed.
    splits: names of the splits.
    features: options -> dict of TFDS features.
    example: (options, split, index) -> dict with a value for each feature; a pure function (see `stream`).
    metadata: options -> what a reader cannot see from the features, as JSON values (names of table columns and such).
  """

  name: str
  version: str
  description: str
  defaults: Mapping[str, int | float | str | bool]
  limits: Mapping[str, tuple[float, float]]
  splits: tuple[str, ...]
  features: Callable[[dict], dict]
  example: Callable[[dict, str, int], dict]
  metadata: Callable[[dict], dict]

  def options(self, **given) -> dict:
    """All options: `given` (values, or text as in a spec) over the defaults. Raises ConfigError for a wrong one."""
    chosen = dict(self.defaults)
    for key, value in given.items():
      if key not in chosen:
        raise ConfigError(f'synthetic:{self.name} has no option {key!r}; {nearest(key, chosen)}')
      chosen[key] = self._value(key, value)
    if not any(chosen[split] for split in self.splits):
      raise ConfigError(f'synthetic:{self.name}: {", ".join(self.splits)} are all 0; expected some examples')
    return chosen

  def _value(self, key, value):
    kind = type(self.defaults[key])
    words = {'true': True, 'false': False}
    try:
      if isinstance(value, str):
        value = words[value.lower()] if kind is bool else kind(value)
      if kind is float and type(value) is int:
        value = float(value)
      if type(value) is not kind:
        raise TypeError
    except (ValueError, KeyError, TypeError):
      default = self.defaults[key]
      raise ConfigError(
        f'synthetic:{self.name}: {key} is {value!r}; expected {kind.__name__}, such as {key}={default}'
      ) from None
    low, high = self.limits.get(key, (value, value))
    if not low <= value <= high:
      raise ConfigError(f'synthetic:{self.name}: {key} is {value!r}; expected {low} to {high}')
    return value

  def config(self, options) -> str:
    """Name of the folder for these options: all of them, so that no two choices share one."""
    return '-'.join(f'{key}_{options[key]}' for key in self.defaults)


def stream(seed, name, index) -> np.random.Generator:
  """The random numbers of example `index` of `name` (such as 'shapes/train'): independent of those of any other."""
  return np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(name.encode())], counter=[0, 0, 0, index]))


def png(image) -> bytes:
  """PNG of an image [H, W, 3] (RGB) or [H, W], uint8 or uint16; fast rather than small."""
  if image.ndim == 3:
    image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
  return cv2.imencode('.png', image, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()


def prepare(world, options, folder, workers=None):
  """Writes the data set into `folder` unless it is there; gives `folder`. See `worlds.prepare`."""
  from mim_jax.data import worlds

  if worlds.is_prepared(folder):
    return folder
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = open(folder.parent / f'.{folder.name}.lock', 'w')  # noqa: SIM115 (held open below)
  except OSError as e:
    raise UserError(
      f'cannot write synthetic:{world.name} to {folder.parent} ({e}); set data_dir or $MIM_JAX_DATA'
    ) from e
  with lock:
    _take(lock, folder)
    if worlds.is_prepared(folder):
      return folder
    # The lock says that nobody on this machine is at work; another machine may be, on a shared disk.
    ours = f'.{folder.name}.unfinished-{socket.gethostname()}-'
    for old in folder.parent.glob(f'{ours}*'):
      shutil.rmtree(old, ignore_errors=True)
    unfinished = tempfile.mkdtemp(prefix=ours, dir=folder.parent)
    try:
      _write(world, options, unfinished, folder, workers or len(os.sched_getaffinity(0)))
      os.chmod(unfinished, 0o755)
      try:
        os.rename(unfinished, folder)
      except OSError as e:
        if not worlds.is_prepared(folder):  # by another machine, meanwhile
          raise UserError(f'{folder} is in the way and no whole data set ({e}); delete it and prepare again') from e
    finally:
      shutil.rmtree(unfinished, ignore_errors=True)
  return folder


def _take(lock, folder):
  """Waits for the lock, which the system frees when its holder ends, however it ends."""
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    print(f'waiting for another process that prepares {folder}', file=sys.stderr, flush=True)
    fcntl.flock(lock, fcntl.LOCK_EX)


def _shards(world, options):
  """All files to write: [(split, number, of, first, end)], of about equal length."""
  shards = []
  for split in world.splits:
    count = -(-options[split] // SHARD)
    ends = [options[split] * (k + 1) // count for k in range(count)]
    shards += [(split, k, count, begin, end) for k, (begin, end) in enumerate(zip([0, *ends], ends, strict=False))]
  return shards


def _write(world, options, unfinished, folder, workers):
  """Renders all shards into the folder `unfinished` and adds what TFDS needs to read them in `folder`."""
  shards = _shards(world, options)
  workers = min(workers, len(shards))
  total = sum(options[split] for split in world.splits)
  say = lambda text: print(text, file=sys.stderr, flush=True)
  say(f'preparing synthetic:{world.name} ({world.config(options)}): {total} examples, {workers} process(es)')
  began = shown = time.monotonic()
  done, written = 0, {}
  with contextlib.closing(_work(world, options, unfinished, shards, workers)) as events:
    for event in events:
      if isinstance(event, int):
        done += event
      else:
        split, number, size = event
        written[split, number] = size
      now = time.monotonic()
      if now - shown > 3 and 0 < done < total:
        shown = now
        left = (total - done) * (now - began) / done
        say(f'  {done} of {total} examples, {done / (now - began):.0f}/s, {left:.0f} s left')
  _describe(world, options, unfinished, shards, written)
  say(f'prepared {folder} in {time.monotonic() - began:.0f} s, {sum(written.values()) / 1e6:.0f} MB')


def _work(world, options, folder, shards, workers):
  """Runs `write_shards` in this process or in several, yielding its events as they come."""
  if workers == 1:
    yield from write_shards(world, options, folder, shards)
    return
  # Plain child processes: they need nothing of this one, which may hold devices, threads or an unguarded main module.
  code = 'from mim_jax.data.worlds import build; build.serve()'
  env = {**os.environ, 'PYTHONPATH': os.pathsep.join(p or os.getcwd() for p in sys.path), 'OPENBLAS_NUM_THREADS': '1'}
  events = queue.Queue()
  with contextlib.ExitStack() as stack:
    for k in range(workers):
      job, errors = (stack.enter_context(tempfile.TemporaryFile('w+')) for _ in range(2))
      json.dump({'world': world.name, 'options': options, 'folder': folder, 'shards': shards[k::workers]}, job)
      job.seek(0)
      call = [sys.executable, '-c', code]
      child = subprocess.Popen(call, env=env, text=True, stdin=job, stdout=subprocess.PIPE, stderr=errors)
      stack.callback(child.stdout.close)
      listener = threading.Thread(target=_listen, args=(child, errors, events))
      listener.start()
      stack.callback(listener.join)
      stack.callback(child.kill)  # the first of these to be called; does nothing to one that has ended
    running = workers
    while running:
      event = events.get()
      if event is None:
        running -= 1
      elif isinstance(event, str):
        raise RuntimeError(f'a process that renders synthetic:{world.name} failed:\n{event}')
      else:
        yield event


def _listen(child, errors, events):
  """Passes on what a worker reports; then None, or its error as text."""
  for line in child.stdout:
    events.put(json.loads(line))
  if child.wait() == 0:
    events.put(None)
    return
  errors.seek(0)
  events.put(f'exit code {child.returncode}\n{errors.read()[-4000:]}')


def serve():
  """The main function of a worker: a job in JSON on stdin, events in JSON on stdout, until a reader is gone."""
  from mim_jax.data import worlds

  cv2.setNumThreads(1)
  job = json.load(sys.stdin)
  for event in write_shards(worlds.get(job['world']), job['options'], job['folder'], job['shards']):
    print(json.dumps(event), flush=True)


def write_shards(world, options, folder, shards):
  """Renders and writes shards; yields numbers of examples that are done, and (split, number, bytes) per file."""
  import tensorflow_datasets as tfds
  from array_record.python import array_record_module

  features = tfds.features.FeaturesDict(world.features(options))
  serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
  for split, number, count, begin, end in shards:
    template = _template(world, folder, split)
    writer = array_record_module.ArrayRecordWriter(
      str(template.sharded_filepath(shard_index=number, num_shards=count)), 'group_size:1'
    )
    size = told = 0
    for index in range(begin, end):
      example = serializer.get_tf_example(features.encode_example(world.example(options, split, index)))
      record = example.SerializeToString(deterministic=True)  # else fields come in any order and files differ by run
      writer.write(record)
      size += len(record)
      if (index + 1 - begin) % _BEAT == 0 or index + 1 == end:
        yield index + 1 - begin - told
        told = index + 1 - begin
    writer.close()
    yield split, number, size


def _template(world, folder, split=None):
  import tensorflow_datasets as tfds

  return tfds.core.ShardedFileTemplate(
    data_dir=folder, dataset_name=world.name, split=split, filetype_suffix='array_record'
  )


def _describe(world, options, folder, shards, written):
  """Writes dataset_info.json, features.json, label names and metadata.json of the finished shards into `folder`."""
  import tensorflow_datasets as tfds

  identity = tfds.core.dataset_info.DatasetIdentity(
    name=world.name,
    version=tfds.core.Version(world.version),
    data_dir=folder,
    module_name=f'mim_jax.data.worlds.{world.name}',
    config_name=world.config(options),
    config_description=', '.join(f'{k}={v}' for k, v in options.items()),
  )
  info = tfds.core.DatasetInfo(
    builder=identity,
    description=world.description,
    features=tfds.features.FeaturesDict(world.features(options)),
    disable_shuffling=True,  # records keep their order
    metadata=tfds.core.MetadataDict({'options': options, **world.metadata(options)}),
  )
  info.set_file_format('array_record')
  splits = []
  for split in world.splits:
    mine = [s for s in shards if s[0] == split]
    if mine:
      lengths = [end - begin for *_, begin, end in mine]
      size = sum(written[split, number] for _, number, *_ in mine)
      splits.append(
        tfds.core.SplitInfo(
          name=split, shard_lengths=lengths, num_bytes=size, filename_template=_template(world, folder, split)
        )
      )
  info.set_splits(tfds.core.splits.SplitDict(splits))
  info.write_to_directory(folder)
