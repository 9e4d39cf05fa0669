"""MAE's official release (facebookresearch/mae): names, and replays of `mae` (pre-training) and `mae_vit` (downstream ViT).

Published files: `mae_pretrain_vit_{base,large,huge}.pth` hold the encoder only, `mae_visualize_vit_large*.pth` encoder and decoder (raw
pixels), `mae_finetuned_vit_*.pth` the downstream ViT with `fc_norm`, `head` and a trained `pos_embed`. timm's `vit_*.mae` entries use the
same names for the encoder; transformers' ViTMAE names are in `huggingface`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax import config, method, optim
from mim_jax.evals import linear as probe
from mim_jax.methods import mae
from mim_jax.models import heads, posemb, vit
from mim_jax.models.blocks import drop_path
from mim_jax.official import names
from mim_jax.ops import losses, masking, mix, patches, targets

# Fixed tables that official files carry and our trees do not.
TABLES = ('pos_embed', 'decoder_pos_embed')


def encoder_names(patch, encoder_heads, prefix='encoder/') -> list[names.Entry]:
  """Official (= timm) names of the encoder; `pos_embed` only matters for an encoder with a learned table."""
  return [
    names.Entry('cls_token', f'{prefix}cls_token'),
    names.Entry('pos_embed', f'{prefix}pos_embed'),
    names.Entry('patch_embed.proj.weight', f'{prefix}patch_embed/kernel', names.patch_conv(patch)),
    names.Entry('patch_embed.proj.bias', f'{prefix}patch_embed/bias'),
    *names.block('blocks.{i}', f'{prefix}blocks', encoder_heads),
    *names.norm('norm', f'{prefix}norm'),
  ]


def decoder_names(decoder_heads) -> list[names.Entry]:
  return [
    *names.linear('decoder_embed', 'decoder/embed'),
    names.Entry('mask_token', 'decoder/mask_token'),
    *names.block('decoder_blocks.{i}', 'decoder/blocks', decoder_heads),
    *names.norm('decoder_norm', 'decoder/norm'),
    *names.linear('decoder_pred', 'decoder/pred'),
  ]


def pretraining(cfg) -> list[names.Entry]:
  """Names of `models_mae.py` for the options of `mim_jax.methods.mae`."""
  return encoder_names(vit.sides(cfg.patch, 2), vit.size(cfg.size)['heads']) + decoder_names(
    vit.size(cfg.decoder)['heads']
  )


def downstream(patch, encoder_heads) -> list[names.Entry]:
  """Names of `models_vit.py` for `models.heads.Classifier`."""
  return encoder_names(patch, encoder_heads) + names.norm('fc_norm', 'fc_norm') + names.linear('head', 'head')


def huggingface(cfg) -> list[names.Entry]:
  """Names of transformers' ViTMAEForPreTraining for the options of `mim_jax.methods.mae`.

  Its LayerNorm eps is 1e-12 unless its config says otherwise: set `ln_eps` from its `layer_norm_eps`.
  """
  encoder_heads, decoder_heads = vit.size(cfg.size)['heads'], vit.size(cfg.decoder)['heads']
  return [
    names.Entry('vit.embeddings.cls_token', 'encoder/cls_token'),
    names.Entry(
      'vit.embeddings.patch_embeddings.projection.weight',
      'encoder/patch_embed/kernel',
      names.patch_conv(vit.sides(cfg.patch, 2)),
    ),
    names.Entry('vit.embeddings.patch_embeddings.projection.bias', 'encoder/patch_embed/bias'),
    *names.block('vit.encoder.layer.{i}', 'encoder/blocks', encoder_heads, names.HF_VIT_BLOCK),
    *names.norm('vit.layernorm', 'encoder/norm'),
    *names.linear('decoder.decoder_embed', 'decoder/embed'),
    names.Entry('decoder.mask_token', 'decoder/mask_token'),
    *names.block('decoder.decoder_layers.{i}', 'decoder/blocks', decoder_heads, names.HF_VIT_BLOCK),
    *names.norm('decoder.decoder_norm', 'decoder/norm'),
    *names.linear('decoder.decoder_pred', 'decoder/pred'),
  ]


def replay(case) -> dict[str, np.ndarray]:
  """Outputs and gradients of a reference case under its own names."""
  return _replay_downstream(case) if case.name.startswith('mae_vit') else _replay_pretraining(case)


def config_of(case):
  """Our options for a case's `config`."""
  c = case.config
  return method.options(
    'mae',
    size=f'{c.embed_dim}/{c.depth}/{c.num_heads}',
    decoder=f'{c.decoder_embed_dim}/{c.decoder_depth}/{c.decoder_num_heads}',
    patch=c.patch_size,
    image_size=c.img_size,
    channels=case.inputs['imgs'].shape[1],
    mlp_ratio=float(c.mlp_ratio),
    ln_eps=c.ln_eps,
    mask_ratio=c.mask_ratio,
    norm_pix=c.norm_pix_loss,
  )


