"""The same weights in timm or transformers and here: the same features, in and out. Skipped where these libraries are not installed."""

import functools
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import cli, method
from mim_jax.checkpoint import files
from mim_jax.official.vits import check, formats
from mim_jax.ops import masking

torch = pytest.importorskip(
  'torch', reason='torch is not installed: comparisons with other libraries are left out', exc_type=ImportError
)

_spec = importlib.util.spec_from_file_location('vit_cases', Path(__file__).parent / 'vit_cases.py')
vit_cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(vit_cases)

TOLERANCE = 1e-5


@pytest.fixture
def timm():
  return pytest.importorskip('timm.models.vision_transformer', reason='timm is not installed', exc_type=ImportError)


@pytest.fixture
def transformers():
  return pytest.importorskip('transformers', reason='transformers is not installed', exc_type=ImportError)


def randomize(model):
  """Every parameter drawn anew, so that scales of one and biases of zero hide nothing."""
  torch.manual_seed(0)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if 'pos_embed' not in name and 'position_embeddings' not in name or parameter.requires_grad:
        parameter.normal_(std=0.3)
  return model.eval()


def assert_same(mine, other):
  rows = check.compare(mine, other)
  assert rows and max(rows.values()) < TOLERANCE, rows


TIMM = {
  'plain': {},
  'no_cls': {'class_token': False, 'global_pool': 'avg', 'fc_norm': False},
  'scaled': {'init_values': 0.1},
  'registers': {'init_values': 0.1, 'reg_tokens': 4, 'no_embed_class': True},
  'no_qkv_bias': {'qkv_bias': False},
  'clip': {'pre_norm': True, 'act_layer': 'quick_gelu'},
  'pooled': {'global_pool': 'avg', 'num_classes': 5},
  'oblong': {'img_size': (16, 48)},
}


@pytest.mark.parametrize('name, ending', [('registers', 'pth'), *[(name, 'safetensors') for name in TIMM]])
def test_timm_in(tmp_path, timm, name, ending):
  options = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, mlp_ratio=2, num_classes=0) | TIMM[name]
  eps = 1e-5 if name == 'clip' else 1e-6
  model = randomize(timm.VisionTransformer(**options, norm_layer=functools.partial(torch.nn.LayerNorm, eps=eps)))
  path = tmp_path / f'x.{ending}'
  if ending == 'pth':
    torch.save({'model': model.state_dict(), 'epoch': 3}, path)
  else:
    files.write(path, {key: value.numpy() for key, value in model.state_dict().items()})
  size = options['img_size'] if isinstance(options['img_size'], tuple) else None
  hints = formats.Hints(heads=4, activation=options.get('act_layer', 'gelu'), image_size=size)
  bundle, layout, unknown, _ = formats.read(path, hints)
  assert layout.name == 'timm' and not unknown
  image = check.images(bundle)
  with torch.no_grad():
    theirs = model.forward_features(torch.from_numpy(np.moveaxis(image, -1, 1).copy())).numpy()
  mine = check.ours(bundle, image)
  assert_same(mine, {'tokens': theirs})
  if name == 'pooled':
    assert bundle.params['head']['kernel'].shape == (32, 5) and 'fc_norm' in bundle.params


@pytest.mark.parametrize('shape', vit_cases.SHAPES)
def test_timm_out(tmp_path, timm, shape):
  bundle = vit_cases.make(shape)
  written, _ = formats.write(tmp_path / 'x.safetensors', bundle, 'timm')
  model = check.timm_model(bundle)
  model.load_state_dict({name: torch.from_numpy(value) for name, value in files.read(written).items()})  # strictly
  image = check.images(bundle)
  with torch.no_grad():
    theirs = model.forward_features(torch.from_numpy(np.moveaxis(image, -1, 1).copy())).numpy()
  assert_same(check.ours(bundle, image), {'tokens': theirs})


