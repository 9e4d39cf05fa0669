"""A headless Chromium for tests that open pages, and run folders that were never trained."""

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import time

import ml_collections
import numpy as np
import pytest

from mim_jax import config, method
from mim_jax.evals import suite
from mim_jax.log.writer import Writer

FLAGS = (
  '--headless',
  '--no-sandbox',
  '--disable-gpu',
  '--disable-quic',
  '--no-first-run',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync',
  '--disable-dev-shm-usage',
  '--hide-scrollbars',
  '--remote-debugging-pipe',
)
ENV = {
  'time': '2026-01-01T00:00:00+00:00',
  'command': 'python -m mim_jax.train --config=configs/mae.py:debug --workdir=runs/mae',
  'host': 'box',
  'system': 'Linux',
  'cpus': 2,
  'python': '3.11.7',
  'versions': {'mim-jax': '0.1.0', 'jax': '0.10.2'},
  'git': {'commit': 'a' * 40, 'dirty': False},
  'flags': {'XLA_FLAGS': '--xla_x'},
  'devices': {'platform': 'cpu', 'kind': 'cpu', 'count': 1, 'per_process': 1, 'driver': 'cpu'},
  'processes': 1,
}


class Browser:
  """Chromium over its debugging pipe: messages are JSON, each ended by a zero byte."""

  def __init__(self, program, folder):
    down, self._down = os.pipe()
    self._up, up = os.pipe()
    command = [program, *FLAGS, f'--user-data-dir={folder}', 'about:blank']
    script = f'exec "$0" "$@" 3<&{down} 4>&{up}'  # the browser reads from 3 and writes to 4
    self._process = subprocess.Popen(
      ['bash', '-c', script, *command], pass_fds=(down, up), stderr=subprocess.DEVNULL, start_new_session=True
    )
    os.close(down)
    os.close(up)
    self._count, self._rest, self._session = 0, b'', None
    self.events = []
    target = self.call('Target.createTarget', url='about:blank')['targetId']
    self._session = self.call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
    for domain in ('Page', 'Runtime', 'Log', 'Network'):
      self.call(f'{domain}.enable')

  def call(self, name, **params):
    self._count += 1
    message = {'id': self._count, 'method': name, 'params': params}
    if self._session:
      message['sessionId'] = self._session
    os.write(self._down, json.dumps(message).encode() + b'\0')
    answer = self._until(lambda found: found.get('id') == self._count)
    assert 'error' not in answer, answer
    return answer['result']

  def open(self, path, width=1200, dark=False):
    """Loads a file; returns (console errors and failed or outside requests, answers of the page)."""
    self.call('Emulation.setDeviceMetricsOverride', width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
    scheme = {'name': 'prefers-color-scheme', 'value': 'dark' if dark else 'light'}
    self.call('Emulation.setEmulatedMedia', features=[scheme])
    self.events.clear()
    self.call('Page.navigate', url=path.resolve().as_uri())
    if not any(event['method'] == 'Page.loadEventFired' for event in self.events):
      self._until(lambda found: found.get('method') == 'Page.loadEventFired')
    images = '[...document.images]'
    page = {
      'images': self.evaluate(f'{images}.length'),
      'broken': self.evaluate(f'{images}.filter(i => !i.complete || !i.naturalWidth).map(i => i.alt)'),
      'wide': self.evaluate('document.documentElement.scrollWidth') - width,
      'small': self.evaluate(
        '[...document.querySelectorAll("p, td, th, dd, dt, li, code")].filter(e => e.innerText.trim() && '
        'parseFloat(getComputedStyle(e).fontSize) < 12).map(e => e.innerText)'
      ),
      'ink': self.evaluate('getComputedStyle(document.body).color'),
      'paper': self.evaluate('getComputedStyle(document.body).backgroundColor'),
    }
    return [text for event in self.events if (text := _complaint(event))], page

  def evaluate(self, expression):
    return self.call('Runtime.evaluate', expression=expression, returnByValue=True)['result'].get('value')

  def screenshot(self, path):
    size = self.call('Page.getLayoutMetrics')['cssContentSize']
    clip = {'x': 0, 'y': 0, 'width': size['width'], 'height': size['height'], 'scale': 1}
    picture = self.call('Page.captureScreenshot', captureBeyondViewport=True, clip=clip)
    path.write_bytes(base64.b64decode(picture['data']))

  def close(self):
    os.killpg(self._process.pid, signal.SIGKILL)
    self._process.wait()
    os.close(self._down)
    os.close(self._up)

  def _until(self, wanted, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
      while b'\0' not in self._rest:
        ready, _, _ = select.select([self._up], [], [], max(0, end - time.monotonic()))
        data = os.read(self._up, 1 << 20) if ready else b''
        assert data, 'the browser is gone or silent'
        self._rest += data
      line, _, self._rest = self._rest.partition(b'\0')
      found = json.loads(line)
      if 'method' in found:
        self.events.append(found)
      if wanted(found):
        return found
    raise AssertionError(f'no answer of the browser in {seconds} s')


def _complaint(event):
  """What an event of the browser says against the page, '' for nothing."""
  params = event.get('params', {})
  match event['method']:
    case 'Runtime.exceptionThrown':
      return str(params['exceptionDetails'])
    case 'Runtime.consoleAPICalled' | 'Log.entryAdded':
      return str(params)
    case 'Network.loadingFailed':
      return str(params)
    case 'Network.requestWillBeSent':
      url = params['request']['url']
      return '' if url.startswith(('file:', 'data:', 'about:')) else f'request for {url}'
  return ''


@pytest.fixture
def browser(tmp_path):
  program = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
  if program is None:
    pytest.skip('no Chromium on this machine: no chromium, chromium-browser, google-chrome or chrome on PATH')
  opened = Browser(program, tmp_path / 'profile')
  yield opened
  opened.close()


@pytest.fixture
def make_run(rng):
  """Writes a run's folder as the trainer would: config, environment, losses, an evaluation, panels."""

  def make(folder, seed=0, steps=60, every=20, offset=0.0, evals=True, panels=(), env=True, changes=None):
    cfg = config.base()
    cfg.method = method.options('mae', size='128/4/4')
    cfg.evals = {'knn': suite.settings('knn', {'test': ':validation'})}
    cfg.seed, cfg.duration, cfg.optim.base_lr = seed, f'{steps} steps', 2e-3
    for key, value in (changes or {}).items():
      with cfg.ignore_type():
        cfg.update_from_flattened_dict({key: value})
    folder.mkdir(parents=True)
    config.save(ml_collections.ConfigDict(cfg), folder / 'config.json')
    if env:
      (folder / 'env.json').write_text(json.dumps(ENV))
    with Writer(folder) as writer:
      for step in range(every, steps + 1, every):
        loss = 0.4 + 0.6 * np.exp(-3 * step / steps) + 0.01 * seed + offset
        writer.write(
          step,
          {
            'faults/bad_steps': 0,
            'faults/corrupt': 0,
            'loss': loss,
            'loss/pixel': loss,
            'lr': 2e-3 * (1 - step / (steps + 1)),
            'norm/grad': 0.3,
            'time/step': 0.2,
            'time/data': 0.05,
            'time/images_per_s': 640.0,
          },
        )
      if evals:
        writer.write(steps, {'eval/knn/top1': 0.5 + 0.01 * seed + offset, 'eval/knn/untrained/top1': 0.3})
        writer.write(steps, {'eval/knn/pixels/top1': 0.25, 'eval/knn/layer3/mean/top1': 0.4})
      for step in panels:
        writer.picture(step, 'panel', rng.integers(0, 256, (80, 40, 3), dtype=np.uint8))
    return folder

  return make
