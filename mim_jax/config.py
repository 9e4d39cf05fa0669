"""The config of a run: every key with its default, recipes put over it, and proof that nothing in it is misspelt or ignored.

A recipe is a Python file with `get_config(arg='')`; `configs/mae.py:size=L,epochs=1600` passes the part after the colon to it. It starts
from `base()`, which holds every key the trainer knows, adds the options of its method (`method.options`) and of its evaluators
(`evals.suite.config`), and sets what its paper sets. `--config.data.source=...` then overrides single values by type.

A key that does not exist is an error where it is set. A key that was set and that no code had read when the first step is due is an error
too (`unread`): it would have had no effect.
"""

import ast
import contextlib
import dataclasses
import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

import mim_jax
from mim_jax.errors import ConfigError, nearest


def base() -> ml_collections.ConfigDict:
  """Every key of a run with its default. Durations are '800 epochs', '1000 steps', '1e6 examples' or '5%' of the run."""
  return ml_collections.ConfigDict(
    {
      'seed': 0,  # of initialisation, data order, augmentation and masking
      'method': {},  # filled by method.options(name, ...)
      'batch_size': 256,  # global, over all devices and accumulated parts
      'accumulate': 1,  # parts that a step's batch is computed in, one after another
      'duration': '100 epochs',
      'log_every': '50 steps',
      'fused_attention': True,  # kernels of TPUs and GPUs where shapes allow; False: the plain form everywhere
      'max_bad_steps': 10,  # non-finite steps in a row that stop the run
      'data': {
        'source': 'synthetic:shapes:train',  # tfds:NAME:SPLIT | folder:PATH | synthetic:WORLD:SPLIT | arrays:FILE.npz; several: 'a, b'
        'weights': (),  # share of each source when there are several
        'data_dir': '',  # where TFDS data sets lie; '' is the default of TFDS or of the synthetic worlds
        'transforms': 'decode | random_resized_crop(224, scale=(0.2, 1.0)) | flip | normalize',
        'eval_transforms': 'decode | resize(256) | center_crop(224) | normalize',  # of evaluators and panels
        'cache': False,  # decode all images once into memory (small sets)
        'threads': 2,  # that read and augment, per process
        'prefetch': 2,  # batches made ahead of the step
        'max_corrupt': 0.01,  # fraction of unreadable examples that stops the run
      },
      'mesh': {'data': -1, 'fsdp': 1, 'tensor': 1},  # -1: all devices that are left
      'rules': (),  # (regex, (axis or None, ...)) pairs tried before the default sharding rules
      'optim': {
        'name': 'adamw',  # adamw | adam (decay added to the gradient) | lars | sgd | lion
        'base_lr': 1.5e-4,
        'lr_batch': 256,  # the rate is base_lr * batch_size / lr_batch; 0: base_lr as it is
        'b1': 0.9,  # adamw, adam, lion
        'b2': 0.95,
        'eps': 1e-8,  # adamw, adam
        'momentum': 0.9,  # sgd, lars
        'nesterov': False,  # sgd
        'trust': 0.001,  # lars
        'mu_dtype': 'float32',  # storage of the first moment
        'wd': 0.05,
        'no_wd': r'bias$|scale$',  # parameters without weight decay, by path
        'no_wd_1d': False,  # nor for any tensor that has one dimension in its layer
        'lr_mult': (),  # (regex, factor) pairs; the first that matches counts
        'layer_decay': 1.0,  # rate of a layer of the encoder over that of the next one
        'clip': 0.0,  # largest global norm of the gradient; 0: no limit
      },
      'schedule': {
        'name': 'cosine',  # cosine | linear | constant
        'warmup': '0 steps',
        'start_lr': 0.0,  # rate of step 0 when there is a warmup
        'min_lr': 0.0,  # rate at the end, not scaled by the batch
        'per_epoch': False,  # the rate changes at the starts of epochs only
        'warmup_to_peak': False,  # the last step (epoch) of the warmup has the peak already
      },
      'ema': 0.0,  # momentum of an average of the parameters that evaluators then use; 0: none
      'checkpoint': {
        'every': '1 epochs',
        'keep': 2,  # newest ones
        'keep_every': 'never',  # these stay for good
        'best': '',  # metric whose best checkpoint stays, such as 'eval/knn/top1'
        'best_mode': 'max',
      },
      'init_from': {
        'path': '',  # run folder, checkpoint or .safetensors whose params this run starts from
        'which': 'params',  # params | ema
        'rename': (),  # (regex, replacement) pairs on its paths
        'allow_missing': '',  # regex of our paths that may be absent there
      },
      'frozen': {
        'path': ''
      },  # weights of teacher or tokenizer; '': random ones of the same shape, for trying things out
      'evals': {},  # name -> options, see mim_jax.evals
      'panels': {'every': '10%', 'count': 8},  # pictures of what the method sees and predicts; every 'never' for none
      'log': {
        'tensorboard': False,
        'wandb': '',  # project name
        'profile': '',  # steps to trace, 'FIRST:LAST'
      },
    }
  )


