"""mim-jax check: a config against its data, without device work."""

import math

import jax
import numpy as np

from mim_jax import cli, config, step
from mim_jax.data.feeds import Feeds
from mim_jax.evals import features, suite
from mim_jax.parallel import mesh as meshes

HELP = """checks a config without computing anything: keys, data, fields, shapes of the whole step

Names what is missing with the command that prepares it. Nothing is compiled and no weights are made.

  mim-jax check --config=configs/mae.py:debug
"""


def add(parser):
  cli.add_config(parser)


def run(args):
  cfg = config.Recorded(cli.config_of(args))
  mesh = meshes.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1}, jax.devices()[:1])  # the shapes are the same on any
  feeds = Feeds(cfg.data, mesh, cfg.seed)
  examples = len(feeds.source(cfg.data.source))
  program = step.assemble(cfg, mesh, examples)
  evaluators = suite.build(cfg.evals, cfg.data.source, cfg.data.eval_transforms, cfg.batch_size)
  evaluators.check(feeds, features.options_of(program.method.encode))
  sources = {spec: len(feeds.source(spec)) for specs in evaluators.sources().values() for spec in specs}
  pipeline = feeds.training(cfg.batch_size, tuple(program.method.fields))
  given = {name: (spec.shape[1:], spec.dtype) for name, spec in pipeline.spec().items()}
  program.method.check_fields(given, f'{cfg.data.source} with transforms {cfg.data.transforms!r}')
  _, metrics = jax.eval_shape(program.step, program.train, program.frozen, program.batch)

  size = lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
  print(
    f'method    {cfg.method.name}: {size(program.train["params"]):,} parameters'
    + (f', {size(program.frozen):,} frozen' if program.frozen else '')
  )
  print(f'data      {cfg.data.source}: {examples:,} examples')
  for spec, count in sources.items():
    print(f'          {spec}: {count:,} examples, for evaluation')
  for name, (shape, dtype) in given.items():
    print(f'batch     {name} [{cfg.batch_size}, {", ".join(map(str, shape))}] {np.dtype(dtype).name}')
  print(
    f'run       {program.total_steps:,} steps of {cfg.batch_size} examples, {program.steps_per_epoch:,} steps an epoch'
  )
  print(f'metrics   {", ".join(sorted(metrics))}')
  print('ok')
