"""A plan as text for people."""

from mim_jax.plan.jobs import size

_TITLES = {
  'params': 'parameters',
  'optimizer': 'optimizer',
  'state': 'carried state, EMA',
  'frozen': 'frozen networks',
  'batch': 'batch',
  'padding': 'padding',
  'temporaries': 'activations, temporaries',
  'program': 'program',
}


def text(plan: dict) -> str:
  """Several lines: does it fit, where the memory goes, how long a step and the run take, and what that time goes to."""
  lines = [
    f'{plan["topology"]}: {plan["devices"]} devices, '
    f'mesh {" x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())}',
    f'batch {plan["batch_size"]}: {plan["images_per_device"]:g} images per device'
    + (f' in {plan["accumulate"]} parts' if plan['accumulate'] > 1 else '')
    + f'; remat {plan["remat"]}, scan {plan["scan"]}; compiled in {plan["compile_seconds"]:.0f} s',
    '',
    *_memory(plan),
    '',
    *_model(plan),
  ]
  if plan['fits_with']:
    lines += ['', f'what follows is of the step with {" ".join(plan["fits_with"])}']
  if plan['contributors']:
    lines += ['', *_time(plan), '', *_collectives(plan), '', *_contributors(plan)]
  return '\n'.join(lines + [f'note: {note}' for note in plan['notes']])


def _memory(plan):
  limit = plan['hbm_limit_bytes']
  rows = [f'  {_TITLES[name]:<26}{size(count):>12}' for name, count in plan['hbm'].items() if count]
  head = f'memory per device {size(plan["hbm_bytes"])}' + (f' of {size(limit)}' if limit else '')
  if plan['fits']:
    return [f'{head}: fits', *rows]
  over = size(plan['hbm_bytes'] - limit)
  if plan['fits_with']:
    advice = f'it fits with {" ".join(plan["fits_with"])}: {size(plan["fits_with_hbm_bytes"])}'
  else:
    advice = (
      'more devices, --config.mesh.fsdp=-1 --config.mesh.data=1, --config.method.remat=full or a smaller batch '
      'can make it fit'
    )
  return [f'{head}: DOES NOT FIT by {over}; {advice}', *rows]


def _model(plan):
  frozen = f' and {plan["frozen_parameters"]:,} frozen' if plan['frozen_parameters'] else ''
  return [
    f'parameters        {plan["parameters"]:,}{frozen}',
    f'model FLOPs       {plan["model_flops_per_image"] / 1e9:.2f} GFLOP per image ({plan["model_flops_formula"]})',
    *_kept(plan),
    f'run               {plan["steps"]:,} steps, {plan["steps_per_epoch"]:,} an epoch',
  ]


def _kept(plan):
  kept = plan['kept_bytes_per_image']
  if kept is None:
    return []
  once = plan['images_per_device_at_once']
  return [
    f'activations       {size(kept)} per image kept for the gradient, {size(kept * once)} for the {once:g} that a device has at once'
  ]


def _time(plan):
  images = plan['batch_size'] / plan['devices']
  lines = [
    f'compiled FLOPs    {plan["hlo_flops"] / 1e9:,.0f} GFLOP per device and step '
    f'({plan["hlo_flops"] / images / 1e9:.2f} per image)',
    f'memory traffic    {plan["hlo_memory_bytes"] / 1e9:,.1f} GB per device and step',
  ]
  if plan['estimated_step_seconds'] is None:
    return [*lines, 'no time is estimated for this device: it has no published peaks']
  roofline = plan['roofline_seconds']
  kernel, other = plan['estimated_kernel_cycles'], plan['estimated_other_cycles']
  return [
    *lines,
    f'estimated step    {1e3 * plan["estimated_step_seconds"]:,.1f} ms by {plan["estimated_by"]}: '
    f'{plan["estimated_cycles"] / 1e6:,.1f} M cycles'
    + (f' ({kernel / 1e6:,.1f} M of them in Pallas kernels)' if kernel else '')
    + (f', {other / 1e6:,.1f} M more that the compiler does not count' if other else '')
    + f', {1e3 * plan["waiting_seconds"]:,.1f} ms of waiting for collectives',
    f'roofline          FLOPs {1e3 * roofline["flops"]:,.1f} ms, memory {1e3 * roofline["memory"]:,.1f} ms, '
    f'collectives {1e3 * roofline["collectives"]:,.1f} ms; operation by operation {1e3 * roofline["each_operation"]:,.1f} ms',
    f'utilisation       {plan["estimated_utilisation"]:.1%} of peak by model FLOPs',
    f'throughput        {plan["images_per_second"]:,.0f} images/s',
    f'whole run         {plan["hours"]:,.1f} hours, {plan["device_hours"]:,.0f} device-hours',
  ]


def _collectives(plan):
  if not plan['collectives']:
    return ['no collectives']
  lines = ['collectives per step         axis      count        bytes    seconds']
  for c in plan['collectives']:
    name = c['kind'] + (' (hidden)' if c['beside_computation'] else '')
    seconds = '' if c['seconds'] is None else f'{1e3 * c["seconds"]:8.2f} ms'
    lines.append(f'  {name:<27}{c["axis"]:<8}{c["count"]:>7}{c["bytes"] / 1e6:>10,.1f} MB {seconds}')
  return lines


def _contributors(plan):
  unit = 'M cycles' if plan['contributors_by'] == 'cycles' else 'MB moved'
  lines = [f'largest contributors   share  {unit}']
  for c in plan['contributors']:
    what = ' '.join(filter(None, (c['name'], c['pass'], c['operation'])))
    lines.append(f'  {c["share"]:>26.1%}{c["cost"] / 1e6:>10,.1f}  {what}{"  " + c["source"] if c["source"] else ""}')
  return lines
