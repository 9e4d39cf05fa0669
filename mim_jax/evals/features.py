"""Features of whole data sets: what an evaluator gets instead of a method.

An `Encoder` turns a batch into pooled features by name. `extract` runs it over a data set, exactly: padding and
unreadable examples are left out, every process gets all rows in the order of the data set, whatever the number of
devices.
"""

import dataclasses
import fnmatch
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mim_jax.errors import ConfigError, UserError, nearest

MARKS = ('weight', 'corrupt')  # fields that the pipeline adds and an encoder does not see
OPTIONS = ('layers', 'drop')  # keywords that a `Method.encode` may take beside params, batch and state


DEFAULTS = {  # of every evaluator that judges features by class labels
  'train': ':train',  # data source; ':SPLIT' is that split of the run's own data.source
  'test': ':test',
  'transforms': '',  # '' = the run's data.eval_transforms
  'batch_size': 0,  # images per pass of the encoder; 0 = the run's batch_size
  'fields': ('image',),  # what the encoder reads
  'label': 'label',
  'features': 'auto',  # cls, mean, max, both, layer3/mean, layer*/cls, several with commas; auto = cls, else mean
  'every': 'end',  # 'end', a duration ('10 epochs', '5%'; also runs at the end) or 'never'
  'baselines': ('untrained', 'pixels'),
}


class Interrupted(Exception):
  """An evaluator stopped between two batches because `Context.stop()` said so; nothing was recorded, run it again."""


@dataclasses.dataclass
class Context:
  """What an evaluator may use of the run around it.

  Attributes:
    mesh: devices of the run.
    open_source: (spec) -> data source with `len()` and `classes(field)`.
    open_batches: (source, transforms, batch_size, fields, shuffle=None) -> iterator of dicts of global device arrays,
      leading dim batch_size over the mesh. shuffle=None: each example once, in order, the last batch padded, 'weight'
      [B] 1 for examples and 0 for padding. shuffle=seed: full batches without end, in a new order with new augmentation
      draws every epoch.
    stop: polled between batches; the same answer on every process.
    picture: (name, uint8 [H, W, C]) saves an image beside the figures.
    say: prints one line.
    memo: features already extracted, by encoder and source; `Suite` empties it after each encoder.
  """

  mesh: Mesh
  open_source: Callable[[str], Any]
  open_batches: Callable[..., Iterator[dict]]
  stop: Callable[[], bool] = lambda: False
  picture: Callable[[str, np.ndarray], None] = lambda name, array: None
  say: Callable[[str], None] = print
  memo: dict = dataclasses.field(default_factory=dict)

  def check_stop(self):
    if self.stop():
      raise Interrupted


@dataclasses.dataclass(frozen=True)
class Encoder:
  """A frozen network (or none) under evaluation.

  Attributes:
    name: 'trained', 'untrained' or 'pixels'.
    apply: (variables, batch) -> {feature name: [B, D]}, pure. Encoders that share it share its compiled forms.
    variables: tree of arrays, sharded as they are; of a method {'params', 'state'}.
    encode: (variables, batch, **options) -> what `Method.encode` returns, pure; None for an encoder without tokens.
    options: which of the keywords `OPTIONS` encode takes.
    generate: (variables, key, cond) -> what `Method.generate` returns; None for an encoder that makes nothing.
  """

  name: str
  apply: Callable[[Any, Mapping[str, jax.Array]], dict[str, jax.Array]]
  variables: Any = dataclasses.field(default_factory=dict)
  encode: Callable[..., dict[str, jax.Array]] | None = None
  options: frozenset[str] = frozenset()
  generate: Callable[..., Any] | None = None


@functools.lru_cache(maxsize=16)
def _program(apply, mesh):
  """Features, labels and marks of a batch in one program: two at once may deadlock on CPU over several processes."""

  def program(variables, batch, label, names):
    given = {name: value for name, value in batch.items() if name not in (label, *MARKS)}
    features = apply(variables, given)
    # A batch of training data has no weights.
    keep = are_examples({'weight': jnp.ones(len(batch[label])), **batch})
    return {name: features[name].astype(jnp.float32) for name in names}, batch[label], keep

  return jax.jit(program, static_argnums=(2, 3), out_shardings=NamedSharding(mesh, PartitionSpec()))


def are_examples(batch) -> Any:
  """[B] bool: rows of an evaluation batch that are neither padding ('weight' 0) nor stand-ins of unreadable examples ('corrupt')."""
  keep = batch['weight'] > 0
  return keep & ~batch['corrupt'] if 'corrupt' in batch else keep


