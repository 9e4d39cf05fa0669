"""Every method is sharded like any other: its debug recipe takes the same steps on 1, 2 and 8 devices."""

import re

import jax
import numpy as np
import pytest

from mim_jax import config, method, runs, step
from mim_jax.data.feeds import Feeds
from mim_jax.parallel import mesh as meshes

STEPS, BATCH = 3, 16


def trained(name, root, mesh):
  """Losses of the first steps of a debug recipe on the devices of `mesh`, and the parameters after them."""
  cfg = config.load([f'--config={root}/configs/{name}.py:debug'])
  cfg.data.source = re.sub(r'train=\d+', 'train=64', cfg.data.source)
  cfg.batch_size, cfg.duration, cfg.mesh, cfg.schedule.warmup = BATCH, '20 steps', mesh, '1 steps'
  placed = meshes.make_mesh(cfg.mesh, jax.devices()[: int(np.prod(list(mesh.values())))])
  feeds = Feeds(cfg.data, placed, cfg.seed)
  program = step.assemble(cfg, placed, len(feeds.source(cfg.data.source)))
  frozen, _ = runs.frozen_networks(program, cfg.seed, '')
  train, losses = program.init(np.uint32(cfg.seed)), []
  pipeline = feeds.training(BATCH, tuple(program.method.fields))
  for i in range(STEPS):
    batch = jax.device_put(pipeline.batch(i), program.batch_sharding)
    train, metrics = program.step(train, frozen, batch)
    losses.append(float(metrics['loss']))
  return losses, jax.device_get(train['params'])


@pytest.mark.slow
@pytest.mark.verifies('devices')
@pytest.mark.parametrize('name', method.names())
def test_devices_agree(name, root, record):
  """Losses to 1e-4 (reductions are summed in another order, and the steps before them differ by as much)."""
  losses, params = trained(name, root, {'data': 1, 'fsdp': 1, 'tensor': 1})
  assert losses[-1] != losses[0]
  furthest = 0.0
  for mesh in ({'data': 2, 'fsdp': 1, 'tensor': 1}, {'data': 4, 'fsdp': 2, 'tensor': 1}):
    others, other_params = trained(name, root, mesh)
    np.testing.assert_allclose(others, losses, rtol=1e-4, err_msg=str(mesh))
    size = lambda tree: np.sqrt(sum(float(np.sum(np.square(leaf, dtype=np.float64))) for leaf in jax.tree.leaves(tree)))
    apart = size(jax.tree.map(np.subtract, params, other_params)) / size(params)
    assert apart < 1e-3, f'{mesh}: parameters differ by {apart:.1e} of their norm after {STEPS} steps'
    furthest = max(furthest, *np.abs(np.array(others) / losses - 1))
  record(loss_apart=furthest)
