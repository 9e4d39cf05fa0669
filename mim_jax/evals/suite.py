"""The evaluators of a run: which exist, which are due, how they run next to their baselines, the table they end in.

An evaluator is a module with `DEFAULTS` and `run(encoder, cfg, ctx) -> {figure: float}`. It takes an encoder, never a
method. It may also have
- `BASELINES`: those of `suite.BASELINES` that make sense for it;
- `reads(cfg) -> [(source, transforms, fields, batch size)]`: what it will read, where that is not what `_reads` says;
- `check(cfg, options)`: raises ConfigError for settings that cannot work with an encoder whose `encode` takes the
  keywords `options` (`features.OPTIONS`).
"""

import dataclasses
import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections

from mim_jax import durations
from mim_jax.data import mixtures
from mim_jax.errors import ConfigError, UserError, nearest
from mim_jax.evals import features
from mim_jax.evals.features import Context, Encoder, Interrupted

__all__ = [
  'KINDS',
  'Context',
  'Encoder',
  'Evaluator',
  'Interrupted',
  'Suite',
  'build',
  'config',
  'flat',
  'settings',
  'table',
]

# Modules of mim_jax.evals.
KINDS = (
  'answers',
  'attentive',
  'classifier',
  'fewshot',
  'fid',
  'finetune',
  'knn',
  'linear',
  'propagation',
  'retrieval',
  'robustness',
  'segment',
  'tables',
  'volume_segment',
)
BASELINES = ('untrained', 'pixels')
SPLIT_SOURCES = ('tfds', 'synthetic')  # specs of the form KIND:NAME[:SPLIT]


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """One entry of `config.evals`: `name` prefixes its figures, `cfg` holds its settings, complete and checked."""

  name: str
  cfg: ml_collections.ConfigDict

  def due(self, step: int, total: int, steps_per_epoch: float, batch_size: int) -> bool:
    """Whether it runs after `step` of `total` steps: at the end unless 'never', and by its interval before."""
    every = self.cfg.every
    if every == 'never':
      return False
    if step >= total or every == 'end':
      return step >= total
    interval = durations.steps(
      every, total=total, steps_per_epoch=steps_per_epoch, batch_size=batch_size, key=f'evals.{self.name}.every'
    )
    return interval > 0 and step > 0 and step % interval == 0

  def sources(self) -> list[str]:
    """Data sources it reads, to be opened before anything is compiled."""
    named = [self.cfg[key] for key in ('train', 'test') if key in self.cfg]
    return [] if self.cfg.every == 'never' else list(dict.fromkeys(named))

  def reads(self) -> list[tuple[str, str, tuple[str, ...], int]]:
    """(source, transforms, fields, batch size) of what it will read."""
    return getattr(_module(self.cfg.kind), 'reads', _reads)(self.cfg)

  def check(self, options: frozenset[str]):
    """Raises ConfigError for settings that cannot work with an encoder of these options."""
    getattr(_module(self.cfg.kind), 'check', lambda cfg, options: None)(self.cfg, options)

  def run(self, encoder: Encoder, ctx: Context) -> dict[str, float]:
    return _module(self.cfg.kind).run(encoder, self.cfg, ctx)


def _reads(cfg):
  """What an evaluator reads that has the settings of `features.DEFAULTS`, or some of them; no fields: it knows them itself."""
  fields = (*cfg.get('fields', ()), *filter(None, [cfg.get('label', '')]))
  named = [cfg[key] for key in ('train', 'test') if key in cfg]
  return [(source, cfg.transforms, fields, cfg.batch_size) for source in dict.fromkeys(named)]


def _module(kind: str):
  return importlib.import_module(f'mim_jax.evals.{kind}')


def config(**evals: Mapping[str, Any]) -> ml_collections.ConfigDict:
  """`config.evals` with every key: config(knn={}, linear={'every': '10 epochs'}, wide={'kind': 'knn', 'k': 200})."""
  return ml_collections.ConfigDict({name: settings(name, given) for name, given in evals.items()})


