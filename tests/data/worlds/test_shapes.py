import dataclasses

import cv2
import numpy as np
import pytest

from mim_jax.data.worlds import build, render, shapes

OPTIONS = {'size': 64, 'train': 8, 'validation': 4, 'seed': 0, 'textures': True, 'others': 3}


def make(count, split='train', **options):
  return [shapes.example({**OPTIONS, **options}, split, i) for i in range(count)]


def decode(data):
  return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)


@pytest.fixture(scope='module')
def examples():
  return make(60)


def equal(a, b):
  return all(np.array_equal(a[k], b[k]) for k in a)


def test_an_example_is_a_function_of_seed_split_and_index(examples):
  assert equal(shapes.example(OPTIONS, 'train', 7), examples[7])
  assert equal(shapes.example({**OPTIONS, 'train': 10**6}, 'train', 7), examples[7])
  others = [
    examples[8],
    shapes.example(OPTIONS, 'validation', 7),
    shapes.example({**OPTIONS, 'seed': 1}, 'train', 7),
  ]
  assert all(other['image'] != examples[7]['image'] for other in others)


def test_size_changes_only_the_resolution(examples):
  large = shapes.example({**OPTIONS, 'size': 128}, 'train', 3)
  image, small = decode(large['image']), decode(examples[3]['image'])
  assert image.shape == (128, 128, 3) and small.shape == (64, 64, 3)
  shrunk = cv2.resize(image, (64, 64), interpolation=cv2.INTER_AREA).astype(float)
  assert np.abs(shrunk - small).mean() < 3
  for k in ('label', 'boxes', 'distance', 'caption', 'table'):
    np.testing.assert_array_equal(large[k], examples[3][k])
  np.testing.assert_allclose(large['visible'], examples[3]['visible'], atol=0.05)


def test_masks_boxes_and_labels_agree(examples):
  counts = set()
  for e in examples:
    instances, mask = decode(e['instances']), decode(e['mask'])
    count = e['box_valid'].sum()
    counts.add(count)
    assert e['box_valid'][:count].all() and e['box_label'][0] == e['label']
    assert not (e['boxes'][count:].any() or e['distance'][count:].any() or e['visible'][count:].any())
    np.testing.assert_array_equal(mask, np.append(0, e['box_label'][:count] + 1)[instances])
    for k in range(count):
      rows, columns = np.nonzero(instances == k + 1)
      if not len(rows):
        continue
      seen = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / 64
      assert (seen[:2] >= e['boxes'][k, :2] - 1.5 / 64).all() and (seen[2:] <= e['boxes'][k, 2:] + 1.5 / 64).all()
      if e['visible'][k] == 1 and e['boxes'][k].min() > 0 and e['boxes'][k].max() < 1:  # tight, but for thin ends
        np.testing.assert_allclose(seen, e['boxes'][k], atol=4 / 64)
  assert counts == {1, 2, 3, 4} or counts == {1, 2, 3}


def test_the_main_object_is_large_and_hardly_hidden_the_others_smaller(examples):
  for e in examples:
    sides = e['boxes'][:, 2:] - e['boxes'][:, :2]
    assert 0.3 < sides[0].max() < 0.95
    assert e['visible'][0] > 0.7
    others = e['box_valid'][1:]
    assert (e['visible'][1:][others] > 0.3).all() and (e['distance'][1:][others] < 15.5).all()
    assert (np.prod(sides[1:], 1) < np.prod(sides[0])).all()


def test_distance_follows_from_extent_and_apparent_size(examples):
  column = list(shapes.COLUMNS).index
  for e in examples:
    assert e['distance'][0] == pytest.approx(e['table'][column('distance')], rel=1e-5)
    share = e['table'][column('extent')] / (2 * shapes.SLOPE * e['distance'][0])
    assert 0.49 < share < 0.76


def test_the_table_fits_its_columns(examples):
  table = np.stack([e['table'] for e in examples])
  assert table.shape == (60, len(shapes.COLUMNS)) and table.dtype == np.float32 and np.isfinite(table).all()
  kinds = list(shapes.COLUMNS.values())
  categorical = [not isinstance(kind, str) for kind in kinds]
  assert categorical == sorted(categorical, reverse=True)  # categorical ones first
  for values, kind in zip(table.T, kinds, strict=True):
    if isinstance(kind, str):
      assert len(np.unique(values)) == 60
    else:
      assert (values == values.astype(int)).all() and values.min() >= 0 and values.max() < len(kind)
      assert len(np.unique(values)) > 1


