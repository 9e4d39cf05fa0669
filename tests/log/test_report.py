"""The page about one run: what it says of figures, time, faults, config and files."""

import base64
import json
import re

import cv2
import numpy as np
import pytest

from mim_jax import cli
from mim_jax.log import curves, page, record, report
from mim_jax.log.writer import Writer


def words(markup):
  """Text of a page, without markup and pictures."""
  return ' '.join(re.sub(r'<[^>]*>', ' ', re.sub(r'<style>.*?</style>', '', markup, flags=re.DOTALL)).split())


def test_command_writes_one_page_that_needs_nothing_else(tmp_path, make_run, capsys):
  folder = make_run(tmp_path / 'mae', panels=(20, 40, 60))
  assert cli.main(['report', str(folder)]) == 0
  assert 'report.html' in capsys.readouterr().out
  text = (folder / 'report.html').read_text()
  assert not re.search(r'<script|https?:|@import|url\(', text)
  assert all(source.startswith('data:image/') for source in re.findall(r'(?:src|srcset)="([^"]*)"', text))
  out = tmp_path / 'elsewhere' / 'page.html'
  assert cli.main(['report', str(folder), f'--out={out}']) == 0 and out.is_file()


def test_evaluation_stands_next_to_its_baselines(tmp_path, make_run):
  text = words(report.render(record.read(make_run(tmp_path / 'mae'))))
  assert 'trained untrained pixels knn, step 60 top1 50.0% 30.0% 25.0% layer3/mean/top1 40.0% – –' in text
  assert 'knn top1 50.0% untrained 30.0%, pixels 25.0%' in text


def test_time_is_weighted_by_the_steps_it_is_of(tmp_path, make_run):
  folder = make_run(tmp_path / 'mae')
  rows = [
    {'step': 10, 'time/step': 1.0, 'time/data': 0.0, 'time/images_per_s': 1.0},
    {'step': 100, 'time/step': 2.0, 'time/data': 1.0, 'time/images_per_s': 3.0},
    {'step': 100, 'eval/knn/top1': 0.5},
    {'step': 200, 'time/step': 4.0, 'time/data': 1.0, 'time/images_per_s': 2.0},
  ]
  (folder / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  text = words(report.render(record.read(folder)))
  assert 'All steps 9:50' in text and 'Step 2,000 ms median' in text and 'Images per second 2 median' in text
  assert f'waiting for data {190 / 590:.1%}' in text


def test_faults_are_told_by_when_their_counters_rose(tmp_path, make_run):
  folder = make_run(tmp_path / 'mae')
  assert report.faults(record.read(folder)) == []
  assert 'every logged step was finite' in words(report.render(record.read(folder)))
  with Writer(folder) as writer:
    writer.write(80, {'faults/bad_steps': 2, 'faults/corrupt': 1, 'loss': float('nan')})
    writer.write(100, {'faults/bad_steps': 2, 'faults/corrupt': 3, 'loss': 0.3})
  (folder / 'dump').mkdir()
  assert report.faults(record.read(folder)) == [
    ('61 to 80', '2 steps not finite, left out'),
    ('61 to 80', '1 example unreadable, replaced'),
    ('80', 'not finite: loss'),
    ('81 to 100', '2 examples unreadable, replaced'),
  ]
  text = words(report.render(record.read(folder)))
  assert f'mim-jax replay {folder / "dump"}' in text and 'every logged step' not in text


def test_config_shows_what_differs_from_the_defaults(tmp_path, make_run):
  changes = {'optim.lr_mult': (('head', 0.1),), 'evals.knn.k': 5}
  found = record.read(make_run(tmp_path / 'mae', changes=changes))
  text = words(report.render(found)).partition('this run default')[2].partition(' All ')[0]
  shown = {
    'duration': ("'60 steps'", "'100 epochs'"),
    'evals.knn.k': ('5', '20'),
    'evals.knn.test': ("':validation'", "':test'"),
    'method.size': ("'128/4/4'", "'B'"),
    'optim.base_lr': ('0.002', '0.00015'),
    'optim.lr_mult': ('((&#x27;head&#x27;, 0.1),)', '()'),
  }
  expected = [f'{key} {here} {default}' for key, (here, default) in shown.items()]
  assert text.replace('&#x27;', "'").split() == ' '.join(expected).replace('&#x27;', "'").split()


def test_config_of_another_version_is_shown_without_defaults(tmp_path, make_run):
  changes = {'method.name': 'gone', 'evals.knn.kind': 'gone'}
  text = words(report.render(record.read(make_run(tmp_path / 'mae', changes=changes))))
  assert 'method.mask_ratio 0.75 no default' in text and 'evals.knn.k 20 no default' in text


def test_checkpoints_are_weighed(tmp_path, make_run):
  folder = make_run(tmp_path / 'mae')
  assert 'None on disk' in report.render(record.read(folder))
  for step, size in ((9, 1000), (60, 2_500_000)):
    (folder / 'checkpoints' / str(step) / 'state').mkdir(parents=True)
    (folder / 'checkpoints' / str(step) / 'state' / 'a').write_bytes(bytes(size))
  (folder / 'checkpoints' / '70.partial').mkdir()
  assert 'step size files 9 1.0 kB 1 60 2.5 MB 1 Config' in words(report.render(record.read(folder)))


def test_pictures_are_the_first_the_last_and_some_between(tmp_path, make_run):
  folder = make_run(tmp_path / 'mae', panels=range(6, 61, 6))
  with Writer(folder) as writer:
    writer.picture(60, 'eval/segment', np.zeros((8, 8, 3), np.uint8))
  text = report.render(record.read(folder))
  assert re.findall(r'id="(\w+-\d+)"', text) == ['eval_segment-60', 'panel-6', 'panel-24', 'panel-42', 'panel-60']
  assert report.spread(list(range(100)), 4) == [0, 33, 66, 99]
  assert report.spread([1, 2], 4) == [1, 2]


def test_a_run_without_evaluation_environment_or_pictures(tmp_path, make_run):
  text = words(report.render(record.read(make_run(tmp_path / 'mae', evals=False, env=False))))
  assert 'has no env.json' in text and 'Evaluation' not in text and 'Pictures' not in text


def test_pictures_keep_their_pixels(rng):
  def shown(image):
    png = cv2.imencode('.png', image)[1].tobytes()
    kind, content = re.search(r'src="data:image/(\w+);base64,([^"]*)"', page.photo(png, 'a picture')).groups()
    content = base64.b64decode(content)
    return kind, len(content) / len(png), cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR).astype(int)

  simple = np.zeros((16, 16, 3), np.uint8)
  kind, _, kept = shown(simple)
  assert kind == 'png' and (kept == simple).all()
  photo = cv2.resize(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8), (256, 256), interpolation=cv2.INTER_CUBIC)
  kind, share, kept = shown(photo)
  assert kind == 'jpeg' and share < 0.5 and np.abs(kept - photo).mean() < 2
  with pytest.raises(ValueError, match='no picture'):
    page.photo(b'text', 'x')


