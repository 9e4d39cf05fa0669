"""The same images through our encoder and through the library that a file is of."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax.checkpoint import bundle as bundles
from mim_jax.checkpoint import files
from mim_jax.official.vits.layout import Layout

CLASSES = {
  'hf-vit': ('ViTModel', {'add_pooling_layer': False}),
  'hf-mae': ('ViTMAEForPreTraining', {}),
  'hf-clip': ('CLIPVisionModel', {}),
  'hf-dinov2': ('Dinov2Model', {}),
}


def images(bundle: bundles.Bundle, count: int = 2) -> np.ndarray:
  """The fixed input: standard normal pixels [count, H, W, C] float32 of seed 0."""
  return np.random.default_rng(0).standard_normal((count, *bundle.image_size, bundle.channels)).astype(np.float32)


def ours(bundle: bundles.Bundle, image: np.ndarray) -> dict[str, np.ndarray]:
  """Features by name: 'tokens' [B, prefix + N, D], which the encoder returns, and 'last' alike, before the final norm."""
  with jax.default_matmul_precision('highest'):
    run = jax.jit(lambda params, x: bundle.module.apply({'params': params}, x, taps=True))
    tokens, seen = run(bundle.params['encoder'], jnp.asarray(image))
  return {'tokens': np.asarray(tokens), 'last': np.asarray(seen['layers'][-1])}


def theirs(
  path: str | Path, prefix: str, layout: Layout, bundle: bundles.Bundle, image: np.ndarray
) -> dict[str, np.ndarray] | str:
  """What their library makes of the file: features by name, or the reason why there are none."""
  wanted = 'timm' if layout.name in ('timm', 'mae') else 'transformers' if layout.name in CLASSES else ''
  if not wanted:
    return f'no library that reads {layout.name} is known here'
  missing = [name for name in ('torch', wanted) if importlib.util.find_spec(name) is None]
  if missing:
    return f'{" and ".join(missing)} not installed'
  import torch

  pixels = torch.from_numpy(np.moveaxis(image, -1, 1).copy())
  with torch.no_grad():
    return (_timm if wanted == 'timm' else _transformers)(Path(path), prefix, layout, bundle, pixels)


def _transformers(path, prefix, layout, bundle, pixels):
  import torch
  import transformers

  folder = path if path.is_dir() else path.parent
  found = files.settings(path)
  if not found:
    return f'no config.json beside {path.name}'
  name, options = CLASSES[layout.name]
  if found.get('model_type') == 'dinov2_with_registers':
    name = 'Dinov2WithRegistersModel'
  level = transformers.logging.get_verbosity()
  transformers.logging.set_verbosity_error()  # it reports the heads that a part of a file lacks
  try:
    model = getattr(transformers, name).from_pretrained(folder, **options).eval()
  finally:
    transformers.logging.set_verbosity(level)
  if layout.name == 'hf-mae':
    model.config.mask_ratio = model.vit.config.mask_ratio = 0.0
    count = int(np.prod(bundle.encoder['grid']))
    order = torch.arange(count, dtype=torch.float32).expand(len(pixels), count)  # it sorts by this, so nothing moves
    return {'tokens': model.vit(pixels, noise=order).last_hidden_state.numpy()}
  out = model(pixels)
  if layout.name == 'hf-clip':
    return {'last': out.last_hidden_state.numpy(), 'cls': out.pooler_output.numpy()}
  return {'tokens': out.last_hidden_state.numpy()}


def _timm(path, prefix, layout, bundle, pixels):
  import torch

  model = timm_model(bundle)
  weights = files.read(path)
  names = [name for name in layout.renamed(weights) if name.startswith(prefix)]
  arrays = {name.removeprefix(prefix): torch.from_numpy(weights[name].astype(np.float32)) for name in names}
  wanted = model.state_dict()
  if 'pos_embed' in wanted and arrays['pos_embed'].shape != wanted['pos_embed'].shape:
    if wanted['pos_embed'].shape[1] + model.num_prefix_tokens == arrays['pos_embed'].shape[1]:
      return 'its table has rows for registers, which is not how timm is set up here'
    return 'the encoder was made for another image size'
  model.load_state_dict({name: value for name, value in arrays.items() if name in wanted})
  tokens = model.forward_features(pixels).numpy()
  return {'tokens': tokens}


def timm_options(bundle: bundles.Bundle) -> dict:
  """Arguments of timm's VisionTransformer for an encoder; norm_layer is nn.LayerNorm with the encoder's eps."""
  options = bundle.encoder
  activation = options.get('activation', 'gelu')
  gated = activation == 'swiglu'
  classes = bundle.params['head']['bias'].shape[0] if 'head' in bundle.params else 0
  return {
    'img_size': bundle.image_size,
    'patch_size': options['patch'][0],
    'in_chans': bundle.channels,
    'num_classes': classes,
    'global_pool': 'token' if options['cls'] and options['final_norm'] else 'avg',
    'fc_norm': not options['final_norm'],
    'embed_dim': options['width'],
    'depth': options['depth'],
    'num_heads': options['heads'],
    'mlp_ratio': options['mlp_ratio'] * (2 if gated else 1),
    'qkv_bias': bool(options['qkv_bias']),
    'init_values': options['layer_scale'] or None,
    'class_token': options['cls'],
    'reg_tokens': options['registers'],
    'no_embed_class': bool(options['registers']),
    'pre_norm': options['embed_norm'],
    'act_layer': {'gelu': 'gelu', 'gelu_tanh': 'gelu_tanh', 'quick_gelu': 'quick_gelu', 'swiglu': 'silu'}[activation],
  }


def timm_model(bundle: bundles.Bundle):
  """timm's VisionTransformer of an encoder's shape, in eval mode, its weights not loaded."""
  import functools

  import timm.layers
  import timm.models.vision_transformer as timm_vit
  import torch

  norm = functools.partial(torch.nn.LayerNorm, eps=bundle.encoder['eps'])
  mlp = {'mlp_layer': timm.layers.SwiGLUPacked} if bundle.encoder.get('activation') == 'swiglu' else {}
  return timm_vit.VisionTransformer(**timm_options(bundle), norm_layer=norm, **mlp).eval()


def compare(mine: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, float]:
  """Largest difference by name, relative to the largest entry where that exceeds 1."""
  mine = {**mine, 'cls': mine['tokens'][:, 0]}
  rows = {}
  for name, value in other.items():
    largest = max(1.0, float(np.abs(value).max()))
    rows[name] = float(np.abs(mine[name] - value).max()) / largest
  return rows
