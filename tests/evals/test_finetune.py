"""Fine-tuning: known answers for each task, and the network of MAE's recipe."""

import json

import eval_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import config, method, optim
from mim_jax.data import images
from mim_jax.errors import UserError
from mim_jax.evals import features, finetune, fit, suite
from mim_jax.methods import mae
from mim_jax.models import heads

LONG = {**cases.SHORT, 'train': 'a', 'test': 'b', 'epochs': 12}
NO_MIX = {'mixup': 0.0, 'cutmix': 0.0, 'smoothing': 0.0}


def run(count=1, noise=0.2, **given):
  data = cases.Data(cases.mesh_of(count), {'a': cases.described(161, 0, noise), 'b': cases.described(83, 1, noise)})
  return finetune.run(cases.token_encoder(), suite.settings('finetune', {**LONG, **given}), data.context())


@pytest.mark.parametrize('count', [1, 8])
def test_classes_with_a_known_answer(count):
  figures = run(count, drop_path=0.1)  # with mixup, cutmix and smoothing, as in the recipe
  assert (figures['top1'], figures['top5'], figures['class_mean']) == (1.0, 1.0, 1.0)


def test_several_labels_with_a_known_answer():
  figures = run(task='multi', label='bits', drop_path=0.1, **NO_MIX)
  assert figures['auroc'] > 0.99 and figures['map'] > 0.99 and figures['train_loss'] < 0.3


def test_numbers_with_a_known_answer():
  figures = run(task='regression', label='value', drop_path=0.0, epochs=40, **NO_MIX)
  assert figures['r2'] > 0.95  # in the units of the labels, which differ between the two outputs
  assert 0 < figures['mae'] < figures['rmse'] < 5


def test_intervals_of_a_small_test_set():
  figures = run(noise=2.0, drop_path=0.0, bootstrap=200, **NO_MIX)
  assert figures['top1_low'] < figures['top1'] < figures['top1_high'] < figures['top1_low'] + 0.3


def test_labels_that_do_not_fit_the_task_say_so():
  with pytest.raises(UserError, match=r'shape \(32,\).*task multi needs 0 and 1'):
    run(task='multi', **NO_MIX)


@pytest.mark.parametrize('pool', ['mean', 'cls'])
def test_network_and_gradients_are_those_of_the_downstream_vit(pool):
  """`heads.Classifier` replays the official network; here it holds the same weights and MAE's table of positions."""
  cfg = method.options('mae', size='32/2/4', decoder='24/1/3', patch=8, image_size=32)
  built, (encoder, _) = method.build(cfg), mae.modules(cfg)
  batch = {'image': jax.random.normal(jax.random.key(1), (3, 32, 32, 3))}
  params = built.init(jax.random.key(2), batch)
  params = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(x.size), x.shape), params)
  encoded = built.encode(params, batch, layers=True)
  head = finetune.Head(5, pool, 0.5)
  own = head.init(jax.random.key(3), encoded)['params']

  def ours(params, own):
    return head.apply({'params': own}, built.encode(params, batch, layers=True))

  official = heads.Classifier(encoder.clone(pos='learned', final_norm=pool == 'cls'), 5, pool)

  def theirs(params, own):
    vit = {**params['encoder'], 'pos_embed': jnp.asarray(encoder.table)}
    vit = vit if pool == 'cls' else {name: leaf for name, leaf in vit.items() if name != 'norm'}
    return official.apply({'params': {'encoder': vit, **own}}, batch['image'])[0]

  np.testing.assert_allclose(ours(params, own), theirs(params, own), atol=1e-5)
  grads = [jax.grad(lambda p, o, f=f: jnp.sum(f(p, o) ** 2), argnums=(0, 1))(params, own) for f in (ours, theirs)]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), *grads)


def test_a_method_without_layers_is_pooled_from_its_tokens(rng):
  tokens = rng.normal(size=(2, 9, 16)).astype(np.float32)
  layers = np.concatenate([rng.normal(size=(3, 2, 2, 16)), np.stack([tokens + i for i in range(3)])], axis=2)
  head = finetune.Head(4, 'mean', 0.5)
  params = head.init(jax.random.key(0), {'tokens': tokens})
  np.testing.assert_allclose(
    head.apply(params, {'tokens': tokens * 0, 'layers': layers}), head.apply(params, {'tokens': tokens + 2}), atol=1e-5
  )


