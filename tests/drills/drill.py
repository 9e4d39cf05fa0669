"""A tiny run in a process of its own, with places at which it can be made to fail.

  python drill.py WORKDIR [--config.key=value ...]

DRILL=kill:step:7 ends it by SIGKILL in step 7, kill:save:8 while the checkpoint of step 8 is being written, kill:eval:8 in the evaluation
after step 8; term:... asks it to stop by SIGTERM at the same places. DRILL=nan:5:3 makes the images of three steps from step 5 on NaN.
"""

import os
import signal
import sys
import time
from pathlib import Path

RECIPE = Path(__file__).parent / 'recipe.py'


def arm(drill: str):
  """Puts the failure that `drill` names into the trainer."""
  from mim_jax import trainer
  from mim_jax.checkpoint import manager
  from mim_jax.data import pipeline
  from mim_jax.evals import features

  kind, place, *rest = drill.split(':')
  if kind == 'nan':
    first, count = int(place), int(rest[0])
    make = pipeline.Pipeline._train_part

    def broken(self, step, *args):
      batch, faults = make(self, step, *args)
      if first <= step < first + count:
        batch['image'] = batch['image'] * float('nan')
      return batch, faults

    pipeline.Pipeline._train_part = broken
    return
  number = {'kill': signal.SIGKILL, 'term': signal.SIGTERM}[kind]
  at = int(rest[0])
  first = Path(sys.argv[1], 'checkpoints', '4', 'commit_success.txt')

  def strike():
    while at > 4 and not first.exists():  # saved in the background: here it is to be there when the run goes on
      time.sleep(0.05)
    os.kill(os.getpid(), number)

  if place == 'step':
    tick = trainer.Progress.tick
    log = trainer.Trainer._log
    count = lambda original: (
      lambda self, done, *args: (strike() if done == at else None, original(self, done, *args))[1]
    )
    trainer.Progress.tick, trainer.Trainer._log = count(tick), count(log)
  elif place == 'save':
    save = manager.Manager.save

    def struck(self, step, *args, **kwargs):
      saved = save(self, step, *args, **kwargs)  # returns while Orbax still writes in the background
      if step == at:
        strike()
      return saved

    manager.Manager.save = struck
  elif place == 'eval':
    extract = features.extract
    evaluate = trainer.Trainer._evaluate
    here = {}

    def noted(self, done):
      here['step'] = done
      return evaluate(self, done)

    def struck_eval(encoder, batches, *args, **kwargs):
      def passing():
        for i, batch in enumerate(batches):
          if here.get('step') == at and i == 1:
            strike()
          yield batch

      return extract(encoder, passing(), *args, **kwargs)

    trainer.Trainer._evaluate, features.extract = noted, struck_eval
  else:
    raise ValueError(drill)


if __name__ == '__main__':
  if os.environ.get('DRILL'):
    arm(os.environ['DRILL'])
  from mim_jax import train

  sys.exit(train.main([f'--config={RECIPE}', f'--workdir={sys.argv[1]}', *sys.argv[2:]]))
