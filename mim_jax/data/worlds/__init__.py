"""Synthetic worlds: learning problems rendered by code, prepared once and read back through TFDS.

A world is one module that makes a `build.World` named WORLD and has a line in `WORLDS`. `build` turns it into a data
set in the layout of TFDS (ArrayRecord), each example a function of (seed, split, index).

A spec names a world, options and a split: `WORLD[/OPTION=VALUE,...][:SPLIT]`

    shapes                              the defaults, split train
    shapes:validation                   SPLIT as TFDS writes it: train, train[:10%], train+validation
    shapes/size=128,train=5000:train    other options; each choice of options has a folder of its own

In a config: `data.source = 'synthetic:shapes/size=128:train'`. To prepare: `python -m mim_jax.data.worlds SPEC`.
"""

import importlib
import os
import re
from pathlib import Path

from mim_jax.errors import ConfigError, MissingData, nearest

# name -> module with its WORLD, imported when it is first asked for.
WORLDS = {
  'moving': 'mim_jax.data.worlds.moving',
  'organs': 'mim_jax.data.worlds.organs',
  'questions': 'mim_jax.data.worlds.questions',
  'shapes': 'mim_jax.data.worlds.shapes',
  'stains': 'mim_jax.data.worlds.stains',
  'tables': 'mim_jax.data.worlds.tables',
}


def data_dir(path='') -> Path:
  """Where worlds lie: `path` if given, else $MIM_JAX_DATA, else ~/.cache/mim_jax/data."""
  return Path(path or os.environ.get('MIM_JAX_DATA') or '~/.cache/mim_jax/data').expanduser()


def get(name):
  """The `build.World` called `name`. Raises ConfigError for an unknown one."""
  if name not in WORLDS:
    raise ConfigError(f'there is no synthetic world {name!r}; {nearest(name, WORLDS)}')
  return importlib.import_module(WORLDS[name]).WORLD


def parse(spec):
  """`WORLD[/OPTION=VALUE,...][:SPLIT]`, with or without `synthetic:` before it, as (world, options, split).

  `options` holds every option of the world, given or by default; `split` is 'train' unless given. Raises ConfigError,
  naming the part that is wrong.
  """
  match = re.fullmatch(r'(?:synthetic:)?(\w+)(?:/([^:]*))?(?::(.+))?', spec.strip())
  if not match:
    raise ConfigError(
      f'{spec!r} names no synthetic world; expected WORLD[/OPTION=VALUE,...][:SPLIT], such as shapes/size=128:train'
    )
  name, given, split = match.groups()
  world = get(name)
  options = {}
  for part in given.split(',') if given is not None else ():
    key, equals, value = part.partition('=')
    if not equals or not key or not value:
      raise ConfigError(f'{spec!r}: {part!r} is no option; expected OPTION=VALUE, separated by commas')
    if key in options:
      raise ConfigError(f'{spec!r} gives {key!r} twice')
    options[key] = value
  return world, world.options(**options), split or 'train'


def prepare(spec, data_dir='', workers=None, **options) -> Path:
  """Renders the world of `spec` unless that is done, and gives the folder of the data set.

  Args:
    spec: as in `parse`; a split in it is ignored, all splits are made.
    data_dir: as in `data_dir()`.
    workers: processes; by default one per CPU this process may use.
    options: options by name, on top of those in `spec`.

  A preparation that is killed leaves nothing that could be taken for a data set, and any number may run at once: one
  renders, the others wait for it. Progress goes to stderr.
  """
  from mim_jax.data.worlds import build

  world, chosen, _ = parse(spec)
  chosen = world.options(**{**chosen, **options})
  return build.prepare(world, chosen, folder(world, chosen, data_dir), workers)


def folder(world, options, data_dir='') -> Path:
  """The folder of a world with these options, prepared or not: DATA_DIR/WORLD/OPTIONS/VERSION, as TFDS lays it out."""
  return _root(data_dir) / world.name / world.config(options) / world.version


def locate(spec, data_dir=''):
  """(folder, split) of a prepared world, for `tfds.builder_from_directory(folder)`.

  Raises MissingData with the command that prepares it, ConfigError for a wrong spec.
  """
  world, options, split = parse(spec)
  path = folder(world, options, data_dir)
  if not is_prepared(path):
    changed = ','.join(f'{k}={v}' for k, v in options.items() if v != world.defaults[k])
    place = f' --data_dir={data_dir}' if data_dir else ''
    raise MissingData(
      f'synthetic:{spec.strip().removeprefix("synthetic:")} is not prepared: there is no {path}. Prepare it: '
      f'python -m mim_jax.data.worlds {world.name}{"/" + changed if changed else ""}{place}'
    )
  return path, split


def load(spec, data_dir=''):
  """The prepared examples of `spec` as a TFDS data source: `len(source)`, `source[i] -> dict`. Raises like `locate`."""
  import tensorflow_datasets as tfds

  path, split = locate(spec, data_dir)
  return tfds.builder_from_directory(path).as_data_source(split)


def is_prepared(path) -> bool:
  """Whether the folder holds a whole data set; it is moved into place only once it is complete."""
  return (Path(path) / 'dataset_info.json').is_file()


_root = data_dir  # the functions above have an argument of that name
