"""What the tests found out about each method: written by `pytest --record`, shown by `mim-jax methods`.

The file is `tests/records.json` of a checkout, which goes into a wheel as `mim_jax/records.json`:

  {METHOD: {KIND: {TEST: {"outcome": "passed", "date": "2026-11-27", "version": "0.1.0", "code": "3f2a9c01d27e",
                          "figures": {"end": 0.07, "CASE": {"tensors": 37, "within": 37, "error": 9e-7}}}}}}

Kinds are words such as `parity`, `properties`, `learning` (see tests/conftest.py). `code` is a digest of the method's
own files at that time, so that a record of an older state is told from one of the code at hand.
"""

import dataclasses
import datetime
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import mim_jax
from mim_jax.errors import UserError

PACKAGE = Path(mim_jax.__file__).parent
KINDS = ('parity', 'properties', 'learning')  # the usual ones, in the order they are shown in


@dataclasses.dataclass(frozen=True)
class Result:
  """One test of one method; `test` is its pytest node, FILE::NAME[CASE] with the file relative to the checkout."""

  method: str
  kind: str
  test: str
  outcome: str
  date: str
  version: str
  code: str
  figures: Mapping[str, float | Mapping[str, float]] = dataclasses.field(default_factory=dict)

  @property
  def current(self) -> bool:
    """Whether the method's files are still those that were tested."""
    return self.code == code_of(self.method)


def find(package: Path = PACKAGE) -> Path | None:
  """The records of this installation, or None: tests/records.json of a checkout, else records.json in the package."""
  places = (package.parent / 'tests' / 'records.json', package / 'records.json')
  return next((path for path in places if path.is_file()), None)


def read(path: Path) -> list[Result]:
  """All results of a file of records. Raises UserError when it is none."""
  try:
    tree = json.loads(path.read_text())
    return [
      Result(method, kind, test, **entry)
      for method, kinds in tree.items()
      for kind, tests in kinds.items()
      for test, entry in tests.items()
    ]
  except (ValueError, TypeError, AttributeError) as error:
    raise UserError(
      f'{path} is not a file of records ({error}); remove it and run the tests with --record, which writes it anew'
    ) from error


def write(path: Path, results: Iterable[Result]):
  """Writes results, sorted, so that a new run changes only the lines of what it tested."""
  tree = {}
  for result in results:
    entry = dataclasses.asdict(result)
    method, kind, test = (entry.pop(key) for key in ('method', 'kind', 'test'))
    tree.setdefault(method, {}).setdefault(kind, {})[test] = entry
  path.write_text(json.dumps(tree, indent=1, sort_keys=True) + '\n')


def merge(old: Iterable[Result], new: Iterable[Result], root: Path) -> list[Result]:
  """`old` with `new` in place of what was tested again, without functions that are gone from the checkout `root`."""
  kept = {(result.method, result.test): result for result in (*old, *new)}
  sources = {}

  def defined(test):
    file, _, name = test.partition('::')
    if file not in sources:
      sources[file] = (root / file).read_text() if (root / file).is_file() else ''
    return re.search(rf'^\s*def {re.escape(name.partition("[")[0].rpartition("::")[2])}\(', sources[file], re.MULTILINE)

  return [result for result in kept.values() if defined(result.test)]


def result(method: str, kind: str, test: str, outcome: str, figures: Mapping | None = None) -> Result:
  """A result of now, of the code at hand."""
  today = datetime.datetime.now(datetime.UTC).date().isoformat()
  return Result(method, kind, test, outcome, today, mim_jax.__version__, code_of(method), dict(figures or {}))


def code_of(method: str, package: Path = PACKAGE) -> str:
  """Digest of the method's file and of its official/ file."""
  digest = hashlib.sha256()
  for folder in ('methods', 'official'):
    file = package / folder / f'{method}.py'
    digest.update(file.read_bytes() if file.is_file() else b'')
  return digest.hexdigest()[:12]


@dataclasses.dataclass(frozen=True)
class Summary:
  """All results of one kind of one method."""

  results: tuple[Result, ...]

  def count(self, outcome: str) -> int:
    return sum(result.outcome == outcome for result in self.results)

  @property
  def date(self) -> str:
    """Day of the oldest result."""
    return min(result.date for result in self.results)

  @property
  def current(self) -> bool:
    return all(result.current for result in self.results)

  @property
  def tensors(self) -> tuple[int, int]:
    """Within tolerance and all, of the reference cases that were replayed; (0, 0) where none were."""
    cases = {name: case for result in self.results for name, case in result.figures.items() if is_case(case)}
    return tuple(sum(int(case[key]) for case in cases.values()) for key in ('within', 'tensors'))

  def __str__(self):
    """'37/37 tensors', '24/25', with '*' where the method's files have changed since."""
    within, tensors = self.tensors
    shown = f'{self.count("passed")}/{self.count("passed") + self.count("failed")}'
    if tensors:  # tests that replay nothing count along in the verdict
      shown = f'{within}/{tensors} tensors' + (f', {self.count("failed")} failed' if self.count('failed') else '')
    return shown + ('' if self.current else '*')


def is_case(figure) -> bool:
  """Whether a figure is that of a replayed reference case and not a number."""
  return isinstance(figure, Mapping) and 'tensors' in figure


def summaries(results: Iterable[Result]) -> dict[str, dict[str, Summary]]:
  """{method: {kind: Summary}}, the usual kinds first; kinds with nothing but skipped tests are left out."""
  groups: dict[str, dict[str, list[Result]]] = {}
  for result in results:
    groups.setdefault(result.method, {}).setdefault(result.kind, []).append(result)
  order = lambda kind: (KINDS.index(kind) if kind in KINDS else len(KINDS), kind)
  return {
    method: {
      kind: Summary(tuple(sorted(kinds[kind], key=lambda result: result.test)))
      for kind in sorted(kinds, key=order)
      if any(result.outcome != 'skipped' for result in kinds[kind])
    }
    for method, kinds in groups.items()
  }
