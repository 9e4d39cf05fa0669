"""Runs next to each other: groups, figures, verdicts of references, and the page about them."""

import json
import re

import cv2
import numpy as np
import pytest

from mim_jax import cli
from mim_jax.errors import UserError
from mim_jax.evals import suite
from mim_jax.log import compare, compare_page, curves, record, reference
from mim_jax.log.writer import Writer


@pytest.fixture
def runs(tmp_path, make_run):
  """Two groups: three seeds of one config, two of another."""
  plain = [make_run(tmp_path / f'mae,seed={seed}', seed=seed) for seed in (0, 1, 2)]
  masked = [
    make_run(tmp_path / f'masked,seed={seed}', seed=seed, offset=-0.1, changes={'method.mask_ratio': 0.5})
    for seed in (1, 0)
  ]
  return [*plain, *masked]


def read(paths):
  return [record.read(path) for path in paths]


def save(path, **content):
  path.write_text(json.dumps({'source': 'by hand', **content}))
  return path


def test_runs_that_differ_in_their_seed_are_one_group(runs):
  groups = compare.group(read(runs))
  assert [group.label for group in groups] == ['mae', 'masked']
  assert groups[1].names == ('masked,seed=0', 'masked,seed=1')
  assert groups[0].seeds == '0, 1, 2'


@pytest.mark.parametrize(
  ('names', 'label'),
  [
    (['mae,seed=10', 'mae,seed=11'], 'mae'),
    (['mae_1', 'mae_12'], 'mae'),
    (['mask_ratio=0.5,seed=0', 'mask_ratio=0.5,seed=1'], 'mask_ratio=0.5'),
    (['lr=0.1', 'lr=0.1_again'], 'lr=0.1'),
    (['loss_s1', 'loss_s2'], 'loss'),
    (['a/mae', 'b/mae'], 'a/mae (+1)'),
    (['gloss'], 'gloss'),
    (['lr=0.1,seed=3'], 'lr=0.1'),
    (['seed=3'], 'seed=3'),
  ],
)
def test_label_is_what_the_folders_have_in_common(tmp_path, make_run, names, label):
  made = [make_run(tmp_path / 'all' / name, seed=i) for i, name in enumerate(names)]
  other = make_run(tmp_path / 'all' / 'other', changes={'ema': 0.9})
  assert [group.label for group in compare.group(read([*made, other]))] == [label, 'other']


def test_equal_labels_are_told_apart(tmp_path, make_run):
  changed = [make_run(tmp_path / f'mae_{i}', seed=i, changes={'ema': 0.9}) for i in (0, 1)]
  same = [make_run(tmp_path / f'mae_{i}', seed=i) for i in (2, 3)]
  assert [group.label for group in compare.group(read([*changed, *same]))] == ['mae_0 (+1)', 'mae_2 (+1)']


def test_a_folder_twice_is_refused(runs):
  with pytest.raises(UserError, match='given 2 times'):
    compare.group(read([runs[0], runs[1], runs[0]]))


def test_figures_are_mean_and_deviation_at_a_step(runs):
  groups = compare.group(read(runs))
  figure = groups[0].figure('eval/knn/top1')
  assert figure.values == pytest.approx((0.50, 0.51, 0.52)) and figure.steps == (60, 60, 60)
  assert str(figure) == '0.5100 ± 0.0100'
  single = compare.group(read(runs[:1]))[0].figure('eval/knn/top1')
  assert single.spread is None and str(single) == '0.5000'
  early = groups[0].figure('loss/pixel', step=45)
  assert early.steps == (40, 40, 40)
  assert early.mean == pytest.approx(0.4 + 0.6 * np.exp(-2) + 0.01)
  assert groups[0].figure('eval/knn/top1', step=40) is None
  assert groups[0].figure('loss/pixel', step=61) is None  # a run that ends before tells nothing of that step


def test_a_later_measurement_at_the_same_step_counts(tmp_path, make_run):
  folder = make_run(tmp_path / 'run')
  with Writer(folder) as writer:
    writer.write(60, {'eval/knn/top1': 0.9})
    writer.write(20, {'eval/knn/top1': 0.1})
  line = record.read(folder).lines['eval/knn/top1']
  assert list(line.items()) == [(20, 0.1), (60, 0.9)]


