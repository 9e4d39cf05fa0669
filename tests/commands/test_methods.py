"""mim-jax methods: the table, the page of one method, and the records they are made from."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest

from mim_jax import cli, method, records
from mim_jax.commands import methods
from mim_jax.errors import UserError
from mim_jax.method import Field

CASE = {'mae': {'tensors': 40, 'within': 39, 'error': 2e-5}}


def results():
  return [
    records.result('mae', 'parity', 'tests/methods/test_mae.py::test_numbers', 'failed', CASE),
    records.result('mae', 'properties', 'tests/methods/test_mae.py::test_a', 'passed'),
    records.result('mae', 'properties', 'tests/methods/test_mae.py::test_b[0]', 'failed'),
    records.result('mae', 'properties', 'tests/methods/test_mae.py::test_c', 'skipped'),
    records.result('mae', 'learning', 'tests/methods/test_mae.py::test_learns[1]', 'passed', {'end': 0.0712}),
    records.result('dmjd', 'learning', 'tests/methods/test_dmjd.py::test_learns', 'skipped'),
  ]


@pytest.fixture
def recorded(tmp_path, monkeypatch):
  """A file of records that the command finds."""
  path = tmp_path / 'records.json'
  records.write(path, results())
  monkeypatch.setattr(records, 'find', lambda: path)
  return path


def shown(capsys, *argv):
  assert cli.main(['methods', *argv]) == 0
  return capsys.readouterr().out


def test_table_has_every_method_with_paper_fields_and_recipe(recorded, capsys):
  lines = shown(capsys).splitlines()
  assert lines[0].split() == [
    'method',
    'paper',
    'arXiv',
    'reads',
    'recipe',
    'parity',
    'properties',
    'learning',
    'since',
  ]
  rows = {line.split()[0]: line for line in lines[1 : 1 + len(method.names())]}
  assert set(rows) == set(method.names())
  for word in ('He et al. 2022', '2111.06377', 'image', 'configs/mae.py'):
    assert word in rows['mae']
  assert all(row.count('-') or 'configs/' in row for row in rows.values())


def test_table_shows_what_was_recorded(recorded, capsys):
  out = shown(capsys)
  row = next(line for line in out.splitlines() if line.startswith('mae '))
  assert '39/40 tensors, 1 failed' in row and '1/2' in row and row.split()[-2:] == ['1/1', results()[0].date]
  assert next(line for line in out.splitlines() if line.startswith('dmjd ')).split()[-3:] == ['-', '-', '-']
  assert str(recorded) in out and '*' not in out


def test_records_of_other_code_are_marked(recorded, capsys):
  records.write(recorded, [dataclasses.replace(result, code='of before') for result in results()])
  out = shown(capsys)
  assert '1/1*' in out and "* recorded before the method's files changed" in out
  assert 'recorded of an earlier state' in shown(capsys, 'mae')


def test_page_of_one_method_has_each_test_and_its_figures(recorded, capsys):
  out = shown(capsys, 'mae')
  assert out.index('parity:') < out.index('properties:') < out.index('learning:')
  assert '39 of 40 tensors within tolerance, largest error 2.0e-05' in out
  assert 'end: 0.0712' in out and 'test_b[0]' in out and 'skipped' in out


def test_json_is_the_same(recorded, capsys):
  (row,) = json.loads(shown(capsys, 'mae', '--json'))
  assert row['verified'] == {'parity': '39/40 tensors, 1 failed', 'properties': '1/2', 'learning': '1/1'}
  assert row['modalities'] == ['image'] and row['arxiv'] == '2111.06377'


def test_without_records_it_says_so(monkeypatch, capsys):
  monkeypatch.setattr(records, 'find', lambda: None)
  out = shown(capsys)
  assert 'nothing is recorded here' in out and '--record' in out and 'parity' not in out
  assert 'nothing is recorded here' in shown(capsys, 'mae')


def test_unknown_names_and_broken_files(recorded, capsys):
  assert cli.main(['methods', 'maee']) == 2
  assert "did you mean 'mae'" in capsys.readouterr().err
  recorded.write_text('[1, 2]')
  assert cli.main(['methods']) == 2
  assert 'not a file of records' in capsys.readouterr().err


def test_what_methods_read_follows_from_their_fields():
  fields = {
    'image': Field('B H W C', (8, 8, 3)),
    'views': Field('B V H W C', (2, 8, 8, 3)),
    'scan': Field('B D H W C', (8, 8, 8, 1)),
    'text': Field('B T', (9,), 'int32'),
    'table': Field('B N', (5,)),
    'label': Field('B', (), 'int32'),
    'teacher_hidden': Field('B L N D', (2, 4, 8)),
  }
  assert methods.modalities(fields) == ['image', 'volume', 'text', 'table', 'label']


def test_a_checkout_goes_before_a_wheel(tmp_path):
  package = tmp_path / 'mim_jax'
  package.mkdir()
  assert records.find(package) is None
  (package / 'records.json').touch()
  assert records.find(package) == package / 'records.json'
  (tmp_path / 'tests').mkdir()
  (tmp_path / 'tests' / 'records.json').touch()
  assert records.find(package) == tmp_path / 'tests' / 'records.json'


def test_code_is_that_of_the_method_and_its_official_file(tmp_path):
  for folder in ('methods', 'official'):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / 'x.py').write_text(folder)
  first = records.code_of('x', tmp_path)
  (tmp_path / 'methods' / 'y.py').write_text('another')
  assert records.code_of('x', tmp_path) == first
  (tmp_path / 'official' / 'x.py').write_text('changed')
  assert records.code_of('x', tmp_path) != first


def test_merging_replaces_what_ran_again_and_drops_what_is_gone(tmp_path):
  file = tmp_path / 'tests' / 'test_x.py'
  file.parent.mkdir()
  file.write_text('def test_stays(): ...\nclass TestIt:\n  def test_inner(self): ...\n')
  make = lambda test, outcome: records.result('mae', 'properties', f'tests/test_x.py::{test}', outcome)
  old = [
    make('test_stays[0]', 'failed'),
    make('test_stays[1]', 'passed'),
    make('test_gone', 'passed'),
    make('TestIt::test_inner', 'passed'),
  ]
  merged = records.merge(old, [make('test_stays[0]', 'passed')], tmp_path)
  assert [(r.test.rpartition('::')[2], r.outcome) for r in merged] == [
    ('test_stays[0]', 'passed'),
    ('test_stays[1]', 'passed'),
    ('test_inner', 'passed'),
  ]
  path = tmp_path / 'records.json'
  records.write(path, merged)
  assert records.read(path) == sorted(merged, key=lambda r: r.test)
  with pytest.raises(UserError, match='not a file of records'):
    path.write_text('{"mae": {"parity": {"t": {"outcome": "passed"}}}}')
    records.read(path)


SESSION = """
import pytest
from mim_jax import parity

