"""What a compiled program does on one device: floating-point operations and bytes of main memory.

Everything is counted from the optimised HLO with loop bodies times their trip count (`hlo.Module.runs`), so scanned and
unrolled layers give the same figures. The compiler's own `cost_analysis()` counts a scanned layer once.
"""

import dataclasses
import math
import re

import numpy as np

from mim_jax.plan.hlo import COLLECTIVES, Computation, Instruction, Module

# These move no data themselves: names for other values, parts of asynchronous pairs that are counted at their start,
# loops whose bodies count.
FREE = {
  *(
    'parameter',
    'constant',
    'tuple',
    'get-tuple-element',
    'bitcast',
    'while',
    'conditional',
    'call',
    'after-all',
    'partition-id',
  ),
  *(
    'replica-id',
    'opt-barrier',
    'iota',
    'domain',
    'add-dependency',
    'copy-done',
    'slice-done',
    'async-done',
    'async-update',
  ),
}
FREE_TARGETS = {'AllocateBuffer', 'ConcatBitcast', 'AsyncCollectiveStart', 'AsyncCollectiveDone', 'Sharding'}
MOSAIC = 'tpu_custom_call'  # a Pallas kernel for TPU; the compiler's cost model does not see inside


@dataclasses.dataclass
class Work:
  """One instruction with its whole cost over a step: all its runs together.

  `kind` says where its time comes from: 'compiler' (it gives `cycles`), 'kernel' (Pallas, by the cost its author
  states), 'other' (by FLOPs and bytes), 'beside' (asynchronous copies and collectives, which are no computation).
  """

  instruction: Instruction
  times: int
  kind: str
  flops: float
  bytes: float
  cycles: float


def works(module: Module) -> list[Work]:
  """Every instruction that computes or moves data, loops multiplied out."""
  counter = _Flops(module)
  found = []
  for computation, times in module.runs():
    for instruction in computation.instructions.values():
      if instruction.opcode in FREE:
        continue
      stated = stated_cost(instruction)
      flops, size = stated or (counter.of(computation, instruction), memory_bytes(module, computation, instruction))
      found.append(
        Work(instruction, times, _kind(instruction), times * flops, times * size, times * instruction.cycles)
      )
  return found


def _kind(instruction: Instruction) -> str:
  if is_kernel(instruction):
    return 'kernel'
  if instruction.opcode.endswith('-start') or instruction.opcode in COLLECTIVES:
    return 'beside'
  return 'compiler' if instruction.cycles else 'other'


def is_kernel(instruction: Instruction) -> bool:
  return instruction.opcode == 'custom-call' and instruction.target == MOSAIC


def stated_cost(instruction: Instruction) -> tuple[float, float] | None:
  """(FLOPs, bytes) that the author of a Pallas kernel gave as its `cost_estimate`, or None."""
  match = re.search(r'"cost_estimate":\{([^}]*)\}', instruction.rest) if is_kernel(instruction) else None
  if not match:
    return None
  values = {key: float(number) for key, number in re.findall(r'"(\w+)":"?(-?[\d.e+]+)"?', match[1])}
  return values.get('flops', 0.0), values.get('bytes_accessed', 0.0)


# ---- floating-point operations ----


class _Flops:
  """2 per multiplication with addition in matrix products and convolutions; elementwise work is not counted."""

  def __init__(self, module: Module):
    self.module = module
    self.inside: dict[str, float] = {}

  def of(self, computation: Computation, instruction: Instruction) -> float:
    if instruction.opcode == 'dot':
      return 2 * instruction.shape[0].size * _contracted(instruction, computation.inputs(instruction)[0].shape[0].dims)
    if instruction.opcode == 'convolution':
      return convolution_flops(instruction, *(i.shape[0].dims for i in computation.inputs(instruction)))
    if instruction.opcode == 'custom-call':
      return _library_flops(computation, instruction)
    if instruction.opcode in ('fusion', 'map', 'async-start'):
      return sum(self._all(name) for name in instruction.called)
    return 0.0

  def _all(self, name: str) -> float:
    if name not in self.inside:
      computation = self.module.computations[name]
      self.inside[name] = sum(self.of(computation, i) for i in computation.instructions.values())
    return self.inside[name]


def _contracted(instruction, lhs) -> int:
  dims = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', instruction.rest)
  return math.prod(lhs[int(d)] for d in dims[1].split(',') if d) if dims else 1