def test_a_chart_shows_its_lines_in_both_themes():
  steps = np.arange(1000)
  values = np.exp(-steps / 100) + 1e-4
  values[500] = np.nan
  chart = curves.Chart('loss', (curves.Line('a', steps, values, 1),), levels=(('untrained', 0.5),))
  shapes = []
  for theme in (curves.LIGHT, curves.DARK):
    image = cv2.imdecode(np.frombuffer(curves.png(chart, theme), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    rgb = lambda color: np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    assert (image[0, 0] == rgb(theme.paper)).all()
    near = np.abs(image.astype(int) - rgb(theme.colors[1])).max(axis=2) < 8
    assert near.any(axis=0).mean() > 0.7  # the line crosses most columns
    shapes.append(image.shape)
  assert shapes[0] == shapes[1]


def test_binning_keeps_ends_means_and_extremes():
  steps, values = np.arange(1, 2401), np.zeros(2400)
  values[1200:1210] = (0, 0, 0, 0, 0, 0, 0, 0, 0, 10)
  values[2000:2010] = np.nan
  x, mean, low, high = curves._binned(steps.astype(float), values)
  assert len(x) == curves.BINS and x[0] == 1 and x[-1] == 2400
  assert np.nanmax(high) == 10 and np.nanmax(low) == 0 and np.nanmax(mean) == 1
  assert np.isnan(mean).sum() == 1


@pytest.mark.slow
def test_page_in_a_browser(tmp_path, make_run, browser):
  folder = make_run(tmp_path / 'mae', panels=(20, 40, 60), steps=60)
  with Writer(folder) as writer:
    writer.write(80, {'faults/bad_steps': 2, 'loss': float('nan'), 'eval/knn/top1': 0.6})
  target = folder / 'report.html'
  report.write(record.read(folder), target)
  papers = set()
  for width, dark in ((1200, False), (400, False), (400, True)):
    complaints, seen = browser.open(target, width, dark)
    assert not complaints and seen['images'] > 5
    assert not seen['broken'] and not seen['small'] and seen['wide'] <= 0
    papers.add(seen['paper'])
  assert len(papers) == 2
  browser.open(target)
  width = 'document.querySelector("#panel-60").getBoundingClientRect().width'
  before = browser.evaluate(width)
  browser.evaluate('document.querySelector("#panel-60 a").click()')
  assert browser.evaluate(width) > 2 * before  # the picture takes the row


@pytest.mark.slow
def test_the_browser_test_can_fail(tmp_path, browser):
  broken = tmp_path / 'broken.html'
  broken.write_text(
    '<!doctype html><link rel="icon" href="data:,"><body style="width: 900px"><p style="font-size: 9px">small</p>'
    '<img src="missing.png" alt="gone"><script>console.error("no"); undefined_name</script></body>'
  )
  complaints, seen = browser.open(broken, 400)
  assert len(complaints) >= 3 and seen['broken'] == ['gone'] and seen['wide'] > 0 and seen['small'] == ['small']
