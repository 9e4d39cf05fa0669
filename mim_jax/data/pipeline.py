"""Batches as a function of (seed, step): the same for any number of hosts, threads and restarts.

Position p = step * batch_size + slot counts through the endless shuffled repetition of the data. It alone decides
which example stands there and how it is augmented, so a run resumes at a step by asking for that step, and a host makes
its rows of the global batch by asking for those slots.
"""

import functools
import queue
import sys
import threading
from typing import NamedTuple

import grain
import jax
import numpy as np

from mim_jax.data.decoding import DecodeError
from mim_jax.data.order import AUGMENT, Order, words
from mim_jax.data.sources import CorruptExample
from mim_jax.errors import ConfigError, MissingData, UserError

ROWS = 64  # rows that a thread makes at a time: enough to hide the cost of handing over, few enough to share a batch
_TRAIN, _ONCE = range(2)  # streams of augmentation


class Fault(NamedTuple):
  """An example that was replaced: where it should have been, its name, and why it could not be read."""

  step: int
  key: str
  error: str


class _Closed(Exception):
  """The iterator was closed while a thread was at work."""


class Pipeline:
  """Turns a source into batches.

  A batch is a dict of numpy arrays with leading dim rows: the fields of the examples after the transforms, and
  `corrupt` bool. In the place of an example that cannot be read stands the next readable one of the same global batch,
  with `corrupt` set and with the augmentation of the place; what was wrong goes to `faults`.

  Args:
    source: a Source or a Mixture.
    chain: transforms, as images.parse gives: `chain.example(example, rng) -> example`, then `chain.batch(batch)
      -> batch` on stacked arrays, row by row.
    batch_size: examples per step over all hosts.
    seed: of order and augmentation.
    shuffle: False keeps the order of the source.
    rows: the part of the global batch that this process needs, as range(start, stop); all of it by default.
    threads: reading threads; 0 reads in the caller's.
    prefetch: batches made ahead by `iterate` and `once`.
    fields: names that a batch must have; None for every field that is not text.
  """

  def __init__(self, source, chain, batch_size, seed=0, shuffle=True, rows=None, threads=4, prefetch=2, fields=None):
    self.rows = range(batch_size) if rows is None else rows
    if not 0 <= self.rows.start < self.rows.stop <= batch_size or self.rows.step != 1:
      raise ConfigError(f'rows {self.rows} are not a part of a batch of {batch_size}')
    self.source, self.chain, self.batch_size = source, chain, batch_size
    self.fields = None if fields is None else tuple(fields)
    self.threads, self.prefetch = threads, prefetch
    self.faults: list[Fault] = []
    self._order = Order(source, seed, shuffle)
    self._key = words(seed, AUGMENT)
    self._reader = source if fields is None else source.select({*fields, 'image'})

  def batch(self, step):
    """This process's rows of the batch of `step` (0, 1, ...)."""
    return self._deliver(self._train_part(step, self.rows))

  def iterate(self, start=0, stop=None):
    """Iterator of (step, batch) from `start` on, made ahead in threads; endless if `stop` is None. Has `close()`."""
    stop = sys.maxsize // (2 * len(self.rows)) if stop is None else stop
    return Batches(self, self._train_part, start, stop, self.rows)

  def once(self, batch_size=None, rows=None):
    """Iterator of (step, batch) over each example once, in the order of the source, for evaluation. Has `close()`.

    The last batch is filled up. `weight` float32 is 1 for an example, 0 for filling and for one that could not be read.
    With another `batch_size` than that of the pipeline, `rows` is the same share of it.
    """
    batch_size = batch_size or self.batch_size
    if rows is None:
      start, stop = (v * batch_size / self.batch_size for v in (self.rows.start, self.rows.stop))
      if start % 1 or stop % 1:
        raise ConfigError(
          f'an evaluation batch of {batch_size} cannot be shared out as rows {self.rows} of {self.batch_size} are; '
          'choose a multiple of the number of devices'
        )
      rows = range(int(start), int(stop))
    part = functools.partial(self._once_part, batch_size)
    return Batches(self, part, 0, -(-len(self.source) // batch_size), rows)

  def spec(self):
    """Shape and dtype of each field of the global batch, from the first readable example; raises as a batch would."""
    tried = min(64, len(self.source))
    batch, _ = self._part(0, range(1), lambda slots: slots, tried, _ONCE)
    return {k: jax.ShapeDtypeStruct((self.batch_size, *v.shape[1:]), v.dtype) for k, v in batch.items()}

  def _train_part(self, step, slots, stopped=None):
    first = step * self.batch_size
    return self._part(step, slots, lambda s: self._order(s + first), self.batch_size, _TRAIN, stopped)

  def _once_part(self, batch_size, step, slots, stopped=None):
    last = len(self.source) - 1 - step * batch_size
    index = lambda s: np.minimum(s, last) + step * batch_size
    batch, faults = self._part(step, slots, index, batch_size, _ONCE, stopped)
    real = np.arange(slots.start, slots.stop) <= last
    batch['corrupt'] &= real
    batch['weight'] = (real & ~batch['corrupt']).astype(np.float32)
    return batch, [(slot, fault) for slot, fault in faults if slot <= last]

  def _part(self, step, slots, index, batch_size, stream, stopped=None):
    """Rows `slots` of the batch of `step`, and [(slot, Fault)]; `index` maps slots, int64 [n], to examples."""
    rng = np.random.Generator(np.random.Philox(key=self._key))
    state = rng.bit_generator.state  # setting it costs 1 us, a generator per example would cost ten
    counter = state['state']['counter']
    counter[3] = stream
    first = step * batch_size

    def augmented(slot, raw):
      if stopped is not None and stopped.is_set():
        raise _Closed
      if isinstance(raw, CorruptExample):
        raise raw
      counter[2] = first + slot  # words 0 and 1 count the draws within an example
      rng.bit_generator.state = state
      return self.chain.example(raw, rng)

    numbers = index(np.arange(slots.start, slots.stop, dtype=np.int64))
    raws = self._reader.getmany(numbers)
    examples, faults = [], []
    for slot, number, raw in zip(slots, numbers.tolist(), raws, strict=True):
      try:
        examples.append(augmented(slot, raw))
        continue
      except (CorruptExample, DecodeError) as e:
        fault = Fault(step, self.source.key(number), str(e))
      except _Closed:
        raise
      except Exception as e:
        raise self._named(e, number) from e
      faults.append((slot, fault))
      examples.append(self._replacement(slot, fault, batch_size, index, augmented))
    batch = self._stack(examples, numbers)
    batch['corrupt'] = np.isin(np.arange(slots.start, slots.stop), [slot for slot, _ in faults])
    return batch, faults

  def _replacement(self, slot, fault, batch_size, index, augmented):
    for k in range(1, batch_size):
      number = int(index(np.array([(slot + k) % batch_size], np.int64))[0])
      try:
        return augmented(slot, self._reader.getmany([number])[0])
      except (CorruptExample, DecodeError):
        continue  # reported by the process that owns its slot
    raise MissingData(
      f'none of {batch_size} examples at step {fault.step} is whole; {fault.key} of {self.source.name}: {fault.error}. '
      'Check the files, and that data.source is what was meant'
    )

  def _named(self, error, number):
    """The error again, with the name of the example in its message."""
    where = f'example {self.source.key(number)} of {self.source.name}'
    if isinstance(error, UserError):
      return type(error)(f'{error} ({where})')
    return RuntimeError(f'{type(error).__name__}: {error} ({where})')

  def _stack(self, examples, numbers):
    first = examples[0]
    names = first if self.fields is None else self.fields
    batch = {}
    for k in names:
      if k not in first:
        raise ConfigError(
          f'field {k!r} is missing; {self.source.name} gives {", ".join(sorted(first))} after the transforms; change '
          'data.source or data.transforms'
        )
      if isinstance(first[k], str | bytes) or np.asarray(first[k]).dtype.kind in 'OUS':
        if self.fields is None:
          continue
        raise ConfigError(
          f'field {k!r} of {self.source.name} is text, a batch holds numbers; add a transform that turns it into tokens'
        )
      try:
        values = np.stack([e[k] for e in examples]) if np.ndim(first[k]) else np.array([e[k] for e in examples])
      except (KeyError, ValueError) as e:
        raise self._ragged(k, examples, numbers) from e
      batch[k] = _narrow(k, values)
    return self.chain.batch(batch)

  def _ragged(self, name, examples, numbers):
    shapes = [np.shape(e[name]) if name in e else 'nothing' for e in examples]
    odd = next(i for i, s in enumerate(shapes) if s != shapes[0])
    return ConfigError(
      f'field {name!r} has shape {shapes[0]} at {self.source.key(int(numbers[0]))} and {shapes[odd]} at '
      f'{self.source.key(int(numbers[odd]))}; a batch needs one shape: add a crop or resize to data.transforms'
    )

  def _deliver(self, part):
    batch, faults = part
    self.faults += [fault for _, fault in faults]
    return batch


def _narrow(name, values):
  """64-bit numbers as 32 bits, which is what jax holds."""
  if values.dtype == np.float64:
    return values.astype(np.float32)
  if values.dtype.kind in 'iu' and values.dtype.itemsize == 8:
    if values.size and (values.max() > np.iinfo(np.int32).max or values.min() < np.iinfo(np.int32).min):
      raise ConfigError(f'field {name!r} holds {values.max()}, more than the 32 bits of jax; renumber it')
    return values.astype(np.int32)
  return values


class Batches:
  """Iterator of (step, batch), made ahead by Grain's threads; `close()`, or leaving its `with`, ends them at once."""

  def __init__(self, pipeline, part, start, stop, rows):
    self._pipeline, self._step = pipeline, start
    cuts = [range(a, min(a + ROWS, rows.stop)) for a in range(rows.start, rows.stop, ROWS)]
    self._cuts = len(cuts)
    self._stopped = stopped = threading.Event()

    def make(number):
      step, cut = divmod(number, len(cuts))
      if stopped.is_set():
        raise _Closed
      return part(step, cuts[cut], stopped)

    threads = pipeline.threads if pipeline.prefetch else 0
    # Each thread works on a part of its own, so there are at least as many parts under way as threads.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(pipeline.prefetch * self._cuts, threads))
    parts = grain.MapDataset.range(start * self._cuts, stop * self._cuts).map(make)
    self._parts = iter(parts.to_iter_dataset(options))
    if threads:
      self._parts.start_prefetch()

  def __iter__(self):
    return self

  def __next__(self):
    try:
      parts = [self._pipeline._deliver(next(self._parts)) for _ in range(self._cuts)]
    except Exception:
      if self._stopped.is_set():  # closed from another thread while this one waited
        raise StopIteration from None
      self.close()
      raise
    batch = parts[0] if len(parts) == 1 else {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    self._step += 1
    return self._step - 1, batch

  def close(self):
    self._stopped.set()
    self._parts.close()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()


def to_device(batches, sharding, prefetch=2):
  """Iterator of (step, batch of global jax arrays) from one of (step, local rows), moved in a thread of its own.

  Args:
    batches: what `Pipeline.iterate` or `once` gives; it is closed together with the result.
    sharding: of every array, over the leading dim. Processes that share rows (a mesh axis such as `tensor` spans them)
      each give the same rows.
    prefetch: batches held on the devices beside the one in use.
  """
  return _Transfer(batches, sharding, prefetch)


class _Transfer:
  def __init__(self, batches, sharding, prefetch):
    self._batches, self._sharding = batches, sharding
    self._queue = queue.Queue(max(1, prefetch))
    self._stopped = threading.Event()
    self._thread = threading.Thread(target=self._run, name='mim-jax-transfer', daemon=True)
    self._thread.start()

  def _run(self):
    try:
      for step, batch in self._batches:
        arrays = jax.make_array_from_process_local_data(self._sharding, batch)
        if not self._put((step, arrays)):
          return
      self._put(StopIteration())
    except BaseException as e:  # all of them go to the consumer: a thread that died in silence would hang the run
      self._put(e)

  def _put(self, item):
    while not self._stopped.is_set():
      try:
        self._queue.put(item, timeout=0.1)
      except queue.Full:
        continue
      return True
    return False

  def __iter__(self):
    return self

  def __next__(self):
    while not self._stopped.is_set():
      try:
        item = self._queue.get(timeout=0.1)
      except queue.Empty:
        continue
      if not isinstance(item, BaseException):
        return item
      self.close()
      raise item
    raise StopIteration

  def close(self):
    self._stopped.set()
    if hasattr(self._batches, 'close'):
      self._batches.close()
    if self._thread is not threading.current_thread():
      self._thread.join(timeout=10)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()