def section(name: str, /, **overrides) -> ml_collections.ConfigDict:
  """One section of `base()` with `overrides` put over it."""
  return merge(base()[name], overrides, name)


def merge(defaults, overrides: Mapping[str, Any], where: str) -> ml_collections.ConfigDict:
  """`defaults` with `overrides` put over them, nested mappings alike. Raises ConfigError for a key that `defaults` lacks."""
  cfg = ml_collections.ConfigDict(defaults)
  for key, value in overrides.items():
    if key not in cfg:
      raise ConfigError(f'{where} has no key {key!r}; {nearest(key, cfg.keys())}')
    if isinstance(cfg[key], ml_collections.ConfigDict) and isinstance(value, Mapping):
      cfg[key] = merge(cfg[key], value, f'{where}.{key}')
    elif isinstance(cfg[key], int) and isinstance(value, tuple):  # a size given per axis
      with cfg.ignore_type():
        cfg[key] = value
    else:
      cfg[key] = value
  return cfg


def arguments(text: str, **defaults) -> ml_collections.ConfigDict:
  """A recipe's argument 'debug' or 'size=L,epochs=1600' over its `defaults`; a bare word is a flag set to True."""
  args = ml_collections.ConfigDict(defaults)
  for part in filter(None, text.split(',')):
    key, equals, value = part.partition('=')
    if key not in args:
      raise ConfigError(f'recipe argument {key!r} is unknown; {nearest(key, args.keys())}')
    try:
      parsed = type(args[key])(ast.literal_eval(value)) if equals and not isinstance(args[key], str) else value or True
      args[key] = parsed
    except (ValueError, SyntaxError, TypeError) as error:
      raise ConfigError(
        f'recipe argument {part!r}: expected a {type(args[key]).__name__}, such as {key}={defaults[key]}'
      ) from error
  return args


def laptop(cfg: ml_collections.ConfigDict, steps: int, base_lr: float, batch_size: int = 64):
  """Sets what `:debug` recipes have in common: a short run from memory, logged often, at a rate for its own batch."""
  cfg.data.cache = True
  cfg.batch_size = batch_size
  cfg.optim.base_lr, cfg.optim.lr_batch = base_lr, 0
  cfg.duration = f'{steps} steps'
  cfg.schedule.warmup = '10%'
  cfg.log_every = '20 steps'
  cfg.checkpoint.every = f'{steps // 2} steps'


def load(args: Sequence[str]) -> ml_collections.ConfigDict:
  """The config of `--config=FILE[:argument] [--config.key=value ...]`. Raises ConfigError for anything that does not fit."""
  path = next((arg.split('=', 1)[1] for arg in args if arg.startswith('--config=')), None)
  if path is None:
    raise ConfigError(
      'no recipe given: expected --config=FILE.py[:argument], for example --config=configs/mae.py:debug'
    )
  name, _, argument = path.partition(':')
  package = Path(mim_jax.__file__).parent  # recipes lie beside the package in a checkout and inside it in a wheel
  file = next((root / name for root in (Path(), package.parent, package) if (root / name).is_file()), None)
  if file is None:
    raise ConfigError(
      f'{name}: no such recipe in {Path().absolute()} or {package.parent}; those of this project are configs/*.py'
    )
  for arg in args:
    if not arg.startswith('--config'):
      raise ConfigError(f'unknown argument {arg!r}; a config value is set by --config.key=value')
  values = flags.FlagValues()
  args = [f'--config={file}:{argument}' if arg == f'--config={path}' else arg for arg in args]
  config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=['mim-jax', *args])
  known = leaves(_recipe(file, argument))
  for arg in args:
    key = arg.partition('=')[0].removeprefix('--config')
    if key and key.removeprefix('.') not in known:
      raise ConfigError(f'config has no key {key[1:]!r}; {nearest(key[1:], known)}')
  try:
    values(['mim-jax', *args])
  except flags.Error as error:
    raise ConfigError(str(error)) from error
  return values.config


