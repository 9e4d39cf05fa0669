import types

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from mim_jax.errors import ConfigError
from mim_jax.parallel import mesh as meshes


def sizes(data=-1, fsdp=1, tensor=1):
  return {'data': data, 'fsdp': fsdp, 'tensor': tensor}


def fake(platform, process, id, **more):
  return types.SimpleNamespace(platform=platform, process_index=process, id=id, **more)


def tpu_slice(x, y, z, host=(2, 2, 1), slice_index=0, first_process=0):
  """Devices of a TPU slice of x * y * z chips in hosts of `host` chips."""
  devices = []
  corners = [(a, b, c) for c in range(0, z, host[2]) for b in range(0, y, host[1]) for a in range(0, x, host[0])]
  for process, corner in enumerate(corners, start=first_process):
    for place in np.ndindex(*host[::-1]):
      coords = tuple(a + b for a, b in zip(corner, place[::-1], strict=True))
      more = {'coords': coords, 'core_on_chip': 0, 'device_kind': 'TPU v5 lite', 'slice_index': slice_index}
      devices.append(fake('tpu', process, len(devices) + 1000 * slice_index, **more))
  return devices


def rows_by_process(order):
  return {process: sorted(rows) for process, rows in meshes._rows_of_processes(order).items()}


def test_forced_devices_get_threads():
  given = {'XLA_FLAGS': '--xla_a=1 --xla_force_host_platform_device_count=64'}
  meshes.give_forced_devices_threads(given)
  assert given['NPROC'] == '128'
  given['NPROC'] = '70'
  meshes.give_forced_devices_threads(given)
  assert given['NPROC'] == '70'
  for flags in ({}, {'XLA_FLAGS': '--xla_force_host_platform_device_count=1'}):
    meshes.give_forced_devices_threads(flags)
    assert 'NPROC' not in flags


@pytest.mark.parametrize(
  'asked, shape',
  [(sizes(), (8, 1, 1)), (sizes(2, 2, 2), (2, 2, 2)), (sizes(1, -1, 2), (1, 4, 2)), (sizes(2, 1, -1), (2, 1, 4))],
)
def test_sizes_and_the_free_axis(asked, shape):
  mesh = meshes.make_mesh(asked)
  assert mesh.devices.shape == shape
  assert mesh.axis_names == ('data', 'fsdp', 'tensor')
  assert set(mesh.axis_types) == {AxisType.Auto}
  assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in jax.devices())


@pytest.mark.parametrize(
  'asked, message',
  [
    (sizes(3), '8 devices: 3 are needed'),
    (sizes(4), '8 devices: 4 are needed'),
    (sizes(-1, 3), '3 does not divide them'),
    (sizes(-1, -1), 'at most one'),
    (sizes(8, 0), 'sizes are positive'),
    (sizes(8, -2), 'sizes are positive'),
    (sizes('all'), 'sizes are positive'),
  ],
)
def test_sizes_that_do_not_fit(asked, message):
  with pytest.raises(ConfigError, match=message):
    meshes.make_mesh(asked)


def test_batches_that_do_not_divide_are_refused():
  mesh = meshes.make_mesh(sizes(2, 2, 2))
  assert meshes.local_rows(mesh, 12) == range(12)
  with pytest.raises(ConfigError, match='batch_size 10 cannot be cut in 4 equal parts.*nearest: 8 or 12'):
    meshes.local_rows(mesh, 10)
  with pytest.raises(ConfigError, match='micro-batch 2 .*nearest: 4 or 8'):
    meshes.check_batch(mesh, 2, key='micro-batch')


def test_the_batch_is_cut_over_data_and_fsdp():
  mesh = meshes.make_mesh(sizes(2, 2, 2))
  x = jax.device_put(np.arange(8.0), meshes.batch_sharding(mesh))
  assert {shard.data.shape for shard in x.addressable_shards} == {(2,)}
  assert len({str(shard.index) for shard in x.addressable_shards}) == 4
  assert jax.device_put(x, meshes.replicated(mesh)).is_fully_replicated