def test_default_metrics_leave_out_repetitions_baselines_and_single_kinds_of_features(runs):
  assert compare.compare(read(runs)).metrics == ('loss/pixel', 'eval/knn/top1')
  assert compare.compare(read(runs), pattern='untrained|^lr$').metrics == ('lr', 'eval/knn/untrained/top1')
  with pytest.raises(UserError, match='fits --metrics=nothing'):
    compare.compare(read(runs), pattern='nothing')
  with pytest.raises(UserError, match='no regular expression'):
    compare.compare(read(runs), pattern='(')


def test_names_of_baselines_are_those_of_the_evaluators():
  assert record.BASELINES == suite.BASELINES
  assert record.evaluation('eval/fewshot/5shot/top1') == ('fewshot', '5shot/top1', 'trained')
  assert record.evaluation('eval/knn/pixels/top1') == ('knn', 'top1', 'pixels')
  assert record.evaluation('loss/pixel') is None
  assert record.headlines(['eval/fewshot/5shot/top1', 'eval/knn/cls/top1']) == ['eval/fewshot/5shot/top1']


def test_differences_of_configs(runs):
  groups = compare.group(read(runs))
  found = compare.differences([(group.label, group.config) for group in groups])
  assert found == {'method.mask_ratio': [('0.75', ['mae']), ('0.5', ['masked'])]}
  assert compare.differences([('a', {'x': (1,), 'y': 1}), ('b', {'x': [1]})]) == {
    'y': [('1', ['a']), ('not set', ['b'])]
  }


def test_table_has_a_row_per_group_and_fits_the_width(runs):
  comparison = compare.compare(read(runs), pattern='loss/pixel|knn/top1|norm|time')
  wide, narrow = compare.table(comparison, 500).splitlines(), compare.table(comparison, 60).splitlines()
  assert len(wide) == 3 and re.search(r'mae +3 +60 .*0\.5100 ± 0\.0100', wide[1])
  assert len(narrow) > 3 and max(map(len, narrow)) <= 60
  assert {word for line in narrow for word in line.split()} >= set(wide[2].split())


def test_table_says_how_many_runs_a_figure_is_of(tmp_path, make_run):
  folders = [make_run(tmp_path / f'm{seed}', seed=seed, evals=seed < 2) for seed in range(3)]
  line = compare.table(compare.compare(read(folders))).splitlines()[1]
  assert '0.5050 ± 0.0071 (of 2)' in line


@pytest.mark.parametrize(
  ('metrics', 'step', 'states'),
  [
    ({'loss/pixel': [[20, 0.0, 1.0], [60, 0.42, 0.45]]}, None, ['inside'] * 3),
    ({'loss/pixel': [[20, 0.0, 1.0], [60, 0.42, 0.445]]}, None, ['inside', 'inside', 'outside']),
    ({'loss/pixel': [[20, 0.0, 1.0], [60, 0.0, 0.1]]}, 40, ['inside'] * 3),  # 0.48 to 0.50 against 0.55, in the middle
    ({'loss/pixel': [[20, 0.0, 1.0], [60, 0.0, 0.1]]}, 60, ['outside'] * 3),
    ({'loss/pixel': [[20, 0.0, 0.1], [40, 0.0, 0.1]]}, 60, ['no band'] * 3),
    ({'loss/pixel': [[20, 0.0, 1.0], [40, 0.0, 1.0]]}, None, ['inside'] * 3),  # at the last step that has a band
    ({'eval/knn/top1': {'mean': 0.51, 'spread': 0.011}}, None, ['inside'] * 3),
    ({'eval/knn/top1': {'mean': 0.51, 'spread': 0.005}}, None, ['outside', 'inside', 'outside']),
    ({'eval/knn/top1': {'mean': 0.51, 'spread': 0.011}}, 60, ['no band'] * 3),  # it is of the end of a run
    ({'eval/knn/top1': {'mean': 0.51, 'spread': 0.011, 'step': 60}}, 60, ['inside'] * 3),
    ({'eval/knn/top1': {'mean': 0.51, 'spread': 0.011, 'step': 60}}, 40, ['no value'] * 3),
    ({'eval/linear/top1': {'mean': 0.51, 'spread': 0.011}}, None, ['no value'] * 3),
  ],
)
def test_verdicts(tmp_path, runs, metrics, step, states):
  known = reference.read(save(tmp_path / 'reference.json', metrics=metrics))
  comparison = compare.compare(read(runs[:3]), [known], step=step)
  ((_, _, _, found),) = comparison.verdicts()
  assert [verdict.state for verdict in found] == states
  assert comparison.good == (set(states) == {'inside'})


