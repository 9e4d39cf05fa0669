"""Processes and devices: distributed start-up, the device mesh, and which rows of a batch each process feeds.

The mesh has three axes. The batch is cut over 'data' and 'fsdp' together; parameters are cut over 'fsdp' and 'tensor'
(see `rules`) and copied over 'data'.
"""

import importlib.util
import logging
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mim_jax.errors import ConfigError

log = logging.getLogger(__name__)

AXES = ('data', 'fsdp', 'tensor')
BATCH_AXES = ('data', 'fsdp')
ADDRESS = ('MIM_COORDINATOR', 'MIM_PROCESSES', 'MIM_PROCESS_ID')


class Start(NamedTuple):
  """How the run was started: 'single', 'explicit', 'slurm', 'tpu', or 'running' before; this process among how many."""

  how: str
  process: int
  processes: int


def start(environ: Mapping[str, str] = os.environ) -> Start:
  """Joins the processes of a run through `jax.distributed`; nothing to do for one process. Call before any computation.

  The first of these that is there counts:
  - MIM_COORDINATOR (host:port of process 0), MIM_PROCESSES and MIM_PROCESS_ID: any hosts, one process per host, or one
    per device where JAX_LOCAL_DEVICE_IDS says which. MIM_PROCESSES=1 alone forbids the others.
  - SLURM's variables within `srun`: a single task of a node drives all its GPUs, several tasks one GPU each.
  - Cloud TPU: hosts and ids from the environment (GKE) or the metadata server (plain VMs).

  Raises:
    ConfigError: the variables contradict each other, or a Cloud TPU VM does not know its pod.
  """
  if jax.distributed.is_initialized():
    return Start('running', jax.process_index(), jax.process_count())
  give_forced_devices_threads()
  how, arguments = _detect(environ)
  if how != 'single':
    if not jax.config.jax_cpu_collectives_implementation:  # CPU processes cannot reduce without one
      jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    try:
      jax.distributed.initialize(**arguments)
    except (OSError, ValueError) as error:  # no network, no metadata server; nothing known about the other processes
      raise ConfigError(f'start as {how} failed: {error}; MIM_PROCESSES=1 trains on this host alone') from error
  found = Start(how, *((jax.process_index(), jax.process_count()) if how != 'single' else (0, 1)))
  log.info('start: %s, process %d of %d', *found)
  return found


def give_forced_devices_threads(environ=os.environ):
  """Two threads for every CPU device that XLA_FLAGS forces, unless NPROC says otherwise; call before the first computation.

  XLA's CPU client takes the size of its thread pool from NPROC, else as many threads as there are cores or devices. Each device
  blocks one in a collective, so a copy in the pool starves the last device, and after 40 s the process aborts.
  """
  forced = re.search(r'--xla_force_host_platform_device_count=(\d+)', environ.get('XLA_FLAGS', ''))
  if forced and int(forced[1]) > 1:
    environ.setdefault('NPROC', str(max(2 * int(forced[1]), os.cpu_count() or 1)))


def _detect(environ) -> tuple[str, dict]:
  """How this process was launched, and the arguments for `jax.distributed.initialize`."""
  named = {name: environ.get(name) for name in ADDRESS}
  if named['MIM_PROCESSES'] == '1':
    return 'single', {}
  if any(named.values()):
    return 'explicit', _explicit(named)
  tasks = int(environ.get('SLURM_STEP_NUM_TASKS', 1))  # set by srun only; a batch script itself is one process
  if tasks > 1:
    return 'slurm', _slurm(environ, tasks)
  if int(environ.get('SLURM_NTASKS', 1)) > 1:
    log.warning('start: the SLURM job has several tasks, but this process was not started by srun and trains alone')
  if _tpu_pod(environ):
    return 'tpu', {}
  return 'single', {}


def _explicit(named) -> dict:
  missing = [name for name, value in named.items() if not value]
  if missing:
    raise ConfigError(f'{", ".join(missing)} not set; several processes need all of {", ".join(ADDRESS)}')
  coordinator, processes, process = named.values()
  if not (processes.isdecimal() and process.isdecimal() and int(process) < int(processes)):
    raise ConfigError(f'MIM_PROCESS_ID={process} and MIM_PROCESSES={processes}; expected 0 <= id < processes')
  if not coordinator.rpartition(':')[2].isdecimal() or coordinator.startswith(':'):
    raise ConfigError(f'MIM_COORDINATOR={coordinator}; expected host:port of process 0, such as 10.0.0.1:8476')
  return {
    'coordinator_address': coordinator,
    'num_processes': int(processes),
    'process_id': int(process),
    'cluster_detection_method': 'deactivate',
  }


def _slurm(environ, tasks) -> dict:
  process = int(environ['SLURM_PROCID'])
  arguments = {'num_processes': tasks, 'process_id': process, 'cluster_detection_method': 'slurm'}
  one_per_node = tasks == int(environ['SLURM_STEP_NUM_NODES'])
  visible = environ.get('CUDA_VISIBLE_DEVICES', '')
  if one_per_node or (visible and ',' not in visible):
    # JAX takes the GPU whose number is the local task id: only the first of a node with one task, and none where SLURM
    # shows each task its own GPU alone. An empty list stands for all that are visible.
    arguments['local_device_ids'] = []
  return arguments


