"""Frechet distance of samples to real images."""

import eval_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.errors import ConfigError, UserError
from mim_jax.evals import features, fid, suite


def test_distance_of_gaussians_is_the_closed_form(rng):
  mean, scale = rng.normal(size=4), np.array([1.0, 2.0, 0.5, 3.0])
  x = rng.normal(size=(200_000, 4))
  y = mean + scale * rng.normal(size=(200_000, 4))
  np.testing.assert_allclose(fid.frechet(x, y), np.square(mean).sum() + np.square(scale - 1).sum(), rtol=0.02)
  turn = np.linalg.qr(rng.normal(size=(4, 4)))[0]
  np.testing.assert_allclose(fid.frechet(x @ turn, y @ turn), fid.frechet(x, y), rtol=1e-6)


def test_distance_to_itself_is_zero_also_with_fewer_images_than_features(rng):
  x = rng.normal(size=(10, 30))
  assert abs(fid.frechet(x, x)) < 1e-4
  with pytest.raises(UserError, match='two images'):
    fid.frechet(x[:1], x)


@pytest.mark.parametrize('make, width', [(fid.random_features, 448), (fid.pixel_features, 192)])
def test_features_do_not_depend_on_the_batch(make, width):
  image = jax.random.uniform(jax.random.key(0), (3, 16, 16, 3))
  found = make(image)
  assert found.shape == (3, width)
  np.testing.assert_allclose(found[:1], make(image[:1]), atol=1e-5)


def generator(variables, key, cond):
  """Images of the class's prototype, with noise as in the data times `noise`."""
  noise = jax.random.normal(key, (len(cond['label']), cases.SIDE, cases.SIDE, 3))
  return variables['prototypes'][cond['label']] + variables['noise'] * noise


def encoder(noise, name='trained'):
  prototypes = jnp.asarray(np.random.default_rng(99).normal(size=(cases.CLASSES, cases.SIDE, cases.SIDE, 3)))
  return features.Encoder(name, None, {'prototypes': 0.2 * prototypes, 'noise': jnp.float32(noise)}, generate=generator)


@pytest.mark.parametrize('devices', [1, 8])
def test_better_samples_are_nearer_and_the_picture_shows_them(devices):
  mesh = cases.mesh_of(devices)
  data = cases.images(300, 0, noise=1.0)
  data['image'] = 0.2 * data['image']
  given = {'test': 'real', 'batch_size': 64, 'samples': 200, 'label': 'label', 'transforms': 'normalize("half")'}
  cfg = suite.settings('fid', given | {'extractor': 'pixels'})
  shown = {}
  context = cases.Data(mesh, {'real': data}).context()
  context.picture = shown.__setitem__
  good, bad = (fid.run(encoder(noise), cfg, context) for noise in (0.2, 0.6))
  assert good['real'] == bad['real'] > 0
  assert good['distance'] < 1.5 * good['real'] and bad['distance'] > 3 * good['distance']
  assert shown['samples_trained'].dtype == np.uint8


def test_a_method_that_makes_nothing_is_told():
  context = cases.Data(cases.mesh_of(1), {'real': cases.images(20, 0)}).context()
  with pytest.raises(ConfigError, match='Method.generate'):
    fid.run(features.raw_pixels(), suite.settings('fid', {'test': 'real', 'batch_size': 10}), context)
