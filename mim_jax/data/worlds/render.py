"""A small deferred renderer on numpy and OpenCV: solids of quads on a ground plane, textured, lit and shadowed.

World axes: x right, y away from the viewer, z up, the ground at z = 0, metres. Camera axes: x right, y down, z forward.
Faces are drawn into an image of face numbers, nearest object last (`rasterise`); colour is then computed once per pixel
(`shade`). Objects must not intersect each other, and within a solid the faces' centres must order them by depth.
Everything is a function of its arguments: no random numbers are drawn here.
"""

import dataclasses
import math

import cv2
import numpy as np

_SUBPIXEL = 4  # bits of sub-pixel precision that OpenCV is given


def cross(a, b):
  """Cross product of vectors [..., 3]; several times faster than numpy's on small arrays."""
  ax, ay, az = a[..., 0], a[..., 1], a[..., 2]
  bx, by, bz = b[..., 0], b[..., 1], b[..., 2]
  out = np.empty(a.shape, np.float32)
  out[..., 0], out[..., 1], out[..., 2] = ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx
  return out


def unit(a):
  """Vectors [..., 3] at length 1; a zero stays zero."""
  return a / (np.sqrt(np.einsum('...i,...i->...', a, a)) + 1e-12)[..., None]


@dataclasses.dataclass(frozen=True)
class Camera:
  """A pinhole camera."""

  position: np.ndarray  # [3]
  rotation: np.ndarray  # [3, 3]: its rows are right, down and forward
  slope: float  # tan of half the field of view

  def see(self, points):
    """World points [..., 3] in camera axes."""
    return (points - self.position) @ self.rotation.T

  def project(self, seen):
    """Camera points [..., 3] -> [..., 2]: (x, y) as fractions of the image's sides, from the upper left corner."""
    return 0.5 + seen[..., :2] / (2 * self.slope * seen[..., 2:])


def look_at(position, target, slope, roll=0.0) -> Camera:
  """The camera at `position` [3] with `target` [3] in the middle of its image, `roll` radians off the upright."""
  position = np.asarray(position, np.float32)
  forward = unit(np.asarray(target, np.float32) - position)
  right = unit(np.array([forward[1], -forward[0], 0], np.float32))
  down = cross(forward, right)
  c, s = math.cos(roll), math.sin(roll)
  return Camera(position, np.stack([c * right + s * down, c * down - s * right, forward]).astype(np.float32), slope)


@dataclasses.dataclass(frozen=True)
class Texture:
  """Two colours [3] in [0, 1] mixed by a pattern over 3-D coordinates; `waves` [3, 3] and `phase` [3] place it."""

  pattern: str
  colours: np.ndarray
  waves: np.ndarray
  phase: np.ndarray

  def at(self, points):
    """Colour at points [3, P] -> [3, P]."""
    mix = PATTERNS[self.pattern]
    first, second = self.colours[..., None]
    if mix is None:
      return np.broadcast_to(first, points.shape)
    share = mix(self.waves @ points + self.phase[:, None])
    return first + np.clip(share, 0, 1) * (second - first)


def _marbled(w):
  a, b, c = w
  return 0.5 + 0.6 * np.sin(a + 2 * np.sin(0.6 * b + np.sin(0.7 * c)))


def _speckled(w):
  a, b, c = w
  return -0.6 + 1.4 * (np.sin(2.1 * a + np.sin(1.3 * b)) * np.sin(1.7 * b + np.sin(1.9 * c)) + np.sin(2.3 * c + a))


# name -> share of the second colour, given phases [3, P] along three axes; clipped to [0, 1] afterwards.
PATTERNS = {
  'plain': None,
  'striped': lambda w: 0.5 + 3 * np.sin(w[0]),
  'checked': lambda w: 0.5 + 4 * np.sin(w[0] / 2) * np.sin(w[1] / 2) * np.sin(w[2] / 2),
  'dotted': lambda w: 3 * (np.cos(w[0]) + np.cos(w[1]) + np.cos(w[2])) - 1.5,
  'marbled': _marbled,
  'speckled': _speckled,
}


