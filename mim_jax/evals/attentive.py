"""Attentive probe: one learned query looks at the tokens of a frozen encoder, then a linear classifier.

Chen et al. 2022 (CAE, arXiv 2202.03026), section 4.1 and appendix: cross-attention with LayerNorms on query, keys and
values, neither residual nor MLP, over all tokens with the class token; BatchNorm without scale and shift; SGD with Nesterov
momentum, rate 0.4 for a batch of 8192, 90 epochs, 10 of them warmup, no weight decay. The defaults are these; sets much
smaller than ImageNet want a smaller train_batch, and may want optimizer='adamw'.

Unlike the linear probe it does not ask that the encoder gathers in one token, or evenly in all, what tells the class.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax.errors import ConfigError
from mim_jax.evals import features, fit, linear, metrics
from mim_jax.models import blocks
from mim_jax.ops import losses

DEFAULTS = {
  **fit.DEFAULTS,
  'frozen': True,
  'heads': 0,  # of the attention; 0: as many as give each 64 dimensions
  'train_batch': 8192,
  'epochs': 90,
  'warmup_epochs': 10,
  'optimizer': 'sgd',
  'nesterov': True,
  'base_lr': 0.4 * 256 / 8192,
  'wd': 0.0,
}
BASELINES = fit.BASELINES
reads, check = fit.reads, fit.check

HEAD_STD = 0.01


class Query(nn.Module):
  """What `Method.encode` gives -> [B, D] float32, by a learned query."""

  heads: int

  @nn.compact
  def __call__(self, encoded):
    tokens = encoded['tokens'].astype(jnp.float32)
    if 'cls' in encoded:
      tokens = jnp.concatenate([encoded['cls'].astype(jnp.float32)[:, None], tokens], axis=1)
    width = tokens.shape[-1]
    query = self.param('query', nn.initializers.normal(0.02), (1, 1, width))
    q = blocks.LayerNorm(name='norm_q')(jnp.broadcast_to(query, (len(tokens), 1, width)))
    k, v = blocks.LayerNorm(name='norm_k')(tokens), blocks.LayerNorm(name='norm_v')(tokens)
    return blocks.CrossAttention(self.heads, name='attn')(q, k, values=v)[:, 0]


def run(encoder: features.Encoder, cfg, ctx: features.Context) -> dict[str, float]:
  """top1, top5, class_mean (fractions) and train_loss; see `fit.run`."""
  return fit.run(encoder, task_of(cfg, ctx.open_source(cfg.train).classes(cfg.label)), cfg, ctx)


def task_of(cfg, classes: int) -> fit.Task:
  """Query, batch norm with running statistics in the task's state, classifier."""

  def query_of(width):
    heads = cfg.heads or max(1, width // 64)
    if width % heads:
      raise ConfigError(f'heads is {heads}, which does not divide the {width} dimensions of the tokens')
    return Query(heads)

  def init(key, encoded, batch):
    del batch
    keys = jax.random.split(key)
    width = encoded['tokens'].shape[-1]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), encoded)
    kernel = nn.initializers.truncated_normal(HEAD_STD)(keys[1], (width, classes))
    return {
      'query': query_of(width).init(keys[0], zeros)['params'],
      'head': {'kernel': kernel, 'bias': jnp.zeros(classes)},
    }

  def predict(params, state, encoded, batch, train):
    del batch
    x = query_of(encoded['tokens'].shape[-1]).apply({'params': params['query']}, encoded)
    mean, var = (jnp.mean(x, axis=0), jnp.var(x, axis=0)) if train else (state['mean'], state['var'])
    normed = (x - mean) / jnp.sqrt(var + linear.NORM_EPS)
    return normed @ params['head']['kernel'] + params['head']['bias'], {'pooled': x}

  def state(params):
    width = params['head']['kernel'].shape[0]
    return {'mean': jnp.zeros(width), 'var': jnp.ones(width)}

  def after_step(state, out):
    return linear.running(state, out['pooled'])

  def prepare(batch, draws):
    del draws
    return {name: value for name, value in batch.items() if name != cfg.label}, batch[cfg.label]

  def measure(prediction, batch):
    return {'prediction': prediction, 'label': batch[cfg.label]}

  def figures(kept):
    return metrics.classification(kept['prediction'], features.class_labels(kept['label'], cfg.test))

  return fit.Task(
    init,
    predict,
    lambda prediction, target, draws: losses.cross_entropy(prediction, target),
    prepare,
    measure,
    figures,
    state=state,
    after_step=after_step,
    couples=True,
  )
