"""mim-jax plan: on this machine's CPU, and (slow) with the real compilers for TPU slices and GPU nodes."""

import json
import subprocess
import sys

import pytest

from mim_jax import cli, config
from mim_jax.parallel import topology as topologies
from mim_jax.plan import examples, report, worker

KEYS = {
  *(
    'fits',
    'hbm_bytes',
    'hbm_limit_bytes',
    'hbm',
    'parameters',
    'frozen_parameters',
    'model_flops_per_image',
    'kept_bytes_per_image',
    'hlo_flops',
    'collectives',
  ),
  *(
    'estimated_cycles',
    'estimated_step_seconds',
    'estimated_utilisation',
    'roofline_seconds',
    'images_per_second',
    'hours',
    'device_hours',
  ),
  *('contributors', 'topology', 'devices', 'mesh', 'steps', 'notes'),
}
TINY = ['--config.method.size=mu', '--config.method.decoder=32/1/2', '--config.batch_size=32']


def load(recipe, *overrides):
  return config.load([f'--config={recipe}', *overrides])


@pytest.fixture(scope='module')
def tiny():
  cfg = load('configs/mae.py:debug', *TINY)
  return cfg, worker.plan(cfg, topologies.parse('cpu:8'), 20_000)


def test_plan_has_every_key_and_exact_memory_of_arguments(tiny):
  cfg, found = tiny
  assert set(found) >= KEYS
  json.dumps(found)
  assert found['fits'] and found['devices'] == 8
  assert found['mesh'] == {'data': 1, 'fsdp': 8, 'tensor': 1}
  assert found['hbm']['batch'] == 4 * 64 * 64 * 3 * 4 + 4  # images and the flag of broken ones
  assert found['hbm']['params'] * 8 >= 4 * found['parameters'] > 0
  assert found['hbm']['optimizer'] == pytest.approx(2 * found['hbm']['params'], rel=0.1)
  assert found['steps'] == 1500 and found['steps_per_epoch'] == 20_000 // 32


def test_plan_compiles_at_least_the_model_flops(tiny):
  cfg, found = tiny
  assert found['hlo_flops'] >= 0.99 * found['model_flops_per_image'] * cfg.batch_size / 8


def test_plan_on_cpu_has_no_time_but_says_so(tiny):
  _, found = tiny
  assert found['estimated_step_seconds'] is None
  text = report.text(found | {'fits_with': None})
  assert 'no time is estimated' in text and 'fits' in text


def test_command_prints_one_json_object(capfd):
  assert cli.main(['plan', '--config=configs/mae.py:debug', *TINY, '--topology=cpu:2', '--json', '--examples=500']) == 0
  found = json.loads(capfd.readouterr().out)
  assert set(found) >= KEYS | {'fits_with'}
  assert found['steps_per_epoch'] == 500 // 32


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--topology=v9:4x4'], 'h100'),
    (['--topology=cpu:8', '--config.mesh.fsdp=3'], '8 devices'),
    (['--topology=cpu:8', '--config.data.source=tfds:unheard_of:train'], '--examples=N'),
    (['--topology=cpu:8', '--search', '--scaling=8'], 'one after the other'),
  ],
)
def test_command_explains_what_it_cannot_do(arguments, message, capsys):
  assert cli.main(['plan', '--config=configs/mae.py:debug', *arguments]) == 2
  assert message in capsys.readouterr().err


def test_examples_of_published_and_synthetic_sets():
  cfg = load('configs/mae.py')
  assert examples.count(cfg.data) == 1_281_167
  cfg.data.source = 'synthetic:shapes/train=123:train, tfds:cifar10:test'
  assert examples.count(cfg.data) == 10_123


@pytest.mark.parametrize(
  ('message', 'needed'),
  [
    ('RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (61.49G) exceeds available HBM (15.75G).', 61.49 * 2**30),
    ('Ran out of memory in memory space hbm. Used 17.33G of 15.75G hbm. Exceeded hbm capacity by 1.58G.', 17.33 * 2**30),
    ('INTERNAL: something else', None),
  ],
)  # fmt: skip
def test_needed_memory_is_read_from_the_refusal(message, needed):
  assert worker.needed_memory(message) == needed


