"""Tokenizers on reference texts, masked-word corruption, and the transform that puts both into a pipeline."""

import json
import string

import numpy as np
import pytest

from mim_jax.data import images, pipeline, sources, text
from mim_jax.errors import ConfigError, MissingData


@pytest.fixture(scope='module')
def reference(goldens):
  return json.loads((goldens / 'text_block.json').read_text())


@pytest.fixture(scope='module')
def wordpiece(reference):
  return text.WordPiece({piece: i for i, piece in enumerate(reference['wordpiece']['vocab'])})


@pytest.fixture(scope='module')
def byte_pair(reference):
  given = reference['byte_level_bpe']
  return text.BytePair(given['vocab'], [tuple(pair.split()) for pair in given['merges']])


def test_wordpiece_on_reference_texts(reference, wordpiece):
  for case in reference['wordpiece']['cases']:
    ids, _ = wordpiece.encode(case['text'], reference['wordpiece']['max_length'])
    assert wordpiece.tokens(ids) == case['tokens'], case['text']


def test_byte_pairs_on_reference_texts(reference, byte_pair):
  for case in reference['byte_level_bpe']['cases']:
    assert byte_pair.pieces(case['text']) == case['tokens'], case['text']
    ids, mask = byte_pair.encode(case['text'], 40)
    assert ids[mask == 1].tolist() == case['with_special'] and set(ids[mask == 0]) <= {byte_pair.pad}
    assert byte_pair.decode(ids) == case['text']


def test_long_texts_keep_the_closing_piece(wordpiece):
  ids, mask = wordpiece.encode('the ' * 50, 8)
  assert ids[-1] == wordpiece.eos and mask.all()


def test_cased_vocabularies_keep_case_and_accents():
  vocab = {name: i for i, name in enumerate([*text.WordPiece.NAMES.values(), 'Café', 'cafe'])}
  assert text.WordPiece(vocab, lower=False).pieces('Café cafe CAFE') == ['Café', 'cafe', '[UNK]']


def test_dollar_and_controls(wordpiece):
  assert list(text._words('a$b\x00 c\x07d\xade', True)) == ['a', '$', 'b', 'cde']  # a soft hyphen is a format character


@pytest.mark.parametrize(
  'sentence, words',
  [
    ("we'll  don't 'tis", ['we', "'ll", ' ', ' don', "'t", " '", 'tis']),
    ('x2 ²½ a_b', ['x', '2', ' ²½', ' a', '_', 'b']),  # all numbers of Unicode, and _ is neither letter nor number
    ('end  \n', ['end', '  \n']),
    ('a\n b', ['a', '\n', ' b']),
    ("!'s", ["!'", 's']),
  ],
)
def test_words_of_gpt2(sentence, words):
  assert list(text._gpt2_words(sentence)) == words


def test_any_text_comes_back_from_byte_pairs(byte_pair, rng):
  for _ in range(50):
    codes = [c for c in rng.integers(1, 0x10FFFF, size=30) if not 0xD800 <= c < 0xE000]
    sentence = ''.join(map(chr, codes)) + ''.join(rng.choice(list(string.printable), size=30))
    ids = byte_pair.encode(sentence, 400)[0]
    assert byte_pair.decode(ids) == sentence
    np.testing.assert_array_equal(byte_pair.encode(byte_pair.decode(ids), 400)[0], ids)


def test_vocabularies_are_read_from_folders(tmp_path, reference, wordpiece, byte_pair):
  bert, roberta = tmp_path / 'bert', tmp_path / 'roberta'
  bert.mkdir(), roberta.mkdir()
  (bert / 'vocab.txt').write_text('\n'.join(reference['wordpiece']['vocab']) + '\n', encoding='utf-8')
  (roberta / 'vocab.json').write_text(json.dumps(reference['byte_level_bpe']['vocab']))
  merges = ['#version: 0.2', *reference['byte_level_bpe']['merges'], '']
  (roberta / 'merges.txt').write_text('\n'.join(merges), encoding='utf-8')
  sentence = 'Chest x-ray shows effusion.'
  for path, same in ((bert, wordpiece), (bert / 'vocab.txt', wordpiece), (roberta, byte_pair)):
    read = text.load(str(path))
    assert read.pieces(sentence) == same.pieces(sentence) and len(read) == len(same)
  (bert / 'tokenizer_config.json').write_text('{"do_lower_case": false}')
  text.load.cache_clear()
  assert text.load(str(bert)).pieces('Chest') == ['[UNK]']


def test_what_is_missing_is_said(tmp_path):
  with pytest.raises(MissingData, match='vocab.txt'):
    text.load(str(tmp_path / 'nowhere'))
  with pytest.raises(ConfigError, match=r'lacks \[MASK\]'):
    text.WordPiece({'[PAD]': 0, '[UNK]': 1, '[CLS]': 2, '[SEP]': 3})
  with pytest.raises(ConfigError, match='no synthetic world'):
    text.load('words:nowhere')


def test_single_tokens_are_masked_as_often_as_asked(rng):
  shape = (100, 1000)
  ids = rng.integers(5, 60, size=shape)
  ids[:, 0], ids[:, -1] = 2, 3
  special = ids < 5
  selected = text.select_tokens(rng.random(shape), special, 0.15)
  changed, labels = text.corrupt(ids, selected, *rng.random((2, *shape)), rng.integers(60, size=shape), 4)
  assert abs(selected[~special].mean() - 0.15) < 0.005 and not selected[special].any()
  np.testing.assert_array_equal(changed[~selected], ids[~selected])
  np.testing.assert_array_equal(labels, np.where(selected, ids, -100))
  masked = (changed == 4)[selected]
  kept = (changed == ids)[selected]
  assert abs(masked.mean() - 0.8 - 0.1 / 60) < 0.01 and abs(kept.mean() - 0.1 - 0.1 / 60) < 0.01


