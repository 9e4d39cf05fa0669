"""mim-jax convert and inspect from the command line."""

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from mim_jax import cli
from mim_jax.checkpoint import bundle as bundles
from mim_jax.checkpoint import files
from mim_jax.official.vits import check, formats, timm
from mim_jax.official.vits.layout import save

TESTS = Path(__file__).parent.parent


def _helper(path, name):
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


vit_cases = _helper(TESTS / 'official' / 'vit_cases.py', 'vit_cases')
make_run = _helper(TESTS / 'test_encoder.py', 'encoder_cases').make_run


@pytest.fixture(autouse=True)
def without_libraries(monkeypatch):
  """What the commands print must not depend on what happens to be installed; the libraries have tests of their own."""
  monkeypatch.setattr(check, 'theirs', lambda *args: 'torch not installed')


def test_in_with_what_the_file_does_not_say(tmp_path, capsys):
  bundle = vit_cases.make('scaled')
  files.write(tmp_path / 'x.safetensors', save(bundle, timm.TIMM)[0] | {'other.weight': np.zeros(2)})
  assert cli.main(['convert', str(tmp_path / 'x.safetensors'), f'--out={tmp_path / "y.safetensors"}']) == 2
  assert '--heads' in capsys.readouterr().err
  arguments = ['--heads=4', '--eps=1e-5', '--stats=half', f'--out={tmp_path / "y.safetensors"}']
  assert cli.main(['convert', str(tmp_path / 'x.safetensors'), *arguments]) == 0
  text = capsys.readouterr().out
  assert 'timm' in text and 'not taken other.weight' in text and 'layer scale' in text
  assert 'assumed   activation' in text and 'assumed   LayerNorm' not in text
  assert 'read back from y.safetensors: largest difference 0.0e+00' in text and 'torch not installed' in text
  made = bundles.read(files.read(tmp_path / 'y.safetensors'))
  assert (
    made.encoder['eps'] == 1e-5
    and made.stats == 'half'
    and made.source['format'] == 'timm'
    and len(made.source['sha256']) == 16
  )


def test_positions_for_other_images(tmp_path, capsys):
  formats.write(tmp_path / 'x', vit_cases.make('registers'), 'hf-dinov2')
  out = tmp_path / 'y.safetensors'
  assert cli.main(['convert', str(tmp_path / 'x'), '--image_size=48,32', f'--out={out}']) == 0
  assert 'resampled positions from images of (32, 32) to (48, 32)' in capsys.readouterr().out
  assert bundles.read(files.read(out)).image_size == (48, 32)
  assert cli.main(['convert', str(tmp_path / 'x'), '--image_size=50', f'--out={out}']) == 2
  assert 'multiple' in capsys.readouterr().err
  assert cli.main(['convert', str(tmp_path / 'x'), '--image_size=big', f'--out={out}']) == 2
  assert '--image_size=big' in capsys.readouterr().err


def test_a_run_out(tmp_path, capsys):
  make_run(tmp_path / 'run')
  assert cli.main(['convert', str(tmp_path / 'run'), '--to=hf-mae', f'--out={tmp_path / "hf"}']) == 0
  assert {file.name for file in (tmp_path / 'hf').iterdir()} == {
    'model.safetensors',
    'config.json',
    'preprocessor_config.json',
  }
  assert cli.main(['convert', str(tmp_path / 'run'), '--to=timm', f'--out={tmp_path / "t.safetensors"}']) == 0
  text = capsys.readouterr().out
  assert 'step 7' in text and 'left out  decoder' in text
  assert cli.main(['convert', str(tmp_path / 'run'), '--to=hf-vit', f'--out={tmp_path / "t.safetensors"}']) == 2
  assert 'folder' in capsys.readouterr().err
  assert cli.main(['convert', str(tmp_path / 'run'), '--to=hf', f'--out={tmp_path / "t"}']) == 2
  assert 'hf-' in capsys.readouterr().err


