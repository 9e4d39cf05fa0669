"""The manager under test; and lets the tests here import `manager_cases`."""

import contextlib
import sys
from pathlib import Path

import pytest

from mim_jax.checkpoint.manager import Manager

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def make(tmp_path):
  """Manager of `tmp_path/run`, closed at the end."""
  with contextlib.ExitStack() as stack:

    def start(**options):
      manager = Manager(tmp_path / 'run', **options)
      stack.callback(manager.close)
      return manager

    yield start
