"""BERT and RoBERTa as huggingface/transformers publishes them: names, and the replay of `text_block`.

Files hold one encoder under the prefix `bert.` or `roberta.` (a bare export: none) and the head for masked words under
`cls.` or `lm_head.`. `published` puts a file's names into the one form that the tables here know.
"""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax.data import text as host
from mim_jax.models import blocks, text
from mim_jax.official import names
from mim_jax.ops import losses


def split_heads(heads: int) -> names.Form:
  """[H d, E] <-> [E, H, d]: a matrix of queries, keys or values alone."""
  return names.Form(lambda w: w.T.reshape(w.shape[1], heads, -1), lambda w: w.reshape(w.shape[0], -1).T)


def split_bias(heads: int) -> names.Form:
  """[H d] <-> [H, d]."""
  return names.Form(lambda w: w.reshape(heads, -1), lambda w: w.reshape(-1))


def attention_names(theirs: str, ours: str, norm: str, heads: int) -> list[names.Entry]:
  """`attention` or `crossattention` of a layer, with its output and its norm."""
  return [
    *[
      entry
      for part in ('query', 'key', 'value')
      for entry in (
        names.Entry(f'{theirs}.self.{part}.weight', f'{ours}/{part}/kernel', split_heads(heads)),
        names.Entry(f'{theirs}.self.{part}.bias', f'{ours}/{part}/bias', split_bias(heads)),
      )
    ],
    names.Entry(f'{theirs}.output.dense.weight', f'{ours}/proj/kernel', names.merge_heads(heads)),
    names.Entry(f'{theirs}.output.dense.bias', f'{ours}/proj/bias'),
    *names.norm(f'{theirs}.output.LayerNorm', norm),
  ]


def layer_names(theirs: str, ours: str, heads: int, cross: bool = False) -> list[names.Entry]:
  """A stack of `models.text.Layer`; `theirs` holds `{i}`."""
  crossed = attention_names(f'{theirs}.crossattention', f'{ours}/attn_cross', f'{ours}/norm_cross', heads)
  return [
    *attention_names(f'{theirs}.attention', f'{ours}/attn', f'{ours}/norm1', heads),
    *(crossed if cross else []),
    *names.linear(f'{theirs}.intermediate.dense', f'{ours}/mlp/fc1'),
    *names.linear(f'{theirs}.output.dense', f'{ours}/mlp/fc2'),
    *names.norm(f'{theirs}.output.LayerNorm', f'{ours}/norm2'),
  ]


def encoder_names(theirs: str, ours: str, heads: int) -> list[names.Entry]:
  """A `models.text.Encoder` at `ours`; `theirs` is a prefix with its dot, such as 'bert.', or ''."""
  tables = {'word': 'word_embeddings', 'position': 'position_embeddings', 'type': 'token_type_embeddings'}
  return [
    *[
      names.Entry(f'{theirs}embeddings.{name}.weight', f'{ours}/embed/{table}', names.SAME)
      for table, name in tables.items()
    ],
    *names.norm(f'{theirs}embeddings.LayerNorm', f'{ours}/embed/norm'),
    *layer_names(f'{theirs}encoder.layer.{{i}}', f'{ours}/blocks', heads),
  ]


def pooler_names(theirs: str, ours: str) -> list[names.Entry]:
  return names.linear(f'{theirs}.dense', f'{ours}/dense')


def head_names(kind: str, ours: str, tied: bool) -> list[names.Entry]:
  """`models.text.MaskedWords` at `ours` under the names of the heads of a kind; a tied one has no matrix of its own."""
  root, dense, norm = {
    'bert': ('cls.predictions', 'transform.dense', 'transform.LayerNorm'),
    'roberta': ('lm_head', 'dense', 'layer_norm'),
  }[kind]
  return [
    *names.linear(f'{root}.{dense}', f'{ours}/transform'),
    *names.norm(f'{root}.{norm}', f'{ours}/norm'),
    names.Entry(f'{root}.bias', f'{ours}/bias'),
    *([] if tied else [names.Entry(f'{root}.decoder.weight', f'{ours}/decoder', names.LINEAR)]),
  ]


def published(weights: Mapping[str, np.ndarray], prefix: str = '') -> dict[str, np.ndarray]:
  """A file's arrays under the names of newer files, float32, the encoder's with `prefix` before them.

  Takes off `bert.` or `roberta.`, calls the LayerNorm's gamma and beta weight and bias, leaves out the buffer
  `position_ids`, and fills
  in what tied heads leave out: the last matrix from the word table, its bias from the head's.
  """
  found = {}
  for name in weights:
    if name.endswith('position_ids'):
      continue
    new = re.sub(r'\.gamma$', '.weight', re.sub(r'\.beta$', '.bias', name))
    new = re.sub(r'^(bert|roberta)\.', '', new)
    found[new if new.startswith(('cls.', 'lm_head.')) else prefix + new] = np.asarray(weights[name], np.float32)
  for head in ('cls.predictions', 'lm_head'):
    if f'{head}.bias' not in found and f'{head}.decoder.bias' in found:
      found[f'{head}.bias'] = found[f'{head}.decoder.bias']
    if f'{head}.bias' in found:
      found.setdefault(f'{head}.decoder.bias', found[f'{head}.bias'])
      found.setdefault(f'{head}.decoder.weight', found[f'{prefix}embeddings.word_embeddings.weight'])
  return found


def replay(case) -> dict[str, np.ndarray]:
  """Outputs and gradients of a reference case under its own names."""
  return {**_bert(case), **_roberta(case), **_masking(case), **_wordpiece(case)}


