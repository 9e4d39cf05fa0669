"""Image tower of openai/CLIP (model.py) and of open_clip: one fused projection, names of their own, no bias on the patches."""

from mim_jax.official.names import BlockNames
from mim_jax.official.vits.layout import Layout

# Files of openai/CLIP are TorchScript archives in half precision; M3AE's checkpoints hold the same names under
# 'vision_encoder.visual.'.
CLIP = Layout(
  name='clip',
  about="image tower of openai/CLIP or open_clip, names 'visual.*'",
  patch='conv1',
  cls='class_embedding',
  pos='positional_embedding',
  norm='ln_post',
  block='transformer.resblocks.{i}',
  parts=BlockNames(
    'ln_1', 'attn.in_proj_', 'attn.out_proj', 'ln_2', 'mlp.c_fc', 'mlp.c_proj', 'ls_1.gamma', 'ls_2.gamma'
  ),
  embed_norm='ln_pre',
  inner='visual.',
  flat=True,
  needs=('cls_token', 'embed_norm', 'norm'),
  neutral=(('blocks/attn/qkv/bias', 0.0),),
  eps=1e-5,
  activation='quick_gelu',
  activations=('gelu', 'quick_gelu'),
  stats='clip',
  unused='(^|\\.)proj$',
)
