"""`synthetic:shapes`: textured, lit solids standing on a textured ground; the class is the shape of the main one.

Options: `size` of the image's side in pixels, `train` and `validation` number of examples, `seed`. An example is a
function of (seed, split, index); `size` only changes its resolution. Colours, textures, light, pose and place are drawn
independently of the class.

| field | shape, dtype | meaning |
|---|---|---|
| image | H W 3 uint8 | PNG |
| label | int64 | shape of the main object, one of 12 |
| mask | H W 1 uint8 | PNG; 0 = ground, 1 + class of the object seen |
| instances | H W 1 uint8 | PNG; 0 = ground, 1 + row of the object seen in the fields below |
| boxes | M 4 float32 | x1 y1 x2 y2, fractions of the sides: the whole object, hidden or not, cut at the image's edge |
| box_valid | M bool | rows that hold an object; row 0 is the main one; M = 4 |
| box_label | M int64 | class, 0 where there is no object |
| distance | M float32 | metres from the camera to the object's middle, 0 where there is no object |
| visible | M float32 | share of the object's silhouette in the image that no other object hides |
| caption | string | the main object with colours, texture and place; the ground; the other objects from near to far |
| table | F float32 | the columns of `COLUMNS`: codes first, then continuous ones, unscaled; none tells the class |

metadata.json names the classes of `mask` and the columns of `table` with their categories or unit.
"""

import dataclasses
import math

import cv2
import numpy as np

from mim_jax.data.worlds import build, render, solids
from mim_jax.data.worlds.solids import CLASSES

OBJECTS = 4  # most objects in a scene, M
SUPERSAMPLE = 2  # scenes are drawn at this multiple of the size and averaged down
SLOPE = 0.4  # tan of half the camera's field of view
JITTER = 0.2  # how far the main object's middle may be from the image's, in image sides
ROLL = 0.1  # radians the camera may be off the upright

COLOURS = {
  'red': (0.85, 0.15, 0.13),
  'orange': (0.95, 0.52, 0.10),
  'yellow': (0.93, 0.85, 0.20),
  'green': (0.20, 0.62, 0.20),
  'teal': (0.12, 0.65, 0.65),
  'blue': (0.15, 0.28, 0.82),
  'purple': (0.52, 0.20, 0.70),
  'pink': (0.95, 0.50, 0.68),
  'brown': (0.45, 0.27, 0.13),
  'white': (0.93, 0.93, 0.90),
  'grey': (0.50, 0.50, 0.52),
}
_RGB = np.array(list(COLOURS.values()), np.float32)
PATTERNS = tuple(render.PATTERNS)
PLACES = tuple(f'{v} {h}'.strip() for v in ('upper', '', 'lower') for h in ('left', 'middle', 'right'))
SIDES = ('right', 'behind', 'left', 'front')

# Columns of `table`: name -> categories, or the unit of a continuous column.
COLUMNS = {
  'colour': tuple(COLOURS),
  'accent': tuple(COLOURS),
  'texture': PATTERNS,
  'ground_colour': tuple(COLOURS),
  'ground_accent': tuple(COLOURS),
  'ground_texture': PATTERNS,
  'place': PLACES,
  'light_from': SIDES,
  'others': ('0', '1', '2', '3'),
  'extent': 'm',
  'distance': 'm',
  'x': 'image sides',
  'y': 'image sides',
  'camera_elevation': 'degrees',
  'light_elevation': 'degrees',
  'ambient': 'share of the light',
  'haze': 'm',
}

# Every word of a caption. Their order gives token ids: new ones go to the end.
_PLAIN = ', ; a an at behind front ground in it lower left middle of on right the to upper with'
WORDS = (*_PLAIN.split(), *COLOURS, *PATTERNS, *CLASSES)


@dataclasses.dataclass(frozen=True)
class Dress:
  """Codes of two colours and a pattern, and the texture they make."""

  colour: int
  accent: int
  pattern: int
  texture: render.Texture

  def describe(self, noun):
    """'a red ball', 'an orange mug striped with teal'."""
    colour, accent = (list(COLOURS)[code] for code in (self.colour, self.accent))
    text = f'{"an" if colour[0] == "o" else "a"} {colour} {noun}'
    return text if PATTERNS[self.pattern] == 'plain' else f'{text} {PATTERNS[self.pattern]} with {accent}'


