"""Starting from other weights: every leaf is accounted for, and nothing needed is left out unnoticed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mim_jax.checkpoint import bundle, files
from mim_jax.checkpoint.init_from import load_into
from mim_jax.checkpoint.manager import Manager, flatten
from mim_jax.errors import CheckpointError, ConfigError
from mim_jax.models import posemb


@pytest.fixture
def mesh(devices):
  return jax.sharding.Mesh(np.array(devices).reshape(4, 2), ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2)


def tree_of(mesh, seed, depth=2, rows=17, width=4, classes=None):
  """Params of a tiny network, kernels sharded over 'fsdp'."""
  noise = np.random.default_rng(seed)

  def array(*shape):
    axes = (None,) * (len(shape) - 1) + ('fsdp',) if len(shape) > 1 else ()
    return jax.device_put(noise.normal(size=shape).astype(np.float32), NamedSharding(mesh, PartitionSpec(*axes)))

  tree = {
    'encoder': {
      'pos_embed': array(1, rows, width),
      'blocks': {'mlp': {'kernel': array(depth, width, 2 * width), 'bias': array(depth, 2 * width)}},
      'norm': {'scale': array(width)},
    },
    'decoder': {'pred': {'kernel': array(width, 6)}},
  }
  return tree | ({'head': {'kernel': array(width, classes)}} if classes else {})


def same(x, y):
  np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture
def run(mesh, tmp_path):
  """Folder of a run with steps 1 and 2; params of step s come from seed s, its average from seed 10 + s."""
  manager = Manager(tmp_path / 'run' / 'checkpoints')
  for step in (1, 2):
    manager.save(step, {'params': tree_of(mesh, step), 'ema': tree_of(mesh, 10 + step), 'opt': {'mu': jnp.ones(3)}}, {})
  manager.close()
  return tmp_path / 'run'


@pytest.fixture
def file(mesh, tmp_path):
  path = tmp_path / 'weights.safetensors'
  files.write(path, {name: np.asarray(x) for name, x in flatten(tree_of(mesh, 5)).items()})
  return path


def test_a_run_gives_its_newest_params(mesh, run):
  ours = tree_of(mesh, 0)
  params, report = load_into(ours, run)
  jax.tree.map(same, params, tree_of(mesh, 2))
  assert jax.tree.map(lambda x: x.sharding, params) == jax.tree.map(lambda x: x.sharding, ours)
  assert set(report.loaded) == set(flatten(ours))
  assert not report.resized and not report.missing and not report.unused
  assert 'checkpoints/2, params: 5 loaded, 0 resized, 0 missing, 0 unused' in str(report)


def test_a_damaged_step_is_passed_over(mesh, run):
  for path in (run / 'checkpoints' / '2' / 'state').rglob('d/*'):
    path.write_bytes(path.read_bytes()[:-9])
  params, report = load_into(tree_of(mesh, 0), run)
  jax.tree.map(same, params, tree_of(mesh, 1))
  assert 'checkpoints/1' in report.source


def test_one_step_and_the_average(mesh, run):
  jax.tree.map(same, load_into(tree_of(mesh, 0), run / 'checkpoints' / '1')[0], tree_of(mesh, 1))
  jax.tree.map(same, load_into(tree_of(mesh, 0), str(run), which='ema')[0], tree_of(mesh, 12))
  with pytest.raises(CheckpointError, match='no weights at'):
    load_into(tree_of(mesh, 0), run / 'checkpoints' / '7')
  with pytest.raises(CheckpointError, match='no weights at'):
    load_into(tree_of(mesh, 0), run / 'elsewhere')


def test_a_run_without_average(mesh, tmp_path):
  manager = Manager(tmp_path / 'checkpoints')
  manager.save(1, {'params': tree_of(mesh, 1), 'ema': {}}, {})
  manager.close()
  with pytest.raises(CheckpointError, match='holds no ema'):
    load_into(tree_of(mesh, 0), tmp_path, which='ema')
  with pytest.raises(ConfigError, match='which'):
    load_into(tree_of(mesh, 0), tmp_path, which='teacher')


def test_a_file(mesh, file):
  ours = tree_of(mesh, 0)
  params, report = load_into(ours, file)
  jax.tree.map(same, params, tree_of(mesh, 5))
  assert jax.tree.map(lambda x: x.sharding, params) == jax.tree.map(lambda x: x.sharding, ours)
  assert report.source == str(file)


def test_a_file_with_two_trees(mesh, tmp_path):
  path = tmp_path / 'both.safetensors'
  trees = {'params': tree_of(mesh, 5), 'ema': tree_of(mesh, 6)}
  files.write(path, {name: np.asarray(x) for name, x in flatten(trees).items()})
  jax.tree.map(same, load_into(tree_of(mesh, 0), path)[0], trees['params'])
  jax.tree.map(same, load_into(tree_of(mesh, 0), path, which='ema')[0], trees['ema'])


def test_files_that_cannot_serve(mesh, file, tmp_path):
  with pytest.raises(CheckpointError, match='no ema'):
    load_into(tree_of(mesh, 0), file, which='ema')
  (tmp_path / 'broken.safetensors').write_bytes(file.read_bytes()[:200])
  with pytest.raises(CheckpointError, match='broken.safetensors'):
    load_into(tree_of(mesh, 0), tmp_path / 'broken.safetensors')


def test_dtypes_are_those_of_the_params(mesh, tmp_path):
  path = tmp_path / 'half.safetensors'
  files.write(path, {name: np.asarray(x).astype(jnp.bfloat16) for name, x in flatten(tree_of(mesh, 5)).items()})
  params, _ = load_into(tree_of(mesh, 0), path)
  assert {x.dtype.name for x in jax.tree.leaves(params)} == {'float32'}
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-2), params, tree_of(mesh, 5))


def test_missing_encoder_weights_fail_and_are_listed(mesh, tmp_path):
  path = tmp_path / 'part.safetensors'
  flat = {name: np.asarray(x) for name, x in flatten(tree_of(mesh, 5)).items()}
  files.write(path, {n: x for n, x in flat.items() if n not in ('encoder/norm/scale', 'encoder/blocks/mlp/bias')})
  with pytest.raises(CheckpointError) as caught:
    load_into(tree_of(mesh, 0), path)
  text = str(caught.value)
  assert text.startswith('2 weights of 5') and 'allow_missing' in text
  assert 'encoder/norm/scale [4], not in the source' in text and 'encoder/blocks/mlp/bias [2, 8]' in text

  ours = tree_of(mesh, 0)
  params, report = load_into(ours, path, allow_missing=r'norm/|bias$')
  assert list(report.missing) == ['encoder/blocks/mlp/bias', 'encoder/norm/scale']
  assert params['encoder']['norm']['scale'] is ours['encoder']['norm']['scale']


def test_a_new_head_is_missing_and_the_decoder_unused(mesh, run):
  ours = tree_of(mesh, 0, classes=10)
  del ours['decoder']
  params, report = load_into(ours, run)
  same(params['encoder']['norm']['scale'], tree_of(mesh, 2)['encoder']['norm']['scale'])
  assert params['head']['kernel'] is ours['head']['kernel']
  assert list(report.missing) == ['head/kernel'] and list(report.unused) == ['decoder/pred/kernel']
  lines = str(report).splitlines()
  assert len(lines) == 7 and lines[0].endswith('4 loaded, 0 resized, 1 missing, 1 unused')
  assert lines[-1].split(None, 2) == ['unused', 'decoder/pred/kernel', '[4, 6]']


def test_other_shapes_fail_unless_allowed(mesh, run):
  deeper = tree_of(mesh, 0, depth=3)
  expected = r'mlp/kernel \[3, 4, 8\], the source has \[2, 4, 8\]; 2 blocks do not make 3'
  with pytest.raises(CheckpointError, match=expected):
    load_into(deeper, run)
  params, report = load_into(deeper, run, allow_missing='blocks')
  assert params['encoder']['blocks']['mlp']['kernel'] is deeper['encoder']['blocks']['mlp']['kernel']
  assert set(report.missing) == set(report.unused) == {'encoder/blocks/mlp/kernel', 'encoder/blocks/mlp/bias'}


def test_renames(mesh, tmp_path):
  theirs = {'student': {'backbone': tree_of(mesh, 3)['encoder']}}
  manager = Manager(tmp_path / 'checkpoints')
  manager.save(1, {'params': theirs}, {})
  manager.close()
  ours = tree_of(mesh, 0)
  params, report = load_into(ours, tmp_path, rename=((r'^student/', ''), (r'^backbone/(.*)', r'encoder/\1')))
  jax.tree.map(same, params['encoder'], theirs['student']['backbone'])
  assert len(report.loaded) == 4 and list(report.missing) == ['decoder/pred/kernel']
  with pytest.raises(CheckpointError, match='student/backbone/blocks'):
    load_into(ours, tmp_path)
  with pytest.raises(CheckpointError, match='nothing in .* fits: its names are such as student/backbone'):
    load_into({'head': jnp.zeros(3)}, tmp_path)


def test_renames_are_checked(mesh, run):
  with pytest.raises(ConfigError, match="'techer' matches no name"):
    load_into(tree_of(mesh, 0), run, rename=(('techer', 'encoder'),))
  with pytest.raises(ConfigError, match='both .* of the source'):
    load_into(tree_of(mesh, 0), run, rename=(('kernel|bias', 'w'),))
  with pytest.raises(ConfigError, match='not a regular expression'):
    load_into(tree_of(mesh, 0), run, rename=(('(', ''),))
  with pytest.raises(ConfigError, match='allow_missing'):
    load_into(tree_of(mesh, 0), run, allow_missing='*')


@pytest.mark.parametrize('rows', [10, 50])
def test_position_tables_are_resized(mesh, run, file, rows):
  side = round((rows - 1) ** 0.5)
  ours = tree_of(mesh, 0, rows=rows)
  for source, seed in ((run, 2), (file, 5)):
    params, report = load_into(ours, source)
    table = np.asarray(tree_of(mesh, seed)['encoder']['pos_embed'])
    same(params['encoder']['pos_embed'], posemb.resample(table, (4, 4), (side, side), 1))
    assert params['encoder']['pos_embed'].sharding == ours['encoder']['pos_embed'].sharding
    assert report.resized == {'encoder/pos_embed': f'[1, 17, 4] -> [1, {rows}, 4]'}
    assert 'encoder/pos_embed' not in report.loaded


def test_resizing_is_the_reference_one(mesh, goldens, tmp_path):
  if not (goldens / 'mae_vit.safetensors').is_file():
    pytest.skip('no reference case mae_vit')
  case = files.read(goldens / 'mae_vit.safetensors')
  expected = case['out/pos_resized']
  files.write(tmp_path / 'table.safetensors', {'encoder/pos_embed': case['in/pos_ckpt']})
  params, _ = load_into({'encoder': {'pos_embed': jnp.zeros(expected.shape)}}, tmp_path / 'table.safetensors')
  np.testing.assert_allclose(params['encoder']['pos_embed'], expected, rtol=0, atol=1e-5)


def test_grids_that_are_not_square(mesh, run):
  ours = tree_of(mesh, 0, rows=16)  # 15 patches and a class row
  with pytest.raises(CheckpointError, match='give grid and old_grid'):
    load_into(ours, run)
  table = np.asarray(tree_of(mesh, 2)['encoder']['pos_embed'])
  params, _ = load_into(ours, run, grid=(3, 5))
  same(params['encoder']['pos_embed'], posemb.resample(table, (4, 4), (3, 5), 1))
  params, _ = load_into(ours, run, grid=(3, 5), old_grid=(2, 8))
  same(params['encoder']['pos_embed'], posemb.resample(table, (2, 8), (3, 5), 1))
  params, report = load_into(tree_of(mesh, 0), run, grid=(8, 2), old_grid=(2, 8))  # as many rows, another grid
  same(params['encoder']['pos_embed'], posemb.resample(table, (2, 8), (8, 2), 1))
  assert report.resized


def test_tables_of_volumes(mesh, tmp_path):
  path = tmp_path / 'volume.safetensors'
  table = np.random.default_rng(0).normal(size=(1, 64, 4)).astype(np.float32)
  files.write(path, {'encoder/pos_embed': table})
  params, _ = load_into({'encoder': {'pos_embed': jnp.zeros((1, 24, 4))}}, path, grid=(2, 3, 4))
  same(params['encoder']['pos_embed'], posemb.resample(table, (4, 4, 4), (2, 3, 4)))


def test_a_converted_file_tells_its_grid(tmp_path):
  encoder = dict(width=4, depth=1, heads=1, patch=(2, 2), grid=(2, 8), pos='learned')
  written = {'pos_embed': np.random.default_rng(0).normal(size=(1, 17, 4)).astype(np.float32)}
  bundle.write(tmp_path / 'ours.safetensors', bundle.Bundle(encoder=encoder, params={'encoder': written}))
  same_size, report = load_into({'encoder': {'pos_embed': jnp.zeros((1, 17, 4))}}, tmp_path / 'ours.safetensors')
  jax.tree.map(same, same_size['encoder'], written)
  assert not report.resized
  square = {'encoder': {'pos_embed': jnp.zeros((1, 10, 4))}}
  params, _ = load_into(square, tmp_path / 'ours.safetensors')
  same(params['encoder']['pos_embed'], posemb.resample(written['pos_embed'], (2, 8), (3, 3), 1))


def test_a_table_with_a_class_row_does_not_become_one_without(mesh, run):
  with pytest.raises(CheckpointError, match='as many class rows'):
    load_into(tree_of(mesh, 0, rows=16), run)
