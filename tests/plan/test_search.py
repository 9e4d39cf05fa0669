"""Searching and scaling on a made-up machine whose time and memory are known."""

import pytest

from mim_jax import config, method
from mim_jax.errors import ConfigError, UserError
from mim_jax.parallel import topology as topologies
from mim_jax.plan import jobs, scaling, search

GIB = 2**30


@pytest.fixture
def cfg():
  cfg = config.base()
  cfg.method = method.options('mae', size='mu')
  cfg.batch_size = 4096
  cfg.mesh.fsdp, cfg.mesh.data = -1, 1
  return cfg


def machine(cfg, topology, examples):
  """Memory grows with the images at once, remat halves it and costs time, and so do parts; unrolled is faster."""
  del examples
  if cfg.mesh.tensor == 2:
    raise ConfigError('3 heads cannot be cut in 2')
  at_once = cfg.batch_size / topology.devices / cfg.accumulate
  memory = at_once * {'none': 0.2, 'dots': 0.1, 'full': 0.05}[cfg.method.remat] * GIB
  seconds = (
    1 + 0.1 * cfg.accumulate + {'none': 0, 'dots': 0.05, 'full': 0.5}[cfg.method.remat] - 0.2 * (not cfg.method.scan)
  )
  limit = 15 * GIB
  return {
    'fits': memory <= limit,
    'hbm_bytes': memory,
    'hbm_limit_bytes': limit,
    'hbm': dict.fromkeys(('params', 'optimizer', 'state', 'frozen', 'batch'), 0),
    'estimated_step_seconds': seconds,
    'images_per_second': cfg.batch_size / seconds,
    'estimated_utilisation': 0.3,
    'compile_seconds': 1,
  }


def test_search_finds_the_fastest_that_fits(cfg):
  # 256 images a chip: none needs 4 parts (1.4 s), dots 2 (1.25 s), full 1 (1.6 s); unrolled is faster by 0.2 s.
  said = []
  found = search.run(cfg, topologies.parse('v5e:4x4'), 100, said.append, plan=machine)
  assert found['best'] == ['--config.method.scan=False', '--config.method.remat=dots', '--config.accumulate=2']
  assert found['tried'][0]['arguments'] == found['best']
  assert any('cannot be' in line for line in said)
  assert 'fastest that fits v5e:4x4: --config.method.scan=False' in search.table(found)
  best = machine(jobs.changed(cfg, found['best']), topologies.parse('v5e:4x4'), 0)
  assert best['fits'] and best['estimated_step_seconds'] == pytest.approx(1.05)


def test_search_says_when_nothing_fits(cfg):
  never = lambda *args: machine(*args) | {'fits': False}
  found = search.run(cfg, topologies.parse('v5e:4x4'), 100, lambda line: None, plan=never)
  assert found['best'] is None
  assert 'nothing that was tried fits' in search.table(found)


def test_changed_keeps_types_and_leaves_the_config_alone(cfg):
  other = jobs.changed(cfg, ['--config.method.scan=False', '--config.accumulate=4', '--config.method.remat=dots'])
  assert (other.method.scan, other.accumulate, other.method.remat) == (False, 4, 'dots')
  assert (cfg.method.scan, cfg.accumulate, cfg.method.remat) == (True, 1, 'none')


def test_remedies_cut_the_batch_into_as_many_parts_as_the_excess_asks_for(cfg):
  found = machine(cfg, topologies.parse('v5e:4x4'), 0)  # 51.2 of 15 GiB
  found |= {'couples': False, 'images_per_device_at_once': 256, 'accumulate': 1, 'remat': 'none'}
  assert jobs.remedies(found)[0] == ['--config.accumulate=4']
  assert jobs.remedies(found | {'couples': True}) == [['--config.method.remat=dots'], ['--config.method.remat=full']]
  assert jobs.remedies(found | {'images_per_device_at_once': 2}) == []
  full = dict.fromkeys(('params', 'optimizer', 'state', 'frozen', 'batch'), 5 * GIB)
  assert jobs.remedies(found | {'hbm': full}) == []  # the parameters alone are too much


def test_fitting_plan_gives_the_estimates_of_the_change_that_fits(cfg, monkeypatch):
  def plan(cfg, topology, examples, hlo_file):
    more = {'couples': False, 'images_per_device_at_once': 256 / cfg.accumulate, 'accumulate': cfg.accumulate}
    return dict.fromkeys(jobs.ESTIMATES) | machine(cfg, topology, examples) | more | {'remat': cfg.method.remat}

  monkeypatch.setattr(jobs, 'plan', plan)
  said = []
  found = jobs.fitting_plan(cfg, topologies.parse('v5e:4x4'), 100, said.append)
  assert not found['fits'] and found['hbm_bytes'] > 15 * GIB
  assert found['fits_with'] == ['--config.accumulate=4'] and found['fits_with_hbm_bytes'] <= 15 * GIB
  assert found['estimated_step_seconds'] == pytest.approx(1.4)
  assert 'does not fit' in said[0]
  cfg.batch_size = 512
  found = jobs.fitting_plan(cfg, topologies.parse('v5e:4x4'), 100, said.append)
  assert found['fits'] and found['fits_with'] is None


def test_scaling_gives_efficiency_against_the_smallest(cfg, tmp_path):
  def plan(cfg, topology, examples, say):
    if topology.devices > 256:
      raise ConfigError('batch_size 4096 cannot be cut')
    found = machine(cfg, topology, examples)
    seconds = 16 / topology.devices + 0.01
    return found | {
      'images_per_device': cfg.batch_size / topology.devices,
      'fits_with': None,
      'collectives': [{'bytes': 5e6}],
      'estimated_by': 'compiler cycles',
      'estimated_step_seconds': seconds,
      'images_per_second': cfg.batch_size / seconds,
      'hours': 1.0,
      'device_hours': topology.devices,
    }

  found = scaling.run(cfg, topologies.CHIPS['v5e'], scaling.counts('256,16,1024'), 100, lambda line: None, plan=plan)
  assert [row['topology'] for row in found['rows']] == ['v5e:4x4', 'v5e:16x16', '4*v5e:16x16']
  assert found['rows'][0]['efficiency'] == 1
  assert found['rows'][1]['efficiency'] == pytest.approx(1.01 / (16 * (1 / 16 + 0.01)))
  assert 'cannot be cut' in scaling.table(found)
  scaling.plot(found, tmp_path / 'plot.png')
  assert (tmp_path / 'plot.png').stat().st_size > 1000


def test_scaling_counts_refuses_what_is_no_number():
  with pytest.raises(UserError, match='16,64,256'):
    scaling.counts('16,many')