@dataclasses.dataclass(frozen=True)
class Light:
  """A distant light and what is between it, the scene and the camera."""

  direction: np.ndarray  # [3] unit, towards the light
  tint: np.ndarray  # [3]
  ambient: float  # share of the light that comes from all around
  falloff: float  # share that is lost on the way from the brightest to the darkest end of the image
  brightest: float  # radians: where in the image the brightest end is, 0 = right, pi / 2 = bottom
  gloss: float
  haze: float  # metres after which the ground has faded to 1 / e
  backdrop: np.ndarray  # [3] colour of the haze


@dataclasses.dataclass(frozen=True)
class Raster:
  """What is seen where."""

  faces: np.ndarray  # [H, W] int32: number of the face seen, -1 = ground
  owner: np.ndarray  # [faces] int32: the object it belongs to
  planes: np.ndarray  # [faces, 7, 3]: times a pixel's ray = (1, normal, object coordinates) / distance along the ray
  silhouettes: np.ndarray  # [objects] int: pixels each object would cover were nothing in front of it

  def objects(self):
    """[H, W] int32: the object seen, -1 = ground."""
    return np.append(self.owner, np.int32(-1))[self.faces]

  def visible(self):
    """[objects]: the share of each object's silhouette that is seen, 0 to 1."""
    seen = np.bincount(self.objects().ravel() + 1, minlength=len(self.silhouettes) + 1)[1:]
    return seen / np.maximum(self.silhouettes, 1)


def _pixels(camera, seen, pixels):
  """Camera points -> OpenCV's fixed-point pixel coordinates (centre of the first pixel = 0)."""
  xy = camera.project(seen) * pixels - 0.5
  return np.rint(np.clip(xy, -4 * pixels, 5 * pixels) * (1 << _SUBPIXEL)).astype(np.int32)


def rasterise(solids, camera, pixels) -> Raster:
  """Draws world meshes [(mesh, local mesh), ...] into a [pixels, pixels] image of face numbers, the far objects first.

  The local mesh (same faces, own axes) gives the coordinates that textures follow.
  """
  image = np.full((pixels, pixels), -1, np.int32)
  centre = [np.linalg.norm(mesh.vertices.mean((0, 1)) - camera.position) for mesh, _ in solids]
  silhouettes = np.zeros(len(solids), np.int64)
  owner, planes, first = [], [], 0
  for number in np.argsort(centre)[::-1]:
    mesh, local = solids[number]
    v = camera.see(mesh.vertices)
    p, q, r = v[:, 0], v[:, 1], v[:, 2]
    qr = cross(q, r)
    volume = np.einsum('fi,fi->f', p, qr)  # its sign tells on which side of the face the camera is
    front = np.flatnonzero(volume < -1e-7)
    front = front[np.argsort(-np.einsum('fvi,fvi->f', v[front], v[front]))]  # far faces first
    p, q, r, qr, volume = p[front], q[front], r[front], qr[front], volume[front]
    # Rows of the inverse of [p q r]: they turn a ray into barycentric coordinates over its distance.
    inverse = np.stack([qr, cross(r, p), cross(p, q)], 1) / volume[:, None, None]
    values = np.concatenate(
      [np.ones((len(front), 3, 1), np.float32), mesh.normals[front, :3], local.vertices[front, :3]], -1
    )
    planes.append(np.swapaxes(values, 1, 2) @ inverse)
    owner.append(np.full(len(front), number, np.int32))
    for index, corners in enumerate(_pixels(camera, v[front], pixels), first):
      cv2.fillConvexPoly(image, corners, index, shift=_SUBPIXEL)
    silhouettes[number] = np.count_nonzero(image >= first)
    first += len(front)
  return Raster(image, np.concatenate(owner), np.concatenate(planes).astype(np.float32), silhouettes)


def _shadow(solids, camera, light, pixels, drawn):
  """[pixels, pixels] float32: how much of the light is kept from the ground, drawn at `drawn` pixels and softened."""
  image = np.zeros((drawn, drawn), np.uint8)
  for mesh, _ in solids:
    v = mesh.vertices[mesh.normals.mean(1) @ light.direction > 0]
    v = v - v[..., 2:] / light.direction[2] * light.direction
    seen = camera.see(v)
    seen = seen[seen[..., 2].min(axis=1) > 0.2]  # what falls behind the camera cannot be projected
    for corners in _pixels(camera, seen, drawn):
      cv2.fillConvexPoly(image, corners, 255, shift=_SUBPIXEL)
  image = cv2.GaussianBlur(image, (0, 0), drawn / 64)
  return cv2.resize(image, (pixels, pixels), interpolation=cv2.INTER_LINEAR).astype(np.float32) / 255


