"""CAE's official release (Atten4Vis/CAE): names, DALL-E's dVAE that its tokens come from, and the replay of `cae`.

A published file holds {'model', 'optimizer', ...}; in `model` the names below after an optional `module.`, and once
more the encoder as `alignment_encoder.*`, which is the same arrays and is left out. Downstream code takes `encoder.*`
alone.

  python -m mim_jax.official.cae encoder.pkl tokenizer.safetensors    DALL-E's encoder, for config.frozen.path
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from mim_jax import method
from mim_jax.checkpoint import files
from mim_jax.errors import CheckpointError, UserError
from mim_jax.models import vit
from mim_jax.official import names

# Fixed tables, and a copy of the encoder: in official files, and not in our trees.
ABSENT = ('encoder.pos_embed', 'rd_pos_embed', 'alignment_encoder.')


def heads_kernel(heads: int) -> names.Form:
  """[H d, D] <-> [D, H, d]."""
  return names.Form(lambda w: w.T.reshape(w.shape[1], heads, -1), lambda w: w.reshape(w.shape[0], -1).T)


def heads_bias(heads: int) -> names.Form:
  """[H d] <-> [H, d]."""
  return names.Form(lambda w: w.reshape(heads, -1), lambda w: w.reshape(-1))


def block(theirs: str, ours: str, heads: int) -> list[names.Entry]:
  """A stack of BEiT's blocks: timm's names, LayerScale as `gamma_1`, biases of queries and values apart."""
  scaled = names.BlockNames('norm1', 'attn.qkv', 'attn.proj', 'norm2', 'mlp.fc1', 'mlp.fc2', 'gamma_1', 'gamma_2')
  return [
    *[entry for entry in names.block(theirs, ours, heads, scaled) if entry.ours != f'{ours}/attn/qkv/bias'],
    *[names.Entry(f'{theirs}.attn.{x}_bias', f'{ours}/attn/qkv/{x}_bias', heads_bias(heads)) for x in 'qv'],
  ]


def regressor_block(theirs: str, ours: str, heads: int) -> list[names.Entry]:
  attn, parts = f'{theirs}.cross_attn', {'q': 'query', 'k': 'key', 'v': 'value'}
  return [
    *[entry for part in 'qkv' for entry in names.norm(f'{theirs}.norm1_{part}', f'{ours}/norm1_{part}')],
    *[
      names.Entry(f'{attn}.{x}.weight', f'{ours}/attn/{part}/kernel', heads_kernel(heads)) for x, part in parts.items()
    ],
    *[names.Entry(f'{attn}.{x}_bias', f'{ours}/attn/{parts[x]}/bias', heads_bias(heads)) for x in 'qv'],
    names.Entry(f'{attn}.proj.weight', f'{ours}/attn/proj/kernel', names.merge_heads(heads)),
    names.Entry(f'{attn}.proj.bias', f'{ours}/attn/proj/bias'),
    *names.norm(f'{theirs}.norm2_cross', f'{ours}/norm2'),
    *names.linear(f'{theirs}.mlp_cross.fc1', f'{ours}/mlp/fc1'),
    *names.linear(f'{theirs}.mlp_cross.fc2', f'{ours}/mlp/fc2'),
    *[names.Entry(f'{theirs}.gamma_{i}_cross', f'{ours}/layer_scale{i}/scale') for i in (1, 2)],
  ]


def pretraining(cfg) -> list[names.Entry]:
  """Names of `ContextAutoencoderViT` for the options of `mim_jax.methods.cae`, either version."""
  encoder_heads, heads = vit.size(cfg.size)['heads'], vit.size(cfg.decoder)['heads']
  return [
    names.Entry('encoder.cls_token', 'encoder/cls_token'),
    names.Entry(
      'encoder.patch_embed.proj.weight', 'encoder/patch_embed/kernel', names.patch_conv(vit.sides(cfg.patch, 2))
    ),
    names.Entry('encoder.patch_embed.proj.bias', 'encoder/patch_embed/bias'),
    *names.norm('encoder.norm', 'encoder/norm'),
    *block('encoder.blocks.{i}', 'encoder/blocks', encoder_heads),
    *names.linear('encoder_to_regresser', 'projection/dense'),
    *names.norm('encoder_to_regresser_norm', 'projection/norm'),
    names.Entry('mask_token', 'regressor/mask_token'),
    *regressor_block('regresser.regressor_blocks.{i}', 'regressor/blocks', heads),
    *names.norm('regresser.norm', 'regressor/norm'),
    *block('decoder.decoder_blocks.{i}', 'decoder/blocks', heads),
    *names.norm('decoder.norm', 'decoder/norm'),
    *names.linear('decoder.head', 'decoder/head'),
  ]


def load(weights, cfg) -> tuple[dict, list[str]]:
  """An official `model` dict -> (our params, names that were not taken)."""
  weights = {name.removeprefix('module.'): value for name, value in weights.items()}
  return names.load({k: v for k, v in weights.items() if not k.startswith(ABSENT)}, pretraining(cfg))


def dvae(depth: int = 2) -> list[names.Entry]:
  """Names of openai/DALL-E, dall_e/encoder.py, for `models.dvae.Encoder`; kernels are [out, in, h, w] there."""
  conv = names.Form(lambda w: w.transpose(2, 3, 1, 0), lambda w: w.transpose(3, 2, 0, 1))
  places = [('blocks.input', 'input'), ('blocks.output.conv', 'output')]
  for group in range(1, 5):
    for i in range(1, depth + 1):
      theirs, ours = f'blocks.group_{group}.block_{i}', f'group_{group}_block_{i}'
      places += [(f'{theirs}.res_path.conv_{j}', f'{ours}/conv_{j}') for j in range(1, 5)]
      places.append((f'{theirs}.id_path', f'{ours}/id_path'))
  return [
    entry
    for theirs, ours in places
    for entry in (names.Entry(f'{theirs}.w', f'{ours}/kernel', conv), names.Entry(f'{theirs}.b', f'{ours}/bias'))
  ]


def load_tokenizer(path: str | Path) -> dict:
  """DALL-E's encoder, a state dict or the published pickle of the module -> tree of `models.dvae.Encoder`, float32.

  Raises CheckpointError when the file holds something else.
  """
  weights = files.read(Path(path))
  tree, unknown = names.load({name: np.asarray(weights[name], np.float32) for name in weights}, dvae())
  if unknown or not {'input', 'output'} <= set(tree):
    raise CheckpointError(
      f'{path} is not the encoder of DALL-E: expected blocks.input.w to blocks.output.conv.b, '
      f'found {sorted(weights)[:3]}'
    )
  return tree


def config_of(case):
  """Our options for a case's `config`."""
  c = case.config
  return method.options(
    'cae',
    size=f'{c.embed_dim}/{c.depth}/{c.num_heads}',
    decoder=f'{c.decoder_embed_dim}/{c.decoder_depth}/{c.decoder_num_heads}',
    regressor_depth=c.regressor_depth,
    patch=c.patch_size,
    image_size=c.img_size,
    channels=case.inputs['imgs'].shape[1],
    mlp_ratio=float(c.mlp_ratio),
    ln_eps=c.norm_eps,
    qkv_bias='qv' if c.qkv_bias else '',
    layer_scale=float(c.init_values),
    decoder_layer_scale=float(c.decoder_layer_scale_init_value),
    masked=int(case.inputs['bool_masked_pos'][0].sum()),
    masking='random',
    drop_path=0.0,
    align_weight=float(c.align_loss_weight),
    tokenizer='ids',
    codes=c.decoder_num_classes,
  )


