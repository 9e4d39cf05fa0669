"""mim-jax panels: pictures from a checkpoint."""

from pathlib import Path

from mim_jax import runs
from mim_jax.evals import suite
from mim_jax.log import panels, pictures

HELP = """draws what a run's method sees and predicts, with the weights of its newest checkpoint

  mim-jax panels --workdir=runs/mae --out=panel.png
  mim-jax panels --workdir=runs/mae --source=folder:my_pictures --out=panel.png
"""


def add(parser):
  parser.add_argument('--workdir', required=True, help="a run's folder")
  parser.add_argument('--out', required=True, metavar='FILE.png')
  parser.add_argument(
    '--source', help="where the images come from, such as folder:PATH; the run's evaluation data by default"
  )
  parser.add_argument('--count', type=int, help='images to show')


def run(args):
  opened = runs.open_run(args.workdir)
  cfg, program = opened.cfg, opened.program
  evaluators = suite.build(cfg.evals, cfg.data.source, cfg.data.eval_transforms, cfg.batch_size).evaluators
  cfg.panels.count = args.count or cfg.panels.count
  if args.source:
    panel = panels.Panel(program.method, opened.feeds, args.source, cfg.data.eval_transforms, cfg.panels.count)
  else:
    panel = runs.panel_of(program.method, opened.feeds, cfg, evaluators)
  pictures.save(Path(args.out), panel.draw(opened.params, opened.train['state'], opened.frozen))
  print(f'{args.out}: step {opened.step} of {args.workdir}')
