"""All formats: which one a file is in, reading any of them into a `Bundle`, writing a `Bundle` in one of them."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

from mim_jax.checkpoint import bundle as bundles
from mim_jax.checkpoint import files
from mim_jax.errors import CheckpointError, nearest
from mim_jax.models import vit
from mim_jax.official.vits import huggingface, openai, timm
from mim_jax.official.vits.layout import Hints, Layout, load, save

CARRIED = 'mim_jax_hints'  # metadata of files we write for others: what a reader of bare names would have to guess

# Those with marks come before those whose names they share.
LAYOUTS = {
  layout.name: layout
  for layout in (
    huggingface.VIT_MAE,
    huggingface.VIT,
    huggingface.DINOV2,
    huggingface.CLIP,
    openai.CLIP,
    timm.MAE,
    timm.DINOV2,
    timm.TIMM,
  )
}


def layout_of(name: str) -> Layout:
  if name not in LAYOUTS:
    raise CheckpointError(f'format {name!r} is unknown; {nearest(name, LAYOUTS)}')
  return LAYOUTS[name]


def detect(weights: files.Weights) -> Layout:
  """The layout whose names a file has. Raises CheckpointError when none fits."""
  for layout in LAYOUTS.values():
    if layout.prefixes(weights):
      return layout
  some = ', '.join(sorted(weights)[:4])
  raise CheckpointError(
    f'{weights.path} holds no plain ViT under names that are known ({len(weights)} arrays, such as {some}); known formats: {", ".join(LAYOUTS)}'
  )


def read(path: str | Path, hints: Hints | None = None, form: str = '', prefix: str | None = None):
  """Weights of any known format -> (bundle, layout or None for our own, names not taken, remarks).

  config.json and preprocessor_config.json beside the file are read; `hints` win over them, but for the image size.

  Args:
    form: name of the format; '' finds out.
    prefix: of the network to take when a file holds several; None takes a teacher or average before a student.

  Raises:
    CheckpointError: see `files.read`, `detect` and `layout.load`.
  """
  weights = files.read(path)
  if bundles.is_bundle(weights):
    return bundles.read(weights), None, [], []
  layout = layout_of(form) if form else detect(weights)
  found = layout.prefixes(weights)
  if not found:
    raise CheckpointError(
      f'{weights.path} does not hold a network in the format {layout.name}; without --format it is found out'
    )
  notes = []
  if prefix is None:
    prefix = preferred(found)
    if len(found) > 1:
      notes.append(f'network: {prefix!r} of {", ".join(map(repr, found))} (--prefix)')
  elif prefix not in found:
    raise CheckpointError(f'{weights.path} has no network under {prefix!r}; there is {", ".join(map(repr, found))}')
  beside = layout.hints(files.settings(weights.path))
  pictures = huggingface.preprocessor_hints(files.settings(weights.path, 'preprocessor_config.json'))
  hints = (hints or Hints()).over(pictures).over(beside).over(_carried(weights))
  if beside.image_size:  # what the weights were made for; a wish for another size is carried out by `Bundle.resized`
    hints = dataclasses.replace(hints, image_size=beside.image_size)
  bundle, unknown, remarks = load(weights, layout, prefix, hints)
  source = {'file': weights.path.name, 'format': layout.name, 'sha256': files.digest(weights.path)}
  return (
    dataclasses.replace(bundle, source=source),
    layout,
    unknown + [f'pickled {name}' for name in weights.opaque],
    notes + remarks,
  )


def write(path: str | Path, bundle: bundles.Bundle, form: str) -> tuple[Path, list[str]]:
  """Writes a bundle in a format: PATH.safetensors, or a folder that the library loads (with config.json where it has one).

  Returns the file, and the parts of the bundle that have no place in the format.
  """
  layout = layout_of(form)
  path = Path(path)
  arrays, left = save(bundle, layout)
  if layout.config is None:
    file = path if path.suffix == '.safetensors' else path / 'model.safetensors'
  elif path.suffix:
    raise CheckpointError(f'{form} needs config.json beside the weights, so give a folder instead of {path}')
  else:
    file = path / 'model.safetensors'
  files.write(file, arrays, {'format': 'pt', CARRIED: json.dumps(_hints_of(bundle))})
  if layout.config is not None:
    for name, content in (
      ('config.json', layout.config(bundle)),
      ('preprocessor_config.json', huggingface.preprocessor(bundle)),
    ):
      (path / name).write_text(json.dumps(content, indent=2) + '\n')
  return file, left


def preferred(prefixes: Sequence[str]) -> str:
  return min(prefixes, key=lambda p: (not re.search('teacher|ema', p), bool(re.search('student|momentum', p)), len(p)))


def _hints_of(bundle: bundles.Bundle) -> dict:
  options, method = bundle.encoder, bundle.method
  mae = method.get('name') == 'mae' and 'decoder' in bundle.params
  return {
    'heads': options['heads'],
    'image_size': bundle.image_size,
    'eps': options['eps'],
    'activation': options.get('activation', 'gelu'),
    'stats': bundle.stats,
    'crop': bundle.crop,
    'decoder_heads': vit.size(method['decoder'])['heads'] if mae else None,
    'method': {key: method[key] for key in ('norm_pix', 'mask_ratio') if key in method} if mae else {},
  }


def _carried(weights: files.Weights) -> Hints:
  if CARRIED not in weights.metadata:
    return Hints()
  try:
    found = bundles.tuples(json.loads(weights.metadata[CARRIED]))
    return Hints(**found)
  except (ValueError, TypeError) as error:
    raise CheckpointError(f'{weights.path}: the metadata {CARRIED!r} cannot be read: {error}') from error
