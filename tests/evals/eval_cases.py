"""Small data, encoders and contexts for the evaluator tests, also for their processes of their own."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mim_jax.evals import features, suite

CLASSES = 7
SIDE = 6


def images(count, seed, noise=1.0):
  """Noisy images around one prototype per class: dict of image [n, SIDE, SIDE, 3] float32, label [n] int32."""
  prototypes = np.random.default_rng(99).normal(size=(CLASSES, SIDE, SIDE, 3))
  rng = np.random.default_rng(seed)
  label = rng.integers(CLASSES, size=count)
  return {
    'image': (prototypes[label] + noise * rng.normal(size=(count, SIDE, SIDE, 3))).astype(np.float32),
    'label': label.astype(np.int32),
  }


def mesh_of(count):
  """Mesh over `count` devices, split over the data and the fsdp axis."""
  shape = (count // 2, 2, 1) if count > 1 else (1, 1, 1)
  return jax.make_mesh(
    shape, ('data', 'fsdp', 'tensor'), devices=jax.devices()[:count], axis_types=(AxisType.Auto,) * 3
  )


def to_mesh(rows, mesh):
  sharding = NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))
  return {
    name: jax.make_array_from_callback(value.shape, sharding, lambda index, value=value: value[index])
    for name, value in rows.items()
  }


class Data:
  """Named sets in memory behind the interface of `features.Context`.

  Padding rows are NaN with label 0, the worst that a pipeline may leave there.
  """

  def __init__(self, mesh, sets):
    self.mesh, self.sets, self.opened = mesh, sets, []

  def open_source(self, spec):
    return _Source(self.sets[spec])

  def open_batches(self, source, transforms, batch_size, fields, shuffle=None):
    self.opened.append((source, transforms, shuffle))
    data = {name: self.sets[source][name] for name in fields}
    return self._once(data, batch_size) if shuffle is None else self._forever(data, batch_size, shuffle)

  def _once(self, data, batch_size):
    count = len(data['label'])
    for start in range(0, count, batch_size):
      rows = {name: value[start : start + batch_size] for name, value in data.items()}
      real = len(rows['label'])
      padded = {
        name: np.full((batch_size, *value.shape[1:]), np.nan if value.dtype.kind == 'f' else 0, value.dtype)
        for name, value in rows.items()
      }
      for name, value in rows.items():
        padded[name][:real] = value
      yield to_mesh({**padded, 'weight': (np.arange(batch_size) < real).astype(np.float32)}, self.mesh)

  def _forever(self, data, batch_size, seed):
    rng = np.random.default_rng(seed)
    while True:
      order = rng.permutation(len(data['label']))
      for start in range(0, len(order) - batch_size + 1, batch_size):
        rows = {name: value[order[start : start + batch_size]] for name, value in data.items()}
        rows['image'] = rows['image'] + 0.1 * rng.normal(size=rows['image'].shape).astype(np.float32)
        yield to_mesh(rows, self.mesh)

  def context(self, stop=lambda: False):
    self.lines = []
    return features.Context(self.mesh, self.open_source, self.open_batches, stop, say=self.lines.append)


class _Source:
  def __init__(self, data):
    self.data = data

  def __len__(self):
    return len(self.data['label'])

  def classes(self, field):
    return int(self.data[field].max()) + 1


def _two_pools(variables, batch):
  hidden = jnp.tanh(batch['image'].reshape(len(batch['image']), -1) @ variables['w'])
  return {'mean': hidden, 'cls': hidden[:, ::2]}


def encoder(name='trained', seed=0):
  w = np.random.default_rng(seed).normal(size=(SIDE * SIDE * 3, 24)).astype(np.float32) / 10
  return features.Encoder(name, _two_pools, {'w': jnp.asarray(w)})


SETTINGS = {
  'knn': {'k': 5},
  'linear': {'epochs': 12, 'warmup_epochs': 2, 'train_batch': 32, 'trust': 0.1, 'features': 'cls, mean'},
  'linear_augmented': {
    'kind': 'linear',
    'augment': True,
    'train_transforms': 'noise',
    'epochs': 3,
    'warmup_epochs': 1,
    'train_batch': 64,
    'trust': 0.1,
  },
  'fewshot': {'shots': (3, 10), 'seeds': 3},
}


def all_figures(mesh):
  """Figures of every evaluator on uneven sets, by the names of the log."""
  data = Data(mesh, {'arrays:train': images(301, 0), 'arrays:test': images(157, 1, noise=2.5)})
  sources = {'train': 'arrays:train', 'test': 'arrays:test'}
  evals = {name: {**sources, **given} for name, given in SETTINGS.items()}
  built = suite.build(evals, '', '', 16)
  return suite.flat(built.run(built.evaluators, encoder(), lambda: encoder('untrained', 1), data.context()))
