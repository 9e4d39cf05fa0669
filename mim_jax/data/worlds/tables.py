"""`synthetic:tables`: adverts of cars, a picture and a table row with lacking cells; the class is body and trim.

The class has two parts, and neither field has both. The body (hatchback, saloon, van, pickup) is plain in the
picture, while the table has it only as the entry `body`, random in half of the rows, and as a height that scatters.
The trim (base, sport, luxury) does not show in the picture; the table has it as power and fuel, which scatter too. So
a picture alone gives at most one class in three (four bodies of twelve classes), the most frequent class one in
twelve, and a table alone must guess the body where its hints disagree: a random forest on 6,000 complete rows is
right in 68 % of a thousand others (body 74 %, trim 95 %). Colour, ground, length and age link picture
and row without saying anything of the class; dealer and rating are noise.

Where the car stands, which way it looks, how it is tilted, the light, and the texture of the ground vary freely.
Cells lack at random (option `missing`), of any column.

Options: `size` of the image's side in pixels, `train` and `validation` number of examples, `seed`, `missing` share of
the cells. An example is a function of (seed, split, index).

| field | shape, dtype | meaning |
|---|---|---|
| image | H W 3 uint8 | PNG |
| label | int64 | 3 body + trim, one of 12 |
| table | N float32 | the columns of `COLUMNS`: codes first, then continuous ones in their units; NaN where lacking |
| row | int64 | number of the example in its split |

metadata.json describes the columns of `table`: categories, or unit, mean and standard deviation.
"""

import functools

import cv2
import numpy as np

from mim_jax.data.worlds import build

SUPERSAMPLE = 2  # drawn at this multiple of the size and averaged down
SAMPLE = 4096  # rows from which mean and deviation of the continuous columns are taken
GREY = np.array([0.5, 0.5, 0.5])

COLOURS = {
  'red': (0.80, 0.12, 0.12),
  'orange': (0.92, 0.50, 0.08),
  'yellow': (0.90, 0.82, 0.15),
  'green': (0.10, 0.50, 0.18),
  'blue': (0.12, 0.25, 0.75),
  'purple': (0.48, 0.15, 0.62),
  'white': (0.95, 0.95, 0.95),
  'black': (0.10, 0.10, 0.12),
}
GROUNDS = {
  'asphalt': (0.42, 0.42, 0.45),
  'grass': (0.38, 0.58, 0.28),
  'sand': (0.80, 0.70, 0.48),
  'snow': (0.84, 0.88, 0.92),
}
TRIMS = ('base', 'sport', 'luxury')
FUELS = ('petrol', 'diesel', 'electric')  # mostly that of the trim of the same place
DEALERS = ('north', 'south', 'east', 'west', 'harbour', 'hill')

# Seen from the side, in lengths of the car, the wheels' axles at height 0: outline and window.
BODIES = {
  'hatchback': (
    [(-0.5, 0), (-0.5, 0.2), (-0.42, 0.36), (0.06, 0.36), (0.24, 0.2), (0.48, 0.16), (0.5, 0)],
    [(-0.38, 0.2), (-0.35, 0.32), (0.04, 0.32), (0.16, 0.2)],
  ),
  'saloon': (
    [(-0.5, 0), (-0.5, 0.16), (-0.3, 0.19), (-0.18, 0.33), (0.08, 0.33), (0.24, 0.19), (0.48, 0.15), (0.5, 0)],
    [(-0.24, 0.19), (-0.15, 0.29), (0.06, 0.29), (0.17, 0.19)],
  ),
  'van': (
    [(-0.5, 0), (-0.5, 0.46), (0.26, 0.46), (0.4, 0.22), (0.5, 0.18), (0.5, 0)],
    [(0.08, 0.24), (0.08, 0.4), (0.23, 0.4), (0.32, 0.24)],
  ),
  'pickup': (
    [(-0.5, 0), (-0.5, 0.16), (-0.06, 0.16), (-0.06, 0.37), (0.14, 0.37), (0.26, 0.19), (0.48, 0.16), (0.5, 0)],
    [(-0.02, 0.19), (-0.02, 0.33), (0.12, 0.33), (0.2, 0.19)],
  ),
}
HEIGHTS = (1.55, 1.42, 1.95, 1.75)  # metres, by body
CLASSES = tuple(f'{trim} {body}' for body in BODIES for trim in TRIMS)

# Columns of `table`: name -> categories, or the unit of a continuous column.
COLUMNS = {
  'colour': tuple(COLOURS),
  'ground': tuple(GROUNDS),
  'body': tuple(BODIES),
  'fuel': FUELS,
  'dealer': DEALERS,
  'length': 'm',
  'height': 'm',
  'age': 'years',
  'mileage': 'thousand km',
  'power': 'kW',
  'price': 'thousand',
  'rating': 'stars',
}


