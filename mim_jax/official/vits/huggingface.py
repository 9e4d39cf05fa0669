"""Vision transformers of Hugging Face transformers: names on disk, and the settings in config.json both ways.

Version 5 renamed modules in memory but keeps the older names in the files it saves; `rewrites` bring a bare state dict to those.
"""

import dataclasses
from typing import Any

from mim_jax.checkpoint import bundle as bundles
from mim_jax.errors import CheckpointError
from mim_jax.models import vit
from mim_jax.official import mae
from mim_jax.official.names import HF_VIT_BLOCK, BlockNames
from mim_jax.official.vits.layout import Hints, Layout
from mim_jax.ops import pixels

ACTIVATIONS = {'gelu': 'gelu', 'quick_gelu': 'quick_gelu', 'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh'}


def hints(config: dict) -> Hints:
  """From config.json, where what it leaves out has the library's default."""
  if 'vision_config' in config:  # of a model with a text tower; it may hold only what differs from the defaults
    config = {'model_type': f'{config.get("model_type", "clip")}_vision_model', **config['vision_config']}
  if 'hidden_size' not in config and 'model_type' not in config:
    return Hints()
  kind = config.get('model_type', '')
  size = config.get('image_size', 224)
  method = {'norm_pix': config.get('norm_pix_loss', False), 'mask_ratio': config.get('mask_ratio', 0.75)}
  usual = {'clip_vision_model': 1e-5, 'dinov2': 1e-6, 'dinov2_with_registers': 1e-6}
  return Hints(
    heads=config.get('num_attention_heads', 12),
    image_size=(size, size) if isinstance(size, int) else tuple(size),
    eps=config.get('layer_norm_eps', usual.get(kind, 1e-12)),
    activation=ACTIVATIONS.get(config.get('hidden_act', 'quick_gelu' if 'clip' in kind else 'gelu')),
    decoder_heads=config.get('decoder_num_attention_heads', 16 if kind == 'vit_mae' else None),
    method=method if kind == 'vit_mae' else {},
  )


def preprocessor_hints(found: dict) -> Hints:
  """From preprocessor_config.json."""
  if not {'image_mean', 'image_std'} <= found.keys():
    return Hints()
  crop, size = found.get('crop_size'), found.get('size')
  side = lambda value: value.get('shortest_edge') or value.get('height') if isinstance(value, dict) else value
  share = side(crop) / side(size) if crop and size and found.get('do_center_crop', False) else 1.0
  return Hints(stats=bundles.named_stats(found['image_mean'], found['image_std']), crop=share)


def preprocessor(bundle: bundles.Bundle) -> dict[str, Any]:
  """preprocessor_config.json for the evaluation transforms of a bundle."""
  height, width = bundle.image_size
  mean, std = (
    part.reshape(-1).tolist() * (bundle.channels if part.size == 1 else 1) for part in pixels.stats(bundle.stats)
  )
  crops = height == width and bundle.crop < 1
  return {
    'image_processor_type': 'CLIPImageProcessor' if crops else 'ViTImageProcessor',
    'do_resize': True,
    'size': {'shortest_edge': int(height / bundle.crop)} if crops else {'height': height, 'width': width},
    'do_center_crop': crops,
    'crop_size': {'height': height, 'width': width},
    'do_normalize': True,
    'image_mean': mean,
    'image_std': std,
    'resample': 3,
  }


def _shared(bundle: bundles.Bundle) -> dict[str, Any]:
  options = bundle.encoder
  back = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
  side = lambda value: value[0] if len(set(value)) == 1 else list(value)
  return {
    'hidden_size': options['width'],
    'num_hidden_layers': options['depth'],
    'num_attention_heads': options['heads'],
    'image_size': side(bundle.image_size),
    'patch_size': side(options['patch']),
    'num_channels': bundle.channels,
    'layer_norm_eps': options['eps'],
    'hidden_act': back.get(options.get('activation', 'gelu'), 'gelu'),
    'dtype': 'float32',
  }


def _hidden(bundle) -> int:
  return bundle.params['encoder']['blocks']['mlp']['fc2']['kernel'].shape[1]


def _vit(bundle):
  config = {
    'architectures': ['ViTModel'],
    'model_type': 'vit',
    **_shared(bundle),
    'intermediate_size': _hidden(bundle),
    'qkv_bias': bool(bundle.encoder['qkv_bias']),
  }
  if 'head' in bundle.params:
    classes = bundle.params['head']['bias'].shape[0]
    config |= {
      'architectures': ['ViTForImageClassification'],
      'id2label': {str(i): f'LABEL_{i}' for i in range(classes)},
      'label2id': {f'LABEL_{i}': i for i in range(classes)},
    }
  return config


def _vit_mae(bundle):
  decoder = vit.size(bundle.method['decoder'])
  return {
    **_vit(bundle),
    'architectures': ['ViTMAEForPreTraining'],
    'model_type': 'vit_mae',
    'decoder_hidden_size': decoder['width'],
    'decoder_num_hidden_layers': decoder['depth'],
    'decoder_num_attention_heads': decoder['heads'],
    'decoder_intermediate_size': int(decoder['width'] * bundle.encoder['mlp_ratio'] + 1e-6),
    'mask_ratio': bundle.method.get('mask_ratio', 0.75),
    'norm_pix_loss': bundle.method.get('norm_pix', True),
  }


