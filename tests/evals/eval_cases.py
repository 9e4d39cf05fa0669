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


def scenes(count, seed, noise=0.2):
  """Pictures in nine fields of 2 x 2 pixels, each of one of three colours: image, mask [n, SIDE, SIDE, 1] uint8.

  One pixel in twelve or so of the mask is void (255).
  """
  colours = np.random.default_rng(98).normal(size=(3, 3))
  rng = np.random.default_rng(seed)
  mask = np.kron(rng.integers(3, size=(count, 3, 3)), np.ones((1, 2, 2), int))
  image = colours[mask] + noise * rng.normal(size=(count, SIDE, SIDE, 3))
  mask[rng.random(mask.shape) < 0.08] = 255
  return {'image': image.astype(np.float32), 'mask': mask[..., None].astype(np.uint8)}


def described(count, seed, noise=0.2):
  """`images` with the bits of the class as three labels at once, and a value that is linear in the prototype."""
  data = images(count, seed, noise)
  value = np.stack([10 * data['label'] + 3, 5 - data['label']], axis=1)
  return {
    **data,
    'bits': (data['label'][:, None] >> np.arange(3) & 1).astype(np.int32),
    'value': value.astype(np.float32),
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
    count = len(data['image'])
    for start in range(0, count, batch_size):
      rows = {name: value[start : start + batch_size] for name, value in data.items()}
      real = len(rows['image'])
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
      order = rng.permutation(len(data['image']))
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
    return len(self.data['image'])

  def classes(self, field):
    return int(self.data[field].max()) + 1


def _two_pools(variables, batch):
  hidden = jnp.tanh(batch['image'].reshape(len(batch['image']), -1) @ variables['w'])
  return {'mean': hidden, 'cls': hidden[:, ::2]}


def encoder(name='trained', seed=0):
  w = np.random.default_rng(seed).normal(size=(SIDE * SIDE * 3, 24)).astype(np.float32) / 10
  return features.Encoder(name, _two_pools, {'w': jnp.asarray(w)})


def _nine_tokens(variables, batch, layers=False, drop=None):
  """A residual block on patches of 2 x 2 pixels, which `drop` leaves out for some examples."""
  params = variables['params']['encoder']
  image = batch['image'].reshape(-1, 3, 2, 3, 2, 3).swapaxes(2, 3).reshape(-1, 9, 12)
  first = image @ params['embed']
  branch = jnp.tanh(first @ params['blocks'])
  if drop is not None:
    keys, rate = drop
    kept = jax.vmap(jax.random.uniform)(keys) >= rate
    branch = branch * (kept / (1 - rate))[:, None, None]
  last = first + branch
  out = {'tokens': last / (1 + jnp.abs(last)), 'cls': jnp.mean(last, axis=1)}
  return {**out, 'layers': jnp.stack([first, last])} if layers else out


def token_encoder(name='trained', seed=0):
  """An encoder with tokens on a grid of 3 x 3, two layers, and a parameter that they do not depend on."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32) / 3)
  params = {'encoder': {'embed': draw(12, 16), 'blocks': draw(16, 16)}, 'decoder': {'kernel': draw(4, 4)}}
  variables = {'params': params, 'state': {}}
  pooled = lambda variables, batch: features.pool(_nine_tokens(variables, batch, layers=True))
  return features.Encoder(name, pooled, variables, _nine_tokens, frozenset({'layers', 'drop'}))


SHORT = {'batch_size': 16, 'train_batch': 32, 'epochs': 3, 'warmup_epochs': 1, 'base_lr': 0.1, 'layer_decay': 1.0}
TRAINED = {  # evaluators that train with gradients over the mesh
  'finetune': {**SHORT, 'ema': 0.5, 'drop_path': 0.3},
  'multi': {'kind': 'finetune', **SHORT, 'task': 'multi', 'label': 'bits', 'smoothing': 0.0, 'accumulate': 2},
  'regression': {
    'kind': 'finetune',
    **SHORT,
    'task': 'regression',
    'label': 'value',
    'smoothing': 0.0,
    'mixup': 0.0,
    'cutmix': 0.0,
  },
  'attentive': {**SHORT, 'base_lr': 0.4},
  'segment': {**SHORT, 'train': 'scenes:train', 'test': 'scenes:test', 'classes': 3, 'taps': (1, 2)},
  'conv': {
    'kind': 'segment',
    **SHORT,
    'train': 'scenes:train',
    'test': 'scenes:test',
    'classes': 3,
    'decoder': 'conv',
    'width': 8,
    'frozen': False,
  },
}


def trained_data(mesh):
  return Data(
    mesh,
    {
      'a': described(161, 0, noise=1.5),
      'b': described(83, 1, noise=1.5),
      'scenes:train': scenes(161, 0, noise=1.0),
      'scenes:test': scenes(83, 1, noise=1.0),
    },
  )


def trained_figures(mesh):
  """Figures of the evaluators that train on uneven sets, by the names of the log; without baselines."""
  evals = {name: {'train': 'a', 'test': 'b', 'baselines': (), **given} for name, given in TRAINED.items()}
  built = suite.build(evals, '', '', 16)
  return suite.flat(built.run(built.evaluators, token_encoder(), None, trained_data(mesh).context()))


def assert_same_figures(some, others):
  """Equal but for the digits that the order of sums over devices decides."""
  assert some.keys() == others.keys()
  for name, value in some.items():
    np.testing.assert_allclose(value, others[name], rtol=1e-4, err_msg=name)


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
