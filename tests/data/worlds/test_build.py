import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds

from mim_jax.data import worlds
from mim_jax.data.worlds import __main__ as command
from mim_jax.data.worlds import build
from mim_jax.errors import ConfigError, MissingData, UserError

TINY = 'shapes/size=16,train=6,validation=3'


def start(root, data_dir, spec):
  env = {**os.environ, 'PYTHONPATH': str(root)}
  call = [sys.executable, '-m', 'mim_jax.data.worlds', spec, f'--data_dir={data_dir}', '--workers=1']
  return subprocess.Popen(call, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def leftovers(data_dir):
  return [p.name for p in data_dir.rglob('.*unfinished*')]


def test_a_spec_is_world_options_and_split():
  world, options, split = worlds.parse('synthetic:shapes/size=32,seed=5:validation[:10%]')
  assert (world.name, split) == ('shapes', 'validation[:10%]')
  assert options == {'size': 32, 'train': 20_000, 'validation': 2_000, 'seed': 5, 'textures': True, 'others': 3}
  assert worlds.parse('shapes')[1:] == (dict(world.defaults), 'train')


@pytest.mark.parametrize(
  ('spec', 'message'),
  [
    ('shape', "no synthetic world 'shape'; did you mean 'shapes'"),
    ('shapes/sise=3', "no option 'sise'; did you mean 'size'"),
    ('shapes/size', "'size' is no option; expected OPTION=VALUE"),
    ('shapes/', "'' is no option"),
    ('shapes/size=', "'size=' is no option"),
    ('shapes/size=big', "size is 'big'; expected int, such as size=64"),
    ('shapes/size=2.5', "size is '2.5'; expected int"),
    ('shapes/size=4', 'size is 4; expected 16 to 1024'),
    ('shapes/size=32,size=64', "gives 'size' twice"),
    ('shapes/train=0,validation=0', 'are all 0'),
    ('', 'names no synthetic world'),
    ('shapes:', 'names no synthetic world'),
  ],
)
def test_a_wrong_spec_is_told_what_is_wrong(spec, message):
  with pytest.raises(ConfigError) as error:
    worlds.parse(spec)
  assert message in str(error.value)


def test_the_folder_follows_from_argument_environment_and_home(monkeypatch, tmp_path):
  monkeypatch.delenv('MIM_JAX_DATA', raising=False)
  monkeypatch.setenv('HOME', str(tmp_path))
  assert worlds.data_dir() == tmp_path / '.cache/mim_jax/data'
  monkeypatch.setenv('MIM_JAX_DATA', str(tmp_path / 'env'))
  assert worlds.data_dir() == tmp_path / 'env'
  assert worlds.data_dir('given').name == 'given'


def test_options_never_share_a_folder():
  world = worlds.get('shapes')
  changes = [{}, {'size': 32}, {'train': 32}, {'validation': 32}, {'seed': 32}]
  folders = {worlds.folder(world, world.options(**change)) for change in changes}
  assert len(folders) == len(changes)


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  data_dir = tmp_path_factory.mktemp('worlds')
  return data_dir, worlds.prepare(TINY, data_dir)  # by two processes where there are two CPUs


def test_tfds_reads_what_was_rendered_in_order(prepared):
  data_dir, folder = prepared
  builder = tfds.builder_from_directory(folder)
  assert builder.info.full_name == 'shapes/size_16-train_6-validation_3-seed_0-textures_True-others_3/1.0.0'
  assert {k: v.num_examples for k, v in builder.info.splits.items()} == {'train': 6, 'validation': 3}
  assert builder.info.features['label'].names == list(worlds.get('shapes').metadata({})['mask'][1:])
  metadata = json.loads((folder / 'metadata.json').read_text())
  assert metadata['options'] == {'size': 16, 'train': 6, 'validation': 3, 'seed': 0, 'textures': True, 'others': 3}
  assert [c['name'] for c in metadata['table']][:2] == ['colour', 'accent']
  for split, count in (('train', 6), ('validation', 3)):
    source = worlds.load(f'{TINY}:{split}', data_dir)
    assert len(source) == count
    for i in range(count):
      want = worlds.get('shapes').example(metadata['options'], split, i)
      got = source[i]
      assert got['image'].shape == (16, 16, 3) and got['image'].dtype == np.uint8
      assert got['caption'].decode() == want['caption']
      for k in ('label', 'boxes', 'box_valid', 'box_label', 'distance', 'visible', 'table'):
        np.testing.assert_array_equal(got[k], want[k])
  assert len(worlds.load(f'{TINY}:train[:50%]+validation', data_dir)) == 6


def test_preparing_again_changes_nothing(prepared, capfd):
  data_dir, folder = prepared
  before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
  assert worlds.prepare('shapes', data_dir, size=16, train=6, validation=3) == folder
  assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before
  assert capfd.readouterr().err == ''


def test_processes_write_the_same_as_one(prepared, tmp_path, capfd):
  _, folder = prepared
  one, two = (worlds.prepare(TINY, tmp_path / str(n), workers=n) for n in (1, 2))
  files = sorted(p.name for p in folder.iterdir())
  for other in (one, two):
    assert sorted(p.name for p in other.iterdir()) == files
    for name in files:
      if name != 'dataset_info.json':  # names the folder
        assert (other / name).read_bytes() == (folder / name).read_bytes(), name
  err = capfd.readouterr().err
  assert '9 examples, 2 process(es)' in err and 'prepared' in err


def test_long_splits_go_into_several_files(monkeypatch, tmp_path):
  monkeypatch.setattr(build, 'SHARD', 3)
  spec = 'shapes/size=16,train=8,validation=0'
  folder = worlds.prepare(spec, tmp_path, workers=1)
  info = tfds.builder_from_directory(folder).info
  assert info.splits['train'].shard_lengths == [2, 3, 3] and list(info.splits) == ['train']
  source, options = worlds.load(spec, tmp_path), worlds.parse(spec)[1]
  for i in range(8):
    assert source[i]['caption'].decode() == worlds.get('shapes').example(options, 'train', i)['caption']


def test_a_world_that_is_missing_names_the_command_that_prepares_it(tmp_path, capsys):
  spec = 'synthetic:shapes/size=16,train=2,validation=1:validation'
  with pytest.raises(MissingData) as error:
    worlds.load(spec, str(tmp_path))
  text = str(error.value)
  given = text[text.index('python -m mim_jax.data.worlds ') :].split()[3:]
  assert command.main(given) == 0
  assert len(worlds.load(spec, str(tmp_path))) == 1
  assert str(worlds.locate(spec, str(tmp_path))[0]) in capsys.readouterr().out


def test_the_command_reports_wrong_specs(capsys):
  assert command.main(['shapes/size=0']) == 1
  assert capsys.readouterr().err.startswith('error: synthetic:shapes: size is 0')


def test_tensorflow_is_not_imported(prepared, root):
  data_dir, _ = prepared
  code = f"""
import sys
from mim_jax.data import worlds
assert 'tensorflow_datasets' not in sys.modules
worlds.prepare('shapes/size=16,train=1,validation=0', {str(data_dir)!r}, workers=1)
worlds.load('shapes/size=16,train=1,validation=0', {str(data_dir)!r})[0]
assert 'tensorflow' not in sys.modules and 'jax' not in sys.modules
"""
  subprocess.run([sys.executable, '-c', code], check=True, env={**os.environ, 'PYTHONPATH': str(root)})


def test_a_killed_preparation_leaves_no_data_set_and_does_not_stop_the_next(root, tmp_path):
  spec = 'shapes/size=16,train=200,validation=0'
  process = start(root, tmp_path, spec)
  while not leftovers(tmp_path):
    assert process.poll() is None
    time.sleep(0.002)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  with pytest.raises(MissingData):
    worlds.locate(spec, tmp_path)
  assert leftovers(tmp_path)
  worlds.prepare(spec, tmp_path, workers=1)
  assert len(worlds.load(spec, tmp_path)) == 200 and not leftovers(tmp_path)


def test_of_two_at_once_one_waits(root, tmp_path):
  spec = 'shapes/size=16,train=200,validation=0'
  first = start(root, tmp_path, spec)
  while not leftovers(tmp_path):
    assert first.poll() is None
    time.sleep(0.002)
  second = start(root, tmp_path, spec)
  (out, err), (out2, err2) = first.communicate(), second.communicate()
  assert first.returncode == second.returncode == 0 and out == out2
  assert 'prepared' in err and 'prepared' not in err2
  assert len(worlds.load(spec, tmp_path)) == 200 and not leftovers(tmp_path)


def test_one_that_was_finished_by_another_machine_is_taken(prepared, monkeypatch, tmp_path):
  _, folder = prepared
  world, options, _ = worlds.parse(TINY)
  mine = worlds.folder(world, options, tmp_path)
  write = build._write

  def write_while_another_does(*args):
    write(*args)
    subprocess.run(['cp', '-r', folder, mine], check=True)

  monkeypatch.setattr(build, '_write', write_while_another_does)
  assert worlds.prepare(TINY, tmp_path, workers=1) == mine
  assert len(worlds.load(TINY, tmp_path)) == 6 and not leftovers(tmp_path)


def test_what_fails_leaves_nothing(monkeypatch, tmp_path):
  def example(options, split, index):
    if index == 4:
      raise ZeroDivisionError('in a world')
    return worlds.get('shapes').example(options, split, index)

  world = dataclasses.replace(worlds.get('shapes'), example=example)
  folder = tmp_path / 'config' / '1.0.0'
  with pytest.raises(ZeroDivisionError):
    build.prepare(world, world.options(size=16, train=6, validation=0), folder, 1)
  assert not folder.exists() and not leftovers(tmp_path)
  # A worker knows a world by its name only, and this one does not exist there.
  world = dataclasses.replace(world, name='unknown')
  with pytest.raises(RuntimeError, match="no synthetic world 'unknown'"):
    build.prepare(world, world.options(size=16, train=6, validation=3), folder, 2)
  assert not folder.exists() and not leftovers(tmp_path)


def test_a_folder_in_the_way_and_one_that_cannot_be_made_are_named(tmp_path):
  world, options, _ = worlds.parse(TINY)
  folder = worlds.folder(world, options, tmp_path)
  folder.mkdir(parents=True)
  (folder / 'something').touch()
  with pytest.raises(UserError, match='in the way'):
    worlds.prepare(TINY, tmp_path, workers=1)
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match='MIM_JAX_DATA'):
    worlds.prepare(TINY, tmp_path / 'file', workers=1)
