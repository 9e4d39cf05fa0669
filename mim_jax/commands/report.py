"""mim-jax report: a run on one page."""

from pathlib import Path

from mim_jax.log import record

HELP = """writes one HTML page about a run: figures next to baselines, curves, pictures over time, config, time, faults

The page needs no other file and no network, and may be made while the run goes on.

  mim-jax report runs/mae
  mim-jax report runs/mae --out=mae.html
"""


def add(parser):
  parser.add_argument('workdir', metavar='WORKDIR', help="a run's folder")
  parser.add_argument('--out', metavar='FILE.html', help='page to write; WORKDIR/report.html by default')


def run(args):
  from mim_jax.log import report  # after the record is found good: it takes seconds to import

  found = record.read(args.workdir)
  out = Path(args.out) if args.out else Path(args.workdir) / 'report.html'
  report.write(found, out)
  print(f'{out}: {args.workdir}, step {found.last_step}, {report.size(out.stat().st_size)}')