def attributes(rng):
  """A car: body, trim, colour, ground, age in years and length in metres as a dict, and its whole row [N] float32."""
  body, trim = int(rng.integers(len(BODIES))), int(rng.integers(len(TRIMS)))
  colour, ground = int(rng.integers(len(COLOURS))), int(rng.integers(len(GROUNDS)))
  age, length = 15 * rng.random(), 3.4 + 1.8 * rng.random()
  entry = body if rng.random() < 0.5 else int(rng.integers(len(BODIES)))
  fuel = trim if rng.random() < 0.7 else int(rng.integers(len(FUELS)))
  noise = rng.standard_normal(6)
  power = 70 + 35 * trim + 12 * noise[0]
  row = [
    colour,
    ground,
    entry,
    fuel,
    int(rng.integers(len(DEALERS))),
    length + 0.1 * noise[1],
    HEIGHTS[body] + 0.15 * noise[2],
    age + 0.5 * noise[3],
    12 * age * np.exp(0.3 * noise[4]),
    power,
    12 + 0.15 * power - age + 1.5 * noise[5],
    1 + 4 * rng.random(),
  ]
  car = {'body': body, 'trim': trim, 'colour': colour, 'ground': ground, 'age': age, 'length': length}
  return car, np.array(row, np.float32)


def picture(car, rng, size):
  """The car on its ground, somewhere, under some light: [size, size, 3] uint8."""
  side = size * SUPERSAMPLE
  turn, mirrored = 0.3 * (rng.random() - 0.5), rng.random() < 0.5
  x, y = 0.35 + 0.3 * rng.random(2)
  scale = 0.135 * car['length']  # image sides that the length spans: 0.46 to 0.70
  image = _ground(rng, np.array(list(GROUNDS.values())[car['ground']]), side)
  paint = np.array(list(COLOURS.values())[car['colour']]) * (0.9 + 0.2 * rng.random())
  paint += 0.6 * car['age'] / 15 * (GREY - paint)  # old paint is faded

  def place(points):
    points = np.array(points) * (-1 if mirrored else 1, -1)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    points = points @ rotation.T * scale + (x, y + 0.1)
    return np.rint(points * side * 16).astype(np.int32)  # with 4 fractional bits

  def fill(points, colour):
    cv2.fillPoly(image, [place(points)], tuple(map(float, colour)), cv2.LINE_AA, 4)

  outline, window = list(BODIES.values())[car['body']]
  fill(outline, paint)
  fill(window, (0.15, 0.2, 0.25))
  for axle in (-0.3, 0.3):
    centre = place([(axle, 0)])[0]
    for radius, colour in ((0.085, (0.08, 0.08, 0.08)), (0.04, (0.6, 0.6, 0.62))):
      cv2.circle(image, tuple(map(int, centre)), int(radius * scale * side * 16), colour, -1, cv2.LINE_AA, 4)
  image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
  image *= (0.75 + 0.4 * rng.random()) * (1 + 0.06 * (rng.random(3) - 0.5))
  image += 0.02 * rng.standard_normal(image.shape)
  return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _ground(rng, colour, side):
  """A ground of this colour with blotches of three sizes and a gradient, [side, side, 3] float32."""
  image = np.zeros((side, side, 1), np.float32)
  for cells in (4, 9, 20):
    blotches = rng.standard_normal((cells, cells)).astype(np.float32)
    image[..., 0] += cv2.resize(blotches, (side, side), interpolation=cv2.INTER_CUBIC)
  image[..., 0] += np.linspace(*(2 * rng.standard_normal(2)), side)[:, None]
  return (colour * (1 + 0.06 * image)).astype(np.float32)


def example(options, split, index):
  """Example `index` of a split as a dict of the features; images as PNG bytes."""
  rng = build.stream(options['seed'], f'tables/{split}', index)
  car, row = attributes(rng)
  lacking = rng.random(len(row)) < options['missing']
  return {
    'image': build.png(picture(car, rng, options['size'])),
    'label': len(TRIMS) * car['body'] + car['trim'],
    'table': np.where(lacking, np.nan, row).astype(np.float32),
    'row': index,
  }


def _features(options):
  import tensorflow_datasets as tfds

  return {
    'image': tfds.features.Image(shape=(options['size'], options['size'], 3), encoding_format='png'),
    'label': tfds.features.ClassLabel(names=list(CLASSES)),
    'table': tfds.features.Tensor(shape=(len(COLUMNS),), dtype=np.float32),
    'row': tfds.features.Scalar(dtype=np.int64),
  }


@functools.cache
def _statistics(seed):
  """Mean and deviation of every column over rows of their own."""
  rows = np.stack([attributes(build.stream(seed, 'tables/statistics', i))[1] for i in range(SAMPLE)])
  return rows.mean(axis=0, dtype=np.float64), rows.std(axis=0, dtype=np.float64)


def _metadata(options):
  columns = []
  for (name, kind), mean, std in zip(COLUMNS.items(), *_statistics(options['seed']), strict=True):
    continuous = {'unit': kind, 'mean': float(mean), 'std': float(std)}
    columns.append({'name': name, **(continuous if isinstance(kind, str) else {'categories': list(kind)})})
  return {'table': columns}


WORLD = build.World(
  name='tables',
  version='1.0.0',
  description='Adverts of cars: a picture and a table row with lacking cells; the class is body (seen) and trim (told).',
  defaults={'size': 64, 'train': 20_000, 'validation': 2_000, 'seed': 0, 'missing': 0.1},
  limits={
    'size': (16, 1024),
    'train': (0, 10**8),
    'validation': (0, 10**8),
    'seed': (0, 2**63 - 1),
    'missing': (0.0, 0.9),
  },
  splits=('train', 'validation'),
  features=_features,
  example=example,
  metadata=_metadata,
)