def test_report_says_by_how_much_it_does_not_fit_and_what_would(tiny):
  _, found = tiny
  text = report.text(
    found
    | {'fits': False, 'hbm_bytes': 20 * 2**30, 'hbm_limit_bytes': 15.75 * 2**30}
    | {'fits_with': ['--config.accumulate=2'], 'fits_with_hbm_bytes': 11 * 2**30}
  )
  assert 'DOES NOT FIT by 4.25 GiB; it fits with --config.accumulate=2: 11.00 GiB' in text


# ---- with the real compilers ----

TOPOLOGIES = ('v5e:4x4', 'v5e:16x16', 'v5p:4x4x4', 'v6e:16x16', 'h100:8')


def plan(recipe, topology, *overrides):
  """What the command prints, from a process of its own as users have it; skips when the compiler is not installed."""
  chip = topologies.parse(topology).chip
  module = {'tpu': 'libtpu', 'cuda': 'jax_plugins.xla_cuda13'}[chip.platform]
  if not topologies.installed(module):
    pytest.skip(f'no compiler for {chip.name} here ({module} is missing): pip install "mim-jax[plan]"')
  command = [
    sys.executable,
    '-m',
    'mim_jax.cli',
    'plan',
    f'--config={recipe}',
    f'--topology={topology}',
    '--json',
    *overrides,
  ]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode in (0, 1), done.stderr
  return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize('topology', TOPOLOGIES)
@pytest.mark.parametrize(('size', 'parameters'), [('B', 111_655_680), ('L', 329_239_296), ('H', 656_613_964)])
def test_complete_answers_for_mae(size, parameters, topology):
  found = plan(f'configs/mae.py:size={size}', topology)
  assert set(found) >= KEYS
  assert found['parameters'] == parameters
  assert found['fits'] or found['fits_with']
  assert 0.05 < found['estimated_utilisation'] < 0.9
  assert found['estimated_cycles'] > 0 and found['images_per_second'] > 0 and found['device_hours'] > 0
  # TPU: the attention kernel states what the matrix unit does, heads of 32 and 64 features as 128 lanes.
  more = found['hlo_flops'] / (found['model_flops_per_image'] * 4096 / found['devices'])
  assert more == pytest.approx(1, rel=0.05) if topology == 'h100:8' else 1 < more < 1.25
  assert len(found['contributors']) == 10
  assert {c['axis'] for c in found['collectives']} == {'fsdp'}


@pytest.mark.slow
def test_scanned_and_unrolled_layers_count_the_same_work():
  small = ['--config.batch_size=256', '--config.method.size=S', '--config.method.decoder=256/4/8']
  scanned = plan('configs/mae.py', 'v5e:2x4', *small, '--config.method.scan=True')
  unrolled = plan('configs/mae.py', 'v5e:2x4', *small, '--config.method.scan=False')
  assert scanned['hlo_flops'] == pytest.approx(unrolled['hlo_flops'], rel=0.02)
  assert 0.6 < unrolled['estimated_cycles'] / scanned['estimated_cycles'] < 1.1


@pytest.mark.slow
def test_attention_on_gpus_is_cudnn_unless_switched_off(tmp_path):
  small = ['--config.batch_size=64', '--config.method.size=S', '--config.method.scan=True', f'--hlo={tmp_path / "hlo"}']
  calls = lambda: (tmp_path / 'hlo').read_text().count('custom_call_target="__cudnn$fmhaSoftmax')
  fused = plan('configs/mae.py', 'h100:8', *small)
  assert calls() == 4  # forward and backward of the layers of encoder and decoder, which are loops
  plain = plan('configs/mae.py', 'h100:8', *small, '--config.fused_attention=False')
  assert calls() == 0
  assert fused['hlo_flops'] == pytest.approx(plain['hlo_flops'], rel=0.02)
  assert fused['hbm_bytes'] < plain['hbm_bytes']


@pytest.mark.slow
def test_what_does_not_fit_says_what_does():
  found = plan('configs/mae.py:size=L', 'v5e:2x4', '--config.batch_size=2048')
  assert not found['fits'] and found['hbm_bytes'] > found['hbm_limit_bytes']
  assert found['fits_with'][0].startswith('--config.accumulate=')
  assert found['fits_with_hbm_bytes'] <= found['hbm_limit_bytes']
  assert found['estimated_step_seconds'] > 0
