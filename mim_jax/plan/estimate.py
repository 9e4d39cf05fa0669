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
    cycles: of the step without waiting for other devices: by the compiler's cost model and the stated cost of Pallas
      kernels (TPU), or of the roofline at the chip's clock (GPU).
    kernel_cycles: part of them in Pallas kernels, from their stated cost.
    compute, memory, exchange: roofline seconds of FLOPs, of main memory and of collectives, each alone.
    roofline: their largest, the fastest that the chip could be if everything overlapped.
    kernels: sum over operations of the slower of FLOPs and memory, as if nothing overlapped but within an operation.
    waiting: seconds of collectives that are not beside computation.
    seconds: of the step.
    method: 'compiler cycles' or 'roofline of every operation'.
  """

  cycles: float | None
  kernel_cycles: float | None
  compute: float | None
  memory: float | None
  exchange: float | None
  roofline: float | None
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
  kernels = sum(operation_seconds(chip, work) for work in works)
  kernel_cycles = chip.clock * sum(operation_seconds(chip, work) for work in works if work.kernel)
  if chip.platform == 'tpu':
    cycles, how = sum(work.cycles for work in works) + kernel_cycles, 'compiler cycles'
  else:
    cycles, how = chip.clock * kernels, 'roofline of every operation'
  return Estimate(
    cycles=cycles,
    kernel_cycles=kernel_cycles,
    compute=compute,
    memory=memory,
    exchange=exchange,
    roofline=max(compute, memory, exchange),
    kernels=kernels,
    waiting=waiting,
    # Collectives beside computation share the wires with the others, so all of them together are a limit as well.
    seconds=max(cycles / chip.clock + waiting, exchange),
    method=how,
  )


def operation_seconds(chip: Chip, work: Work) -> float:
  """The slower of an operation's FLOPs at peak and its bytes at full memory bandwidth."""
  return max(work.flops / chip.flops, work.bytes / chip.bandwidth)


def operation_cycles(chip: Chip, work: Work) -> float:
  """Cycles of one operation by the same measure as `Estimate.cycles`; bytes where the chip has no published peaks."""
  if not chip.flops:
    return work.bytes
  if chip.platform == 'tpu' and not work.kernel:
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
