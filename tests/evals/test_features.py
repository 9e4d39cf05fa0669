import eval_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import method
from mim_jax.errors import ConfigError, UserError
from mim_jax.evals import features


def batches(mesh, count=37, batch_size=16):
  data = cases.images(count, 0)
  return data, list(cases.Data(mesh, {'s': data}).open_batches('s', '', batch_size, ('image', 'label')))


@pytest.mark.parametrize('count', [1, 8])
def test_uneven_last_batch_is_exact(count):
  mesh, encoder = cases.mesh_of(count), cases.encoder()
  data, given = batches(mesh)
  found, labels = features.extract(encoder, given, mesh, names='cls,mean')
  expected = encoder.apply(encoder.variables, data)
  assert set(found) == {'cls', 'mean'}
  for name, value in found.items():
    assert value.shape == (37, {'cls': 12, 'mean': 24}[name]) and value.dtype == np.float32
    np.testing.assert_allclose(value, expected[name], atol=1e-6)
  np.testing.assert_array_equal(labels, data['label'])


def test_unreadable_examples_are_left_out():
  mesh = cases.mesh_of(8)
  data, given = batches(mesh)
  for batch in given:
    batch['corrupt'] = jnp.arange(16) == 3
  _, labels = features.extract(cases.encoder(), given, mesh)
  np.testing.assert_array_equal(labels, np.delete(data['label'], [3, 19, 35]))


def test_features_that_are_not_finite_are_refused():
  mesh = cases.mesh_of(1)
  data = cases.images(20, 0)
  data['image'][5, 0, 0, 0] = np.nan
  with pytest.raises(UserError, match='1 of 20 examples'):
    features.extract(cases.encoder(), cases.Data(mesh, {'s': data}).open_batches('s', '', 16, ('image', 'label')), mesh)


def test_missing_label_and_empty_data_say_so():
  mesh = cases.mesh_of(1)
  _, given = batches(mesh)
  with pytest.raises(UserError, match="'species'.*image, label"):
    features.extract(cases.encoder(), given, mesh, label='species')
  with pytest.raises(UserError, match='no example'):
    features.extract(cases.encoder(), [], mesh)


def test_stop_is_polled_between_batches():
  mesh = cases.mesh_of(1)
  _, given = batches(mesh)
  answers = iter([False, True])
  with pytest.raises(features.Interrupted):
    features.extract(cases.encoder(), given, mesh, stop=lambda: next(answers))


def test_a_source_is_encoded_once_per_encoder():
  data = cases.Data(cases.mesh_of(1), {'s': cases.images(20, 0)})
  ctx = data.context()
  cfg = type('cfg', (), dict(fields=('image',), label='label', transforms='', batch_size=8, features='auto'))
  first, _ = features.of_source(cases.encoder(), ctx, cfg, 's')
  again, _ = features.of_source(cases.encoder(), ctx, cfg, 's')
  assert first is again and len(data.opened) == 1
  features.of_source(cases.encoder('untrained', 1), ctx, cfg, 's')
  assert len(data.opened) == 2


@pytest.mark.parametrize(
  ('asked', 'given'), [('auto', ('cls',)), ('mean', ('mean',)), ('mean, auto,cls', ('mean', 'cls'))]
)
def test_names_of_features(asked, given):
  batch = cases.images(2, 0)
  assert features.resolve(cases.encoder(), asked, batch, 'label') == given
  assert features.resolve(features.raw_pixels(), asked, batch, 'label') == ('pixels',)


def test_unknown_name_of_features_is_an_error_with_the_nearest():
  with pytest.raises(ConfigError, match="'meen'.*did you mean 'mean'"):
    features.resolve(cases.encoder(), 'meen', cases.images(2, 0), 'label')


def test_pool(rng):
  layers = rng.normal(size=(2, 5, 4 + 3, 8)).astype(np.float32)  # four class tokens before three patches
  encoded = {'tokens': layers[-1, :, 4:], 'cls': layers[-1, :, :4].mean(1), 'layers': jnp.asarray(layers)}
  pooled = features.pool(encoded)
  tokens, layer_features = ['mean', 'max', 'mean_norm'], ['layer1/mean', 'layer1/cls', 'layer2/mean', 'layer2/cls']
  assert list(pooled) == [*tokens, 'cls', 'both', *layer_features]
  np.testing.assert_allclose(pooled['both'], np.concatenate([pooled['cls'], pooled['mean']], 1))
  np.testing.assert_allclose(pooled['layer1/mean'], layers[0, :, 4:].mean(1), atol=1e-6)
  np.testing.assert_allclose(pooled['layer2/cls'], pooled['cls'], atol=1e-6)
  assert list(features.pool({'tokens': encoded['tokens']})) == tokens
  np.testing.assert_allclose(pooled['mean_norm'].mean(1), 0, atol=1e-6)
  np.testing.assert_allclose(pooled['mean_norm'].std(1), 1, atol=1e-3)
  np.testing.assert_array_equal(pooled['max'], encoded['tokens'].max(1))


def test_encoder_of_a_method():
  built = method.build(method.options('mae', size='mu', patch=2, image_size=cases.SIDE, decoder='16/1/2'))
  batch = cases.images(8, 0)
  params = jax.jit(built.init)(jax.random.key(0), batch)
  encoder = features.from_method(built, params, {})
  mesh = cases.mesh_of(8)
  found, _, keep = features.of_batch(encoder, cases.to_mesh(batch, mesh), mesh, ('cls', 'mean'), 'label')
  assert keep.all()
  tokens = jax.jit(built.encode)(params, batch)
  np.testing.assert_allclose(found['cls'], tokens['cls'], atol=1e-5)
  np.testing.assert_allclose(found['mean'], tokens['tokens'].mean(1), atol=1e-5)
  assert features.from_method(built, params, {}, 'untrained').apply is encoder.apply  # so that it is compiled once


def test_raw_pixels(rng):
  image = rng.integers(256, size=(2, 4, 4, 3)).astype(np.uint8)
  small = features.raw_pixels(4)
  np.testing.assert_array_equal(small.apply({}, {'image': image})['pixels'], image.reshape(2, -1).astype(np.float32))
  volume = np.full((2, 3, 16, 16, 1), 7.0, np.float32)
  np.testing.assert_allclose(small.apply({}, {'image': volume})['pixels'], np.full((2, 3 * 4 * 4), 7.0), atol=1e-5)


@pytest.mark.parametrize('labels', [np.array([0, -1]), np.array([0.0, 1.0]), np.array([[0, 1]])])
def test_labels_that_are_no_classes_are_refused(labels):
  with pytest.raises(UserError, match='one class number'):
    features.class_labels(labels, 's')


def test_best_of_several_features():
  flat = features.best_of({'cls': {'top1': 0.2, 'loss': 3.0}, 'mean': {'top1': 0.4, 'loss': 2.0}})
  assert flat == {'top1': 0.4, 'loss': 2.0, 'cls/top1': 0.2, 'cls/loss': 3.0, 'mean/top1': 0.4, 'mean/loss': 2.0}
  assert features.best_of({'cls': {'top1': 0.2}}) == {'top1': 0.2}
