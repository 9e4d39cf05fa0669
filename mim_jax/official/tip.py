"""TIP's official release (siyi-wind/TIP): names, and replays of `tip`.

Published are Lightning checkpoints, {'state_dict', 'hyper_parameters'}: one after pre-training per data set (DVM,
cardiac), and fine-tuned ones. The image encoder has torchvision's names, `fc` being the identity. Counters of
BatchNorm and the buffers of torchmetrics have no place here and are passed over. Codes, columns and their order are
those of the file of lengths that comes with a data set.
"""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from mim_jax import method
from mim_jax.errors import CheckpointError
from mim_jax.models import resnet, vit
from mim_jax.official import mae, names

# BatchNorm over a handful of values (4 images of 2 x 2 places in the last stage) amplifies rounding: with batch
# statistics the reference numbers, made in float32, lie up to 1.0e-5 from the same computation in float64.
TOLERANCES = {
  **{f'grad_train/encoder_imaging.{name}.weight': 5e-5 for name in ('conv1', 'bn1', 'layer4.0.conv2')},
  **{f'out/train_{name}': 3e-5 for name in ('image_features', 'z_image', 'itc_logits')},
}

# The modules that hold weights of the method; anything else in a checkpoint (metrics, the online classifier) is not
# of it.
MODULES = re.compile(r'^((encoder|projector)_(imaging|tabular)|encoder_multimodal|predictor_tabular|itm_head)\.')
COUNTER = re.compile(r'\.num_batches_tracked$')

# [out, in, h, w] <-> [h, w, in, out]
CONV = names.Form(lambda w: w.transpose(2, 3, 1, 0), lambda w: w.transpose(3, 2, 0, 1))


def pretraining(cfg) -> list[names.Entry]:
  """Names of `TipModel3Loss.py` for the params of `mim_jax.methods.tip`."""
  theirs, ours = 'encoder_tabular', 'tabular_encoder'
  if is_resnet(cfg):
    image = resnet_names(cfg, 'encoder_imaging.', 'image_encoder/')
  else:
    image = mae.encoder_names(vit.sides(cfg.patch, 2), vit.size(vit_size(cfg))['heads'], 'image_encoder/')
    image = [
      names.Entry(tuple(f'encoder_imaging.{part}' for part in entry.parts), entry.ours, entry.form) for entry in image
    ]
  return [
    *image,
    *projector('projector_imaging', 'image_projector'),
    names.Entry(f'{theirs}.cls_token', f'{ours}/cls_token'),
    names.Entry(f'{theirs}.mask_special_token', f'{ours}/mask_token'),
    names.Entry(f'{theirs}.cat_embedding.weight', f'{ours}/cat_embedding'),
    names.Entry(f'{theirs}.column_embedding.weight', f'{ours}/column_embedding'),
    *names.linear(f'{theirs}.con_proj', f'{ours}/con_proj'),
    *names.norm(f'{theirs}.norm', f'{ours}/norm'),
    *block(f'{theirs}.transformer_blocks.{{i}}', f'{ours}/blocks', vit.size(cfg.tabular)['heads']),
    *projector('projector_tabular', 'tabular_projector'),
    *names.linear('encoder_multimodal.image_proj', 'image_projection/image_proj'),
    *names.norm('encoder_multimodal.image_norm', 'image_projection/image_norm'),
    *names.linear('encoder_multimodal.tabular_proj', 'multimodal_encoder/tabular_proj'),
    *block('encoder_multimodal.transformer_blocks.{i}', 'multimodal_encoder/blocks', vit.size(cfg.multimodal)['heads']),
    *names.norm('encoder_multimodal.norm', 'multimodal_encoder/norm'),
    *names.linear('predictor_tabular.cat_classifier', 'predictor/cat_classifier'),
    *names.linear('predictor_tabular.con_regressor', 'predictor/con_regressor'),
    *names.linear('itm_head', 'itm_head'),
  ]


def statistics(cfg) -> list[names.Entry]:
  """Names of the running statistics, the state of the method; none for a ViT."""
  if not is_resnet(cfg):
    return []
  scales = [entry for entry in resnet_names(cfg, 'encoder_imaging.', 'image_encoder/') if entry.ours.endswith('/scale')]
  return [
    names.Entry(entry.theirs.removesuffix('weight') + f'running_{which}', entry.ours.removesuffix('scale') + which)
    for entry in scales
    for which in ('mean', 'var')
  ]


