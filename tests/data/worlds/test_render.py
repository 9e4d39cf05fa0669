import dataclasses
import math

import numpy as np
import pytest

from mim_jax.data.worlds import render, solids

SLOPE = 0.4
LIGHT = render.Light(
  direction=np.array([0, 0, 1], np.float32),
  tint=np.ones(3, np.float32),
  ambient=0.4,
  falloff=0.0,
  brightest=0.0,
  gloss=0.0,
  haze=1e6,
  backdrop=np.zeros(3, np.float32),
)


def ball(radius=1.0):
  turn = np.linspace(-np.pi / 2, np.pi / 2, 25)
  profile = np.stack([np.cos(turn), np.sin(turn)], -1) * radius
  return solids.revolve(profile, segments=48, smooth=True)


def plain(colour):
  colours = np.array([colour, colour], np.float32)
  return render.Texture('plain', colours, np.eye(3, dtype=np.float32), np.zeros(3, np.float32))


def scene(*meshes):
  return [(mesh, mesh) for mesh in meshes]


def test_a_target_is_in_the_middle_and_axes_point_right_and_down():
  camera = render.look_at((1, -5, 2), (1, 0, 2), SLOPE)
  points = np.array([[1, 0, 2], [1.5, 0, 2], [1, 0, 2.5]], np.float32)
  want = [[0.5, 0.5], [0.5 + 0.5 / (2 * SLOPE * 5), 0.5], [0.5, 0.5 - 0.5 / (2 * SLOPE * 5)]]
  np.testing.assert_allclose(camera.project(camera.see(points)), want, atol=1e-6)
  turned = render.look_at((1, -5, 2), (1, 0, 2), SLOPE, roll=math.pi / 2)
  np.testing.assert_allclose(turned.rotation @ turned.rotation.T, np.eye(3), atol=1e-6)
  np.testing.assert_allclose(turned.project(turned.see(points[:1])), [[0.5, 0.5]], atol=1e-6)


def test_a_ball_covers_the_area_that_geometry_says():
  camera = render.look_at((0, -5, 0), (0, 0, 0), SLOPE)
  raster = render.rasterise(scene(ball()), camera, 256)
  radius = math.tan(math.asin(1 / 5)) / (2 * SLOPE) * 256  # of the cone that touches the ball
  assert raster.silhouettes[0] == pytest.approx(math.pi * radius**2, rel=0.02)
  assert raster.visible() == pytest.approx([1.0])


@pytest.mark.parametrize('yaw', [0.0, 0.7])
def test_pixels_know_the_surface_they_show(yaw):
  camera = render.look_at((0.3, -5, 1.5), (0, 0, 0), SLOPE, roll=0.2)
  mesh = ball()
  raster = render.rasterise([(mesh.placed(yaw, 0.8), mesh)], camera, 64)
  body = raster.faces >= 0
  y, x = np.nonzero(body)
  rays = np.stack([(x + 0.5) / 64 - 0.5, (y + 0.5) / 64 - 0.5, np.full(len(x), 0.5 / SLOPE)], -1) * 2 * SLOPE
  values = np.einsum('pij,pj->pi', raster.planes[raster.faces[body]], rays)
  distance, normal, local = 1 / values[:, 0], values[:, 1:4] / values[:, :1], values[:, 4:] / values[:, :1]
  world = rays * distance[:, None] @ camera.rotation + camera.position
  passing = np.cross(rays, camera.rotation @ -camera.position)  # over the ray's length: how near it comes to the middle
  inner = np.linalg.norm(passing, axis=1) / np.linalg.norm(rays, axis=1) < 0.7
  assert inner.sum() > 200
  np.testing.assert_allclose(np.linalg.norm(local[inner], axis=1), 1, atol=0.02)
  np.testing.assert_allclose(np.linalg.norm(world[inner], axis=1), 0.8, atol=0.02)
  c, s = math.cos(yaw), math.sin(yaw)
  np.testing.assert_allclose(world[inner], 0.8 * local[inner] @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]]), atol=1e-3)
  np.testing.assert_allclose(normal[inner], world[inner] / 0.8, atol=0.05)


def test_the_nearer_object_hides_the_farther_whatever_their_order():
  camera = render.look_at((0, -6, 1), (0, 0, 1), SLOPE)
  near, far = solids.box((-0.3, -2, 0), (0.3, -1.5, 2)), solids.box((-1, 1, 0), (1, 2, 2))
  for order in (0, 1):
    meshes = [near, far][:: 1 - 2 * order]
    raster = render.rasterise(scene(*meshes), camera, 64)
    assert raster.objects()[32, 32] == order
    assert raster.objects()[32, 24] == 1 - order
    assert raster.objects()[32, 2] == -1
    share = raster.visible()
    assert share[order] == 1 and 0.3 < share[1 - order] < 0.8


