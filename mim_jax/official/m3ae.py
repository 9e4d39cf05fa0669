"""M3AE's official release (zhjohnchan/M3AE): names, the replay of `m3ae`, and weights to start from.

Its checkpoints are Lightning's: arrays under `state_dict.` beside states of the optimizer. This turns one into a file
for `--config.init_from.path`, or makes such a file of the weights that the authors started from, CLIP's image tower
and a text encoder of huggingface/transformers:

  python -m mim_jax.official.m3ae --config=configs/m3ae.py --checkpoint=m3ae.ckpt --out=m3ae.safetensors
  python -m mim_jax.official.m3ae --config=configs/m3ae.py --clip=ViT-B-16.pt --text=roberta-base/
  --out=start.safetensors
"""

import argparse
import re
import sys
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from mim_jax import config, method
from mim_jax.checkpoint import files
from mim_jax.errors import CheckpointError, UserError
from mim_jax.methods import m3ae
from mim_jax.models import posemb, vit
from mim_jax.official import names, text_block
from mim_jax.official.vits import formats, openai

VISION = 'vision_encoder.visual.'
# In official files, and of no use to the three losses: CLIP's text side, a pooler that is never called, a fixed table.
UNUSED = re.compile(
  r'vision_encoder\.(?!visual\.)|vision_encoder\.visual\.proj$|language_encoder\.(pooler\.|embeddings\.position_ids$)'
  r'|mim_head\.decoder_pos_embed$'
)
PASSES = {'mlm': 'words', 'mim': 'pixel', 'itm': 'match'}  # the losses, theirs and ours
ONE_TOKEN = names.Form(lambda w: w[None, None], lambda w: w[0, 0])  # [D] <-> [1, 1, D]
TABLE = names.Form(lambda w: w[None], lambda w: w[0])  # [N, D] <-> [1, N, D]


def table(cfg) -> list[names.Entry]:
  """Names of M3AETransformerSS for the options of `mim_jax.methods.m3ae`."""
  fusion_heads = vit.size(cfg.fusion)['heads']
  return [
    names.Entry(f'{VISION}class_embedding', 'encoder/cls_token', ONE_TOKEN),
    names.Entry(f'{VISION}positional_embedding', 'encoder/pos_embed', TABLE),
    names.Entry(f'{VISION}conv1.weight', 'encoder/patch_embed/kernel', names.patch_conv(vit.sides(cfg.patch, 2))),
    *names.norm(f'{VISION}ln_pre', 'encoder/embed_norm'),
    *_clip_blocks(f'{VISION}transformer', 'encoder', vit.size(cfg.size)['heads']),
    *names.norm(f'{VISION}ln_post', 'encoder/norm'),
    *text_block.encoder_names('language_encoder.', 'text', vit.size(cfg.text.size)['heads']),
    *names.linear('multi_modal_language_proj', 'join/text'),
    *names.linear('multi_modal_vision_proj', 'join/image'),
    names.Entry('modality_type_embeddings.weight', 'join/types'),
    *text_block.layer_names('multi_modal_language_layers.{i}', 'fusion/blocks/text', fusion_heads, cross=True),
    *text_block.layer_names('multi_modal_vision_layers.{i}', 'fusion/blocks/image', fusion_heads, cross=True),
    *text_block.pooler_names('multi_modal_language_pooler', 'pool_text'),
    *text_block.pooler_names('multi_modal_vision_pooler', 'pool_image'),
    *names.linear('mlm_head.transform.dense', 'words/transform'),
    *names.norm('mlm_head.transform.LayerNorm', 'words/norm'),
    names.Entry('mlm_head.decoder.weight', 'words/decoder', names.LINEAR),
    names.Entry('mlm_head.bias', 'words/bias'),
    *names.linear('itm_head.fc', 'match'),
    *names.linear('mim_head.decoder_embed', 'decoder/embed'),
    names.Entry('mim_head.mask_token', 'decoder/mask_token'),
    *_clip_blocks('mim_head.decoder', 'decoder', vit.size(cfg.decoder)['heads']),
    *names.norm('mim_head.decoder_norm', 'decoder/norm'),
    *names.linear('mim_head.decoder_pred', 'decoder/pred'),
  ]


