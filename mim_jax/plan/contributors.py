"""Which part of the source an operation of a compiled program comes from, and which parts cost most."""

import re
from collections.abc import Callable

from mim_jax.plan.costs import Work
from mim_jax.plan.hlo import Instruction, Module


def rank(
  module: Module, found: list[Work], weight: Callable[[Work], float], package: str, count: int = 10
) -> list[dict]:
  """The `count` parts of the source that cost most, largest first, as dicts with their share and cost.

  Args:
    weight: cost of a Work, in any unit.
    package: folder name of the code whose lines are named as the source.
  """
  total = sum(weight(work) for work in found) or 1.0
  costs: dict[tuple, float] = {}
  lines: dict[tuple, dict[str, float]] = {}
  for work in found:
    cost = weight(work)
    if cost <= 0:
      continue
    key = code_name(work.instruction)
    costs[key] = costs.get(key, 0.0) + cost
    line = module.source(work.instruction, package)
    lines.setdefault(key, {})[line] = lines.setdefault(key, {}).get(line, 0.0) + cost
  ranked = sorted(costs.items(), key=lambda item: -item[1])[:count]
  return [
    {
      'name': name,
      'pass': direction,
      'operation': operation,
      'source': max(lines[key], key=lines[key].get),
      'share': cost / total,
      'cost': cost,
    }
    for key, cost in ranked
    for name, direction, operation in (key,)
  ]


PLUMBING = {
  'while',
  'body',
  'cond',
  'closed_call',
  'checkpoint',
  'remat',
  'remat2',
  'scan',
  'pjit',
  'custom_vjp_call',
  'custom_jvp_call',
  'shard_map',
}


def code_name(instruction: Instruction) -> tuple[str, str, str]:
  """(module path, pass, operation) of the code behind an instruction.

  'jit(step)/transpose(jvp(Decoder))/while/body/closed_call/blocks/attn/bhnm,bmhd->bnhd/dot_general' is
  ('Decoder/blocks/attn', 'backward', 'dot_general bhnm,bmhd->bnhd'). What is computed a second time to save memory is
  'recomputed'; what is not differentiated has no pass.
  """
  if not instruction.op_name:
    return '(made by the compiler)', '', instruction.opcode
  parts = instruction.op_name.split('/')
  direction, path, detail = '', [], ''
  for part in parts[1:-1] if len(parts) > 1 else []:
    if part.startswith(('transpose(', 'jvp(')) and not direction:
      direction = 'backward' if part.startswith('transpose(') else 'forward'
    if 'rematted_computation' in part:
      direction = 'recomputed'
      continue
    name = re.sub(r'^(?:\w+\()+|\)+$', '', part)
    if '->' in name:
      detail = f' {name}'
    elif name and name not in PLUMBING:
      path.append(name)
  return '/'.join(path) or 'step', direction, re.sub(r'^(?:\w+\()+|\)+$', '', parts[-1]) + detail
