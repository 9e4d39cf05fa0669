import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from mim_jax.errors import ConfigError
from mim_jax.parallel import mesh as meshes
from mim_jax.parallel import rules


def mesh_of(data=1, fsdp=1, tensor=1):
  devices = jax.devices()[: data * fsdp * tensor]
  return meshes.make_mesh({'data': data, 'fsdp': fsdp, 'tensor': tensor}, devices)


def array(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def vit(width=64, depth=4, heads=4):
  """Abstract encoder and decoder with the paths of the project."""

  def blocks(width, depth, heads):
    return {
      'norm1': {'scale': array(depth, width), 'bias': array(depth, width)},
      'attn': {
        'qkv': {
          'kernel': array(depth, width, 3, heads, width // heads),
          'bias': array(depth, 3, heads, width // heads),
        },
        'proj': {'kernel': array(depth, heads, width // heads, width), 'bias': array(depth, width)},
      },
      'mlp': {
        'fc1': {'kernel': array(depth, width, 4 * width), 'bias': array(depth, 4 * width)},
        'fc2': {'kernel': array(depth, 4 * width, width), 'bias': array(depth, width)},
      },
    }

  return {
    'encoder': {
      'patch_embed': {'kernel': array(192, width), 'bias': array(width)},
      'cls_token': array(1, 1, width),
      'blocks': blocks(width, depth, heads),
      'norm': {'scale': array(width), 'bias': array(width)},
    },
    'decoder': {'mask_token': array(1, 1, width), 'blocks': blocks(width // 2, 2, heads)},
  }


def specs(tree):
  return {name: sharding.spec for name, sharding in named(tree).items()}


def named(tree):
  return {rules.path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def test_tensor_rules_cut_heads_and_hidden_units():
  got = specs(rules.shardings(mesh_of(data=2, tensor=4), vit()))
  block = 'encoder/blocks/'
  assert got[block + 'attn/qkv/kernel'] == P(None, None, None, 'tensor')
  assert got[block + 'attn/qkv/bias'] == P(None, None, 'tensor')
  assert got[block + 'attn/proj/kernel'] == P(None, 'tensor')
  assert got[block + 'mlp/fc1/kernel'] == P(None, None, 'tensor')
  assert got[block + 'mlp/fc1/bias'] == P(None, 'tensor')
  assert got[block + 'mlp/fc2/kernel'] == P(None, 'tensor')
  whole = {name for name, spec in got.items() if spec == P()}
  assert whole == {
    name for name in got if not ('qkv' in name or 'fc1' in name or name.endswith(('proj/kernel', 'fc2/kernel')))
  }


def test_a_block_of_its_own_follows_the_same_rules():
  tree = {'attn': {'qkv': {'kernel': array(64, 3, 4, 16)}, 'proj': {'kernel': array(4, 16, 64)}}}
  got = specs(rules.shardings(mesh_of(tensor=2), tree))
  assert got == {'attn/qkv/kernel': P(None, None, 'tensor'), 'attn/proj/kernel': P('tensor')}


def test_fsdp_takes_the_largest_free_dimension_but_not_depth():
  tree = {
    'encoder': {'blocks': {'mlp': {'fc1': {'kernel': array(512, 64, 256)}}, 'odd': array(512, 63, 63)}},
    'decoder': {'kernel': array(512, 256), 'odd': array(1000, 63)},
    'small': array(127, 128),
    'prime': array(127, 131),
  }
  got = specs(rules.shardings(mesh_of(fsdp=4, tensor=2), tree))
  assert got['encoder/blocks/mlp/fc1/kernel'] == P(None, 'fsdp', 'tensor')
  assert got['encoder/blocks/odd'] == P('fsdp')  # nothing but depth can be cut
  assert got['decoder/kernel'] == P('fsdp')
  assert got['decoder/odd'] == P('fsdp')
  assert got['small'] == P()  # 2**14 - 128 entries
  assert got['prime'] == P()  # no dimension is divisible
  assert specs(rules.shardings(mesh_of(fsdp=4), tree, whole_below=0))['small'] == P(None, 'fsdp')


def test_axes_of_size_one_are_left_out():
  assert set(specs(rules.shardings(mesh_of(data=8), vit())).values()) == {P()}


def test_own_rules_come_first():
  own = (('decoder/.*attn', ()), ('fc1/kernel$', None), ('patch_embed/kernel', (('fsdp', 'tensor'), None)))
  got = specs(rules.shardings(mesh_of(fsdp=2, tensor=2), vit(), (*own, *rules.DEFAULT_RULES), whole_below=0))
  assert got['decoder/blocks/attn/qkv/kernel'] == P(None, 'fsdp')
  assert got['encoder/blocks/mlp/fc1/kernel'] == P()
  assert got['encoder/patch_embed/kernel'] == P(('fsdp', 'tensor'))
  assert got['encoder/blocks/attn/qkv/kernel'] == P(None, 'fsdp', None, 'tensor')


@pytest.mark.parametrize(
  'rule, message',
  [
    (('norm/scale', ('tensor', None)), r'encoder/norm/scale \[64\]'),
    (('norm/scale', 'tensor'), 'does not fit'),
    (('cls_token', ('model',)), "mesh axis 'model'; the mesh has data, fsdp, tensor"),
    (('norm/(scale', ('tensor',)), 'not a regular expression'),
  ],
)
def test_rules_that_cannot_hold(rule, message):
  with pytest.raises(ConfigError, match=message):
    rules.shardings(mesh_of(tensor=2), vit(), (rule, *rules.DEFAULT_RULES))


def test_heads_that_cannot_be_cut_are_named_and_the_advice_helps():
  tree, mesh = vit(width=48, heads=3), mesh_of(tensor=2)
  with pytest.raises(
    ConfigError, match=r'decoder/blocks/attn/proj/kernel \[2, 3, 8, 24\]: dimension 1 of size 3'
  ) as error:
    rules.shardings(mesh, tree)
  assert "config.rules = (('decoder/blocks/attn/', ()),)" in str(error.value)
  own = (('decoder/blocks/attn/', ()), ('encoder/blocks/attn/', ()))
  got = specs(rules.shardings(mesh, tree, (*own, *rules.DEFAULT_RULES)))
  assert got['encoder/blocks/attn/qkv/kernel'] == P()
  assert got['encoder/blocks/mlp/fc1/kernel'] == P(None, None, 'tensor')


def test_copies_lie_as_their_parameters():
  params, mesh = vit(), mesh_of(data=2, fsdp=2, tensor=2)
  placed = rules.shardings(mesh, params, whole_below=0)
  tree = {
    'opt': {'count': array(), 'mu': params, 'nu': params},
    'ema': params,
    'state': {'teacher': params['encoder'], 'queue': array(256, 64)},
  }
  got = named(rules.like_params(mesh, tree, params, placed))
  for name, sharding in named(placed).items():
    assert got[f'opt/mu/{name}'] == got[f'opt/nu/{name}'] == got[f'ema/{name}'] == sharding
    if name.startswith('encoder/'):
      assert got[name.replace('encoder', 'state/teacher')] == sharding
  assert got['opt/count'].spec == got['state/queue'].spec == P()


def test_same_end_of_path_and_shape_prefers_the_longer_match():
  mesh = mesh_of(fsdp=2)
  params = {'a': {'b': {'kernel': array(4, 4)}}, 'c': {'b': {'kernel': array(4, 4)}}}
  placed = rules.shardings(mesh, params, (('^c', None),), whole_below=0)
  got = specs(rules.like_params(mesh, {'mu': params}, params, placed))
  assert got == {'mu/a/b/kernel': P('fsdp'), 'mu/c/b/kernel': P()}


def test_a_sharded_product_equals_the_whole_one():
  mesh = mesh_of(data=2, fsdp=2, tensor=2)
  key = jax.random.key(0)
  kernel = {'mlp': {'fc1': {'kernel': jax.random.normal(key, (32, 64))}}}
  x = jax.random.normal(key, (8, 32))
  apply = jax.jit(lambda kernel, x: jnp.tanh(x @ kernel['mlp']['fc1']['kernel']).reshape(4, 2, 64).sum(1))
  placed = jax.device_put(kernel, rules.shardings(mesh, kernel, whole_below=0))
  assert not placed['mlp']['fc1']['kernel'].is_fully_replicated
  got = apply(placed, jax.device_put(x, meshes.batch_sharding(mesh)))
  assert jnp.allclose(got, apply(kernel, x), atol=1e-6)
