"""Fine-tuning on questions about images, and on classes of pairs of image and text: M3AE's downstream protocol.

Chen et al. 2022, arXiv 2209.07098, section 3.2; zhjohnchan/M3AE, m3ae/modules/objectives.py and its scripts:
everything learns, the layers that join the two sides at `fusion_mult` and a new head at `head_mult` times the rate; 10
% warm-up, then linearly to 0. For the answers of VQA-RAD, SLAKE and VQA-2019 the loss is a sigmoid cross-entropy
summed over the answers, for the classes of MELINDA a softmax; the figure is how often the most likely answer is the
right one.

| published | train_batch | epochs | head_mult | loss | length of texts |
|---|---|---|---|---|---|
| VQA-RAD | 64 | 50 | 50 | sigmoid | 32 |
| SLAKE, VQA-2019 | 32 | 15, 10 | 50 | sigmoid | 32 |
| MELINDA | 16 | 20 | 10 | softmax | 128 |

The official code also drops out 10 % of the activations of text encoder and fusion; here that is done where
`drop_path` is above 0.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax.errors import ConfigError
from mim_jax.evals import features, fit, metrics
from mim_jax.models import blocks
from mim_jax.ops import losses

DEFAULTS = {
  **fit.DEFAULTS,
  'fields': ('image', 'text_ids', 'text_mask'),
  'label': 'answer',
  'closed': '',  # field that is true for questions with a closed answer, for figures of either kind
  'loss': 'sigmoid',  # sigmoid | softmax
  'fusion': r'^(join/(text|image)|fusion|pool_\w+)/',  # parameters that join image and text, by path
  'fusion_mult': 5.0,
  'head_mult': 50.0,
  'schedule': 'linear',
  'warmup': '10%',
  'train_batch': 64,
  'epochs': 50,
  'base_lr': 2e-5,  # per 256 examples: 5e-6 with batches of 64, as it is there
  'wd': 0.01,
  'no_wd': r'bias$|^(text|fusion|words)/.*scale$',  # official code: scales of CLIP's norms are decayed
  'b2': 0.98,
}
BASELINES = fit.BASELINES


def reads(cfg):
  return fit.reads(_with_closed(cfg))


def _with_closed(cfg):
  """The settings of `fit`: an encoder is shown the mark too, and does not look at it."""
  settings = cfg.copy_and_resolve_references()
  settings.fields = (*cfg.fields, *filter(None, [cfg.closed]))
  settings.lr_mult = (*cfg.lr_mult, (cfg.fusion, cfg.fusion_mult), (r'^task/', cfg.head_mult))
  return settings


def check(cfg, options):
  """Raises ConfigError for settings that cannot work, see `fit.check`."""
  fit.check(cfg, options)
  if cfg.loss not in ('sigmoid', 'softmax'):
    raise ConfigError(f"loss is {cfg.loss!r}; expected 'sigmoid' (answers to questions) or 'softmax' (classes)")


class Head(nn.Module):
  """'cls' [B, 2 D] of image and text together -> logits [B, answers] float32."""

  answers: int

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.normal(0.02)
    x = nn.Dense(x.shape[-1], kernel_init=init, name='fc1')(x.astype(jnp.float32))
    x = blocks.ACTIVATIONS['gelu'](blocks.LayerNorm(1e-5, name='norm')(x))
    return nn.Dense(self.answers, kernel_init=init, name='fc2')(x)


def run(encoder: features.Encoder, cfg, ctx: features.Context) -> dict[str, float]:
  """top1, of `closed` and `open` questions where the data tells them apart, and train_loss; see `fit.run`."""
  check(cfg, encoder.options)
  answers = ctx.open_source(cfg.train).classes(cfg.label)
  return fit.run(encoder, task_of(cfg, answers), _with_closed(cfg), ctx)


def task_of(cfg, answers: int) -> fit.Task:
  head = Head(answers)

  def init(key, encoded, batch):
    del batch
    if 'match' not in encoded:
      raise ConfigError(f'evals: the encoder of this method gives nothing of pairs; fields are {", ".join(cfg.fields)}')
    return head.init(key, jnp.zeros((1, encoded['cls'].shape[-1])))['params']

  def predict(params, state, encoded, batch, train):
    del state, batch, train
    return head.apply({'params': params}, encoded['cls']), {}

  def prepare(batch, draws):
    del draws
    return {name: value for name, value in batch.items() if name != cfg.label}, batch[cfg.label]

  def loss(prediction, target, draws):
    del draws
    if cfg.loss == 'softmax':
      return losses.cross_entropy(prediction, target)
    return answers * losses.sigmoid_cross_entropy(prediction, jax.nn.one_hot(target, answers))

  def measure(prediction, batch):
    kept = {'prediction': prediction, 'label': batch[cfg.label]}
    return {**kept, 'closed': batch[cfg.closed]} if cfg.closed else kept

  def figures(kept):
    prediction, labels = kept['prediction'], features.class_labels(kept['label'], cfg.test)
    found = {'top1': metrics.topk_accuracy(prediction, labels)}
    for name in ('closed', 'open') if cfg.closed else ():
      chosen = kept['closed'].astype(bool) == (name == 'closed')
      if chosen.any():
        found[name] = metrics.topk_accuracy(prediction[chosen], labels[chosen])
    return found

  return fit.Task(init, predict, loss, prepare, measure, figures)
