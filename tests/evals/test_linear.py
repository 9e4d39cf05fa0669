import eval_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from mim_jax import parity
from mim_jax.errors import ConfigError
from mim_jax.evals import features, linear, suite
from mim_jax.models import vit
from mim_jax.official import mae as official
from mim_jax.official import names


@pytest.fixture(scope='module')
def reference(goldens):
  """The official probe's numbers, and the class token of our encoder for images [B, 3, H, W]."""
  path = goldens / 'mae_vit.safetensors'
  if not path.is_file():
    pytest.skip(f'no reference numbers: {path} is absent')
  case = parity.read(path)
  c = case.config
  patch, grid = (c.patch_size,) * 2, (c.img_size // c.patch_size,) * 2
  params, _ = names.load(case.weights, official.downstream(patch, c.num_heads))
  encoder = vit.ViT(c.embed_dim, c.depth, c.num_heads, patch, grid, c.mlp_ratio, pos='learned')
  class_token = jax.jit(lambda images: encoder.apply({'params': params['encoder']}, images.transpose(0, 2, 3, 1))[:, 0])
  return case, params['head'], class_token


@pytest.mark.parametrize('prefix', ['lars', 'lars_wd'])
def test_steps_are_those_of_the_official_code(reference, prefix):
  case, head, class_token = reference
  expected, given = case.group('out'), {**case.config.lars, **getattr(case.config, prefix)}
  state, losses = linear.start(head), []
  for step, labels in enumerate(case.inputs['probe_labels']):
    x = class_token(case.inputs['probe_imgs'][step])
    state, info = linear.probe_step(
      state, x, labels, given['lr'], given['weight_decay'], given['momentum'], given['trust_coefficient']
    )
    losses.append(info['loss'])
    if step == 0:
      np.testing.assert_allclose(info['logits'], expected[f'{prefix}_train_logits_0'], atol=1e-5)
  found = {
    'loss': np.array(losses),
    'head_weight': state['head']['kernel'].T,
    'head_bias': state['head']['bias'],
    'bn_mean': state['norm']['mean'],
    'bn_var': state['norm']['var'],
    'eval_logits': linear.logits(state, class_token(case.inputs['imgs'])),
  }
  for name, value in found.items():
    np.testing.assert_allclose(value, expected[f'{prefix}_{name}'], atol=1e-5, err_msg=name)


def settings(**given):
  return suite.settings('linear', {'train': 'a', 'test': 'b', 'batch_size': 16, **given})


def test_rates_rise_to_the_peak_and_fall_to_zero():
  rates = linear.rates(settings(epochs=10, warmup_epochs=2, base_lr=0.1), 512, 4)
  assert rates.shape == (10, 4)
  np.testing.assert_allclose(rates.reshape(-1)[:9], 0.2 * np.minimum(np.arange(9) / 8, 1), atol=1e-7)
  np.testing.assert_allclose(rates[6, 0], 0.1, atol=1e-6)  # half-way down
  assert 0 < rates[-1, -1] < 0.001


def test_near_logistic_regression_on_digits():
  x, labels = load_digits(return_X_y=True)
  x, labels = x.astype(np.float32), labels.astype(np.int32)
  state, _ = linear.train(x[:1200], labels[:1200], 10, settings(trust=0.03), jax.devices()[0])
  accuracy = np.mean(np.asarray(linear.logits(state, x[1200:])).argmax(1) == labels[1200:])
  best = LogisticRegression(max_iter=2000).fit(x[:1200] / 16, labels[:1200]).score(x[1200:] / 16, labels[1200:])
  assert accuracy > best - 0.02


def test_an_incomplete_batch_is_left_for_another_epoch(rng):
  x, labels = rng.normal(size=(10, 4)).astype(np.float32), rng.integers(2, size=10).astype(np.int32)
  cfg = settings(epochs=2, warmup_epochs=1, train_batch=4)
  state, _ = linear.train(x, labels, 2, cfg, jax.devices()[0])
  expected = linear.init(jax.random.key(0), 4, 2)
  for epoch, rates in enumerate(linear.rates(cfg, 4, 2)):
    order = np.random.Generator(np.random.Philox(key=[0, epoch])).permutation(10)
    for step, rate in enumerate(rates):
      rows = order[4 * step : 4 * step + 4]
      expected, _ = linear.probe_step(
        expected, jnp.asarray(x[rows]), labels[rows], rate, cfg.wd, cfg.momentum, cfg.trust
      )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state, expected)


EASY = {'epochs': 8, 'warmup_epochs': 1, 'train_batch': 32, 'base_lr': 1.0, 'trust': 0.1}


@pytest.mark.parametrize(
  'given', [EASY, {**EASY, 'augment': True, 'train_transforms': 'noise'}], ids=['stored', 'augmented']
)
@pytest.mark.parametrize('count', [1, 8])
def test_a_case_with_a_known_answer(given, count):
  data = cases.Data(cases.mesh_of(count), {'a': cases.images(201, 0, noise=0.2), 'b': cases.images(53, 1, noise=0.2)})
  figures = linear.run(features.raw_pixels(), settings(**given), data.context())
  assert (figures['top1'], figures['top5'], figures['class_mean']) == (1.0, 1.0, 1.0)
  assert figures['train_loss'] < 0.5
  shuffled = [
    shuffle
    for source, transforms, shuffle in data.opened
    if (source, transforms) == ('a', given.get('train_transforms'))
  ]
  assert shuffled == ([0] if 'augment' in given else [])


def test_augmented_batch_is_made_of_several_passes():
  data = cases.Data(cases.mesh_of(1), {'a': cases.images(100, 0), 'b': cases.images(20, 1)})
  cfg = settings(augment=True, train_transforms='noise', epochs=1, warmup_epochs=0, train_batch=40, batch_size=16)
  with jax.default_device(jax.devices()[0]):
    states, _ = linear.train_augmented(features.raw_pixels(), cfg, data.context())
  # 40 holds two whole passes of 16, and 100 examples three such steps: the running mean blends three means of 32 rows.
  given = data.open_batches('a', 'noise', 16, ('image', 'label'), shuffle=0)
  mean = 0.0
  for _ in range(3):
    rows = np.concatenate([np.asarray(next(given)['image']).reshape(16, -1) for _ in range(2)])
    mean = 0.9 * mean + 0.1 * rows.mean(axis=0)
  np.testing.assert_allclose(states['pixels']['norm']['mean'], mean, atol=1e-6)


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    ({'augment': True}, 'train_transforms'),
    ({'augment': True, 'train_transforms': 'x', 'train_batch': 8}, r'batch_size \(found 16\)'),
    ({'epochs': 10}, 'epochs must be more'),
  ],
)
def test_settings_that_cannot_work_are_refused(given, message):
  data = cases.Data(cases.mesh_of(1), {'a': cases.images(40, 0), 'b': cases.images(20, 1)})
  with pytest.raises(ConfigError, match=message):
    linear.run(features.raw_pixels(), settings(**given), data.context())


def test_stop_is_polled_between_epochs(rng):
  def check_stop(count=[]):  # noqa: B006 (counts its calls)
    count.append(1)
    if len(count) == 3:
      raise features.Interrupted

  with pytest.raises(features.Interrupted):
    linear.train(
      rng.normal(size=(8, 4)).astype(np.float32), np.zeros(8, np.int32), 2, settings(), jax.devices()[0], check_stop
    )
