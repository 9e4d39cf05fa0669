"""Images per second and core of the input pipeline, beside tf.data's and PyTorch's.

  python benchmarks/input_pipeline.py
  python benchmarks/input_pipeline.py --tf-python TF_ENV/bin/python --torch-python TORCH_ENV/bin/python

Writes `--count` JPEGs of 500 x 375 pixels, quality 90, about 100 kB each, into a temporary folder (`--folder` for pictures of one's own) and
measures, pinned to one core: reading a file, decoding, random resized crop to 224 of (0.2, 1.0) of the area, flip, normalising, batch. Every
round starts a process for each, in turns; `--seconds` are timed after the first batches. The files are in the page cache by then.

- ours: `data.pipeline` from `folder:`, as the trainer reads it, batches as numpy arrays; with `--transfer` as arrays of jax;
- benchmarks/peers/tf_data.py with `--tf-python` (an environment with TensorFlow): tf.image functions in one thread, once with plain bicubic
  resizing, once antialiased, which ours and Pillow are;
- benchmarks/peers/torch_loader.py with `--torch-python` (torch and Pillow): DataLoader with one worker.

Then small images: 32 x 32 pixels decoded once into memory (`data.cache`): crop with 4 pixels of border, flip, normalise, batches of 256;
ours alone, beside the aim of 20,000 images/s.

Printed: a row per round and measured thing with its images/s and ours / it, then medians with the least and the most over the rounds.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import rounds

TRANSFORMS = 'decode | random_resized_crop(224, scale=(0.2, 1.0)) | flip | normalize'
SMALL_TRANSFORMS = 'decode | random_crop(32, pad=4) | flip | normalize'
SMALL_AIM = 20_000


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--tf-python', default='', metavar='PATH', help='interpreter that has tensorflow')
  parser.add_argument('--torch-python', default='', metavar='PATH', help='interpreter that has torch and pillow')
  parser.add_argument('--folder', default='', help='JPEGs to read instead of made ones')
  parser.add_argument('--count', type=int, default=400, help='JPEGs to make')
  parser.add_argument('--small-count', type=int, default=2000, help='small pictures to make')
  parser.add_argument('--batch', type=int, default=64)
  parser.add_argument('--threads', type=int, default=2, help='data.threads of ours; on one core all the same')
  parser.add_argument('--transfer', action='store_true', help='ours up to arrays of jax')
  parser.add_argument('--seconds', type=float, default=10.0, help='timed, of each thing and round')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--child', nargs=2, metavar=('FOLDER', 'KIND'), help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.child:
    return measure(args, *args.child)

  rounds.pin(1)
  with tempfile.TemporaryDirectory(prefix='input_pipeline_') as name:
    folder = args.folder or make_jpegs(Path(name) / 'jpegs', args.count)
    tell(folder)
    ours = [sys.executable, __file__, *sys.argv[1:], '--child']
    shared = [folder, '--batch', args.batch, '--seconds', args.seconds]
    commands = {'ours': [*ours, folder, 'large']}
    if args.tf_python:
      command = [args.tf_python, rounds.PEERS / 'tf_data.py', *shared]
      commands |= {'tf.data': command, 'tf.data, antialiased': [*command, '--antialias']}
    if args.torch_python:
      commands['torch DataLoader'] = [args.torch_python, rounds.PEERS / 'torch_loader.py', *shared]
    for option, given in (('--tf-python', args.tf_python), ('--torch-python', args.torch_python)):
      if not given:
        print(f'{option} is not given: skipped')
    print()
    compare(commands, args.rounds)

    small = make_small(Path(name) / 'small', args.small_count)
    rates = [rounds.run([*ours, small, 'small'])[0] for _ in range(args.rounds)]
    print(
      f'32 x 32 from memory: {rounds.spread(rates, "{:.0f}")} images/s; / {SMALL_AIM:,}: '
      f'{statistics.median(rates) / SMALL_AIM:.2f}'
    )
  return None


def compare(commands, count):
  """Runs the commands in turns, the first being ours, and prints what came out."""
  rates = {name: [] for name in commands}
  rounds.print_head(('round', 'what', 'images/s', 'ms per image', 'ours / it'))
  for number in range(1, count + 1):
    for name, command in commands.items():
      rate = rounds.run(command)[0]
      rates[name].append(rate)
      ratio = '' if name == 'ours' else f'{rates["ours"][-1] / rate:.3f}'
      rounds.print_row((number, name, f'{rate:.1f}', f'{1e3 / rate:.3f}', ratio))
  print()
  for name, found in rates.items():
    line = f'{name}: {rounds.spread(found)} images/s and core'
    if name != 'ours':
      line += f'; ratio ours / it: {rounds.spread(rounds.ratios(rates["ours"], found), "{:.3f}")}'
    print(line, flush=True)


def measure(args, folder, kind):
  """One round of ours: prints images_per_second."""
  import jax
  import numpy as np

  from mim_jax import config
  from mim_jax.data.feeds import Feeds
  from mim_jax.parallel import mesh as meshes

  small = kind == 'small'
  cfg = config.base()
  cfg.data.source = f'folder:{folder}'
  cfg.data.transforms = SMALL_TRANSFORMS if small else TRANSFORMS
  cfg.data.cache = small
  cfg.data.threads = args.threads
  feeds = Feeds(cfg.data, meshes.make_mesh(cfg.mesh, jax.devices()[:1]), cfg.seed)
  batch = 256 if small else args.batch
  pipeline = feeds.training(batch, ('image',))
  batches = feeds.batches(pipeline, 0) if args.transfer else pipeline.iterate(0)
  for _ in range(2 + cfg.data.prefetch):  # what was made ahead is not in the time
    next(batches)
  start, count = time.perf_counter(), 0
  while (seconds := time.perf_counter() - start) < args.seconds:
    _, made = next(batches)
    jax.block_until_ready(made)
    count += batch
  side = 32 if small else 224
  if made['image'].shape != (batch, side, side, 3) or made['image'].dtype != np.float32 or pipeline.faults:
    sys.exit(f'error: {made["image"].shape} {made["image"].dtype}, {len(pipeline.faults)} files cannot be read')
  batches.close()
  print(f'images_per_second {count / seconds}')


def picture(rng, height, width):
  """A picture [H, W, 3] uint8 with the spectrum of photographs (power falls with the square of the frequency) and some edges."""
  import cv2
  import numpy as np

  fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
  frequency = np.maximum(np.hypot(fy, fx), 1 / max(height, width))
  noise = rng.standard_normal((3, *frequency.shape)) + 1j * rng.standard_normal((3, *frequency.shape))
  waves = np.fft.irfft2(noise / frequency, s=(height, width))
  waves /= waves.std((1, 2), keepdims=True)
  colours = 0.9 * waves[:1] + 0.3 * waves  # the channels of photographs vary together
  image = np.clip(128 + 50 * colours.transpose(1, 2, 0), 0, 255).astype(np.uint8)
  for _ in range(6):
    x, y = rng.integers(width), rng.integers(height)
    part = image[y : y + rng.integers(20, 200), x : x + rng.integers(20, 200)]
    part[:] = cv2.addWeighted(
      part, 0.6, np.broadcast_to(rng.integers(256, size=3), part.shape).astype(np.uint8), 0.4, 0
    )
  return image


def make_jpegs(folder: Path, count: int) -> Path:
  """`count` JPEGs of 375 x 500 or, every fourth, 500 x 375 (height x width), in ten folders as classes."""
  import cv2
  import numpy as np

  rng = np.random.default_rng(0)
  for number in range(count):
    path = folder / f'{number % 10}' / f'{number:05}.jpg'
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = (500, 375) if number % 4 == 3 else (375, 500)
    if not cv2.imwrite(str(path), picture(rng, height, width), [cv2.IMWRITE_JPEG_QUALITY, 90]):
      sys.exit(f'error: {path} cannot be written')
  return folder


def make_small(folder: Path, count: int) -> Path:
  """`count` PNGs of 32 x 32 pixels."""
  import cv2
  import numpy as np

  rng = np.random.default_rng(0)
  folder.mkdir()
  for number in range(count):
    cv2.imwrite(str(folder / f'{number:05}.png'), rng.integers(256, size=(32, 32, 3), dtype=np.uint8))
  return folder


def tell(folder):
  sizes = [path.stat().st_size for path in Path(folder).rglob('*') if path.suffix.lower() in ('.jpg', '.jpeg')]
  if not sizes:
    sys.exit(f'error: {folder} holds no JPEG')
  print(f'{len(sizes)} JPEGs, {sum(sizes) / len(sizes) / 1e3:.0f} kB on average; one core', flush=True)


if __name__ == '__main__':
  main()
