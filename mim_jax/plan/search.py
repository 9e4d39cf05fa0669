"""Looking for the fastest arguments that fit: how the batch is cut, what is kept for the backward pass, which mesh.

A full grid would take hundreds of compilations. This goes through the choices one after another and keeps the best of
each, the ones with the largest effect first. Scanned layers compile several times faster than unrolled ones, so
unrolling is tried last, on the winner.
"""

import math
from collections.abc import Callable

from mim_jax import config
from mim_jax.errors import ConfigError
from mim_jax.parallel.topology import Topology
from mim_jax.plan import jobs


def run(cfg, topology: Topology, examples: int, say: Callable[[str], None], plan=jobs.plan) -> dict:
  """Tries arguments: {'best': the fastest that fit, or None; 'tried': rows, fastest first}.

  Args:
    plan: makes a plan of (cfg, topology, examples); `jobs.plan`, or another one in tests.
  """
  tried: dict[tuple, dict] = {}

  def attempt(choice: dict) -> dict:
    arguments = tuple(arguments_of(cfg, choice))
    if arguments not in tried:
      say(f'{topology}: {" ".join(arguments) or "as the config is"}')
      try:
        tried[arguments] = _row(arguments, plan(jobs.changed(cfg, list(arguments)), topology, examples))
      except ConfigError as error:
        tried[arguments] = {
          'arguments': list(arguments),
          'fits': False,
          'error': str(error),
          'seconds': None,
          'hbm_bytes': None,
        }
      say(f'  {outcome(tried[arguments])}')
    return tried[arguments]

  best = {
    'method.scan': True,
    'method.remat': cfg.method.remat,
    'accumulate': cfg.accumulate,
    **{f'mesh.{axis}': cfg.mesh[axis] for axis in ('data', 'fsdp', 'tensor')},
  }
  record = attempt(best)
  for candidates in (_parts, _remats, _meshes, _unrolled):
    for change in candidates(best, cfg, topology):
      row = attempt(best | change)
      if better(row, record):
        best, record = best | change, row
      elif row['fits'] and candidates is _parts:
        break  # fewer images at once only get slower from the first that fits on
  ranked = sorted(tried.values(), key=lambda row: (not row['fits'], row['seconds'] or math.inf))
  return {
    'topology': str(topology),
    'best': record['arguments'] if record['fits'] else None,
    'tried': ranked,
  }


def _parts(best, cfg, topology):
  """Twice as many parts, up to one example per device at once."""
  parts = best['accumulate'] * 2
  while cfg.batch_size % (parts * topology.devices) == 0:
    yield {'accumulate': parts}
    parts *= 2


def _remats(best, cfg, topology):
  """Computing more again leaves room for larger parts: every policy with fewer parts as well."""
  for remat in ('none', 'dots', 'full'):
    for parts in sorted({best['accumulate'], max(cfg.accumulate, best['accumulate'] // 2), cfg.accumulate}):
      yield {'method.remat': remat, 'accumulate': parts}


def _meshes(best, cfg, topology):
  n, island = topology.devices, topology.island
  yield {'mesh.data': 1, 'mesh.fsdp': -1, 'mesh.tensor': 1}
  yield {'mesh.data': -1, 'mesh.fsdp': 1, 'mesh.tensor': 1}
  if topology.slices > 1:
    yield {'mesh.data': -1, 'mesh.fsdp': island, 'mesh.tensor': 1}
  half = 2 ** (int(math.log2(n)) // 2)
  if 1 < half < n:
    yield {'mesh.data': -1, 'mesh.fsdp': half, 'mesh.tensor': 1}
  yield {'mesh.data': 1, 'mesh.fsdp': -1, 'mesh.tensor': 2}


def _unrolled(best, cfg, topology):
  yield {'method.scan': False}


def arguments_of(cfg, choice: dict) -> list[str]:
  """The choices that differ from the config, as command line arguments."""
  flat = config.leaves(cfg)
  return [f'--config.{key}={value}' for key, value in choice.items() if flat[key] != value]


def better(row: dict, record: dict) -> bool:
  """Fits and is faster by more than half a percent, or fits where the record does not."""
  if not row['fits']:
    return False
  return not record['fits'] or row['seconds'] < record['seconds'] * 0.995


def _row(arguments, plan) -> dict:
  return {
    'arguments': list(arguments),
    'fits': plan['fits'],
    'hbm_bytes': plan['hbm_bytes'],
    'hbm_limit_bytes': plan['hbm_limit_bytes'],
    'seconds': plan.get('estimated_step_seconds'),
    'images_per_second': plan.get('images_per_second'),
    'utilisation': plan.get('estimated_utilisation'),
    'compile_seconds': plan['compile_seconds'],
  }


def outcome(row: dict) -> str:
  if 'error' in row:
    return f'cannot be: {row["error"]}'
  if not row['fits']:
    return f'does not fit: {jobs.size(row["hbm_bytes"])} of {jobs.size(row["hbm_limit_bytes"])}'
  if row['seconds'] is None:
    return f'fits: {jobs.size(row["hbm_bytes"])}'
  speed = f'{1e3 * row["seconds"]:,.1f} ms, {row["images_per_second"]:,.0f} images/s, {row["utilisation"]:.1%}'
  return f'{speed}, {jobs.size(row["hbm_bytes"])}'


def table(found: dict) -> str:
  """Everything that was tried, and the arguments to use."""
  lines = [f'{outcome(row)}   {" ".join(row["arguments"]) or "(the config as it is)"}' for row in found['tried']]
  if found['best'] is None:
    return '\n'.join(
      [*lines, '', f'nothing that was tried fits {found["topology"]}: take more devices or a smaller batch']
    )
  return '\n'.join(
    [*lines, '', f'fastest that fits {found["topology"]}: {" ".join(found["best"]) or "the config as it is"}']
  )