@dataclasses.dataclass(frozen=True)
class Object:
  """A solid in its place."""

  label: int
  local: solids.Mesh  # of unit extent, in its own axes, which the texture follows
  mesh: solids.Mesh  # the same in the world
  extent: float  # metres: longest side
  middle: np.ndarray  # [3] metres: half its height above its foot
  away: float  # metres from the camera to the middle
  box: np.ndarray  # x1 y1 x2 y2 around it in fractions of the image's sides; may reach outside


def _dress(rng, colour, wavelength, dim=1.0, textures=True):
  """A random accent and pattern to a colour; colours are varied a little, so is the pattern's `wavelength`."""
  accent = _contrasting(rng, _RGB[colour], 0.3)
  pattern = 0 if rng.random() < 0.4 or not textures else int(rng.integers(1, len(PATTERNS)))
  vary = lambda c: np.clip(_RGB[c] * (0.85 + 0.3 * rng.random()) + 0.08 * (rng.random(3) - 0.5), 0, 1)
  first, second = vary(colour), vary(accent)
  second = first + (0.15 + 0.25 * rng.random()) * (second - first)  # patterns stay weaker than outlines
  a, b = rng.random(2) * 2 * np.pi
  axes = render.look_at((0, 0, 0), (math.cos(a), math.sin(a), 0.8 * math.sin(b)), SLOPE).rotation
  waves = axes * np.float32(2 * np.pi / (wavelength * (0.8 + 0.6 * rng.random())))
  phase = (rng.random(3) * 2 * np.pi).astype(np.float32)
  colours = (dim * np.stack([first, second])).astype(np.float32)
  return Dress(colour, accent, pattern, render.Texture(PATTERNS[pattern], colours, waves, phase))


def _contrasting(rng, rgb, least, dim=1.0):
  """A random colour code whose RGB, times `dim`, is more than `least` away from `rgb` [3]."""
  far = np.flatnonzero(np.linalg.norm(dim * _RGB - rgb, axis=1) > least)
  return int(far[rng.integers(len(far))])


def _place(camera, label, local, yaw, extent, foot):
  """The object that a solid of unit extent becomes at the point `foot` [3]; None if it reaches behind the camera."""
  mesh = local.placed(yaw, extent, foot)
  corners = mesh.vertices.reshape(-1, 3)
  seen = camera.see(corners)
  if seen[:, 2].min() < 0.3:
    return None
  xy = camera.project(seen)
  middle = np.array([foot[0], foot[1], corners[:, 2].max() / 2])
  away = float(np.linalg.norm(middle - camera.position))
  return Object(label, local, mesh, extent, middle, away, np.concatenate([xy.min(0), xy.max(0)]))


def _main_object(rng):
  """The main object, at the origin, and a camera that sees it about the middle, its extent half to 3/4 of the image."""
  label = int(rng.integers(len(CLASSES)))
  local, yaw = solids.solid(rng, label)
  extent = 1.2 + rng.random()
  away = extent / ((0.5 + 0.25 * rng.random()) * 2 * SLOPE)
  elevation = math.radians(14 + 30 * rng.random())
  up = np.array([0, math.sin(elevation), math.cos(elevation)])
  back = np.array([0, -math.cos(elevation), math.sin(elevation)])
  middle = np.array([0, 0, local.vertices[..., 2].max() * extent / 2])
  shift = (rng.random(2) - 0.5) * 2 * JITTER * 2 * SLOPE * away
  target = middle + shift[0] * np.array([1, 0, 0]) + shift[1] * up
  camera = render.look_at(middle + away * back, target, SLOPE, roll=(rng.random() - 0.5) * 2 * ROLL)
  return _place(camera, label, local, yaw, extent, (0, 0, 0)), camera, elevation


def _overlap(a, b):
  """Area that two boxes share, in shares of the image."""
  return np.prod(np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0))


