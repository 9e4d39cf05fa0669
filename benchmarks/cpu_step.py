"""Images per second of a whole training step on CPU, beside a peer's.

  python benchmarks/cpu_step.py [--config.key=value ...]
  python benchmarks/cpu_step.py --peer 'PYTHON benchmarks/peers/torch_mae.py --size B --batch 16 --steps 4'

The step is the one of training, `step.assemble`: forward, backward, clipping, AdamW, the guard against non-finite values and the metrics, one
program whose train state is donated. The batch (random pixels) is in memory already. Every round starts a process of its own, which compiles,
takes `--warmup` steps untimed, then times `--steps` steps; neither starting nor compiling is in the figures. `float32` unless `--dtype` says
otherwise, on `--threads` cores.

`--peer COMMAND` is run once per round, after ours, on the same cores. It measures itself and ends its output with a line
`images_per_second N`; sizes and batch are for it to choose equal. benchmarks/peers/torch_mae.py is such a command.

Printed:
- a row per round: images/s of ours, model FLOPs per second of ours, float32 matrix product of `--peak-size` in the same process (the most
  FLOPs per second that this machine gave), images/s of the peer, ours / peer;
- medians with the least and the most over the rounds. Model FLOPs are those of `mim-jax plan` (docs/performance.md).
"""

import argparse
import json
import sys
import time

import rounds


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', default='configs/mae.py', metavar='FILE.py[:ARGUMENT]')
  parser.add_argument('--size', default='B', help="encoder: Ti, S, B, L, H or 'width/depth/heads'; '' for the recipe's")
  parser.add_argument('--dtype', default='float32', help='of matrix products; parameters stay float32')
  parser.add_argument('--batch', type=int, default=16, help='images per step')
  parser.add_argument('--steps', type=int, default=4, help='timed steps of a round')
  parser.add_argument('--warmup', type=int, default=2, help='untimed steps of a round')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--threads', type=int, default=2, help='cores that each process may use')
  parser.add_argument('--peak-size', type=int, default=4096, help='side of the matrices of the reference product')
  parser.add_argument('--peer', default='', metavar='COMMAND', help='ends with a line "images_per_second N"')
  parser.add_argument('--child', action='store_true', help=argparse.SUPPRESS)
  args, overrides = parser.parse_known_args()
  if args.child:
    return measure(args, overrides)

  rounds.pin(args.threads)
  ours, theirs, speeds, peaks = [], [], [], []
  said = False
  for number in range(1, args.rounds + 1):
    rate, lines = rounds.run([sys.executable, __file__, '--child', *sys.argv[1:]])
    facts = json.loads(lines[-1])
    if not said:
      print(
        f'{args.config}, encoder {facts["size"]}, {facts["dtype"]}, batch {args.batch}, {args.threads} threads: '
        f'{facts["flops_per_image"] / 1e9:.3g} GFLOP per image\n'
      )
      rounds.print_head(('round', 'images/s', 'GFLOP/s', 'GFLOP/s of a product', 'peer images/s', 'ours / peer'))
      said = True
    ours.append(rate)
    speeds.append(rate * facts['flops_per_image'] / 1e9)
    peaks.append(facts['peak'] / 1e9)
    if args.peer:
      theirs.append(rounds.run(args.peer)[0])
    beside = (f'{theirs[-1]:.2f}', f'{ours[-1] / theirs[-1]:.3f}') if theirs else ('', '')
    rounds.print_row((number, f'{rate:.2f}', f'{speeds[-1]:.1f}', f'{peaks[-1]:.1f}', *beside))
  print(f'\nours: {rounds.spread(ours, "{:.2f}")} images/s, {rounds.spread(speeds)} GFLOP/s')
  print(f'reference product: {rounds.spread(peaks)} GFLOP/s; ours / most of it: {max(speeds) / max(peaks):.1%}')
  if theirs:
    print(f'peer: {rounds.spread(theirs, "{:.2f}")} images/s')
    print(f'ratio ours / peer: {rounds.spread(rounds.ratios(ours, theirs), "{:.3f}")}')
  return None


def measure(args, overrides):
  """One round, in a process of its own: prints facts as JSON, then images_per_second."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from mim_jax import config, runs, step
  from mim_jax.parallel import mesh as meshes
  from mim_jax.plan import flops

  chosen = [f'--config.method.dtype={args.dtype}', f'--config.batch_size={args.batch}', '--config.accumulate=1']
  chosen += [f'--config.method.size={args.size}'] if args.size else []
  cfg = config.load([f'--config={args.config}', *chosen, *overrides])
  program = step.assemble(cfg, meshes.make_mesh(cfg.mesh), 1000 * cfg.batch_size)
  state = program.init(np.uint32(cfg.seed))
  frozen, _ = runs.frozen_networks(program, cfg.seed, '')
  rng = np.random.default_rng(0)
  batch = {name: jax.device_put(pixels(spec, rng), spec.sharding) for name, spec in program.batch.items()}
  train = program.step.lower(program.train, program.frozen, program.batch).compile()
  for count in (args.warmup, args.steps):
    jax.block_until_ready(state)
    start = time.perf_counter()
    for _ in range(count):
      state, metrics = train(state, frozen, batch)
    jax.block_until_ready((state, metrics))
    seconds = time.perf_counter() - start
  if not np.isfinite(metrics['loss']) or metrics['faults/bad_steps']:
    sys.exit(f'error: loss {metrics["loss"]}, the steps were skipped')

  side = args.peak_size
  a, b = (jnp.asarray(rng.standard_normal((side, side), np.float32)) for _ in range(2))
  product = jax.jit(jnp.dot)
  times = []
  for _ in range(4):
    start = time.perf_counter()
    product(a, b).block_until_ready()
    times.append(time.perf_counter() - start)
  facts = {
    'size': cfg.method.get('size', ''),
    'dtype': cfg.method.dtype,
    'flops_per_image': flops.per_image(cfg),
    'peak': 2 * side**3 / min(times),
  }
  print(json.dumps(facts))
  print(f'images_per_second {args.steps * args.batch / seconds}')


def pixels(spec, rng):
  """Normal numbers for a field of floats, else zeros (labels, tokens, `corrupt`)."""
  import numpy as np

  if np.issubdtype(spec.dtype, np.floating):
    return rng.standard_normal(spec.shape, np.float32).astype(spec.dtype)
  return np.zeros(spec.shape, spec.dtype)


if __name__ == '__main__':
  main()
