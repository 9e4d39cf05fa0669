"""Lets the tests here, and the processes they start, import `eval_cases`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
