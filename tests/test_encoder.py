"""Features from a path: runs, our files, files of others; the example of the documents."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mim_jax
from mim_jax import config, encoder, method
from mim_jax.checkpoint import bundle as bundles
from mim_jax.checkpoint.manager import Manager
from mim_jax.errors import CheckpointError, UserError
from mim_jax.official.vits import formats

_spec = importlib.util.spec_from_file_location('vit_cases', Path(__file__).parent / 'official' / 'vit_cases.py')
vit_cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(vit_cases)


def make_run(folder: Path, ema: float = 0.0, **options) -> dict:
  """The folder of a MAE run with checkpoints of steps 3 and 7; returns the train state of step 7."""
  cfg = config.base()
  cfg.method = method.options('mae', **{'size': '32/2/4', 'decoder': '24/1/3', 'patch': 8, 'image_size': 32, **options})
  cfg.data.eval_transforms = 'decode | resize(36) | center_crop(32) | normalize'
  cfg.ema = ema
  folder.mkdir(parents=True)
  config.save(cfg, folder / 'config.json')
  built = method.build(cfg.method)
  manager = Manager(folder / 'checkpoints', asynchronous=False)
  for step in (3, 7):
    params = vit_cases.randomized(jax.eval_shape(built.init, jax.random.key(0), built.abstract_batch(1)), seed=step)
    train = {
      'step': jnp.int32(step),
      'params': params,
      'state': {},
      'ema': jax.tree.map(lambda x: x * 0.5, params) if ema else {},
    }
    manager.save(step, jax.tree.map(jnp.asarray, train), {})
  manager.close()
  return train


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp('runs') / 'mae'
  return folder, make_run(folder)


def pictures(count=2):
  return [np.random.default_rng(i).integers(0, 256, (40 + 8 * i, 50, 3), dtype=np.uint8) for i in range(count)]


def test_a_run(run):
  folder, train = run
  encode, params, preprocess = mim_jax.load_encoder(folder)
  images = preprocess(pictures())
  assert images.shape == (2, 32, 32, 3) and images.dtype == np.float32
  tokens = jax.jit(encode)(params, images)
  built = method.build(method.options('mae', size='32/2/4', decoder='24/1/3', patch=8, image_size=32))
  expected = built.encode(train['params'], {'image': images})
  np.testing.assert_allclose(tokens, expected['tokens'], atol=1e-5)  # of step 7, the newest
  np.testing.assert_allclose(encode.features(params, {'image': images})['cls'], expected['cls'], atol=1e-5)


def test_the_average_of_a_run_that_keeps_one(tmp_path):
  train = make_run(tmp_path / 'run', ema=0.9)
  _, params, _ = mim_jax.load_encoder(tmp_path / 'run')
  np.testing.assert_array_equal(params['encoder']['cls_token'], train['params']['encoder']['cls_token'] * 0.5)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path):
  make_run(tmp_path / 'run')
  for file in (tmp_path / 'run' / 'checkpoints' / '7').rglob('*'):
    if file.is_file():
      file.write_bytes(b'')
  assert encoder.weights_of_run(tmp_path / 'run').step == 3


def test_a_run_without_checkpoint_and_options_of_files(tmp_path, run):
  (tmp_path / 'run' / 'checkpoints').mkdir(parents=True)
  (tmp_path / 'run' / 'config.json').write_text((run[0] / 'config.json').read_text())
  with pytest.raises(CheckpointError, match='no checkpoint yet'):
    mim_jax.load_encoder(tmp_path / 'run')
  with pytest.raises(UserError, match='is a run'):
    mim_jax.load_encoder(run[0], heads=4)


def test_a_run_and_the_file_made_of_it_give_the_same(tmp_path, run):
  bundle = encoder.bundle_of_run(run[0])
  bundles.write(tmp_path / 'x.safetensors', bundle)
  for form in ('timm', 'hf-mae'):
    formats.write(tmp_path / form, bundle, form)
  encode, params, preprocess = mim_jax.load_encoder(run[0])
  images = preprocess(pictures())
  tokens = encode(params, images)
  for path in ('x.safetensors', 'timm', 'hf-mae'):
    other, weights, prepare = mim_jax.load_encoder(tmp_path / path)
    np.testing.assert_allclose(other(weights, images), tokens, atol=1e-5)
    np.testing.assert_allclose(prepare(pictures()), images, atol=1e-6)
    assert other.features(weights, images)['layers'].shape == (2, 2, 17, 32)


def test_an_encoder_without_class_token_on_other_images(tmp_path):
  bundles.write(tmp_path / 'x.safetensors', vit_cases.make('no_cls'))
  encode, params, preprocess = mim_jax.load_encoder(tmp_path / 'x.safetensors', image_size=(48, 32))
  out = encode.features(params, preprocess(pictures(1)))
  assert out['tokens'].shape == (1, 24, 32) and 'cls' not in out


def test_gradients_flow_into_params(run):
  encode, params, preprocess = mim_jax.load_encoder(run[0])
  images = preprocess(pictures(1))
  grads = jax.jit(jax.grad(lambda p: jnp.sum(encode(p, images)[0, :, 0])))(params)
  assert np.any(grads['encoder']['patch_embed']['kernel'])


def test_teachers_from_files(tmp_path):
  bundle = dataclasses.replace(vit_cases.make('clip'), stats='clip')
  formats.write(tmp_path / 'clip', bundle, 'hf-clip')
  teacher, frozen = mim_jax.load_teacher(tmp_path / 'clip')
  assert teacher.stats == 'clip' and teacher.encoder == bundle.module
  out = teacher(frozen, jnp.zeros((1, 32, 32, 3)), attention=True)
  assert out['attention'].shape == (1, 4, 16)
  abstract = jax.eval_shape(teacher.init, jax.random.key(0))
  assert jax.tree.structure(abstract) == jax.tree.structure(frozen)


def test_preprocessing(tmp_path):
  picture = pictures(1)[0]
  cv2.imwrite(str(tmp_path / 'x.png'), picture[..., ::-1])
  prepare = encoder.Preprocess('decode | resize((32, 32)) | normalize')
  by_array = prepare(picture)
  for given in (str(tmp_path / 'x.png'), tmp_path / 'x.png', (tmp_path / 'x.png').read_bytes(), [picture]):
    np.testing.assert_array_equal(prepare(given), by_array)
  with pytest.raises(UserError, match='several sizes'):
    encoder.Preprocess('decode | normalize')(pictures())


@pytest.mark.parametrize(
  'text, stats',
  [
    ('decode | normalize', 'imagenet'),
    ("decode | normalize('clip')", 'clip'),
    ("decode | normalize(stats='half')", 'half'),
    ('decode | normalize(((0.1, 0.2), (0.3, 0.4)))', ((0.1, 0.2), (0.3, 0.4))),
    ('decode | to_float', 'none'),
  ],
)
def test_statistics_of_transforms(text, stats):
  assert encoder._stats(text) == stats


@pytest.mark.parametrize('document', ['docs/weights.md', 'README.md'])
def test_the_example_of_the_documents(tmp_path, monkeypatch, root, document, capsys):
  file = root / document
  blocks = (
    [b for b in re.findall(r'```python\n(.*?)```', file.read_text(), re.S) if 'load_encoder' in b]
    if file.is_file()
    else []
  )
  if not blocks and document == 'README.md':
    pytest.skip('README.md has no example of load_encoder')
  make_run(tmp_path / 'runs' / 'mae')
  for name, picture in zip(('cat.png', 'dog.png'), pictures(), strict=True):
    cv2.imwrite(str(tmp_path / name), picture)
  monkeypatch.chdir(tmp_path)
  exec(compile(blocks[0], document, 'exec'), {})
  assert '(2, 16, 32)' in capsys.readouterr().out


def test_names_of_the_package():
  assert {'load_encoder', 'load_teacher'} <= set(dir(mim_jax))
  with pytest.raises(AttributeError, match='no_such_thing'):
    _ = mim_jax.no_such_thing
