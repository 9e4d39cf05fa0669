import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.models import initial, tabular
from mim_jax.ops import attention

TABLE = jnp.array([[1.0, 2.0, 0.3, -1.0], [0.0, 0.0, 1.5, 0.2]])


@pytest.fixture(scope='module')
def encoder():
  net = tabular.TabularEncoder(lengths=(2, 3), continuous=2, width=16, depth=2, heads=2)
  params = jax.jit(net.init)(jax.random.key(0), TABLE)['params']
  return net, jax.tree.map(lambda x: 3 * x, params), jax.jit(lambda p, *args: net.apply({'params': p}, *args))


def test_a_hidden_token_is_seen_by_itself_alone():
  hidden = jnp.array([[False, True, False], [True, True, True]])
  seen = tabular.hide_from_others(hidden)[:, 0] == 0
  np.testing.assert_array_equal(seen[0], [[1, 0, 1], [1, 1, 1], [1, 0, 1]])
  np.testing.assert_array_equal(seen[1], np.eye(3))
  assert set(np.unique(tabular.hide_from_others(hidden))) == {np.float32(attention.HIDDEN), 0}


def test_the_embedding_of_a_hidden_column_reaches_its_own_token_only(encoder):
  _, params, run = encoder
  hidden = jnp.array([[False, True, False, False]] * 2)
  before = run(params, TABLE, hidden)

  def moved(row):
    other = params | {'column_embedding': params['column_embedding'].at[row].add(jnp.arange(16.0))}
    return np.abs(run(other, TABLE, hidden) - before).max((0, 2)) > 1e-6

  assert moved(2).tolist() == [False, False, True, False, False]  # row 0 is the class token
  assert moved(3).all()


def test_nothing_hidden_is_as_no_mask(encoder):
  _, params, run = encoder
  np.testing.assert_allclose(run(params, TABLE), run(params, TABLE, jnp.zeros(TABLE.shape, bool)), atol=1e-6)


def test_categories_have_rows_of_their_own_in_the_shared_embedding(encoder):
  net, params, run = encoder
  assert net.offsets == (0, 2)
  before = run(params, TABLE)
  only_row_0 = params['cat_embedding'].at[4].add(jnp.arange(16.0))  # column 1, code 2
  other = params | {'cat_embedding': only_row_0}
  after = run(other, TABLE)
  assert np.abs(after[0] - before[0]).max() > 1e-3
  np.testing.assert_array_equal(after[1], before[1])


def test_image_reaches_every_table_token():
  net = tabular.MultimodalEncoder(width=16, depth=1, heads=2)
  tokens, context = jax.random.normal(jax.random.key(0), (2, 5, 16)), jax.random.normal(jax.random.key(1), (2, 4, 16))
  params = jax.jit(net.init)(jax.random.key(2), tokens, context)
  run = jax.jit(net.apply)
  moved = np.abs(run(params, tokens, context.at[0].add(jnp.arange(16.0))) - run(params, tokens, context)).max(2)
  assert (moved[0] > 1e-4).all() and not moved[1].any()
  assert set(params['params']['blocks']['cross_attn']['kv']) == {'kernel'}  # without bias, the query has one
  assert set(params['params']['blocks']['cross_attn']['q']) == {'kernel', 'bias'}


def test_layers_start_as_in_other_codebases():
  params = {'a': {'kernel': jnp.zeros((400, 100)), 'bias': jnp.zeros(100)}, 'norm': {'scale': jnp.ones(3)}}
  normal = initial.normal_kernels(jax.random.key(0), params, 0.1)
  assert np.std(normal['a']['kernel']) == pytest.approx(0.1, rel=0.02)
  assert not np.any(normal['a']['bias']) and (normal['norm']['scale'] == 1).all()
  dense = initial.torch_dense(jax.random.key(0), {'x': params['a']})['x']
  for value in dense.values():
    assert 0.045 < np.abs(value).max() <= 0.05  # 1 / sqrt(400)
    assert np.std(value) == pytest.approx(0.05 / 3**0.5, rel=0.15)
