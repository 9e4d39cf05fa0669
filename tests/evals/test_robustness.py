"""Robustness: known answers on linear classifiers, every attack on a probe, and settings that cannot work."""

import eval_cases as cases
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.errors import ConfigError
from mim_jax.evals import features, robustness, suite


def scenes(count, seed):
  """Images [n, 6, 6, 3] whose mean, 0.5 -+ gap, tells the class, and gap [n], the distance to the boundary."""
  rng = np.random.default_rng(seed)
  label = rng.integers(2, size=count)
  gap = rng.uniform(0.01, 0.05, size=count)
  image = 0.5 + (2 * label - 1)[:, None, None, None] * gap[:, None, None, None] + np.zeros((1, 6, 6, 3))
  image[:, ::2] += 0.1  # a pattern that does not matter
  image[:, 1::2] -= 0.1
  return {'image': image.astype(np.float32), 'label': label.astype(np.int32)}, gap


def brightness(variables, batch, scale=300.0):
  height = scale * (jnp.mean(batch['image'], axis=(1, 2, 3)) - 0.5) + variables['shift']
  logits = jnp.stack([-height, height], axis=1)
  return {'tokens': batch['image'].reshape(len(batch['image']), 36, 3), 'logits': logits, 'other': -logits}


def encoder():
  return features.Encoder('trained', None, {'shift': jnp.float32(0)}, brightness)


def settings(**given):
  return suite.settings('robustness', {'train': 'a', 'test': 'b', 'batch_size': 16, 'stats': 'none', **given})


@pytest.mark.parametrize('count', [1, 8])
def test_a_classifier_with_a_known_answer(count):
  test, gap = scenes(45, 0)
  data = cases.Data(cases.mesh_of(count), {'b': test})
  eps = (0.02, 0.035)
  cfg = settings(eps=eps, attacks=('fgsm', 'pgd'), count=40, pgd_restarts=2)
  figures = robustness.run(encoder(), cfg, data.context())
  assert figures['top1'] == 1.0 and figures['low_pass'] == 1.0
  for e in eps:
    expected = np.mean(gap[:40] > e)
    for attack in ('fgsm', 'pgd'):
      np.testing.assert_allclose(figures[f'{attack}_{255 * e:.3g}'], expected, atol=1e-6)
    assert figures[f'fgsm_{255 * e:.3g}/high'] < 0.05  # the same step in every pixel


def test_attacks_of_another_classifier_are_tried_as_well():
  test, _ = scenes(32, 1)
  data = cases.Data(cases.mesh_of(1), {'b': test})
  figures = robustness.run(encoder(), settings(eps=(0.03,), attacks=('fgsm',), transfer='other'), data.context())
  assert figures['other/top1'] == 0.0 and figures['other/fgsm_7.65'] == 0.0
  assert figures['transfer/fgsm_7.65'] == 1.0  # what fools the opposite classifier helps this one
  assert figures['fgsm_7.65'] < 1.0


def test_every_attack_runs_on_a_probe_and_none_beats_the_clean_image():
  data = cases.Data(cases.mesh_of(1), {'a': cases.images(201, 0, noise=0.2), 'b': cases.images(21, 1, noise=0.2)})
  for rows in data.sets.values():  # into [0, 1]
    rows['image'] = (0.5 + rows['image'] / 12).clip(0, 1)
  cfg = settings(
    eps=(20 / 255,),
    attacks=tuple(robustness.ATTACKS),
    apgd_steps=10,
    fab_steps=5,
    targets=2,
    square_queries=20,
    cw_steps=10,
    epochs=8,
    warmup_epochs=1,
    train_batch=32,
    base_lr=1.0,
    trust=0.1,
  )
  figures = robustness.run(features.raw_pixels(), cfg, data.context())
  assert figures['top1'] == 1.0
  names = [f'{attack}_20' for attack in robustness.ATTACKS]
  assert all(0 <= figures[name] <= 1 for name in names)
  assert figures['autoattack_20'] <= figures['aa_lite_20'] <= figures['apgd_ce_20'] < 1.0
  assert figures['square_20'] >= figures['apgd_ce_20']


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    ({'attacks': ('pdg',)}, 'did you mean'),
    ({'stats': 'imagnet'}, 'did you mean'),
    ({'transfer': 'logit'}, 'nothing that the encoder gives'),
    ({'stats': 'half'}, 'not in'),
    ({'attacks': ('apgd_t',)}, 'need 4 classes'),
  ],
)
def test_settings_that_cannot_work_are_refused(given, message):
  test, _ = scenes(16, 0)
  if given.get('stats') == 'half':
    test['image'] = test['image'] * 4
  data = cases.Data(cases.mesh_of(1), {'b': test})
  with pytest.raises(ConfigError, match=message):
    robustness.run(encoder(), settings(**{'attacks': ('fgsm',), **given}), data.context())
