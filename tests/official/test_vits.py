"""Weights of other libraries in and out, by names and shapes alone; the libraries themselves are in test_vits_libraries.py."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from mim_jax.checkpoint import bundle as bundles
from mim_jax.checkpoint import files
from mim_jax.errors import CheckpointError
from mim_jax.models import posemb
from mim_jax.official.vits import check, formats, huggingface, openai, timm
from mim_jax.official.vits.layout import Hints, load, save

_spec = importlib.util.spec_from_file_location('vit_cases', Path(__file__).parent / 'vit_cases.py')
vit_cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(vit_cases)

FITS = [
  ('timm', 'plain'),
  ('timm', 'no_cls'),
  ('timm', 'scaled'),
  ('timm', 'gated'),
  ('timm', 'clip'),
  ('timm', 'no_qkv_bias'),
  ('timm', 'oblong'),
  ('dinov2', 'registers'),
  ('dinov2', 'gated'),
  ('clip', 'clip'),
  ('hf-vit', 'plain'),
  ('hf-vit', 'no_qkv_bias'),
  ('hf-vit', 'oblong'),
  ('hf-clip', 'clip'),
  ('hf-dinov2', 'scaled'),
  ('hf-dinov2', 'registers'),
  ('hf-dinov2', 'gated'),
]


def in_memory(arrays, metadata=None):
  stored = {name: files.Stored(value.shape, value.dtype, lambda value=value: value) for name, value in arrays.items()}
  return files.Weights(Path('memory'), 'safetensors', stored, metadata)


def equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.mark.parametrize('form, shape', FITS)
def test_out_and_in_again(tmp_path, form, shape):
  bundle = vit_cases.make(shape)
  written, left = formats.write(tmp_path / 'x', bundle, form)
  again, layout, unknown, notes = formats.read(written)
  assert layout.name == form and not unknown and not left and not notes
  assert again.encoder == bundle.encoder
  equal(again.params, bundle.params)


@pytest.mark.parametrize('form', ['timm', 'hf-dinov2'])
def test_biases_of_their_own_are_joined_on_the_way_out(tmp_path, form):
  """CAE's encoder: no bias of keys, and a fixed table with rows first, which others hold as a trained one."""
  bundle = vit_cases.make('scaled', qkv_bias='qv', pos='sincos_rows')
  assert 'q_bias' in bundle.params['encoder']['blocks']['attn']['qkv'] and 'pos_embed' not in bundle.params['encoder']
  written, left = formats.write(tmp_path / 'x', bundle, form)
  again, *_ = formats.read(written)
  assert not left and not again.params['encoder']['blocks']['attn']['qkv']['bias'][:, 1].any()
  image = check.images(bundle)
  np.testing.assert_allclose(check.ours(again, image)['tokens'], check.ours(bundle, image)['tokens'], atol=2e-5)


def test_registers_of_timm_keep_the_features_though_not_the_table(tmp_path):
  bundle = vit_cases.make('registers')  # timm's models with registers have no position for the class token
  written, _ = formats.write(tmp_path / 'x.safetensors', bundle, 'timm')
  again, *_ = formats.read(written)
  assert again.encoder == bundle.encoder and not again.params['encoder']['pos_embed'][0, 0].any()
  image = check.images(bundle)
  np.testing.assert_allclose(check.ours(again, image)['tokens'], check.ours(bundle, image)['tokens'], atol=2e-5)


def test_a_table_with_rows_for_registers_is_folded_into_them():
  bundle = vit_cases.make('registers')
  arrays, _ = save(bundle, timm.TIMM)
  arrays['cls_token'] = np.asarray(bundle.params['encoder']['cls_token'])
  rows = np.random.default_rng(1).standard_normal((1, 4, 32)).astype(np.float32)
  table = bundle.params['encoder']['pos_embed']
  arrays['pos_embed'] = np.concatenate([table[:, :1], rows, table[:, 1:]], axis=1)
  again, *_ = load(in_memory(arrays), timm.TIMM, '', Hints(heads=4))
  np.testing.assert_array_equal(again.params['encoder']['pos_embed'], table)
  np.testing.assert_allclose(again.params['encoder']['registers'], bundle.params['encoder']['registers'] + rows)


@pytest.mark.parametrize('form', ['mae', 'hf-mae'])
def test_encoder_and_decoder_of_a_mae(tmp_path, form):
  bundle = vit_cases.with_decoder(norm_pix=False)
  written, left = formats.write(tmp_path / 'x', bundle, form)
  again, layout, unknown, notes = formats.read(written)
  assert layout.name == form and not unknown and not left and not notes
  equal(again.params, bundle.params)
  assert again.encoder == bundle.encoder  # the sin-cos tables were recognised
  assert (
    again.method['norm_pix'] is False and again.method['decoder'] == '24/1/3' and again.method['image_size'] == (32, 32)
  )