def replay(case) -> dict[str, np.ndarray]:
  """Outputs and gradients of a reference case under its own names."""
  cfg = config_of(case)
  table = pretraining(cfg)
  # Without LayerScale the official regressor keeps its scales, as ones that are not trained.
  dull = lambda name: not cfg.decoder_layer_scale and name.endswith(('gamma_1_cross', 'gamma_2_cross'))
  params = names.complete(*load({name: value for name, value in case.weights.items() if not dull(name)}, cfg))
  batch = {
    'image': names.channels_last(case.inputs['imgs']),
    'token_ids': jnp.asarray(case.inputs['token_ids'], jnp.int32),
  }
  draws = {'mask': jnp.asarray(case.inputs['bool_masked_pos'])}
  loss_of = jax.jit(jax.value_and_grad(method.build(cfg).loss, has_aux=True))
  (loss, aux), grads = loss_of(params, {}, {}, batch, draws, 0)
  seen, metrics = aux['out'], aux['metrics']
  out = {
    'latent_visible': seen['encoded'],
    'latent_predict': seen['predicted'],
    'latent_target': seen['target'],
    'logits': seen['logits'].reshape(-1, cfg.codes),
    'loss_main': metrics['loss/token'],
    'loss_align': metrics['loss/align'],
    'loss': loss,
    'mlm_acc': metrics['token_accuracy'],
  }
  return {**{f'out/{name}': np.asarray(value) for name, value in out.items()}, **names.grads(grads, table)}


def main(argv=None) -> int:
  """Writes the tokenizer as a file for config.frozen.path; 0 on success, 1 when the file cannot be used."""
  parser = argparse.ArgumentParser(prog='python -m mim_jax.official.cae', description=main.__doc__)
  parser.add_argument('source', help="DALL-E's encoder: encoder.pkl as published, or its state dict")
  parser.add_argument('out', help='file to write, .safetensors')
  args = parser.parse_args(argv)
  try:
    arrays = traverse_util.flatten_dict({'tokenizer': load_tokenizer(args.source)}, sep='/')
    files.write(args.out, arrays)
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  print(f'{args.out}: {len(arrays)} arrays')
  return 0


if __name__ == '__main__':
  sys.exit(main())