def shade(raster, solids, textures, ground, camera, light, drawn):
  """Colours every pixel: [H, W, 3] float32, not clipped.

  Args:
    raster, solids: from and for `rasterise`.
    textures: one per solid, over its own axes.
    ground: the texture of the plane z = 0, over world axes.
    camera, light: where from and how it is lit.
    drawn: side in pixels of the final image, for the softness of shadows.
  """
  pixels = raster.faces.shape[0]
  axis = ((np.arange(pixels, dtype=np.float32) + 0.5) / pixels - 0.5) * (2 * camera.slope)
  rays = np.ones((3, pixels, pixels), np.float32)
  rays[0], rays[1] = axis[None, :], axis[:, None]
  rays = rays.reshape(3, -1)
  faces = raster.faces.ravel()
  out = np.empty_like(rays)

  floor = np.flatnonzero(faces < 0)
  ray = camera.rotation.T @ rays[:, floor]
  far = ray[2] > -1e-3  # at and above the horizon
  reach = -camera.position[2] / np.where(far, -1, ray[2])
  light_kept = 1 - _shadow(solids, camera, light, pixels, drawn).ravel()[floor]
  lit = light.ambient + (1 - light.ambient) * light.direction[2] * light_kept
  colour = ground.at(camera.position[:, None] + ray * reach)
  clear = np.where(far, 0, np.exp(reach * (-1 / light.haze)))
  lit *= clear
  for c in range(3):
    out[c, floor] = colour[c] * (lit * light.tint[c]) + (1 - clear) * light.backdrop[c]

  body = np.flatnonzero(faces >= 0)
  face, ray = faces[body], rays[:, body]
  planes = raster.planes.transpose(2, 1, 0).copy().take(face, axis=2)  # [3, 7, P]
  values = planes[0] * ray[0]
  values += planes[1] * ray[1]
  values += planes[2]
  normal, local = values[1:4], values[4:] / values[0]
  normal *= 1 / np.sqrt(normal[0] * normal[0] + normal[1] * normal[1] + normal[2] * normal[2] + 1e-12)
  half = light.direction[:, None] - camera.rotation.T @ (ray / np.sqrt(ray[0] * ray[0] + ray[1] * ray[1] + 1))
  half *= 1 / np.sqrt(half[0] * half[0] + half[1] * half[1] + half[2] * half[2] + 1e-12)
  direct = np.maximum(light.direction @ normal, 0)
  shine = normal[0] * half[0] + normal[1] * half[1] + normal[2] * half[2]
  shine = np.maximum(shine, 0) ** 2  # to the power of 24, by squaring: numpy's power is slow
  shine = (shine * shine) ** 2
  shine *= shine * shine * (light.gloss * (direct > 0))
  # Surfaces that face the ground, and those close to it, get less of the surrounding light.
  around = light.ambient * (0.75 + 0.25 * normal[2]) * (0.7 + 0.3 * np.clip(local[2] * 4, 0, 1))
  lit = around + (1 - light.ambient) * direct
  owner = raster.owner[face]
  for number, texture in enumerate(textures):
    mine = np.flatnonzero(owner == number)
    colour, lit_here, shine_here, where = texture.at(local[:, mine]), lit[mine], shine[mine], body[mine]
    for c in range(3):
      out[c, where] = colour[c] * (lit_here * light.tint[c]) + shine_here
  out = out.reshape(3, pixels, pixels)
  x, y = math.cos(light.brightest), math.sin(light.brightest)
  lost = light.falloff / 2 / (abs(x) + abs(y)) / camera.slope  # the ends are two corners, or two sides
  out *= 1 - light.falloff / 2 + axis * (lost * x) + (axis * (lost * y))[:, None]
  return cv2.merge(list(out))
