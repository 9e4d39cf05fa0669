import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mim_jax.data import images, pipeline, sources
from mim_jax.errors import ConfigError, MissingData

CHAIN = 'random_crop(8, pad=2) | flip | normalize'


def make_source(n=30, seed=0, **extra):
  rng = np.random.default_rng(seed)
  fields = {'image': rng.integers(0, 256, (n, 8, 8, 3), np.uint8), 'label': np.arange(n) % 10, 'id': np.arange(n)}
  return sources.ArraySource({**fields, **extra})


class Damaged(sources.ArraySource):
  """An ArraySource some of whose examples cannot be read; a value of `broken` says how."""

  def __init__(self, fields, broken):
    super().__init__(fields)
    self.broken = broken

  def _read(self, index):
    if index in self.broken:
      raise sources.CorruptExample(f'broken {index}')
    return super()._read(index)

  getmany = sources.Source.getmany


def make(source=None, batch_size=16, chain=CHAIN, **options):
  source = make_source() if source is None else source
  return pipeline.Pipeline(source, images.parse(chain), batch_size, **options)


def same(a, b):
  assert a.keys() == b.keys()
  for k in a:
    assert a[k].dtype == b[k].dtype
    np.testing.assert_array_equal(a[k], b[k])


def take(iterator, n):
  with iterator:
    return [next(iterator) for _ in range(n)]


@pytest.mark.parametrize('hosts', [1, 2, 4, 8])
def test_rows_of_all_hosts_make_the_same_global_batch(hosts):
  whole = make(seed=3)
  share = 16 // hosts
  parts = [make(seed=3, rows=range(h * share, (h + 1) * share)) for h in range(hosts)]
  for step in (0, 1, 7):
    rows = [p.batch(step) for p in parts]
    same(whole.batch(step), {k: np.concatenate([r[k] for r in rows]) for k in rows[0]})


def test_batch_depends_on_seed_and_step():
  a, b = make(seed=0), make(seed=1)
  same(a.batch(5), make(seed=0).batch(5))
  assert not np.array_equal(a.batch(5)['image'], b.batch(5)['image'])
  assert not np.array_equal(a.batch(5)['id'], a.batch(6)['id'])


@pytest.mark.parametrize('threads', [0, 1, 3])
def test_iterating_equals_random_access_for_any_number_of_threads(threads, monkeypatch):
  monkeypatch.setattr(pipeline, 'ROWS', 5)  # so that a batch is put together from several parts
  made = make(threads=threads)
  for expected, (step, batch) in enumerate(take(made.iterate(), 6)):
    assert step == expected
    same(batch, make().batch(step))


def test_resume_equals_uninterrupted():
  uninterrupted = dict(take(make(threads=2).iterate(), 8))
  resumed = dict(take(make(threads=2).iterate(start=5), 3))
  assert list(resumed) == [5, 6, 7]
  for step in resumed:
    same(resumed[step], uninterrupted[step])


def test_iterate_stops():
  assert [step for step, _ in make().iterate(2, 5)] == [2, 3, 4]


@pytest.mark.parametrize('n', [1, 7, 30])
def test_each_epoch_holds_every_example_once_in_another_order(n):
  made = make(make_source(n), batch_size=5)
  ids = np.concatenate([made.batch(step)['id'] for step in range(3 * n // 5 + 1)])
  epochs = ids[: 3 * n].reshape(3, n)
  np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(n), (3, 1)))
  if n > 1:
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])


def test_epochs_differ_in_augmentation():
  made = make(shuffle=False, batch_size=30)
  first, second = made.batch(0), made.batch(1)
  np.testing.assert_array_equal(first['id'], second['id'])
  changed = (first['image'] != second['image']).any((1, 2, 3))
  assert changed.mean() > 0.8


def test_augmentation_is_independent_between_examples():
  same_image = np.tile(make_source(1).fields['image'], (30, 1, 1, 1))
  images_ = make(sources.ArraySource({'image': same_image}), batch_size=30).batch(0)['image']
  assert len(np.unique(images_.reshape(30, -1), axis=0)) > 15  # 5 x 5 places, flipped or not


def corrupt_source(broken=(2, 3, 11, 29)):
  return Damaged(make_source().fields, set(broken))


def test_corrupt_examples_are_replaced_alike_for_any_host_split():
  whole = make(corrupt_source(), shuffle=False)
  batch = whole.batch(0)
  assert np.flatnonzero(batch['corrupt']).tolist() == [2, 3, 11]
  assert batch['id'][[2, 3, 11]].tolist() == [4, 4, 12]  # the next readable slot of the batch
  assert whole.faults == [(0, 'arrays[2]', 'broken 2'), (0, 'arrays[3]', 'broken 3'), (0, 'arrays[11]', 'broken 11')]
  for hosts in (2, 4, 16):
    share = 16 // hosts
    parts = [make(corrupt_source(), shuffle=False, rows=range(h * share, (h + 1) * share)) for h in range(hosts)]
    rows = [p.batch(0) for p in parts]
    same(batch, {k: np.concatenate([r[k] for r in rows]) for k in rows[0]})
    assert sum((p.faults for p in parts), []) == whole.faults


