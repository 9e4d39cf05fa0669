"""Fine-tuning on questions: what only both sides tell is learned, and figures are split as the data says."""

import eval_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import config
from mim_jax.data.feeds import Feeds
from mim_jax.errors import ConfigError
from mim_jax.evals import answers, features, fit, suite


def encode(variables, batch, **options):
  """Image and word as two codes each, through a matrix that is trained."""
  code = (batch['image'][:, 0, 0, 0] > 0.5).astype(jnp.float32)
  word = batch['text_ids'][:, 1].astype(jnp.float32)
  both = jnp.stack([code, 1 - code, word, 1 - word], axis=-1) @ variables['params']['fusion']['kernel']
  return {'tokens': both[:, None], 'cls': both, 'match': both[:, 0]}


def encoder(seed=0):
  kernel = jnp.asarray(np.random.default_rng(seed).normal(size=(4, 16)), jnp.float32)
  return features.Encoder('trained', None, {'params': {'fusion': {'kernel': kernel}}, 'state': {}}, encode)


@pytest.fixture
def context(tmp_path, rng):
  mesh = cases.mesh_of(2)
  feeds = Feeds(config.base().data, mesh, 0)
  for name, count in (('train', 400), ('test', 101)):
    code, word = rng.integers(2, size=(2, count))
    np.savez(
      tmp_path / f'{name}.npz',
      image=(255 * code).astype(np.uint8)[:, None, None, None].repeat(2, 1).repeat(2, 2).repeat(3, 3),
      text_ids=np.stack([np.ones(count), word], axis=1).astype(np.int32),
      text_mask=np.ones((count, 2), np.int32),
      label=(code ^ word) + 2 * (rng.random(count) < 0),  # neither side alone tells it
      closed=word == 1,
    )
  return features.Context(mesh, feeds.source, feeds.evaluation, say=lambda line: None)


def settings(tmp_path, **given):
  return suite.settings(
    'answers',
    {
      'train': f'arrays:{tmp_path}/train.npz',
      'test': f'arrays:{tmp_path}/test.npz',
      'transforms': 'to_float',
      'label': 'label',
      'batch_size': 16,
      'train_batch': 20,
      'epochs': 20,
      'base_lr': 0.05,
      'head_mult': 2.0,
      **given,
    },
  )


@pytest.mark.parametrize('loss', ['sigmoid', 'softmax'])
def test_learns_what_only_both_sides_tell(context, tmp_path, loss):
  found = answers.run(encoder(), settings(tmp_path, loss=loss, closed='closed'), context)
  assert found['top1'] == found['closed'] == found['open'] == 1.0
  assert set(answers.run(encoder(), settings(tmp_path, epochs=2, loss=loss), context)) == {'top1', 'train_loss'}


def test_rates_follow_the_part(context, tmp_path):
  task = answers.task_of(settings(tmp_path), 2)

  def after(**given):
    cfg = answers._with_closed(settings(tmp_path, epochs=2, **given))
    fitted, _ = fit.trained(encoder(), task, cfg, context)
    return fitted.state['params']

  start = encoder().variables['params']['fusion']['kernel']
  np.testing.assert_array_equal(after(fusion_mult=0.0, wd=0.0)['fusion/kernel'], start)
  assert np.any(after()['fusion/kernel'] != start)
  with pytest.raises(ConfigError, match='matches no parameter'):
    after(fusion='^nothing/')


def test_sigmoid_loss_is_summed_over_the_answers(tmp_path):
  task = answers.task_of(settings(tmp_path), 3)
  logits = jax.random.normal(jax.random.key(0), (4, 3))
  labels = jnp.array([0, 2, 1, 1])
  p = jax.nn.sigmoid(logits)
  each = -jnp.log(jnp.where(jax.nn.one_hot(labels, 3) == 1, p, 1 - p)).sum(-1)
  np.testing.assert_allclose(task.loss(logits, labels, {}), each.mean(), rtol=1e-5)


def test_what_does_not_fit_is_said(tmp_path):
  with pytest.raises(ConfigError, match="'sigmoid'"):
    answers.check(settings(tmp_path, loss='bce'), frozenset())