def test_the_encoder_alone_of_a_mae(tmp_path):
  bundle = vit_cases.with_decoder()
  written, left = formats.write(tmp_path / 'x.safetensors', bundle, 'timm')
  assert left == ['decoder']
  again, layout, *_ = formats.read(written)
  assert layout.name == 'timm' and again.method == {} and again.encoder['pos'] == 'sincos'
  equal(again.params['encoder'], bundle.params['encoder'])


def test_tables_of_another_kind_are_told_of():
  bundle = vit_cases.with_decoder()
  arrays, _ = save(bundle, timm.MAE)
  arrays['decoder_pos_embed'] = arrays['decoder_pos_embed'] * 0
  _, _, notes = load(in_memory(arrays), timm.MAE, '', Hints(heads=4, decoder_heads=3))
  assert any('sin-cos' in note for note in notes)


def test_a_classifier_keeps_its_head(tmp_path):
  rng = np.random.default_rng(0)
  head = {'kernel': rng.standard_normal((32, 5)).astype(np.float32), 'bias': rng.standard_normal(5).astype(np.float32)}
  plain = vit_cases.make('plain')
  classifier = dataclasses.replace(plain, params={**plain.params, 'head': head})
  written, left = formats.write(tmp_path / 'hf', classifier, 'hf-vit')
  assert not left and 'vit.layernorm.weight' in files.read(written) and 'classifier.bias' in files.read(written)
  assert json.loads((tmp_path / 'hf' / 'config.json').read_text())['architectures'] == ['ViTForImageClassification']
  equal(formats.read(written)[0].params, classifier.params)
  mean = vit_cases.make('plain', final_norm=False)
  mean = dataclasses.replace(mean, params={**mean.params, 'head': head, 'fc_norm': plain.params['encoder']['norm']})
  written, left = formats.write(tmp_path / 't.safetensors', mean, 'timm')
  assert not left
  equal(formats.read(written)[0].params, mean.params)
  with pytest.raises(CheckpointError, match="hf-vit needs 'norm'"):
    formats.write(tmp_path / 'no', mean, 'hf-vit')


@pytest.mark.parametrize(
  'form, shape, word',
  [
    ('hf-vit', 'scaled', 'layer_scale1'),
    ('hf-vit', 'no_cls', "needs 'cls_token'"),
    ('hf-vit', 'gated', 'swiglu'),
    ('hf-clip', 'plain', "needs 'embed_norm'"),
    ('mae', 'plain', 'decoder'),
    ('clip', 'registers', 'needs'),
    ('hf-dinov2', 'clip', 'embed_norm'),
  ],
)
def test_what_a_format_cannot_express_is_an_error(tmp_path, form, shape, word):
  with pytest.raises(CheckpointError, match=word):
    formats.write(tmp_path / 'x', vit_cases.make(shape), form)
  assert not list(tmp_path.iterdir())


def test_a_format_that_always_has_an_array_gets_a_neutral_one(tmp_path):
  bundle = vit_cases.make('no_qkv_bias')
  written, _ = formats.write(tmp_path / 'x', bundle, 'hf-dinov2')
  weights = files.read(written)
  assert (
    np.all(weights['encoder.layer.1.layer_scale2.lambda1'] == 1)
    and not weights['encoder.layer.0.attention.attention.key.bias'].any()
  )
  image = check.images(bundle)
  again = formats.read(written)[0]
  np.testing.assert_allclose(check.ours(again, image)['tokens'], check.ours(bundle, image)['tokens'], atol=1e-6)


def test_what_the_file_does_not_say_is_told_or_asked_for(tmp_path):
  arrays, _ = save(vit_cases.make('plain'), timm.TIMM)
  files.write(tmp_path / 'x.safetensors', arrays)
  with pytest.raises(CheckpointError, match='--heads'):
    formats.read(tmp_path / 'x.safetensors')
  bundle, _, _, notes = formats.read(tmp_path / 'x.safetensors', Hints(heads=4, eps=1e-12))
  assert bundle.encoder['eps'] == 1e-12 and not any('eps' in note for note in notes)
  assert any('activation' in note for note in notes) and any('normalised' in note for note in notes)


