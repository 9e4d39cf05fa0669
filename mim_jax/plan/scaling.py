"""The same recipe on more and more chips: memory, collectives and efficiency of each, on paper."""

from collections.abc import Callable

from mim_jax.errors import ConfigError, UserError
from mim_jax.parallel import topology as topologies
from mim_jax.plan import jobs


def counts(text: str) -> list[int]:
  """'16,64,256' as numbers, ascending."""
  try:
    found = sorted({int(part) for part in text.split(',')})
  except ValueError as error:
    raise UserError(f'--scaling={text}: expected numbers of chips with commas, such as 16,64,256,1024') from error
  if found[0] < 1:
    raise UserError(f'--scaling={text}: {found[0]} chips')
  return found


def run(
  cfg, chip: topologies.Chip, sizes: list[int], examples: int, say: Callable[[str], None], plan=jobs.fitting_plan
) -> dict:
  """{'chip', 'batch_size', 'rows': one per number of chips}; the batch of the recipe stays, each chip gets less of it.

  Efficiency is the throughput of a chip over that of a chip in the smallest number of chips that was asked for. A
  number of chips that the recipe cannot use (fewer images than chips) has an 'error' instead of figures.
  """
  rows = []
  for size in sizes:
    topology = topologies.of_size(chip, size)
    say(f'{topology}: compiling')
    try:
      found = plan(cfg, topology, examples, say)
    except ConfigError as error:
      rows.append({'chips': size, 'topology': str(topology), 'error': str(error)})
      continue
    rows.append(
      {
        'chips': size,
        'topology': str(topology),
        'images_per_chip': found['images_per_device'],
        'fits': found['fits'],
        'fits_with': found['fits_with'],
        'hbm_bytes': found['hbm_bytes'],
        'collective_bytes': sum(c['bytes'] for c in found['collectives']) if found['estimated_by'] else None,
        'estimated_step_seconds': found['estimated_step_seconds'],
        'images_per_second': found['images_per_second'],
        'estimated_utilisation': found['estimated_utilisation'],
        'hours': found['hours'],
        'device_hours': found['device_hours'],
      }
    )
  timed = [row for row in rows if row.get('images_per_second')]
  for row in timed:
    row['efficiency'] = row['images_per_second'] / row['chips'] / (timed[0]['images_per_second'] / timed[0]['chips'])
  return {'chip': chip.name, 'batch_size': cfg.batch_size, 'rows': rows}


def table(found: dict) -> str:
  lines = [
    f'{found["chip"]}, batch {found["batch_size"]}',
    '  chips  images/chip      memory   collectives       step    images/s  efficiency   hours  device-hours',
  ]
  for row in found['rows']:
    if 'error' in row:
      lines.append(f'{row["chips"]:>7}  {row["error"]}')
      continue
    memory = f'{row["chips"]:>7}{row["images_per_chip"]:>13g}{jobs.size(row["hbm_bytes"]):>12}'
    if not row.get('images_per_second'):
      lines.append(f'{memory}   {"fits" if row["fits"] else "does not fit"}, no estimate')
      continue
    note = f'   with {" ".join(row["fits_with"])}' if row['fits_with'] else ''
    lines.append(
      f'{memory}{row["collective_bytes"] / 1e6:>11,.0f} MB{1e3 * row["estimated_step_seconds"]:>8,.1f} ms'
      f'{row["images_per_second"]:>12,.0f}'
      f'{row["efficiency"]:>12.0%}{row["hours"]:>8,.1f}{row["device_hours"]:>14,.0f}{note}'
    )
  return '\n'.join(lines)


def plot(found: dict, path: str):
  """Throughput against the straight line, and memory and collective bytes of a chip, over the number of chips."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot as plt

  rows = [row for row in found['rows'] if row.get('images_per_second')]
  if not rows:
    raise UserError('nothing to plot: no number of chips has an estimate')
  chips = [row['chips'] for row in rows]
  figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
  left.plot(chips, [row['images_per_second'] for row in rows], 'o-', label='estimated')
  left.plot(chips, [rows[0]['images_per_second'] / chips[0] * n for n in chips], '--', label='proportional')
  left.set(
    xscale='log',
    yscale='log',
    xlabel=f'{found["chip"]} chips',
    ylabel='images per second',
    title=f'batch {found["batch_size"]}',
  )
  for row in rows:
    left.annotate(
      f'{row["efficiency"]:.0%}', (row['chips'], row['images_per_second']), textcoords='offset points', xytext=(4, -12)
    )
  left.legend()
  right.plot(chips, [row['hbm_bytes'] / 1e9 for row in rows], 'o-', label='memory of a chip')
  right.plot(chips, [row['collective_bytes'] / 1e9 for row in rows], 's-', label='collectives of a step')
  right.set(xscale='log', yscale='log', xlabel=f'{found["chip"]} chips', ylabel='GB')
  right.legend()
  for axes in (left, right):
    axes.set_xticks(chips, [str(n) for n in chips])
    axes.minorticks_off()
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  plt.close(figure)
