"""Reading compiled programs: optimised HLO text as computations of instructions, and how often each one runs.

The text is what `compiled.as_text()` gives for TPU, GPU and CPU. Only what `plan` needs is understood: shapes with
their memory space, operands, attributes, called computations, trip counts of loops, and the Python source behind an
instruction.
"""

import dataclasses
import functools
import math
import re

BITS = {
  **dict.fromkeys(('pred', 's8', 'u8'), 8),
  **dict.fromkeys(('bf16', 'f16', 's16', 'u16'), 16),
  **dict.fromkeys(('f32', 's32', 'u32'), 32),
  **dict.fromkeys(('f64', 's64', 'u64', 'c64'), 64),
  **dict.fromkeys(('s4', 'u4', 'f4e2m1fn'), 4),
  **dict.fromkeys(('s2', 'u2'), 2),
  'c128': 128,
  'token': 0,
  'opaque': 0,
}  # f8 of every kind: 8, see Array.bytes

COLLECTIVES = (
  *('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all'),
  *('collective-permute', 'collective-broadcast'),
)

_HEAD = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$')
_NAME = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = ')
_ARRAY = re.compile(r'([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?')
_SPACE = re.compile(r'S\((\d+)\)')
_CALLED = re.compile(
  r'\b(?:calls|to_apply|body|condition|true_computation|false_computation|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)'
)


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of a shape; `space` 0 is the main memory of the device, others are on the chip (TPU) or on the host."""

  dtype: str
  dims: tuple[int, ...]
  space: int = 0

  @property
  def size(self) -> int:
    return math.prod(self.dims)

  @property
  def bytes(self) -> float:
    """Without padding to tiles."""
    return self.size * (8 if self.dtype.startswith('f8') else BITS[self.dtype]) / 8


@dataclasses.dataclass
class Instruction:
  """One line of a computation; `rest` is everything after the operands."""

  name: str
  shape: tuple[Array, ...]  # one, or the leaves of a tuple
  opcode: str
  operands: tuple[str, ...]
  arguments: str  # the operands as written; the value of a constant, the number of a parameter
  rest: str
  root: bool

  @functools.cached_property
  def op_name(self) -> str:
    """The path that JAX gave the operation: 'jit(step)/jvp(ViT)/patch_embed/dot_general', or ''."""
    match = re.search(r'op_name="([^"]*)"', self.rest)
    return match[1] if match else ''

  @functools.cached_property
  def frame(self) -> int:
    match = re.search(r'stack_frame_id=(\d+)', self.rest)
    return int(match[1]) if match else 0

  @functools.cached_property
  def cycles(self) -> int:
    """Cycles that the TPU compiler's cost model gives the instruction; 0 where it says nothing."""
    match = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
    return int(match[1]) if match else 0

  @functools.cached_property
  def called(self) -> tuple[str, ...]:
    return tuple(name for found in _CALLED.findall(self.rest) for name in re.findall(r'[\w.\-]+', found))

  @property
  def target(self) -> str:
    """What a custom call calls, or ''."""
    match = re.search(r'custom_call_target="([^"]*)"', self.rest)
    return match[1] if match else ''

  def attribute(self, name: str) -> str:
    """The value of `name=...` up to the next comma outside of brackets, or ''."""
    match = re.search(rf'(?:^|[ ,]){name}=', self.rest)
    return _balanced(self.rest, match.end()) if match else ''


@dataclasses.dataclass
class Computation:
  name: str
  instructions: dict[str, Instruction]

  @property
  def root(self) -> Instruction:
    return next(i for i in self.instructions.values() if i.root)

  @functools.cached_property
  def parameters(self) -> dict[int, Instruction]:
    return {int(i.arguments): i for i in self.instructions.values() if i.opcode == 'parameter'}

  def users(self, name: str) -> list[Instruction]:
    return [i for i in self.instructions.values() if name in i.operands]

  def inputs(self, instruction: Instruction) -> list[Instruction]:
    return [self.instructions[name] for name in instruction.operands]