def test_replacement_is_another_view_and_wraps_around_the_batch():
  made = make(corrupt_source([15, 4]), shuffle=False)
  batch = made.batch(0)
  assert batch['id'][[15, 4]].tolist() == [0, 5]
  assert not np.array_equal(batch['image'][4], batch['image'][5])


def test_faults_come_with_the_batch_that_they_belong_to():
  made = make(corrupt_source(), shuffle=False, threads=3, prefetch=4)
  with made.iterate() as batches:
    next(batches)
    assert [f.step for f in made.faults] == [0, 0, 0]
    next(batches)
    assert [f.step for f in made.faults] == [0, 0, 0, 1]


def test_broken_picture_is_a_corrupt_example():
  encoded = [images.cv2.imencode('.png', x)[1].tobytes() for x in make_source(4).fields['image']]
  encoded[1] = encoded[1][:40]
  made = make(Damaged({'image': np.array(encoded, object)}, ()), 4, chain='decode | normalize', shuffle=False)
  assert made.batch(0)['corrupt'].tolist() == [False, True, False, False]
  assert made.faults[0].key == 'arrays[1]'


def test_nothing_readable_is_an_error_that_names_example_and_cause():
  made = make(corrupt_source(range(30)), shuffle=False)
  with pytest.raises(MissingData, match=r'none of 16 .*arrays\[0\].*broken 0'):
    made.batch(0)


class Exploding:
  """A chain with a mistake in it that shows at one example."""

  def __init__(self, at, error):
    self.at, self.error = at, error

  def example(self, example, rng):
    if example['id'] == self.at:
      raise self.error
    return example

  def batch(self, batch):
    return batch


@pytest.mark.parametrize('error, kind', [(TypeError('oops'), RuntimeError), (ConfigError('oops'), ConfigError)])
def test_errors_of_a_thread_surface_with_the_example(error, kind):
  made = pipeline.Pipeline(make_source(), Exploding(21, error), 8, shuffle=False, threads=2)
  batches = made.iterate()
  got = []
  with pytest.raises(kind, match=r'oops.*arrays\[21\]'):
    for step, _ in batches:
      got.append(step)
  assert got == [0, 1]
  assert list(batches) == []  # closed


def threads_named(*names):
  return [t for t in threading.enumerate() if t.name.startswith(names) and t.is_alive()]


def wait_until(condition, seconds=10):
  end = time.monotonic() + seconds
  while not condition() and time.monotonic() < end:
    time.sleep(0.01)
  return condition()


class Waiting(sources.ArraySource):
  """A source that blocks until told to go on, as a slow disk would."""

  def __init__(self, fields):
    super().__init__(fields)
    self.started, self.go = threading.Event(), threading.Event()

  def getmany(self, indices):
    self.started.set()
    self.go.wait(20)
    return super().getmany(indices)


def test_close_ends_threads_and_makes_nothing_more():
  before = threading.active_count()
  source = Waiting(make_source().fields)
  seen = []
  chain = Exploding(-1, None)
  chain.example = lambda example, rng: seen.append(1) or example
  batches = pipeline.Pipeline(source, chain, 8, threads=3).iterate()
  assert source.started.wait(10)
  batches.close()
  source.go.set()
  assert wait_until(lambda: threading.active_count() <= before)
  assert not seen
  assert list(batches) == []


def sharding():
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  return NamedSharding(mesh, PartitionSpec('data'))


def test_to_device_gives_the_same_batches_as_sharded_arrays():
  with pipeline.to_device(make().iterate(3), sharding()) as batches:
    for expected in range(3, 7):
      step, batch = next(batches)
      assert step == expected
      assert all(v.sharding.is_equivalent_to(sharding(), v.ndim) for v in batch.values())
      same(jax.device_get(batch), make().batch(step))


def test_to_device_ends_and_passes_errors_on():
  with pipeline.to_device(make().once(), sharding()) as batches:
    assert [step for step, _ in batches] == [0, 1]
    assert list(batches) == []
  made = pipeline.Pipeline(make_source(), Exploding(21, TypeError('oops')), 8, shuffle=False)
  batches = pipeline.to_device(made.iterate(), sharding())
  with pytest.raises(RuntimeError, match='oops'):
    for _ in batches:
      pass
  assert wait_until(lambda: not threads_named('mim-jax-transfer'))


