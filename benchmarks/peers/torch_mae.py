"""MAE's training step in PyTorch, on CPU: a peer of benchmarks/cpu_step.py. Needs torch alone.

  python benchmarks/peers/torch_mae.py --size B --batch 16 --steps 4

Written anew from the paper (arXiv 2111.06377) in the form that PyTorch code for it takes: blocks as timm has them (`nn.LayerNorm`, one
`nn.Linear` for queries, keys and values, `scaled_dot_product_attention`, MLP with exact GELU), a convolution for the patches, 75 % of the
patches hidden by sorting noise, mean squared error on normalised pixels of the hidden ones, AdamW (the fused one, which is the fastest on
CPU) with no decay of one-dimensional tensors. `--compile` puts the model through torch.compile. The step has neither the guard against
non-finite values nor the norms among the metrics that ours has.

Prints `images_per_second N`: images of the timed steps over their seconds, after `--warmup` steps.
"""

import argparse
import os
import time

import torch
import torch.nn.functional as F
from torch import nn

SIZES = {'Ti': (192, 12, 3), 'S': (384, 12, 6), 'B': (768, 12, 12), 'L': (1024, 24, 16), 'H': (1280, 32, 16)}


class Attention(nn.Module):
  """Multi-head self-attention: x [B, N, D] -> [B, N, D]."""

  def __init__(self, width, heads):
    super().__init__()
    self.heads = heads
    self.qkv = nn.Linear(width, 3 * width)
    self.proj = nn.Linear(width, width)

  def forward(self, x):
    b, n, d = x.shape
    q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v)
    return self.proj(y.transpose(1, 2).reshape(b, n, d))


class Block(nn.Module):
  """Pre-norm transformer block: x [B, N, D] -> [B, N, D]."""

  def __init__(self, width, heads):
    super().__init__()
    self.norm1 = nn.LayerNorm(width, eps=1e-6)
    self.attn = Attention(width, heads)
    self.norm2 = nn.LayerNorm(width, eps=1e-6)
    self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

  def forward(self, x):
    x = x + self.attn(self.norm1(x))
    return x + self.mlp(self.norm2(x))


def stack(width, depth, heads):
  """`depth` blocks and a LayerNorm."""
  return nn.Sequential(*[Block(width, heads) for _ in range(depth)], nn.LayerNorm(width, eps=1e-6))


def table(side, width):
  """Fixed sin-cos positions [1, 1 + side^2, width], zeros for the class token."""
  rates = 1 / 10000 ** (torch.arange(width // 4) / (width // 4))
  along = torch.arange(side)[:, None] * rates
  along = torch.cat([along.sin(), along.cos()], dim=1)
  places = torch.cat([along.repeat(side, 1), along.repeat_interleave(side, 0)], dim=1)
  return torch.cat([torch.zeros(1, width), places])[None]


class MAE(nn.Module):
  """image [B, 3, H, W] -> loss."""

  def __init__(self, size, decoder, patch, image_size, ratio):
    super().__init__()
    width, depth, heads = size
    inner, inner_depth, inner_heads = decoder
    side = image_size // patch
    self.patch, self.kept = patch, int(side * side * (1 - ratio))
    self.embed = nn.Conv2d(3, width, patch, stride=patch)
    self.cls = nn.Parameter(0.02 * torch.randn(1, 1, width))
    self.hidden = nn.Parameter(0.02 * torch.randn(1, 1, inner))
    self.register_buffer('places', table(side, width))
    self.register_buffer('inner_places', table(side, inner))
    self.encoder = stack(width, depth, heads)
    self.bridge = nn.Linear(width, inner)
    self.decoder = stack(inner, inner_depth, inner_heads)
    self.head = nn.Linear(inner, 3 * patch * patch)

  def target(self, image):
    """Patches [B, N, p p 3] less their mean, over their deviation."""
    b, c, h, w = image.shape
    p = self.patch
    cut = image.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1).reshape(b, -1, p * p * c)
    return (cut - cut.mean(-1, keepdim=True)) / (cut.var(-1, keepdim=True) + 1e-6).sqrt()

  def forward(self, image):
    x = self.embed(image).flatten(2).transpose(1, 2) + self.places[:, 1:]
    b, n, d = x.shape
    order = torch.rand(b, n).argsort(1)
    restore = order.argsort(1)
    x = x.gather(1, order[:, : self.kept, None].expand(-1, -1, d))
    x = self.encoder(torch.cat([(self.cls + self.places[:, :1]).expand(b, -1, -1), x], dim=1))
    x = self.bridge(x)
    patches = torch.cat([x[:, 1:], self.hidden.expand(b, n - self.kept, -1).to(x.dtype)], dim=1)
    patches = patches.gather(1, restore[:, :, None].expand(-1, -1, x.shape[2]))
    x = self.decoder(torch.cat([x[:, :1], patches], dim=1) + self.inner_places)
    error = (self.head(x)[:, 1:].float() - self.target(image)).square().mean(-1)
    mask = (restore >= self.kept).float()
    return (error * mask).sum() / mask.sum()


def numbers(text):
  return SIZES.get(text) or tuple(int(part) for part in text.split('/'))


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--size', default='B', help="encoder: Ti, S, B, L, H or 'width/depth/heads'")
  parser.add_argument('--decoder', default='512/8/16', help='width/depth/heads')
  parser.add_argument('--patch', type=int, default=16)
  parser.add_argument('--image-size', type=int, default=224)
  parser.add_argument('--mask-ratio', type=float, default=0.75)
  parser.add_argument('--batch', type=int, default=16)
  parser.add_argument('--steps', type=int, default=4)
  parser.add_argument('--warmup', type=int, default=2)
  parser.add_argument('--threads', type=int, default=2)
  parser.add_argument('--bf16', action='store_true', help='autocast to bfloat16')
  parser.add_argument('--compile', action='store_true', help='torch.compile; needs a C++ compiler')
  args = parser.parse_args()

  os.environ.setdefault('OMP_NUM_THREADS', str(args.threads))
  torch.set_num_threads(args.threads)
  torch.manual_seed(0)
  model = MAE(numbers(args.size), numbers(args.decoder), args.patch, args.image_size, args.mask_ratio)
  parts = [[p for p in model.parameters() if (p.ndim > 1) == decayed] for decayed in (True, False)]
  groups = [{'params': parts[0], 'weight_decay': 0.05}, {'params': parts[1], 'weight_decay': 0.0}]
  optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
  images = torch.randn(args.batch, 3, args.image_size, args.image_size)
  forward = torch.compile(model) if args.compile else model

  def step():
    with torch.autocast('cpu', torch.bfloat16, enabled=args.bf16):
      loss = forward(images)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()

  for count in (args.warmup, args.steps):
    start = time.perf_counter()
    for _ in range(count):
      step()
    seconds = time.perf_counter() - start
  print(f'images_per_second {args.steps * args.batch / seconds}')


if __name__ == '__main__':
  main()
