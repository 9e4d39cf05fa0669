"""Replays of reference numbers: weights, inputs and random draws of an official code in, its outputs, losses and gradients out.

A case is a pair `<case>.safetensors` + `<case>.json`; tensors are named `w/` weights, `in/` inputs and draws, `out/` outputs and `grad*/`
gradients. `<case>` is a method's slug, or slug plus part (`mae`, `mae_vit`); `mim_jax/official/<slug>.py` has
`replay(case) -> {name: array}` under the reference's own names.
"""

import dataclasses
import importlib
import json
import pkgutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
from safetensors import safe_open

from mim_jax import official
from mim_jax.errors import UserError

TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Case:
  """One reference: `config` and the rest of its JSON, and its tensors by full name."""

  name: str
  info: dict
  tensors: dict[str, np.ndarray]

  @property
  def config(self) -> SimpleNamespace:
    return SimpleNamespace(**self.info['config'])

  def group(self, prefix: str) -> dict[str, np.ndarray]:
    """Tensors under 'w', 'in', 'out', ... without the prefix."""
    return {
      name.removeprefix(prefix + '/'): value for name, value in self.tensors.items() if name.startswith(prefix + '/')
    }

  @property
  def weights(self) -> dict[str, np.ndarray]:
    return self.group('w')

  @property
  def inputs(self) -> dict[str, np.ndarray]:
    return self.group('in')


@dataclasses.dataclass(frozen=True)
class Row:
  """A tensor's comparison; `relative` is to the reference's largest entry."""

  name: str
  absolute: float
  relative: float
  ok: bool
  note: str = ''


def read(path: str | Path) -> Case:
  """Reads a case; raises UserError when one of the two files is absent or another kind of file."""
  path = Path(path)
  if path.suffix != '.safetensors' or not path.is_file() or not path.with_suffix('.json').is_file():
    raise UserError(f'{path}: expected a file CASE.safetensors with CASE.json beside it')
  with safe_open(path, framework='numpy') as file:
    tensors = {name: file.get_tensor(name) for name in file.keys()}
  return Case(path.stem, json.loads(path.with_suffix('.json').read_text()), tensors)


def module_of(case_name: str):
  """The module of the longest slug that `case_name` starts with."""
  known = [m.name for m in pkgutil.iter_modules(official.__path__) if m.name != 'names' and not m.ispkg]
  fits = [slug for slug in known if case_name == slug or case_name.startswith(slug + '_')]
  if not fits:
    raise UserError(f'{case_name}: no official module replays this case; known: {", ".join(sorted(known))}')
  return importlib.import_module(f'mim_jax.official.{max(fits, key=len)}')


def compare(
  name: str, reference: np.ndarray, ours, tolerance: float = TOLERANCE, agreement: tuple[float, float] | None = None
) -> Row:
  """Outputs to `tolerance`, relative to the largest entry where that exceeds 1; gradients relative to the largest entry (floor 1e-7).

  With `agreement` (share, within), that share of the entries must agree to `within`, and the others do not count.
  """
  if ours is None:
    return Row(name, np.inf, np.inf, False, 'not replayed')
  ours = np.asarray(ours)
  if ours.shape != reference.shape:
    return Row(name, np.inf, np.inf, False, f'shape {ours.shape}, reference {reference.shape}')
  if not np.all(np.isfinite(ours)):
    return Row(name, np.inf, np.inf, False, 'not finite')
  largest = float(np.max(np.abs(reference.astype(np.float64)), initial=0.0))
  absolute = float(np.max(np.abs(ours.astype(np.float64) - reference.astype(np.float64)), initial=0.0))
  if agreement is not None:
    share, within = agreement
    found = float(np.mean(np.abs(ours.astype(np.float64) - reference.astype(np.float64)) <= within))
    note = f'{found:.2%} of entries within {within:g}, {share:.2%} must be'
    return Row(name, absolute, absolute / max(largest, 1e-30), found >= share, note)
  scale = max(largest, 1e-7 / tolerance) if name.startswith('grad') else max(largest, 1.0)
  return Row(name, absolute, absolute / max(largest, 1e-30), absolute <= tolerance * scale)


def run(case: Case) -> list[Row]:
  """Replays a case and compares every `out/` and `grad*/` tensor it holds."""
  module = module_of(case.name)
  tolerances, agreements = getattr(module, 'TOLERANCES', {}), getattr(module, 'AGREEMENT', {})
  with jax.default_matmul_precision('highest'):
    ours = module.replay(case)
  expected = {name: value for name, value in case.tensors.items() if not name.startswith(('w/', 'in/'))}
  return [
    compare(name, value, ours.get(name), tolerances.get(name, TOLERANCE), agreements.get(name))
    for name, value in sorted(expected.items())
  ]


def table(rows: list[Row]) -> str:
  """One line per tensor: name, largest absolute error, relative error, verdict."""
  width = max(len(row.name) for row in rows)
  lines = [f'{"tensor":{width}}  {"max abs":>9}  {"relative":>9}']
  lines += [
    f'{row.name:{width}}  {row.absolute:9.2e}  {row.relative:9.2e}  {"ok" if row.ok else "OUT OF TOLERANCE"} {row.note}'.rstrip()
    for row in rows
  ]
  return '\n'.join(lines)
