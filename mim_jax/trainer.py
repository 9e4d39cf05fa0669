"""The one training loop: restore, step, log, evaluate, save, stop. It knows no method and no data source."""

import contextlib
import json
import time
from operator import attrgetter
from pathlib import Path

import jax
import numpy as np

from mim_jax import config, durations, method, runs
from mim_jax.checkpoint import init_from
from mim_jax.checkpoint.manager import Manager
from mim_jax.data.feeds import Feeds
from mim_jax.errors import CheckpointError, UserError
from mim_jax.evals import features, suite
from mim_jax.log import environment, panels, record
from mim_jax.log.profile import Profiler, Timer, device_memory
from mim_jax.log.progress import Progress
from mim_jax.log.writer import Writer, read_metrics
from mim_jax.parallel import mesh as meshes
from mim_jax.parallel.preemption import StopSignal
from mim_jax.step import assemble


class Stopped(Exception):
  """The run was asked to stop; it saved itself and goes on when started again."""


def run(cfg, workdir: str | Path, began: float | None = None) -> dict[str, float]:
  """Trains as `cfg` says in the folder `workdir`, from its newest good checkpoint if it has one.

  Args:
    began: `time.monotonic()` when the program was started, to tell how long start-up took.

  Returns:
    The figures of the last evaluation, by name.

  Raises:
    UserError: config, data or checkpoint cannot be used; nothing was compiled before anything that can be found without it.
    Stopped: SIGTERM or Ctrl-C; everything is saved.
  """
  with contextlib.ExitStack() as stack:
    return Trainer(cfg, Path(workdir), stack, began).train()


