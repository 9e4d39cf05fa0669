"""What the peers of the input pipeline have in common: their arguments and the loop that is timed."""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def arguments(doc: str) -> argparse.ArgumentParser:
  """Parser with the arguments that benchmarks/input_pipeline.py gives every peer."""
  parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('folder', type=Path)
  parser.add_argument('--batch', type=int, default=64)
  parser.add_argument('--seconds', type=float, default=10.0)
  parser.add_argument('--size', type=int, default=224)
  return parser


def measure(batches: Iterator, args: argparse.Namespace) -> Any:
  """Takes batches for `args.seconds`, prints `images_per_second N` and returns the last of them."""
  for _ in range(4):  # what was made ahead is not in the time
    next(batches)
  start, count = time.perf_counter(), 0
  while (seconds := time.perf_counter() - start) < args.seconds:
    made = next(batches)
    count += args.batch
  print(f'images_per_second {count / seconds}')
  return made
