"""Pictures as uint8 arrays: labelled grids and panels of images, volumes and many-channel images, and curves.

An image is [H, W], [H, W, C] or, for a volume, [D, H, W, C]; pixels are uint8, bool, or floats in [0, 1].
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

FONT, FONT_SCALE = cv2.FONT_HERSHEY_SIMPLEX, 0.5
FINE = 4  # text is drawn this many times larger and shrunk: at its own size letters land on whole pixels, unevenly
INK, EDGE, PAPER = 35, 205, 255  # grey of text, image borders, page
LINE = 22  # height of a line of text, pixels
GAP = 6  # between cells, pixels
SMALLEST, LARGEST = 160, 384  # pixels; small images are enlarged to about the one, large ones shrunk to the other
SLICES, CHANNELS = 9, 16  # most slices of a volume and most channels of an image that are shown
COLORS = ('#2563a8', '#d9762b', '#2f8f5b', '#8a5ab5', '#c0392b', '#2aa7b8', '#8c6d31', '#6b7280')


def to_uint8(image, mean=0.0, std=1.0) -> np.ndarray:
  """Pixels [0, 255] of normalised floats: image * std + mean, cut to [0, 1]; image [..., C], mean and std () or [C].

  uint8 passes unchanged, bool becomes 0 or 255, NaN becomes 0. Raises ValueError for other integers: their range is not
  known here.
  """
  image = np.asarray(image)
  if image.dtype == np.uint8:
    return image
  if image.dtype == bool:
    return image * np.uint8(255)
  if image.dtype.kind in 'iu':
    raise ValueError(f'picture of dtype {image.dtype}: expected uint8, bool or floats; divide by its range first')
  scaled = image.astype(np.float32) * np.asarray(std, np.float32) + np.asarray(mean, np.float32)
  return np.rint(np.clip(np.nan_to_num(scaled), 0, 1) * 255).astype(np.uint8)


def visible(image) -> np.ndarray:
  """One image or volume as [H', W', 3] uint8 that the eye can read.

  One channel is grey, three are RGB, any other number is a mosaic of grey channels; a volume is a mosaic of slices.
  Of more than 16 channels or 9 slices that many are shown, evenly spaced.
  """
  image = to_uint8(image)
  if image.ndim == 2:
    image = image[..., None]
  if image.ndim == 4:
    return _mosaic([visible(image[i]) for i in _spread(image.shape[0], SLICES)])
  if image.ndim != 3:
    raise ValueError(f'picture of shape {image.shape}: expected [H, W], [H, W, C] or [D, H, W, C]')
  channels = image.shape[-1]
  if channels == 3:
    return image
  if channels == 1:
    return np.repeat(image, 3, axis=-1)
  return _mosaic([visible(image[..., i]) for i in _spread(channels, CHANNELS)])


def grid(rows: Sequence[Sequence], titles: Sequence[str] = (), labels: Sequence[str] = ()) -> np.ndarray:
  """Rows of images on a white page [H, W, 3] uint8, with `titles` over the columns and `labels` left of the rows.

  An entry is an image or a pair (image, caption); the caption goes under it. All images get the same longest side,
  small ones by repeating pixels. Rows may differ in length. Raises ValueError when there is nothing to show.
  """
  cells = [[_cell(entry) for entry in row] for row in rows]
  flat = [image for row in cells for image, _ in row]
  if not flat:
    raise ValueError('a grid needs at least one image')
  longest = max(max(image.shape[:2]) for image in flat)
  side = min(LARGEST, longest * max(1, round(SMALLEST / longest)))
  cells = [[(_resize(image, side), caption) for image, caption in row] for row in cells]
  columns = max(len(row) for row in cells)
  widths = [
    max(
      _text_width(titles[c]) if c < len(titles) else 0,
      *(max(row[c][0].shape[1], _text_width(row[c][1])) for row in cells if c < len(row)),
    )
    for c in range(columns)
  ]
  images = [max((image.shape[0] for image, _ in row), default=0) for row in cells]
  captions = [LINE if any(caption for _, caption in row) else 0 for row in cells]
  left = GAP + (max(_text_width(label) for label in labels) + GAP if any(labels) else 0)
  top = GAP + (LINE if any(titles) else 0)
  height, width = top + sum(images) + sum(captions) + GAP * len(cells), left + sum(widths) + GAP * columns
  page = np.full((height, width, 3), PAPER, np.uint8)
  lefts = [left + sum(widths[:c]) + GAP * c for c in range(columns)]
  for title, x, width in zip(titles, lefts, widths, strict=False):
    _write(page, title, x + (width - _text_width(title)) // 2, GAP)
  y = top
  for r, row in enumerate(cells):
    if r < len(labels):
      _write(page, labels[r], GAP, y + (images[r] - LINE) // 2)
    for (image, caption), x, width in zip(row, lefts, widths, strict=False):
      height, wide = image.shape[:2]
      down, right = y + (images[r] - height) // 2, x + (width - wide) // 2
      page[down - 1 : down + height + 1, right - 1 : right + wide + 1] = EDGE  # so that white pixels end somewhere
      page[down : down + height, right : right + wide] = image
      _write(page, caption, x + (width - _text_width(caption)) // 2, y + images[r])
    y += images[r] + captions[r] + GAP
  return page


def panel(columns: Mapping[str, np.ndarray], labels: Sequence[str] = (), count: int = 8) -> np.ndarray:
  """Batches of images side by side as [H', W', 3] uint8: a column per title, a row per example.

  columns: {title: [B, H, W], [B, H, W, C] or [B, D, H, W, C]}; they may differ in size and channels, not in B. The
  first `count` examples are shown, with `labels` left of them. Raises ValueError when B differs.
  """
  sizes = {title: len(images) for title, images in columns.items()}
  if len(set(sizes.values())) != 1:
    raise ValueError(f'the columns of a panel need the same number of images, got {sizes}')
  shown = [to_uint8(np.asarray(images)[:count]) for images in columns.values()]
  return grid(list(zip(*shown, strict=True)), titles=list(columns), labels=labels[:count])


def curve(
  series: Mapping[str, tuple[Sequence, Sequence]],
  path: str | Path | None = None,
  title: str = '',
  xlabel: str = 'step',
  ylabel: str = 'loss',
  log_y: bool = False,
) -> np.ndarray:
  """Lines over each other, {name: (x, y)} -> [H, W, 3] uint8, also written to `path` as PNG. NaN leaves a gap.

  A line of more than 150 points is drawn faintly, with its running mean over 1/40 of the points on top.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg  # 0.5 s to import, so only for who draws curves
  from matplotlib.figure import Figure
  from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

  figure = Figure(figsize=(7.2, 4.2), dpi=130, layout='constrained', facecolor='white')
  canvas = FigureCanvasAgg(figure)
  axes = figure.add_subplot()
  for i, (name, (x, y)) in enumerate(series.items()):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    style = {'color': COLORS[i % len(COLORS)], 'linestyle': ('-', '--', ':')[i // len(COLORS) % 3]}
    if len(x) > 150:
      axes.plot(x, y, **style, linewidth=0.8, alpha=0.25)
      axes.plot(x, _running_mean(y, len(y) // 80), **style, linewidth=1.8, label=name)
    else:
      axes.plot(x, y, **style, linewidth=1.8, marker='o' if len(x) <= 25 else None, markersize=4, label=name)
  whole = all(np.all(np.mod(x, 1) == 0) for x, _ in series.values())
  axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10], integer=whole))
  axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:,.10g}'))
  if log_y:
    axes.set_yscale('log')
    low, high = axes.get_ylim()
    decades = math.log10(high / low)
    subs = (1,) if decades > 3 else (1, 2, 5) if decades > 1 else (1, 1.5, 2, 3, 4, 5, 6, 8)
    axes.yaxis.set_major_locator(LogLocator(subs=subs) if decades > 0.4 else MaxNLocator(nbins=6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
    axes.yaxis.set_minor_locator(NullLocator())
  axes.set_xlabel(xlabel, color='#444444')
  axes.set_ylabel(ylabel, color='#444444')
  axes.set_title(title, loc='left', fontsize=12, color='#222222')
  axes.grid(True, color='#e6e6e6', linewidth=0.8)
  axes.set_axisbelow(True)
  axes.tick_params(which='both', length=0, colors='#555555', labelsize=9)
  for edge in ('top', 'right', 'left'):
    axes.spines[edge].set_visible(False)
  axes.spines['bottom'].set_color('#999999')
  axes.margins(x=0.02)
  if len(series) > 1:
    # Beside the lines: within them, a method with many losses has no place that is free.
    axes.legend(loc='center left', bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9, labelcolor='#222222')
  canvas.draw()
  image = np.asarray(canvas.buffer_rgba())[..., :3].copy()
  if path is not None:
    save(path, image)
  return image


def save(path: str | Path, image: np.ndarray):
  """Writes uint8 [H, W], [H, W, 1] or [H, W, 3] (RGB) as PNG, making its folder; never half a file, even when killed.

  Raises ValueError for any other array.
  """
  image = np.asarray(image)
  if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[-1] not in (1, 3)):
    raise ValueError(f'{path}: expected uint8 [H, W], [H, W, 1] or [H, W, 3], got {image.dtype} {image.shape}')
  if image.ndim == 3 and image.shape[-1] == 3:
    image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(f'.{path.name}.part')
  part.write_bytes(cv2.imencode('.png', image)[1].tobytes())
  os.replace(part, path)


def _spread(total, most):
  shown = min(total, most)
  return [int((i + 0.5) * total / shown) for i in range(shown)]


def _mosaic(tiles):
  height, width = tiles[0].shape[:2]
  columns = math.ceil(math.sqrt(len(tiles)))
  rows = math.ceil(len(tiles) / columns)
  gap = max(1, max(height, width) // 40)
  page = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), PAPER, np.uint8)
  for i, tile in enumerate(tiles):
    y, x = i // columns * (height + gap), i % columns * (width + gap)
    page[y : y + height, x : x + width] = tile
  return page