def settings(name: str, given: Mapping[str, Any] | None = None) -> ml_collections.ConfigDict:
  """Settings of the evaluator `name`: the DEFAULTS of its kind with `given` put over them.

  The kind is `given['kind']`, else the name. Raises ConfigError for an unknown kind or key, or a value of another type.
  """
  where, given = f'evals.{name}', dict(given or {})
  kind = given.get('kind', name)
  if kind not in KINDS:
    raise ConfigError(f'{where}: evaluator {kind!r} is unknown; {nearest(kind, KINDS)}')
  cfg = ml_collections.ConfigDict({'kind': kind, **_module(kind).DEFAULTS})
  for key, value in given.items():
    if key not in cfg:
      raise ConfigError(f'{where} has no option {key!r}; {nearest(key, cfg.keys())}')
    cfg[key] = _like(cfg[key], value, f'{where}.{key}')
  allowed = getattr(_module(kind), 'BASELINES', BASELINES)
  unknown = set(cfg.baselines) - set(allowed)
  if unknown:
    raise ConfigError(f'{where}.baselines names {sorted(unknown)}; known: {", ".join(allowed)}')
  return cfg


def _like(default, value, where):
  """`value` as the type of `default`: whole numbers may stand for fractions, one value for a tuple of one."""
  if isinstance(default, tuple):
    value = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return tuple(_like(default[0], item, where) if default else item for item in value)
  if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if type(value) is not type(default):
    raise ConfigError(
      f'{where} is {value!r} ({type(value).__name__}); expected {type(default).__name__} such as {default!r}'
    )
  return value


def _source(spec: str, own: str, where: str) -> str:
  """':SPLIT' -> that split of the run's own source `own`; anything else is a source itself."""
  if not spec.startswith(':'):
    return spec
  kind, _, rest = own.partition(':')
  if kind in SPLIT_SOURCES and rest and len(mixtures.split_spec(own)) == 1:
    return f'{kind}:{rest.split(":")[0]}{spec}'
  if own and spec == ':train':
    return own
  raise ConfigError(
    f'{where} is {spec!r}, but data.source {own!r} has no splits by name to choose from; '
    f'give a whole source, such as {where}=folder:PATH'
  )


def build(evals: Mapping[str, Mapping[str, Any]], source: str, transforms: str, batch_size: int) -> 'Suite':
  """Evaluators of a config.

  Args:
    evals: {name: settings}, complete or not. `kind` lets one kind of evaluator run twice under different names.
    source, transforms, batch_size: the run's data.source, data.eval_transforms and batch_size, for settings that refer
      to them.

  Raises:
    ConfigError: unknown evaluator, unknown key, wrong type, or a split of a source that has none.
  """
  evaluators = []
  for name, given in evals.items():
    cfg = settings(name, given)
    for key in ('train', 'test'):
      if key not in cfg:  # an evaluator that trains nothing
        continue
      cfg[key] = _source(cfg[key], source, f'evals.{name}.{key}')
    cfg.transforms = cfg.transforms or transforms
    cfg.batch_size = cfg.batch_size or batch_size
    if cfg.every not in ('end', 'never'):  # a malformed duration is found now, not in the middle of the run
      durations.steps(cfg.every, total=100, steps_per_epoch=100, batch_size=1, key=f'evals.{name}.every')
    evaluators.append(Evaluator(name, cfg))
  return Suite(evaluators)