class Trainer:
  """A run: everything that is set up once, and what is done at steps."""

  def __init__(self, cfg, workdir: Path, stack: contextlib.ExitStack, began: float | None = None):
    self.cfg = cfg = config.Recorded(cfg)
    self.workdir = workdir
    self.began = time.monotonic() if began is None else began
    meshes.start()
    self.mesh = meshes.make_mesh(cfg.mesh)
    self.first_process = jax.process_index() == 0
    self.progress = progress = Progress(active=self.first_process)
    stack.callback(progress.close)
    devices = jax.devices()
    progress.say(
      f'{len(devices)} x {devices[0].device_kind}, mesh {dict(self.mesh.shape)}, {jax.process_count()} process(es)'
    )

    self.feeds = Feeds(cfg.data, self.mesh, cfg.seed)
    with progress.stage(f'opening {cfg.data.source}'):
      examples = len(self.feeds.source(cfg.data.source))
    self.program = program = assemble(cfg, self.mesh, examples)
    self.suite = suite.build(cfg.evals, cfg.data.source, cfg.data.eval_transforms, cfg.batch_size)
    self.suite.check(self.feeds, features.options_of(program.method.encode))
    self.pipeline = self.feeds.training(cfg.batch_size, tuple(program.method.fields))
    given = {name: (spec.shape[1:], spec.dtype) for name, spec in self.pipeline.spec().items()}
    program.method.check_fields(given, f'{cfg.data.source} with transforms {cfg.data.transforms!r}')

    self.max_corrupt = cfg.data.max_corrupt
    self.log_every = self._interval('log_every')
    self.save_every = self._interval('checkpoint.every')
    self.panel_every = self._interval('panels.every')
    self.profiler = Profiler(cfg.log.profile, workdir, progress.say)
    stack.callback(self.profiler.close)
    keep_every = self._interval('checkpoint.keep_every')
    self.manager = Manager(
      workdir / 'checkpoints',
      keep=cfg.checkpoint.keep,
      keep_every=keep_every or None,
      best=cfg.checkpoint.best or None,
      best_mode=cfg.checkpoint.best_mode,
    )
    stack.callback(self.manager.close)
    sections = {name: dict(cfg[name]) for name in ('init_from', 'frozen', 'log', 'panels')}
    known = config.leaves(config.base()) | {
      f'method.{key}': value for key, value in method.defaults(cfg.method.name).items()
    }
    config.require_read(cfg, known)
    self._check_folder()
    self._restore(sections)

    self.writer = Writer(
      workdir,
      resume_step=self.start or -1,
      tensorboard=cfg.log.tensorboard,
      wandb=cfg.log.wandb,
      config=cfg.cfg.to_dict(),
    )
    stack.callback(self.writer.close)
    self.stop = StopSignal()
    stack.callback(self.stop.close)

  # ---- set-up ----

  def _interval(self, key: str) -> int:
    """Steps between two of what the config's `key` is about; 0 for 'never' and ''."""
    p, every = self.program, attrgetter(key)(self.cfg)
    if every in ('', 'never'):
      return 0
    return durations.steps(
      every, total=p.total_steps, steps_per_epoch=p.steps_per_epoch, batch_size=self.cfg.batch_size, key=key
    )

  def _check_folder(self):
    """Refuses a folder that holds a run of another config, and writes config.json and env.json of this one."""
    cfg, file = self.cfg.cfg, self.workdir / 'config.json'
    if file.exists():
      other = config.read(file)
      if config.digest(other) != config.digest(cfg):
        theirs, ours = config.leaves(other), config.leaves(cfg)
        changed = [
          f'  {k}: {theirs.get(k)!r} there, {ours.get(k)!r} here'
          for k in sorted(theirs | ours)
          if theirs.get(k) != ours.get(k)
        ]
        raise CheckpointError(
          '\n'.join(
            [
              f'{self.workdir} holds a run of another config:',
              *changed,
              'choose another --workdir, or start from its weights with --config.init_from.path',
            ]
          )
        )
    if self.first_process:
      self.workdir.mkdir(parents=True, exist_ok=True)
      config.save(cfg, file)
      (self.workdir / 'env.json').write_text(json.dumps(environment.collect(), indent=2) + '\n')

  def _restore(self, sections):
    """Sets self.state, self.start and self.pending from the newest good checkpoint, or makes the state of step 0."""
    program, cfg = self.program, self.cfg
    restored = self.manager.restore(program.train)
    for refused in self.manager.refused:
      self.progress.say(f'checkpoint refused: {refused}')
    if restored is not None:
      self.state, meta = restored
      self.start, self.pending = meta['step'], meta['pending']
      self.progress.say(f'resuming at step {self.start} of {program.total_steps}')
    else:
      self.start, self.pending = 0, False
      with self.progress.stage('initialising'):
        self.state = jax.block_until_ready(program.init(np.uint32(cfg.seed)))
      if sections['init_from']['path']:
        self._start_from(sections['init_from'])
    self.frozen, report = runs.frozen_networks(program, cfg.seed, sections['frozen']['path'])
    if report:
      self.progress.say(str(report))
    elif jax.tree.leaves(self.frozen):
      self.progress.say('frozen networks have random weights: config.frozen.path names none')

  def _start_from(self, options):
    params, report = init_from.load_into(self.state['params'], **options)
    self.progress.say(str(report))
    self.state['params'] = params
    self.state['state'] = jax.jit(
      self.program.method.state, out_shardings=jax.tree.map(lambda x: x.sharding, self.state['state'])
    )(params)
    if self.cfg.ema:
      self.state['ema'] = jax.tree.map(lambda x: x.copy(), params)

  # ---- the loop ----

  def train(self) -> dict[str, float]:
    program, cfg, progress = self.program, self.cfg, self.progress
    total = program.total_steps
    figures = {}
    if self.pending:
      figures = self._evaluate(self.start)
    if self.start >= total:
      self.progress.say(f'this run is complete ({total} steps)')
      return self._finish(figures)
    with self.progress.stage('compiling the train step'):
      step_fn = program.step.lower(program.train, program.frozen, program.batch).compile()
    progress.total, progress.batch_size = total, cfg.batch_size
    timer, metrics = Timer(cfg.batch_size), {}
    with contextlib.closing(self.feeds.batches(self.pipeline, self.start)) as batches:
      for done in range(self.start + 1, total + 1):
        with timer.data(metrics.get('loss')):
          _, batch = next(batches)
        with self.profiler.step(done - 1, self.state):
          self.state, metrics = step_fn(self.state, self.frozen, batch)
        timer.step()
        if done == self.start + 1:
          jax.block_until_ready(metrics)
          progress.say(f'first step after {time.monotonic() - self.began:.1f} s')
          timer.read()  # start-up is no time of a step
        if self._due(done, self.log_every) or done == total:
          self._log(done, jax.device_get(metrics), timer)
        else:
          progress.tick(done)
        drawing = self._due(done, self.panel_every) or done == total
        evaluating = self._due_evals(done)
        saving = self._due(done, self.save_every) or done == total
        if drawing or evaluating or saving:
          with timer.pause(metrics):
            if drawing:
              self._panels(done)
            if evaluating:
              figures = self._evaluate(done)
            if saving:
              self._save(done, metrics=figures)
        if self.stop():
          self._leave(done, pending=False)
    return self._finish(figures)

  def _due(self, done: int, every: int) -> bool:
    return every > 0 and done % every == 0

  def _due_evals(self, done: int):
    p = self.program
    return self.suite.due(done, p.total_steps, p.steps_per_epoch, self.cfg.batch_size)

  def _log(self, done: int, metrics: dict, timer: Timer):
    metrics = {name: value.item() for name, value in metrics.items()}
    times, memory = timer.read(), device_memory()
    self.writer.write(done, {**metrics, **times, **{f'memory/{name}': value for name, value in memory.items()}})
    self.progress.update(done, metrics['loss'], metrics['lr'], times.get('time/images_per_s'), memory)
    for fault in self.pipeline.faults:
      self.progress.say(f'step {fault.step}: {fault.key} cannot be read and was replaced: {fault.error}')
    self.pipeline.faults.clear()
    if metrics['faults/corrupt'] > self.max_corrupt * done * self.cfg.batch_size:
      self._save(done)
      raise UserError(
        f'{metrics["faults/corrupt"]} of {done * self.cfg.batch_size} examples could not be read, more than data.max_corrupt={self.max_corrupt} allows; '
        'the messages above name them'
      )
    if int(self.state['faults']['longest']) >= self.cfg.max_bad_steps:
      self._dump()

  def _save(self, done: int, pending: bool = False, metrics: dict | None = None):
    meta = {'pending': pending, 'config': config.digest(self.cfg.cfg)}
    self.manager.save(done, self.state, meta, metrics or None)

  def _leave(self, done: int, pending: bool):
    """Saves at once and leaves; `pending`: the evaluation of this step was interrupted and is still due."""
    self.progress.say(f'asked to stop: saving step {done}')
    self._save(done, pending=pending)
    self.manager.wait()
    raise Stopped(f'stopped at step {done}; the same command goes on from there')

  def _dump(self):
    """Writes what is needed to run the step again that was not finite, and stops."""
    at = int(self.state['faults']['last_bad'])
    folder = self.workdir / 'dump'
    with contextlib.closing(Manager(folder / 'checkpoints', keep=1)) as manager:
      manager.save(at, {**self.state, 'step': self.state['step'] * 0 + at}, {'config': config.digest(self.cfg.cfg)})
    if self.first_process:
      config.save(self.cfg.cfg, folder / 'config.json')
    raise UserError(
      f'loss or gradient was not finite in {self.cfg.max_bad_steps} steps in a row, the last of them step {at}; no tree was changed by them.\n'
      f'`mim-jax replay {folder}` runs that step again and names what is not finite. Usual causes: too high a rate (optim.base_lr), no warmup, broken data'
    )

  # ---- what is looked at ----

  @property
  def shown_params(self):
    return self.state['ema'] if self.cfg.ema else self.state['params']

  def _panels(self, done: int):
    """Pictures of what the method sees and predicts on the first examples of its evaluation data; the same ones every time."""
    if self.program.method.panels is None or not self.panel_every:
      return
    if not hasattr(self, '_panel'):
      self._panel = runs.panel_of(self.program.method, self.feeds, self.cfg, self.suite.evaluators)
    self.writer.picture(done, 'panel', self._panel.draw(self.shown_params, self.state['state'], self.frozen))

  def _evaluate(self, done: int) -> dict[str, float]:
    due = self._due_evals(done)
    context = features.Context(
      mesh=self.mesh,
      open_source=self.feeds.source,
      open_batches=self.feeds.evaluation,
      stop=self.stop,
      picture=lambda name, image: self.writer.picture(done, name, image),
      say=self.progress.say,
    )
    encoder = features.from_method(self.program.method, self.shown_params, self.state['state'], frozen=self.frozen)
    try:
      results = self.suite.run(due, encoder, self._untrained, context)
    except suite.Interrupted:
      self._leave(done, pending=True)
    figures = suite.flat(results)
    self.writer.write(done, figures)
    self.progress.say(f'evaluation at step {done}\n{suite.table(results)}')
    return figures

  def _untrained(self):
    fresh = self.program.init(np.uint32(self.cfg.seed))
    return features.from_method(
      self.program.method, fresh['params'], fresh['state'], name='untrained', frozen=self.frozen
    )

  def _finish(self, figures: dict[str, float]) -> dict[str, float]:
    self.manager.wait()
    if self.first_process:
      rows = read_metrics(self.workdir / 'metrics.jsonl')
      panels.loss_curve(rows, self.workdir / 'panels' / 'loss.png')
      recorded = {key: value for row in rows for key, value in row.items() if key.startswith('eval/')}
      self.progress.say(summary(self.workdir, recorded))
    return figures