@pytest.mark.slow
def test_vit_base_of_timm_in_and_out(tmp_path, timm):
  """A ViT-B/16 as timm makes it: nothing is guessed but what the published sizes fix."""
  model = randomize(timm.vit_base_patch16_224(pretrained=False, num_classes=0))
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.mul_(0.1)
  torch.save(model.state_dict(), tmp_path / 'vit.pth')
  bundle, _, unknown, _ = formats.read(tmp_path / 'vit.pth')
  assert not unknown and bundle.encoder['heads'] == 12 and bundle.image_size == (224, 224)
  image = check.images(bundle, 1)
  mine = check.ours(bundle, image)
  pixels = torch.from_numpy(np.moveaxis(image, -1, 1).copy())
  with torch.no_grad():
    assert_same(mine, {'tokens': model.forward_features(pixels).numpy()})
  written, _ = formats.write(tmp_path / 'x.safetensors', bundle, 'timm')
  fresh = timm.vit_base_patch16_224(pretrained=False, num_classes=0).eval()
  fresh.load_state_dict({name: torch.from_numpy(value) for name, value in files.read(written).items()})
  with torch.no_grad():
    assert_same(mine, {'tokens': fresh.forward_features(pixels).numpy()})


SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8)
MLP = dict(intermediate_size=64)
DECODER = dict(
  decoder_hidden_size=24, decoder_num_hidden_layers=1, decoder_num_attention_heads=3, decoder_intermediate_size=48
)
HUGGING_FACE = {
  'vit': ('ViTModel', 'ViTConfig', SMALL | MLP, 'hf-vit'),
  'vit_bare': (
    'ViTModel',
    'ViTConfig',
    SMALL | MLP | {'qkv_bias': False, 'layer_norm_eps': 1e-6, 'num_channels': 4},
    'hf-vit',
  ),
  'classifier': ('ViTForImageClassification', 'ViTConfig', SMALL | MLP | {'num_labels': 5}, 'hf-vit'),
  'vit_mae': ('ViTMAEForPreTraining', 'ViTMAEConfig', SMALL | MLP | DECODER, 'hf-mae'),
  'clip': ('CLIPVisionModel', 'CLIPVisionConfig', SMALL | MLP, 'hf-clip'),
  'clip_gelu': ('CLIPVisionModel', 'CLIPVisionConfig', SMALL | MLP | {'hidden_act': 'gelu'}, 'hf-clip'),
  'dinov2': ('Dinov2Model', 'Dinov2Config', SMALL | {'mlp_ratio': 2}, 'hf-dinov2'),
  'dinov2_gated': ('Dinov2Model', 'Dinov2Config', SMALL | {'use_swiglu_ffn': True}, 'hf-dinov2'),
  'dinov2_registers': (
    'Dinov2WithRegistersModel',
    'Dinov2WithRegistersConfig',
    SMALL | {'num_register_tokens': 3},
    'hf-dinov2',
  ),
}


@pytest.mark.parametrize('name', HUGGING_FACE)
def test_transformers_in_and_out(tmp_path, transformers, name):
  model_class, config_class, options, form = HUGGING_FACE[name]
  model = randomize(getattr(transformers, model_class)(getattr(transformers, config_class)(**options)))
  model.save_pretrained(tmp_path / 'theirs')
  bundle, layout, unknown, _ = formats.read(tmp_path / 'theirs')
  assert layout.name == form and not unknown
  image = check.images(bundle)
  mine = check.ours(bundle, image)
  prefix = layout.prefixes(files.read(tmp_path / 'theirs'))[0]
  assert_same(mine, check.theirs(tmp_path / 'theirs', prefix, layout, bundle, image))

  written, left = formats.write(tmp_path / 'ours', bundle, form)
  assert not left
  prefix = layout.prefixes(files.read(written))[0]
  assert_same(mine, check.theirs(written, prefix, layout, bundle, image))
  found, report = getattr(transformers, model_class).from_pretrained(tmp_path / 'ours', output_loading_info=True)
  absent = [key for key in report['missing_keys'] if 'mask_token' not in key and 'pooler' not in key]  # we have neither
  assert not absent and not report['unexpected_keys'] and type(found).__name__ == model_class


def test_every_hidden_state_of_clip(tmp_path, transformers):
  model = randomize(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SMALL, **MLP)))
  model.save_pretrained(tmp_path)
  bundle, *_ = formats.read(tmp_path)
  image = check.images(bundle)
  with torch.no_grad():
    out = model(torch.from_numpy(np.moveaxis(image, -1, 1).copy()), output_hidden_states=True)
  _, seen = bundle.module.apply({'params': bundle.params['encoder']}, image, taps=True)
  for mine, theirs in zip([seen['input'], *seen['layers']], out.hidden_states, strict=True):
    np.testing.assert_allclose(mine, theirs.numpy(), atol=TOLERANCE * max(1, float(theirs.abs().max())))


