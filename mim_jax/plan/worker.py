"""Compiles one train step in a process of its own: `config.json` and `job.json` in, `answer.json` out.

A process of its own, because what it compiles for is decided by the environment before JAX is imported, and because a
compiler that runs out of memory must not take its caller along.
"""

import json
import math
import re
import sys
import time
from pathlib import Path

import jax

from mim_jax import config, step
from mim_jax.errors import ConfigError, UserError
from mim_jax.parallel import mesh as meshes
from mim_jax.parallel import topology as topologies
from mim_jax.plan import activations, collectives, contributors, costs, estimate, flops, hlo

PACKAGE = 'mim_jax'
UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


def main():
  folder = Path(sys.argv[1])
  job = json.loads((folder / 'job.json').read_text())
  try:
    cfg = config.read(folder / 'config.json')
    answer = {'plan': plan(cfg, topologies.parse(job['topology']), job['examples'], job['hlo'])}
  except UserError as error:
    answer = {'error': str(error), 'config': isinstance(error, ConfigError)}
  (folder / 'answer.json').write_text(json.dumps(answer))


def plan(cfg, topology: topologies.Topology, examples: int, hlo_file: str = '') -> dict:
  """Everything that can be said about the train step of `cfg` on `topology`, as plain JSON values.

  Args:
    examples: of the data set, for epochs.
    hlo_file: where to write the compiled program as text; '' for nowhere.

  Raises:
    UserError: the config does not fit this number of devices, or the compiler refuses it for another reason than
      memory.
  """
  mesh = meshes.make_mesh(cfg.mesh, topologies.devices(topology))
  program = step.assemble(cfg, mesh, examples)
  facts = describe(cfg, topology, program)
  began = time.monotonic()
  try:
    compiled = program.step.lower(program.train, program.frozen, program.batch).compile()
  except jax.errors.JaxRuntimeError as error:
    needed = needed_memory(str(error))
    if needed is None:
      raise UserError(f'{topology}: the compiler refuses this step: {str(error)[:2000]}') from error
    return facts | refused(facts, needed, whole='Used' in str(error)) | {'compile_seconds': time.monotonic() - began}
  facts['compile_seconds'] = time.monotonic() - began
  text = compiled.as_text()
  if hlo_file:
    Path(hlo_file).write_text(text)
  return (
    facts
    | memory(facts, topology, compiled.memory_analysis())
    | time_of(cfg, topology, program, hlo.parse(text), facts)
  )


def describe(cfg, topology, program: step.Program) -> dict:
  """What is known before compiling."""
  size = lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
  rows = math.prod(program.mesh.shape[axis] for axis in meshes.BATCH_AXES)
  return {
    'topology': str(topology),
    'chip': topology.chip.name,
    'devices': topology.devices,
    'mesh': dict(program.mesh.shape),
    'batch_size': cfg.batch_size,
    'accumulate': cfg.accumulate,
    'images_per_device': cfg.batch_size / rows,
    'images_per_device_at_once': cfg.batch_size / rows / cfg.accumulate,
    'remat': cfg.method.remat,
    'scan': cfg.method.scan,
    'couples': program.method.couples,
    'parameters': size(program.train['params']),
    'frozen_parameters': size(program.frozen),
    'model_flops_per_image': flops.per_image(cfg),
    'model_flops_formula': flops.FORMULA,
    'kept_bytes_per_image': activations.kept_per_image(cfg, program.mesh),
    'steps': program.total_steps,
    'steps_per_epoch': program.steps_per_epoch,
    'hbm_limit_bytes': topology.chip.hbm if math.isfinite(topology.chip.hbm) else None,
    'hbm': {
      'params': shard_bytes(program.train['params']),
      'optimizer': shard_bytes(program.train['opt']),
      'state': shard_bytes([tree for name, tree in program.train.items() if name not in ('params', 'opt')]),
      'frozen': shard_bytes(program.frozen),
      'batch': shard_bytes(program.batch),
    },
  }


