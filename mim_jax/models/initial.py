"""Starting layers as other codebases do; those of `models.blocks` start xavier-uniform with bias 0."""

import jax


def normal_kernels(key, params, std=0.02):
  """Every leaf called 'kernel' anew from N(0, std^2), whatever its shape; the others stay."""
  leaves, tree = jax.tree_util.tree_flatten_with_path(params)
  keys = jax.random.split(key, len(leaves))
  start = lambda key, path, leaf: std * jax.random.normal(key, leaf.shape) if path[-1].key == 'kernel' else leaf
  return tree.unflatten([start(key, path, leaf) for key, (path, leaf) in zip(keys, leaves, strict=True)])


def torch_dense(key, params):
  """Dense layers {'kernel' [in, out], 'bias' [out]} at any depth, as PyTorch starts them: uniform in +-1 / sqrt(in)."""
  if 'kernel' not in params:
    keys = jax.random.split(key, len(params))
    return {name: torch_dense(own, params[name]) for own, name in zip(keys, sorted(params), strict=True)}
  bound = params['kernel'].shape[0] ** -0.5
  keys = dict(zip(sorted(params), jax.random.split(key, len(params)), strict=True))
  return {name: jax.random.uniform(keys[name], x.shape, minval=-bound, maxval=bound) for name, x in params.items()}
