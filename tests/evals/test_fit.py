"""Training on an encoder: what learns, what does not, and that it is the step that was asked for."""

import eval_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.errors import ConfigError, UserError
from mim_jax.evals import attentive, features, finetune, fit, suite

PLAIN = {**cases.SHORT, 'train': 'a', 'test': 'b', 'mixup': 0.0, 'cutmix': 0.0, 'smoothing': 0.0, 'drop_path': 0.0}


def settings(**given):
  return suite.settings('finetune', {**PLAIN, **given})


@pytest.fixture
def data():
  return cases.Data(cases.mesh_of(1), {'a': cases.described(97, 0), 'b': cases.described(53, 1)})


def fitted(data, cfg, encoder=None):
  """A whole training and the figures that came of it."""
  encoder = encoder or cases.token_encoder()
  given = data.open_batches('a', '', cfg.train_batch, ('image', 'label'), shuffle=cfg.seed)
  one = fit.Fit(encoder, finetune.task_of(cfg, cases.CLASSES), cfg, data.mesh, 97 // cfg.train_batch, next(given))
  return one, one.train(given, data.context())


def test_only_what_the_prediction_depends_on_is_trained(data):
  one, _ = fitted(data, settings(epochs=2))
  assert set(one.state['params']) == {'encoder/embed', 'encoder/blocks', 'task'}
  assert set(one.state['params']['task']) == {'fc_norm', 'head'}


def test_used_follows_the_computation():
  def function(tree, x):
    unused = tree['c'] * 2  # noqa: F841
    return jax.lax.scan(lambda carry, w: (carry * w, None), x, tree['a'])[0] + tree['b']

  tree = {'c': jnp.ones(2), 'b': jnp.float32(1), 'a': jnp.ones(3), 'd': jnp.ones(1)}
  assert fit.used(function, tree, jnp.float32(2)) == ['a', 'b']


def test_the_encoder_that_is_judged_stays_as_it_was(data):
  encoder = cases.token_encoder()
  before = jax.tree.map(np.array, encoder.variables)
  one, _ = fitted(data, settings(epochs=2), encoder)
  jax.tree.map(np.testing.assert_array_equal, before, encoder.variables)  # nor were its arrays given away
  assert np.any(one.state['params']['encoder/embed'] != before['params']['encoder']['embed'])


def test_a_frozen_encoder_has_no_gradient(data):
  one, _ = fitted(data, settings(epochs=2, frozen=True, drop_path=0.5))
  assert set(one.state['params']) == {'task'} and set(one.state['opt']['mu']) == {'task'}


def test_the_update_is_the_published_rule(data):
  """One step of SGD with layer-wise rates, by hand."""
  cfg = settings(optimizer='sgd', epochs=1, warmup_epochs=0, train_batch=96, wd=0.0, head_std=0.1, base_lr=1.0)
  encoder = cases.token_encoder()
  batch = next(data.open_batches('a', '', 96, ('image', 'label'), shuffle=0))
  one = fit.Fit(encoder, finetune.task_of(cfg, cases.CLASSES), cfg, data.mesh, 1, batch)
  head = jax.tree.map(np.array, one.state['params']['task'])
  one.train(iter([]), data.context())

  def loss(params, head):
    tokens = cases._nine_tokens({'params': {'encoder': params}}, batch, layers=True)['layers'][-1].mean(axis=1)
    mean, var = tokens.mean(-1, keepdims=True), tokens.var(-1, keepdims=True)
    x = (tokens - mean) / jnp.sqrt(var + 1e-6) * head['fc_norm']['scale'] + head['fc_norm']['bias']
    log_probs = jax.nn.log_softmax(x @ head['head']['kernel'] + head['head']['bias'])
    return -jnp.mean(log_probs[jnp.arange(96), batch['label']])

  params = encoder.variables['params']['encoder']
  grads = jax.grad(loss, argnums=(0, 1))(params, head)
  rate = 96 / 256
  np.testing.assert_allclose(
    one.state['params']['encoder/embed'], params['embed'] - rate * grads[0]['embed'], atol=1e-6
  )
  jax.tree.map(
    lambda new, old, g: np.testing.assert_allclose(new, old - rate * g, atol=1e-6),
    one.state['params']['task'],
    head,
    grads[1],
  )


def test_accumulation_is_the_large_batch(data):
  (one, loss), (two, same) = (fitted(data, settings(accumulate=k, drop_path=0.4, epochs=2)) for k in (1, 4))
  assert loss == pytest.approx(same, rel=1e-5)
  # Adam turns gradients that are nearly nothing into whole steps, so weights agree less than losses do.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), one.state['params'], two.state['params'])


def test_the_average_is_judged_where_one_is_kept(data):
  scale = {}
  for ema in (0.0, 0.99999):  # nearly the initial head, whose scores are nearly 0
    one, loss = fitted(data, settings(epochs=12, ema=ema))
    batches = data.open_batches('b', '', 16, ('image', 'label'))
    scale[ema] = np.abs(one.test(batches, data.context())['prediction']).max()
    assert loss < 0.5
  assert scale[0.99999] < 0.01 < 1 < scale[0.0]


def test_a_training_that_diverges_says_so(data):
  with pytest.raises(UserError, match='not finite in 10 steps in a row.*lower base_lr'):
    finetune.run(cases.token_encoder(), settings(base_lr=1e38, optimizer='sgd', epochs=8), data.context())


def test_stop_is_polled_between_steps(data):
  answers = iter([False, False, True])
  with pytest.raises(features.Interrupted):
    finetune.run(cases.token_encoder(), settings(), data.context(stop=lambda: next(answers)))


@pytest.mark.parametrize(
  ('encoder', 'kind', 'given', 'message'),
  [
    (features.raw_pixels(), finetune, {'drop_path': 0.0}, 'no tokens'),
    (None, attentive, {'accumulate': 2}, 'statistics over the whole batch'),
    (None, finetune, {'train_batch': 98}, 'fewer than train_batch 98'),
  ],
)
def test_what_cannot_be_trained_says_why(data, encoder, kind, given, message):
  cfg = suite.settings(kind.__name__.split('.')[-1], {**cases.SHORT, 'train': 'a', 'test': 'b', **given})
  with pytest.raises((ConfigError, UserError), match=message):
    kind.run(encoder or cases.token_encoder(), cfg, data.context())
