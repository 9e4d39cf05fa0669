"""Plans of configs on topologies, each compiled in a process of its own (`worker`)."""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from mim_jax import config
from mim_jax.errors import ConfigError, UserError
from mim_jax.parallel import topology as topologies

# What a plan says only of a program that could be compiled.
ESTIMATES = (
  *('hlo_flops', 'hlo_memory_bytes', 'collectives', 'contributors', 'contributors_by', 'notes'),
  *('estimated_cycles', 'estimated_kernel_cycles', 'estimated_other_cycles', 'estimated_by', 'estimated_step_seconds'),
  *('estimated_utilisation', 'roofline_seconds', 'waiting_seconds', 'images_per_second', 'hours', 'device_hours'),
)


def plan(cfg, topology: topologies.Topology, examples: int, hlo_file: str = '') -> dict:
  """`worker.plan` in a process with the right environment. Raises UserError as it does, and when that dies."""
  topologies.require_compiler(topology)
  with tempfile.TemporaryDirectory(prefix='mim_jax_plan_') as name:
    folder = Path(name)
    config.save(cfg, folder / 'config.json')
    job = {'topology': str(topology), 'examples': examples, 'hlo': hlo_file and str(Path(hlo_file).absolute())}
    (folder / 'job.json').write_text(json.dumps(job))
    command = [sys.executable, '-m', 'mim_jax.plan.worker', name]
    done = subprocess.run(
      command, env=topologies.environment(topology), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if not (folder / 'answer.json').is_file():
      last = '\n'.join(done.stdout.splitlines()[-15:])
      raise UserError(
        f'{topology}: the process that compiles ended with code {done.returncode} '
        f'(out of memory on this machine, if -9):\n{last}'
      )
    answer = json.loads((folder / 'answer.json').read_text())
  if 'error' in answer:
    raise (ConfigError if answer['config'] else UserError)(answer['error'])
  return answer['plan']


def fitting_plan(
  cfg, topology: topologies.Topology, examples: int, say: Callable[[str], None], hlo_file: str = ''
) -> dict:
  """The plan of `cfg`; where it does not fit, `fits` is False and the estimates are those of a change that does.

  That change is the smallest number of parts (`accumulate`, which leaves the results of a step as they are) that fits,
  or for losses that tie examples together the first `remat` that does. `fits_with` holds its arguments and
  `fits_with_hbm_bytes` its memory; None when nothing fits.
  """
  found = plan(cfg, topology, examples, hlo_file)
  if found['fits']:
    return found | {'fits_with': None, 'fits_with_hbm_bytes': None}
  say(
    f'{topology}: does not fit, {size(found["hbm_bytes"])} of {size(found["hbm_limit_bytes"])}; looking for what does'
  )
  for changes in remedies(found):
    say(f'{topology}: trying {" ".join(changes)}')
    other = plan(changed(cfg, changes), topology, examples, hlo_file)
    if other['fits']:
      estimates = {name: other[name] for name in (*ESTIMATES, 'compile_seconds')}
      return found | estimates | {'fits_with': changes, 'fits_with_hbm_bytes': other['hbm_bytes']}
  nothing = dict.fromkeys(ESTIMATES) | {'contributors': [], 'collectives': [], 'notes': []}
  return found | nothing | {'fits_with': None, 'fits_with_hbm_bytes': None}


def remedies(found: dict) -> list[list[str]]:
  """Changes to try on a plan that does not fit, the gentlest first."""
  arguments = sum(found['hbm'][name] for name in ('params', 'optimizer', 'state', 'frozen'))
  free = found['hbm_limit_bytes'] - arguments
  if free <= 0:
    return []
  if found['couples']:
    order = ('none', 'dots', 'full')
    return [[f'--config.method.remat={remat}'] for remat in order[order.index(found['remat']) + 1 :]]
  parts = 2 ** math.ceil(math.log2(max(2, (found['hbm_bytes'] - arguments) / free)))
  at_once = found['images_per_device_at_once']
  tries = []
  while at_once % parts == 0 and len(tries) < 3:
    tries.append([f'--config.accumulate={found["accumulate"] * parts}'])
    parts *= 2
  return tries


def changed(cfg, arguments: list[str]):
  """A copy of `cfg` with '--config.key=value' put over it; values of integers and strings."""
  copy = cfg.copy_and_resolve_references()
  for argument in arguments:
    key, _, value = argument.removeprefix('--config.').partition('=')
    *path, last = key.split('.')
    place = copy
    for name in path:
      place = place[name]
    place[last] = value == 'True' if isinstance(place[last], bool) else type(place[last])(value)
  return copy


def size(count: float) -> str:
  """Bytes for people."""
  return f'{count / 2**30:.2f} GiB' if count >= 2**28 else f'{count / 2**20:.1f} MiB'