def shard_bytes(tree) -> int:
  """Bytes of one device's part of abstract arrays with shardings."""
  return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def memory(facts: dict, topology, found) -> dict:
  """HBM of one device by what it is for: exact sizes of the arguments, the rest as the compiler lays it out.

  `padding` is what arguments and results take beyond their size, `temporaries` activations, gradients and gathered
  weights.
  """
  arguments = sum(facts['hbm'].values())
  kept = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
  parts = facts['hbm'] | {
    'padding': max(0, kept - arguments),
    'temporaries': found.temp_size_in_bytes,
    'program': found.generated_code_size_in_bytes,
  }
  total = sum(parts.values())
  fits = topology.chip.platform == 'tpu' or total <= topology.chip.hbm  # that compiler refuses what does not fit
  return {'hbm': parts, 'hbm_bytes': total, 'fits': fits}


def refused(facts: dict, needed: float, whole: bool) -> dict:
  """Memory of a refused program, which wanted `needed` bytes, or (not `whole`) that many besides its arguments."""
  arguments = sum(facts['hbm'].values())
  temporaries = max(0.0, needed - arguments) if whole else needed
  return {'hbm': facts['hbm'] | {'temporaries': temporaries}, 'hbm_bytes': arguments + temporaries, 'fits': False}


def time_of(cfg, topology, program, module: hlo.Module, facts: dict) -> dict:
  """FLOPs, traffic, cycles, collectives and contributors of the compiled program, and the time they make."""
  chip = topology.chip
  works = costs.works(module)
  sent = collectives.find(module, dict(program.mesh.shape), topology.island)
  found = estimate.of(chip, works, sent)
  seconds = found.seconds
  notes = []
  if found.kernel_cycles:
    notes.append(
      "Pallas kernels are invisible to the compiler's cost model; theirs are the cycles of the cost they state"
    )
  if any(work.kind == 'kernel' and costs.stated_cost(work.instruction) is None for work in works):
    notes.append('a Pallas kernel states no cost: its operations are not counted, its time is that of its operands')
  if module.uncounted:
    notes.append(f'loops without a known trip count, counted once: {", ".join(module.uncounted)}')
  run = seconds and seconds * program.total_steps / 3600
  return {
    'hlo_flops': sum(work.flops for work in works),
    'hlo_memory_bytes': sum(work.bytes for work in works),
    'collectives': [
      {
        'kind': c.kind,
        'axis': c.axes,
        'devices': c.group,
        'count': c.count,
        'bytes': c.bytes,
        'beside_computation': c.hidden,
        'seconds': estimate.collective_seconds(chip, c) if chip.flops else None,
      }
      for c in sent
    ],
    'estimated_cycles': found.cycles,
    'estimated_kernel_cycles': found.kernel_cycles,
    'estimated_other_cycles': found.other_cycles,
    'estimated_by': found.method,
    'estimated_step_seconds': seconds,
    'roofline_seconds': {
      'flops': found.compute,
      'memory': found.memory,
      'collectives': found.exchange,
      'each_operation': found.kernels,
    },
    'waiting_seconds': found.waiting,
    'estimated_utilisation': seconds
    and facts['model_flops_per_image'] * cfg.batch_size / (topology.devices * chip.flops * seconds),
    'images_per_second': seconds and cfg.batch_size / seconds,
    'hours': run,
    'device_hours': run and run * topology.devices,
    'contributors': contributors.rank(module, works, lambda work: estimate.operation_cycles(chip, work), PACKAGE),
    'contributors_by': 'bytes' if not chip.flops else 'cycles',
    'notes': notes,
  }


def needed_memory(message: str) -> float | None:
  """Bytes that a program wanted, from the compiler's refusal; None when it was refused for something else."""
  for pattern in (r'Used ([\d.]+)([KMGT]?) of', r'HLO temporaries \(([\d.]+)([KMGT]?)\)'):
    match = re.search(pattern, message)
    if match:
      return float(match[1]) * UNITS[match[2]]
  return None


if __name__ == '__main__':
  main()
