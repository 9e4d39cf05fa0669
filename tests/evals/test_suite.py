import eval_cases as cases
import pytest

from mim_jax.errors import ConfigError, MissingData
from mim_jax.evals import suite


def build(evals, source='tfds:cifar10:train'):
  return suite.build(evals, source, 'decode | normalize', 64)


@pytest.mark.parametrize(
  ('evals', 'message'),
  [
    ({'knnn': {}}, "'knnn' is unknown; did you mean 'knn'"),
    ({'far': {'kind': 'liner'}}, "'liner' is unknown; did you mean 'linear'"),
    ({'knn': {'temprature': 0.1}}, "evals.knn has no option 'temprature'; did you mean 'temperature'"),
    ({'knn': {'k': 'many'}}, r'evals.knn.k is .many. \(str\); expected int such as 20'),
    ({'knn': {'k': 2.5}}, 'evals.knn.k is 2.5'),
    ({'linear': {'augment': 1}}, 'evals.linear.augment is 1'),
    ({'knn': {'baselines': ('random',)}}, 'random.*known: untrained, pixels'),
    ({'knn': {'every': '3 fortnights'}}, 'evals.knn.every'),
  ],
)
def test_mistakes_in_the_config_are_named(evals, message):
  with pytest.raises(ConfigError, match=message):
    build(evals)


def test_settings_are_complete_and_keep_what_was_given():
  cfg = suite.settings('fewshot', {'shots': 3, 'l2': 10, 'fields': ['image', 'text']})
  assert (cfg.shots, cfg.l2, cfg.fields, cfg.seeds) == ((3,), 10.0, ('image', 'text'), 5)
  assert suite.settings('knn', {'baselines': ()}).baselines == ()
  whole = suite.config(knn={}, far={'kind': 'knn', 'k': 3})
  assert (whole.knn.k, whole.far.k, whole.far.kind) == (20, 3, 'knn')
  parts = {'knn': {}, 'far': {'kind': 'knn', 'k': 3}}
  complete, given = ({e.name: e.cfg.to_dict() for e in build(evals).evaluators} for evals in (whole, parts))
  assert complete == given


@pytest.mark.parametrize(
  ('own', 'test', 'found'),
  [
    ('tfds:cifar10', ':test', 'tfds:cifar10:test'),
    ('tfds:cifar10:train[:90%]', ':test', 'tfds:cifar10:test'),
    ('tfds:imagenet2012:train', ':validation[:1000]', 'tfds:imagenet2012:validation[:1000]'),
    ('synthetic:shapes:train', ':test', 'synthetic:shapes:test'),
    ('folder:/x', 'folder:/y', 'folder:/y'),
    ('folder:/x', ':train', 'folder:/x'),
  ],
)
def test_sources_of_evaluators(own, test, found):
  assert build({'knn': {'test': test}}, own).evaluators[0].cfg.test == found


@pytest.mark.parametrize('own', ['folder:/x', 'arrays:/x.npz', 'tfds:a:train, tfds:b:train'])
def test_a_source_without_splits_asks_for_one(own):
  with pytest.raises(ConfigError, match='evals.knn.test=folder:PATH'):
    build({'knn': {'train': 'folder:/y'}}, own)


def test_settings_that_refer_to_the_run():
  evaluator = build({'knn': {}, 'linear': {'transforms': 'decode', 'batch_size': 8, 'every': 'never'}}).evaluators
  assert (evaluator[0].cfg.transforms, evaluator[0].cfg.batch_size) == ('decode | normalize', 64)
  assert (evaluator[1].cfg.transforms, evaluator[1].cfg.batch_size) == ('decode', 8)
  assert [e.sources() for e in evaluator] == [['tfds:cifar10:train', 'tfds:cifar10:test'], []]


def test_due():
  evals = build(
    {
      'knn': {'every': '2 epochs'},
      'linear': {'every': 'end'},
      'fewshot': {'every': 'never'},
      'tenth': {'kind': 'knn', 'every': '10%'},
    }
  )
  due = {step: [e.name for e in evals.due(step, 95, 10, 64)] for step in (0, 9, 10, 20, 40, 80, 95, 96)}
  assert due == {
    0: [],
    9: [],
    10: ['tenth'],
    20: ['knn', 'tenth'],
    40: ['knn', 'tenth'],
    80: ['knn', 'tenth'],
    **{s: ['knn', 'linear', 'tenth'] for s in (95, 96)},
  }


def test_selection_by_name():
  evals = build({'knn': {}, 'linear': {}})
  assert [e.name for e in evals.select(['linear', 'knn'])] == ['linear', 'knn']
  with pytest.raises(ConfigError, match="'linaer'.*did you mean 'linear'"):
    evals.select(['linaer'])


def test_run_with_baselines():
  data = cases.Data(cases.mesh_of(1), {'a': cases.images(101, 0), 'b': cases.images(53, 1)})
  sources = {'train': 'a', 'test': 'b'}
  evals = suite.build({'knn': sources, 'fewshot': {**sources, 'shots': 3, 'baselines': ('pixels',)}}, '', '', 16)
  made, ctx = [], data.context()

  def untrained():
    made.append(1)
    return cases.encoder('untrained', 1)

  results = evals.run(evals.evaluators, cases.encoder(), untrained, ctx)
  knn, fewshot = {'knn/top1', 'knn/top5', 'knn/class_mean'}, {'fewshot/3shot/top1', 'fewshot/3shot/spread'}
  assert {name: set(figures) for name, figures in results.items()} == {
    'trained': knn | fewshot,
    'untrained': knn,
    'pixels': knn | fewshot,
  }
  assert len(data.opened) == 6  # two sources per encoder: evaluators share the features
  assert ctx.memo == {} and len(data.lines) == 5

  again = evals.run(evals.evaluators, cases.encoder(seed=5), untrained, ctx)
  assert made == [1] and len(data.opened) == 8  # baselines are kept
  assert again['pixels'] == results['pixels'] and again['trained'] != results['trained']