def test_a_difference_is_told_by_the_exit_code(tmp_path, capsys, monkeypatch):
  formats.write(tmp_path / 'x', vit_cases.make('scaled'), 'hf-dinov2')
  out = f'--out={tmp_path / "y.safetensors"}'
  monkeypatch.setattr(check, 'theirs', lambda *args: check.ours(args[3], args[4]))
  assert cli.main(['convert', str(tmp_path / 'x'), out]) == 0
  assert 'the same' in capsys.readouterr().out
  monkeypatch.setattr(check, 'theirs', lambda *args: {'tokens': check.ours(args[3], args[4])['tokens'] + 0.01})
  assert cli.main(['convert', str(tmp_path / 'x'), out]) == 1
  assert 'DIFFERENT' in capsys.readouterr().out


def test_inspect_a_run(tmp_path, capsys):
  make_run(tmp_path / 'run', norm_pix=False)
  assert cli.main(['inspect', str(tmp_path / 'run')]) == 0
  text = capsys.readouterr().out
  for part in (
    'run of mae',
    '7 (steps on disk: 3, 7)',
    'pixels as they are',
    'center_crop(32) | normalize',
    'params/encoder',
    'params/decoder',
    'float32',
  ):
    assert part in text
  assert cli.main(['inspect', str(tmp_path / 'run'), '--step=3', '--arrays']) == 0
  assert 'params/encoder/blocks/attn/qkv/kernel' in capsys.readouterr().out
  assert cli.main(['inspect', str(tmp_path / 'run'), '--step=4']) == 2
  assert '3, 7' in capsys.readouterr().err


def test_inspect_files(tmp_path, capsys):
  bundles.write(tmp_path / 'ours.safetensors', dataclasses.replace(vit_cases.make('clip'), stats='clip'))
  formats.write(tmp_path / 'hf', vit_cases.make('clip'), 'hf-clip')
  files.write(tmp_path / 'strange.safetensors', {'a.b.c': np.zeros(3, np.int64)})
  for path, parts in (
    ('ours.safetensors', ('mim_jax weights', 'quick_gelu', "normalize('clip')", 'encoder')),
    ('hf', ('hf-clip', 'encoder.layers')),
    ('strange.safetensors', ('none that is known', 'int64')),
  ):
    assert cli.main(['inspect', str(tmp_path / path)]) == 0
    text = capsys.readouterr().out
    assert all(part in text for part in parts), text


def test_inspect_two(tmp_path, capsys):
  make_run(tmp_path / 'run')
  assert cli.main(['inspect', str(tmp_path / 'run'), str(tmp_path / 'run')]) == 0
  assert cli.main(['convert', str(tmp_path / 'run'), f'--out={tmp_path / "x.safetensors"}']) == 0
  assert (
    cli.main(['inspect', str(tmp_path / 'run'), str(tmp_path / 'x.safetensors')]) == 0
  )  # a run against the file made of it
  capsys.readouterr()
  weights = files.read(tmp_path / 'x.safetensors')
  changed = dict(weights.items())
  changed['encoder/cls_token'] = changed['encoder/cls_token'] + 0.5
  changed['encoder/registers'] = np.zeros((1, 2, 32), np.float32)
  changed['decoder/norm/bias'] = np.zeros(3, np.float32)
  description = weights.metadata | {
    'mim_jax': weights.metadata['mim_jax'].replace('"mask_ratio": 0.75', '"mask_ratio": 0.6')
  }
  files.write(tmp_path / 'y.safetensors', changed, description)
  assert cli.main(['inspect', str(tmp_path / 'x.safetensors'), str(tmp_path / 'y.safetensors')]) == 1
  text = capsys.readouterr().out
  assert 'only in the second: encoder/registers' in text
  assert any(line.split() == ['method.mask_ratio', '0.75', '0.6'] for line in text.splitlines())
  assert any(line.split()[:2] == ['encoder/cls_token', '0.5'] for line in text.splitlines())
  assert 'float32[24]' in text and 'float32[3]' in text
  assert f'{len(weights) - 2} of {len(weights) - 1} arrays' in text
