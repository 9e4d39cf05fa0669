"""Features from any weights: `encode, params, preprocess = mim_jax.load_encoder(path)`.

The path is the folder of a run, a file that `mim-jax convert` wrote, or weights of another library (see `official.vits.formats`).
"""

import ast
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax import config, method
from mim_jax.checkpoint import bundle as bundles
from mim_jax.checkpoint import manager
from mim_jax.data import images as transforms
from mim_jax.errors import CheckpointError, UserError
from mim_jax.models import teachers, vit
from mim_jax.official.vits import formats
from mim_jax.official.vits.layout import Hints
from mim_jax.ops import patches


@dataclasses.dataclass(frozen=True, eq=False)
class Encode:
  """A pure function of params and images; wrap it (or its `features`) in `jax.jit`.

  Attributes:
    apply: (params, batch) -> what `Method.encode` returns.
  """

  apply: Callable[[Any, Mapping[str, jax.Array]], dict[str, jax.Array]]

  def __call__(self, params, images) -> jax.Array:
    """Tokens [B, N, D] of the patches, after the encoder's final norm."""
    return self.features(params, images)['tokens']

  def features(self, params, images) -> dict[str, jax.Array]:
    """{'tokens' [B, N, D], and what else there is: 'cls' [B, D], 'layers' [L, B, prefix + N, D]}.

    Args:
      images: [B, H, W, C] as `preprocess` makes them, or a dict of fields for a method that needs more than images.
    """
    return self.apply(params, images if isinstance(images, Mapping) else {'image': images})


@dataclasses.dataclass(frozen=True)
class Preprocess:
  """Pictures -> what the encoder expects, by evaluation transforms.

  Attributes:
    transforms: in the language of `config.data.eval_transforms`.
  """

  transforms: str

  def __call__(self, pictures) -> np.ndarray:
    """One picture or several, each a path, the bytes of a file or an array [H, W, C] uint8 -> [B, H, W, C] float32.

    For an encoder of volumes each is an array [H, W, D] or the path of one (.npy).

    Raises UserError for bytes that are no picture and for pictures that do not come out of one size.
    """
    single = isinstance(pictures, str | Path | bytes) or (isinstance(pictures, np.ndarray) and pictures.ndim == 3)
    chain = transforms.parse(self.transforms).of_images()
    made = [self._one(chain, picture) for picture in ([pictures] if single else pictures)]
    sizes = {image.shape for image in made}
    if len(sizes) > 1:
      raise UserError(
        f'the pictures come out of {self.transforms!r} in several sizes: {", ".join(map(str, sorted(sizes)))}'
      )
    return chain.batch({'image': np.stack(made)})['image']

  def _one(self, chain, picture):
    image = picture
    if isinstance(picture, str | Path):
      image = np.load(picture, mmap_mode='r') if Path(picture).suffix == '.npy' else Path(picture).read_bytes()
    return chain.example({'image': image}, np.random.default_rng(0))['image']  # evaluation draws nothing


class LoadedEncoder(NamedTuple):
  """What `load_encoder` gives, in this order."""

  encode: Encode
  params: Any
  preprocess: Preprocess


def load_encoder(path: str | Path, image_size: int | Sequence[int] | None = None, **hints) -> LoadedEncoder:
  """Weights as a pure function, its params and the preprocessing it expects.

    encode, params, preprocess = mim_jax.load_encoder('runs/mae')
    tokens = encode(params, preprocess(['a.jpg', 'b.jpg']))

  Of a run, the newest good checkpoint counts, and in it the average of the parameters where the run keeps one. `params` is the method's
  tree, or {'params', 'state'} when the method carries a state.

  Args:
    path: folder of a run, or weights in any known format.
    image_size: side or (height, width) to resample the positions to; None keeps those of the weights. Not for runs.
    hints: what foreign weights do not say: heads, eps, activation, stats (see `official.vits.layout.Hints`).

  Raises:
    CheckpointError: nothing usable there; the message says what was found.
  """
  path = Path(path)
  if is_run(path):
    if image_size or hints:
      raise UserError(
        f'{path} is a run, whose config says all about its encoder; image_size and hints are for weight files'
      )
    return _of_run(path)
  bundle, *_ = formats.read(path, Hints(**hints))
  if image_size is not None:
    bundle = bundle.resized(vit.sides(image_size, len(bundle.encoder['patch'])))
  return of_bundle(bundle)


def load_teacher(
  path: str | Path, image_size: int | Sequence[int] | None = None, **hints
) -> tuple[teachers.Teacher, dict]:
  """Weights in any known format as (teacher, its frozen tree {'encoder': ...}); arguments as in `load_encoder`."""
  bundle, *_ = formats.read(path, Hints(**hints))
  if image_size is not None:
    bundle = bundle.resized(vit.sides(image_size, len(bundle.encoder['patch'])))
  teacher = teachers.Teacher(bundle.module, bundle.stats, bundle.channels)
  return teacher, {'encoder': jax.tree.map(jnp.asarray, bundle.params['encoder'])}


