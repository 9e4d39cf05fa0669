"""Which axis of which array lies on which mesh axis: regex rules for tensor parallelism, and one rule for FSDP.

A rule is (regex, spec). The regex is searched for in the '/'-path of an array; the first rule that matches counts. The
spec names a mesh axis, a tuple of mesh axes or None for each of the *last* dimensions, so that one rule serves a block
with and without the leading depth axis. After the rule, 'fsdp' goes on the largest dimension that is still free and
divisible. A spec of None keeps an array whole, an empty one leaves it to FSDP.
"""

import math
import re

import jax
from jax.sharding import NamedSharding, PartitionSpec

from mim_jax.errors import ConfigError

# Megatron's cut of a transformer block (Shoeybi et al. 2019, section 3): queries, keys, values and the first MLP layer
# by output, the projections after them by input, so that each half of a block needs one sum over the 'tensor' axis.
DEFAULT_RULES = (
  (r'attn\w*/(qkv|kv|q|k|v|query|key|value)/(kernel|bias)$', ('tensor', None)),  # [..., D, 3, H, d], [..., 3, H, d]
  (r'attn\w*/proj/kernel$', ('tensor', None, None)),  # [..., H, d, D]
  (r'mlp\w*/fc1/(kernel|bias)$', ('tensor',)),  # [..., D, 4 D], [..., 4 D]
  (r'mlp\w*/fc2/kernel$', ('tensor', None)),  # [..., 4 D, D]
)

# Arrays of blocks are stacked over depth on their first axis, as 'encoder/blocks/...'; numbered 'blocks/0/...' are not.
STACKED = re.compile(r'(^|/)blocks\d*/(?!\d)')

# Gathering an array of a few thousand entries costs more in latency than it saves in memory.
WHOLE_BELOW = 2**14


def path_name(key_path) -> str:
  """A key path of `jax.tree_util` as 'encoder/blocks/attn/qkv/kernel'."""
  return jax.tree_util.keystr(key_path, simple=True, separator='/')


def map_named(function, tree, *rest):
  """`jax.tree.map` of function(name, leaf, *leaves of rest), name being the '/'-path."""
  return jax.tree_util.tree_map_with_path(lambda key_path, *leaves: function(path_name(key_path), *leaves), tree, *rest)


def compiled(regex: str, key: str) -> re.Pattern:
  """The regex, or a ConfigError that names the config key it stands in."""
  try:
    return re.compile(regex)
  except (re.error, TypeError) as error:
    raise ConfigError(f'{key}: {regex!r} is not a regular expression: {error}') from error


def shardings(mesh, tree, rules=DEFAULT_RULES, whole_below=WHOLE_BELOW):
  """NamedSharding for every array (or ShapeDtypeStruct) of a tree of parameters.

  Args:
    mesh: with axes 'data', 'fsdp', 'tensor' (`mesh.make_mesh`).
    tree: params or a frozen network.
    rules: own rules come before the defaults, `(*config.rules, *DEFAULT_RULES)`.
    whole_below: arrays with fewer entries get no 'fsdp' axis.

  Raises:
    ConfigError: a rule does not fit an array it matches; the message names path, dimension and axis.
  """
  patterns = [(compiled(regex, 'rules'), spec) for regex, spec in rules]

  def place(name, leaf):
    spec = next((spec for pattern, spec in patterns if pattern.search(name)), ())
    if spec is None:
      return NamedSharding(mesh, PartitionSpec())
    axes = _aligned(name, leaf.shape, spec, mesh)
    if mesh.shape['fsdp'] > 1 and math.prod(leaf.shape) >= whole_below and not any('fsdp' in axis for axis in axes):
      dim = _fsdp_dim(name, leaf.shape, axes, mesh.shape['fsdp'])
      if dim is not None:
        axes[dim] = ('fsdp',)
    return NamedSharding(mesh, _partition_spec(axes))

  return map_named(place, tree)


def like_params(mesh, tree, params, param_shardings):
  """NamedSharding for every array of a tree that copies params in parts: optimizer moments, EMA, a teacher in `state`.

  A leaf lies as the parameter of its shape whose path is the end of the leaf's path ('mu/encoder/norm/scale'), else as
  the one that shares most of that end ('teacher/norm/scale', a copy of `params['encoder']`, as 'encoder/norm/scale').
  Leaves that share no name with a parameter of their shape (counters, queues) are whole on every device.
  """
  known: dict[tuple, list] = {}

  def note(name, leaf, sharding):
    known.setdefault((*leaf.shape,), []).append((name.split('/'), sharding))

  def place(name, leaf):
    best, found = 0, NamedSharding(mesh, PartitionSpec())
    for parts, sharding in known.get((*leaf.shape,), ()):
      shared = _shared_end(name.split('/'), parts)
      if shared > best:
        best, found = shared, sharding
    return found

  map_named(note, params, param_shardings)
  return map_named(place, tree)


def _aligned(name, shape, spec, mesh) -> list[tuple[str, ...]]:
  """Mesh axes of size > 1 for each dimension: `spec` stands for the last dimensions."""
  if isinstance(spec, str) or len(spec) > len(shape):
    raise ConfigError(
      f'rules: {spec!r} does not fit {name} {list(shape)}; give an axis name or None for each of the last dimensions'
    )
  axes = [()] * (len(shape) - len(spec))
  for dim, entry in enumerate(spec, start=len(axes)):
    entry = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
    unknown = [axis for axis in entry if axis not in mesh.shape]
    if unknown:
      raise ConfigError(f'rules: {name} asks for mesh axis {unknown[0]!r}; the mesh has {", ".join(mesh.shape)}')
    parts = math.prod(mesh.shape[axis] for axis in entry)
    if shape[dim] % parts:
      raise ConfigError(
        f'{name} {list(shape)}: dimension {dim} of size {shape[dim]} cannot be cut in {parts} by mesh axis '
        f'{"+".join(entry)}; choose a size that divides {shape[dim]}, or take this layer out of tensor parallelism by '
        f"config.rules = (('{name.rsplit('/', 2)[0]}/', ()),)"
      )
    axes.append(tuple(axis for axis in entry if mesh.shape[axis] > 1))
  return axes


def _fsdp_dim(name, shape, axes, size):
  """The largest free dimension that `size` divides, or None; the depth of stacked blocks only when no other will do."""
  free = [dim for dim in range(len(shape)) if not axes[dim] and shape[dim] % size == 0]
  # Cut over depth, each layer would be sent from one device to all others instead of gathered from all at once.
  inner = [dim for dim in free if not (dim == 0 and STACKED.search(name))]
  return max(inner or free, key=lambda dim: shape[dim], default=None)


def _partition_spec(axes) -> PartitionSpec:
  entries = [None if not axis else axis[0] if len(axis) == 1 else axis for axis in axes]
  while entries and entries[-1] is None:
    entries.pop()
  return PartitionSpec(*entries)


def _shared_end(one, other) -> int:
  count = 0
  while count < min(len(one), len(other)) and one[-1 - count] == other[-1 - count]:
    count += 1
  return count
