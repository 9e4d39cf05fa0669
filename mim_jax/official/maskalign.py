"""MaskAlign's official release (OpenDriveLab/maskalign): its teacher, the CLIP tower (`maskalign_clip`)."""

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax.checkpoint import files
from mim_jax.errors import UserError
from mim_jax.models import teachers
from mim_jax.official import names
from mim_jax.official.vits import huggingface, layout
from mim_jax.ops import pixels


def replay(case) -> dict[str, np.ndarray]:
  """Outputs of a reference case under its own names."""
  if not case.name.startswith('maskalign_clip'):
    raise UserError(f'{case.name}: of MaskAlign only the CLIP tower is replayed, maskalign_clip')
  return _replay_clip(case)


def _replay_clip(case):
  """Every hidden state and attention of the tower, for images with ImageNet statistics."""
  c = case.config
  stored = {
    name: files.Stored(value.shape, value.dtype, lambda value=value: value) for name, value in case.weights.items()
  }
  hints = layout.Hints(
    heads=c.num_attention_heads,
    image_size=(c.img_size,) * 2,
    eps=c.layer_norm_eps,
    activation=huggingface.ACTIVATIONS[c.hidden_act],
  )
  bundle, unknown, _ = layout.load(
    files.Weights(case.name, 'safetensors', stored), huggingface.CLIP, 'vision_model.', hints
  )
  if unknown:
    raise ValueError(f'weights without a place in our tree: {unknown}')
  teacher = teachers.Teacher(bundle.module, bundle.stats)
  frozen = {'encoder': jax.tree.map(jnp.asarray, bundle.params['encoder'])}
  image = names.channels_last(case.inputs['imgs'])
  out = teacher(frozen, image)
  image = pixels.renormalize(image, 'imagenet', teacher.stats)
  _, seen = teacher.encoder.apply({'params': frozen['encoder']}, image, show='all')
  hidden = [out['input'], *out['layers']]
  result = {
    'pixel_values': jnp.moveaxis(image, -1, 1),
    'last_hidden_state': hidden[-1],
    'pooled': out['cls'],
    **{f'hidden_{i}': value for i, value in enumerate(hidden)},
    **{f'attn_{i}': value for i, value in enumerate(seen['attention'])},
  }
  return {f'out/{name}': np.asarray(value) for name, value in result.items()}
