"""Names that timm's VisionTransformer, facebookresearch/mae, dino and dinov2 share, with what sets each apart."""

import dataclasses

from mim_jax.checkpoint import bundle as bundles
from mim_jax.official import mae
from mim_jax.official.names import TIMM_BLOCK
from mim_jax.official.vits.layout import Hints, Layout

SCALED_BLOCK = dataclasses.replace(TIMM_BLOCK, scale1='ls1.gamma', scale2='ls2.gamma')


def hints(config: dict) -> Hints:
  """From the config.json of a timm model on a hub: `pretrained_cfg` and `model_args`."""
  data, model = config.get('pretrained_cfg', {}), config.get('model_args', {})
  size = model.get('img_size') or (data['input_size'][1:] if 'input_size' in data else None)
  return Hints(
    heads=model.get('num_heads'),
    image_size=(size, size) if isinstance(size, int) else size and tuple(size),
    stats=bundles.named_stats(data['mean'], data['std']) if {'mean', 'std'} <= data.keys() else None,
    crop=data.get('crop_pct'),
  )


TIMM = Layout(
  name='timm',
  about="timm's VisionTransformer; also the published encoders of facebookresearch/mae and dino",
  patch='patch_embed.proj',
  cls='cls_token',
  pos='pos_embed',
  norm='norm',
  block='blocks.{i}',
  parts=SCALED_BLOCK,
  embed_norm='norm_pre',
  registers='reg_token',
  class_row=False,
  swiglu=('mlp.fc1', 'mlp.fc2'),
  extras=(('fc_norm', 'fc_norm'), ('head', 'head')),
  unused='mask_token$|^attn_pool',
  hints=hints,
)

MAE = dataclasses.replace(
  TIMM,
  name='mae',
  about='facebookresearch/mae, encoder and decoder (models_mae.py)',
  parts=TIMM_BLOCK,
  embed_norm='',
  registers='',
  swiglu=(),
  extras=(),
  needs=('cls_token', 'norm'),
  decoder=mae.pretraining,
  decoder_pos='decoder_pos_embed',
  marks=(r'(^|\.)decoder_embed\.weight$',),
)

# The published files hold an unused mask token; those of the training script nest blocks in chunks, 'blocks.0.3.'.
DINOV2 = dataclasses.replace(
  TIMM,
  name='dinov2',
  about='facebookresearch/dinov2',
  embed_norm='',
  registers='register_tokens',
  class_row=True,
  swiglu=('mlp.w12', 'mlp.w3'),
  extras=(),
  needs=('cls_token', 'norm'),
  neutral=(('blocks/layer_scale1/scale', 1.0), ('blocks/layer_scale2/scale', 1.0), ('blocks/attn/qkv/bias', 0.0)),
  rewrites=((r'blocks\.\d+\.(\d+)\.', r'blocks.\1.'),),
  marks=(r'(^|\.)register_tokens$', r'(^|\.)mask_token$', r'\.mlp\.w12\.'),
)