def test_the_caption_says_what_the_table_and_the_labels_say(examples):
  column = list(shapes.COLUMNS).index
  for e in examples:
    main, *others = e['caption'].split('; ')
    named = lambda name: shapes.COLUMNS[name][int(e['table'][column(name)])]
    article = 'an' if named('colour') == 'orange' else 'a'
    assert main.replace(',', '').split()[:3] == [article, named('colour'), shapes.CLASSES[e['label']]]
    assert (f'{named("texture")} with {named("accent")},' in main) == (named('texture') != 'plain')
    assert f' {named("place")}, on {named("ground_colour")} ground' in main
    assert len(others) == e['box_valid'].sum() - 1
    labels = e['box_label'][1 : 1 + len(others)]
    assert sorted(o.split()[2] for o in others) == sorted(shapes.CLASSES[k] for k in labels)


def test_the_light_side_of_the_table_is_the_bright_side_of_a_ball():
  column = list(shapes.COLUMNS).index
  right = []
  for i in range(300):
    scene = shapes.scene(build.stream(0, 'shapes/train', i))
    side = shapes.SIDES[int(shapes.table(scene)[column('light_from')])]
    if shapes.CLASSES[scene.objects[0].label] != 'ball' or side not in ('left', 'right'):
      continue
    bare = render.Texture('plain', *(np.ones(shape, np.float32) for shape in ((2, 3), (3, 3), 3)))
    dresses = [dataclasses.replace(scene.dresses[0], texture=bare), *scene.dresses[1:]]
    light = dataclasses.replace(scene.light, falloff=0.0, tint=0.6 * scene.light.tint)
    image, instances, _ = shapes.picture(dataclasses.replace(scene, dresses=dresses, light=light), 64)
    columns = np.nonzero(instances == 1)[1]
    values = image[instances == 1].mean(-1)
    middle = np.median(columns)
    right.append((values[columns > middle].mean() > values[columns < middle].mean()) == (side == 'right'))
  assert len(right) > 5 and np.mean(right) > 0.9


def test_classes_share_colours_and_textures():
  scenes = [shapes.scene(build.stream(1, 'shapes/train', i)) for i in range(900)]
  labels = np.array([s.objects[0].label for s in scenes])
  counts = np.bincount(labels, minlength=12)
  assert counts.min() > 40
  for part, size in (('colour', 11), ('pattern', 6)):
    codes = np.array([getattr(s.dresses[0], part) for s in scenes])
    joint = np.histogram2d(labels, codes, (np.arange(13), np.arange(size + 1)))[0]
    expected = counts[:, None] * np.bincount(codes, minlength=size) / len(scenes)
    freedom = 11 * (size - 1)
    assert ((joint - expected) ** 2 / expected).sum() < freedom + 4 * np.sqrt(2 * freedom)


def gradients(images, cells=8, bins=9):
  """Histograms of edge directions, over cells of 8 pixels, each at unit length."""
  out = []
  for image in images.astype(np.float32):
    dx, dy = (cv2.Sobel(image, cv2.CV_32F, *order, ksize=1) for order in ((1, 0), (0, 1)))
    size = np.hypot(dx, dy)
    best = size.argmax(-1)[..., None]
    pick = lambda a: np.take_along_axis(a, best, -1)[..., 0]
    direction = (np.arctan2(pick(dy), pick(dx)) % np.pi / np.pi * bins).astype(int) % bins
    cell = np.add.outer(np.arange(64) // 8 * cells, np.arange(64) // 8)
    histogram = np.bincount((cell * bins + direction).ravel(), pick(size).ravel(), cells * cells * bins)
    histogram = histogram.reshape(-1, bins)
    out.append((histogram / (np.linalg.norm(histogram, axis=1, keepdims=True) + 20)).ravel())
  return np.array(out, np.float32)


def neighbours(train, train_labels, test, test_labels, k=20):
  """Accuracy of a vote of the k nearest by cosine."""
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  nearest = np.argpartition(-unit(test) @ unit(train).T, k, axis=1)[:, :k]
  votes = np.eye(12)[train_labels[nearest]].sum(1)
  return np.mean(votes.argmax(1) == test_labels)


@pytest.mark.slow
def test_shape_is_in_the_edges_and_not_in_colours_or_raw_pixels():
  train, test = make(4000), make(500, 'validation')
  images = [np.stack([decode(e['image']) for e in part]) for part in (train, test)]
  labels = [np.array([e['label'] for e in part]) for part in (train, test)]
  score = lambda fields: neighbours(fields(images[0]), labels[0], fields(images[1]), labels[1])
  colours = score(lambda x: np.concatenate([x.mean((1, 2)), x.std((1, 2))], 1))
  pixels = score(lambda x: x.reshape(len(x), -1) / np.float32(255))
  edges = score(gradients)
  assert colours < 0.2
  assert pixels < 0.3
  assert edges > 0.5 and edges > 2 * pixels


def test_captions_are_made_of_the_words_of_the_world():
  from mim_jax.data import text

  tokenizer = text.load('words:shapes')
  options = shapes.WORLD.options()
  for index in range(60):
    scene = shapes.scene(build.stream(options['seed'], 'shapes/train', index))
    ids, mask = tokenizer.encode(shapes.caption(scene), 64)
    assert tokenizer.unknown not in ids
    assert mask.sum() < 64
