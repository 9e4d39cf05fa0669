"""mim-jax methods: what there is."""

from mim_jax import method

HELP = """lists the methods: name, paper, what it is

  mim-jax methods
"""


def add(parser):
  del parser


def run(args):
  del args
  rows = [(name, *method.describe(name)) for name in method.names()]
  widths = [max(len(row[i]) for row in rows) for i in range(3)]
  for row in rows:
    print('  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
