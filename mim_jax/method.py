"""The contract between a method and everything else: pure functions over the trees params, state, frozen and batch.

A method file, `mim_jax/methods/<name>.py`, holds `DEFAULTS` (every option of the method with its default) and `make(cfg) -> Method`.
It knows of no trainer, optimizer, mesh, host, file or data set; the trainer knows of no method. What each function gets and gives:

| tree | what it is | saved |
|---|---|---|
| `params` | trained by gradient | yes |
| `state` | carried from step to step, not trained: EMA teacher, queue, batch statistics | yes |
| `frozen` | given from outside: teacher, tokenizer, VAE | no |
| `batch` | dict of arrays, leading dim B, the *global* batch: `jnp.mean(x, 0)` is already the mean over all devices | no |
| `draws` | all randomness of a step, made by `draw` from a key that follows from (seed, step); leading dim B, but for `draws['counts']` | no |

`draws['counts']` holds denominators that depend on data (how many tokens are masked, how many words are real), counted over the whole
step. With gradient accumulation each of the k parts sees counts / k, so the mean over the parts is exactly the loss of the whole batch.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from mim_jax import config, methods
from mim_jax.errors import ConfigError, MissingData, nearest

Tree = Any

# Options that the shared networks understand, so every method has them.
COMMON = {
  'dtype': 'float32',  # computation of matrix products; params, norms, softmax and loss stay float32
  'scan': True,  # one compiled block looped over depth (fast compile) instead of depth unrolled copies (faster step)
  'remat': 'none',  # what the backward pass computes again: none | dots (all but matrix products) | full
}


@dataclasses.dataclass(frozen=True)
class Field:
  """One array of the batch: `dims` names the axes ('B H W C'), `shape` gives their sizes without B."""

  dims: str
  shape: tuple[int, ...]
  dtype: str = 'float32'
  doc: str = ''

  def __post_init__(self):
    if len(self.dims.split()) != 1 + len(self.shape):
      raise ValueError(
        f'field dims {self.dims!r} name {len(self.dims.split())} axes, shape {self.shape} has {len(self.shape)} besides B'
      )

  def spec(self, batch_size: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch_size, *self.shape), self.dtype)


def _no_frozen(key, batch):
  del key, batch
  return {}


def _no_state(params):
  del params
  return {}


def _same_state(state, params, out, step):
  del params, out, step
  return state


@dataclasses.dataclass(frozen=True)
class Method:
  """A method as pure functions.

  Attributes:
    fields: the batch, name -> Field.
    init: (key, batch) -> params. Only shapes and dtypes of the batch are used, so it runs under `jax.eval_shape`.
    draw: (key, batch) -> draws.
    loss: (params, state, frozen, batch, draws, step) -> (scalar float32, {'metrics': {name: scalar}, 'out': {name: array}}).
    encode: (params, batch, state=None) -> {'tokens' [B, N, D], optionally 'cls' [B, D]}; never masked, and random only by `drop`. It may take
      two keywords more, and evaluators that need one say so when it does not. `layers=True` adds 'layers' [L, B, prefix + N, D], the output
      of every block ahead of the final norm. `drop=(keys [B], rate)` is stochastic depth for fine-tuning: a PRNG key per example, and the
      rate of the last block; `models.vit.with_drop_path` turns it into what a ViT takes.
    frozen: (key, batch) -> frozen tree with random weights of the right shapes; real weights are put in by `config.frozen.path`.
    state: (params) -> state at step 0.
    after_step: (state, params, out, step) -> state; sees the updated params and the `out` of the loss.
    panels: (params, state, frozen, batch, draws) -> {column title: [B, H, W, C] or [B, D, H, W, C] images in the batch's units}.
    generate: (params, state, frozen, key, cond) -> samples.
    adapt: (params, state, frozen, batch, key) -> params, optimised at test time.
    grads: (params, state, frozen, batch, draws, step) -> ((loss, aux), gradient tree), instead of differentiating `loss`.
    couples: the loss ties examples of a batch to each other (contrastive, batch statistics), so it cannot be accumulated in parts.
  """

  fields: Mapping[str, Field]
  init: Callable[..., Tree]
  draw: Callable[..., Tree]
  loss: Callable[..., tuple[jax.Array, dict]]
  encode: Callable[..., dict]
  frozen: Callable[..., Tree] = _no_frozen
  state: Callable[..., Tree] = _no_state
  after_step: Callable[..., Tree] = _same_state
  panels: Callable[..., dict] | None = None
  generate: Callable[..., Any] | None = None
  adapt: Callable[..., Tree] | None = None
  grads: Callable[..., Any] | None = None
  couples: bool = False

  def abstract_batch(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a global batch of `batch_size` examples."""
    return {name: field.spec(batch_size) for name, field in self.fields.items()}

  def check_fields(self, given: Mapping[str, tuple[tuple[int, ...], Any]], source: str):
    """Raises MissingData if `given` (name -> (shape without B, dtype)) lacks a field of this method or has another shape."""
    for name, field in self.fields.items():
      if name not in given:
        raise MissingData(
          f'field {name!r} is missing: {source} gives {", ".join(sorted(given)) or "nothing"}; this method needs {name} [{field.dims}] {field.dtype}. {field.doc}'
        )
      shape, dtype = given[name]
      if tuple(shape) != field.shape or jnp.dtype(dtype) != jnp.dtype(field.dtype):
        raise MissingData(
          f'field {name!r} from {source} is {tuple(shape)} {jnp.dtype(dtype).name}, this method needs {field.shape} {field.dtype} ({field.dims[2:]}); '
          'change data.transforms or the sizes in config.method'
        )


def names() -> list[str]:
  """All methods, by file name in `mim_jax/methods`."""
  return sorted(m.name for m in pkgutil.iter_modules(methods.__path__) if not m.name.startswith('_'))


def describe(name: str) -> tuple[str, str]:
  """Title and paper of a method, from the first line of its file: 'NAME: title (paper).'"""
  title, _, paper = _module(name).__doc__.splitlines()[0].rstrip('.').rpartition(' (')
  return title, paper.rstrip(')')


def _module(name: str):
  if name not in names():
    raise ConfigError(f'method {name!r} is unknown; {nearest(name, names())}')
  return importlib.import_module(f'mim_jax.methods.{name}')


def defaults(name: str) -> dict:
  """Every option of method `name` with its default."""
  return {'name': name, **COMMON, **_module(name).DEFAULTS}


def options(name: str, **overrides) -> ml_collections.ConfigDict:
  """Options of method `name`: its DEFAULTS and the common ones, with `overrides` put over them (nested dicts are merged)."""
  return config.merge(defaults(name), overrides, f'method {name}')


def build(cfg) -> Method:
  """The method named by `cfg.name` with the options in `cfg` (as `options` makes them)."""
  return _module(cfg.name).make(cfg)
