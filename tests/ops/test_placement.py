"""What operations learn of the mesh, and that rows stay on their devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from mim_jax.ops import placement
from mim_jax.parallel import mesh as meshes


def abstract(platform, **sizes):
  shape = {'data': 1, 'fsdp': 1, 'tensor': 1} | sizes
  device = AbstractDevice(device_kind='x', num_cores=1, platform=platform)
  return AbstractMesh((*shape.values(),), (*shape,), (AxisType.Auto,) * 3, abstract_device=device)


def test_nothing_is_known_without_a_mesh():
  assert not placement.on_tpu()
  x = jnp.ones((4, 2))
  assert placement.by_rows(x) is x


@pytest.mark.parametrize(('platform', 'expected'), [('tpu', True), ('cpu', False), ('cuda', False)])
def test_the_platform_is_that_of_the_mesh(platform, expected):
  with jax.sharding.use_abstract_mesh(abstract(platform)):
    assert placement.on_tpu() == expected


def test_heads_are_whole_without_tensor_parallelism():
  with jax.sharding.use_abstract_mesh(abstract('tpu', fsdp=8)):
    assert placement.heads_whole()
  with jax.sharding.use_abstract_mesh(abstract('tpu', fsdp=4, tensor=2)):
    assert not placement.heads_whole()


def test_rows_that_the_mesh_cannot_cut_are_left_to_the_compiler():
  with jax.sharding.use_abstract_mesh(abstract('tpu', data=2, fsdp=4)):
    assert placement.rows_per_device(lambda x, whole: x, 12) is None
    assert placement.rows_per_device(lambda x, whole: x, 16) is not None


def test_rows_lie_as_the_batch_does():
  mesh = meshes.make_mesh({'data': 2, 'fsdp': 4, 'tensor': 1})

  def function(x):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return placement.by_rows(x * 2), placement.by_rows(x[:3])

  whole = jax.device_put(jnp.arange(32.0).reshape(16, 2), NamedSharding(mesh, PartitionSpec()))
  rows, odd = jax.jit(function)(whole)
  assert rows.sharding.spec[0] == ('data', 'fsdp')
  np.testing.assert_array_equal(rows, 2 * whole)
  np.testing.assert_array_equal(odd, whole[:3])