def test_property(record):
  record(seen=3)

@pytest.mark.parametrize('seed', [0, 1])
@pytest.mark.slow
def test_learns(record, seed):
  record(end=0.5)
  assert not seed

@pytest.mark.skip
def test_not_here(): ...

def test_numbers(monkeypatch):
  parity.run(parity.Case('mae', {}, {}))

@pytest.mark.verifies('devices')
@pytest.mark.parametrize('name', ['mae', 'dmjd'])
def test_sharded(name): ...
"""


STAND_IN = """
from mim_jax import parity
rows = [parity.Row('out/x', 1e-7, 1e-6, True), parity.Row('out/y', 1, 1, False)]
parity.run = lambda case: rows
"""


@pytest.mark.parametrize('workers', [(), pytest.param(('-n', '2'), marks=pytest.mark.slow)])
def test_a_session_records_itself(root, tmp_path, workers):
  """A checkout in small: pytest --record on a file of tests, in one process and in several."""
  (tmp_path / 'tests' / 'methods').mkdir(parents=True)
  shutil.copy(root / 'tests' / 'conftest.py', tmp_path / 'tests')
  shutil.copy(root / 'pyproject.toml', tmp_path)
  # The replay itself is stood in for before the session wraps it.
  with (tmp_path / 'tests' / 'conftest.py').open('a') as file:
    file.write(STAND_IN)
  (tmp_path / 'tests' / 'methods' / 'test_mae.py').write_text(SESSION)

  def session(*argv):
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', *workers, *argv]
    done = subprocess.run(
      command, cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(root)}, capture_output=True, text=True
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr

  path = tmp_path / 'tests' / 'records.json'
  session('-k', 'property')
  assert not path.exists()
  session('--record')
  found = {(r.method, r.kind, r.test.partition('::')[2]): r for r in records.read(path)}
  assert {key: r.outcome for key, r in found.items()} == {
    ('mae', 'properties', 'test_property'): 'passed',
    ('mae', 'learning', 'test_learns[0]'): 'passed',
    ('mae', 'learning', 'test_learns[1]'): 'failed',
    ('mae', 'properties', 'test_not_here'): 'skipped',
    ('mae', 'parity', 'test_numbers'): 'passed',
    ('mae', 'devices', 'test_sharded[mae]'): 'passed',
    ('dmjd', 'devices', 'test_sharded[dmjd]'): 'passed',
  }
  assert found['mae', 'properties', 'test_property'].figures == {'seen': 3}
  assert found['mae', 'learning', 'test_learns[1]'].figures == {'end': 0.5}
  assert found['mae', 'parity', 'test_numbers'].figures == {'mae': {'tensors': 2, 'within': 1, 'error': 1}}
  assert all(r.current for r in found.values())
