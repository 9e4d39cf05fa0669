"""Train states to save and ways to compare them, for the tests of the manager."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mim_jax.checkpoint.manager import flatten

Moments = collections.namedtuple('Moments', ['mu', 'nu'])


def mesh_of(count):
  devices = np.array(jax.devices()[:count]).reshape(-1, 2 if count > 1 else 1)
  return jax.sharding.Mesh(devices, ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2)


def state_of(step, mesh, size=64):
  """A train state with every kind of leaf that occurs, different at every step."""
  noise = np.random.default_rng(step)
  special = np.array([np.nan, -0.0, np.inf, 1e-45], np.float32)
  special.view(np.uint32)[0] |= 5  # a NaN with a payload
  arrays = {
    'step': np.int32(step),
    'params': {
      'encoder': {'kernel': noise.normal(size=(size, 8)).astype(np.float32), 'scale': np.ones(6, np.float32)},
      'half': noise.normal(size=(4, 2)).astype(jnp.bfloat16),
      'special': special,
    },
    'opt': (Moments(noise.normal(size=(size, 8)).astype(np.float32), np.zeros((2, 2), np.float32)), {}),
    'flags': noise.integers(0, 2, size=5).astype(bool),
    'bytes': noise.integers(0, 255, size=(3, 3)).astype(np.uint8),
    'ema': {},
  }
  spread = NamedSharding(mesh, PartitionSpec('fsdp'))
  whole = NamedSharding(mesh, PartitionSpec())
  tree = jax.tree.map(lambda x: jax.device_put(x, spread if x.ndim == 2 and x.shape[0] == size else whole), arrays)
  return {**tree, 'key': jax.device_put(jax.random.key(step), whole)}


def abstract(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def bits(tree):
  """{path: (dtype, shape, bytes)}: equal only for trees that are equal bit for bit."""
  found = {}
  for path, x in flatten(tree).items():
    raw = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    found[path] = str(x.dtype), x.shape, np.asarray(raw).tobytes()
  return found


def saved(manager, mesh, *steps, **options):
  for step in steps:
    manager.save(step, state_of(step, mesh, **options), {'digest': f'd{step}'})
  manager.close()
