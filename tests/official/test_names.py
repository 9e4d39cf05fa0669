"""Weights of other codebases in and out."""

import json

import jax
import numpy as np
import pytest

from mim_jax import method
from mim_jax.errors import CheckpointError
from mim_jax.official import mae, names


@pytest.fixture(scope='module')
def cfg():
  return method.options('mae', size='32/3/4', decoder='24/2/3', patch=8, image_size=32)


@pytest.fixture(scope='module')
def params(cfg):
  built = method.build(cfg)
  return jax.tree.map(np.asarray, built.init(jax.random.key(0), built.abstract_batch(1)))


def table_of(kind, cfg):
  return [entry for entry in getattr(mae, kind)(cfg) if entry.theirs not in mae.TABLES]


@pytest.mark.parametrize('kind', ['pretraining', 'huggingface'])
def test_export_and_load_are_inverse(cfg, params, kind):
  table = table_of(kind, cfg)
  weights = names.export(params, table)
  back, unknown = names.load(weights, table)
  assert not unknown
  assert jax.tree.structure(back) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, back, params)


def test_huggingface_names_are_those_of_the_reference(goldens, cfg, params):
  reference = json.loads((goldens / 'mae.json').read_text())['hf_key_map']
  del reference['comment']
  official = names.export(params, table_of('pretraining', cfg))
  hf = names.export(params, table_of('huggingface', cfg))
  for theirs, mapped in reference.items():
    if theirs in mae.TABLES:
      continue
    parts = [hf[name] for name in ([mapped] if isinstance(mapped, str) else mapped)]
    np.testing.assert_array_equal(np.concatenate(parts), official[theirs])


def test_shapes_are_those_of_pytorch(cfg, params):
  weights = names.export(params, table_of('pretraining', cfg))
  assert weights['patch_embed.proj.weight'].shape == (32, 3, 8, 8)
  assert weights['blocks.2.attn.qkv.weight'].shape == (96, 32)
  assert weights['blocks.0.mlp.fc1.weight'].shape == (128, 32)
  assert weights['decoder_blocks.1.attn.proj.weight'].shape == (24, 24)


def test_an_encoder_alone_loads(cfg, params):
  table = table_of('pretraining', cfg)
  weights = {
    name: value for name, value in names.export(params, table).items() if not name.startswith(('decoder', 'mask_token'))
  }
  back, unknown = names.load(weights, table)
  assert list(back) == ['encoder'] and not unknown


def test_a_missing_block_is_an_error_and_unknown_names_are_told(cfg, params):
  table = table_of('pretraining', cfg)
  weights = names.export(params, table)
  weights['head.weight'] = np.zeros(3)
  assert names.load(weights, table)[1] == ['head.weight']
  del weights['blocks.1.norm1.weight']
  with pytest.raises(CheckpointError, match='blocks.1.norm1.weight'):
    names.load(weights, table)


def test_leaves_without_a_name_are_an_error(cfg, params):
  with pytest.raises(CheckpointError, match='extra'):
    names.export({**params, 'extra': np.zeros(2)}, table_of('pretraining', cfg))
