"""The comparison itself: what passes and what must not."""

import numpy as np
import pytest

from mim_jax import cli, parity
from mim_jax.errors import UserError


def test_tolerances():
  reference = np.array([1.0, 200.0])
  assert parity.compare('out/x', reference, reference + [0, 1e-3]).ok  # 5e-6 of the largest entry
  assert not parity.compare('out/x', reference, reference + [0, 3e-3]).ok
  small = np.array([1e-3, 0.0])
  assert parity.compare('out/x', small, small + 5e-6).ok  # absolute where entries are small
  assert not parity.compare('grad/x', small, small + 5e-6).ok  # gradients are relative
  assert parity.compare('grad/x', np.zeros(2), np.array([1e-8, 0])).ok


@pytest.mark.parametrize('ours', [None, np.zeros(3), np.array([np.nan, 0.0])])
def test_absent_misshapen_and_non_finite_fail(ours):
  row = parity.compare('out/x', np.zeros(2), ours)
  assert not row.ok and row.note


def test_files_that_are_no_case(tmp_path):
  with pytest.raises(UserError, match='CASE.json'):
    parity.read(tmp_path / 'x.safetensors')
  with pytest.raises(UserError, match='known: .*mae, '):
    parity.module_of('unheard_of')


def test_part_cases_are_served_by_their_method():
  assert parity.module_of('mae_vit').__name__ == parity.module_of('mae').__name__ == 'mim_jax.official.mae'


def test_exit_codes(goldens, tmp_path, capsys):
  assert cli.main(['parity', str(tmp_path / 'none.safetensors')]) == 2
  assert 'expected a file' in capsys.readouterr().err
  case = parity.read(goldens / 'mae.safetensors')
  import safetensors.numpy

  broken = case.tensors | {'out/pred': case.tensors['out/pred'] + 1e-3}
  safetensors.numpy.save_file(broken, tmp_path / 'mae_off.safetensors')
  (tmp_path / 'mae_off.json').write_text((goldens / 'mae.json').read_text())
  assert cli.main(['parity', str(tmp_path / 'mae_off.safetensors')]) == 1
  assert 'out/pred' in [line.split()[0] for line in capsys.readouterr().out.splitlines() if 'OUT OF TOLERANCE' in line]


def test_a_share_of_the_entries_may_be_asked_to_agree():
  reference = np.zeros(1000, np.float32)
  ours = reference.copy()
  ours[:4] = 1.0
  assert parity.compare('out/attack', reference, ours, agreement=(0.995, 1e-6)).ok
  assert not parity.compare('out/attack', reference, ours, agreement=(0.997, 1e-6)).ok
  assert not parity.compare('out/attack', reference, ours).ok
  assert not parity.compare('out/attack', reference, ours[:10], agreement=(0.5, 1e-6)).ok
