"""BERT-family networks: reference numbers, padding, positions, gradients, dropout, and that they learn a grammar."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mim_jax import parity
from mim_jax.errors import ConfigError
from mim_jax.models import initial, text
from mim_jax.ops import losses

IDS = jnp.array([[2, 7, 8, 9, 3, 0, 0], [2, 5, 3, 0, 0, 0, 0]])
R_IDS = jnp.array([[0, 7, 8, 9, 2, 1, 1], [0, 5, 2, 1, 1, 1, 1]])


def make(kind='bert', **options):
  encoder = text.encoder(kind, '32/2/4', 20, 24, 2.0, **options)
  ids = IDS if kind == 'bert' else R_IDS
  mask = (ids != encoder.pad).astype(jnp.int32)
  return encoder, encoder.init(jax.random.key(0), ids, mask), ids, mask


def test_reference_numbers(goldens):
  rows = parity.run(parity.read(goldens / 'text_block.safetensors'))
  assert len(rows) > 30
  assert all(row.ok for row in rows), parity.table([row for row in rows if not row.ok])


def test_ids_of_padding_do_not_reach_real_words():
  encoder, params, ids, mask = make()
  before = encoder.apply(params, ids, mask)
  after = encoder.apply(params, jnp.where(mask == 0, 11, ids), mask)
  np.testing.assert_array_equal(before[mask == 1], after[mask == 1])


@pytest.mark.parametrize('kind', ['bert', 'roberta'])
def test_one_more_column_of_padding_changes_nothing(kind):
  encoder, params, ids, mask = make(kind)
  wider = [jnp.pad(x, ((0, 0), (0, 1)), constant_values=value) for x, value in ((ids, encoder.pad), (mask, 0))]
  before, after = encoder.apply(params, ids, mask), encoder.apply(params, *wider)[:, :-1]
  np.testing.assert_allclose(before[mask == 1], after[mask == 1], atol=2e-6)


def test_positions_of_roberta_start_behind_that_of_padding():
  assert text.position_ids(R_IDS, 1, True).tolist() == [[2, 3, 4, 5, 6, 1, 1], [2, 3, 4, 1, 1, 1, 1]]
  assert text.position_ids(IDS, 0, False).tolist() == [list(range(7))] * 2


@pytest.mark.parametrize('kind', ['bert', 'roberta'])
def test_padding_learns_nothing_by_look_up(kind):
  encoder, params, ids, mask = make(kind)
  grads = jax.grad(lambda p: jnp.sum(encoder.apply(p, ids, mask) ** 3))(params)['params']['embed']
  assert not np.any(grads['word'][encoder.pad]) and np.any(grads['word'][7])
  assert np.any(grads['position'][encoder.pad]) == (kind == 'bert')
  assert kind == 'bert' or not np.any(grads['position'][0])  # nor does anything read row 0
  assert not np.any(params['params']['embed']['word'][encoder.pad])


def test_a_tied_head_still_teaches_the_row_of_padding():
  encoder, params, ids, mask = make()
  head = text.MaskedWords(20)
  own = head.init(jax.random.key(1), jnp.zeros((1, 2, 32)), params['params']['embed']['word'])
  assert 'decoder' not in own['params']

  def loss(p):
    logits = head.apply(own, encoder.apply(p, ids, mask), p['params']['embed']['word'])
    return losses.token_cross_entropy(logits, ids, ids.size)

  assert np.any(jax.grad(loss)(params)['params']['embed']['word'][0])


def test_scanned_equals_unrolled_and_remat():
  encoder, params, ids, mask = make()
  value = encoder.apply(params, ids, mask)
  for options in ({'scan': False}, {'remat': 'full'}):
    np.testing.assert_allclose(make(**options)[0].apply(params, ids, mask), value, atol=1e-6)


def test_context_of_a_cross_layer_is_masked_by_its_own_mask():
  layer = text.Layer(4, 64, cross=True)
  x, context = jax.random.normal(jax.random.key(0), (2, 3, 32)), jax.random.normal(jax.random.key(1), (2, 5, 48))
  visible = text.attention.mask_out(jnp.array([[1, 1, 1, 0, 0]] * 2))
  params = layer.init(jax.random.key(2), x, None, None, context, visible)
  seen = lambda c: layer.apply(params, x, None, None, c, visible)[0]
  np.testing.assert_array_equal(seen(context), seen(context.at[:, 3:].set(9.0)))
  assert np.any(seen(context) != seen(context.at[:, :3].set(9.0)))


def test_dropout_belongs_to_the_example():
  encoder, params, ids, mask = make(dropout=0.3)
  keys = jax.random.split(jax.random.key(5), 2)
  both = encoder.apply(params, ids, mask, drop=keys)
  np.testing.assert_allclose(both[1:], encoder.apply(params, ids[1:], mask[1:], drop=keys[1:]), atol=1e-6)
  assert np.abs(both - encoder.apply(params, ids, mask)).max() > 0.1
  assert np.any(both != encoder.apply(params, ids, mask, drop=jax.random.split(jax.random.key(6), 2)))


def test_bfloat16_keeps_norms_and_logits_in_float32():
  encoder, params, ids, mask = make()
  half = encoder.clone(dtype='bfloat16').apply(params, ids, mask)
  assert half.dtype == jnp.bfloat16
  np.testing.assert_allclose(half.astype(jnp.float32), encoder.apply(params, ids, mask), atol=0.1)
  head = text.MaskedWords(20, dtype='bfloat16')
  assert head.apply(head.init(jax.random.key(0), half), half).dtype == jnp.float32


def test_start_of_bert():
  encoder = text.encoder('bert', '128/2/4', 500, 64)
  params = encoder.init(jax.random.key(0), IDS, IDS)['params']
  params = initial.normal_kernels(jax.random.key(1), params)
  for leaf in (
    params['embed']['word'][1:],
    params['blocks']['attn']['query']['kernel'],
    params['blocks']['mlp']['fc2']['kernel'],
  ):
    assert abs(np.std(leaf) - 0.02) < 0.001 and np.abs(leaf).max() > 0.06  # not truncated


def test_what_is_wrong_is_said():
  with pytest.raises(ConfigError, match="did you mean 'roberta'"):
    text.encoder('robberta', 'B', 10, 10)
  encoder = text.encoder('roberta', '32/1/4', 20, 8)
  with pytest.raises(ValueError, match='7 tokens, the position table has room for 6'):
    encoder.init(jax.random.key(0), R_IDS, R_IDS)


def test_token_losses_count_what_the_whole_step_has():
  logits, labels = (
    jax.random.normal(jax.random.key(0), (4, 5, 7)),
    jnp.full((4, 5), -100).at[0, 1].set(3).at[2, 4].set(0),
  )
  whole = losses.token_cross_entropy(logits, labels, 2)
  parts = [losses.token_cross_entropy(logits[i::2], labels[i::2], 1) for i in range(2)]
  np.testing.assert_allclose(whole, sum(parts) / 2, rtol=1e-6)
  log_probs = jax.nn.log_softmax(logits)
  np.testing.assert_allclose(whole, -(log_probs[0, 1, 3] + log_probs[2, 4, 0]) / 2, rtol=1e-6)
  assert losses.token_cross_entropy(logits, jnp.full((4, 5), -100), 1) == 0
  assert losses.token_accuracy(jax.nn.one_hot(jnp.maximum(labels, 0), 7), labels, 2) == 1


@pytest.mark.slow
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_learns_a_grammar_in_which_each_word_follows_from_the_one_before(seed):
  """Masked words named above 0.8 after 500 steps; always naming the most frequent word reaches about 0.02."""
  follow = jax.random.permutation(jax.random.key(7), 50)
  encoder, head = text.encoder('bert', '64/2/4', 53, 16), text.MaskedWords(53)
  keys = jax.random.split(jax.random.key(seed), 3)
  mask = jnp.ones((128, 16), jnp.int32)
  params = {
    'text': encoder.init(keys[0], mask, mask)['params'],
    'words': head.init(keys[1], jnp.zeros((1, 1, 64)))['params'],
  }
  params = initial.normal_kernels(keys[2], params)
  tx = optax.adam(optax.warmup_cosine_decay_schedule(0.0, 3e-3, 50, 500))

  def sample(key):
    keys = jax.random.split(key)
    first = jax.random.randint(keys[0], (128,), 0, 50)
    words = jax.lax.scan(lambda w, _: (follow[w], w), first, length=16)[1].T + 3
    hidden = jax.random.uniform(keys[1], words.shape) < 0.15
    return jnp.where(hidden, 2, words), jnp.where(hidden, words, -100)

  def forward(params, ids, labels):
    logits = head.apply({'params': params['words']}, encoder.apply({'params': params['text']}, ids, mask))
    count = jnp.maximum(jnp.sum(labels >= 0), 1)
    return losses.token_cross_entropy(logits, labels, count), losses.token_accuracy(logits, labels, count)

  @jax.jit
  def step(carry, i):
    params, opt = carry
    grads = jax.grad(lambda p: forward(p, *sample(jax.random.fold_in(jax.random.key(100 + seed), i)))[0])(params)
    updates, opt = tx.update(grads, opt)
    return (optax.apply_updates(params, updates), opt), None

  (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(500))
  ids, labels = sample(jax.random.key(999))
  accuracy = forward(params, ids, labels)[1]
  unigram = jnp.bincount(jnp.where(labels >= 0, labels, 53).ravel(), length=53).max() / jnp.sum(labels >= 0)
  assert unigram < 0.06
  assert accuracy > 0.8