def _clip_blocks(theirs, ours, heads):
  parts = names.BlockNames(
    **{**vars(openai.CLIP.parts), 'scale1': '', 'scale2': ''}  # scales are open_clip's
  )
  return names.block(f'{theirs}.resblocks.{{i}}', f'{ours}/blocks', heads, parts)


def load(weights: Mapping[str, np.ndarray], cfg) -> tuple[dict, list[str]]:
  """A checkpoint's arrays -> (our params float32, its names that are not known); positions move to the grid of `cfg`.

  Raises CheckpointError when the file holds no network of this kind.
  """
  lightning = any(name.startswith('state_dict.') for name in weights)
  kept = {
    name.removeprefix('state_dict.'): weights[name]
    for name in weights
    if not lightning or name.startswith('state_dict.')
  }
  used = {name: np.asarray(value, np.float32) for name, value in kept.items() if not UNUSED.match(name)}
  params, unknown = names.load(used, table(cfg))
  if 'encoder' not in params:
    raise CheckpointError(f'no {VISION}* among {len(kept)} names, such as {", ".join(sorted(kept)[:3])}: not M3AE')
  params['encoder']['pos_embed'] = _to_grid(params['encoder']['pos_embed'], cfg)
  return params, unknown


def _to_grid(positions, cfg):
  new = m3ae.modules(cfg).encoder.grid
  side = round((positions.shape[1] - 1) ** 0.5)
  return posemb.resample(positions, (side, side), new, cls_rows=1)


def export(params, cfg) -> dict[str, np.ndarray]:
  """Our params under the official names, all that its non-strict loading needs."""
  return names.export(params, table(cfg))


def published_parts(cfg, clip='', text='') -> dict:
  """Params of both encoders from published weights: 'encoder' of CLIP (any format of mim-jax convert), and 'text'.

  Of the tower as many blocks are taken as `cfg` has, from the first. Raises CheckpointError when sizes do not fit.
  """
  nets, parts = m3ae.modules(cfg), {}
  if clip:
    bundle, *_ = formats.read(clip)
    bundle = bundle.resized(vit.sides(cfg.image_size, 2))
    parts['encoder'] = dict(bundle.params['encoder'])
    parts['encoder']['blocks'] = jax.tree.map(lambda x: x[: nets.encoder.depth], bundle.params['encoder']['blocks'])
  if text:
    weights = text_block.published(files.read(text), 'language_encoder.')
    weights = {name: value for name, value in weights.items() if name.startswith('language_encoder.')}
    found, unknown = names.load({k: v for k, v in weights.items() if not UNUSED.match(k)}, table(cfg))
    if unknown or 'text' not in found:
      raise CheckpointError(f'{text} is no encoder of the BERT family: {", ".join(unknown[:4]) or "none of its names"}')
    parts['text'] = found['text']
  built = method.build(cfg)
  expected = jax.eval_shape(lambda: built.init(jax.random.key(0), built.abstract_batch(1)))
  for part, tree in parts.items():
    have, want = (traverse_util.flatten_dict(x, sep='/') for x in (tree, expected[part]))
    shapes = lambda flat, name: getattr(flat.get(name), 'shape', 'nothing')
    for name in sorted(want | have):
      if shapes(have, name) != shapes(want, name):
        raise CheckpointError(
          f'{part}/{name} of the published weights is {shapes(have, name)}, the config describes {shapes(want, name)}; '
          'change the sizes in config.method'
        )
  return parts