def _recipe(file: Path, argument: str):
  spec = importlib.util.spec_from_file_location('recipe', file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(argument)


def leaves(cfg, prefix: str = '') -> dict[str, Any]:
  """All values by dotted key."""
  flat = {}
  for key, value in cfg.items():
    if isinstance(value, Mapping | ml_collections.ConfigDict):
      flat |= leaves(value, f'{prefix}{key}.')
    else:
      flat[prefix + key] = value
  return flat


def digest(cfg) -> str:
  """Short fingerprint of what decides the numbers of a run: everything but logging, checkpoint intervals and evaluators."""
  kept = {
    key: value
    for key, value in cfg.to_dict().items()
    if key not in ('log', 'log_every', 'checkpoint', 'evals', 'panels', 'mesh', 'rules')
  }
  return hashlib.sha256(json.dumps(kept, sort_keys=True, default=list).encode()).hexdigest()[:12]


def save(cfg, path: str | Path):
  """Writes the resolved config as JSON."""
  Path(path).write_text(json.dumps(cfg.to_dict(), indent=2) + '\n')


def read(path: str | Path) -> ml_collections.ConfigDict:
  """A config as `save` wrote it; lists become tuples again."""

  def restore(value):
    if isinstance(value, dict):
      return {key: restore(item) for key, item in value.items()}
    return tuple(restore(item) for item in value) if isinstance(value, list) else value

  return ml_collections.ConfigDict(restore(json.loads(Path(path).read_text())))


@dataclasses.dataclass
class Recorded(Mapping):
  """A config that remembers which of its leaves were read, by dotted key."""

  cfg: ml_collections.ConfigDict
  prefix: str = ''
  reads: set[str] = dataclasses.field(default_factory=set)

  def __getitem__(self, key):
    value = self.cfg[key]
    if isinstance(value, ml_collections.ConfigDict):
      return Recorded(value, f'{self.prefix}{key}.', self.reads)
    self.reads.add(self.prefix + key)
    return value

  def __getattr__(self, key):
    if key.startswith('__'):
      raise AttributeError(key)
    with contextlib.suppress(KeyError):
      return self[key]
    raise AttributeError(f'config has no key {self.prefix + key!r}')

  def __contains__(self, key) -> bool:
    return key in self.cfg

  def __iter__(self) -> Iterator[str]:
    return iter(self.cfg)

  def __len__(self) -> int:
    return len(self.cfg)


def unread(recorded: Recorded, defaults: Mapping[str, Any]) -> list[str]:
  """Keys that were set to something else than in `defaults` (by dotted key) and that nobody read."""
  flat = leaves(recorded.cfg)
  return sorted(
    key for key, value in flat.items() if key not in recorded.reads and (key not in defaults or defaults[key] != value)
  )


def require_read(recorded: Recorded, defaults: Mapping[str, Any]):
  """Raises ConfigError naming the keys of `unread`, each with the nearest key that was read."""
  ignored = unread(recorded, defaults)
  if ignored:
    lines = [
      f'  {key} = {leaves(recorded.cfg)[key]!r}; of the keys that have an effect, {nearest(key, recorded.reads)}'
      for key in ignored
    ]
    raise ConfigError(
      '\n'.join(
        [
          'these config keys were set but have no effect in this run:',
          *lines,
          'remove them, or set what makes them count',
        ]
      )
    )
