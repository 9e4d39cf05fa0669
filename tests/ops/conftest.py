"""Meshes of devices that are not here."""

import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType


@pytest.fixture
def abstract():
  """Function (platform, kind, sizes of axes) -> mesh to trace for."""

  def make(platform, kind='x', **sizes):
    shape = {'data': 1, 'fsdp': 1, 'tensor': 1} | sizes
    device = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    return AbstractMesh((*shape.values(),), (*shape,), (AxisType.Auto,) * 3, abstract_device=device)

  return make
