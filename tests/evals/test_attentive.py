"""The attentive probe against its formula, and on a case with a known answer."""

import eval_cases as cases
import jax
import numpy as np
import pytest

from mim_jax.errors import ConfigError
from mim_jax.evals import attentive, linear, suite


def settings(**given):
  return suite.settings('attentive', {**cases.SHORT, 'train': 'a', 'test': 'b', 'base_lr': 0.4, 'epochs': 12, **given})


@pytest.mark.parametrize('count', [1, 8])
def test_a_case_with_a_known_answer(count):
  data = cases.Data(cases.mesh_of(count), {'a': cases.images(161, 0, 0.2), 'b': cases.images(83, 1, 0.2)})
  figures = attentive.run(cases.token_encoder(), settings(), data.context())
  assert (figures['top1'], figures['class_mean']) == (1.0, 1.0)


def test_the_query_is_cross_attention_over_all_tokens(rng):
  tokens, cls = rng.normal(size=(2, 5, 8)).astype(np.float32), rng.normal(size=(2, 8)).astype(np.float32)
  module = attentive.Query(2)
  params = module.init(jax.random.key(0), {'tokens': tokens, 'cls': cls})['params']
  params = jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), params)
  found = module.apply({'params': params}, {'tokens': tokens, 'cls': cls})

  def norm(x, p):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p['scale'] + p['bias']

  def split(x, p):  # [N, D] -> [N, H, d]
    return np.einsum('nd,dhe->nhe', x, p['kernel']) + p['bias']

  p, every = jax.tree.map(np.asarray, params), np.concatenate([cls[:, None], tokens], axis=1)
  for i in range(2):
    q = split(norm(p['query'][0], p['norm_q']), p['attn']['query'])
    k, v = (split(norm(every[i], p[f'norm_{n}']), p['attn'][name]) for n, name in (('k', 'key'), ('v', 'value')))
    scores = np.einsum('qhe,nhe->hqn', q, k) / 2.0  # the root of 4 dimensions per head
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    y = np.einsum('hqn,nhe->qhe', weights, v)
    expected = np.einsum('qhe,hed->qd', y, p['attn']['proj']['kernel']) + p['attn']['proj']['bias']
    np.testing.assert_allclose(found[i], expected[0], atol=1e-5)


def test_statistics_run_while_training_and_rest_while_testing(rng):
  task = attentive.task_of(settings(heads=2), 3)
  encoded = {'tokens': rng.normal(size=(6, 5, 8)).astype(np.float32)}
  params = task.init(jax.random.key(0), encoded, {})
  state = task.state(params)
  scores, out = task.predict(params, state, encoded, {}, True)
  x = np.asarray(out['pooled'])
  normed = (x - x.mean(0)) / np.sqrt(x.var(0) + linear.NORM_EPS)
  np.testing.assert_allclose(scores, normed @ params['head']['kernel'] + params['head']['bias'], atol=1e-5)
  after = task.after_step(state, out)
  np.testing.assert_allclose(after['mean'], 0.1 * x.mean(0), atol=1e-6)
  np.testing.assert_allclose(after['var'], 0.9 + 0.1 * x.var(0, ddof=1), atol=1e-6)
  scores, _ = task.predict(params, after, encoded, {}, False)
  normed = (x - after['mean']) / np.sqrt(after['var'] + linear.NORM_EPS)
  np.testing.assert_allclose(scores, normed @ params['head']['kernel'], atol=1e-5)


def test_heads_that_do_not_divide_the_width_are_refused():
  data = cases.Data(cases.mesh_of(1), {'a': cases.images(64, 0), 'b': cases.images(20, 1)})
  with pytest.raises(ConfigError, match='heads is 3'):
    attentive.run(cases.token_encoder(), settings(heads=3), data.context())