class Suite:
  """Evaluators of one run. Baselines do not change while training, so each is computed once and kept."""

  def __init__(self, evaluators: Sequence[Evaluator]):
    self.evaluators = list(evaluators)
    self._baselines: dict[str, dict[str, dict[str, float]]] = {which: {} for which in BASELINES}

  def due(self, step: int, total: int, steps_per_epoch: float, batch_size: int) -> list[Evaluator]:
    return [e for e in self.evaluators if e.due(step, total, steps_per_epoch, batch_size)]

  def sources(self) -> dict[str, list[str]]:
    """{evaluator: data sources}."""
    return {e.name: e.sources() for e in self.evaluators}

  def check(self, feeds, options: frozenset[str], evaluators: Sequence[Evaluator] | None = None):
    """Opens everything that the evaluators will read and looks at one example of each, before anything is compiled.

    Args:
      feeds: `data.feeds.Feeds` of the run.
      options: of the encoder, `features.options_of(method.encode)`.
      evaluators: those that will run; all that are not 'never' by default.

    Raises:
      UserError: data is missing (the message holds the command that prepares it), a field, a size or a setting does not
        fit. It names the evaluator and the argument that switches it off.
    """
    chosen = [e for e in self.evaluators if e.cfg.every != 'never'] if evaluators is None else evaluators
    for e in chosen:
      try:
        e.check(options)
        for source, transforms, fields, batch_size in e.reads():
          feeds.source(source)
          if fields:
            feeds.pipeline(source, transforms, batch_size, fields, seed=0).spec()
      except UserError as error:
        raise type(error)(
          f'{error}\n(for the evaluator {e.name!r}; --config.evals.{e.name}.every=never switches it off)'
        ) from error

  def select(self, names: Sequence[str]) -> list[Evaluator]:
    """Evaluators by name, in the order asked; raises ConfigError for an unknown one."""
    known = {e.name: e for e in self.evaluators}
    for name in names:
      if name not in known:
        raise ConfigError(f'evaluator {name!r} is not in config.evals; {nearest(name, known)}')
    return [known[name] for name in names]

  def run(
    self,
    evaluators: Sequence[Evaluator],
    trained: Encoder,
    untrained: Callable[[], Encoder],
    ctx: Context,
    pixels: Encoder | None = None,
  ) -> dict[str, dict[str, float]]:
    """Runs evaluators on the trained encoder and on the baselines they ask for.

    Args:
      untrained: makes the same encoder with its initial params; called only when needed.
      pixels: baseline on raw pixels, `features.raw_pixels()` when None.

    Returns:
      {'trained': {'knn/top1': 0.5, ...}, 'untrained': {...}, 'pixels': {...}}, without those that nobody asked for.

    Raises:
      Interrupted: between two batches.
    """
    makers = {'trained': lambda: trained, 'untrained': untrained, 'pixels': lambda: pixels or features.raw_pixels()}
    results = {}
    for which, make in makers.items():  # one after the other: only one encoder's features are in memory
      wanted = [e for e in evaluators if which == 'trained' or which in e.cfg.baselines]
      done = {} if which == 'trained' else self._baselines[which]
      missing = [e for e in wanted if e.name not in done]
      encoder = make() if missing else None
      ctx.memo.clear()
      for e in missing:
        began = time.monotonic()
        done[e.name] = e.run(encoder, ctx)
        ctx.say(f'eval {e.name} ({which}): {summary(done[e.name])} in {time.monotonic() - began:.1f} s')
      ctx.memo.clear()
      for e in wanted:
        results.setdefault(which, {}).update({f'{e.name}/{key}': value for key, value in done[e.name].items()})
    return results


def summary(figures: Mapping[str, float]) -> str:
  """Figures in one line, without those of single kinds of features."""
  return ', '.join(f'{key} {value:.4g}' for key, value in figures.items() if key.count('/') < 2)


def flat(results: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
  """Results of `Suite.run` under the names of the log: 'eval/knn/top1', and 'eval/knn/untrained/top1' of a baseline."""
  named = {}
  for which, figures in results.items():
    for key, value in figures.items():
      name, _, figure = key.partition('/')
      named[f'eval/{name}/{figure}' if which == 'trained' else f'eval/{name}/{which}/{figure}'] = value
  return named


def table(results: Mapping[str, Mapping[str, float]]) -> str:
  """Text table of results of `Suite.run`: one line per figure, one column per encoder."""
  columns = list(results)
  keys = list(dict.fromkeys(key for figures in results.values() for key in figures))
  cells = [['', *columns]]
  for key in keys:
    cells.append([key, *(f'{results[c][key]:.4f}' if key in results[c] else '-' for c in columns)])
  widths = [max(len(row[i]) for row in cells) for i in range(len(columns) + 1)]
  lines = []
  for name, *values in cells:
    padded = [f'{cell:>{width}}' for cell, width in zip(values, widths[1:], strict=True)]
    lines.append('  '.join([f'{name:<{widths[0]}}', *padded]))
  return '\n'.join(line.rstrip() for line in lines)
