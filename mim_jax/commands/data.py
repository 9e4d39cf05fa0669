"""mim-jax data: where the time of a batch goes."""

import itertools
import time

import jax
import numpy as np

from mim_jax import cli, config, step
from mim_jax.data import images
from mim_jax.data.feeds import Feeds
from mim_jax.parallel import mesh as meshes

HELP = """times the data of a config part by part: source, transforms, batch, all threads together, transfer

  mim-jax data --config=configs/mae.py:debug
  mim-jax data --config=configs/mae.py --config.data.source=folder:my_pictures --step
"""


def add(parser):
  cli.add_config(parser)
  parser.add_argument('--seconds', type=float, default=5.0, help='how long each part is timed')
  parser.add_argument('--step', action='store_true', help='also compile and time the train step')


def run(args):
  cfg = config.Recorded(cli.config_of(args))
  mesh = meshes.make_mesh({'data': 1, 'fsdp': -1, 'tensor': 1})
  feeds = Feeds(cfg.data, mesh, cfg.seed)
  source = feeds.source(cfg.data.source)
  chain = images.parse(cfg.data.transforms)
  program = step.assemble(cfg, mesh, len(source))
  pipeline = feeds.training(cfg.batch_size, tuple(program.method.fields))
  rng = np.random.default_rng(0)
  indices = rng.integers(len(source), size=4096)
  print(f'{cfg.data.source}: {len(source):,} examples, batches of {cfg.batch_size}, {cfg.data.threads} threads')

  reading = itertools.cycle(indices.tolist())
  raw = [source[i] for i in indices[:64].tolist()]
  examples = itertools.cycle(raw)
  stacked, steps = pipeline.batch(0), itertools.count()
  rows = [
    ('read', 'one thread', 1, lambda: source[next(reading)]),
    ('transform', 'one thread', 1, lambda: chain.example(next(examples), rng)),
    (
      'read + transform + batch',
      'one thread',
      cfg.batch_size,
      lambda: pipeline.batch(next(steps)),
    ),
  ]
  for name, how, count, work in rows:
    _print(name, how, _rate(work, args.seconds) * count)
  batches = pipeline.iterate(0)
  next(batches)
  _print('pipeline', f'{cfg.data.threads} threads', _rate(lambda: next(batches), args.seconds) * cfg.batch_size)
  batches.close()
  put = lambda: jax.block_until_ready(jax.device_put(stacked, program.batch_sharding))
  _print('transfer', f'{jax.device_count()} devices', _rate(put, args.seconds) * cfg.batch_size)
  if args.step:
    state = [program.init(np.uint32(cfg.seed))]
    frozen = jax.tree.map(lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), program.frozen)
    batch = jax.device_put(stacked, program.batch_sharding)

    def train():
      state[0], metrics = program.step(state[0], frozen, batch)
      jax.block_until_ready(metrics)

    train()
    _print('train step', f'{jax.device_count()} devices', _rate(train, args.seconds) * cfg.batch_size)


def _rate(work, seconds: float) -> float:
  """Calls per second."""
  start, calls = time.perf_counter(), 0
  while (passed := time.perf_counter() - start) < seconds or not calls:
    work()
    calls += 1
  return calls / passed


def _print(name: str, how: str, rate: float):
  print(f'{name:<25} {how:<12} {rate:>12,.0f} images/s {1e6 / rate:>10,.1f} us/image', flush=True)