def _tpu_pod(environ) -> bool:
  """Whether this host has TPU chips and may be part of a pod; a plain VM has to ask the metadata server to know."""
  platforms = environ.get('JAX_PLATFORMS', '')
  chips = any(any(pathlib.Path('/dev').glob(pattern)) for pattern in ('accel[0-9]*', 'vfio/[0-9]*'))
  if (platforms and 'tpu' not in platforms) or not chips or importlib.util.find_spec('libtpu') is None:
    return False
  hosts = environ.get('TPU_PROCESS_ADDRESSES') or environ.get('TPU_WORKER_HOSTNAMES')
  if hosts is not None:
    return len(hosts.split(',')) * int(environ.get('MEGASCALE_NUM_SLICES') or 1) > 1
  return 'TPU_SKIP_MDS_QUERY' not in environ


def make_mesh(cfg, devices=None) -> Mesh:
  """Mesh with axes 'data', 'fsdp', 'tensor' of the sizes in `cfg` (config.mesh); one may be -1 and takes what is left.

  Raises ConfigError when the sizes do not fit the number of devices (default: all devices of all processes).
  """
  if devices is None:
    give_forced_devices_threads()
    devices = jax.devices()
  devices = list(devices)
  sizes = {axis: cfg[axis] for axis in AXES}
  asked = ', '.join(f'{axis} {size}' for axis, size in sizes.items())
  free = [axis for axis, size in sizes.items() if size == -1]
  if len(free) > 1 or any(not isinstance(size, int) or (size < 1 and size != -1) for size in sizes.values()):
    raise ConfigError(f'config.mesh is {asked}; sizes are positive, and at most one of them is -1 (takes what is left)')
  taken = math.prod(size for size in sizes.values() if size != -1)
  if (len(devices) % taken) if free else (len(devices) != taken):
    fit = f'{taken} does not divide them' if free else f'{taken} are needed; set one size to -1 to take what is there'
    raise ConfigError(f'config.mesh is {asked}, but there are {len(devices)} devices: {fit}')
  if free:
    sizes[free[0]] = len(devices) // taken
  # Explicit axes, the default of jax.make_mesh, would make a plain reshape of a sharded array an error.
  return Mesh(arrange(devices, (*sizes.values(),)), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arrange(devices, shape: tuple[int, int, int]) -> np.ndarray:
  """Devices as an array [data, fsdp, tensor] in which each process holds neighbouring rows of the batch.

  The order of the hardware where it has that property (TPU torus, GPU numbering), else process by process, which always
  has it and mostly puts neighbours on the torus next to each other.
  """
  candidates = {'tpu': _torus_orders, 'gpu': lambda devices, shape: [_in_order(devices, shape, lambda d: d.id)]}
  for order in candidates.get(devices[0].platform, lambda devices, shape: [])(devices, shape):
    if all(len(rows) == max(rows) - min(rows) + 1 for rows in _rows_of_processes(order).values()):
      return order
  log.info('mesh %s: devices process by process', shape)
  return _in_order(devices, shape, lambda d: (d.process_index, d.id))


def _in_order(devices, shape, key):
  flat = np.empty(len(devices), dtype=object)
  flat[:] = sorted(devices, key=key)
  return flat.reshape(shape)


def _torus_orders(devices, shape):
  """Orders that keep mesh axes on axes of the torus; several slices each hold a part of 'data', which talks least."""
  slices = {}
  for device in devices:
    slices.setdefault(getattr(device, 'slice_index', 0), []).append(device)
  if shape[0] % len(slices):
    return
  inner = (shape[0] // len(slices), *shape[1:])
  for contiguous in (False, True):
    try:
      parts = [
        mesh_utils.create_device_mesh(inner, slices[i], contiguous_submeshes=contiguous, allow_split_physical_axes=True)
        for i in sorted(slices)
      ]
    except (NotImplementedError, ValueError, AssertionError) as error:  # this torus cannot hold this shape
      log.debug('mesh %s, contiguous %s: %s', inner, contiguous, error)
    else:
      yield np.concatenate(parts)


def _rows_of_processes(order) -> dict[int, set[int]]:
  """Process -> which of the data * fsdp parts of a batch its devices hold."""
  rows = {}
  for (i, j, _), device in np.ndenumerate(order):
    rows.setdefault(device.process_index, set()).add(i * order.shape[1] + j)
  return rows


def replicated(mesh) -> NamedSharding:
  """Whole on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh) -> NamedSharding:
  """The first axis cut over 'data' and 'fsdp', the others whole."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def check_batch(mesh, batch_size: int, key='batch_size'):
  """Raises ConfigError unless each of the data * fsdp parts of the mesh gets the same number of examples."""
  parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
  if batch_size % parts or batch_size < 1:
    near = max(parts, batch_size // parts * parts)
    raise ConfigError(
      f'{key} {batch_size} cannot be cut in {parts} equal parts (mesh data {mesh.shape["data"]} x '
      f'fsdp {mesh.shape["fsdp"]}); nearest: {near} or {near + parts}'
    )


def local_rows(mesh, batch_size: int) -> range:
  """Rows of the global batch that live on devices of this process, which is what it has to load.

  Processes that share a tensor group get the same rows. Raises ConfigError if the batch cannot be cut evenly, or if the
  rows are scattered.
  """
  check_batch(mesh, batch_size)
  indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
  spans = sorted({rows.indices(batch_size)[:2] for (rows,) in indices})
  if any(end != begin for (_, end), (begin, _) in zip(spans, spans[1:], strict=False)):
    raise ConfigError(f'this process would hold scattered rows {spans} of the batch; build the mesh with make_mesh')
  return range(spans[0][0], spans[-1][1])
