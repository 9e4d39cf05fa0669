"""What devices send to each other in a compiled program: kind, mesh axes, bytes, and whether the others wait."""

import dataclasses
import math
import re

import numpy as np

from mim_jax.plan.hlo import COLLECTIVES, Instruction, Module


@dataclasses.dataclass
class Collective:
  """Collectives of one kind, over the same axes, started and waited for in the same way.

  Attributes:
    axes: mesh axes along which the devices of a group differ, 'fsdp' or 'data+fsdp'.
    group: devices in a group; members: of them in the first device's slice or node.
    bytes: that a device holds of the whole array (gathered, or before it is scattered), summed over all runs.
    hidden: runs beside computation (an asynchronous pair) instead of holding it up.
  """

  kind: str
  axes: str
  group: int
  members: int
  hidden: bool
  bytes: float = 0.0
  count: int = 0


def find(module: Module, mesh: dict[str, int], island: int) -> list[Collective]:
  """Collectives of a step on a mesh (axis -> size), largest first.

  Args:
    island: devices of a slice or node, numbered one after another; between islands the slow network is used.
  """
  found: dict[tuple, Collective] = {}

  def add(computation, instruction, times, hidden):
    kind = instruction.opcode.removesuffix('-start')
    arrays = [i.shape[0] for i in computation.inputs(instruction) if i.shape]
    if kind == 'all-gather':  # the start of a pair has operands and results as its shape
      arrays = (
        instruction.shape[len(arrays) :][: len(arrays)] if instruction.opcode.endswith('-start') else instruction.shape
      )
    size = sum(array.bytes for array in arrays)
    axes, group, members = _groups(instruction, mesh, island)
    if group < 2:
      return
    entry = found.setdefault((kind, axes, hidden), Collective(kind, axes, group, members, hidden))
    entry.bytes += times * size
    entry.count += times

  for computation, times in module.runs():
    for instruction in computation.instructions.values():
      opcode = instruction.opcode
      if opcode.removesuffix('-start') in COLLECTIVES:
        add(
          computation, instruction, times, hidden=opcode.endswith('-start') and '"is_sync":true' not in instruction.rest
        )
      elif opcode == 'fusion':
        for inner, collective, hidden in _fused(module, instruction):
          add(inner, collective, times, hidden)
  return sorted(found.values(), key=lambda c: -c.bytes)


def _fused(module, fusion):
  """Collectives that begin inside a TPU fusion: by an asynchronous start, or written as all-reduce and slice."""
  for name in fusion.called:
    inner = module.computations[name]
    for instruction in inner.instructions.values():
      if instruction.opcode not in COLLECTIVES:
        continue
      if any(
        user.opcode == 'custom-call' and user.target == 'AsyncCollectiveStart' for user in inner.users(instruction.name)
      ):
        yield inner, instruction, True
      elif 'reduce-scatter' in name:
        yield inner, dataclasses.replace(instruction, opcode='reduce-scatter'), 'async' in name


def _groups(instruction: Instruction, mesh: dict[str, int], island: int) -> tuple[str, int, int]:
  """(axes that differ within a group, devices in a group, of them in one island)."""
  total = math.prod(mesh.values())
  pairs = re.search(r'source_target_pairs=\{(.*?)\}\}', instruction.rest)
  if pairs:
    pair_list = [tuple(int(n) for n in re.findall(r'\d+', pair)) for pair in pairs[1].split('},')]
    ids = [pair for pair in pair_list if pair[0] != pair[1]]
    group = np.unique(np.ravel(ids)) if ids else np.zeros(1, int)
    members = 1 if any(a // island != b // island for a, b in ids) else len(group)
    steps = np.array(ids or [(0, 0)])
  else:
    group = device_group(instruction.rest, total)
    members = int(np.sum(group // island == group[0] // island))
    steps = np.stack([np.full_like(group, group[0]), group], axis=1)
  begin, end = (np.stack(np.unravel_index(column, tuple(mesh.values()))) for column in steps.T)
  axes = [axis for axis, differs in zip(mesh, np.any(begin != end, axis=1), strict=True) if differs]
  return '+'.join(axes), len(group), members


def device_group(text: str, total: int) -> np.ndarray:
  """Devices of the first group in `replica_groups=...`, in any of the three forms that HLO has for it."""
  listed = re.search(r'replica_groups=\{\{([\d,]+)\}', text)
  if listed:
    return np.array([int(n) for n in listed[1].split(',')])
  iota = re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text)
  if iota:
    shape, dims = ([int(n) for n in part.split(',')] for part in iota.group(1, 2))
    order = np.arange(math.prod(dims)).reshape(dims)
    if iota[3]:
      order = order.transpose([int(n) for n in iota[3].split(',')])
    return order.reshape(shape)[0]
  named = re.search(r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}', text)
  if named:
    chosen = {axis: (before, size) for axis, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named[3])}
    dims, index = [], []
    for axis, length in re.findall(r"'([^']+)'=(\d+)", named[1]):
      # A part of an axis is written 'axis':(before)size; the rest of the axis lies before and after it.
      before, size = chosen.get(axis, ('1', '1'))
      before, size = int(before or 1), int(size or length)
      dims += [before, size, int(length) // before // size]
      index += [0, slice(None), 0]
    return _device_order(named[2], total).reshape(dims)[tuple(index)].ravel()
  return np.arange(total)


def _device_order(text: str | None, total: int) -> np.ndarray:
  """Devices in the order of a named mesh: `[2,4]T(1,0)` transposes 0, 1, ...; `3,1,2,0` lists; None is 0, 1, ..."""
  iota = re.fullmatch(r'\[([\d,]+)\](?:T\(([\d,]+)\))?', text or f'[{total}]')
  if not iota:
    return np.array([int(n) for n in text.split(',')])
  order = np.arange(total).reshape([int(n) for n in iota[1].split(',')])
  return (order.transpose([int(n) for n in iota[2].split(',')]) if iota[2] else order).ravel()
