"""Every command in README and docs is one that the program understands."""

import argparse
import importlib
import re
import shlex
import subprocess

import pytest

from mim_jax import cli, config

BLOCK = re.compile(r'```bash\n(.*?)```', re.DOTALL)


def commands(root):
  for page in [root / 'README.md', *sorted((root / 'docs').rglob('*.md'))]:
    if page.name == 'launch.md':  # tests/launch runs these
      continue
    for block in BLOCK.findall(page.read_text()):
      for line in block.replace('\\\n', ' ').splitlines():
        if words := shlex.split(line, comments=True):
          yield page.name, words


@pytest.fixture(scope='module')
def found(root):
  return list(commands(root))


def test_there_are_commands_on_every_page(found):
  assert {'README.md', 'add_a_method.md', 'data.md', 'mae.md'} <= {page for page, _ in found}


def test_verbs_take_these_arguments(found, root, monkeypatch):
  monkeypatch.chdir(root)
  for page, words in found:
    if words[0] != 'mim-jax':
      continue
    module = importlib.import_module(f'mim_jax.commands.{words[1]}')
    parser = argparse.ArgumentParser(prog=f'{page}: mim-jax {words[1]}', allow_abbrev=False)
    module.add(parser)
    args, rest = parser.parse_known_args(words[2:])
    args.overrides = rest
    if getattr(args, 'config', None):
      cli.config_of(args)
    else:
      assert not rest, (page, words)


def test_training_commands_have_configs(found, root, monkeypatch):
  monkeypatch.chdir(root)
  trained = [words for _, words in found if words[:3] == ['python', '-m', 'mim_jax.train']]
  assert trained
  for words in trained:
    assert any(word.startswith('--workdir=') for word in words)
    config.load([word for word in words[3:] if word.startswith('--config')])


def test_scripts_take_these_arguments(found, root):
  for page, words in found:
    if words[0] == 'bash':
      done = subprocess.run([*words, '--dry-run'], cwd=root, capture_output=True, text=True)
      assert done.returncode == 0, (page, words, done.stderr)


def test_nothing_else_is_shown(found):
  known = ('mim-jax', 'python', 'bash', 'pip', 'export')
  assert not [(page, words) for page, words in found if words[0] not in known]
