"""Solids as meshes of quads: how to make them, and the shapes that synthetic worlds tell apart.

A solid stands on the plane z = 0; the side it shows best looks towards -y.
"""

import dataclasses
import math

import numpy as np

from mim_jax.data.worlds.render import cross, unit


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Quads: `vertices` [F, 4, 3], counter-clockwise seen from outside, and `normals` [F, 4, 3], outwards, of length 1.

  A triangle repeats its last vertex; the first three vertices of a quad are always distinct.
  """

  vertices: np.ndarray
  normals: np.ndarray

  def placed(self, yaw=0.0, scale=1.0, offset=(0.0, 0.0, 0.0)) -> 'Mesh':
    """Scaled, turned by `yaw` radians about z, moved by `offset`."""
    c, s = math.cos(yaw), math.sin(yaw)
    turn = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]], np.float32)  # transposed: rows are points
    return Mesh(self.vertices @ turn * np.float32(scale) + np.asarray(offset, np.float32), self.normals @ turn)


def join(*meshes) -> Mesh:
  """One mesh of all the faces."""
  return Mesh(np.concatenate([m.vertices for m in meshes]), np.concatenate([m.normals for m in meshes]))


def _flat(vertices) -> Mesh:
  """A mesh whose normals are those of its faces. vertices [F, 4, 3]."""
  normal = unit(cross(vertices[:, 1] - vertices[:, 0], vertices[:, 2] - vertices[:, 0]))
  return Mesh(vertices, np.broadcast_to(normal[:, None], vertices.shape))


_CUBE = np.array(
  [
    [[0, 0, 0], [1, 0, 0], [1, 0, 1], [0, 0, 1]],
    [[1, 1, 0], [0, 1, 0], [0, 1, 1], [1, 1, 1]],
    [[0, 1, 0], [0, 0, 0], [0, 0, 1], [0, 1, 1]],
    [[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 0, 1]],
    [[0, 0, 1], [1, 0, 1], [1, 1, 1], [0, 1, 1]],
  ],
  np.float32,
)


def box(low, high, covered=False) -> Mesh:
  """A box between two corners [3]. No underside, as nothing is seen from below, and no top if it is `covered`."""
  low, high = np.asarray(low, np.float32), np.asarray(high, np.float32)
  return _flat(low + (_CUBE[:4] if covered else _CUBE) * (high - low))


def sweep(rings, smooth=True) -> Mesh:
  """The surface through closed rings of points, [K, n, 3], each turning counter-clockwise as seen from the next.

  A ring may shrink to a point. `smooth` rounds the edges between neighbouring bands; around a ring it is always round.
  """
  rings = np.asarray(rings, np.float32)
  a, b = rings[:-1], rings[1:]
  a1, b1 = np.roll(a, -1, axis=1), np.roll(b, -1, axis=1)
  quads = np.stack([a, a1, b1, b], axis=2)  # [K-1, n, 4, 3]
  # Cross product of the diagonals: also right for the triangles at a pole.
  face = unit(cross(b1 - a, b - a1))
  low = high = face + np.roll(face, 1, axis=1)  # at the corner shared with the face before it on the ring
  if smooth:
    low, high = low.copy(), high.copy()
    low[1:] += high[:-1]
    high[:-1] = low[1:]
  low, high = unit(low), unit(high)
  normals = np.stack([low, np.roll(low, -1, axis=1), np.roll(high, -1, axis=1), high], axis=2)
  pole = np.ptp(a, axis=1).max(axis=-1) < 1e-6  # [K-1]: start the quad at its other end, so that it opens with 3 points
  quads[pole], normals[pole] = np.roll(quads[pole], 2, axis=2), np.roll(normals[pole], 2, axis=2)
  return Mesh(quads.reshape(-1, 4, 3), normals.reshape(-1, 4, 3))


def revolve(profile, segments=20, smooth=False) -> Mesh:
  """The solid of revolution about z of a profile [(radius, z), ...], listed from the bottom up along its outside."""
  radius, z = np.asarray(profile, np.float32).T
  turn = np.linspace(0, 2 * np.pi, segments, endpoint=False, dtype=np.float32)
  ring = np.stack([np.cos(turn), np.sin(turn), np.zeros_like(turn)], -1)
  rings = radius[:, None, None] * ring
  rings[..., 2] = z[:, None]
  return sweep(rings, smooth)


def tube(path, radius, segments=8, closed=False) -> Mesh:
  """A round tube along a path [K, 2] of (x, z) points in the plane y = 0."""
  path = np.asarray(path, np.float32)
  along = np.gradient(path, axis=0) if not closed else np.roll(path, -1, axis=0) - np.roll(path, 1, axis=0)
  along /= np.sqrt(np.sum(along * along, axis=-1, keepdims=True))
  turn = np.linspace(0, 2 * np.pi, segments, endpoint=False, dtype=np.float32)
  c, s = radius * np.cos(turn), radius * np.sin(turn)
  x = path[:, :1] - along[:, 1:] * c
  z = path[:, 1:] + along[:, :1] * c
  rings = np.stack([x, np.broadcast_to(-s, x.shape), z], -1)
  return sweep(np.concatenate([rings, rings[:1]]) if closed else rings, smooth=True)


def prism(outline, depth, inner=None) -> Mesh:
  """An outline [K, 2] of (x, z), counter-clockwise seen from -y, thickened to `depth` along y, centred on y = 0.

  The outline must be star-shaped around its mean, or `inner` [K, 2] gives for each of its points one on the other side
  of a band (an arch: outer and inner curve, both from the right foot to the left one); the band is open at its ends.
  """
  outline = np.asarray(outline, np.float32)
  at = lambda xz, y: np.stack([xz[:, 0], np.full(len(xz), y, np.float32), xz[:, 1]], -1)
  near, far = -depth / 2, depth / 2
  if inner is None:
    here, there = outline, np.roll(outline, -1, axis=0)
    middle = np.broadcast_to(outline.mean(0), outline.shape)
    caps = [(here, there, middle, middle)]
    sides = [(here, there)]
  else:
    inner = np.asarray(inner, np.float32)
    here, there = outline[:-1], outline[1:]
    caps = [(here, there, inner[1:], inner[:-1])]
    sides = [(here, there), (inner[1:], inner[:-1])]
  quads = [np.stack([at(p, near) for p in cap], 1) for cap in caps]
  quads += [np.stack([at(p, far) for p in (cap[1], cap[0], cap[3], cap[2])], 1) for cap in caps]
  quads += [np.stack([at(p, far), at(q, far), at(q, near), at(p, near)], 1) for p, q in sides]
  return _flat(np.concatenate(quads))


def _ball(u):
  turn = np.linspace(-np.pi / 2, np.pi / 2, 11)
  return revolve(np.stack([np.cos(turn), 1 + np.sin(turn)], -1), smooth=True)


def _box(u):
  x, y = 0.55 + 0.3 * u[0], 0.55 + 0.3 * u[1]
  return box((-x, -y, 0), (x, y, 1 + 0.5 * u[2]))


def _cylinder(u):
  r, h = 0.5 + 0.2 * u[0], 1.1 + 0.6 * u[1]
  return revolve([(0, 0), (r, 0), (r, h), (0, h)])


def _cone(u):
  r, h = 0.65 + 0.2 * u[0], 1.4 + 0.5 * u[1]
  return revolve([(0, 0), (r, 0), (0.02, h), (0, h)])


def _ring(u):
  r = 0.2 + 0.1 * u[0]
  turn = np.linspace(0, 2 * np.pi, 24, endpoint=False)
  return tube(np.stack([np.cos(turn), 1 + r + np.sin(turn)], -1), r, closed=True)


def _star(u):
  turn = np.pi / 2 + np.arange(10) * np.pi / 5
  radius = np.where(np.arange(10) % 2 == 0, 1, 0.38 + 0.12 * u[0])
  outline = np.stack([radius * np.cos(turn), 0.81 + radius * np.sin(turn)], -1)
  return prism(outline, 0.35 + 0.2 * u[1])


def _cross(u):
  w, a = 0.2 + 0.1 * u[0], 0.85 + 0.15 * u[1]
  x = np.array([w, w, a, a, w, w, -w, -w, -a, -a, -w, -w])
  z = np.array([-a, -w, -w, w, w, a, a, w, w, -w, -w, -a])
  return prism(np.stack([x, a + z], -1), 0.4 + 0.2 * u[2])


def _arch(u):
  thick, foot = 0.28 + 0.14 * u[0], 0.4 + 0.4 * u[1]
  turn = np.concatenate([[0], np.linspace(0, np.pi, 11), [np.pi]])
  lift = np.concatenate([[0], np.full(11, foot), [0]])
  band = lambda r: np.stack([r * np.cos(turn), lift + r * np.sin(turn)], -1)
  return prism(band(1.0), 0.5 + 0.25 * u[2], inner=band(1 - thick))


def _staircase(u):
  step, width = 0.45, 0.45 + 0.2 * u[0]
  rise = 0.38 + 0.12 * u[1]
  return join(*(box((step * (i - 2), -width, 0), (step * (i - 1), width, rise * (i + 1))) for i in range(4)))


def _table(u):
  x, y, h = 0.85 + 0.15 * u[0], 0.6 + 0.2 * u[1], 0.95 + 0.35 * u[2]
  leg, top = 0.17, 0.17
  legs = [
    box((cx - leg / 2, cy - leg / 2, 0), (cx + leg / 2, cy + leg / 2, h), covered=True)
    for cx in (leg - x, x - leg)
    for cy in (leg - y, y - leg)
  ]
  return join(box((-x, -y, h), (x, y, h + top)), *legs)


def _mug(u):
  r, h = 0.55 + 0.12 * u[0], 1.1 + 0.3 * u[1]
  body = revolve([(0, 0), (r, 0), (r, h), (r - 0.1, h), (r - 0.1, 0.2), (0, 0.2)])
  turn = np.linspace(-np.pi / 2, np.pi / 2, 9)
  handle = np.stack([r - 0.03 + 0.42 * np.cos(turn), 0.52 * h + 0.32 * h * np.sin(turn)], -1)
  return join(body, tube(handle, 0.1))


def _mushroom(u):
  stem, h, cap = 0.24 + 0.12 * u[0], 0.9 + 0.3 * u[1], 0.5 + 0.25 * u[2]
  turn = np.linspace(0, np.pi / 2, 7)
  dome = np.stack([0.85 * np.cos(turn), h + cap * np.sin(turn)], -1)
  return join(revolve([(stem, 0), (stem, h)]), revolve(dome, smooth=True))


# class -> (builder from three shares in [0, 1], how far it may be turned from facing the camera, in degrees)
SHAPES = {
  'ball': (_ball, 180),
  'box': (_box, 180),
  'cylinder': (_cylinder, 180),
  'cone': (_cone, 180),
  'ring': (_ring, 50),
  'star': (_star, 50),
  'cross': (_cross, 50),
  'arch': (_arch, 50),
  'staircase': (_staircase, 55),
  'table': (_table, 180),
  'mug': (_mug, 50),
  'mushroom': (_mushroom, 180),
}
CLASSES = tuple(SHAPES)


def solid(rng, label):
  """A random solid of class `label`, and a yaw in radians under which its class can be told.

  It stands at the origin and its extent, the longest of its three sides, is 1.
  """
  builder, swing = SHAPES[CLASSES[label]]
  mesh = builder(rng.random(3))
  flat = mesh.vertices.reshape(-1, 3)
  low, high = flat.min(0), flat.max(0)
  scale = 1 / (high - low).max()
  mesh = mesh.placed(scale=scale, offset=np.append(-(low + high)[:2] / 2 * scale, -low[2] * scale))
  yaw = math.radians(swing) * (2 * rng.random() - 1)
  # Half of those with a front show their back: the mug's handle and the staircase's low end point the other way.
  if rng.random() < 0.5:
    yaw += math.pi
  return mesh, yaw