def _other_object(rng, camera, placed):
  """One more object at a random spot, or None where it would touch others, hide the main one or hardly be seen."""
  label = int(rng.integers(len(CLASSES)))
  x, y = rng.random(2)
  ray = np.array([x - 0.5, 0.9 * y - 0.4, 0.5 / camera.slope]) @ camera.rotation
  if ray[2] > -0.06:  # hardly below the horizon
    return None
  foot = camera.position - ray * camera.position[2] / ray[2]
  away = np.linalg.norm(foot - camera.position)
  extent = (0.16 + 0.2 * rng.random()) * 2 * camera.slope * away
  if away > 15 or not 0.35 < extent < 2.5:
    return None
  if any(math.dist(foot[:2], other.middle[:2]) < 0.65 * (extent + other.extent) for other in placed):
    return None
  item = _place(camera, label, *solids.solid(rng, label), extent, foot)
  if item is None:
    return None
  main, frame = placed[0], np.array([0, 0, 1, 1])
  area = _overlap(item.box, item.box)
  if _overlap(item.box, frame) < 0.6 * area:
    return None
  most = 0.2 * _overlap(main.box, main.box) if item.away < main.away else 0.5 * area
  return item if _overlap(item.box, main.box) <= most else None


@dataclasses.dataclass(frozen=True)
class Scene:
  """All that a picture, a caption and a row of the table are made of."""

  objects: list[Object]  # the main one first
  dresses: list[Dress]
  ground: Dress
  camera: render.Camera
  light: render.Light
  elevation: float  # radians: of the camera, seen from the main object
  turn: float  # radians: azimuth of the light, 0 = from the right, pi / 2 = from behind
  height: float  # radians: elevation of the light

  def place(self):
    """Code of the place of the main object's middle in the image, and its x and y."""
    x, y = self.camera.project(self.camera.see(self.objects[0].middle))
    column, row = (int(np.clip(np.rint((v - 0.5) / 0.1), -1, 1)) + 1 for v in (x, y))
    return 3 * row + column, x, y


def scene(rng, textures=True, others=OBJECTS - 1) -> Scene:
  """A random scene; without `textures` all is plain, and at most `others` objects stand around the main one."""
  main, camera, elevation = _main_object(rng)
  objects = [main]
  for _ in range(int((others + 1) * rng.random() ** 2)):  # none in half of the scenes
    for _ in range(3):  # attempts; a scene that has no room for it stays emptier
      other = _other_object(rng, camera, objects)
      if other is not None:
        objects.append(other)
        break
  turn, height = rng.random() * 2 * math.pi, math.radians(35 + 40 * rng.random())
  flat = math.cos(height)
  light = render.Light(
    direction=np.array([flat * math.cos(turn), flat * math.sin(turn), math.sin(height)], np.float32),
    tint=(1.25 + 0.15 * (rng.random(3) - 0.5)).astype(np.float32),
    ambient=0.3 + 0.25 * rng.random(),
    falloff=0.8 * rng.random(),
    brightest=rng.random() * 2 * math.pi,
    gloss=0.5 * rng.random(),
    haze=10 + 40 * rng.random(),
    backdrop=(0.05 + 0.65 * rng.random() + 0.2 * rng.random(3)).astype(np.float32),
  )
  # The ground gets more light than upright surfaces; dimmed, it is as often darker than an object as brighter.
  dim = 0.3 + 0.6 * rng.random()
  ground = _dress(rng, int(rng.integers(len(_RGB))), 0.8, dim, textures)
  floor = 0.9 * ground.texture.colours[0]  # about as it is lit, like the factor for objects
  dresses = [_dress(rng, _contrasting(rng, floor, 0.35, dim=0.7), 0.3, textures=textures) for _ in objects]
  return Scene(objects, dresses, ground, camera, light, elevation, turn, height)


def table(s) -> np.ndarray:
  """The scene's row of attributes, in the order of `COLUMNS`, float32."""
  place, x, y = s.place()
  codes = [code for d in (s.dresses[0], s.ground) for code in (d.colour, d.accent, d.pattern)]
  side = int(round(s.turn / (math.pi / 2))) % 4
  angles = [math.degrees(s.elevation), math.degrees(s.height)]
  main = s.objects[0]
  numbers = [main.extent, main.away, x, y, *angles, s.light.ambient, s.light.haze]
  return np.array([*codes, place, side, len(s.objects) - 1, *numbers], np.float32)