def pool(encoded: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """What `Method.encode` returns -> features [B, D] by name.

  'mean' is the mean over patch tokens, 'max' their largest value per channel, 'mean_norm' the mean through a LayerNorm
  without parameters, 'cls' the class token and 'both' that beside the mean [B, 2 D]; with 'layers' also 'layer1/mean',
  'layer1/cls' and so on, where several class tokens are averaged.
  """
  tokens = encoded['tokens'].astype(jnp.float32)
  features = {'mean': jnp.mean(tokens, axis=1), 'max': jnp.max(tokens, axis=1)}
  features['mean_norm'] = jax.nn.standardize(features['mean'], epsilon=1e-6)
  if 'cls' in encoded:
    features['cls'] = encoded['cls'].astype(jnp.float32)
    features['both'] = jnp.concatenate([features['cls'], features['mean']], axis=-1)
  for i, layer in enumerate(encoded.get('layers', ()), start=1):
    extra = layer.shape[1] - tokens.shape[1]
    features[f'layer{i}/mean'] = jnp.mean(layer[:, extra:].astype(jnp.float32), axis=1)
    if extra:
      features[f'layer{i}/cls'] = jnp.mean(layer[:, :extra].astype(jnp.float32), axis=1)
  return features


def options_of(encode) -> frozenset[str]:
  """Which of the keywords `OPTIONS` a `Method.encode` takes."""
  return frozenset(OPTIONS) & frozenset(inspect.signature(encode).parameters)


@functools.lru_cache(maxsize=16)
def _of_encode(encode):
  """(apply, encode, options) of an `Encoder` for a `Method.encode`; the same objects every time, so that they compile once."""
  options = options_of(encode)

  def raw(variables, batch, **given):
    return encode(variables['params'], batch, variables['state'], **given)

  def pooled(variables, batch):  # layers that nobody asked for are no part of the compiled program
    return pool(raw(variables, batch, **({'layers': True} if 'layers' in options else {})))

  return pooled, raw, options


@functools.lru_cache(maxsize=16)
def _of_generate(generate):
  """`Encoder.generate` for a `Method.generate`, the same object every time."""
  if generate is None:
    return None
  return lambda variables, key, cond: generate(
    variables['params'], variables['state'], variables.get('frozen', {}), key, cond
  )


def from_method(method, params, state, name: str = 'trained', frozen=None) -> Encoder:
  """The encoder of a method: tokens of `method.encode(params, batch, state)`, and features pooled from them, see `pool`.

  `frozen` is for a method whose `generate` needs its frozen networks.
  """
  apply, encode, options = _of_encode(method.encode)
  variables = {'params': params, 'state': state, **({'frozen': frozen} if frozen else {})}
  return Encoder(name, apply, variables, encode, options, _of_generate(method.generate))


@functools.lru_cache(maxsize=16)
def _pixels(size, field):
  def apply(variables, batch):
    del variables
    image = batch[field].astype(jnp.float32)
    shape = (image.shape[0], *(min(side, size) for side in image.shape[1:-1]), image.shape[-1])
    return {'pixels': jax.image.resize(image, shape, 'linear').reshape(image.shape[0], -1)}

  return apply


def raw_pixels(size: int = 32, field: str = 'image') -> Encoder:
  """The baseline without a network: the image [B, *spatial, C] as one vector, sides shrunk (antialiased) to `size`."""
  return Encoder('pixels', _pixels(size, field))


def of_batch(encoder: Encoder, batch: Mapping[str, jax.Array], mesh: Mesh, names: Sequence[str], label: str):
  """Features {name: [B, D] float32}, labels [B, ...] and keep [B] bool of a global batch, whole on every device.

  keep is False for padding ('weight' 0) and for stand-ins of unreadable examples ('corrupt'); `names` as `resolve`
  gives them.
  """
  return _program(encoder.apply, mesh)(encoder.variables, dict(batch), label, tuple(names))


@functools.lru_cache(maxsize=16)
def _gather(mesh):
  return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))


def gathered(array: jax.Array, mesh: Mesh) -> np.ndarray:
  """A global array whole on every process. Collective."""
  return np.asarray(_gather(mesh)(array))