def _replay_pretraining(case):
  cfg = config_of(case)
  weights = {name: value for name, value in case.weights.items() if name not in TABLES}
  table = [entry for entry in pretraining(cfg) if entry.theirs not in TABLES]
  params = names.complete(*names.load(weights, table))
  built = method.build(cfg)
  encoder, decoder = mae.modules(cfg)
  batch = {'image': names.channels_last(case.inputs['imgs'])}
  draws = {'noise': jnp.asarray(case.inputs['noise'])}

  (loss, aux), grads = jax.value_and_grad(built.loss, has_aux=True)(params, {}, {}, batch, draws, 0)
  keep_ids, restore_ids, mask = masking.keep_smallest(draws['noise'], aux['out']['latent'].shape[1] - 1)
  latent, seen = encoder.apply({'params': params['encoder']}, batch['image'], keep_ids, taps=True)
  pred, built_up = decoder.apply({'params': params['decoder']}, latent, keep_ids, restore_ids, taps=True)
  _, whole = encoder.apply({'params': params['encoder']}, batch['image'], taps=True)
  raw = patches.patchify(batch['image'], encoder.patch)
  normed = targets.norm_pix(raw)
  out = {
    'patch_embed': whole['tokens'],
    'enc_in': seen['input'],
    'latent': latent,
    'mask': mask,
    'ids_restore': restore_ids,
    'ids_keep': keep_ids,
    'dec_in': built_up['input'],
    'pred': pred,
    'loss': loss,
    'loss_norm_pix': losses.masked_mse(pred, normed, mask),
    'loss_raw_pix': losses.masked_mse(pred, raw, mask),
    'target_raw': raw,
    'target_norm': normed,
    'pos_embed': encoder.table,
    'decoder_pos_embed': decoder.table,
    **{f'enc_block_{i}': layer for i, layer in enumerate(seen['layers'])},
    **{f'dec_block_{i}': layer for i, layer in enumerate(built_up['layers'])},
    **_replay_training(case, built, params, batch, table),
  }
  return {**{f'out/{name}': np.asarray(value) for name, value in out.items()}, **names.grads(grads, table)}


def _replay_training(case, built, params, batch, table):
  """The short AdamW run of the case: loss and rate of each step, and the parameters after the last."""
  train = case.config.train
  cfg = config.section(
    'optim',
    name='adamw',
    base_lr=train['lr'],
    lr_batch=0,
    b1=train['betas'][0],
    b2=train['betas'][1],
    eps=train['eps'],
    wd=train['weight_decay'],
  )
  schedule = config.section(
    'schedule', name='cosine', warmup=f'{train["warmup_epochs"]} epochs', min_lr=train['min_lr']
  )
  optimizer = optim.make(
    cfg,
    schedule,
    batch_size=1,
    total_steps=train['epochs'] * train['steps_per_epoch'],
    steps_per_epoch=train['steps_per_epoch'],
    params=params,
  )
  opt, rows, rates = optimizer.init(params), [], []
  step_fn = jax.jit(jax.value_and_grad(built.loss, has_aux=True))
  for step in range(train['steps']):
    (loss, _), grads = step_fn(params, {}, {}, batch, {'noise': jnp.asarray(case.inputs['train_noise'][step])}, step)
    params, opt, info = optimizer.update(grads, opt, params, step)
    rows.append(loss)
    rates.append(info['lr'])
  return {
    'train_loss': np.array(rows),
    'train_lr': np.array(rates),
    **{f'train_w/{k}': v for k, v in names.export(params, table).items()},
  }