def test_a_method_of_the_project_end_to_end():
  built = method.build(method.options('mae', size='mu', patch=2, image_size=cases.SIDE, decoder='16/1/2'))
  data = cases.Data(cases.mesh_of(8), {'a': cases.images(161, 0, 0.2), 'b': cases.images(83, 1, 0.2)})
  params = jax.jit(built.init)(jax.random.key(0), cases.images(2, 0))
  cfg = suite.settings(
    'finetune',
    {**LONG, 'epochs': 8, 'base_lr': 2e-2, 'layer_decay': 0.9, 'drop_path': 0.1, 'mixup': 0.0, 'cutmix': 0.0},
  )
  assert finetune.run(features.from_method(built, params, {}), cfg, data.context())['top1'] > 0.95


@pytest.mark.parametrize(
  ('size', 'epochs', 'rate', 'decay', 'drop'),
  [('B', 100, 5e-4, 0.65, 0.1), ('L', 50, 1e-3, 0.75, 0.2), ('H', 50, 1e-3, 0.75, 0.3)],
)
def test_the_recipe_of_mae(root, size, epochs, rate, decay, drop):
  cfg = config.load([f'--config={root}/configs/mae.py:size={size}']).evals.finetune
  assert (cfg.epochs, cfg.base_lr, cfg.layer_decay, cfg.drop_path) == (epochs, rate, decay, drop)
  assert (cfg.train_batch, cfg.warmup_epochs, cfg.min_lr, cfg.wd, cfg.b1, cfg.b2) == (1024, 5, 1e-6, 0.05, 0.9, 0.999)
  assert (cfg.mixup, cfg.cutmix, cfg.smoothing, cfg.pool, cfg.head_std) == (0.8, 1.0, 0.1, 'mean', 2e-5)
  names = [part.split('(')[0].strip() for part in cfg.train_transforms.split('|')]
  assert names == ['decode', 'random_resized_crop', 'flip', 'rand_augment', 'normalize', 'random_erasing']
  chain = images.parse(cfg.train_transforms)
  picture = np.random.default_rng(0).integers(0, 256, (300, 260, 3), dtype=np.uint8)
  assert chain.example({'image': picture}, np.random.default_rng(1))['image'].shape == (224, 224, 3)


def test_rates_and_decay_go_by_layer_as_in_the_reference(goldens):
  """The flat tree that is trained gets the multipliers and decays that the official parameter groups have."""
  reference = json.loads((goldens / 'mae_vit.json').read_text())
  decay, depth = reference['config']['layer_decay'], reference['config']['depth']
  params = method.build(method.options('mae', size=f'32/{depth}/4', patch=8, image_size=32, decoder='24/1/3')).init
  params = jax.eval_shape(lambda: params(jax.random.key(0), {'image': jnp.zeros((1, 32, 32, 3))}))
  flat = {name: leaf for name, leaf in fit.named(params).items() if name.startswith('encoder/')}
  flat['task'] = {'head': {'kernel': jnp.zeros((32, 10)), 'bias': jnp.zeros(10)}}
  rates = fit.named(optim.lr_multipliers(flat, layer_decay=decay))
  decayed = fit.named(optim.decay_mask(flat, finetune.DEFAULTS['no_wd']))
  pairs = {
    'cls_token': 'encoder/cls_token',
    'patch_embed.proj.weight': 'encoder/patch_embed/kernel',
    'patch_embed.proj.bias': 'encoder/patch_embed/bias',
    'blocks.{i}.attn.qkv.weight': 'encoder/blocks/attn/qkv/kernel',
    'blocks.{i}.attn.qkv.bias': 'encoder/blocks/attn/qkv/bias',
    'blocks.{i}.norm1.weight': 'encoder/blocks/norm1/scale',
    'blocks.{i}.mlp.fc2.weight': 'encoder/blocks/mlp/fc2/kernel',
    'head.weight': 'task/head/kernel',
    'head.bias': 'task/head/bias',
  }
  for theirs, ours in pairs.items():
    for i in range(depth if '{i}' in theirs else 1):
      rate, wd = reference['layer_decay'][theirs.format(i=i)]
      found = np.broadcast_to(np.ravel(rates[ours]), depth)[i]
      assert found == pytest.approx(rate, rel=1e-6) and decayed[ours] == (wd > 0), theirs
