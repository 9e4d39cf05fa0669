"""Accuracy of the classifier that a method trains itself: So2Sat and JUMP-CP as ChA-MAE is judged (arXiv 2503.19331,
section 4).

The method's `encode` gives 'logits' [B, C]. Nothing is trained here. An image of fewer channels is judged through
`transforms` that pick them, with `channel_ids` among `fields`.
"""

import functools

from mim_jax.errors import UserError
from mim_jax.evals import features, metrics

DEFAULTS = {
  **{key: value for key, value in features.DEFAULTS.items() if key != 'train'},
  'baselines': ('untrained',),
}


@functools.lru_cache(maxsize=16)
def _logits(encode):
  def apply(variables, batch):
    encoded = encode(variables, batch)
    if 'logits' not in encoded:
      raise UserError(f'this method trains no classifier: its encode gives {", ".join(sorted(encoded))}, not logits')
    return {'logits': encoded['logits']}

  return apply


def run(encoder: features.Encoder, cfg, ctx: features.Context) -> dict[str, float]:
  """top1, top5 and class_mean (fractions)."""
  if encoder.encode is None:
    raise UserError(f'the {encoder.name} baseline has no classifier; leave it out of evals.<name>.baselines')
  judged = features.Encoder(f'{encoder.name} logits', _logits(encoder.encode), encoder.variables)
  scores, labels = features.of_source(judged, ctx, cfg, cfg.test)
  return metrics.classification(scores['logits'], features.class_labels(labels, cfg.test))
