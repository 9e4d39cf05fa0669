"""mim-jax inspect: what a checkpoint or a file of weights holds, or how two of them differ."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

HELP = """shows what a run's checkpoint or a file of weights holds: parts, shapes, dtypes, target, normalisation, step, config digest, size

With two paths it shows what differs between them; exit code 1 if anything in their arrays does.

  mim-jax inspect runs/mae
  mim-jax inspect clip_b16.safetensors --arrays
  mim-jax inspect runs/mae runs/mae_seed1
"""

MOST = 12  # arrays that a comparison lists without --arrays


def add(parser):
  parser.add_argument('path', help="a run's folder, a file of weights, or a folder that holds one")
  parser.add_argument('other', nargs='?', help='another one, to compare with')
  parser.add_argument('--step', type=int, help='of a run, instead of its newest')
  parser.add_argument('--arrays', action='store_true', help='list every array')


@dataclasses.dataclass(frozen=True)
class Holding:
  """What lies at a path.

  Attributes:
    facts: title -> text.
    arrays: name -> (shape, dtype).
    read: names -> arrays.
    weights: of a run, the prefix of the arrays that evaluators use; '' for a file.
    config: values of a run's config, or of a file's description, by dotted key.
  """

  facts: dict[str, str]
  arrays: dict[str, tuple[tuple[int, ...], np.dtype]]
  read: Callable[[Iterable[str]], dict[str, np.ndarray]]
  weights: str = ''
  config: dict[str, Any] = dataclasses.field(default_factory=dict)

  def of_method(self) -> 'Holding':
    """Without the settings that a run and a file of weights do not share."""
    kept = {key: value for key, value in self.config.items() if key.startswith('method.')}
    return dataclasses.replace(self, config=kept)

  def without_prefix(self) -> 'Holding':
    """Only the weights of a run and its method, named as in a file of weights."""
    prefix = self.weights
    return dataclasses.replace(
      self,
      arrays={name.removeprefix(prefix): entry for name, entry in self.arrays.items() if name.startswith(prefix)},
      read=lambda names: {name: self.read([prefix + name])[prefix + name] for name in names},
      weights='',
    )


def run(args):
  first = _open(Path(args.path), args.step)
  if args.other is None:
    _show(first, args.arrays)
    return 0
  second = _open(Path(args.other), args.step)
  if bool(first.weights) != bool(second.weights):
    first, second = (
      part.of_method().without_prefix() if part.weights else part.of_method() for part in (first, second)
    )
  return _differences(first, second, args.arrays)


def _open(path: Path, step: int | None) -> Holding:
  from mim_jax import encoder

  return _open_run(path, step) if encoder.is_run(path) else _open_file(path)


def _open_run(path: Path, step: int | None) -> Holding:
  import jax

  from mim_jax import config
  from mim_jax.checkpoint import files, manager
  from mim_jax.errors import CheckpointError

  cfg = config.read(path / 'config.json')
  folder = path / 'checkpoints'
  steps = manager.list_steps(folder)
  if step is not None and step not in steps:
    raise CheckpointError(f'{path} has no checkpoint of step {step}; it has {", ".join(map(str, steps)) or "none"}')
  chosen = steps if step is None else [step]
  refused = []
  contents = manager.newest_good(folder, chosen, lambda found: found, refused)
  if contents is None:
    raise CheckpointError(f'{path} has no checkpoint yet; its config saves every {cfg.checkpoint.every}')
  one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

  def read(names):
    wanted = {n: jax.ShapeDtypeStruct(contents.leaves[n].shape, contents.leaves[n].dtype, sharding=one) for n in names}
    return {name: np.asarray(value) for name, value in contents.load(wanted).items()}

  method = cfg.method.to_dict()
  now = contents.meta['step']
  facts = {
    'what': f'run of {cfg.method.name}',
    'step': f'{now} (steps on disk: {", ".join(map(str, steps))})',
    **_target(method),
    'method': _options(method),
    'images': cfg.data.eval_transforms,
    'data': cfg.data.source,
    'config': config.digest(cfg),
    'on disk': f'{files.size_on_disk(folder / str(now)) / 1e6:.1f} MB, all steps {files.size_on_disk(folder) / 1e6:.1f} MB',
    **({'damaged': '; '.join(f'step {at}: {why}' for at, why in refused)} if refused else {}),
    **({'metrics': _options(contents.metrics)} if contents.metrics else {}),
  }
  arrays = {name: (leaf.shape, _dtype(leaf.dtype)) for name, leaf in contents.leaves.items()}
  return Holding(facts, arrays, read, 'ema/' if cfg.ema else 'params/', config.leaves(cfg))


def _open_file(path: Path) -> Holding:
  from mim_jax import config
  from mim_jax.checkpoint import bundle as bundles
  from mim_jax.checkpoint import files
  from mim_jax.errors import CheckpointError
  from mim_jax.official.vits import formats

  weights = files.read(path)
  facts, settings = {'what': f'{weights.kind} file, {len(weights)} arrays'}, {}
  if bundles.is_bundle(weights):
    settings = bundles.describe(weights)
    bundle = bundles.Bundle(params={}, **settings)
    facts |= {
      'what': 'mim_jax weights',
      'from': _options(bundle.source),
      **_target(bundle.method),
      **({'method': _options(bundle.method)} if bundle.method else {}),
      'encoder': _options(bundle.encoder),
      'images': bundle.transforms,
    }
  else:
    try:
      layout = formats.detect(weights)
    except CheckpointError:
      facts['format'] = 'none that is known here'
    else:
      facts['format'] = f'{layout.name}: {layout.about}'
    settings = files.settings(weights.path)
    if weights.metadata:
      facts['metadata'] = _options(weights.metadata)
    if weights.opaque:
      facts['not read'] = f'pickled objects of {", ".join(weights.opaque)}'
  facts['on disk'] = f'{files.size_on_disk(weights.path) / 1e6:.1f} MB, {weights.path}'
  arrays = {name: (entry.shape, entry.dtype) for name, entry in weights.stored.items()}
  return Holding(facts, arrays, lambda names: {name: weights[name] for name in names}, config=config.leaves(settings))


def _show(holding: Holding, every: bool):
  width = max(map(len, holding.facts))
  for title, text in holding.facts.items():
    print(f'{title:{width}}  {text}')
  print()
  parts: dict[str, list] = {}
  for name, entry in holding.arrays.items():
    parts.setdefault(_part(name), []).append(entry)
  rows = [
    (
      part,
      f'{len(entries):,}',
      f'{sum(math.prod(shape) for shape, _ in entries):,}',
      f'{sum(math.prod(shape) * dtype.itemsize for shape, dtype in entries) / 1e6:.1f} MB',
      ', '.join(sorted({dtype.name for _, dtype in entries})),
    )
    for part, entries in parts.items()
  ]
  _table(('part', 'arrays', 'numbers', 'size', 'dtype'), rows)
  if every:
    print()
    _table(
      ('array', 'shape', 'dtype'),
      [(name, str(list(shape)), dtype.name) for name, (shape, dtype) in holding.arrays.items()],
    )


def _differences(first: Holding, second: Holding, every: bool) -> int:
  """Prints what differs; 1 if arrays do."""
  changed = [
    key for key in sorted(first.config.keys() | second.config.keys()) if first.config.get(key) != second.config.get(key)
  ]
  if changed:
    word = lambda part, key: str(part.config[key]) or "''" if key in part.config else '-'
    _table(('setting', 'first', 'second'), [(key, word(first, key), word(second, key)) for key in changed])
    print()
  here, there = first.arrays, second.arrays
  for title, only in (('first', [n for n in here if n not in there]), ('second', [n for n in there if n not in here])):
    if only:
      print(f'only in the {title}: {_some(only, len(only) if every else 5)}')
  both = [name for name in here if name in there]
  other = [name for name in both if here[name] != there[name]]
  if other:
    words = lambda entry: f'{entry[1].name}{list(entry[0])}'
    shown = other if every else other[:MOST]
    _table(
      ('array of another kind', 'first', 'second'), [(name, words(here[name]), words(there[name])) for name in shown]
    )
    print(f'and {len(other) - len(shown)} more (--arrays)\n' if len(shown) < len(other) else '')
  rows, equal = [], 0
  same = [name for name in both if name not in other]
  for name in same:
    a, b = (np.asarray(part.read([name])[name]) for part in (first, second))
    if np.array_equal(a, b):
      equal += 1
      continue
    a, b = a.astype(np.float64), b.astype(np.float64)
    scale = max(float(np.abs(a).max(initial=0)), 1e-30)
    rows.append((name, f'{np.abs(a - b).max():.3g}', f'{np.abs(a - b).max() / scale:.3g}'))
  if rows:
    shown = rows if every else sorted(rows, key=lambda row: -float(row[2]))[:MOST]
    _table(('array', 'largest difference', 'relative'), shown)
    print(f'and {len(rows) - len(shown)} more (--arrays)\n' if len(shown) < len(rows) else '')
  print(f'{equal} of {len(same)} arrays of the same name and kind are equal')
  return 0 if equal == len(here) == len(there) else 1


def _target(method) -> dict[str, str]:
  if 'norm_pix' not in method:
    return {}
  return {
    'target': 'pixels, each patch minus its mean over its standard deviation'
    if method['norm_pix']
    else 'pixels as they are'
  }


def _part(name: str) -> str:
  """'params/encoder' of a checkpoint, 'encoder' of our files, 'blocks' or 'vit.encoder' of others."""
  if '/' in name:
    first, *rest = name.split('/')
    return f'{first}/{rest[0]}' if first in ('params', 'ema', 'state', 'opt') and len(rest) > 1 else first
  pieces = [piece for piece in name.split('.')[:-1] if not piece.isdigit()]
  return '.'.join(pieces[:2] if len(pieces) > 2 else pieces[:1]) or name


def _dtype(name: str) -> np.dtype:
  import jax.numpy as jnp

  return np.dtype(jnp.dtype(name)) if not name.startswith('key<') else np.dtype(np.uint32)


def _options(values) -> str:
  word = lambda value: f'{value:.4g}' if isinstance(value, float) else value
  return ', '.join(f'{key}={word(value)}' for key, value in values.items() if value not in ('', {}, None))


def _some(names, count: int) -> str:
  return ', '.join(names[:count]) + (f' and {len(names) - count} more' if len(names) > count else '')


def _table(head, rows):
  cells = [tuple(map(str, row)) for row in (head, *rows)]
  widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
  for row in cells:
    print('  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