def resolve(encoder: Encoder, names: str, batch, label: str) -> tuple[str, ...]:
  """Asked names, with commas -> names of this encoder for batches such as `batch`.

  'auto' is 'cls', or 'mean' without class token; a pattern such as 'layer*/mean' stands for all that match. An encoder
  with a single kind of features (pixels) gives that one, whatever was asked.

  Raises:
    ConfigError: a name it does not have.
    UserError: the batch has no field `label`.
  """
  if label not in batch:
    raise UserError(
      f'an evaluation batch lacks its label field {label!r}; it holds {", ".join(sorted(batch))}; '
      'name the right one in evals.<name>.label'
    )
  have = list(
    jax.eval_shape(encoder.apply, encoder.variables, {k: v for k, v in batch.items() if k not in (label, *MARKS)})
  )
  if len(have) == 1:
    return tuple(have)
  auto = 'cls' if 'cls' in have else 'mean'
  chosen = []
  for name in map(str.strip, names.split(',')):
    found = [auto] if name == 'auto' else fnmatch.filter(have, name)
    if not found:
      raise ConfigError(f'features {name!r} are not among those of the {encoder.name} encoder; {nearest(name, have)}')
    chosen += found
  return tuple(dict.fromkeys(chosen))


def extract(
  encoder: Encoder,
  batches: Iterable[Mapping[str, jax.Array]],
  mesh: Mesh,
  stop: Callable[[], bool] = lambda: False,
  names: str = 'auto',
  label: str = 'label',
) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """Features and labels of every example, in order, the same on every process.

  Args:
    batches: global batches, see `of_batch` for rows that are left out.
    names: see `resolve`.

  Returns:
    {name: [n, D] float32}, labels [n, ...].

  Raises:
    Interrupted: `stop()` said so between two batches.
    UserError: no example, a feature that is not finite, or no label.
  """
  rows, labels, pending, chosen = [], [], None, None

  def fetch(out):
    values, target, keep = jax.tree.map(np.asarray, out)
    rows.append({name: value[keep] for name, value in values.items()})
    labels.append(target[keep])

  for batch in batches:
    if stop():
      raise Interrupted
    chosen = chosen or resolve(encoder, names, batch, label)
    if pending is not None:  # fetched after the next batch was read, so that devices and readers work at the same time
      fetch(pending)
    pending = of_batch(encoder, batch, mesh, chosen, label)
  if pending is not None:
    fetch(pending)
  if not sum(len(part) for part in labels):
    raise UserError('the evaluation data holds no example; check its source and split')
  features = {name: np.concatenate([part[name] for part in rows]) for name in rows[0]}
  for name, value in features.items():
    bad = np.count_nonzero(~np.isfinite(value).all(axis=1))
    if bad:
      raise UserError(
        f'{bad} of {len(value)} examples have {name!r} features of the {encoder.name} encoder that are not finite'
      )
  return features, np.concatenate(labels)


def of_source(encoder: Encoder, ctx: Context, cfg, source: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """`extract` over a data source with an evaluator's settings (transforms, batch_size, fields, label, features).

  What is in `ctx.memo` already is taken from there.
  """
  fields = (*cfg.fields, cfg.label)
  key = (encoder.name, source, cfg.transforms, fields, cfg.features)
  if key not in ctx.memo:
    batches = ctx.open_batches(source, cfg.transforms, cfg.batch_size, fields)
    ctx.memo[key] = extract(encoder, batches, ctx.mesh, ctx.stop, cfg.features, cfg.label)
  return ctx.memo[key]


def class_labels(labels, source: str) -> np.ndarray:
  """[n] int32 class numbers; raises UserError if they are not whole numbers from 0."""
  if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
    raise UserError(
      f'labels of {source} are {labels.dtype} of shape {labels.shape}, smallest {labels.min()}: '
      'expected one class number from 0 per example; choose another label field or a split that has labels'
    )
  return labels.astype(np.int32)


def train_and_test(encoder: Encoder, ctx: Context, cfg):
  """(train features, train labels, test features, test labels, number of classes) of a classifier's two sources."""
  train, train_labels = of_source(encoder, ctx, cfg, cfg.train)
  test, test_labels = of_source(encoder, ctx, cfg, cfg.test)
  train_labels, test_labels = class_labels(train_labels, cfg.train), class_labels(test_labels, cfg.test)
  return train, train_labels, test, test_labels, int(max(train_labels.max(), test_labels.max())) + 1


def best_of(figures: Mapping[str, Mapping[str, float]], by: str = 'top1', say=lambda line: None) -> dict[str, float]:
  """{kind of features: {figure: value}} -> flat figures of the kind that is best in `by`.

  With several kinds, those of each are also there, as 'kind/figure', and `say` gets a line that names the best. It is
  chosen on the figures themselves, that is on the test set: say so where it is quoted.
  """
  best = max(figures, key=lambda name: figures[name][by])
  flat = dict(figures[best])
  if len(figures) > 1:
    flat.update({f'{name}/{key}': value for name, values in figures.items() for key, value in values.items()})
    say(f'best of {len(figures)} kinds of features by {by} on the test set: {best}')
  return flat