def is_resnet(cfg) -> bool:
  return not cfg.image_encoder.startswith('vit:')


def vit_size(cfg) -> str:
  return cfg.image_encoder.removeprefix('vit:')


def resnet_names(cfg, theirs: str, ours: str) -> list[names.Entry]:
  """torchvision's names of `models.resnet.ResNet` without its classifier and its running statistics."""
  conv = lambda a, b: [names.Entry(f'{theirs}{a}.weight', f'{ours}{b}/kernel', CONV)]
  norm = lambda a, b: names.norm(f'{theirs}{a}', f'{ours}{b}')
  size = resnet.size(cfg.image_encoder)
  layers = range(1, 4 if size['block'] == 'bottleneck' else 3)
  table = conv('conv1', 'conv1') + norm('bn1', 'bn1')
  for stage, depth in enumerate(size['depths'], start=1):
    for i in range(depth):
      a, b = f'layer{stage}.{i}', f'layer{stage}_{i}'
      for k in layers:
        table += conv(f'{a}.conv{k}', f'{b}/conv{k}') + norm(f'{a}.bn{k}', f'{b}/bn{k}')
      if not i:  # an entry that neither side has is passed over
        table += conv(f'{a}.downsample.0', f'{b}/downsample_conv') + norm(f'{a}.downsample.1', f'{b}/downsample_bn')
  return table


def projector(theirs: str, ours: str) -> list[names.Entry]:
  return names.linear(f'{theirs}.layers.0', f'{ours}/fc1') + names.linear(f'{theirs}.layers.2', f'{ours}/fc2')


def block(theirs: str, ours: str, heads: int) -> list[names.Entry]:
  """Names of a stack of `models.tabular.Block`, with or without cross-attention."""
  cross = f'{theirs}.cross_attn'
  by_head = names.Form(lambda w: w.reshape(heads, -1), np.ravel)
  query = names.Form(lambda w: w.T.reshape(w.shape[1], heads, -1), lambda w: w.reshape(w.shape[0], -1).T)
  return [
    *names.block(theirs, ours, heads),
    *names.norm(f'{theirs}.cross_norm', f'{ours}/cross_norm'),
    names.Entry(f'{cross}.q_proj.weight', f'{ours}/cross_attn/q/kernel', query),
    names.Entry(f'{cross}.q_proj.bias', f'{ours}/cross_attn/q/bias', by_head),
    names.Entry(f'{cross}.kv_proj.weight', f'{ours}/cross_attn/kv/kernel', names.qkv_kernel(heads, 2)),
    names.Entry(f'{cross}.kv_proj.bias', f'{ours}/cross_attn/kv/bias', names.qkv_bias(heads, 2)),
    names.Entry(f'{cross}.proj.weight', f'{ours}/cross_attn/proj/kernel', names.merge_heads(heads)),
    names.Entry(f'{cross}.proj.bias', f'{ours}/cross_attn/proj/bias'),
  ]


def load(weights: Mapping[str, np.ndarray], cfg) -> tuple[dict, dict]:
  """Official names -> (params, state) of the method with options `cfg`, which must be those of the weights.

  `weights` may be what `checkpoint.files.read` makes of a Lightning checkpoint, where 'state_dict.' precedes the names.

  Raises:
    CheckpointError: an array that has no place, one that is lacking, or one of another shape; the message names it.
  """
  given = {name.removeprefix('state_dict.'): name for name in weights}
  weights = {name: weights[key] for name, key in given.items() if MODULES.match(name) and not COUNTER.search(name)}
  params, unknown = names.load(weights, pretraining(cfg))
  state, unknown = names.load({name: weights[name] for name in unknown}, statistics(cfg))
  if unknown:
    raise CheckpointError(
      f'weights without a place under these options: {", ".join(unknown)}; set those of the checkpoint'
    )
  built = method.build(cfg)
  wanted = jax.eval_shape(lambda: built.init(jax.random.key(0), built.abstract_batch(2)))
  for ours, tree in ((params, wanted), (state, jax.eval_shape(lambda: built.state({})))):
    found, expected = ({k: v.shape for k, v in traverse_util.flatten_dict(t, sep='/').items()} for t in (ours, tree))
    for name in sorted(expected.keys() | found.keys()):
      if found.get(name) != expected.get(name):
        raise CheckpointError(
          f'{name} is {found.get(name, "absent")} in the weights, {expected.get(name, "absent")} under these options; '
          'set the options of the checkpoint'
        )
  return jax.tree.map(jnp.asarray, (params, state))


