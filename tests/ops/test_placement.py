"""What operations learn of the mesh, and that rows stay on their devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mim_jax.ops import placement
from mim_jax.parallel import mesh as meshes


def test_nothing_is_known_without_a_mesh():
  assert not placement.on_tpu() and not placement.on_nvidia()
  x = jnp.ones((4, 2))
  assert placement.by_rows(x) is x


@pytest.mark.parametrize(('platform', 'expected'), [('tpu', True), ('cpu', False), ('cuda', False)])
def test_the_platform_is_that_of_the_mesh(platform, expected, abstract):
  with jax.sharding.use_abstract_mesh(abstract(platform)):
    assert placement.on_tpu() == expected


@pytest.mark.parametrize(
  ('kind', 'expected'), [('NVIDIA H100 80GB HBM3', True), ('Tesla T4', False), ('TPU v5e', False)]
)
def test_gpus_of_the_present_are_known_by_their_kind(kind, expected, abstract):
  with jax.sharding.use_abstract_mesh(abstract('gpu', kind)):
    assert placement.on_nvidia() == expected


def test_heads_are_whole_without_tensor_parallelism(abstract):
  with jax.sharding.use_abstract_mesh(abstract('tpu', fsdp=8)):
    assert placement.heads_whole()
  with jax.sharding.use_abstract_mesh(abstract('tpu', fsdp=4, tensor=2)):
    assert not placement.heads_whole()


def test_rows_that_the_mesh_cannot_cut_are_left_to_the_compiler(abstract):
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