def test_to_device_closes_while_the_consumer_is_away_and_while_the_source_waits():
  batches = pipeline.to_device(make().iterate(), sharding())  # the queue fills up and its thread waits
  next(batches)
  batches.close()
  source = Waiting(make_source().fields)
  waiting = pipeline.to_device(make(source).iterate(), sharding())
  assert source.started.wait(10)
  threading.Timer(0.2, source.go.set).start()
  waiting.close()
  assert wait_until(lambda: not threads_named('mim-jax-transfer', 'grain-prefetch'))
  assert list(waiting) == []


@pytest.mark.parametrize('hosts', [1, 2])
def test_once_gives_each_example_once_with_weights(hosts):
  share = 16 // hosts
  made = [make(rows=range(h * share, (h + 1) * share), chain='normalize') for h in range(hosts)]
  rows = [[batch for _, batch in m.once()] for m in made]
  batches = [{k: np.concatenate([r[step][k] for r in rows]) for k in rows[0][0]} for step in range(2)]
  weight = np.concatenate([b['weight'] for b in batches])
  assert weight.dtype == np.float32 and weight.tolist() == [1.0] * 30 + [0.0] * 2
  assert np.concatenate([b['id'] for b in batches])[:30].tolist() == list(range(30))
  assert all(len(b['image']) == 16 for b in batches)


def test_once_with_another_batch_size_keeps_the_share_of_rows():
  made = make(rows=range(8, 16))
  assert [b['id'].tolist() for _, b in made.once(batch_size=20)] == [list(range(10, 20)), [29] * 10]
  with pytest.raises(ConfigError, match='batch of 15'):
    made.once(batch_size=15)


def test_once_gives_no_weight_to_corrupt_examples():
  made = make(corrupt_source(), chain='normalize')
  batches = [batch for _, batch in made.once()]
  assert np.flatnonzero(np.concatenate([b['weight'] for b in batches]) == 0).tolist() == [2, 3, 11, 29, 30, 31]
  assert np.flatnonzero(np.concatenate([b['corrupt'] for b in batches])).tolist() == [2, 3, 11, 29]
  assert [f.key for f in made.faults] == ['arrays[2]', 'arrays[3]', 'arrays[11]', 'arrays[29]']


def test_once_draws_the_same_for_any_batch_size():
  a = np.concatenate([b['image'] for _, b in make().once(batch_size=6)])
  b = np.concatenate([b['image'] for _, b in make().once(batch_size=10)])
  np.testing.assert_array_equal(a, b)


def test_only_the_fields_asked_for_are_in_the_batch():
  source = make_source(caption=[f'number {i}' for i in range(30)])
  assert make(source, fields=('image', 'label')).batch(0).keys() == {'image', 'label', 'corrupt'}
  assert make(source).batch(0).keys() == {'image', 'label', 'id', 'corrupt'}  # text is left out


def test_missing_and_text_fields_are_errors():
  source = make_source(caption=[f'number {i}' for i in range(30)])
  with pytest.raises(ConfigError, match="field 'table' is missing; arrays gives caption, id, image, label after"):
    make(source, fields=('image', 'table')).batch(0)
  with pytest.raises(ConfigError, match="'caption' of arrays is text"):
    make(source, fields=('image', 'caption')).batch(0)


def test_ragged_field_names_both_examples():
  ragged = np.empty(4, object)
  ragged[:] = [np.zeros((8, 8, 3), np.uint8)] * 3 + [np.zeros((9, 8, 3), np.uint8)]
  with pytest.raises(ConfigError, match=r'\(8, 8, 3\) at arrays\[0\] and \(9, 8, 3\) at arrays\[3\]'):
    make(Damaged({'image': ragged}, ()), 4, chain='flip', shuffle=False).batch(0)


def test_64_bit_numbers_become_32_bits_unless_that_would_change_them():
  batch = make(make_source(score=np.linspace(0, 1, 30))).batch(0)
  assert batch['id'].dtype == np.int32 and batch['score'].dtype == np.float32
  with pytest.raises(ConfigError, match="field 'id'"):
    make(sources.ArraySource({'id': np.arange(30) + 2**40}), chain='').batch(0)


def test_spec_is_the_shape_of_the_global_batch():
  made = make(corrupt_source([0]), rows=range(4, 8), fields=('image', 'label'))
  spec = made.spec()
  batch = make(fields=('image', 'label')).batch(0)
  assert {k: (v.shape, v.dtype) for k, v in spec.items()} == {k: (v.shape, v.dtype) for k, v in batch.items()}


def test_rows_must_lie_in_the_batch():
  with pytest.raises(ConfigError, match='rows'):
    make(rows=range(8, 20))