def of_bundle(bundle: bundles.Bundle) -> LoadedEncoder:
  """The encoder of a bundle, `params` holding only {'encoder': ...}."""
  module = bundle.module

  def apply(params, batch):
    tokens, seen = module.apply({'params': params['encoder']}, batch['image'], taps=True)
    out = {'tokens': tokens[:, module.prefix :], 'layers': seen['layers']}
    return out | {'cls': tokens[:, 0]} if module.cls else out

  params = {'encoder': jax.tree.map(jnp.asarray, bundle.params['encoder'])}
  return LoadedEncoder(Encode(apply), params, Preprocess(bundle.transforms))


def is_run(path: Path) -> bool:
  """Whether a path is the folder of a run."""
  return (path / 'config.json').is_file() and (path / 'checkpoints').is_dir()


@dataclasses.dataclass(frozen=True)
class Weights:
  """The weights of a run: its method, what evaluators use as params, the carried state, and the step they are of."""

  cfg: Any
  method: method.Method
  params: Any
  state: Any
  step: int


def weights_of_run(path: Path) -> Weights:
  """Newest good weights in a run's folder, on one device; needs neither its data nor its devices. Raises CheckpointError."""
  cfg = config.read(path / 'config.json')
  built = method.build(cfg.method)
  batch = built.abstract_batch(1)
  params = jax.eval_shape(lambda: built.init(jax.random.key(0), batch))
  which = 'ema' if cfg.ema else 'params'
  abstract = {which: params, 'state': jax.eval_shape(built.state, params)}
  one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  wanted = {
    name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one) for name, leaf in manager.flatten(abstract).items()
  }

  def use(contents):
    for name, leaf in wanted.items():
      found = contents.leaves.get(name)
      if found is None or found.shape != leaf.shape:
        raise CheckpointError(
          f'{contents.directory} holds {found or "no array"} at {name}, its config describes {leaf.shape}'
        )
    arrays = contents.load(wanted)
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in wanted]), contents.meta['step']

  folder = path / 'checkpoints'
  found = manager.newest_good(folder, manager.list_steps(folder), use, [])
  if found is None:
    raise CheckpointError(f'{path} has no checkpoint yet; its config saves every {cfg.checkpoint.every}')
  tree, step = found
  return Weights(cfg, built, tree[which], tree['state'], step)


def _of_run(path: Path) -> LoadedEncoder:
  run = weights_of_run(path)
  preprocess = Preprocess(run.cfg.data.eval_transforms)
  if not jax.tree.leaves(run.state):
    return LoadedEncoder(Encode(lambda params, batch: run.method.encode(params, batch)), run.params, preprocess)
  apply = lambda both, batch: run.method.encode(both['params'], batch, both['state'])
  return LoadedEncoder(Encode(apply), {'params': run.params, 'state': run.state}, preprocess)


def bundle_of_run(path: Path) -> bundles.Bundle:
  """The weights of a run as a bundle, its encoder described from its config and its arrays.

  Raises CheckpointError when the method's encoder is not a plain ViT under params['encoder'].
  """
  run = weights_of_run(path)
  options = run.cfg.method.to_dict()
  encoder = run.params.get('encoder', {}) if isinstance(run.params, Mapping) else {}
  absent = [key for key in ('size', 'patch', 'image_size') if key not in options]
  if absent or not {'patch_embed', 'blocks'} <= set(encoder):
    raise CheckpointError(
      f'the method {options["name"]} of {path} has no plain ViT as its encoder (missing: {", ".join(absent) or "params/encoder/blocks"}); only such encoders convert'
    )
  rank = len(run.method.fields['image'].shape) - 1 if 'image' in run.method.fields else 2
  patch, size = vit.sides(options['patch'], rank), vit.sides(options['image_size'], rank)
  blocks = encoder['blocks']
  qkv = blocks['attn']['qkv']
  spec = dict(
    **vit.size(options['size']),
    patch=patch,
    grid=patches.grid_of(size, patch),
    mlp_ratio=blocks['mlp']['fc2']['kernel'].shape[1] / vit.size(options['size'])['width'],
    pos='learned' if 'pos_embed' in encoder else options.get('pos', 'sincos'),
    final_norm='norm' in encoder,
    eps=options.get('ln_eps', 1e-6),
    cls='cls_token' in encoder,
    registers=encoder['registers'].shape[1] if 'registers' in encoder else 0,
    patch_bias='bias' in encoder['patch_embed'],
    qkv_bias='bias' in qkv or ''.join(letter for letter in 'qkv' if f'{letter}_bias' in qkv),
    embed_norm='embed_norm' in encoder,
    activation=options.get('activation', 'gelu'),
    layer_scale=1.0 if 'layer_scale1' in blocks else 0.0,
  )
  kernel = encoder['patch_embed']['kernel']
  bundle = bundles.Bundle(
    encoder=spec,
    params=bundles.float32(run.params),
    channels=kernel.shape[0] // int(np.prod(patch)),
    stats=_stats(run.cfg.data.eval_transforms),
    eval_transforms=run.cfg.data.eval_transforms,
    method=options,
    source={'run': path.resolve().name, 'step': run.step, 'config': config.digest(run.cfg)},
  )
  bundle.check()
  return bundle


def _stats(text: str):
  """What the last `normalize` of a chain of transforms is given."""
  found = re.findall(r'\bnormalize\b(?:\((.*)\))?', text)
  if not found:
    return 'none'
  given = re.sub(r'^stats\s*=\s*', '', found[-1].strip())
  return ast.literal_eval(given) if given else 'imagenet'