def _replay_downstream(case):
  c = case.config
  patch = vit.sides(c.patch_size, 2)
  grid = patches.grid_of(vit.sides(c.img_size, 2), patch)
  table = downstream(patch, c.num_heads)
  params = names.complete(*names.load(case.weights, table))
  images, labels = names.channels_last(case.inputs['imgs']), jnp.asarray(case.inputs['labels'])

  size = len(labels)
  blend = {'cut': jnp.zeros(size, bool), 'share': jnp.full(size, c.mix_lam), 'box': jnp.zeros((size, 4), jnp.int32)}
  mixed_images, mixed_labels = mix.apply(images, labels, blend, c.num_classes, c.smoothing)
  plain_labels = mix.smooth_labels(labels, c.num_classes, c.smoothing)
  drop = case.inputs['drop_x']
  out = {
    'mix_target': mixed_labels,
    'mix_imgs': mixed_images.transpose(0, 3, 1, 2),
    'pos_resized': posemb.resample(case.inputs['pos_ckpt'], (c.pos_from,) * 2, (c.pos_to,) * 2, cls_rows=1),
    'drop_path': drop_path(
      jnp.asarray(drop), jnp.asarray(case.inputs['drop_uniform']).reshape(-1), jnp.float32(c.drop_path)
    ),
  }
  replayed = {}
  for head, pool in (('gp', 'mean'), ('cls', 'cls')):
    encoder = vit.ViT(
      c.embed_dim, c.depth, c.num_heads, patch, grid, c.mlp_ratio, pos='learned', final_norm=pool == 'cls', eps=c.ln_eps
    )
    model = heads.Classifier(encoder, c.num_classes, pool)
    unused = ('norm',) if pool == 'mean' else ('fc_norm',)
    mine = jax.tree.map(
      jnp.asarray, {**params, 'encoder': {k: v for k, v in params['encoder'].items() if k not in unused}}
    )
    mine = {k: v for k, v in mine.items() if k not in unused}

    def loss_of(p, model=model):
      logits, _ = model.apply({'params': p}, images)
      return losses.cross_entropy(logits, mixed_labels)

    logits, features = model.apply({'params': mine}, images)
    out |= {
      f'{head}_features': features,
      f'{head}_logits': logits,
      f'{head}_loss_soft': losses.cross_entropy(logits, mixed_labels),
      f'{head}_loss_ce': losses.cross_entropy(logits, labels),
      f'{head}_loss_label_smoothing': losses.cross_entropy(logits, plain_labels),
    }
    replayed |= names.grads(jax.grad(loss_of)(mine), table, prefix=f'grad_{head}/')
  for block, extra in (('lars', {}), ('lars_wd', c.lars_wd)):
    out |= _replay_probe(case, block, {**c.lars, **extra}, model, mine)
  return {**replayed, **{f'out/{name}': np.asarray(value) for name, value in out.items()}}


def _replay_probe(case, prefix, lars, model, params):
  """Linear probe of the class token by LARS on the case's batches; `model` pools the class token."""
  features = lambda images: model.apply({'params': params}, names.channels_last(images))[1]
  state = probe.start(params['head'])
  rows = []
  for step in range(len(case.inputs['probe_imgs'])):
    state, info = probe.probe_step(
      state,
      features(case.inputs['probe_imgs'][step]),
      jnp.asarray(case.inputs['probe_labels'][step]),
      lr=lars['lr'],
      wd=lars['weight_decay'],
      momentum=lars['momentum'],
      trust=lars['trust_coefficient'],
    )
    rows.append(info)
  return {
    f'{prefix}_train_logits_0': rows[0]['logits'],
    f'{prefix}_loss': np.array([row['loss'] for row in rows]),
    f'{prefix}_head_weight': state['head']['kernel'].T,
    f'{prefix}_head_bias': state['head']['bias'],
    f'{prefix}_bn_mean': state['norm']['mean'],
    f'{prefix}_bn_var': state['norm']['var'],
    f'{prefix}_eval_logits': probe.logits(state, features(case.inputs['imgs'])),
  }