def summary(workdir: Path, figures: dict) -> str:
  """What a finished run leaves behind: figures next to their baselines, and the path of each thing."""
  lines = []
  told = {}
  for key in record.headlines(figures):
    evaluator, figure, _ = record.evaluation(key)
    told.setdefault(evaluator, []).append(figure)
  for evaluator, given in sorted(told.items()):
    figure = next((name for name in record.FIRST if name in given), given[0])
    number = '{:.1%}' if figure == 'top1' else '{:.4g}'
    beside = [
      f'{which} {number.format(figures[f"eval/{evaluator}/{which}/{figure}"])}'
      for which in record.BASELINES
      if f'eval/{evaluator}/{which}/{figure}' in figures
    ]
    value = number.format(figures[f'eval/{evaluator}/{figure}'])
    lines.append(f'{evaluator:>8}: {figure} {value}' + (f'   ({", ".join(beside)})' if beside else ''))
  pictures = sorted((workdir / 'panels').glob('panel_*.png'))
  lines += [f'  curve: {workdir / "panels" / "loss.png"}']
  lines += [f'  panel: {pictures[-1]}'] if pictures else []
  lines += [f' figures: {workdir / "metrics.jsonl"}', f' weights: {workdir / "checkpoints"}']
  return '\n'.join(['done', *lines])
