"""JPEGs to training batches by PyTorch's DataLoader and Pillow on one core: a peer of benchmarks/input_pipeline.py.

  python benchmarks/peers/torch_loader.py FOLDER --batch 64 --seconds 10

Needs torch and pillow, not torchvision, whose transforms are done here in the same way: RandomResizedCrop's draws of (0.2, 1.0) of the area
and 3/4 to 4/3 of aspect, Pillow's bicubic resize of that box to 224, flip, float32 tensor [3, H, W], normalised. `--workers` processes make
the batches (1; 0 for none), all on the first core that this process may use.

Prints `images_per_second N`.
"""

import math
import os
import random

os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])

import numpy as np  # noqa: E402
import timing  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

MEAN, STD = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def crop(width, height):
  """Box (left, top, right, bottom) as torchvision's RandomResizedCrop draws it."""
  for _ in range(10):
    area = width * height * random.uniform(0.2, 1.0)
    aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      left, top = random.randint(0, width - w), random.randint(0, height - h)
      return left, top, left + w, top + h
  w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
  left, top = (width - w) // 2, (height - h) // 2
  return left, top, left + w, top + h


class Pictures(torch.utils.data.Dataset):
  """float32 [3, size, size] of the JPEGs below a folder."""

  def __init__(self, folder, size):
    self.paths = sorted(path for path in folder.rglob('*') if path.suffix.lower() in ('.jpg', '.jpeg'))
    self.size = size

  def __len__(self):
    return len(self.paths)

  def __getitem__(self, index):
    with open(self.paths[index], 'rb') as file:
      image = Image.open(file).convert('RGB')
    image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=crop(*image.size))
    if random.random() < 0.5:
      image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div_(255)
    return tensor.sub_(MEAN).div_(STD)


def main():
  parser = timing.arguments(__doc__)
  parser.add_argument('--workers', type=int, default=1)
  args = parser.parse_args()
  torch.set_num_threads(1)
  random.seed(0)

  pictures = Pictures(args.folder, args.size)
  # One endless epoch: at the start of another one all batches would be waited for.
  order = torch.utils.data.RandomSampler(pictures, replacement=True, num_samples=10**7)
  loader = torch.utils.data.DataLoader(pictures, args.batch, sampler=order, num_workers=args.workers)
  made = timing.measure(iter(loader), args)
  assert made.shape == (args.batch, 3, args.size, args.size) and made.dtype == torch.float32


if __name__ == '__main__':
  main()
