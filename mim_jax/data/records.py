"""Data sets in the layout of TFDS, ArrayRecord or TFRecord, read example by example without TensorFlow."""

import copy
import os
import re

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from mim_jax.data import tfrecord
from mim_jax.data.sources import CorruptExample, Feature, Source, attempt
from mim_jax.errors import ConfigError, MissingData


def find(name, data_dir=''):
  """The folder that holds the prepared data set `name` (`NAME[/CONFIG][:VERSION]`); without VERSION the newest one.

  `data_dir` may be a local path or a bucket; empty means `$TFDS_DATA_DIR` or `~/tensorflow_datasets`. Only files are
  looked at, so a data set of one's own needs no registered builder. Raises MissingData with the command to prepare it.
  """
  name, _, version = name.partition(':')
  root = epath.Path(data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets').expanduser()
  folder = root / name
  if (folder / 'dataset_info.json').exists():  # a name that already says the version, as TFDS prints it: cifar10/3.0.2
    return folder
  if version and '*' not in version:
    if (folder / version / 'dataset_info.json').exists():
      return folder / version
  else:
    pattern = re.escape(version).replace(r'\*', r'\d+') if version else r'\d+\.\d+\.\d+'
    found = [p.name for p in folder.iterdir() if re.fullmatch(pattern, p.name)] if folder.is_dir() else []
    found = [v for v in found if (folder / v / 'dataset_info.json').exists()]
    if found:
      return folder / max(found, key=lambda v: [int(x) for x in v.split('.')])
  raise MissingData(
    f'tfds:{name}{version and ":" + version} is not prepared under {root}{_nearby(root, folder)}. Set data.data_dir to '
    f"the folder that holds it, or prepare it: python -c \"import tensorflow_datasets as tfds; tfds.builder('{name}', "
    f"data_dir='{root}').download_and_prepare(file_format='array_record')\""
  )


def _nearby(root, folder):
  for place in (folder, folder.parent, root):
    if place.is_dir():
      names = sorted(p.name for p in place.iterdir() if p.is_dir())
      return f'; {place} holds {", ".join(names[:20]) or "no folder"}'
  return f'; {root} does not exist'


class RecordSource(Source):
  """One split of a prepared TFDS data set.

  The field `image` stays encoded, so that a transform can decode just the part that a crop needs; other images such as
  masks are decoded here. Nested fields are named with '/', text is str.

  Args:
    directory: the folder with `dataset_info.json`.
    split: as TFDS writes it: `train`, `train[:1%]`, `train[10:20]+test`.
    verify: check the CRC of TFRecords while reading (ArrayRecord always does).
    name: in place of the one in the data set.
  """

  def __init__(self, directory, split='train', verify=False, name=None):
    builder = tfds.builder_from_directory(directory)
    info = builder.info
    self.name = name or f'tfds:{info.full_name}:{split}'
    try:
      self._instructions = info.splits[split].file_instructions
    except ValueError as e:
      sizes = ', '.join(f'{k} ({v.num_examples})' for k, v in info.splits.items())
      why = str(e).splitlines()[0]
      raise ConfigError(f'{self.name}: the split cannot be read ({why}); splits here: {sizes}') from e
    self._ends = np.cumsum([f.take for f in self._instructions])
    if not len(self._ends) or not self._ends[-1]:
      raise ConfigError(f'{self.name} is empty: its split selects no example')
    suffix = info.file_format.file_suffix
    if suffix == 'array_record':
      raw = tfds.decode.DeserializeMethod.RAW_BYTES
      records = builder.as_data_source(split=split, deserialize_method=raw)
      self._read_records = records.__getitems__
    elif suffix == 'tfrecord':
      self._records = tfrecord.TFRecords(self._instructions, verify)
      self._read_records = lambda indices: [self._records[i] for i in indices]
    else:
      raise MissingData(
        f'{self.name} is stored as {suffix}, which cannot be read here; expected array_record or tfrecord. Convert it: '
        f'tfds convert_format --dataset_dir={directory} --out_file_format=array_record --out_path=NEW_DIR'
      )
    self._use(info.features)

  def _use(self, tree):
    self._tree = tree
    image = isinstance(dict(tree.items()).get('image'), tfds.features.Image)
    self._decoders = {'image': tfds.decode.SkipDecoding()} if image else None
    self.features = dict(_flat_features('', tree))

  def select(self, fields):
    costly = tfds.features.Image, tfds.features.Video, tfds.features.Audio
    kept = {k: v for k, v in self._tree.items() if k in fields or not isinstance(v, costly)}
    other = copy.copy(self)
    other._use(tfds.features.FeaturesDict(kept))
    return other

  def __len__(self):
    return int(self._ends[-1])

  def key(self, index):
    part = int(np.searchsorted(self._ends, index, 'right'))
    instruction = self._instructions[part]
    row = index - (int(self._ends[part]) - instruction.take) + instruction.skip
    return f'{os.path.basename(instruction.filename)}[{row}]'

  def _read(self, index):
    try:
      record = self._read_records([index])[0]
    except (OSError, RuntimeError, ValueError) as e:  # the ArrayRecord reader raises RuntimeError for broken chunks
      raise CorruptExample(f'{type(e).__name__}: {e}') from e
    return self._example(record)

  def _example(self, record):
    try:
      example = self._tree.deserialize_example_np(record, decoders=self._decoders)
    except Exception as e:  # whatever protobuf, the image codec or numpy make of broken bytes
      raise CorruptExample(f'{type(e).__name__}: {e}') from e
    return dict(_flat(example))

  def getmany(self, indices):
    indices = [int(i) for i in indices]
    try:
      records = self._read_records(indices)
    except (OSError, RuntimeError, ValueError, CorruptExample):  # one of them is broken: find out which
      return super().getmany(indices)
    return [attempt(self._example, record) for record in records]


def _flat(example, prefix=''):
  for k, value in example.items():
    if isinstance(value, dict):
      yield from _flat(value, f'{prefix}{k}/')
    elif isinstance(value, bytes) and k != 'image':
      yield prefix + k, value.decode('utf-8', 'replace')
    elif isinstance(value, list):  # a sequence; of strings or of ragged arrays it stays a list
      yield prefix + k, value if value and isinstance(value[0], bytes | np.ndarray) else np.array(value)
    else:
      yield prefix + k, value


def _flat_features(prefix, tree):
  for k, feature in tree.items():
    lead = ()
    while isinstance(feature, tfds.features.Sequence):
      lead, feature = (*lead, None), feature.feature
    if isinstance(feature, tfds.features.FeaturesDict):
      for name, inner in _flat_features(f'{prefix}{k}/', feature):
        yield name, Feature((*lead, *inner.shape), inner.dtype, inner.classes, inner.names)
      continue
    classes, names = None, ()
    if isinstance(feature, tfds.features.ClassLabel) and feature.num_classes:
      classes, names = feature.num_classes, tuple(feature.names)
    yield prefix + k, Feature((*lead, *feature.shape), np.dtype(feature.np_dtype), classes, names)
