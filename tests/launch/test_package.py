"""setup.py: what it depends on and why, and what a wheel holds."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETUP = (ROOT / 'setup.py').read_text()
CALL = ast.parse(SETUP).body[-1]  # setup(...)
OPTIONS = {keyword.arg: keyword.value for keyword in CALL.value.keywords}
REQUIRED = ast.literal_eval(OPTIONS['install_requires'])
EXTRAS = ast.literal_eval(OPTIONS['extras_require'])


def name(requirement: str) -> str:
  return re.match(r'[\w-]+', requirement)[0].replace('_', '-').lower()


def test_every_dependency_has_a_range_and_a_comment_that_says_what_it_is_for():
  for requirement in [*REQUIRED, *(entry for entries in EXTRAS.values() for entry in entries)]:
    assert '==' not in requirement
    assert '>=' in requirement or requirement.startswith('jax['), requirement  # jax has its range above
    (line,) = [line for line in SETUP.splitlines() if f"'{requirement}'" in line]
    assert re.search(r',  # \w+', line), line
  assert {'tpu', 'cuda', 'plan', 'tf', 'torch', 'wandb', 'test'} == set(EXTRAS)


def test_default_and_test_installs_have_no_other_framework():
  names = {name(entry) for entry in [*REQUIRED, *EXTRAS['test']]}
  assert not {'torch', 'torchvision', 'tensorflow', 'libtpu', 'wandb'} & names


def imports(path: Path):
  """Top-level names of the modules that a file needs to be imported itself; optional ones are imported in functions."""
  for node in ast.parse(path.read_text()).body:
    if isinstance(node, ast.Import):
      yield from (alias.name.split('.')[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and not node.level:
      yield node.module.split('.')[0]


@pytest.mark.parametrize(('folder', 'extras'), [('mim_jax', []), ('configs', []), ('tests', ['test'])])
def test_what_is_imported_is_declared(folder, extras):
  declared = {name(entry) for entry in [*REQUIRED, *(entry for extra in extras for entry in EXTRAS[extra])]}
  installed = metadata.packages_distributions()
  ours = {'mim_jax', 'configs', *(path.stem for path in ROOT.glob('tests/**/*.py'))} | sys.stdlib_module_names
  undeclared = {}
  for path in ROOT.glob(f'{folder}/**/*.py'):
    for module in imports(path):
      if module not in ours and not set(map(name, installed.get(module, [module]))) & declared:
        undeclared[module] = path.relative_to(ROOT)
  assert not undeclared


def test_license_is_the_whole_apache_text():
  text = (ROOT / 'LICENSE').read_text()
  assert 'Version 2.0, January 2004' in text
  assert '9. Accepting Warranty or Additional Liability.' in text and 'limitations under the License.' in text


def test_wheel_holds_packages_recipes_and_the_command(tmp_path):
  pytest.importorskip('setuptools', minversion='70.1', reason='building a wheel needs a newer setuptools (test extra)')
  source = tmp_path / 'source'
  source.mkdir()
  for entry in ('mim_jax', 'configs'):
    shutil.copytree(ROOT / entry, source / entry, ignore=shutil.ignore_patterns('__pycache__'))
  for entry in ('setup.py', 'pyproject.toml', 'LICENSE', 'MANIFEST.in'):
    shutil.copy(ROOT / entry, source)
  (source / 'tests').mkdir()
  (source / 'tests' / 'records.json').write_text('{}')
  build = 'import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))'
  done = subprocess.run([sys.executable, '-c', build, tmp_path], cwd=source, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  with zipfile.ZipFile(tmp_path / done.stdout.splitlines()[-1]) as wheel:
    names = wheel.namelist()
    entry_points = wheel.read(next(entry for entry in names if entry.endswith('entry_points.txt'))).decode()
  assert 'mim-jax = mim_jax.cli:main' in entry_points
  assert any(entry.endswith('/LICENSE') for entry in names)
  packages = {path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob('mim_jax/**/__init__.py')}
  assert packages <= {Path(entry).parent.as_posix() for entry in names}
  recipes = {f'mim_jax/configs/{path.name}' for path in ROOT.glob('configs/*.py')}
  assert recipes and recipes == {entry for entry in names if entry.startswith('mim_jax/configs/')}
  assert 'mim_jax/records.json' in names
  assert not [entry for entry in names if entry.startswith(('configs/', 'tests/'))]