def test_after_an_interruption_everything_is_computed_again():
  data = cases.Data(cases.mesh_of(1), {'a': cases.images(101, 0), 'b': cases.images(53, 1)})
  given = {'train': 'a', 'test': 'b', 'baselines': ()}
  evals = suite.build({'knn': given, 'linear': {**given, 'epochs': 20}}, '', '', 16)
  answers = iter([False] * 20 + [True])  # knn is done by then, linear is not
  ctx = data.context(stop=lambda: next(answers))
  with pytest.raises(suite.Interrupted):
    evals.run(evals.evaluators, cases.encoder(), None, ctx)
  assert len(data.lines) == 1 and 'knn' in data.lines[0]
  later = evals.run(evals.evaluators, cases.encoder(seed=5), None, data.context())
  assert later == suite.Suite(evals.evaluators).run(evals.evaluators, cases.encoder(seed=5), None, data.context())


def test_names_for_the_log_and_table():
  results = {'trained': {'knn/top1': 0.5, 'fewshot/5shot/top1': 0.25}, 'pixels': {'knn/top1': 0.125}}
  assert suite.flat(results) == {'eval/knn/top1': 0.5, 'eval/fewshot/5shot/top1': 0.25, 'eval/knn/pixels/top1': 0.125}
  assert suite.table(results).splitlines() == [
    '                    trained  pixels',
    'knn/top1             0.5000  0.1250',
    'fewshot/5shot/top1   0.2500       -',
  ]


def test_figures_are_the_same_on_one_and_eight_devices():
  one, eight = (cases.all_figures(cases.mesh_of(count)) for count in (1, 8))
  assert one == eight
  assert len(one) > 40 and 0.3 < one['eval/knn/top1'] < 1


def test_figures_of_trainings_are_the_same_on_one_and_eight_devices():
  one, eight = (cases.trained_figures(cases.mesh_of(count)) for count in (1, 8))
  cases.assert_same_figures(one, eight)
  assert 0.2 < one['eval/finetune/top1'] < 1 and 0.5 < one['eval/multi/auroc'] < 1


class Feeds:
  """Remembers what is opened; the set 'absent' is missing and has the shape of nothing."""

  def __init__(self):
    self.opened = []

  def source(self, spec):
    if 'absent' in spec:
      raise MissingData(f'{spec} is not prepared; prepare it: python -m mim_jax.data.worlds {spec}')
    return spec

  def pipeline(self, source, transforms, batch_size, fields, seed):
    self.opened.append((source, transforms, batch_size, fields))
    return self

  def spec(self):
    return {}


def test_missing_data_is_found_ahead_and_says_how_to_get_it_and_how_to_do_without():
  evals = build({'knn': {}, 'segment': {'train': 'folder:absent', 'classes': 3}})
  with pytest.raises(MissingData, match='python -m mim_jax.data.worlds(.|\n)*--config.evals.segment.every=never'):
    evals.check(Feeds(), frozenset())
  off = build({'knn': {}, 'segment': {'train': 'folder:absent', 'every': 'never'}})
  off.check(Feeds(), frozenset())
  with pytest.raises(MissingData):
    off.check(Feeds(), frozenset(), off.evaluators)


def test_what_evaluators_read_is_looked_at_ahead():
  feeds = Feeds()
  build(
    {'knn': {}, 'finetune': {'train_transforms': 'flip', 'train_batch': 32, 'accumulate': 2, 'drop_path': 0.0}}
  ).check(feeds, frozenset())
  assert feeds.opened == [
    ('tfds:cifar10:train', 'decode | normalize', 64, ('image', 'label')),
    ('tfds:cifar10:test', 'decode | normalize', 64, ('image', 'label')),
    ('tfds:cifar10:train', 'flip', 16, ('image', 'label')),
    ('tfds:cifar10:test', 'decode | normalize', 64, ('image', 'label')),
  ]


@pytest.mark.parametrize(
  ('evals', 'message'),
  [
    ({'finetune': {}}, 'takes no `drop`'),
    ({'finetune': {'drop_path': 0.0, 'epochs': 3, 'warmup_epochs': 3}}, 'epochs must be more'),
    ({'finetune': {'drop_path': 0.0, 'accumulate': 3}}, 'in accumulate=3 equal parts'),
    ({'finetune': {'drop_path': 0.0, 'task': 'many'}}, "task is 'many'"),
    ({'finetune': {'drop_path': 0.0, 'task': 'regression'}}, 'set them to 0'),
    ({'segment': {'taps': (1,)}}, 'gives no `layers`'),
    ({'segment': {'decoder': 'upernet'}}, "decoder is 'upernet'; expected one of linear, conv"),
  ],
)
def test_settings_that_cannot_work_are_found_ahead(evals, message):
  with pytest.raises(ConfigError, match=message):
    build(evals).check(Feeds(), frozenset())


def test_pixels_are_no_baseline_of_a_training():
  with pytest.raises(ConfigError, match='pixels.*known: untrained'):
    build({'finetune': {'baselines': ('pixels',)}})
