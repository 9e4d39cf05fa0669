"""Opening a run's folder after the fact: its config, its program on the devices at hand, and its newest good checkpoint."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import ml_collections

from mim_jax import config, method, step
from mim_jax.checkpoint import init_from
from mim_jax.checkpoint.manager import Manager
from mim_jax.data.feeds import Feeds
from mim_jax.errors import CheckpointError, UserError
from mim_jax.log.panels import Panel
from mim_jax.parallel import mesh as meshes


@dataclasses.dataclass(frozen=True)
class Run:
  """A finished or running run, opened for reading.

  Attributes:
    cfg: its resolved config.
    program: what it computes, on a mesh of all devices of this process.
    feeds: its data.
    train, frozen: train state of `step`, and the frozen networks.
  """

  workdir: Path
  cfg: ml_collections.ConfigDict
  program: step.Program
  feeds: Feeds
  train: dict[str, Any]
  frozen: Any
  step: int

  @property
  def params(self):
    """What evaluators see: the average of the parameters where the run keeps one."""
    return self.train['ema'] if self.cfg.ema else self.train['params']


def read_config(workdir: str | Path) -> ml_collections.ConfigDict:
  """The resolved config of a run's folder. Raises UserError when there is none."""
  file = Path(workdir) / 'config.json'
  if not file.is_file():
    raise UserError(f'{workdir} is not the folder of a run: it has no config.json; give what --workdir was in training')
  return config.read(file)


def open_run(workdir: str | Path, data: dict[str, Any] | None = None) -> Run:
  """Opens a run's folder and reads its newest good checkpoint onto all devices.

  Args:
    data: changes to config.data, such as another `data_dir` on this machine.

  Raises:
    UserError: no run there, no checkpoint in it, or its data is missing.
  """
  cfg, program, feeds = prepare(workdir, data)
  train, at = restore(workdir, cfg, program)
  frozen, _ = frozen_networks(program, cfg.seed, cfg.frozen.path)
  return Run(Path(workdir), cfg, program, feeds, train, frozen, at)


def prepare(workdir: str | Path, data: dict[str, Any] | None = None):
  """(config, program on a mesh of all devices, feeds) of a run's folder; nothing is computed or read from a checkpoint."""
  cfg = read_config(workdir)
  cfg.data = config.merge(cfg.data, data or {}, 'data')
  mesh = meshes.make_mesh({'data': 1, 'fsdp': -1, 'tensor': 1})
  feeds = Feeds(cfg.data, mesh, cfg.seed)
  return cfg, step.assemble(cfg, mesh, len(feeds.source(cfg.data.source))), feeds


def restore(workdir: str | Path, cfg, program: step.Program, at: int | None = None) -> tuple[dict[str, Any], int]:
  """(train state, its step) of the newest good checkpoint, or of the one of step `at`. Collective.

  Raises CheckpointError when there is none, or none that is whole.
  """
  restored = Manager(Path(workdir) / 'checkpoints').restore(program.train, at)
  if restored is None:
    raise CheckpointError(f'{workdir} has no checkpoint yet; its config saves every {cfg.checkpoint.every}')
  train, meta = restored
  return train, meta['step']


def frozen_networks(program: step.Program, seed: int, path: str):
  """(frozen tree, report of what was loaded or None): from `path`, or with random weights when that is empty."""
  batch = {name: spec for name, spec in program.batch.items() if name != 'corrupt'}
  shardings = jax.tree.map(lambda leaf: leaf.sharding, program.frozen)
  frozen = jax.jit(lambda key: program.method.frozen(key, batch), out_shardings=shardings)(jax.random.key(seed))
  return init_from.load_into(frozen, path) if path else (frozen, None)


def panel_of(built: method.Method, feeds: Feeds, cfg, evaluators) -> Panel:
  """The picture of a run: on the first test data of an evaluator that reads what the run's own `eval_transforms` make, else on its training data."""
  transforms = cfg.data.eval_transforms
  source = next((e.cfg.test for e in evaluators if e.cfg.transforms in ('', transforms)), cfg.data.source)
  return Panel(built, feeds, source, transforms, cfg.panels.count)
