"""Weight names of other codebases and ours, both ways, from one table per codebase.

A table is a list of `Entry(theirs, ours, form)`. `{i}` in a name stands for the block index: their blocks have one array each, ours one
array with depth as its leading axis. `theirs` may be several names whose arrays are stacked on their first axis (separate query, key and
value). A `form` turns one array of theirs into ours and back.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from mim_jax.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Form:
  """`load`: array in PyTorch layout -> ours; `export`: back."""

  load: Callable[[np.ndarray], np.ndarray]
  export: Callable[[np.ndarray], np.ndarray]


SAME = Form(lambda w: w, lambda w: w)
LINEAR = Form(lambda w: w.T, lambda w: w.T)  # [out, in] <-> [in, out]


def patch_conv(patch: Sequence[int]) -> Form:
  """Convolution [D, C, *patch] <-> kernel on flattened patches [prod(patch) * C, D]."""
  rank = len(patch)
  return Form(
    lambda w: w.transpose(*range(2, 2 + rank), 1, 0).reshape(-1, w.shape[0]),
    lambda w: w.reshape(*patch, -1, w.shape[-1]).transpose(rank + 1, rank, *range(rank)),
  )


def qkv_kernel(heads: int, parts: int = 3) -> Form:
  """[3 D, D] with rows q, k, v <-> [D, 3, H, d]; keys and values alone have two `parts`."""
  return Form(lambda w: w.T.reshape(w.shape[1], parts, heads, -1), lambda w: w.reshape(w.shape[0], -1).T)


def qkv_bias(heads: int, parts: int = 3) -> Form:
  """[3 D] <-> [3, H, d]."""
  return Form(lambda w: w.reshape(parts, heads, -1), lambda w: w.reshape(-1))


def merge_heads(heads: int) -> Form:
  """Output projection [D, H d] <-> [H, d, D]."""
  return Form(lambda w: w.T.reshape(heads, -1, w.shape[0]), lambda w: w.reshape(-1, w.shape[-1]).T)


@dataclasses.dataclass(frozen=True)
class Entry:
  theirs: str | tuple[str, ...]
  ours: str
  form: Form = SAME

  @property
  def parts(self) -> tuple[str, ...]:
    return (self.theirs,) if isinstance(self.theirs, str) else self.theirs


def linear(theirs: str, ours: str) -> list[Entry]:
  return [Entry(f'{theirs}.weight', f'{ours}/kernel', LINEAR), Entry(f'{theirs}.bias', f'{ours}/bias')]


def norm(theirs: str, ours: str) -> list[Entry]:
  return [Entry(f'{theirs}.weight', f'{ours}/scale'), Entry(f'{theirs}.bias', f'{ours}/bias')]


@dataclasses.dataclass(frozen=True)
class BlockNames:
  """How a codebase calls the parts of a pre-norm block.

  `qkv` is one name, or three for separate projections, and `.weight` and `.bias` follow it; a name that ends in '_' is followed by
  `weight` and `bias` (`in_proj_`). `scale1`, `scale2`: learned scales of the branches, '' where the codebase has none.
  """

  norm1: str
  qkv: str | tuple[str, str, str]
  proj: str
  norm2: str
  fc1: str
  fc2: str
  scale1: str = ''
  scale2: str = ''


TIMM_BLOCK = BlockNames('norm1', 'attn.qkv', 'attn.proj', 'norm2', 'mlp.fc1', 'mlp.fc2')
HF_VIT_BLOCK = BlockNames(
  'layernorm_before',
  tuple(f'attention.attention.{part}' for part in ('query', 'key', 'value')),
  'attention.output.dense',
  'layernorm_after',
  'intermediate.dense',
  'output.dense',
)


def block(theirs: str, ours: str, heads: int, names: BlockNames = TIMM_BLOCK) -> list[Entry]:
  """Entries of a stack of blocks; `theirs` holds `{i}`."""
  parts = [
    f'{theirs}.{part}' + ('' if part.endswith('_') else '.')
    for part in ((names.qkv,) if isinstance(names.qkv, str) else names.qkv)
  ]
  scales = [(names.scale1, 'layer_scale1'), (names.scale2, 'layer_scale2')]
  return [
    *norm(f'{theirs}.{names.norm1}', f'{ours}/norm1'),
    Entry(tuple(f'{part}weight' for part in parts), f'{ours}/attn/qkv/kernel', qkv_kernel(heads)),
    Entry(tuple(f'{part}bias' for part in parts), f'{ours}/attn/qkv/bias', qkv_bias(heads)),
    Entry(f'{theirs}.{names.proj}.weight', f'{ours}/attn/proj/kernel', merge_heads(heads)),
    Entry(f'{theirs}.{names.proj}.bias', f'{ours}/attn/proj/bias'),
    *norm(f'{theirs}.{names.norm2}', f'{ours}/norm2'),
    *linear(f'{theirs}.{names.fc1}', f'{ours}/mlp/fc1'),
    *linear(f'{theirs}.{names.fc2}', f'{ours}/mlp/fc2'),
    *[Entry(f'{theirs}.{name}', f'{ours}/{scale}/scale') for name, scale in scales if name],
  ]


def cross_block(theirs: str, ours: str, heads: int) -> list[Entry]:
  """Entries of a stack of `models.blocks.CrossBlock` as CrossMAE and its descendants name it; `theirs` holds `{i}`."""
  attn, cross = f'{theirs}.self_attn', f'{theirs}.cross_attn'
  query = Form(lambda w: w.T.reshape(w.shape[1], heads, -1), lambda w: w.reshape(w.shape[0], -1).T)
  return [
    *norm(f'{theirs}.norm0', f'{ours}/norm0'),
    Entry(f'{attn}.qkv.weight', f'{ours}/self_attn/qkv/kernel', qkv_kernel(heads)),
    Entry(f'{attn}.qkv.bias', f'{ours}/self_attn/qkv/bias', qkv_bias(heads)),
    Entry(f'{attn}.proj.weight', f'{ours}/self_attn/proj/kernel', merge_heads(heads)),
    Entry(f'{attn}.proj.bias', f'{ours}/self_attn/proj/bias'),
    *norm(f'{theirs}.norm1', f'{ours}/norm1'),
    Entry(f'{cross}.q.weight', f'{ours}/cross_attn/q/kernel', query),
    Entry(f'{cross}.q.bias', f'{ours}/cross_attn/q/bias', Form(lambda w: w.reshape(heads, -1), np.ravel)),
    Entry(f'{cross}.kv.weight', f'{ours}/cross_attn/kv/kernel', qkv_kernel(heads, 2)),
    Entry(f'{cross}.kv.bias', f'{ours}/cross_attn/kv/bias', qkv_bias(heads, 2)),
    Entry(f'{cross}.proj.weight', f'{ours}/cross_attn/proj/kernel', merge_heads(heads)),
    Entry(f'{cross}.proj.bias', f'{ours}/cross_attn/proj/bias'),
    *norm(f'{theirs}.norm2', f'{ours}/norm2'),
    *linear(f'{theirs}.mlp.fc1', f'{ours}/mlp/fc1'),
    *linear(f'{theirs}.mlp.fc2', f'{ours}/mlp/fc2'),
  ]


def complete(params: dict, unknown: Sequence[str]) -> dict:
  """What `load` gives, as device arrays; raises ValueError where it left out a weight: a replay must use all of them."""
  if unknown:
    raise ValueError(f'weights without a place in our tree: {unknown}')
  return jax.tree.map(jnp.asarray, params)


def load(weights: Mapping[str, np.ndarray], table: Sequence[Entry]) -> tuple[dict, list[str]]:
  """Their flat names -> (our nested tree, their names that the table does not know).

  Entries of which no part is present are skipped: a file may hold an encoder only. Raises CheckpointError when an entry is present in
  part (a block missing, a query without its key).
  """
  flat, used = {}, set()
  for entry in table:
    rows = []
    depth = _depth(entry, weights)
    for i in range(depth):
      keys = [part.replace('{i}', str(i)) for part in entry.parts]
      present = [key for key in keys if key in weights]
      if not present and depth == 1:
        break
      if len(present) < len(keys):
        raise CheckpointError(
          f'weights lack {sorted(set(keys) - set(present))}, needed for {entry.ours}; found {present or "none of its parts"}'
        )
      rows.append(
        entry.form.load(
          np.concatenate([np.asarray(weights[key]) for key in keys]) if len(keys) > 1 else np.asarray(weights[keys[0]])
        )
      )
      used.update(keys)
    if rows:
      flat[tuple(entry.ours.split('/'))] = np.stack(rows) if _indexed(entry) else rows[0]
  return traverse_util.unflatten_dict(flat), sorted(set(weights) - used)


def export(tree: Mapping, table: Sequence[Entry]) -> dict[str, np.ndarray]:
  """Our nested tree -> their flat names; entries that the tree does not have are left out. Raises CheckpointError for a leaf of ours without an entry."""
  flat = traverse_util.flatten_dict(tree, sep='/')
  unknown = sorted(set(flat) - {entry.ours for entry in table})
  if unknown:
    raise CheckpointError(f'no official name is known for {unknown}')
  weights = {}
  for entry in table:
    if entry.ours not in flat:
      continue
    value = np.asarray(flat[entry.ours])
    for i, row in enumerate(value if _indexed(entry) else [value]):
      pieces = np.split(entry.form.export(row), len(entry.parts))
      weights.update(
        {
          part.replace('{i}', str(i)): np.ascontiguousarray(piece)
          for part, piece in zip(entry.parts, pieces, strict=True)
        }
      )
  return weights


def grads(tree: Mapping, table: Sequence[Entry], prefix: str = 'grad/') -> dict[str, np.ndarray]:
  """A gradient tree under their names: every form is a permutation of entries, so gradients move as weights do."""
  return {prefix + name: value for name, value in export(tree, table).items()}


def channels_last(images) -> jax.Array:
  """Images in PyTorch layout [..., C, H, W] -> [..., H, W, C]."""
  return jnp.moveaxis(jnp.asarray(images), -3, -1)


def _indexed(entry: Entry) -> bool:
  return '{i}' in entry.parts[0]


def _depth(entry: Entry, weights) -> int:
  if not _indexed(entry):
    return 1
  pattern = re.compile(re.escape(entry.parts[0]).replace(r'\{i\}', r'(\d+)') + '$')
  found = [int(match[1]) for match in map(pattern.match, weights) if match]
  return 1 + max(found, default=-1)