def test_a_ring_has_a_hole_and_an_arch_an_opening():
  turn = np.linspace(0, 2 * np.pi, 24, endpoint=False)
  ring = solids.tube(np.stack([np.cos(turn), 1.2 + np.sin(turn)], -1), 0.2, closed=True)
  bow = np.linspace(0, np.pi, 13)
  outer = np.stack([np.cos(bow), np.sin(bow)], -1)
  arch = solids.prism(outer, 0.4, inner=0.6 * outer)
  for mesh, middle in ((ring, 1.2), (arch, 0.25)):
    camera = render.look_at((0, -6, middle), (0, 0, middle), SLOPE)
    seen = render.rasterise(scene(mesh), camera, 128).objects()
    assert seen[64, 64] == -1
    assert (seen[64] == 0).sum() > 8
    inside = np.flatnonzero(seen[64] == 0)
    assert inside.min() < 64 < inside.max()


def test_surfaces_face_outwards():
  outline = np.array([[-1, 0], [1, 0], [1, 1], [-1, 1]], np.float32)
  for mesh in (ball(), solids.box((-1, -1, 0), (1, 1, 1)), solids.prism(outline, 1.0)):
    middle = mesh.vertices.mean((0, 1))
    away = np.einsum('fvi,fvi->fv', mesh.normals, mesh.vertices - middle)
    assert (away > 0).all()
    p, q, r = (mesh.vertices[:, k] for k in range(3))
    np.testing.assert_array_less(0, np.einsum('fi,fi->f', np.cross(q - p, r - p), mesh.normals.mean(1)))


def test_light_from_above_makes_tops_bright_sides_dark_and_casts_a_shadow():
  camera = render.look_at((0, -5, 4), (0, 0, 0.5), SLOPE)
  meshes = scene(solids.box((-0.5, -0.5, 0.5), (0.5, 0.5, 1)))  # hovers, so that its shadow is seen below it
  raster = render.rasterise(meshes, camera, 128)
  image = render.shade(raster, meshes, [plain((1, 0, 0))], plain((0, 1, 0)), camera, LIGHT, 128)
  assert image.shape == (128, 128, 3) and image.dtype == np.float32
  at = lambda *point: image[tuple(int(v * 128) for v in camera.project(camera.see(np.array(point)))[::-1])]
  np.testing.assert_allclose(at(0, 0, 1), [1, 0, 0], atol=0.02)
  side = at(0, -0.5, 0.75)
  assert side[0] == pytest.approx(0.4 * 0.75, abs=0.02)  # ambient light only
  np.testing.assert_allclose(at(1.5, 0, 0), [0, 1, 0], atol=0.02)
  np.testing.assert_allclose(at(0, -0.35, 0), [0, 0.4, 0], atol=0.05)  # in the shadow


def test_haze_hides_the_distance_and_falloff_darkens_one_side():
  camera = render.look_at((0, -5, 1), (0, 0, 1), SLOPE)
  meshes = scene(solids.box((-0.1, -0.1, 0), (0.1, 0.1, 0.1)))
  raster = render.rasterise(meshes, camera, 64)
  shade = lambda **changes: render.shade(
    raster, meshes, [plain((1, 1, 1))], plain((0.5, 0.5, 0.5)), camera, dataclasses.replace(LIGHT, **changes), 64
  )
  hazy = shade(haze=5.0, backdrop=np.array([0, 0, 1], np.float32))
  np.testing.assert_allclose(hazy[0, 5], [0, 0, 1], atol=1e-3)
  assert hazy[-1, 5, 2] < hazy[40, 5, 2] < hazy[33, 5, 2]
  uneven = shade(falloff=0.6)[-1, :, 0]
  assert uneven[-1] == pytest.approx(0.5, abs=0.01) and uneven[0] == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize('pattern', [p for p, mix in render.PATTERNS.items() if mix])
def test_patterns_mix_two_colours(pattern):
  rng = np.random.default_rng(0)
  points = rng.uniform(-10, 10, (3, 4000)).astype(np.float32)
  colours = np.array([[0, 0.2, 0], [1, 0.2, 0]], np.float32)
  texture = render.Texture(pattern, colours, np.eye(3, dtype=np.float32), np.zeros(3, np.float32))
  red, green, blue = texture.at(points)
  assert red.min() == 0 and red.max() == 1 and 0.1 < red.mean() < 0.9
  assert np.ptp(green) < 1e-6 and not blue.any()
