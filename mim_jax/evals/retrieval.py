"""Finding the image of a text and the text of an image, by an encoder that judges pairs.

Chen et al. 2022, arXiv 2209.07098, section 3.2 and zhjohnchan/M3AE (ROCO, 2000 test pairs): every image is put
together with every text, 'match' of `Method.encode` scores the pair, and recall@k is how often the true partner is
among the k best. By default the scores are those of pretraining. With `epochs` above 0 the encoder is fine-tuned
first: each image with its own text and `negatives` others, softmax over the scores (the published recipe: 10 epochs,
batch 256, 15 negatives, the score at 5 times the rate). The official code draws the other texts from the whole
training set, here they come from the same batch.

Costs count^2 joint passes. Of examples with the same text the first is taken for the true one, as with any other tie.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from mim_jax.errors import ConfigError, UserError
from mim_jax.evals import features, fit, metrics
from mim_jax.parallel import mesh as meshes

DEFAULTS = {
  **fit.DEFAULTS,
  'fields': ('image', 'text_ids', 'text_mask'),
  'label': 'text_ids',  # there is no other: what belongs together is the pair
  'count': 2000,  # test pairs
  'pairs': 256,  # judged at once
  'negatives': 15,  # other texts per image in training
  'fusion': r'^(join/(text|image)|fusion|pool_\w+|match)/',  # parameters at `fusion_mult` times the rate, by path
  'fusion_mult': 5.0,
  'schedule': 'linear',
  'warmup': '10%',
  'epochs': 0,
  'warmup_epochs': 0,
  'base_lr': 5e-6,
  'wd': 0.01,
  'no_wd': r'bias$|^(text|fusion|words)/.*scale$',
  'b2': 0.98,
}
BASELINES = fit.BASELINES
RANKS = (1, 5, 10)


def check(cfg, options):
  """Raises ConfigError for settings that cannot work."""
  if cfg.epochs:
    fit.check(cfg, options)
    if not 0 < cfg.negatives < cfg.train_batch:
      raise ConfigError(f'negatives is {cfg.negatives}; a batch of {cfg.train_batch} allows 1 to {cfg.train_batch - 1}')
  if cfg.count < 2 or cfg.pairs < 1:
    raise ConfigError(f'count={cfg.count}, pairs={cfg.pairs}; expected 2 or more to choose from, 1 or more at once')


def reads(cfg):
  return fit.reads(cfg) if cfg.epochs else fit.reads(cfg)[1:]


def run(encoder: features.Encoder, cfg, ctx: features.Context) -> dict[str, float]:
  """'to_text/r1', r5, r10 of texts for images, 'to_image/...' of images for texts, and 'top1', the mean of both r1."""
  check(cfg, encoder.options)
  if cfg.epochs:
    settings = cfg.copy_and_resolve_references()
    settings.lr_mult = (*cfg.lr_mult, (cfg.fusion, cfg.fusion_mult))
    judge = fit.trained(encoder, task_of(cfg), settings, ctx)[0].predict
  else:
    score = _zero_shot(encoder)
    whole = NamedSharding(ctx.mesh, jax.sharding.PartitionSpec())
    run_score = jax.jit(score, out_shardings=whole)
    judge = lambda inputs: np.asarray(run_score(encoder.variables, inputs))
  scores = score_all(judge, _gallery(cfg, ctx), cfg.pairs, ctx)
  return figures(scores)


def _zero_shot(encoder):
  def score(variables, inputs):
    encoded = encoder.encode(variables, inputs)
    if 'match' not in encoded:
      raise ConfigError('the encoder of this method judges no pairs: its encode gives no `match`')
    return encoded['match'].astype(jnp.float32)

  if encoder.encode is None:
    raise ConfigError(f'the {encoder.name} encoder judges no pairs')
  return score


def figures(scores) -> dict[str, float]:
  """Recall of scores [n images, n texts], true partners on the diagonal."""
  scores, found = np.asarray(scores), {}
  own = np.arange(len(scores))
  for name, rows in (('to_text', scores), ('to_image', scores.T)):
    rank = metrics.rank_of_label(rows, own)
    found |= {f'{name}/r{k}': float(np.mean(rank < k)) for k in RANKS}
  return {'top1': (found['to_text/r1'] + found['to_image/r1']) / 2, **found}


def _gallery(cfg, ctx) -> dict[str, np.ndarray]:
  """The first `count` readable test examples, whole on every process."""
  rows, have = [], 0
  batches = ctx.open_batches(cfg.test, cfg.transforms, cfg.batch_size, tuple(dict.fromkeys((*cfg.fields, cfg.label))))
  for batch in batches:
    ctx.check_stop()
    whole = {name: features.gathered(value, ctx.mesh) for name, value in batch.items()}
    keep = features.are_examples(whole)
    rows.append({name: whole[name][keep] for name in cfg.fields})
    have += int(keep.sum())
    if have >= cfg.count:
      break
  if have < 2:
    raise UserError(f'{cfg.test} holds {have} pairs; retrieval needs two or more')
  return {name: np.concatenate([part[name] for part in rows])[: cfg.count] for name in cfg.fields}


def score_all(judge, gallery, pairs: int, ctx) -> np.ndarray:
  """Scores [n images, n texts] by judge(batch of pairs) -> [pairs]; batches have one size on any mesh."""
  count = len(gallery['image'])
  sharding = meshes.batch_sharding(ctx.mesh)
  size = -(-pairs // ctx.mesh.size) * ctx.mesh.size
  scores = np.empty(count * count, np.float32)
  for start in range(0, count * count, size):
    ctx.check_stop()
    numbers = np.minimum(np.arange(start, start + size), count * count - 1)  # the last batch is filled up
    image, text = np.divmod(numbers, count)

    def rows(name, index, image=image, text=text):
      return gallery[name][(image if name == 'image' else text)[index[0]]]

    inputs = {
      name: jax.make_array_from_callback((size, *value.shape[1:]), sharding, lambda index, name=name: rows(name, index))
      for name, value in gallery.items()
    }
    scores[start : start + size] = judge(inputs)[: count * count - start]
  return scores.reshape(count, count)


def task_of(cfg) -> fit.Task:
  """Each image of a batch with its own text first, then `negatives` others; the score goes on learning."""
  choices = 1 + cfg.negatives

  def draw(key, batch):
    size = len(batch['text_ids'])
    shifts = lambda key: 1 + jax.random.permutation(key, size - 1)[: cfg.negatives]
    return {'shift': jax.vmap(shifts)(jax.random.split(key, size))}

  def prepare(batch, draws):
    size = len(batch['image'])
    own = jnp.arange(size)[:, None]
    texts = jnp.concatenate([own, (own + draws['shift']) % size], axis=1).reshape(-1)
    inputs = {name: value[texts] for name, value in batch.items() if name != 'image'}
    return {**inputs, 'image': jnp.repeat(batch['image'], choices, axis=0)}, jnp.zeros(size, jnp.int32)

  def predict(params, state, encoded, batch, train):
    del params, state, batch
    score = encoded['match'].astype(jnp.float32)
    return (score.reshape(-1, choices) if train else score), {}

  def loss(prediction, target, draws):
    del draws
    labels = jax.nn.one_hot(target, choices)
    return -jnp.mean(jnp.sum(labels * jax.nn.log_softmax(prediction), axis=-1))

  return fit.Task(
    init=lambda key, encoded, batch: {},
    predict=predict,
    loss=loss,
    prepare=prepare,
    measure=lambda prediction, batch: {'prediction': prediction},
    figures=figures,
    draw=draw,
    couples=True,
  )