def caption(s) -> str:
  """One sentence about a scene."""
  main, *others = s.objects
  place = PLACES[s.place()[0]]
  place = {'middle': 'in the middle', 'left': 'on the left', 'right': 'on the right'}.get(place, f'at the {place}')
  ground = s.ground.describe('ground').split(' ', 1)[1]  # without its article
  text = f'{s.dresses[0].describe(CLASSES[main.label])}, {place}, on {ground}'
  middle = lambda item: item.box[0] + item.box[2]
  for item, dress in sorted(zip(others, s.dresses[1:], strict=True), key=lambda pair: pair[0].away):
    depth = 'in front of' if item.away < main.away else 'behind'
    side = 'left' if middle(item) < middle(main) else 'right'
    text += f'; {dress.describe(CLASSES[item.label])} {depth} it to the {side}'
  return text


def picture(s, size):
  """Image [size, size, 3] uint8, instances [size, size] uint8 (0 = ground, 1 = main one), visible share per object."""
  meshes = [(item.mesh, item.local) for item in s.objects]
  raster = render.rasterise(meshes, s.camera, size * SUPERSAMPLE)
  textures = [dress.texture for dress in s.dresses]
  colour = render.shade(raster, meshes, textures, s.ground.texture, s.camera, s.light, size)
  colour = cv2.resize(colour, (size, size), interpolation=cv2.INTER_AREA)
  image = (np.clip(colour, 0, 1) * 255 + 0.5).astype(np.uint8)
  instances = (raster.objects()[::SUPERSAMPLE, ::SUPERSAMPLE] + 1).astype(np.uint8)
  return image, instances, raster.visible()


def _padded(values, dtype=np.float32):
  """A row per object, zeros below."""
  out = np.zeros((OBJECTS, *np.shape(values[0])), dtype)
  out[: len(values)] = values
  return out


def example(options, split, index):
  """Example `index` of a split as a dict of the features; images as PNG bytes."""
  s = scene(build.stream(options['seed'], f'shapes/{split}', index), options['textures'], options['others'])
  image, instances, visible = picture(s, options['size'])
  labels = np.array([item.label for item in s.objects])
  return {
    'image': build.png(image),
    'label': labels[0],
    'mask': build.png(np.append(0, labels + 1).astype(np.uint8)[instances]),
    'instances': build.png(instances),
    'boxes': _padded([np.clip(item.box, 0, 1) for item in s.objects]),
    'box_valid': _padded([True] * len(labels), bool),
    'box_label': _padded(labels, np.int64),
    'distance': _padded([item.away for item in s.objects]),
    'visible': _padded(visible),
    'caption': caption(s),
    'table': table(s),
  }


def _features(options):
  import tensorflow_datasets as tfds

  size = options['size']
  label = tfds.features.ClassLabel(names=list(CLASSES))
  picture = lambda channels: tfds.features.Image(shape=(size, size, channels), encoding_format='png')
  tensor = lambda shape, dtype=np.float32: tfds.features.Tensor(shape=shape, dtype=dtype)
  return {
    'image': picture(3),
    'label': label,
    'mask': picture(1),
    'instances': picture(1),
    'boxes': tensor((OBJECTS, 4)),
    'box_valid': tensor((OBJECTS,), np.bool_),
    'box_label': tensor((OBJECTS,), np.int64),
    'distance': tensor((OBJECTS,)),
    'visible': tensor((OBJECTS,)),
    'caption': tfds.features.Text(),
    'table': tensor((len(COLUMNS),)),
  }


def _metadata(options):
  """Names of the classes of `mask` and of the columns of `table`, with categories or unit."""
  columns = [
    {'name': name, 'unit': kind} if isinstance(kind, str) else {'name': name, 'categories': list(kind)}
    for name, kind in COLUMNS.items()
  ]
  return {'mask': ['ground', *CLASSES], 'table': columns}


WORLD = build.World(
  name='shapes',
  version='1.0.0',
  description='Textured, lit solids of 12 shapes on a textured ground; the label is the shape of the main one.',
  defaults={'size': 64, 'train': 20_000, 'validation': 2_000, 'seed': 0, 'textures': True, 'others': OBJECTS - 1},
  limits={
    'size': (16, 1024),
    'train': (0, 10**8),
    'validation': (0, 10**8),
    'seed': (0, 2**63 - 1),
    'others': (0, OBJECTS - 1),
  },
  splits=('train', 'validation'),
  features=_features,
  example=example,
  metadata=_metadata,
)
