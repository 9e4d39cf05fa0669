"""MaskAlign's teacher against official code."""

import pytest

from mim_jax import parity
from mim_jax.errors import UserError
from mim_jax.official import maskalign


def test_reference_numbers_of_the_clip_tower(goldens):
  rows = parity.run(parity.read(goldens / 'maskalign_clip.safetensors'))
  assert len(rows) == 10
  assert all(row.ok for row in rows), parity.table([row for row in rows if not row.ok])


def test_other_cases_are_refused(goldens):
  case = parity.read(goldens / 'mae.safetensors')
  with pytest.raises(UserError, match='maskalign_clip'):
    maskalign.replay(case)