def convolution_flops(instruction: Instruction, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> float:
  """FLOPs of a convolution [lhs, rhs]; products with padding or with the holes of a dilation are none.

  The TPU compiler writes every matrix product as a convolution, batch dimensions as spatial ones whose window hits one
  input.
  """
  left, right, out = re.fullmatch(r'(\w+)_(\w+)->(\w+)', instruction.attribute('dim_labels')).groups()
  window = dict(re.findall(r'(\w+)=([\w\-x]+)', instruction.attribute('window')))
  spatial = [c for c in out if c.isdigit()]
  result = instruction.shape[0].dims
  pairs = 1
  for n, label in enumerate(spatial):
    field = lambda name, default: window[name].split('x')[n] if name in window else default
    low = int(field('pad', '0_0').split('_')[0])
    stride, holes, spread = int(field('stride', '1')), int(field('lhs_dilate', '1')), int(field('rhs_dilate', '1'))
    size, span = rhs[right.index(label)], (lhs[left.index(label)] - 1) * holes + 1
    # A reversed window meets the same number of inputs.
    at = (np.arange(result[out.index(label)]) * stride - low)[:, None] + np.arange(size)[None] * spread
    pairs *= int(np.sum((at >= 0) & (at < span) & (at % holes == 0)))
  groups = int(instruction.attribute('batch_group_count') or 1)
  # The kernel's input features are those of one group already.
  return 2 * result[out.index('b')] * result[out.index('f')] * rhs[right.index('i')] * pairs / groups


def _library_flops(computation, instruction) -> float:
  """FLOPs of a call into cuBLAS, cuDNN attention or oneDNN; 0 for other calls."""
  target = instruction.target
  shapes = [i.shape[0].dims for i in computation.inputs(instruction)]
  if target.startswith(('__cublas$', '__onednn$matmul')):
    dims = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.rest)
    axes = [int(d) for d in re.findall(r'\d+', dims[1])] if dims else [len(shapes[0]) - 1]
    return 2 * instruction.shape[0].size * math.prod(shapes[0][d] for d in axes)
  if target.startswith('__cudnn$fmha'):
    # Two products of [B, H, N, M] and d forward, five backward; the text says neither whether tokens or heads come first in q.
    logits = re.search(r'"intermediate_tensor_shape": ?\{.*?"dimensions": ?\[([^\]]*)\]', instruction.rest)
    pairs = math.prod(int(d) for d in re.findall(r'\d+', logits[1]))
    return 2 * pairs * shapes[0][-1] * (5 if 'Backward' in target else 2)
  return 0.0


# ---- main memory ----


def memory_bytes(module: Module, computation: Computation, instruction: Instruction) -> float:
  """Bytes that one run reads from and writes to the main memory of the device; values in on-chip memory are free.

  Of an operand that is only sliced, the slices count; of a result that updates an operand in place, the update counts.
  """
  opcode = instruction.opcode
  if opcode == 'custom-call' and instruction.target in FREE_TARGETS:
    return 0.0
  inputs = computation.inputs(instruction)
  if opcode in ('copy-start', 'slice-start'):  # shapes: (result, source, context), ((source), result, context)
    result = instruction.shape[1 if opcode == 'slice-start' else 0]
    return result.bytes * sum(array.space == 0 for array in (result, inputs[0].shape[0]))
  if opcode.endswith('-done') or opcode == 'custom-call' and instruction.target == 'GatherScatterIndicesBitpacked':
    return 0.0
  if opcode.removesuffix('-start') in COLLECTIVES and opcode.endswith('-start'):
    return _bytes(instruction.shape)  # operands and results
  if opcode in ('dynamic-slice', 'slice', 'gather'):
    return _bytes(instruction.shape) * (1 + (inputs[0].shape[0].space == 0))
  if opcode == 'dynamic-update-slice':
    return 2 * _bytes(inputs[1].shape) if instruction.shape[0].space == 0 else 0.0
  if opcode == 'fusion':
    return _fusion_bytes(module, inputs, instruction)
  results = (
    instruction.shape[:1]
    if opcode == 'custom-call' and instruction.target.startswith('__cublas$')
    else instruction.shape
  )  # no work space
  return _bytes(results) + sum(_bytes(i.shape) for i in inputs)


def _bytes(arrays) -> float:
  return sum(array.bytes for array in arrays if array.space == 0)


def _fusion_bytes(module, inputs, fusion) -> float:
  inner = module.computations[fusion.called[0]]
  passed = re.findall(r'\{(\d*)\}: \((\d+)', fusion.attribute('output_to_operand_aliasing'))
  untouched = {int(operand) for _, operand in passed} if 'async_collective' in inner.name else set()
  total = 0.0
  for number, operand in enumerate(inputs):
    if number not in untouched and operand.shape and operand.shape[0].space == 0:
      total += _read(inner, inner.parameters[number])
  results = inner.inputs(inner.root) if inner.root.opcode == 'tuple' else [inner.root]
  kept = {int(out or 0) for out, operand in passed if int(operand) in untouched}
  for number, (result, array) in enumerate(zip(results, fusion.shape, strict=False)):
    if number in kept or array.space:
      continue
    while result.opcode == 'bitcast':
      result = inner.inputs(result)[0]
    total += inner.inputs(result)[1].shape[0].bytes if result.opcode == 'dynamic-update-slice' else array.bytes
  return total


def _read(inner: Computation, parameter: Instruction) -> float:
  """Bytes of a fusion's parameter that are read: all, or the slices when nothing else looks at it."""
  whole = _bytes(parameter.shape) or sum(array.bytes for array in parameter.shape)
  total, pending = 0.0, [parameter.name]
  while pending:
    name = pending.pop()
    for user in inner.users(name):
      if user.opcode == 'bitcast':
        pending.append(user.name)
      elif user.opcode in ('dynamic-slice', 'slice', 'gather') and user.operands[0] == name:
        total += user.shape[0].bytes
      elif user.opcode == 'dynamic-update-slice' and user.operands[0] == name:
        continue  # written in place, never read
      else:
        return whole
  return min(total, whole)
