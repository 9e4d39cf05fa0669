"""What the operations know of the devices that a step is traced for: whether these are TPUs, and how a batch lies on them.

The train step is traced within `jax.sharding.use_abstract_mesh`. Outside of it (a notebook, an evaluator) nothing is known, and operations
take their plain form, which is right everywhere.
"""

import math

import jax
from jax.sharding import PartitionSpec

from mim_jax.parallel import mesh as meshes


def on_tpu() -> bool:
  """Whether the step is traced for TPUs."""
  return _platform() == 'tpu'


def on_cpu() -> bool:
  """Whether the step is traced for CPUs; outside of a step, whether this process computes on them."""
  return (_platform() or jax.default_backend()) == 'cpu'


def _platform() -> str | None:
  device = getattr(jax.sharding.get_abstract_mesh(), 'abstract_device', None)
  return device and device.platform


def by_rows(x):
  """x [B, ...], told to lie by rows on the devices as the batch does, its other axes as the compiler likes; so is its gradient.

  Without that word the compiler may cut the products of a loop over layers by their weights, and gather the activations of the whole batch.
  """
  mesh = jax.sharding.get_abstract_mesh()
  rows = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in meshes.BATCH_AXES)
  if rows == 1 or x.shape[0] % rows:
    return x
  spec = PartitionSpec(meshes.BATCH_AXES, *(PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1))
  return jax.lax.with_sharding_constraint(x, spec)


def heads_whole() -> bool:
  """Whether every device holds all heads of its layers: no tensor parallelism. Only where `on_tpu`."""
  return jax.sharding.get_abstract_mesh().shape['tensor'] == 1


def rows_per_device(function, batch: int):
  """`function(x [B, ...], whole) -> [B, ...]` on each device's own rows, or None where a batch of this size cannot be cut as the mesh is.

  Pallas kernels are opaque to the compiler, which would gather their whole arguments on every device. Only where `on_tpu`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if batch % math.prod(mesh.shape[axis] for axis in meshes.BATCH_AXES):
    return None
  rows = PartitionSpec(meshes.BATCH_AXES)
  return jax.shard_map(function, in_specs=(rows, PartitionSpec()), out_specs=rows, check_vma=False)
