import eval_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.errors import ConfigError
from mim_jax.evals import features, suite, tables

COLUMNS, CLASSES = 6, 3


def rows(count, seed):
  """A table whose columns 0 and 1 both tell the class, and an image that tells nothing."""
  rng = np.random.default_rng(seed)
  label = rng.integers(CLASSES, size=count)
  table = rng.normal(size=(count, COLUMNS))
  table[:, :2] = label[:, None] + 0.05 * rng.normal(size=(count, 2))
  return {
    'image': rng.normal(size=(count, 2, 2, 1)).astype(np.float32),
    'table': table.astype(np.float32),
    'missing': np.zeros((count, COLUMNS), bool),
    'row': np.arange(count, dtype=np.int32),
    'label': label.astype(np.int32),
  }


class Source:
  def __init__(self, data):
    self.data = data
    self.features = {name: type('F', (), {'shape': value.shape[1:]}) for name, value in data.items()}

  def __len__(self):
    return len(self.data['label'])

  def classes(self, field):
    return int(self.data[field].max()) + 1


class Data(cases.Data):
  def open_source(self, spec):
    return Source(self.sets[spec])


def encode(variables, batch):
  seen = jnp.where(batch['missing'], -3.0, batch['table'])  # a lacking cell tells that it lacks, and nothing else
  hidden = jnp.tanh(seen[..., None] - jnp.linspace(-3, 3, 8)).reshape(len(seen), -1) @ variables['params']['w']
  return {'tokens': hidden[:, None], 'cls': hidden}


def encoder():
  w = jnp.asarray(np.random.default_rng(0).normal(size=(COLUMNS * 8, 24)) / 5, jnp.float32)
  apply = lambda variables, batch: features.pool(encode(variables, batch))
  return features.Encoder('trained', apply, {'params': {'w': w}, 'state': {}}, encode)


def settings(**given):
  fixed = {'train': 'a', 'test': 'b', 'batch_size': 64, 'train_batch': 64, 'frozen': True, 'corruption': 0.0}
  return suite.settings('tables', {**fixed, 'epochs': 8, 'base_lr': 0.1, 'min_lr': 1e-3, **given})


@pytest.fixture
def data():
  return Data(cases.mesh_of(1), {'a': rows(640, 0), 'b': rows(300, 1)})


def test_columns_that_tell_the_class_are_missed(data):
  kept, gone = (0, 1, 2, 3, 4, 5), (5, 4, 3, 2, 1, 0)
  one = {'rates': (0.34,), 'how': 'most_important'}  # two of six columns
  without = tables.run(encoder(), settings(order=kept, **one), data.context())['missing34/top1']
  with_both = tables.run(encoder(), settings(order=gone, **one), data.context())['missing34/top1']
  assert without < 0.5 and with_both > 0.95


def test_more_missing_cells_cost_accuracy(data):
  found = tables.run(encoder(), settings(rates=(0.0, 0.7)), data.context())
  # Both telling columns lack in half of the rows, where one guess in three is right.
  assert found['missing0/top1'] > 0.95 and 0.5 < found['missing70/top1'] < 0.8
  assert found['top1'] == pytest.approx((found['missing0/top1'] + found['missing70/top1']) / 2)


def test_a_forest_ranks_the_columns(data):
  cfg = settings(how='most_important')
  assert set(tables._order(cfg, data.context(), COLUMNS)[:2]) == {0, 1}


def test_the_encoder_learns_unless_it_is_frozen(data):
  frozen, whole = (
    tables.run(encoder(), settings(rates=(0.0,), epochs=2, base_lr=0.02, frozen=f), data.context())
    for f in (True, False)
  )
  assert whole['missing0/train_loss'] < frozen['missing0/train_loss'] - 0.02


def test_two_classes_have_an_auroc(data):
  for part in data.sets.values():
    part['label'] = (part['label'] > 0).astype(np.int32)
  found = tables.run(encoder(), settings(rates=(0.0,)), data.context())
  assert found['missing0/auroc'] > 0.97


def test_cells_lack_in_every_epoch_alike(data):
  cells = np.zeros((640, COLUMNS), bool)
  cells[5] = cells[7, 2] = True
  task = tables.task_of(settings(), CLASSES, cells)
  batch = {name: jnp.asarray(value[4:9]) for name, value in data.sets['a'].items()}
  draws = {'order': jnp.ones((5, COLUMNS)), 'source': jnp.zeros((5, COLUMNS))}
  seen, _ = task.prepare(batch, draws)
  np.testing.assert_array_equal(seen['missing'], cells[4:9])
  np.testing.assert_array_equal(seen['table'], batch['table'])
  assert (seen['row'] == -1).all() and 'label' not in seen


def test_corrupted_cells_take_values_of_their_column(data):
  task = tables.task_of(settings(corruption=0.5), CLASSES, np.zeros((640, COLUMNS), bool))
  batch = {name: jnp.asarray(value[:32]) for name, value in data.sets['a'].items()}
  seen, _ = task.prepare(batch, task.draw(jax.random.key(0), batch))
  changed = np.asarray(seen['table'] != batch['table'])
  assert changed.sum(1).max() == 3 and changed.sum(1).min() >= 1
  assert all(seen['table'][b, j] in batch['table'][:, j] for b, j in zip(*np.nonzero(changed), strict=True))


@pytest.mark.parametrize(
  'given', [{'how': 'rows'}, {'rates': ()}, {'rates': (1.0,)}, {'mixup': 0.5}, {'fields': ('image', 'table')}]
)
def test_settings_that_cannot_work_are_refused(given):
  with pytest.raises(ConfigError):
    tables.check(settings(**given), frozenset())