def test_rows_of_a_mesh_that_scatters_them_are_refused(monkeypatch):
  mesh = Mesh(np.array(jax.devices()).reshape(8, 1, 1), meshes.AXES)
  whole = meshes.batch_sharding(mesh).addressable_devices_indices_map((16,))
  part = {device: index for device, index in whole.items() if device.id in (0, 3)}
  sharding = types.SimpleNamespace(addressable_devices_indices_map=lambda shape: part)
  monkeypatch.setattr(meshes, 'batch_sharding', lambda mesh: sharding)
  with pytest.raises(ConfigError, match=r'scattered rows \[\(0, 2\), \(6, 8\)\]'):
    meshes.local_rows(mesh, 16)


@pytest.mark.parametrize('shape', [(16, 1, 1), (4, 4, 1), (1, 16, 1), (2, 4, 2), (8, 1, 2), (2, 1, 8)])
def test_gpu_hosts_hold_neighbouring_rows(shape):
  # numbered across hosts: device ids alone would scatter the rows
  devices = [fake('gpu', process, 4 * local + process) for process in range(4) for local in range(4)]
  rows = rows_by_process(meshes.arrange(devices, shape))
  for held in rows.values():
    assert held == list(range(held[0], held[-1] + 1))
  assert sorted({row for held in rows.values() for row in held}) == list(range(shape[0] * shape[1]))


def test_the_order_of_gpus_is_kept_where_rows_allow_it():
  devices = [fake('gpu', process, process * 4 + 3 - local) for process in range(2) for local in range(4)]
  order = meshes.arrange(devices, (8, 1, 1))
  assert [d.id for d in order.flat] == list(range(8))


@pytest.mark.parametrize('shape', [(16, 1, 1), (1, 16, 1), (4, 4, 1), (4, 1, 4), (2, 1, 8), (1, 4, 4)])
def test_tpu_hosts_hold_neighbouring_rows(shape):
  devices = tpu_slice(4, 4, 1)
  order = meshes.arrange(devices, shape)
  assert {d.id for d in order.flat} == {d.id for d in devices}
  for held in rows_by_process(order).values():
    assert held == list(range(held[0], held[-1] + 1))


def test_tensor_groups_lie_on_an_axis_of_the_torus():
  order = meshes.arrange(tpu_slice(4, 4, 1), (4, 1, 4))
  for group in order.reshape(4, 4):
    assert len({d.coords[0] for d in group}) == 1 or len({d.coords[1] for d in group}) == 1


def test_several_tpu_slices_cut_data_only():
  devices = tpu_slice(2, 2, 1) + tpu_slice(2, 2, 1, slice_index=1, first_process=1)
  order = meshes.arrange(devices, (2, 2, 2))
  assert [{d.slice_index for d in part.flat} for part in order] == [{0}, {1}]
  order = meshes.arrange(devices, (1, 8, 1))  # fsdp over both: allowed, the slices one after the other
  assert [d.slice_index for d in order.flat] == [0] * 4 + [1] * 4


def test_one_process_needs_no_start(monkeypatch):
  monkeypatch.setattr(jax.distributed, 'initialize', lambda **_: pytest.fail('not needed'))
  environ = {'JAX_PLATFORMS': 'cpu'}
  assert meshes.start(environ) == meshes.Start('single', 0, 1)
  assert meshes.start(environ | {'SLURM_STEP_NUM_TASKS': '1', 'SLURM_NTASKS': '1'}) == ('single', 0, 1)
  assert meshes.start(environ | {'MIM_PROCESSES': '1', 'SLURM_STEP_NUM_TASKS': '8'}) == ('single', 0, 1)


def test_a_batch_script_outside_srun_says_that_it_trains_alone(caplog):
  assert meshes.start({'JAX_PLATFORMS': 'cpu', 'SLURM_NTASKS': '8', 'SLURM_PROCID': '0'}).how == 'single'
  assert 'not started by srun' in caplog.text