def export(params, state, cfg) -> dict[str, np.ndarray]:
  """Params and state -> official names; load(export(...)) gives them back."""
  return names.export(params, pretraining(cfg)) | names.export(state, statistics(cfg))


def config_of(case, **changes):
  """Our options for a case's `config`, with `changes` put over them."""
  c = case.config
  kind = {'Bottleneck': 'bottleneck', 'BasicBlock': 'basic'}[c.res_block]
  given = dict(
    image_encoder=f'{kind}/{",".join(map(str, c.res_layers))}/{64 // c.res_div}',
    image_size=case.inputs['image'].shape[2:],
    channels=case.inputs['image'].shape[1],
    cat_lengths=tuple(c.cat_lengths),
    num_con=c.num_con,
    tabular=f'{c.dim}/{c.tab_layers}/{c.num_heads}',
    multimodal=f'{c.dim}/{c.mm_layers}/{c.num_heads}',
    mlp_ratio=float(c.mlp_ratio),
    ln_eps=c.layer_norm_eps,
    qkv_bias=c.qkv_bias,
    projection=c.proj,
    bn_momentum=c.bn_momentum,
    bn_eps=c.bn_eps,
    mask_ratio=c.mask_rate,
    temperature=c.temperature,
    image_to_table=c.lambda_0,
  )
  return method.options('tip', **given | changes)


def replay(case) -> dict[str, np.ndarray]:
  """Outputs and gradients of a reference case under its own names; `train_` those by statistics of the batch."""
  cfg = config_of(case)
  params, state = load(case.weights, cfg)
  batch = {'image': names.channels_last(case.inputs['image']), 'table': jnp.asarray(case.inputs['tab_original'])}
  size = len(batch['table'])
  certain = lambda rows: 1e6 * jax.nn.one_hot(rows, size)  # noise by which these rows are picked
  draws = {
    'corrupted': jnp.asarray(case.inputs['tab_corrupted']),
    'mask': jnp.asarray(case.inputs['mask']).astype(bool),
    'table_gumbel': certain(case.inputs['neg_tab_idx']),
    'image_gumbel': certain(case.inputs['neg_img_idx']),
  }

  def run(bn_train):
    loss = method.build(config_of(case, bn_train=bn_train)).loss
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, aux), grads = step(params, state, {}, batch, draws, 0)
    out, metrics = aux['out'], aux['metrics']
    side = [-(-n // 32) for n in cfg.image_size]
    features = out['image_features'].reshape(size, *side, -1)
    return (
      out,
      grads,
      {
        'image_features': jnp.moveaxis(features, -1, 1),
        'z_image': out['z_image'],
        'z_tabular': out['z_table'],
        'itc_logits': out['itc_logits'],
        'itm_logits': out['itm_logits'],
        'itc_loss': metrics['loss/itc'],
        'itm_loss': metrics['loss/itm'],
        'tr_loss': metrics['loss/mtr'],
        'total_loss': value,
        'weights_i2t': out['weights_image_to_table'],
        'weights_t2i': out['weights_table_to_image'],
        'tab_features_itc': out['tokens'],
        'tab_features_masked': out['masked_tokens'],
        'mm_positive': out['fused'],
        'mm_masked': out['masked_fused'],
        'pred_cat': out['pred_cat'],
        'pred_con': out['pred_con'][..., None],
      },
    )

  table = pretraining(cfg)
  _, grads, still = run(bn_train=False)
  out, train_grads, trained = run(bn_train=True)
  moved = names.export(out['state'], statistics(cfg))
  return {
    **{f'out/{name}': np.asarray(value) for name, value in still.items()},
    **{f'out/train_{name}': np.asarray(value) for name, value in trained.items()},
    **{f'out/train_new_{name}': value for name, value in moved.items()},
    **names.grads(grads, table),
    **names.grads(train_grads, table, 'grad_train/'),
  }