def _clip(bundle):
  return {
    'architectures': ['CLIPVisionModel'],
    'model_type': 'clip_vision_model',
    **_shared(bundle),
    'intermediate_size': _hidden(bundle),
  }


def _dinov2_ratio(hidden: int, width: int, gates: bool) -> int:
  """The mlp_ratio (they take whole numbers) that makes MLPs `hidden` wide; a gated one gets 2/3 of it, up to a multiple of 8."""
  for ratio in range(1, 33):
    made = (int(width * ratio * 2 / 3) + 7) // 8 * 8 if gates else width * ratio
    if made == hidden:
      return ratio
  raise CheckpointError(f'hf-dinov2 cannot express MLPs of {hidden} for a width of {width}; take another format')


def _dinov2(bundle):
  options, registers = bundle.encoder, bundle.encoder.get('registers', 0)
  gates = options.get('activation') == 'swiglu'
  return {
    'architectures': ['Dinov2WithRegistersModel' if registers else 'Dinov2Model'],
    'model_type': 'dinov2_with_registers' if registers else 'dinov2',
    **_shared(bundle),
    'mlp_ratio': _dinov2_ratio(_hidden(bundle), options['width'], gates),
    'qkv_bias': True,
    'use_swiglu_ffn': gates,
    'use_mask_token': True,
    **({'num_register_tokens': registers} if registers else {}),
  }


_NEW_ATTENTION = (
  (r'attention\.q_proj\.', 'attention.attention.query.'),
  (r'attention\.k_proj\.', 'attention.attention.key.'),
  (r'attention\.v_proj\.', 'attention.attention.value.'),
  (r'attention\.o_proj\.', 'attention.output.dense.'),
)

VIT = Layout(
  name='hf-vit',
  about='ViTModel, ViTForImageClassification (DINO as well)',
  patch='embeddings.patch_embeddings.projection',
  cls='embeddings.cls_token',
  pos='embeddings.position_embeddings',
  norm='layernorm',
  block='encoder.layer.{i}',
  parts=HF_VIT_BLOCK,
  inner='vit.',
  extras=(('classifier', 'head'),),
  needs=('cls_token', 'norm'),
  neutral=(('patch_embed/bias', 0.0),),
  eps=1e-12,
  stats='half',
  rewrites=(
    *_NEW_ATTENTION,
    (r'(^|\.)decoder_encoder\.layer\.(\d+)\.', r'\1decoder_layers.\2.'),  # how version 5.24 saves decoder_layers
    (r'(^|\.)layers\.(\d+)\.(attention|layernorm_before|layernorm_after|mlp)\.', r'\1encoder.layer.\2.\3.'),
    (r'(\.\d+)\.mlp\.fc1\.', r'\1.intermediate.dense.'),
    (r'(\.\d+)\.mlp\.fc2\.', r'\1.output.dense.'),
  ),
  unused=r'mask_token$|^pooler\.',
  hints=hints,
  config=_vit,
)

VIT_MAE = dataclasses.replace(
  VIT,
  name='hf-mae',
  about='ViTMAEForPreTraining',
  extras=(),
  stats='imagenet',
  decoder=mae.huggingface,
  decoder_pos='decoder.decoder_pos_embed',
  marks=(r'(^|\.)decoder\.decoder_embed\.weight$',),
  config=_vit_mae,
)

CLIP = Layout(
  name='hf-clip',
  about='CLIPVisionModel, CLIPModel',
  patch='embeddings.patch_embedding',
  cls='embeddings.class_embedding',
  pos='embeddings.position_embedding.weight',
  norm='post_layernorm',
  block='encoder.layers.{i}',
  parts=BlockNames(
    'layer_norm1',
    tuple(f'self_attn.{part}_proj' for part in 'qkv'),
    'self_attn.out_proj',
    'layer_norm2',
    'mlp.fc1',
    'mlp.fc2',
  ),
  embed_norm='pre_layrnorm',  # their spelling
  flat=True,
  needs=('cls_token', 'embed_norm', 'norm'),
  neutral=(('blocks/attn/qkv/bias', 0.0),),
  eps=1e-5,
  activation='quick_gelu',
  stats='clip',
  unused=r'position_ids$',
  hints=hints,
  config=_clip,
)

DINOV2 = Layout(
  name='hf-dinov2',
  about='Dinov2Model, Dinov2WithRegistersModel',
  patch='embeddings.patch_embeddings.projection',
  cls='embeddings.cls_token',
  pos='embeddings.position_embeddings',
  norm='layernorm',
  registers='embeddings.register_tokens',
  block='encoder.layer.{i}',
  parts=dataclasses.replace(
    HF_VIT_BLOCK,
    norm1='norm1',
    norm2='norm2',
    fc1='mlp.fc1',
    fc2='mlp.fc2',
    scale1='layer_scale1.lambda1',
    scale2='layer_scale2.lambda1',
  ),
  swiglu=('mlp.weights_in', 'mlp.weights_out'),
  needs=('cls_token', 'norm'),
  neutral=(
    ('blocks/layer_scale1/scale', 1.0),
    ('blocks/layer_scale2/scale', 1.0),
    ('blocks/attn/qkv/bias', 0.0),
    ('patch_embed/bias', 0.0),
  ),
  activations=('gelu', 'gelu_tanh', 'quick_gelu'),
  rewrites=_NEW_ATTENTION,
  hints=hints,
  config=_dinov2,
)