def _cell(entry):
  image, caption = entry if isinstance(entry, tuple) else (entry, '')
  return visible(image), caption


def _resize(image, side):
  height, width = image.shape[:2]
  scale = side / max(height, width)
  size = max(1, round(width * scale)), max(1, round(height * scale))
  return cv2.resize(image, size, interpolation=cv2.INTER_NEAREST if scale >= 1 else cv2.INTER_AREA)


def _text_width(text):
  return math.ceil(cv2.getTextSize(text, FONT, FONT_SCALE * FINE, FINE + 1)[0][0] / FINE) + 2 if text else 0


def _write(page, text, x, y):
  """Text on `page` whose line begins at (x, y) and is LINE high."""
  if not text:
    return
  width = min(_text_width(text), page.shape[1] - x)
  large = np.zeros((LINE * FINE, width * FINE), np.uint8)
  cv2.putText(large, text, (FINE, (LINE - 7) * FINE), FONT, FONT_SCALE * FINE, 255, FINE + 1, cv2.LINE_AA)
  ink = cv2.resize(large, (width, LINE), interpolation=cv2.INTER_AREA)[..., None] / 255
  area = page[y : y + LINE, x : x + width]
  area[:] = np.rint(area + (INK - area.astype(np.float32)) * ink)


def _running_mean(y, reach):
  """Mean over each value and the `reach` values on either side; NaN stays NaN.

  Near the start, where losses fall fast, both sides shrink; at the end only what is missing is left out.
  """
  known = np.isfinite(y)
  total, count = np.cumsum([0, *np.where(known, y, 0)]), np.cumsum([0, *known])
  place = np.arange(len(y))
  reach = np.minimum(reach, place)
  low, high = place - reach, np.minimum(place + reach + 1, len(y))
  return np.where(known, (total[high] - total[low]) / np.maximum(count[high] - count[low], 1), np.nan)
