"""TIP: predict hidden table columns from the others and an image; contrast and match (Du et al. 2024, arXiv 2407.07582).

Official code: siyi-wind/TIP, models/Tips/TipModel3Loss.py. The masked modality is the table; no pixel is hidden. Followed
as the code has it: the fixed temperature, projectors without BatchNorm, one softmax over the categories of all columns
together. Different here: statistics of BatchNorm and the negatives are those of the global batch, as they are on the
authors' one device; a corrupted cell takes the value of another row of the batch, where they take one of the whole table
(the same distribution, but for the batch being finite). Beyond the paper: with `missing` the table may lack cells in
pre-training too; they are hidden like masked ones and are no targets.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax.errors import ConfigError
from mim_jax.method import Field, Method
from mim_jax.models import blocks, initial, resnet, tabular, vit
from mim_jax.ops import contrast, losses, patches, tables

DEFAULTS = {
  'image_encoder': 'resnet50',  # a ResNet (see `models.resnet.size`), or 'vit:' and a size of `models.vit.size`
  'patch': 16,  # of a ViT
  'image_size': 128,  # side, or (height, width)
  'channels': 3,
  # Categories of each categorical column, which come first, and number of continuous ones: those of the table at hand.
  'cat_lengths': (16, 16, 4, 8),
  'num_con': 13,
  'tabular': '512/4/8',  # width/depth/heads of the encoder of the table
  'multimodal': '512/4/8',
  'mlp_ratio': 4.0,
  'ln_eps': 1e-5,
  'qkv_bias': False,
  'projection': 128,
  'init_std': 0.02,  # of the dense layers of the transformers; it suits width 512, narrower ones want more
  'bn_momentum': 0.1,  # weight of the newest batch in the running statistics
  'bn_eps': 1e-5,
  'bn_train': True,  # normalise by the statistics of the batch in training; False: by the running ones, which then stay
  'mask_ratio': 0.5,  # share of the columns hidden for reconstruction
  'corruption': 0.3,  # share of the columns replaced for contrast and matching
  'temperature': 0.1,
  'image_to_table': 0.5,  # weight of that direction of the contrast; the other one has the rest
  'missing': False,  # the batch has a field `missing`
}
FULL = 1e6  # a value whose bar is as long as can be
BLUE, GREY, PALE, GREEN, RED = (0.25, 0.45, 0.75), (0.6, 0.6, 0.6), (0.9, 0.9, 0.9), (0.2, 0.65, 0.3), (0.85, 0.25, 0.2)


def modules(cfg) -> dict[str, nn.Module]:
  """The networks, by the name of their parameters."""
  table, fusion = vit.size(cfg.tabular), vit.size(cfg.multimodal)
  shared = dict(mlp_ratio=cfg.mlp_ratio, eps=cfg.ln_eps, dtype=cfg.dtype)
  blocks_of = dict(qkv_bias=cfg.qkv_bias, scan=cfg.scan, remat=cfg.remat)
  if cfg.image_encoder.startswith('vit:'):
    patch = vit.sides(cfg.patch, 2)
    form = dict(patch=patch, grid=patches.grid_of(vit.sides(cfg.image_size, 2), patch), pos='learned')
    image = vit.ViT(**vit.size(cfg.image_encoder[4:]), **form, dtype=cfg.dtype, scan=cfg.scan, remat=cfg.remat)
  else:
    norm = dict(momentum=cfg.bn_momentum, eps=cfg.bn_eps)
    image = resnet.ResNet(**resnet.size(cfg.image_encoder), **norm, dtype=cfg.dtype, remat=cfg.remat)
  return {
    'image_encoder': image,
    'image_projector': tabular.Projector(cfg.projection, cfg.dtype),
    'tabular_encoder': tabular.TabularEncoder(tuple(cfg.cat_lengths), cfg.num_con, **table, **shared, **blocks_of),
    'tabular_projector': tabular.Projector(cfg.projection, cfg.dtype),
    'image_projection': tabular.ImageProjection(fusion['width'], cfg.ln_eps, cfg.dtype),
    'multimodal_encoder': tabular.MultimodalEncoder(**fusion, **shared, **blocks_of),
    'predictor': tabular.Predictor(tuple(cfg.cat_lengths), cfg.dtype),
    'itm_head': blocks.Dense(2, cfg.dtype),
  }


def make(cfg) -> Method:
  parts = modules(cfg)
  encoder, lengths, offsets = parts['image_encoder'], tuple(cfg.cat_lengths), parts['tabular_encoder'].offsets
  convolutional = isinstance(encoder, resnet.ResNet)
  columns = len(lengths) + cfg.num_con
  if not lengths or not cfg.num_con or min(lengths) < 2:
    raise ConfigError(
      f'method.cat_lengths={lengths}, num_con={cfg.num_con}: the table needs a continuous column and categorical ones of '
      'two categories or more'
    )
  hidden_count, corrupted = tables.hidden_count(columns, cfg.mask_ratio), int(cfg.corruption * columns)
  bn_train, lacking, temperature, share = cfg.bn_train, cfg.missing, cfg.temperature, cfg.image_to_table
  init_std = cfg.init_std
  height, width = vit.sides(cfg.image_size, 2)
  fields = {
    'image': Field('B H W C', (height, width, cfg.channels), doc='in [0, 1] (data.transforms ends in to_float)'),
    'table': Field('B N', (columns,), doc='codes, then standardised columns (transform table)'),
  }
  if lacking:
    fields['missing'] = Field('B N', (columns,), 'bool', 'cells that the table lacks (transform table)')

  def apply(name, params, *args, **options):
    return parts[name].apply({'params': params[name]}, *args, **options)

  def draw(key, batch):
    keys = jax.random.split(key, 5)
    size = len(batch['table'])
    noise = lambda key, *shape: jax.random.uniform(key, (size, *shape))
    taken = tables.smallest(noise(keys[0], columns), corrupted)
    others = tables.from_marginals(batch['table'], noise(keys[1], columns), batch.get('missing'))
    return {
      'corrupted': jnp.where(taken, others, batch['table']),
      'mask': tables.smallest(noise(keys[2], columns), hidden_count),
      'table_gumbel': jax.random.gumbel(keys[3], (size, size)),  # picks a table for every image
      'image_gumbel': jax.random.gumbel(keys[4], (size, size)),  # picks an image for every table
    }

  def init(key, batch):
    keys = dict(zip(parts, jax.random.split(key, len(parts)), strict=True))
    params = {}

    def begin(name, *args):
      out, variables = parts[name].init_with_output(keys[name], *args)
      params[name] = variables['params']
      return out

    image = jnp.zeros((1, *batch['image'].shape[1:]))
    features, pooled = split(begin('image_encoder', image))
    tokens = begin('tabular_encoder', jnp.zeros((1, columns)))
    begin('image_projector', pooled)
    begin('tabular_projector', tokens[:, 0])
    fused = begin('multimodal_encoder', tokens, begin('image_projection', features))
    begin('predictor', fused[:, 1:])
    begin('itm_head', fused[:, 0])
    # As the official code starts them: N(0, init_std^2) and bias 0; projectors and the matching head are left as PyTorch
    # starts them.
    for name in ('tabular_encoder', 'image_projection', 'multimodal_encoder', 'predictor'):
      params[name] = initial.normal_kernels(jax.random.fold_in(keys[name], 1), params[name], init_std)
    for name in ('image_projector', 'tabular_projector', 'itm_head'):
      params[name] = initial.torch_dense(jax.random.fold_in(keys[name], 1), params[name])
    return params

  def state(params):
    del params  # the statistics start as those of a standard normal, whatever the weights
    if not convolutional:
      return {}
    image = jax.ShapeDtypeStruct((1, height, width, cfg.channels), jnp.float32)
    shapes = jax.eval_shape(lambda x: encoder.init(jax.random.key(0), x), image)['batch_stats']
    start = lambda path, leaf: jnp.full(leaf.shape, path[-1].key == 'var', leaf.dtype)
    return {'image_encoder': jax.tree_util.tree_map_with_path(start, shapes)}

  def split(out):
    """Output of the image encoder -> features [B, M, C] of all places (or tokens), pooled [B, C]."""
    if convolutional:
      return out.reshape(len(out), -1, out.shape[-1]), jnp.mean(out, axis=(1, 2), dtype=jnp.float32)
    return out, out[:, 0]

  def see(params, state, image, train):
    """Features and pooled features of images, and the state after them."""
    if not convolutional:
      return *split(apply('image_encoder', params, image)), state
    variables = {'params': params['image_encoder'], 'batch_stats': state['image_encoder']}
    if not train:
      return *split(encoder.apply(variables, image)), state
    out, new = encoder.apply(variables, image, train=True, mutable='batch_stats')
    return *split(out), {'image_encoder': new['batch_stats']}

  def compute(params, state, batch, draws, train):
    table, missing = batch['table'], batch['missing'] if lacking else None
    size = len(table)
    if size < 2:
      raise ValueError(f'a batch of {size}: contrast and negatives need two examples or more')
    features, pooled, new_state = see(params, state, batch['image'], train)
    context = apply('image_projection', params, features)

    tokens = apply('tabular_encoder', params, draws['corrupted'], missing)
    z_image = apply('image_projector', params, pooled).astype(jnp.float32)
    z_table = apply('tabular_projector', params, tokens[:, 0]).astype(jnp.float32)
    itc, logits = contrast.clip_loss(z_image, z_table, temperature, share)
    table_weights, image_weights = contrast.negative_weights(logits), contrast.negative_weights(logits.T)
    other_table = contrast.pick(table_weights, draws['table_gumbel'])
    other_image = contrast.pick(image_weights, draws['image_gumbel'])

    hidden = draws['mask'] if missing is None else draws['mask'] | missing
    masked = apply('tabular_encoder', params, table, hidden)
    # One pass for all that is fused: own pairs, own table with another image, another table with own image, masked
    # table.
    rows = jnp.concatenate([tokens, tokens, tokens[other_table], masked])
    seen = jnp.concatenate([context, context[other_image], context, context])
    fused = apply('multimodal_encoder', params, rows, seen)
    pairs, reconstructed = fused[: 3 * size], fused[3 * size :]
    matched = apply('itm_head', params, pairs[:, 0]).astype(jnp.float32)
    labels = (jnp.arange(3 * size) < size).astype(jnp.int32)
    itm = losses.cross_entropy(matched, labels)

    pred_cat, pred_con = apply('predictor', params, reconstructed[:, 1:])
    target = draws['mask'] if missing is None else draws['mask'] & ~missing
    categorical, continuous = tables.reconstruction(pred_cat, pred_con, table, target, lengths, offsets)
    mtr = (categorical + continuous) / 2

    count = len(lengths)
    right = (tables.best_codes(pred_cat, lengths, offsets) == table[:, :count]) & target[:, :count]
    found = jnp.argmax(logits, axis=1) == jnp.arange(size)
    metrics = {
      'loss/itc': itc,
      'loss/itm': itm,
      'loss/mtr': mtr,
      'loss/mtr_categorical': categorical,
      'loss/mtr_continuous': continuous,
      'accuracy/itc': jnp.mean(found),
      'accuracy/itm': jnp.mean(jnp.argmax(matched, axis=1) == labels),
      'accuracy/mtr': jnp.sum(right) / jnp.maximum(jnp.sum(target[:, :count]), 1),
    }
    out = {
      'state': new_state,
      'image_features': features,
      'z_image': z_image,
      'z_table': z_table,
      'itc_logits': logits,
      'weights_image_to_table': table_weights,
      'weights_table_to_image': image_weights,
      'tokens': tokens,
      'masked_tokens': masked,
      'fused': fused[:size],
      'masked_fused': reconstructed,
      'pred_cat': pred_cat,
      'pred_con': pred_con,
      'itm_logits': matched,
      'target': target,
    }
    return (itc + mtr + itm) / 3, {'metrics': metrics, 'out': out}

  def loss(params, state, frozen, batch, draws, step):
    del frozen, step
    return compute(params, state, batch, draws, bn_train)

  def after_step(state, params, out, step):
    del state, params, step
    return out['state']

  def encode(params, batch, state=None):
    """Tokens of the columns and class token of both together; of each alone 'image' [B, C] and 'table' [B, E]."""
    if convolutional and not state:
      raise ValueError('this encoder has BatchNorm: encode needs the state beside the params')
    features, pooled, _ = see(params, state, batch['image'], train=False)
    tokens = apply('tabular_encoder', params, batch['table'], batch.get('missing'))
    fused = apply('multimodal_encoder', params, tokens, apply('image_projection', params, features))
    return {'tokens': fused[:, 1:], 'cls': fused[:, 0], 'image': pooled, 'table': tokens[:, 0]}

  def panels(params, state, frozen, batch, draws):
    """Bars of columns: seen blue, hidden grey, lacking pale; predictions red where wrong or half a deviation off."""
    del frozen
    _, aux = compute(params, state, batch, draws, train=False)
    out, table, mask, count = aux['out'], batch['table'], draws['mask'], len(lengths)
    codes = tables.best_codes(out['pred_cat'], lengths, offsets).astype(jnp.float32)
    pred = jnp.concatenate([codes, out['pred_con']], axis=1)
    close = jnp.concatenate([codes == table[:, :count], jnp.abs(pred - table)[:, count:] < 0.5], axis=1)
    colour = lambda rgb: jnp.array(rgb, jnp.float32)
    lack = batch['missing'][..., None] if lacking else jnp.zeros((*table.shape, 1), bool)
    known = jnp.where(lack, colour(PALE), colour(BLUE))
    spread = lambda tint: jnp.broadcast_to(tint, (*table.shape, 3))
    picture = lambda values, tint: tables.bars(values, lengths, spread(tint), (height, width))
    hidden = mask[..., None]
    judged = jnp.where(close[..., None], colour(GREEN), colour(RED))
    return {
      'image': batch['image'],
      'table': picture(table, known),
      'masked': picture(jnp.where(mask, FULL, table), jnp.where(hidden, colour(GREY), known)),
      'predicted': picture(jnp.where(mask, pred, table), jnp.where(hidden & ~lack, judged, known)),
      'found by table': batch['image'][jnp.argmax(out['itc_logits'], axis=0)],
    }

  made = dict(fields=fields, init=init, draw=draw, encode=encode, panels=panels)
  return Method(loss=loss, state=state, after_step=after_step, couples=True, **made)
