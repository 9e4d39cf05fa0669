"""mim-jax replay: the step that stopped a run, again."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax import runs, step
from mim_jax.parallel import rules

HELP = """runs the step again whose loss or gradient was not finite, and names what is not finite in it

A run that meets `max_bad_steps` such steps in a row leaves the folder `dump` behind.

  mim-jax replay runs/mae/dump
"""


def add(parser):
  parser.add_argument('dump', help='the folder that the stopped run named')


def run(args):
  opened = runs.open_run(Path(args.dump))
  program, train = opened.program, opened.train
  pipeline = opened.feeds.training(opened.cfg.batch_size, tuple(program.method.fields))
  batch = jax.device_put(pipeline.batch(opened.step), program.batch_sharding)
  batch.pop('corrupt')
  frozen = opened.frozen
  draws = program.method.draw(jax.random.fold_in(jax.random.key(opened.cfg.seed), train['step']), batch)
  parts = jax.jit(lambda *trees: step.gradients(program.method, *trees, opened.cfg.accumulate))
  (loss, aux), grads = parts(train, frozen, batch, draws)
  print(f'step {opened.step}: loss {float(loss)}')
  found = {'batch': batch, 'params': train['params'], 'out': aux['out'], 'gradient': grads}
  clean = True
  for title, tree in found.items():
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      if jnp.issubdtype(leaf.dtype, jnp.floating) and (bad := int(np.sum(~np.isfinite(np.asarray(leaf, np.float32))))):
        clean = False
        print(
          f'  {title}: {rules.path_name(path)} has {bad} of {leaf.size} values that are not finite, first at {_first(leaf)}'
        )
  if clean:
    print('  everything is finite: the step that stopped the run depended on something outside config, seed and data')
  return 0 if clean else 1


def _first(leaf):
  return [int(i) for i in np.argwhere(~np.isfinite(np.asarray(leaf, np.float32)))[0]]
