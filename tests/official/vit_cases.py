"""Small encoders of every shape that some library has, with every array random."""

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax.checkpoint import bundle as bundles
from mim_jax.models import vit

BASE = dict(
  width=32,
  depth=2,
  heads=4,
  patch=(8, 8),
  grid=(4, 4),
  mlp_ratio=2.0,
  pos='learned',
  final_norm=True,
  eps=1e-6,
  cls=True,
  registers=0,
  patch_bias=True,
  qkv_bias=True,
  embed_norm=False,
  activation='gelu',
  layer_scale=0.0,
)
SHAPES = {
  'plain': {},
  'no_cls': {'cls': False},
  'scaled': {'layer_scale': 1.0},
  'registers': {'layer_scale': 1.0, 'registers': 4},
  'gated': {'layer_scale': 1.0, 'activation': 'swiglu', 'mlp_ratio': 2.75},
  'clip': {'embed_norm': True, 'patch_bias': False, 'activation': 'quick_gelu', 'eps': 1e-5},
  'no_qkv_bias': {'qkv_bias': False},
  'oblong': {'grid': (2, 6), 'patch': (8, 8)},
}


def randomized(tree, seed: int = 0):
  """The tree with every array drawn anew, so that a scale of one or a bias of zero hides nothing."""
  leaves, structure = jax.tree.flatten(tree)
  rng = np.random.default_rng(seed)
  return jax.tree.unflatten(structure, [rng.standard_normal(leaf.shape).astype(np.float32) * 0.3 for leaf in leaves])


def make(shape: str, **changes) -> bundles.Bundle:
  options = {**BASE, **SHAPES[shape], **changes}
  image = jnp.zeros((1, *(p * g for p, g in zip(options['patch'], options['grid'], strict=True)), 3))
  params = jax.eval_shape(vit.ViT(**options).init, jax.random.key(0), image)['params']
  return bundles.Bundle(encoder=options, params={'encoder': randomized(params)})


def with_decoder(**changes) -> bundles.Bundle:
  """Encoder and decoder of a MAE."""
  from mim_jax import method

  cfg = method.options('mae', size='32/2/4', decoder='24/1/3', patch=8, image_size=32, mlp_ratio=2.0, **changes)
  built = method.build(cfg)
  params = jax.eval_shape(built.init, jax.random.key(0), built.abstract_batch(1))
  return bundles.Bundle(
    encoder={**BASE, 'pos': 'sincos', 'eps': cfg.ln_eps}, params=randomized(params), method=cfg.to_dict()
  )
