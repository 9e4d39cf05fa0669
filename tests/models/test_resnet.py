import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.errors import ConfigError
from mim_jax.models import resnet


def made(name, size=64, **options):
  net = resnet.ResNet(**resnet.size(name), **options)
  return net, jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))


@pytest.mark.parametrize('name, count', [('resnet18', 11_689_512), ('resnet34', 21_797_672), ('resnet50', 25_557_032)])
def test_named_sizes_have_as_many_parameters_as_torchvision_without_the_classifier(name, count):
  net, variables = made(name)
  classifier = 1000 * (net.channels + 1)
  assert sum(x.size for x in jax.tree.leaves(variables['params'])) == count - classifier
  assert net.channels == (2048 if name == 'resnet50' else 512)


@pytest.mark.parametrize('size, side', [(64, 2), (48, 2), (33, 2), (128, 4)])
def test_feature_map(size, side):
  net, variables = made('bottleneck/1,1,1,1/4', size)
  image = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
  assert jax.eval_shape(net.apply, variables, image).shape == (2, side, side, net.channels)


@pytest.mark.parametrize('name', ['resnet19', 'basic/1,1', 'basic/1,0/8', 'dense/1/8'])
def test_unknown_sizes_are_refused(name):
  with pytest.raises(ConfigError, match='ResNet size'):
    resnet.size(name)


def test_batch_norm_uses_the_biased_variance_and_keeps_the_unbiased_one(rng):
  x = jnp.asarray(rng.normal(2, 3, size=(4, 3, 2, 5)), jnp.float32)
  norm = resnet.BatchNorm(momentum=0.25)
  variables = norm.init(jax.random.key(0), x)
  y, new = norm.apply(variables, x, train=True, mutable='batch_stats')
  flat = np.asarray(x, np.float64).reshape(-1, 5)
  np.testing.assert_allclose(y.reshape(-1, 5), (flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5), atol=1e-5)
  np.testing.assert_allclose(new['batch_stats']['mean'], 0.25 * flat.mean(0), rtol=1e-5)
  np.testing.assert_allclose(new['batch_stats']['var'], 0.75 + 0.25 * flat.var(0, ddof=1), rtol=1e-5)
  still = norm.apply({**variables, **new}, x)
  mean, var = new['batch_stats']['mean'], new['batch_stats']['var']
  np.testing.assert_allclose(still, (x - mean) / jnp.sqrt(var + 1e-5), rtol=1e-4, atol=1e-5)


def test_statistics_are_those_of_the_global_batch(devices, rng):
  x = jnp.asarray(rng.normal(size=(8, 4, 4, 3)) * np.arange(1, 9)[:, None, None, None], jnp.float32)
  norm = resnet.BatchNorm()
  variables = norm.init(jax.random.key(0), x)
  run = jax.jit(lambda x: norm.apply(variables, x, train=True, mutable='batch_stats'))
  mesh = jax.make_mesh((8,), ('data',), devices=devices, axis_types=(jax.sharding.AxisType.Auto,))
  spread = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data')))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), run(x), run(spread))


def test_remat_changes_nothing(rng):
  image = jnp.asarray(rng.normal(size=(3, 32, 32, 3)), jnp.float32)
  size = resnet.size('basic/1,1/4')
  variables = jax.jit(resnet.ResNet(**size).init)(jax.random.key(0), image)

  def run(remat):
    net = resnet.ResNet(**size, remat=remat)

    def loss(params):
      out, new = net.apply({**variables, 'params': params}, image, train=True, mutable='batch_stats')
      return jnp.sum(out**2), new

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables['params'])

  plain, again = run('none'), run('full')
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), plain, again)