def _encoder(c, kind, layers):
  sizes = dict(size=f'{c.hidden_size}/{layers}/{c.num_attention_heads}', mlp_ratio=c.intermediate_size / c.hidden_size)
  eps = getattr(c, f'{kind}_layer_norm_eps')
  return text.encoder(
    kind, vocab=c.vocab_size, positions=c.max_position_embeddings, eps=eps, pad=getattr(c, f'{kind}_pad_id'), **sizes
  )


def _load(case, table):
  """Our params of a table's names; what the file stores twice (tied matrices) is not taken a second time."""
  params, _ = names.load(case.weights, table)
  return jax.tree.map(jnp.asarray, params)


def _bert(case):
  c = case.config
  encoder, pooler = _encoder(c, 'bert', c.num_hidden_layers), text.Pooler()
  head, nsp = text.MaskedWords(c.vocab_size, encoder.eps), blocks.Dense(2)
  table = [
    *encoder_names('bert.', 'text', c.num_attention_heads),
    *pooler_names('bert.pooler', 'pooler'),
    *head_names('bert', 'words', tied=True),
    *names.linear('cls.seq_relationship', 'nsp'),
  ]
  params = _load(case, table)
  ids, mask, types, labels = (
    jnp.asarray(case.inputs[name]) for name in ('ids', 'attention_mask', 'token_type_ids', 'labels')
  )

  def loss_of(params):
    h, seen = encoder.apply({'params': params['text']}, ids, mask, types, taps=True)
    logits = head.apply({'params': params['words']}, h, params['text']['embed']['word'])
    loss = losses.token_cross_entropy(logits, labels, jnp.maximum(jnp.sum(labels >= 0), 1))
    return loss, (seen, logits)

  (loss, (seen, logits)), grads = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
  pooled = pooler.apply({'params': params['pooler']}, seen['layers'][-1])
  out = {
    'bert_embeddings': seen['input'],
    'bert_hidden_0': seen['input'],
    **{f'bert_hidden_{i}': layer for i, layer in enumerate(seen['layers'], start=1)},
    **{f'bert_attn_{i}': shares for i, shares in enumerate(seen['attention'])},
    'bert_pooled': pooled,
    'bert_mlm_logits': logits,
    'bert_nsp_logits': nsp.apply({'params': params['nsp']}, pooled),
    'bert_mlm_loss': loss,
    'bert_mlm_loss_all_positions': losses.token_cross_entropy(logits, ids, ids.size),
  }
  return _named(out, grads, table)


def _roberta(case):
  c = case.config
  encoder = _encoder(c, 'roberta', c.roberta_layers)
  head = text.MaskedWords(c.vocab_size, encoder.eps)
  table = [
    *encoder_names('roberta.', 'text', c.num_attention_heads),
    *head_names('roberta', 'words', tied=True),
  ]
  params = _load(case, table)
  ids, mask, labels = (jnp.asarray(case.inputs[f'r_{name}']) for name in ('ids', 'attention_mask', 'labels'))

  def loss_of(params):
    h, seen = encoder.apply({'params': params['text']}, ids, mask, taps=True)
    logits = head.apply({'params': params['words']}, h, params['text']['embed']['word'])
    loss = losses.token_cross_entropy(logits, labels, jnp.maximum(jnp.sum(labels >= 0), 1))
    return loss, (seen, logits)

  (loss, (seen, logits)), grads = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
  out = {
    'roberta_position_ids': text.position_ids(ids, encoder.pad, encoder.count_real),
    'roberta_hidden_0': seen['input'],
    **{f'roberta_hidden_{i}': layer for i, layer in enumerate(seen['layers'], start=1)},
    **{f'roberta_attn_{i}': shares for i, shares in enumerate(seen['attention'])},
    'roberta_mlm_logits': logits,
    'roberta_mlm_loss': loss,
  }
  return _named(out, grads, table)


def _named(out, grads, table):
  return {**{f'out/{name}': np.asarray(value) for name, value in out.items()}, **names.grads(grads, table)}


def _masking(case):
  """The two corruptions on the host: single tokens, and the choice of whole words from a shuffled list."""
  c, given = case.config, case.inputs
  selected = host.select_tokens(given['mlm_u_select'], given['mlm_special_tokens_mask'], c.p)
  draws = (given[f'mlm_{name}'] for name in ('u_replace', 'u_random', 'random_words'))
  ids, labels = host.corrupt(given['mlm_ids'], selected, *draws, c.mlm_mask_id)
  out = {'out/mlm_masked_ids': ids, 'out/mlm_labels': labels}
  whole = case.info['whole_word_masking']
  for i, words in enumerate(whole['cases']):
    length = len(words['tokens'])
    if sorted(words['shuffled_candidates']) != host.candidates(words['tokens']):
      raise ValueError(f'case {i} of whole_word_masking has other words than ours: {host.candidates(words["tokens"])}')
    taken = host.take_words(words['shuffled_candidates'], length, host.count_masked(whole['p'], length))
    out[f'out/wwm_mask_labels_{i}'] = taken.astype(np.int32)
  return out


def _wordpiece(case):
  given = case.info['wordpiece']
  tokenizer = host.WordPiece({piece: i for i, piece in enumerate(given['vocab'])}, given['do_lower_case'])
  rows = [tokenizer.encode(one['text'], given['max_length']) for one in given['cases']]
  ids, mask = (np.stack(part) for part in zip(*rows, strict=True))
  return {
    'out/wordpiece_ids': ids,
    'out/wordpiece_attention_mask': mask,
    'out/wordpiece_special_tokens_mask': np.isin(ids, list(tokenizer.special)).astype(np.int32),
  }
