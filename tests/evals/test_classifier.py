import eval_cases as cases
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.errors import UserError
from mim_jax.evals import classifier, features, suite


def settings():
  return suite.settings('classifier', {'test': 'data', 'batch_size': 8, 'features': 'cls'})


def encode(variables, batch):
  """A method whose classifier is right but for the last class, which it takes for the first."""
  right = batch['image'][:, 0, 0, 0].astype(jnp.int32)
  guess = jnp.where(right == cases.CLASSES - 1, 0, right)
  return {'tokens': batch['image'].reshape(len(right), 1, -1), 'logits': jnp.eye(cases.CLASSES)[guess] * variables}


@pytest.mark.parametrize('devices', [1, 8])
def test_the_method_s_own_logits_are_judged(devices):
  label = np.arange(45) % cases.CLASSES
  image = np.broadcast_to(label[:, None, None, None], (45, 2, 2, 3)).astype(np.float32)
  data = cases.Data(cases.mesh_of(devices), {'data': {'image': image, 'label': label.astype(np.int32)}})
  encoder = features.Encoder('trained', None, jnp.float32(3), encode)
  figures = classifier.run(encoder, settings(), data.context())
  assert figures['top1'] == pytest.approx(np.mean(label != cases.CLASSES - 1))
  assert figures['class_mean'] == pytest.approx((cases.CLASSES - 1) / cases.CLASSES)


def test_without_a_classifier_it_says_so():
  data = cases.Data(cases.mesh_of(1), {'data': cases.images(16, 0)})
  plain = features.Encoder('trained', None, {}, lambda variables, batch: {'tokens': batch['image']})
  with pytest.raises(UserError, match='trains no classifier.*tokens'):
    classifier.run(plain, settings(), data.context())
  with pytest.raises(UserError, match='pixels baseline has no classifier'):
    classifier.run(features.raw_pixels(), settings(), data.context())


def test_only_the_untrained_network_is_its_baseline():
  assert settings().baselines == ('untrained',) and 'train' not in settings()
