"""Retrieval by scores of pairs: recall on known scores, without and with training."""

import eval_cases as cases
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import config
from mim_jax.data.feeds import Feeds
from mim_jax.errors import ConfigError
from mim_jax.evals import features, retrieval, suite

COUNT = 23


def encode(variables, batch, **options):
  """A pair matches the better the closer image and word are, or the worse: by the sign of one parameter."""
  distance = jnp.abs(batch['image'][:, 0, 0, 0] * 255 - batch['text_ids'][:, 0])
  match = -variables['params']['fusion']['kernel'][0] * distance / 10
  return {'tokens': match[:, None, None], 'cls': match[:, None], 'match': match}


def encoder(sign):
  return features.Encoder('trained', None, {'params': {'fusion': {'kernel': jnp.full(1, sign)}}, 'state': {}}, encode)


@pytest.fixture(params=[1, 8])
def context(request, tmp_path):
  mesh = cases.mesh_of(request.param)
  feeds = Feeds(config.base().data, mesh, 0)
  codes = np.arange(COUNT)
  np.savez(
    tmp_path / 'pairs.npz',
    image=codes.astype(np.uint8)[:, None, None, None].repeat(2, 1).repeat(2, 2).repeat(3, 3),
    text_ids=codes[:, None].astype(np.int32),
    text_mask=np.ones((COUNT, 1), np.int32),
  )
  return features.Context(mesh, feeds.source, feeds.evaluation, say=lambda line: None)


def settings(tmp_path, **given):
  source = f'arrays:{tmp_path}/pairs.npz'
  own = {'train': source, 'test': source, 'transforms': 'to_float', 'batch_size': 8, 'pairs': 50, 'train_batch': 16}
  return suite.settings('retrieval', {**own, **given})


def test_recall_of_known_scores():
  scores = np.array([[3.0, 2, 1], [5, 4, 6], [7, 8, 9]])
  found = retrieval.figures(scores)
  assert found['to_text/r1'] == pytest.approx(2 / 3) and found['to_image/r1'] == pytest.approx(1 / 3)
  assert found['to_text/r5'] == found['to_image/r10'] == 1.0
  assert found['top1'] == pytest.approx(0.5)


def test_scores_of_pre_training(context, tmp_path):
  found = retrieval.run(encoder(1.0), settings(tmp_path), context)
  assert found['top1'] == found['to_text/r1'] == found['to_image/r1'] == 1.0
  blind = retrieval.run(encoder(0.0), settings(tmp_path), context)  # all equal: the first comes first
  assert blind['to_text/r5'] == pytest.approx(5 / COUNT)
  part = retrieval.run(encoder(0.0), settings(tmp_path, count=10), context)
  assert part['to_text/r5'] == pytest.approx(0.5)


def test_training_turns_wrong_scores_right(context, tmp_path):
  assert retrieval.run(encoder(-0.1), settings(tmp_path), context)['top1'] < 0.05
  tuned = settings(tmp_path, epochs=40, base_lr=0.5, negatives=3, wd=0.0)
  assert retrieval.run(encoder(-0.1), tuned, context)['top1'] == 1.0


def test_what_does_not_fit_is_said(context, tmp_path):
  with pytest.raises(ConfigError, match='negatives is 16'):
    retrieval.check(settings(tmp_path, epochs=1, negatives=16), frozenset())
  with pytest.raises(ConfigError, match='count=1'):
    retrieval.run(encoder(1.0), settings(tmp_path, count=1), context)
  with pytest.raises(ConfigError, match='judges no pairs'):
    retrieval.run(features.raw_pixels(), settings(tmp_path), context)
