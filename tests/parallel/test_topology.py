"""Names of topologies, and the environment of a compiler."""

import pytest

from mim_jax.errors import UserError
from mim_jax.parallel import topology as topologies


@pytest.mark.parametrize(
  ('text', 'devices', 'island', 'written'),
  [
    ('v5e:4x4', 16, 16, 'v5e:4x4'),
    ('V5P:4x4x4', 64, 64, 'v5p:4x4x4'),
    ('4*v5e:16x16', 1024, 256, '4*v5e:16x16'),
    ('h100:8', 8, 8, 'h100:8'),
    ('h100:4', 4, 4, 'h100:4'),
    ('h100:64', 64, 8, 'h100:64'),
    ('cpu:8', 8, 8, 'cpu:8'),
  ],
)
def test_parse(text, devices, island, written):
  found = topologies.parse(text)
  assert (found.devices, found.island, str(found)) == (devices, island, written)
  assert topologies.parse(str(found)) == found


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('v9x:4x4', 'h100:.*8, 16, 64'),
    ('v5', 'CHIP:SHAPE'),
    ('v5e:16', 'shapes of 2'),
    ('v5p:4x4', 'shapes of 3'),
    ('v5e:32x32', 'at most 256.*N\\*v5e:16x16'),
    ('h100:12', 'multiple'),
    ('v5e:0x4', 'shapes of 2'),
  ],
)
def test_parse_names_what_is_known(text, message):
  with pytest.raises(UserError, match=f'(?s){message}'):
    topologies.parse(text)


@pytest.mark.parametrize(
  ('chip', 'count', 'expected'),
  [
    ('v5e', 16, 'v5e:4x4'),
    ('v5e', 1024, '4*v5e:16x16'),
    ('v6e', 64, 'v6e:8x8'),
    ('v5p', 16, 'v5p:2x2x4'),
    ('v5p', 1024, 'v5p:8x8x16'),
    ('h100', 64, 'h100:64'),
  ],
)
def test_of_size(chip, count, expected):
  found = topologies.of_size(topologies.CHIPS[chip], count)
  assert (str(found), found.devices) == (expected, count)


def test_of_size_refuses_what_no_slice_has():
  with pytest.raises(UserError, match='power of two'):
    topologies.of_size(topologies.CHIPS['v5e'], 48)


def test_peaks_are_matrix_units_times_clock():
  units = {'v5e': 4 * 128**2, 'v5p': 2 * 4 * 128**2, 'v6e': 4 * 256**2, 'h100': 132 * 2048}
  for name, multipliers in units.items():
    chip = topologies.CHIPS[name]
    assert chip.flops == pytest.approx(2 * multipliers * chip.clock, rel=0.01)


def test_environment_keeps_flags_and_drops_the_callers_platform():
  given = {'XLA_FLAGS': '--xla_dump_to=here', 'JAX_PLATFORMS': 'cuda', 'LIBTPU_INIT_ARGS': '--a=b'}
  tpu = topologies.environment(topologies.parse('v5e:4x4'), given)
  assert (tpu['JAX_PLATFORMS'], tpu['XLA_FLAGS'], tpu['LIBTPU_INIT_ARGS']) == ('cpu', '--xla_dump_to=here', '--a=b')
  assert tpu['TPU_SKIP_MDS_QUERY'] == '1'
  assert '--xla_gpu_autotune_level=0' in topologies.environment(topologies.parse('h100:8'), given)['XLA_FLAGS'].split()
  assert topologies.environment(topologies.parse('cpu:4'), given)['XLA_FLAGS'].endswith('=4')


def test_require_compiler_names_the_extra(monkeypatch):
  monkeypatch.setattr(topologies, 'installed', lambda module: False)
  topologies.require_compiler(topologies.parse('cpu:8'))
  for text, package in (('v5e:4x4', 'libtpu'), ('h100:8', 'jax-cuda13-plugin')):
    with pytest.raises(UserError, match=rf'{package}.*mim-jax\[plan\]'):
      topologies.require_compiler(topologies.parse(text))


def test_installed_looks_without_importing():
  assert topologies.installed('json')
  assert not topologies.installed('no_such_package.inside')