def tokenized(wordpiece_file, sentence, seed=0, **options):
  given = ', '.join(f'{key}={value!r}' for key, value in options.items())
  chain = images.parse(f'tokenize({str(wordpiece_file)!r}, 24, masked=0.3, {given})')
  return chain.example({'caption': sentence}, np.random.default_rng(seed))


@pytest.fixture
def vocab_file(tmp_path, reference):
  file = tmp_path / 'vocab.txt'
  file.write_text('\n'.join(reference['wordpiece']['vocab']), encoding='utf-8')
  return file


@pytest.mark.parametrize('rule', ['collator', 'words'])
def test_words_are_masked_whole(vocab_file, rule):
  tokenizer = text.load(str(vocab_file))
  sentence, some = 'fundus photographs retinopathy of cardiomegaly', 0
  for seed in range(40):
    example = tokenized(vocab_file, sentence, seed, rule=rule)
    chosen = example['text_labels_mlm'] != text.IGNORE
    some += chosen.any()
    assert not chosen[example['text_mask'] == 0].any() and not chosen[0]
    for word in text.true_words(tokenizer, example['text_ids']):
      assert len(set(chosen[word])) == 1
  assert some == 40 or rule == 'collator'


def test_the_collator_counts_padding_and_may_leave_a_short_text_whole(vocab_file):
  chosen = [
    (tokenized(vocab_file, 'chest no', seed, rule='collator')['text_labels_mlm'] != text.IGNORE).sum()
    for seed in range(60)
  ]
  assert min(chosen) == 0 and max(chosen) == 2
  words = [
    (tokenized(vocab_file, 'chest no', seed, rule='words')['text_labels_mlm'] != text.IGNORE).sum() for seed in range(9)
  ]
  assert set(words) == {1}


def test_true_words_of_byte_pairs_begin_with_a_space(byte_pair):
  ids, _ = byte_pair.encode('Chest x-ray shows effusion', 30)
  words = [byte_pair.decode(ids[places]) for places in text.true_words(byte_pair, ids)]
  assert words == ['Chest', ' x-ray', ' shows', ' effusion']


def test_one_of_several_texts_is_drawn_and_white_space_is_closed_up(vocab_file):
  several = {tuple(tokenized(vocab_file, ['the  chest', 'no sign'], seed)['text_ids'][1:3]) for seed in range(20)}
  plain = [tuple(tokenized(vocab_file, one)['text_ids'][1:3]) for one in ('the chest', 'no sign')]
  assert several == set(plain)


def test_options_are_checked():
  for wrong in ("tokenize('x', 2)", "tokenize('x', 8, masked=2)", "tokenize('x', 8, rule='all')"):
    with pytest.raises(ConfigError, match='must be'):
      images.parse(wrong)
  with pytest.raises(ConfigError, match="needs the field 'caption', found label; name the text by field="):
    images.parse("tokenize('words:shapes', 8)").example({'label': 3}, np.random.default_rng(0))


def test_a_pipeline_of_images_with_texts_and_false_images():
  count = 24
  source = sources.ArraySource(
    {
      'image': np.arange(count, dtype=np.uint8)[:, None, None, None].repeat(4, 1).repeat(4, 2).repeat(3, 3),
      'caption': [f'a red ball {i}' for i in range(count)],
    }
  )
  chain = images.parse(
    "decode | false_image | tokenize('words:shapes', 8, masked=0.5, rule='words') | normalize('none')"
  )
  fields = ('image', 'false_image', 'text_ids', 'text_mask', 'text_ids_mlm', 'text_labels_mlm')
  made = pipeline.Pipeline(source, chain.bind(source), 8, fields=fields)
  batches = [made.batch(step) for step in range(30)]
  own, other = (
    np.concatenate([np.rint(b[name][:, 0, 0, 0] * 255).astype(int) for b in batches])
    for name in ('image', 'false_image')
  )
  assert set(other) == set(range(count))  # from the whole source, whatever is in the batch
  assert 0 < np.mean(own == other) < 0.15  # and now and then the true one
  again = pipeline.Pipeline(source, chain.bind(source), 8, fields=fields, rows=range(4, 8)).batch(3)
  for name in fields:
    np.testing.assert_array_equal(again[name], batches[3][name][4:])
  assert batches[0]['text_ids'].dtype == np.int32 and batches[0]['text_ids'].shape == (8, 8)
  with pytest.raises(ConfigError, match='here is none'):
    pipeline.Pipeline(source, chain, 8).batch(0)


def test_images_alone_pass_the_part_of_a_chain_that_is_for_them():
  chain = images.parse("decode | resize(8) | false_image | tokenize('words:shapes', 8) | normalize('clip')").of_images()
  out = chain.batch(chain.example({'image': np.zeros((16, 16, 3), np.uint8)}, np.random.default_rng(0)))
  assert list(out) == ['image'] and out['image'].shape == (8, 8, 3)


def test_texts_alone_need_no_image():
  chain = images.parse("tokenize('words:shapes', 8)")
  assert set(chain.example({'caption': 'a red ball'}, np.random.default_rng(0))) == {'caption', 'text_ids', 'text_mask'}