def test_a_value_that_is_not_finite_is_outside(tmp_path, make_run):
  folder = make_run(tmp_path / 'run')
  with Writer(folder) as writer:
    writer.write(60, {'loss/pixel': float('nan')})
  known = reference.read(save(tmp_path / 'reference.json', metrics={'loss/pixel': [[60, -1e9, 1e9]]}))
  assert known.judge(record.read(folder), 'loss/pixel').state == 'outside'


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('{', 'cannot be read as a reference'),
    ('[]', 'found an empty list'),
    ('{"metrics": {"a": [[1, 0, 1]]}}', "lacks 'source'"),
    ('{"source": " ", "metrics": {"a": [[1, 0, 1]]}}', '"source" is " "'),
    ('{"source": "x", "metrics": {}}', '"metrics" is {}'),
    ('{"source": "x", "metric": {}}', "did you mean 'metrics'"),
    ('{"source": "x", "metrics": {"a": 3}}', "metric 'a': found a number"),
    ('{"source": "x", "metrics": {"a": []}}', "metric 'a': found an empty list"),
    ('{"source": "x", "metrics": {"a": [[1, 2]]}}', r'point 0: found \[1, 2\]; expected \[step, low, high\]'),
    ('{"source": "x", "metrics": {"a": [[1, 2, 1]]}}', 'low 2.0 is above high 1.0'),
    ('{"source": "x", "metrics": {"a": [[2, 0, 1], [2, 0, 1]]}}', 'point 1: step 2 comes after step 2'),
    ('{"source": "x", "metrics": {"a": [[1.5, 0, 1]]}}', 'step 1.5 is none'),
    ('{"source": "x", "metrics": {"a": [[1, 0, "1"]]}}', 'found "1"; expected a finite number'),
    ('{"source": "x", "metrics": {"a": [[1, 0, NaN]]}}', 'found NaN; expected a finite number'),
    ('{"source": "x", "metrics": {"a": {"mean": 1}}}', "lacks 'spread'"),
    ('{"source": "x", "metrics": {"a": {"mean": 1, "spread": -1}}}', 'half-width of the band'),
    ('{"source": "x", "metrics": {"a": {"mean": 1, "spread": 1, "std": 1}}}', "no place for the key 'std'"),
  ],
)
def test_a_malformed_reference_says_what_is_wrong(tmp_path, text, words):
  path = tmp_path / 'reference.json'
  path.write_text(text)
  with pytest.raises(UserError, match=words) as error:
    reference.read(path)
  assert str(path) in str(error.value)


def test_a_reference_made_from_runs_holds_another_seed(tmp_path, rng):
  """With the interval for one more value, 99 of 100 new runs are inside, however few runs it was made from."""
  n, tries, inside = 4, 400, 0
  fake = lambda seed, value: record.Record(tmp_path, {'seed': seed}, {}, [{'step': 5, 'loss': value}])
  for _ in range(tries):
    made = reference.of([fake(seed, value) for seed, value in enumerate(rng.normal(3, 0.1, n))], ['loss'], 'x')
    ((_, low, high),) = made['metrics']['loss']
    inside += low <= rng.normal(3, 0.1) <= high
  assert inside / tries >= 0.975


