"""What the operations know of the devices that a step is traced for: of what kind these are, and how a batch lies on them.

The train step is traced within `jax.sharding.use_abstract_mesh`. Outside of it (a notebook, an evaluator) nothing is known, and operations
take their plain form, which is right everywhere.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

from mim_jax.parallel import mesh as meshes

_FUSED = contextvars.ContextVar('fused', default=True)


@contextlib.contextmanager
def fused_attention(wanted: bool) -> Iterator[None]:
  """Whether attention traced within takes the kernels made for its devices (`ops.attention`); otherwise its plain form.

  Functions that JAX has traced before stay as they are: this is for what is traced for the first time.
  """
  token = _FUSED.set(wanted)
  try:
    yield
  finally:
    _FUSED.reset(token)


def wants_fused_attention() -> bool:
  return _FUSED.get()


def nowhere():
  """Context in which operations take the form that is written for no kind of device: what the mathematics asks for, no more."""
  device = AbstractDevice(device_kind='none', num_cores=1, platform='none')
  mesh = AbstractMesh((1,) * len(meshes.AXES), meshes.AXES, (AxisType.Auto,) * len(meshes.AXES), abstract_device=device)
  return jax.sharding.use_abstract_mesh(mesh)


def on_tpu() -> bool:
  """Whether the step is traced for TPUs."""
  return _platform() == 'tpu'


def on_nvidia() -> bool:
  """Whether the step is traced for GPUs of NVIDIA since Ampere, whose kinds are called so (before: Tesla, Quadro)."""
  device = _device()
  return device is not None and device.device_kind.startswith('NVIDIA')


def on_cpu() -> bool:
  """Whether the step is traced for CPUs; outside of a step, whether this process computes on them."""
  return (_platform() or jax.default_backend()) == 'cpu'


def _device():
  return getattr(jax.sharding.get_abstract_mesh(), 'abstract_device', None)


def _platform() -> str | None:
  device = _device()
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
