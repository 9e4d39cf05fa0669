"""Hardware that is not there: published figures of chips, and compile-only devices of slices and nodes made of them.

A topology is written CHIP:SHAPE, as the vendors write it: `v5e:4x4`, `v5p:4x4x4`, `h100:8` (one node), `cpu:8`;
`4*v5e:16x16` is four slices joined by the data center network.
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Mapping

import jax
from jax.experimental import topologies

from mim_jax.errors import UserError, nearest

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published figures of one accelerator.

  Attributes:
    platform: 'tpu', 'cuda' or 'cpu', as JAX calls it.
    flops: dense bfloat16 operations per second.
    clock: Hz at which `flops` holds.
    hbm: bytes that a program can have.
    bandwidth: bytes per second of that memory.
    link: bytes per second out of a chip into its slice or node, all links together.
    network: bytes per second out of a chip to other slices or nodes.
    links: over which `link` is spread; a neighbour is at the end of one.
    island: chips of the largest slice, or of a node.
    shapes: examples for messages.
  """

  name: str
  platform: str
  flops: float = 0.0
  clock: float = 0.0
  hbm: float = math.inf
  bandwidth: float = 0.0
  link: float = 0.0
  links: int = 1
  network: float = 0.0
  island: int = 1
  shapes: tuple[str, ...] = ()


# TPUs: docs.cloud.google.com/tpu/docs/v5e, /v5p, /v6e. The bandwidth between chips is published as the sum of both
# directions; half of it is `link`. The clock is the peak over the operations of a cycle, 2 for each of the multipliers:
# v5e 4 units of 128 x 128, v5p 8 of them (two cores), v6e 4 x 256 x 256; the compiler counts these clocks: products
# of 4096^3 come to 127, 252 and 456 thousand operations a cycle. `hbm` is what the compiler lets a program have, as it
# says when it refuses one. The network between slices: 2 x 100 Gbit/s per host of 8 (v5e), 50 Gbit/s per chip (v5p),
# 4 x 200 Gbit/s per host of 8 (v6e).
# H100 SXM5: NVIDIA's data sheet, 989.4 TFLOP/s without sparsity = 132 SM x 4096 x 1.83 GHz, 80 GB, 3.35 TB/s, NVLink
# 900 GB/s both ways; DGX H100: 8 x 400 Gbit/s of network per node. JAX reserves three quarters of the memory of a GPU
# unless XLA_PYTHON_CLIENT_MEM_FRACTION says more.
CHIPS = {
  chip.name: chip
  for chip in (
    Chip('v5e', 'tpu', 197e12, 1.5e9, 15.75 * GIB, 819e9, 200e9, 4, 3.125e9, 256, ('2x4', '4x4', '8x8', '16x16')),
    Chip(
      'v5p', 'tpu', 459e12, 1.75e9, 95.74 * GIB, 2765e9, 600e9, 6, 6.25e9, 8960, ('2x2x2', '4x4x4', '4x8x8', '8x8x16')
    ),
    Chip('v6e', 'tpu', 918e12, 1.75e9, 31.25 * GIB, 1638e9, 400e9, 4, 12.5e9, 256, ('2x4', '4x4', '8x8', '16x16')),
    Chip('h100', 'cuda', 989.4e12, 1.83e9, 0.75 * 80e9, 3352e9, 450e9, 1, 50e9, 8, ('8', '16', '64')),
    Chip('cpu', 'cpu', shapes=('1', '8')),
  )
}

# GpuTargetConfigProto of XLA for an H100 SXM5, from the same data sheet and the CUDA programming guide's table of
# compute capability 9.0.
H100_TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Topology:
  """`slices` slices or nodes of `chip`, each of `shape`; devices of a slice are numbered one after another."""

  chip: Chip
  shape: tuple[int, ...]
  slices: int = 1

  def __str__(self):
    if self.chip.platform != 'tpu':
      return f'{self.chip.name}:{self.devices}'
    return f'{self.slices}*' * (self.slices > 1) + f'{self.chip.name}:{"x".join(map(str, self.shape))}'

  @property
  def island(self) -> int:
    """Devices that reach each other without the slow network."""
    return math.prod(self.shape)

  @property
  def devices(self) -> int:
    return self.slices * self.island