def test_config_json_is_read_and_options_win(tmp_path):
  bundle = dataclasses.replace(vit_cases.make('plain', eps=1e-9, grid=(2, 6)), stats='clip', crop=1.0)
  formats.write(tmp_path / 'x', bundle, 'hf-vit')
  plain = files.read(tmp_path / 'x')
  files.write(tmp_path / 'x' / 'model.safetensors', dict(plain.items()))  # without the hints that we leave in our files
  again, _, _, notes = formats.read(tmp_path / 'x')
  assert not notes and again.encoder == bundle.encoder and again.stats == 'clip' and again.crop == 1.0
  assert formats.read(tmp_path / 'x', Hints(eps=1e-5))[0].encoder['eps'] == 1e-5
  assert formats.read(tmp_path / 'x', Hints(image_size=(64, 64)))[0].image_size == (16, 48)


def test_spellings_of_bare_state_dicts_of_version_5():
  bundle = vit_cases.with_decoder()
  arrays, _ = save(bundle, huggingface.VIT_MAE)
  for old, new in (
    ('vit.encoder.layer.', 'vit.layers.'),
    ('attention.attention.query', 'attention.q_proj'),
    ('attention.attention.key', 'attention.k_proj'),
    ('attention.attention.value', 'attention.v_proj'),
    ('attention.output.dense', 'attention.o_proj'),
    ('intermediate.dense', 'mlp.fc1'),
    ('output.dense', 'mlp.fc2'),
  ):
    arrays = {name.replace(old, new): value for name, value in arrays.items()}
  assert 'decoder.decoder_layers.0.mlp.fc2.bias' in arrays
  again, unknown, _ = load(in_memory(arrays), huggingface.VIT_MAE, 'vit.', Hints(heads=4, decoder_heads=3))
  assert not unknown
  equal(again.params, bundle.params)


def test_chunked_blocks_of_dinov2():
  bundle = vit_cases.make('scaled')
  arrays, _ = save(bundle, timm.DINOV2)
  arrays = {
    name.replace('blocks.0.', 'blocks.0.0.').replace('blocks.1.', 'blocks.0.1.'): value
    for name, value in arrays.items()
  }
  arrays['mask_token'] = np.zeros((1, 32), np.float32)
  assert formats.detect(in_memory(arrays)).name == 'dinov2'
  again, unknown, _ = load(in_memory(arrays), timm.DINOV2, '', Hints(heads=4))
  assert not unknown
  equal(again.params, bundle.params)


def test_the_teacher_of_a_training_checkpoint_is_taken(tmp_path):
  arrays, _ = save(vit_cases.make('plain'), timm.TIMM)
  both = {f'student.module.backbone.{name}': value + 1 for name, value in arrays.items()}
  both |= {f'teacher.backbone.{name}': value for name, value in arrays.items()} | {
    'teacher.head.w': np.zeros(2, np.float32)
  }
  files.write(tmp_path / 'x.safetensors', both)
  bundle, _, unknown, notes = formats.read(tmp_path / 'x.safetensors', Hints(heads=4))
  np.testing.assert_array_equal(bundle.params['encoder']['cls_token'], arrays['cls_token'])
  assert 'teacher.head.w' in unknown and any('student' in note for note in notes)
  student, *_ = formats.read(tmp_path / 'x.safetensors', Hints(heads=4), prefix='student.module.backbone.')
  np.testing.assert_array_equal(student.params['encoder']['cls_token'], arrays['cls_token'] + 1)
  with pytest.raises(CheckpointError, match='student.module.backbone'):
    formats.read(tmp_path / 'x.safetensors', Hints(heads=4), prefix='model.')


def test_a_clip_model_in_half_precision_with_its_text_tower():
  bundle = vit_cases.make('clip')
  arrays, _ = save(bundle, openai.CLIP)
  arrays = {f'visual.{name}': value.astype(np.float16) for name, value in arrays.items()}
  arrays |= {
    'visual.proj': np.zeros((32, 8), np.float16),
    'transformer.resblocks.0.ln_1.weight': np.ones(4, np.float16),
  }
  weights = in_memory(arrays)
  assert formats.detect(weights).name == 'clip' and openai.CLIP.prefixes(weights) == ['visual.']
  again, unknown, _ = load(weights, openai.CLIP, 'visual.', Hints(heads=4))
  assert unknown == ['transformer.resblocks.0.ln_1.weight']
  assert again.stats == 'clip' and again.encoder == bundle.encoder
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), again.params, bundle.params)


def test_weights_of_no_vit_are_refused(tmp_path):
  files.write(tmp_path / 'x.safetensors', {'layer1.0.conv1.weight': np.zeros((4, 3, 3, 3), np.float32)})
  with pytest.raises(CheckpointError, match='layer1.0.conv1.weight'):
    formats.read(tmp_path / 'x.safetensors')
  with pytest.raises(CheckpointError, match='did you mean'):
    formats.layout_of('hf-clipp')


