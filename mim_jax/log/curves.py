"""Charts of metrics over steps for pages and files: small, readable on a phone, in a light and a dark form."""

import dataclasses
import io
import math
from collections.abc import Sequence

import numpy as np

from mim_jax.log.pictures import COLORS

DARK_COLORS = ('#7db4f0', '#f2a968', '#6cc795', '#bd9fe6', '#ef8677', '#66cfdc', '#cbb07a', '#a9b0ba')
SIZE = (4.4, 2.7)  # inches; at 96 pixels to the inch, text is as large as that of the page around it
DPI = 210
BINS = 240  # points a line is drawn with; a longer one as the mean and the range of as many stretches
DECADES = 1.5


@dataclasses.dataclass(frozen=True)
class Theme:
  """Colours of a chart: page, text, faint text, grid, lines."""

  paper: str
  ink: str
  soft: str
  rule: str
  colors: tuple[str, ...]


LIGHT = Theme('#ffffff', '#1f2023', '#666a70', '#e6e7e9', COLORS)
DARK = Theme('#151619', '#e7e7e5', '#9b9fa6', '#2c2e33', DARK_COLORS)
STYLES = ('-', '--', ':')  # of a color's first, second and third use


@dataclasses.dataclass(frozen=True)
class Line:
  """One line; `color` counts through the theme's colours and then their dashed and dotted forms, None is grey.

  A faint line is the background of another one and not in the legend.
  """

  label: str
  steps: Sequence[int]
  values: Sequence[float]
  color: int | None = 0
  faint: bool = False


@dataclasses.dataclass(frozen=True)
class Band:
  """A grey area between `low` and `high`; of a single step a bar, and without steps a bar at the right edge."""

  label: str
  steps: Sequence[int]
  low: Sequence[float]
  high: Sequence[float]


@dataclasses.dataclass(frozen=True)
class Chart:
  """One metric: lines over each other, bands behind them, `levels` as dashed lines with their names.

  The scale is logarithmic where positive values span more than one and a half decades, unless `linear`.
  """

  title: str
  lines: tuple[Line, ...]
  bands: tuple[Band, ...] = ()
  levels: tuple[tuple[str, float], ...] = ()
  linear: bool = False

  @property
  def points(self) -> int:
    """Most steps that a line has."""
    return max((len(line.steps) for line in self.lines), default=0)


def png(chart: Chart, theme: Theme = LIGHT) -> bytes:
  """A chart as PNG, twice as many pixels as it is to take up."""
  figure = _figure(SIZE, theme)
  _draw(figure.add_subplot(), chart, theme)
  return _bytes(figure)


def sheet(charts: Sequence[Chart]) -> bytes:
  """All charts on one white PNG, two to a row, under a legend of their lines."""
  columns = min(2, len(charts))
  rows = math.ceil(len(charts) / columns)
  handles = {}
  figure = _figure((SIZE[0] * columns, SIZE[1] * rows + 0.3), LIGHT)
  for i, chart in enumerate(charts):
    handles |= _draw(figure.add_subplot(rows, columns, i + 1), chart, LIGHT)
  if handles:
    figure.legend(
      handles.values(), handles.keys(), loc='outside upper left', ncols=2 * columns, frameon=False, fontsize=8.5
    )
  return _bytes(figure)


def _figure(size, theme):
  from matplotlib.backends.backend_agg import FigureCanvasAgg  # 0.5 s to import, so only for who draws curves
  from matplotlib.figure import Figure

  figure = Figure(figsize=size, dpi=DPI, layout='constrained', facecolor=theme.paper)
  FigureCanvasAgg(figure)
  return figure


def _bytes(figure):
  file = io.BytesIO()
  figure.savefig(file, format='png', facecolor=figure.get_facecolor(), metadata={'Software': None})
  return file.getvalue()


