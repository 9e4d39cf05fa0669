"""Pictures, their files, and a transform run on one example, for the tests of images, decoding and the transform language."""

import io

import cv2
import numpy as np
from PIL import Image

from mim_jax.data.images import parse


def photograph(height, width, seed=0):
  """uint8 [H, W, 3] with the spectrum of a natural image, some sharp edges and related channels."""
  rng = np.random.default_rng(seed)
  fy, fx = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]
  falloff = 1 / np.maximum(np.hypot(fy, fx), 1 / max(height, width)) ** 1.5
  planes = [np.fft.ifft2(np.fft.fft2(rng.standard_normal((height, width))) * falloff).real for _ in range(4)]
  image = np.stack([planes[3] + 0.4 * p for p in planes[:3]], axis=-1)
  image = 128 + 45 * (image - image.mean()) / image.std()
  for _ in range(6):
    y, x, h, w = (rng.random(4) * [height, width, height / 3, width / 3]).astype(int)
    image[y : y + h, x : x + w] += rng.normal(0, 30, 3)
  return np.clip(image, 0, 255).astype(np.uint8)


def jpeg(image, **options):
  out = io.BytesIO()
  Image.fromarray(image.squeeze()).save(out, 'JPEG', quality=92, **options)
  return out.getvalue()


def encoded(image, extension):
  return cv2.imencode(extension, image[..., ::-1])[1].tobytes()


def generator(seed=0):
  return np.random.Generator(np.random.Philox(seed))


def run(text, example, seed=0):
  transforms = parse(text)
  return transforms.batch(transforms.example(example, generator(seed)))
