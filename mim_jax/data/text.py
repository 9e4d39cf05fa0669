"""Text to token ids on the host: WordPiece and byte-level BPE from standard vocabulary files, and masking of words.

`load` gives a tokenizer: of a folder with `vocab.txt` (BERT) or `vocab.json` and `merges.txt` (RoBERTa), as they come
with published weights, or of the words of a synthetic world. The transform `tokenize` puts ids of a fixed length into
an example.
"""

import functools
import importlib
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mim_jax.data.chain import CHECKS, register
from mim_jax.errors import ConfigError, MissingData

IGNORE = -100  # label of a place where nothing is predicted
MOST_WORD = 100  # characters; WordPiece leaves longer words unknown
MOST_MASKED = 512  # tokens of a text


class Tokenizer:
  """What both kinds share. Subclasses give `pieces(text) -> [str]`, `starts_word(piece)`, `join(pieces)` and NAMES.

  Attributes:
    vocab: piece -> id.
    bos, eos, pad, mask, unknown: ids of the special pieces.
  """

  NAMES: Mapping[str, str]  # role -> the piece of it

  def __init__(self, vocab: Mapping[str, int], where: str = 'the vocabulary'):
    self.vocab = dict(vocab)
    absent = [name for name in self.NAMES.values() if name not in self.vocab]
    if absent:
      raise ConfigError(f'{where} of {len(self.vocab)} pieces lacks {", ".join(absent)}; is it that of another model?')
    for role, name in self.NAMES.items():
      setattr(self, role, self.vocab[name])
    self.words = {number: piece for piece, number in self.vocab.items()}
    self.special = frozenset(self.vocab[name] for name in self.NAMES.values()) - {self.unknown}

  def __len__(self):
    """Rows that an embedding table needs."""
    return 1 + max(self.words)

  def encode(self, text: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Text -> ids int32 [length], opened, closed, padded or cut to fit, and mask int32 [length], 1 = no padding."""
    inner = [self.vocab.get(piece, self.unknown) for piece in self.pieces(text)][: length - 2]
    ids = np.full(length, self.pad, np.int32)
    count = len(inner) + 2
    ids[:count] = [self.bos, *inner, self.eos]
    return ids, (np.arange(length) < count).astype(np.int32)

  def decode(self, ids) -> str:
    """Ids -> text, without special pieces."""
    return self.join([self.words[int(i)] for i in ids if int(i) not in self.special])

  def tokens(self, ids) -> list[str]:
    return [self.words[int(i)] for i in ids]


class WordPiece(Tokenizer):
  """BERT's tokenizer (google-research/bert, tokenization.py): words and marks, then the longest pieces from the left.

  Args:
    vocab: piece -> id; pieces within a word start with '##'.
    lower: lower-case and drop accents.
  """

  NAMES = {'pad': '[PAD]', 'unknown': '[UNK]', 'bos': '[CLS]', 'eos': '[SEP]', 'mask': '[MASK]'}

  def __init__(self, vocab, lower: bool = True, where: str = 'vocab.txt'):
    super().__init__(vocab, where)
    self.lower = lower

  def pieces(self, text):
    return [piece for word in _words(text, self.lower) for piece in self._word(word)]

  def _word(self, word):
    if len(word) > MOST_WORD:
      return [self.NAMES['unknown']]
    found, start = [], 0
    while start < len(word):
      prefix = '##' if start else ''
      end = next((e for e in range(len(word), start, -1) if prefix + word[start:e] in self.vocab), None)
      if end is None:
        return [self.NAMES['unknown']]
      found.append(prefix + word[start:end])
      start = end
    return found

  def starts_word(self, piece):
    return not piece.startswith('##')

  def join(self, pieces):
    return ' '.join(pieces).replace(' ##', '')


def _words(text, lower):
  """Text -> words and single punctuation characters, cleaned."""
  kept = []
  for c in text:
    category = unicodedata.category(c)
    if c in '\t\n\r' or category == 'Zs':
      kept.append(' ')
    elif c not in '\0\ufffd' and not category.startswith('C'):
      kept.append(f' {c} ' if _ideograph(ord(c)) else c)
  for word in ''.join(kept).split():
    if lower:
      word = ''.join(c for c in unicodedata.normalize('NFD', word.lower()) if unicodedata.category(c) != 'Mn')
    yield from _split(word)


def _split(word):
  """A word with its punctuation split off."""
  part = ''
  for c in word:
    if _punctuation(c):
      if part:
        yield part
      part = ''
      yield c
    else:
      part += c
  if part:
    yield part


_IDEOGRAPHS = (
  (0x4E00, 0x9FFF),
  (0x3400, 0x4DBF),
  (0x20000, 0x2A6DF),
  (0x2A700, 0x2B73F),
  (0x2B740, 0x2B81F),
  (0x2B820, 0x2CEAF),
  (0xF900, 0xFAFF),
  (0x2F800, 0x2FA1F),
)


def _ideograph(code):
  return code >= 0x3400 and any(low <= code <= high for low, high in _IDEOGRAPHS)


def _punctuation(c):
  ascii_mark = c.isascii() and c.isprintable() and not c.isalnum() and c != ' '  # '$' too, for Unicode a symbol
  return ascii_mark or unicodedata.category(c).startswith('P')


class BytePair(Tokenizer):
  """RoBERTa's tokenizer (GPT-2's byte-level BPE without a space in front): any text, nothing unknown.

  Args:
    vocab: piece -> id, in the printable spelling of bytes.
    merges: pairs of pieces, the most frequent first.
  """

  NAMES = {'pad': '<pad>', 'unknown': '<unk>', 'bos': '<s>', 'eos': '</s>', 'mask': '<mask>'}

  def __init__(self, vocab, merges: Sequence[tuple[str, str]], where: str = 'vocab.json'):
    super().__init__(vocab, where)
    self._rank = {tuple(pair): rank for rank, pair in enumerate(merges)}
    self._merged = functools.lru_cache(1 << 16)(self._merge)

  def pieces(self, text):
    return [
      piece for word in _gpt2_words(text) for piece in self._merged(''.join(_SPELLING[b] for b in word.encode('utf-8')))
    ]

  def _merge(self, word):
    parts = list(word)
    while len(parts) > 1:
      pair = min(zip(parts, parts[1:], strict=False), key=lambda pair: self._rank.get(pair, len(self._rank)))
      if pair not in self._rank:
        break
      joined, i = [], 0
      while i < len(parts):
        width = 2 if tuple(parts[i : i + 2]) == pair else 1
        joined.append(''.join(parts[i : i + width]))
        i += width
      parts = joined
    return tuple(parts)

  def starts_word(self, piece):
    return piece.startswith(_SPELLING[ord(' ')])

  def join(self, pieces):
    return bytes(_BYTE[c] for c in ''.join(pieces)).decode('utf-8', 'replace')


def _spelling():
  """Printable character of each byte: itself where it is printable, else the next of those from code point 256 on."""
  printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
  others = [b for b in range(256) if b not in printable]
  return {b: chr(b if b in printable else 256 + others.index(b)) for b in range(256)}


_SPELLING = _spelling()
_BYTE = {c: b for b, c in _SPELLING.items()}
_WHITE = frozenset('\t\n\v\f\r\x85\u2028\u2029')  # and category Zs
# GPT-2's pattern '(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ over one letter per
# character, as `re` has no \p: L letter, N number, S space, W other white space, Q apostrophe, P all else.
# Contractions are looked up in the text itself.
_GPT2 = re.compile(r'S?L+|S?N+|S?[PQ]+|[SW]+(?![^SW])|[SW]+')
_CONTRACTION = re.compile(r"'(?:[sdmt]|ll|ve|re)")


def _kind(c):
  if c == ' ':
    return 'S'
  if c == "'":
    return 'Q'
  category = unicodedata.category(c)
  if c in _WHITE or category == 'Zs':
    return 'W'
  return category[0] if category[0] in 'LN' else 'P'


def _gpt2_words(text):
  kinds, i = ''.join(map(_kind, text)), 0
  while i < len(text):
    end = (_CONTRACTION.match(text, i) or _GPT2.match(kinds, i)).end()
    yield text[i:end]
    i = end


@functools.lru_cache(8)
def load(spec: str) -> Tokenizer:
  """The tokenizer that `spec` names: a folder, its `vocab.txt`, or 'words:WORLD' for the words of a synthetic world.

  A folder may hold `tokenizer_config.json`, whose `do_lower_case` counts. Raises MissingData when there is no
  vocabulary.
  """
  kind, _, name = spec.partition(':')
  if kind == 'words':
    return _of_world(name)
  path = Path(spec).expanduser()
  folder = path.parent if path.is_file() else path
  lines = lambda file: (folder / file).read_text(encoding='utf-8').split('\n')
  if (folder / 'vocab.json').is_file() and (folder / 'merges.txt').is_file():
    vocab = json.loads((folder / 'vocab.json').read_text(encoding='utf-8'))
    merges = [tuple(line.split()) for line in lines('merges.txt') if line and not line.startswith('#version')]
    return BytePair(vocab, merges, str(folder / 'vocab.json'))
  if (folder / 'vocab.txt').is_file():
    settings = folder / 'tokenizer_config.json'
    lower = json.loads(settings.read_text()).get('do_lower_case', True) if settings.is_file() else True
    pieces = [line.rstrip('\r') for line in lines('vocab.txt')]
    while pieces and not pieces[-1]:
      pieces.pop()
    return WordPiece({piece: i for i, piece in enumerate(pieces)}, lower, str(folder / 'vocab.txt'))
  raise MissingData(
    f'no vocabulary at {spec!r}; expected a folder with vocab.txt (BERT) or vocab.json and merges.txt (RoBERTa), which '
    "lie beside published weights, or 'words:WORLD' for a synthetic world"
  )


def _of_world(name):
  from mim_jax.data import worlds

  worlds.get(name)  # an unknown one is an error that names the known
  words = getattr(importlib.import_module(worlds.WORLDS[name]), 'WORDS', None)
  if words is None:
    raise ConfigError(f"'words:{name}': that world has no text; expected one with captions, such as words:shapes")
  return WordPiece({piece: i for i, piece in enumerate((*WordPiece.NAMES.values(), *words))}, where=f'words:{name}')


def select_tokens(u, special, p: float) -> np.ndarray:
  """Tokens to mask, each with probability p: u [..., L] uniform in [0, 1), special [..., L] (never masked) -> bool."""
  return (u < p) & ~np.asarray(special, bool)


def candidates(tokens: Sequence[str]) -> list[list[int]]:
  """Places of the words of a padded row by DataCollatorForWholeWordMask: a piece with '##' joins the one before.

  Only '[CLS]' and '[SEP]' are left out: padding is a word of its own each time, and with a RoBERTa vocabulary every
  piece is a word.
  """
  words = []
  for place, token in enumerate(tokens):
    if token in ('[CLS]', '[SEP]'):
      continue
    if words and token.startswith('##'):
      words[-1].append(place)
    else:
      words.append([place])
  return words


def true_words(tokenizer: Tokenizer, ids) -> list[list[int]]:
  """Places of the words of a row of ids, without special pieces and padding."""
  words = []
  for place, number in enumerate(ids):
    if int(number) in tokenizer.special:
      continue
    if words and words[-1][-1] == place - 1 and not tokenizer.starts_word(tokenizer.words[int(number)]):
      words[-1].append(place)
    else:
      words.append([place])
  return words


def take_words(words: Sequence[Sequence[int]], length: int, most: int) -> np.ndarray:
  """The first words that fit into `most` tokens together, one that would not fit is passed over -> bool [length]."""
  taken = np.zeros(length, bool)
  for word in words:
    if taken.sum() >= most:
      break
    if taken.sum() + len(word) <= most:
      taken[list(word)] = True
  return taken


def count_masked(p: float, length: int) -> int:
  """How many tokens of `length` to mask: at least one; halves go to the even number."""
  return min(MOST_MASKED, max(1, round(p * length)))


def corrupt(ids, selected, u_replace, u_random, words, mask: int) -> tuple[np.ndarray, np.ndarray]:
  """BERT's 80 / 10 / 10: of the selected tokens most become `mask`, some a random word, some stay.

  All arrays [..., L]: ids int, selected bool, u_replace and u_random uniform in [0, 1), words int random ids.

  Returns:
    ids int32, and labels int32: the true id where selected, IGNORE elsewhere.
  """
  replaced = selected & (u_replace < 0.8)
  random = selected & ~replaced & (u_random < 0.5)
  changed = np.where(replaced, mask, np.where(random, words, ids))
  return changed.astype(np.int32), np.where(selected, ids, IGNORE).astype(np.int32)


RULES = ('collator', 'words', 'tokens')
CHECKS['tokenize.length'] = 'a number of tokens, 3 or more', lambda v: isinstance(v, int) and v >= 3
CHECKS['tokenize.masked'] = 'a probability from 0 to 1', lambda v: isinstance(v, int | float) and 0 <= v <= 1
CHECKS['tokenize.rule'] = f'one of {", ".join(RULES)}', lambda v: v in RULES


@register(field='')
def tokenize(example, rng, tokenizer, length, field='caption', masked=0.0, rule='collator'):
  """Adds `text_ids` and `text_mask` [length] of a text; with `masked` > 0 also `text_ids_mlm` and `text_labels_mlm`.

  tokenizer: see `load`. field: holds a text, or several, of which one is drawn. masked: share of the tokens to be
    hidden (and then put
  through `corrupt`). rule: 'collator' draws words as DataCollatorForWholeWordMask does, padding included, so that
  short texts may stay
  whole; 'words' draws whole words of the text itself; 'tokens' draws every token alone.
  """
  if field not in example:
    found = ', '.join(sorted(example))
    raise ConfigError(f'tokenize needs the field {field!r}, found {found}; name the text by field=')
  text = example[field]
  if not isinstance(text, str):
    text = str(text[int(rng.integers(len(text)))])
  tokens = load(tokenizer)
  ids, mask = tokens.encode(' '.join(text.split()), length)
  example = {**example, 'text_ids': ids, 'text_mask': mask}
  if not masked:
    return example
  special = np.isin(ids, list(tokens.special))
  if rule == 'tokens':
    selected = select_tokens(rng.random(length), special, masked)
  else:
    words = candidates(tokens.tokens(ids)) if rule == 'collator' else true_words(tokens, ids)
    most = count_masked(masked, length if rule == 'collator' else sum(map(len, words)))
    selected = take_words([words[i] for i in rng.permutation(len(words))], length, most) & ~special
  draws = rng.random((2, length))
  ids, labels = corrupt(ids, selected, *draws, rng.integers(len(tokens), size=length), tokens.mask)
  return {**example, 'text_ids_mlm': ids, 'text_labels_mlm': labels}
