"""DALL-E's encoder: shapes, the residual block by hand, and its official names."""

import pickle
import sys
import types
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.models import dvae
from mim_jax.official import cae, names


@pytest.fixture(scope='module')
def tower():
  encoder = dvae.Encoder(width=8, codes=19)
  image = jax.random.uniform(jax.random.key(1), (2, 16, 24, 3))
  return encoder, encoder.init(jax.random.key(0), image)['params'], image


def test_a_code_for_every_block_of_eight_pixels_in_raster_order(tower):
  encoder, params, image = tower
  ids = dvae.codes(encoder, params, image)
  assert ids.shape == (2, 6) and ids.dtype == jnp.int32
  logits = encoder.apply({'params': params}, image)
  assert logits.dtype == jnp.float32
  np.testing.assert_array_equal(ids[1, 4], np.argmax(logits[1, 1, 1]))


def test_residual_block_by_hand():
  block = dvae.ResBlock(8, gain=0.25)
  x = jax.random.normal(jax.random.key(0), (1, 4, 4, 4))
  params = block.init(jax.random.key(1), x)['params']

  def conv(x, w):
    """One output place after another."""
    side = w['kernel'].shape[0]
    x = np.pad(x, ((side // 2,) * 2, (side // 2,) * 2, (0, 0)))
    return np.array(
      [
        [np.einsum('yxc,yxcd->d', x[i : i + side, j : j + side], w['kernel']) + w['bias'] for j in range(4)]
        for i in range(4)
      ]
    )

  y = np.asarray(x[0])
  for i in range(1, 5):
    y = conv(np.maximum(y, 0), params[f'conv_{i}'])
  expected = conv(np.asarray(x[0]), params['id_path']) + 0.25 * y
  np.testing.assert_allclose(block.apply({'params': params}, x)[0], expected, atol=1e-5)
  assert params['conv_1']['kernel'].shape == (3, 3, 4, 2) and params['conv_4']['kernel'].shape == (1, 1, 2, 8)


def test_published_size():
  """Shapes of the published encoder: 8192 codes, widths 256 to 2048, residual branches weighted 1 / 64."""
  image = jax.ShapeDtypeStruct((1, 112, 112, 3), jnp.float32)
  params = jax.eval_shape(dvae.Encoder().init, jax.random.key(0), image)['params']
  assert params['input']['kernel'].shape == (7, 7, 3, 256)
  assert params['output']['kernel'].shape == (1, 1, 2048, 8192)
  assert sum(np.prod(x.shape) for x in jax.tree.leaves(params)) == 53_786_240
  logits = jax.eval_shape(lambda p, x: dvae.Encoder().apply({'params': p}, x), params, image)
  assert logits.shape == (1, 14, 14, 8192)


def test_official_names_go_both_ways(tower, tmp_path):
  encoder, params, image = tower
  weights = names.export(jax.tree.map(np.asarray, params), cae.dvae())
  assert weights['blocks.group_2.block_1.id_path.w'].shape == (16, 8, 1, 1)
  assert 'blocks.group_2.block_2.id_path.w' not in weights and 'blocks.output.conv.b' in weights
  cae.files.write(tmp_path / 'encoder.safetensors', weights)
  assert cae.main([str(tmp_path / 'encoder.safetensors'), str(tmp_path / 'tokenizer.safetensors')]) == 0
  found = cae.files.read(tmp_path / 'tokenizer.safetensors')
  assert {f'tokenizer/{part}/{kind}' for part in params for kind in params[part] if kind in ('kernel', 'bias')} <= set(
    found
  )
  back = cae.load_tokenizer(tmp_path / 'encoder.safetensors')
  jax.tree.map(np.testing.assert_array_equal, params, back)


def module_file(path, weights, monkeypatch):
  """A file as `torch.save(module)` writes it, modules nested as the names of `weights` say; without PyTorch."""
  torch, utils, own = (types.ModuleType(name) for name in ('torch', 'torch._utils', 'dall_e_like'))

  def rebuild(*args):
    raise AssertionError('nothing that is pickled may run')

  rebuild.__module__, rebuild.__qualname__, rebuild.__name__ = (
    'torch._utils',
    '_rebuild_tensor_v2',
    '_rebuild_tensor_v2',
  )
  utils._rebuild_tensor_v2 = rebuild
  torch.FloatStorage = type('FloatStorage', (), {'__module__': 'torch'})
  own.Module = type('Module', (), {'__module__': 'dall_e_like'})
  for module in (torch, utils, own):
    monkeypatch.setitem(sys.modules, module.__name__, module)

  class Storage:
    def __init__(self, key, count):
      self.key, self.count = key, count

  class Tensor:
    def __init__(self, key, value):
      self.args = Storage(key, value.size), 0, value.shape, tuple(s // 4 for s in value.strides), False, {}

    def __reduce__(self):
      return rebuild, self.args

  class Pickler(pickle.Pickler):
    def persistent_id(self, item):
      return ('storage', torch.FloatStorage, item.key, 'cpu', item.count) if isinstance(item, Storage) else None

  def module():
    made = own.Module()
    made.__dict__ = {'_parameters': {}, '_buffers': {}, '_modules': {}, 'training': False}
    return made

  root = module()
  with zipfile.ZipFile(path, 'w') as archive:
    for i, (name, value) in enumerate(weights.items()):
      node, (*parents, last) = root, name.split('.')
      for part in parents:
        node = node._modules.setdefault(part, module())
      node._parameters[last] = Tensor(str(i), value)
      archive.writestr(f'encoder/data/{i}', value.tobytes())
    with archive.open('encoder/data.pkl', 'w') as file:
      Pickler(file, 2).dump(root)


def test_the_published_pickle_of_the_whole_module_is_read_and_not_run(tower, tmp_path, monkeypatch):
  _, params, _ = tower
  weights = names.export(jax.tree.map(np.asarray, params), cae.dvae())
  module_file(tmp_path / 'encoder.pkl', weights, monkeypatch)
  back = cae.load_tokenizer(tmp_path / 'encoder.pkl')
  jax.tree.map(np.testing.assert_array_equal, params, back)