def parse(text: str) -> Topology:
  """The topology written as 'v5e:4x4', '4*v5e:16x16', 'h100:8' or 'cpu:8'. Raises UserError for any other."""
  match = re.fullmatch(r'(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)', text.strip().lower())
  if not match or match[2] not in CHIPS:
    known = '\n'.join(f'  {chip.name + ":":<6}{", ".join(chip.shapes)}' for chip in CHIPS.values())
    near = f' ({nearest(match[2], CHIPS)})' if match else ''
    raise UserError(
      f'topology {text!r} is unknown{near}; expected CHIP:SHAPE, or N*CHIP:SHAPE for N slices, '
      f'with one of these chips and, for example, these shapes:\n{known}'
    )
  chip, shape, slices = CHIPS[match[2]], tuple(int(n) for n in match[3].split('x')), int(match[1] or 1)
  rank = {'v5e': 2, 'v5p': 3, 'v6e': 2}.get(chip.name, 1)
  size = math.prod(shape)
  if len(shape) != rank or not size or not slices:
    raise UserError(f'topology {text!r}: {chip.name} has shapes of {rank} number(s), such as {", ".join(chip.shapes)}')
  if chip.platform == 'tpu' and size > chip.island:
    raise UserError(
      f'topology {text!r}: a slice of {chip.name} has at most {chip.island} chips; '
      f'write N*{chip.name}:{chip.shapes[-1]} for N slices'
    )
  if chip.platform == 'cuda':
    size *= slices
    if size > chip.island and size % chip.island:
      raise UserError(
        f'topology {text!r}: nodes have {chip.island} GPUs; {size} is neither less nor a multiple of that'
      )
    return Topology(chip, (min(size, chip.island),), max(1, size // chip.island))
  return Topology(chip, shape, slices)


def of_size(chip: Chip, count: int) -> Topology:
  """The usual topology of `count` chips, as near to a cube as slices come. Raises UserError when there is none."""
  if chip.platform != 'tpu':
    return parse(f'{chip.name}:{count}')
  slices = max(1, count // 256) if chip.island == 256 else 1
  if count % slices or (count // slices) & (count // slices - 1):
    raise UserError(f'{count} chips of {chip.name}: give a power of two')
  shape, axis = [1] * (3 if chip.name == 'v5p' else 2), -1
  while math.prod(shape) * slices < count:
    shape[axis] *= 2
    axis = axis - 1 if -axis < len(shape) else -1
  return Topology(chip, tuple(shape), slices)


def environment(topology: Topology, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
  """Environment of a process that compiles for `topology` on a machine with or without accelerators; set before JAX is
  imported.

  Flags of the compiler that the caller has set (XLA_FLAGS, LIBTPU_INIT_ARGS) stay, as a run would have them too.
  """
  env = {key: value for key, value in environ.items() if not key.startswith('JAX_')}
  flags = env.pop('XLA_FLAGS', '').split()
  env |= {'JAX_PLATFORMS': 'cpu', 'JAX_ENABLE_COMPILATION_CACHE': 'false'}
  if topology.chip.platform == 'tpu':
    # Without these libtpu asks the metadata server of a Cloud TPU VM, and only one process may load it.
    env |= {'TPU_SKIP_MDS_QUERY': '1', 'TPU_WORKER_HOSTNAMES': 'localhost', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
  elif topology.chip.platform == 'cuda':
    # The plugin checks for a driver when it is loaded. Autotuning would measure kernels on a GPU; without it Triton
    # takes tiles that do not
    # fit every product, cuBLAS does not.
    env |= {'JAX_SKIP_CUDA_CONSTRAINTS_CHECK': '1'}
    flags += ['--xla_gpu_autotune_level=0', '--xla_gpu_enable_triton_gemm=false']
  else:
    flags += [f'--xla_force_host_platform_device_count={topology.devices}']
  return env | {'XLA_FLAGS': ' '.join(flags)}


def require_compiler(topology: Topology):
  """Raises UserError when the compiler for `topology` is not installed, with the extra that brings it."""
  wanted = {'tpu': ('libtpu', 'libtpu'), 'cuda': ('jax_plugins.xla_cuda13', 'jax-cuda13-plugin')}.get(
    topology.chip.platform
  )
  if wanted and not installed(wanted[0]):
    raise UserError(
      f'{topology}: the compiler for {topology.chip.name} is in {wanted[1]}, '
      f'which is not installed: pip install "mim-jax[plan]"'
    )


def installed(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:  # of the parent package
    return False


def _tell_jax_of_cudnn():
  """JAX asks cuDNN's library for its version before it lowers attention to it. Compiling needs the name of the call only, so where the
  library is not installed the version in `H100_TARGET` answers. No public function of JAX says so.
  """
  from jax._src.lib import cuda_versions  # there since `require_compiler` has found the plugin

  try:
    cuda_versions.cudnn_get_version()
  except RuntimeError:
    cuda_versions.cudnn_get_version = lambda: 90800


def devices(topology: Topology) -> list:
  """Compile-only devices of `topology` in a process with its `environment`. Raises UserError for a shape that the
  compiler refuses.
  """
  require_compiler(topology)
  chip = topology.chip
  if chip.platform == 'cpu':
    return jax.devices('cpu')[: topology.devices]
  if chip.platform == 'tpu':
    options = {'num_slices': topology.slices} if topology.slices > 1 else {}
    if topology.island < 4:  # hosts have 2 x 2 chips unless told otherwise
      options['chips_per_host_bounds'] = [*topology.shape, 1, 1][:3]
    name = f'{chip.name}:{"x".join(map(str, topology.shape))}'
    arguments = dict(platform='tpu', topology_name=name, **options)
  else:
    shape = f'1x{topology.slices}x{topology.island}'  # partitions x hosts x devices of a host
    _tell_jax_of_cudnn()
    arguments = dict(platform='cuda', topology_name='', target_config=H100_TARGET, topology=shape)
  try:
    found = topologies.get_topology_desc(**arguments).devices
  except (jax.errors.JaxRuntimeError, ValueError, RuntimeError) as error:
    raise UserError(
      f'{topology}: the compiler knows no such shape; try {", ".join(chip.shapes)}. '
      f'It says: {str(error).splitlines()[0][:300]}'
    ) from error
  if len(found) != topology.devices:
    raise UserError(f'{topology}: the compiler makes {len(found)} devices of it, expected {topology.devices}')
  return found