@pytest.fixture
def started(monkeypatch):
  """What `jax.distributed.initialize` was called with."""
  calls = []
  monkeypatch.setattr(jax.distributed, 'initialize', lambda **arguments: calls.append(arguments))
  return calls


def test_explicit_processes(started):
  environ = {'MIM_COORDINATOR': '10.0.0.1:8476', 'MIM_PROCESSES': '4', 'MIM_PROCESS_ID': '2'}
  assert meshes.start(environ).how == 'explicit'
  (call,) = started
  assert (call['coordinator_address'], call['num_processes'], call['process_id']) == ('10.0.0.1:8476', 4, 2)
  assert jax.config.jax_cpu_collectives_implementation == 'gloo'


@pytest.mark.parametrize(
  'change, message',
  [
    ({'MIM_PROCESS_ID': ''}, 'MIM_PROCESS_ID not set'),
    ({'MIM_PROCESS_ID': '4'}, '0 <= id < processes'),
    ({'MIM_PROCESSES': 'four'}, '0 <= id < processes'),
    ({'MIM_COORDINATOR': '10.0.0.1'}, 'host:port'),
    ({'MIM_COORDINATOR': ':8476'}, 'host:port'),
  ],
)
def test_contradictions_in_the_environment(started, change, message):
  environ = {'MIM_COORDINATOR': '10.0.0.1:8476', 'MIM_PROCESSES': '4', 'MIM_PROCESS_ID': '2'} | change
  with pytest.raises(ConfigError, match=message):
    meshes.start(environ)
  assert not started


@pytest.mark.parametrize(
  'more, devices',
  [
    ({'SLURM_STEP_NUM_NODES': '4'}, []),  # one task per node: every GPU of the node
    ({'SLURM_STEP_NUM_NODES': '1', 'CUDA_VISIBLE_DEVICES': '3'}, []),  # SLURM shows the task its own GPU only
    ({'SLURM_STEP_NUM_NODES': '1', 'CUDA_VISIBLE_DEVICES': '0,1,2,3'}, None),  # the GPU of the task's number
    ({'SLURM_STEP_NUM_NODES': '1'}, None),
  ],
)
def test_slurm_tasks(started, more, devices):
  assert meshes.start({'SLURM_STEP_NUM_TASKS': '4', 'SLURM_PROCID': '3'} | more).how == 'slurm'
  (call,) = started
  assert (call['num_processes'], call['process_id'], call['cluster_detection_method']) == (4, 3, 'slurm')
  assert call.get('local_device_ids') == devices


@pytest.mark.parametrize(
  'environ, pod',
  [
    ({'TPU_WORKER_HOSTNAMES': 'a,b', 'TPU_WORKER_ID': '1'}, True),
    ({'TPU_WORKER_HOSTNAMES': 'localhost'}, False),
    ({'TPU_WORKER_HOSTNAMES': 'localhost', 'MEGASCALE_NUM_SLICES': '2'}, True),
    ({}, True),  # a plain TPU VM: the metadata server knows
    ({'TPU_SKIP_MDS_QUERY': '1'}, False),
    ({'TPU_WORKER_HOSTNAMES': 'a,b', 'JAX_PLATFORMS': 'cpu'}, False),
  ],
)
def test_tpu_pods(started, monkeypatch, environ, pod):
  monkeypatch.setattr(meshes.pathlib.Path, 'glob', lambda self, pattern: ['/dev/vfio/0'])
  monkeypatch.setattr(meshes.importlib.util, 'find_spec', lambda name: object())
  assert meshes.start(environ).how == ('tpu' if pod else 'single')
  assert started == ([{}] if pod else [])


def test_a_tpu_vm_that_knows_no_pod(monkeypatch):
  def fail():
    raise ValueError('coordinator_address should be defined.')

  monkeypatch.setattr(jax.distributed, 'initialize', fail)
  monkeypatch.setattr(meshes, '_tpu_pod', lambda environ: True)
  with pytest.raises(ConfigError, match='coordinator_address should be defined.*MIM_PROCESSES=1'):
    meshes.start({})
