"""From what a program does to how long it takes: by the compiler's cycles, and by the chip's published peaks."""

import dataclasses
import math

from mim_jax.parallel.topology import Chip
from mim_jax.plan.collectives import Collective
from mim_jax.plan.costs import Work

# Bytes that leave a device, in units of the whole array, in the limit of many devices (ring algorithms).
PASSES = {'all-reduce': 2}


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Seconds of a step on one device; None where nothing can be said (CPU).

  Attributes:
    cycles: TPU: of the operations that the compiler's cost model gives cycles, and of Pallas kernels; GPU: `kernels`
      at the chip's clock.
    kernel_cycles: part of `cycles` in Pallas kernels, by the FLOPs and bytes that their authors state.
    other_cycles: TPU: of operations without cycles of the compiler (relayouts), by their bytes; not in `cycles`.
    compute, memory, exchange: roofline seconds of FLOPs, of main memory and of collectives, each alone.
    kernels: sum over operations of the slower of FLOPs and memory, as if nothing overlapped but within an operation.
    waiting: seconds of collectives that are not beside computation.
    seconds: of the step.
    method: 'compiler cycles' or 'roofline of every operation'.
  """

  cycles: float | None
  kernel_cycles: float | None
  other_cycles: float | None
  compute: float | None
  memory: float | None
  exchange: float | None
  kernels: float | None
  waiting: float | None
  seconds: float | None
  method: str


def of(chip: Chip, works: list[Work], sent: list[Collective]) -> Estimate:
  """The estimate of one step from all its work and collectives."""
  if not chip.flops:
    return Estimate(*[None] * 9, method='no estimate for this device')
  compute = sum(work.flops for work in works) / chip.flops
  memory = sum(work.bytes for work in works) / chip.bandwidth
  exchange = sum(collective_seconds(chip, c) for c in sent)
  waiting = sum(collective_seconds(chip, c) for c in sent if not c.hidden)
  by_kind = dict.fromkeys(('compiler', 'kernel', 'other', 'beside'), 0.0)
  for work in works:
    by_kind[work.kind] += operation_seconds(chip, work)
  kernels = sum(by_kind.values()) - by_kind['beside']
  kernel_cycles = chip.clock * by_kind['kernel']
  if chip.platform == 'tpu':
    cycles, other, how = sum(work.cycles for work in works) + kernel_cycles, by_kind['other'], 'compiler cycles'
  else:
    cycles, other, how = chip.clock * kernels, 0.0, 'roofline of every operation'
  return Estimate(
    cycles=cycles,
    kernel_cycles=kernel_cycles,
    other_cycles=chip.clock * other,
    compute=compute,
    memory=memory,
    exchange=exchange,
    kernels=kernels,
    waiting=waiting,
    # What runs beside computation shares wires and memory with the rest, so all of it together is a limit as well.
    seconds=max(cycles / chip.clock + other + waiting, exchange, memory),
    method=how,
  )


def operation_seconds(chip: Chip, work: Work) -> float:
  """The slower of an operation's FLOPs at peak and its bytes at full memory bandwidth."""
  return max(work.flops / chip.flops, work.bytes / chip.bandwidth)


def operation_cycles(chip: Chip, work: Work) -> float:
  """Cycles of one operation as in `Estimate.cycles` and `other_cycles`; bytes where the chip has no published peaks."""
  if not chip.flops:
    return work.bytes
  if work.kind == 'beside':
    return 0.0
  if chip.platform == 'tpu' and work.kind == 'compiler':
    return work.cycles
  return chip.clock * operation_seconds(chip, work)


def collective_seconds(chip: Chip, collective: Collective) -> float:
  """Time on the wires at full bandwidth: inside a slice or node over all links, then between them."""
  bytes_, members = collective.bytes, max(collective.members, 1)
  islands = math.ceil(collective.group / members)
  if collective.kind == 'collective-permute':  # one neighbour, so one link
    return bytes_ / (chip.network if islands > 1 else chip.link / chip.links)
  passes = PASSES.get(collective.kind, 1)
  inside = passes * bytes_ * (members - 1) / members / chip.link
  between = passes * bytes_ / members * (islands - 1) / islands / chip.network if islands > 1 else 0.0
  return inside + between