@pytest.mark.parametrize(
  'lost, word',
  [('blocks.1.norm1.bias', 'norm1/bias'), ('blocks.0.ls1.gamma', 'layer_scale1'), ('norm.bias', 'norm/bias')],
)
def test_an_array_that_is_missing_is_named(lost, word):
  arrays, _ = save(vit_cases.make('scaled'), timm.TIMM)
  del arrays[lost]
  with pytest.raises(CheckpointError, match=word):
    load(in_memory(arrays), timm.TIMM, '', Hints(heads=4))


def test_a_table_of_no_grid_is_an_error():
  arrays, _ = save(vit_cases.make('oblong'), timm.TIMM)
  with pytest.raises(CheckpointError, match='--image_size'):
    load(in_memory(arrays), timm.TIMM, '', Hints(heads=4))
  bundle, *_ = load(in_memory(arrays), timm.TIMM, '', Hints(heads=4, image_size=(16, 48)))
  assert bundle.encoder['grid'] == (2, 6)


def test_a_config_with_a_text_tower_may_leave_out_defaults():
  found = huggingface.hints(
    {'model_type': 'clip', 'vision_config': {'hidden_size': 1024, 'num_attention_heads': 16, 'patch_size': 14}}
  )
  assert (found.heads, found.eps, found.activation, found.image_size) == (16, 1e-5, 'quick_gelu', (224, 224))
  assert huggingface.hints({'architecture': 'vit_base_patch16_224'}) == Hints()


def test_a_config_of_timm_on_a_hub():
  found = timm.hints(
    {
      'architecture': 'vit_base_patch16_224',
      'pretrained_cfg': {'mean': [0.5] * 3, 'std': [0.5] * 3, 'input_size': [3, 224, 192], 'crop_pct': 0.9},
    }
  )
  assert found == Hints(image_size=(224, 192), stats='half', crop=0.9)
  assert timm.hints({'model_args': {'num_heads': 3, 'img_size': 64}}) == Hints(heads=3, image_size=(64, 64))


def test_the_published_names_of_the_reference_are_known(goldens):
  """The official MAE's weights, as they are published, with the heads that its paper gives."""
  from mim_jax import parity

  case = parity.read(goldens / 'mae.safetensors')
  weights = in_memory(case.weights)
  assert formats.detect(weights).name == 'mae'
  hints = Hints(heads=case.config.num_heads, decoder_heads=case.config.decoder_num_heads)
  bundle, unknown, notes = load(weights, timm.MAE, '', hints)
  assert not unknown and bundle.encoder['pos'] == 'sincos' and not any('sin-cos' in note for note in notes)
  image = np.moveaxis(case.inputs['imgs'], 1, -1)
  _, seen = bundle.module.apply({'params': bundle.params['encoder']}, image, taps=True)
  np.testing.assert_allclose(seen['tokens'], case.tensors['out/patch_embed'], atol=1e-5)


def test_bundles(tmp_path):
  bundle = dataclasses.replace(
    vit_cases.make('registers'), stats=((0.1, 0.2, 0.3), (1.0, 1.0, 2.0)), source={'file': 'x'}
  )
  bundles.write(tmp_path / 'x.safetensors', bundle)
  again, layout, unknown, _ = formats.read(tmp_path / 'x.safetensors')
  assert layout is None and not unknown
  assert dataclasses.replace(again, params={}) == dataclasses.replace(bundle, params={})
  equal(again.params, bundle.params)
  assert again.transforms == 'decode | resize(36) | center_crop(32) | normalize(((0.1, 0.2, 0.3), (1.0, 1.0, 2.0)))'
  larger = again.resized((48, 16))
  expected = posemb.resample(bundle.params['encoder']['pos_embed'], (4, 4), (6, 2), 1)
  np.testing.assert_array_equal(larger.params['encoder']['pos_embed'], expected)
  assert larger.image_size == (48, 16) and 'resize((48, 16))' in larger.transforms
  larger.check()
  with pytest.raises(CheckpointError, match='multiple'):
    again.resized((50, 50))
  broken = dataclasses.replace(again, encoder={**again.encoder, 'width': 64})
  with pytest.raises(CheckpointError, match='expected .2, 64'):
    broken.check()


def test_a_bundle_of_a_later_format_is_refused(tmp_path):
  files.write(tmp_path / 'x.safetensors', {'a': np.zeros(1)}, {bundles.KEY: json.dumps({'format': 2})})
  with pytest.raises(CheckpointError, match='format 2'):
    formats.read(tmp_path / 'x.safetensors')