def replay(case) -> dict[str, np.ndarray]:
  """Outputs and gradients of a reference case under its own names."""
  cfg = config_of(case)
  params = names.complete(*load(case.weights, cfg))
  built, nets, given = method.build(cfg), m3ae.modules(cfg), case.inputs
  batch = {
    'image': names.channels_last(given['image']),
    'false_image': names.channels_last(given['false_image_0']),
    'text_ids': jnp.asarray(given['text_ids']),
    'text_mask': jnp.asarray(given['text_masks']),
    'text_ids_mlm': jnp.asarray(given['text_ids_mlm']),
    'text_labels_mlm': jnp.asarray(given['text_labels_mlm']),
  }
  draws = {
    'noise': jnp.asarray(given['mim_noise']),
    'match': m3ae.matches(jnp.asarray(given['itm_perm'])),
    'counts': m3ae.counts(batch),
  }
  step = jax.jit(jax.value_and_grad(lambda p, batch, draws: built.loss(p, {}, {}, batch, draws, 0), has_aux=True))
  (loss, aux), grads = step(params, batch, draws)
  passes, metrics = aux['out'], aux['metrics']
  mim = passes['mim']
  layer = nets.fusion.depth if cfg.mim_layer == -1 else cfg.mim_layer
  rest = jax.jit(lambda params, streams, mask: nets.fuse(params, *streams, mask, first=layer))
  mim['text'], mim['image'] = rest(params, mim['streams'], batch['text_mask'])
  restore_ids = m3ae.masking.keep_smallest(draws['noise'], mim['tokens'].shape[1] - 1)[1]
  out = {
    'mim_mask': mim['mask'],
    'mim_ids_restore': restore_ids,
    'mim_decoder_input': mim['streams'][1],
    'mim_labels': mim['target'],
    'itm_labels': draws['match'],
    'itm_cls_feats': passes['features'],
    'total_loss': loss,
  }
  for name, part in PASSES.items():
    out |= {
      f'{name}_vision_encoder': passes[name]['tokens'],
      f'{name}_language_encoder': passes[name]['words'],
      f'{name}_text_feats': passes[name]['text'],
      f'{name}_image_feats': passes[name]['image'],
      f'{name}_logits': passes[name]['logits'],
      f'{name}_loss': metrics[f'loss/{part}'],
    }
  return {**{f'out/{name}': np.asarray(value) for name, value in out.items()}, **names.grads(grads, table(cfg))}


def config_of(case):
  """Our options for a case's `config`."""
  c = case.config
  kind = 'roberta' if 'roberta' in c.tokenizer else 'bert'
  positions = case.weights['language_encoder.embeddings.position_embeddings.weight'].shape[0]
  return method.options(
    'm3ae',
    size=f'{c.vit_width}/{c.vit_blocks_built}/{c.vit_heads}',
    patch=c.patch_size,
    image_size=c.image_size,
    channels=case.inputs['image'].shape[1],
    ln_eps=c.clip_layer_norm_eps,
    text={
      'kind': kind,
      'size': f'{c.text_hidden}/{c.text_layers}/{c.text_heads}',
      'vocab': c.vocab_size,
      'positions': positions,
      'mlp_ratio': c.text_intermediate / c.text_hidden,
    },
    length=case.inputs['text_ids'].shape[1],
    fusion=f'{c.hidden_size}/{c.num_top_layer}/{c.num_heads}',
    fusion_mlp_ratio=c.fusion_intermediate / c.hidden_size,
    fusion_eps=c.fusion_layer_norm_eps,
    decoder=f'{c.mim_decoder_hidden_size}/{c.mim_decoder_num_layers}/{c.mim_decoder_num_heads}',
    mask_ratio=c.mim_prob,
    norm_pix=c.norm_pix_loss,
    mim_layer=c.mim_layer,
    weights={ours: float(c.loss_weights[theirs]) for theirs, ours in PASSES.items()},
    dropout=0.0,
  )


def main(argv) -> int:
  parser = argparse.ArgumentParser(
    prog='python -m mim_jax.official.m3ae', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--config', required=True, help='recipe whose networks the weights are for')
  parser.add_argument('--checkpoint', help='official checkpoint')
  parser.add_argument('--clip', default='', help="CLIP's image tower, in any format that mim-jax convert reads")
  parser.add_argument('--text', default='', help='BERT or RoBERTa: folder or file of weights')
  parser.add_argument('--out', required=True, help='.safetensors to write')
  args, overrides = parser.parse_known_args(argv)
  try:
    cfg = config.load([f'--config={args.config}', *overrides]).method
    if args.checkpoint:
      params, unknown = load(files.read(args.checkpoint), cfg)
      print(f'not taken: {", ".join(unknown) or "nothing"}')
    elif args.clip or args.text:
      params = published_parts(cfg, args.clip, args.text)
    else:
      raise UserError('nothing to read: give --checkpoint, or --clip and --text')
    flat = traverse_util.flatten_dict(params, sep='/')
    files.write(args.out, flat)
    print(f'wrote {args.out}: {len(flat)} arrays of {", ".join(params)}')
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