def test_dinov2_on_larger_images(tmp_path, transformers):
  """Their model resamples its table in the forward pass, we do it when the weights are read."""
  model = randomize(transformers.Dinov2Model(transformers.Dinov2Config(**SMALL, mlp_ratio=2)))
  model.save_pretrained(tmp_path)
  bundle = formats.read(tmp_path)[0].resized((56, 40))
  image = check.images(bundle)
  with torch.no_grad():
    theirs = model(torch.from_numpy(np.moveaxis(image, -1, 1).copy())).last_hidden_state.numpy()
  assert_same(check.ours(bundle, image), {'tokens': theirs})


def test_the_whole_mae_of_transformers(tmp_path, transformers):
  """Encoder, decoder and loss of ViTMAEForPreTraining with its noise injected."""
  model = transformers.ViTMAEForPreTraining(
    transformers.ViTMAEConfig(**SMALL, **MLP, **DECODER, norm_pix_loss=True, layer_norm_eps=1e-6)
  )
  randomize(model)
  bundle = vit_cases.with_decoder()
  tables = files.read(formats.write(tmp_path / 'tables', bundle, 'hf-mae')[0])
  with torch.no_grad():  # version 5 leaves the fixed tables at zero until published weights are loaded
    model.vit.embeddings.position_embeddings.copy_(torch.from_numpy(tables['vit.embeddings.position_embeddings']))
    model.decoder.decoder_pos_embed.copy_(torch.from_numpy(tables['decoder.decoder_pos_embed']))
  model.save_pretrained(tmp_path / 'theirs')
  bundle, _, _, notes = formats.read(tmp_path / 'theirs')
  assert not any('sin-cos' in note for note in notes)
  cfg = method.options('mae', **{key: value for key, value in bundle.method.items() if key != 'name'})
  image, noise = check.images(bundle), np.random.default_rng(1).random((2, 16)).astype(np.float32)
  with torch.no_grad():
    theirs = model(torch.from_numpy(np.moveaxis(image, -1, 1).copy()), noise=torch.from_numpy(noise))
  params = jax.tree.map(jnp.asarray, bundle.params)
  loss, aux = method.build(cfg).loss(params, {}, {}, {'image': image}, {'noise': jnp.asarray(noise)}, 0)
  np.testing.assert_allclose(loss, theirs.loss.item(), rtol=TOLERANCE)
  scale = float(theirs.logits.abs().max())
  hidden = masking.keep_smallest(jnp.asarray(noise), 4)[2][..., None]
  np.testing.assert_allclose(
    aux['out']['pred'] * hidden, theirs.logits.numpy() * np.asarray(hidden), atol=TOLERANCE * scale
  )


def test_the_command_compares_both_sides(tmp_path, transformers, timm, capsys):
  model = randomize(transformers.Dinov2Model(transformers.Dinov2Config(**SMALL, mlp_ratio=2)))
  model.save_pretrained(tmp_path / 'theirs')
  out = tmp_path / 'x.safetensors'
  assert cli.main(['convert', str(tmp_path / 'theirs'), f'--out={tmp_path / "ours.safetensors"}']) == 0
  assert cli.main(['convert', str(tmp_path / 'ours.safetensors'), '--to=timm', f'--out={out}']) == 0
  text = capsys.readouterr().out
  assert text.count('the same') == 2 and 'DIFFERENT' not in text
  config = json.loads((tmp_path / 'theirs' / 'config.json').read_text())
  (tmp_path / 'theirs' / 'config.json').write_text(
    json.dumps(config | {'num_attention_heads': 8})
  )  # which is not how they were made
  assert cli.main(['convert', str(tmp_path / 'theirs'), '--heads=4', f'--out={tmp_path / "wrong.safetensors"}']) == 1
  assert 'DIFFERENT' in capsys.readouterr().out


def test_a_real_hugging_face_shard_index(tmp_path, transformers):
  model = randomize(transformers.ViTModel(transformers.ViTConfig(**SMALL, **MLP)))
  model.save_pretrained(tmp_path, max_shard_size='20KB')
  assert len(list(tmp_path.glob('*.safetensors'))) > 1
  bundle, _, unknown, _ = formats.read(tmp_path)
  assert not unknown
  image = check.images(bundle)
  with torch.no_grad():
    theirs = model(torch.from_numpy(np.moveaxis(image, -1, 1).copy())).last_hidden_state.numpy()
  assert_same(check.ours(bundle, image), {'tokens': theirs})