def _draw(axes, chart, theme):
  """Draws a chart and returns the handles of a legend by label."""
  handles = {}
  for line in chart.lines:
    x, y = np.asarray(line.steps, np.float64), np.asarray(line.values, np.float64)
    color = theme.soft if line.color is None else theme.colors[line.color % len(theme.colors)]
    style = STYLES[(line.color or 0) // len(theme.colors) % len(STYLES)]
    if len(x) > BINS:
      x, y, low, high = _binned(x, y)
      if not line.faint:
        axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
    width, alpha = (0.7, 0.4) if line.faint else (1.5, 1)
    marker = 'o' if np.isfinite(y).sum() <= 20 and not line.faint else None
    (drawn,) = axes.plot(x, y, style, color=color, linewidth=width, alpha=alpha, marker=marker, markersize=3)
    if not line.faint:
      handles[line.label] = drawn
  _scale(axes, chart)
  for band in chart.bands:
    grey = {'color': theme.soft, 'linewidth': 0}
    if len(band.steps) > 1:
      handles[band.label] = axes.fill_between(band.steps, band.low, band.high, alpha=0.22, **grey)
    else:
      x = band.steps[0] if band.steps else axes.get_xlim()[1]
      middle = (band.low[0] + band.high[0]) / 2
      half = (band.high[0] - band.low[0]) / 2
      handles[band.label] = axes.errorbar(
        [x], [middle], [half], color=theme.soft, linewidth=1.2, capsize=4, clip_on=False
      )
  _name_levels(axes, chart.levels, theme)
  axes.set_xlabel('step', loc='right', fontsize=8.5, color=theme.soft, labelpad=1)
  axes.set_title(chart.title, loc='left', fontsize=9.5, color=theme.ink)
  axes.grid(True, color=theme.rule, linewidth=0.7)
  axes.set_axisbelow(True)
  axes.set_facecolor(theme.paper)
  axes.tick_params(which='both', length=0, colors=theme.soft, labelsize=8.5)
  for edge in ('top', 'right', 'left'):
    axes.spines[edge].set_visible(False)
  axes.spines['bottom'].set_color(theme.rule)
  return handles


def _scale(axes, chart):
  from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

  axes.margins(x=0.02)
  axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], integer=True))
  axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _steps(value)))
  values = [np.asarray(line.values, np.float64) for line in chart.lines] + [
    np.asarray([level for _, level in chart.levels])
  ]
  values = np.concatenate([*values, *(np.asarray(ends) for band in chart.bands for ends in (band.low, band.high))])
  values = values[np.isfinite(values)]
  decades = math.log10(values.max() / values.min()) if len(values) and values.min() > 0 else 0
  if decades > DECADES and not chart.linear:
    axes.set_yscale('log')
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if decades > 2.5 else (1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
  else:
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
  axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:.6g}'))


def _name_levels(axes, levels, theme):
  """Dashed lines with their names above them, at the right and the left end in turn so that names stay apart."""
  for i, (name, value) in enumerate(sorted(levels, key=lambda level: level[1])):
    axes.axhline(value, color=theme.soft, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
      name,
      ((1, 0)[i % 2], value),
      xycoords=('axes fraction', 'data'),
      xytext=(0, 2),
      textcoords='offset points',
      ha=('right', 'left')[i % 2],
      va='bottom',
      fontsize=8,
      color=theme.soft,
    )


def _binned(x, y):
  """(middle of x, mean, lowest, highest y) of BINS stretches of a line; NaN where a stretch has no finite value."""
  rows = []
  for part_x, part_y in zip(np.array_split(x, BINS), np.array_split(y, BINS), strict=True):
    good = part_y[np.isfinite(part_y)]
    rows.append((part_x.mean(), *((good.mean(), good.min(), good.max()) if len(good) else [np.nan] * 3)))
  rows[0], rows[-1] = (x[0], *rows[0][1:]), (x[-1], *rows[-1][1:])  # a line begins and ends where its steps do
  return np.array(rows).T


def _steps(value: float) -> str:
  for unit, name in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if abs(value) >= 10 * unit or (unit > 1e3 and abs(value) >= unit):
      return f'{value / unit:g}{name}'
  return f'{value:,.0f}'