def test_save_reference_round_trip(tmp_path, runs, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  three = list(map(str, runs[:3]))
  assert cli.main(['compare', *three, '--save_reference=made.json']) == 0
  made = reference.read(tmp_path / 'made.json')
  assert set(made.bands) == {'loss/pixel', 'eval/knn/top1'} and made.bands['loss/pixel'].steps == (20, 40, 60)
  assert 'seeds 0, 1, 2' in made.source and made.command
  assert cli.main(['compare', *three, 'made.json']) == 0
  assert 'inside    loss/pixel, mae: 0.4399 ± 0.0100 at step 60' in capsys.readouterr().out
  for paths, words in ((map(str, runs), 'one group of runs; found 2'), (three[:2], 'needs 3 runs')):
    assert cli.main(['compare', *paths, '--save_reference=other.json']) == 2
    assert words in capsys.readouterr().err


def test_long_curves_give_a_short_reference(tmp_path, make_run):
  folders = [make_run(tmp_path / f'm{seed}', seed=seed, steps=3000, every=3) for seed in range(3)]
  points = reference.of(read(folders), ['loss/pixel'], 'm')['metrics']['loss/pixel']
  assert len(points) == reference.POINTS and points[0][0] == 3 and points[-1][0] == 3000


def test_command_writes_page_and_curves(tmp_path, runs, capsys):
  known = save(tmp_path / 'known.json', metrics={'loss/pixel': [[20, 0, 1], [60, 0.42, 0.47]]})
  out = tmp_path / 'out'
  assert cli.main(['compare', *map(str, runs), str(known), f'--out={out}']) == 1
  printed = capsys.readouterr().out
  assert 'reference known: by hand' in printed and 'outside   loss/pixel, masked' in printed
  image = cv2.imread(str(out / 'curves.png'))[..., ::-1].astype(int)
  for color in curves.LIGHT.colors[:2]:  # a line per group
    rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    assert (np.abs(image - rgb).max(axis=2) < 8).any(axis=0).mean() > 0.5
  text = (out / 'index.html').read_text()
  assert '1 of 2 inside the reference' in text and 'method.mask_ratio' in text and '0.5100 ± 0.0100' in text
  assert not re.search(r'<script|https?:|@import|url\(', text)


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    (['nowhere'], 'nowhere is not the folder of a run'),
    (['nowhere.json'], 'cannot be read as a reference'),
    (['mae', '--step=100'], 'no run has reached step 100; the furthest is at step 60'),
    (['known.json'], 'found references only'),
    (['empty'], 'has no figures yet'),
  ],
)
def test_command_refuses(tmp_path, make_run, monkeypatch, capsys, arguments, words):
  monkeypatch.chdir(tmp_path)
  make_run(tmp_path / 'mae')
  (make_run(tmp_path / 'empty') / 'metrics.jsonl').write_text('')
  save(tmp_path / 'known.json', metrics={'loss/pixel': [[20, 0, 1]]})
  assert cli.main(['compare', *arguments]) == 2
  assert words in capsys.readouterr().err
  assert not (tmp_path / 'comparison').exists()


def test_names_are_escaped(tmp_path, make_run):
  folder = make_run(tmp_path / '<b>&"run')
  compare_page.write(compare.compare(read([folder])), tmp_path / 'out')
  text = (tmp_path / 'out' / 'index.html').read_text()
  assert '&lt;b&gt;&amp;&quot;run' in text and '<b>' not in text


@pytest.mark.slow
def test_page_in_a_browser(tmp_path, runs, make_run, browser):
  long = make_run(tmp_path / 'a_name_without_any_place_to_break_it_that_goes_on_and_on_and_on', steps=3000, every=3)
  known = {'loss/pixel': [[20, 0, 1], [60, 0.43, 0.47]], 'eval/knn/top1': {'mean': 0.5, 'spread': 0.1}}
  known = reference.read(save(tmp_path / 'known.json', metrics=known))
  page, _ = compare_page.write(compare.compare(read([*runs, long]), [known]), tmp_path / 'out')
  for width, dark in ((1200, False), (400, False), (400, True)):
    complaints, seen = browser.open(page, width, dark)
    assert not complaints and seen['images'] > 0
    assert not seen['broken'] and not seen['small'] and seen['wide'] <= 0