@dataclasses.dataclass
class Module:
  """A program.

  Attributes:
    entry: name of the computation that is run.
    uncounted: loops whose trip count could not be found; they are counted once.
  """

  computations: dict[str, Computation]
  entry: str
  frames: dict[int, tuple[int, int]]  # frame -> (location, parent frame)
  locations: dict[int, tuple[int, int, int]]  # location -> (file, function, line)
  files: dict[int, str]
  functions: dict[int, str]
  uncounted: list[str] = dataclasses.field(default_factory=list)

  def runs(self) -> list[tuple[Computation, int]]:
    """Computations that are executed, callers first, with how often (loops multiplied out); fusions are not entered.

    Of the branches of a conditional all are counted once.
    """
    counts: dict[str, int] = {}
    order: list[str] = []

    def visit(name, times, loops):
      if name not in counts:
        order.append(name)
      counts[name] = counts.get(name, 0) + times
      for instruction in self.computations[name].instructions.values():
        if instruction.opcode == 'while':
          inside = (*loops, (self.computations[name], instruction))
          visit(instruction.attribute('body').lstrip('%'), times * self._trips(inside), inside)
        elif instruction.opcode in ('call', 'conditional', 'async-start'):
          for called in instruction.called:
            visit(called, times, ())

    self.uncounted.clear()
    visit(self.entry, 1, ())
    return [(self.computations[name], counts[name]) for name in order]

  def _trips(self, loops) -> int:
    """How often the body of the last of `loops` runs: as the compiler notes it, or read off its counter.

    `loops` are (computation, while instruction) from the outermost to the innermost.
    """
    _, loop = loops[-1]
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    count = int(known[1]) if known else self._counted(loops)
    if count is None:
      self.uncounted.append(loop.op_name or loop.name)
      return 1
    return count

  def _counted(self, loops) -> int | None:
    _, loop = loops[-1]
    condition = self.computations[loop.attribute('condition').lstrip('%')]
    test = condition.root
    if test.opcode != 'compare' or test.attribute('direction') not in ('LT', 'LE', 'GT', 'GE'):
      return None
    counter, limit = condition.inputs(test)
    index = _element(counter)
    limit = self._constant(condition, limit, loops)
    if index is None or limit is None:
      return None
    begin = self._carried(index, loops)
    stride = self._stride(index, loops)
    if begin is None or not stride:
      return None
    span = limit - begin + (stride // abs(stride) if test.attribute('direction') in ('LE', 'GE') else 0)
    return max(0, math.ceil(span / stride))

  def _stride(self, index, loops) -> int | None:
    """By how much the body of the last of `loops` changes element `index` of its tuple."""
    body = self.computations[loops[-1][1].attribute('body').lstrip('%')]
    if body.root.opcode != 'tuple':
      return None
    value, total = body.inputs(body.root)[index], 0
    while _element(value := _through_copies(body, value)) != index:  # an unrolled body counts in several additions
      if value.opcode not in ('add', 'subtract'):
        return None
      left, right = body.inputs(value)
      step = self._constant(body, right, loops)
      if step is None and value.opcode == 'add':
        left, right = right, left
        step = self._constant(body, right, loops)
      if step is None:
        return None
      total += step if value.opcode == 'add' else -step
      value = left
    return total

  def _constant(self, where, value, loops) -> int | None:
    """An integer written out in `where`, or handed in unchanged by the last of `loops`, whose body or condition it is."""
    value = _through_copies(where, value)
    if value.opcode == 'constant' and re.fullmatch(r'-?\d+', value.arguments):
      return int(value.arguments)
    index = _element(value)
    if index is None or not loops or where.inputs(value)[0].opcode != 'parameter':
      return None
    body = self.computations[loops[-1][1].attribute('body').lstrip('%')]
    if body.root.opcode != 'tuple' or _element(_through_copies(body, body.inputs(body.root)[index])) != index:
      return None
    return self._carried(index, loops)

  def _carried(self, index, loops) -> int | None:
    """Element `index` of the tuple that the last of `loops` starts with, if that is a constant."""
    outside, loop = loops[-1]
    start = outside.inputs(loop)[0]
    return self._constant(outside, outside.inputs(start)[index], loops[:-1]) if start.opcode == 'tuple' else None

  def source(self, instruction: Instruction, package: str) -> str:
    """'ops/attention.py:9' for the innermost line of `package` (a folder name) behind an instruction, or ''."""
    frame = instruction.frame
    while frame in self.frames:
      location, frame = self.frames[frame]
      file, _, line = self.locations[location]
      _, found, path = self.files[file].rpartition(f'/{package}/')
      if found:
        return f'{path}:{line}'
    return ''


def _through_copies(where, value):
  while value.opcode in ('copy', 'bitcast', 'convert', 'copy-done', 'copy-start') and value.operands:
    value = where.instructions[value.operands[0]]
  return value


def _element(value) -> int | None:
  return int(value.attribute('index')) if value.opcode == 'get-tuple-element' else None


def parse(text: str) -> Module:
  """The module that `text` writes out. Raises ValueError for a text without an entry computation."""
  tables: dict[str, dict] = {'FileNames': {}, 'FunctionNames': {}, 'FileLocations': {}, 'StackFrames': {}}
  computations, entry, current, table = {}, '', None, None
  for line in text.splitlines():
    if current is not None:
      if line.startswith('}'):
        current = None
      elif line.strip():
        instruction = _instruction(line)
        current[instruction.name] = instruction
    elif line in tables:
      table = tables[line]
    elif table is not None and line[:1].isdigit():
      number, _, value = line.partition(' ')
      table[int(number)] = (
        value.strip('"') if value.startswith('"') else tuple(int(n) for n in re.findall(r'=(\d+)', value))
      )
    elif head := _HEAD.match(line):
      current, table = {}, None
      computations[head[2]] = Computation(head[2], current)
      entry = head[2] if head[1] else entry
  if not entry:
    raise ValueError('no ENTRY computation in this text: not an HLO module')
  return Module(
    computations,
    entry,
    frames={
      i: (location, parent - 1) for i, (location, parent) in tables['StackFrames'].items()
    },  # written one too high
    locations={i: numbers[:3] for i, numbers in tables['FileLocations'].items()},
    files=tables['FileNames'],
    functions=tables['FunctionNames'],
  )


def _instruction(line: str) -> Instruction:
  head = _NAME.match(line)
  if not head:
    raise ValueError(f'not an HLO instruction: {line[:200]!r}')
  start = head.end()
  end = _closing(line, start) + 1 if line[start] == '(' else line.index(' ', start)
  shape = arrays(line[start:end])
  opening = line.index('(', end)
  closing = _closing(line, opening)
  arguments = line[opening + 1 : closing]
  opcode = line[end:opening].strip()
  plain = opcode in ('constant', 'parameter')
  operands = () if plain else tuple(re.findall(r'%([\w.\-]+)', arguments))
  return Instruction(head[2], shape, opcode, operands, arguments, line[closing + 1 :], bool(head[1]))


def arrays(text: str) -> tuple[Array, ...]:
  """Every array in a shape as written: 'bf16[64,197]{1,0:T(8,128)S(1)}' or a tuple of them."""
  found = []
  for dtype, dims, layout in _ARRAY.findall(text):
    space = _SPACE.search(layout)
    sizes = tuple(int(re.sub(r'\D', '', dim)) for dim in dims.split(',') if dim)
    found.append(Array(dtype, sizes, int(space[1]) if space else 0))
  return tuple(found)


def _closing(text: str, opening: int) -> int:
  """Where the parenthesis at `opening` closes; quoted text is skipped."""
  depth, quoted = 0, False
  for i in range(opening, len(text)):
    c = text[i]
    if c == '"' and text[i - 1] != '\\':
      quoted = not quoted
    elif not quoted:
      depth += (c in '({[') - (c in ')}]')
      if depth == 0:
        return i
  raise ValueError(f'unbalanced parentheses: {text[opening : opening + 200]!r}')


def _balanced(text: str, start: int) -> str:
  depth = 0
  for i in range(start, len(text)):
    c = text[i]
    if c in '({[':
      depth += 1
    elif c in ')}]':
      depth -= 1
    if depth < 0 or (depth == 0 and c == ',') or (depth == 0 and c == ' ' and text[i + 1 : i + 2] != '{'):
      return text[start:i]
  return text[start:]
