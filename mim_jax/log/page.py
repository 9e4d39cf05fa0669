"""One HTML page that needs nothing else: no scripts, no fonts or pictures from elsewhere, in light and dark, on a phone too."""

import base64
import html
import re
import shlex
from collections.abc import Iterable, Sequence

import cv2
import numpy as np

from mim_jax.log import curves, pictures

STYLE = """
:root {
  color-scheme: light dark;
  --paper: LIGHT_PAPER; --ink: LIGHT_INK; --soft: LIGHT_SOFT; --rule: LIGHT_RULE; --tint: #f5f6f7;
  --good: #23784a; --bad: #b93224; LIGHT_COLORS
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: DARK_PAPER; --ink: DARK_INK; --soft: DARK_SOFT; --rule: DARK_RULE; --tint: #1d1f23;
    --good: #6cc795; --bad: #ef8677; DARK_COLORS
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; max-width: 66rem; padding: 2.25rem 1.25rem 5rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif;
}
h1 { margin: 0; font-size: 1.65rem; line-height: 1.2; font-weight: 650; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { margin: 3rem 0 1rem; padding-top: 1rem; border-top: 1px solid var(--rule); font-size: 1.15rem; font-weight: 650; }
h3 { margin: 1.75rem 0 0.5rem; font-size: 1rem; font-weight: 600; }
h3 .soft { margin-left: 0.35rem; font-size: 0.85rem; font-weight: 400; }
p { margin: 0.5rem 0; max-width: 44rem; overflow-wrap: anywhere; }
.soft, .lead, figcaption, th, summary, nav { color: var(--soft); }
.lead { margin: 0.4rem 0 0; }
.good { color: var(--good); } .bad { color: var(--bad); }
.good, .bad { font-weight: 600; }
td .good, td .bad { white-space: nowrap; }
nav { display: flex; flex-wrap: wrap; gap: 0.1rem 1.1rem; margin-top: 1rem; font-size: 0.9rem; }
a { color: inherit; text-decoration-color: var(--rule); text-underline-offset: 0.2em; }
a:hover { text-decoration-color: currentColor; }
code, .key { font: 0.875em/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace; overflow-wrap: anywhere; }
pre { margin: 0.5rem 0; padding: 0.75rem 1rem; background: var(--tint); border-radius: 4px; overflow-x: auto; }
pre code { overflow-wrap: normal; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 1.1rem 1.5rem; margin: 1.75rem 0 0; }
.facts dt { color: var(--soft); font-size: 0.85rem; }
.facts dd { margin: 0.1rem 0 0; font-size: 1.25rem; font-weight: 600; line-height: 1.3; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.facts small { display: block; color: var(--soft); font-size: 0.85rem; font-weight: 400; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.925rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.35rem 1.5rem 0.35rem 0; text-align: left; vertical-align: baseline; border-bottom: 1px solid var(--rule); overflow-wrap: anywhere; }
.keys td:first-child, .keys td:first-child code { white-space: nowrap; }
.full { width: 100%; }
.tables { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: 0 2.5rem; }
th { font-weight: 500; font-size: 0.85rem; }
th:last-child, td:last-child { padding-right: 0; }
td.number, th.number { text-align: right; white-space: nowrap; }
tr.head td { padding-top: 1.1rem; color: var(--ink); font-weight: 600; }
tr.strong td { font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.5rem; }
figure { margin: 0; }
figure img { display: block; max-width: 100%; height: auto; }
.charts figure { max-width: 34rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 14rem), 1fr)); gap: 1.25rem; align-items: start; }
.panels figure:target { grid-column: 1 / -1; }
.panels figure:target figcaption a { color: var(--ink); }
figcaption { margin-bottom: 0.35rem; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
.legend { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; margin: 0 0 1rem; padding: 0; list-style: none; font-size: 0.925rem; }
.legend li { min-width: 0; overflow-wrap: anywhere; }
.dot { display: inline-block; width: 1.1em; height: 0; margin-right: 0.5em; border-top: 0.2em solid; vertical-align: 0.25em; }
.area { height: 0.7em; border: 0; background: var(--soft); opacity: 0.35; vertical-align: -0.05em; }
.split { display: flex; height: 0.6rem; margin: 0.75rem 0 0.5rem; border-radius: 3px; overflow: hidden; background: var(--c0); }
.split i { background: var(--c1); }
details { margin-top: 1rem; }
summary { cursor: pointer; }
@media (max-width: 30rem) {
  body { padding: 1.5rem 1rem 3rem; }
  th, td { padding-right: 0.9rem; }
  .stack, .stack tbody { display: block; }
  .stack thead { display: none; }
  .stack tr { display: flex; flex-wrap: wrap; gap: 0 0.9rem; padding: 0.4rem 0; border-bottom: 1px solid var(--rule); }
  .stack td { padding: 0; border: 0; }
  .stack td:first-child { flex: 1 0 100%; color: var(--soft); }
  .keys.stack td:not(:first-child) { flex: 1 1 40%; }
  .facts { grid-template-columns: repeat(2, minmax(0, 1fr)); }
}
""".strip()
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # the browser, too, lets nothing in


class Html(str):
  """Markup; any other text that comes to a page is escaped."""

  __slots__ = ()


def text(value) -> Html:
  """`value` as markup."""
  return value if isinstance(value, Html) else Html(html.escape(str(value)))


def code(value) -> Html:
  return Html(f'<code>{text(value)}</code>')


def command(line: str) -> Html:
  """A command line, each option on a line of its own."""
  parts = []
  for word in shlex.split(line):
    if parts and not word.startswith('--'):
      parts[-1] += ' ' + shlex.quote(word)
    else:
      parts.append(shlex.quote(word))
  shown = ' \\\n  '.join(parts)
  return Html(f'<pre><code>{text(shown)}</code></pre>')


def name(value: str) -> Html:
  """A name such as 'sweep/mask_ratio=0.5,seed=0', broken where it has parts if it must be."""
  return Html(re.sub(r'([,/_])', r'\1<wbr>', text(value)))


def join(parts: Iterable, between: str = '') -> Html:
  return Html(text(between).join(text(part) for part in parts))


def document(title: str, lead, sections: Sequence[tuple[str, Html]], top='') -> str:
  """A page: title, one line about it, what is seen first, and sections (heading, content), empty ones left out."""
  sections = [(name, content) for name, content in sections if content]
  links = join(Html(f'<a href="#{_anchor(name)}">{text(name)}</a>') for name, _ in sections)
  body = join(
    Html(f'<section id="{_anchor(name)}"><h2>{text(name)}</h2>{content}</section>\n') for name, content in sections
  )
  return (
    f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{text(title)}</title>\n'
    f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n<link rel="icon" href="data:,">\n'
    f'<style>\n{_style()}\n</style>\n</head>\n<body>\n<header><h1>{text(title)}</h1><p class="lead">{text(lead)}</p>'
    f'{text(top)}<nav>{links}</nav></header>\n{body}</body>\n</html>\n'
  )


def facts(entries: Sequence[tuple]) -> Html:
  """Figures at a glance: (name, value) or (name, value, remark)."""
  items = []
  for name, value, *remark in entries:
    small = f'<small>{text(remark[0])}</small>' if remark and remark[0] else ''
    items.append(Html(f'<div><dt>{text(name)}</dt><dd>{text(value)}{small}</dd></div>'))
  return Html(f'<dl class="facts">{join(items)}</dl>')


def table(
  head: Sequence, rows: Sequence[Sequence], numbers: Sequence[int] = (), strong: Sequence[int] = (), kind: str = ''
) -> Html:
  """A table; a row of one entry is a heading over those that follow.

  Args:
    head: names of the columns, empty for none.
    numbers: columns set flush right.
    strong: rows in bold.
    kind: 'keys' where the first column holds words that must not be broken; 'stack' puts the first column over the others
      where there is little room, 'full' takes all room.
  """
  align = lambda c: ' class="number"' if c in numbers else ''
  lines = []
  if head:
    cells = join(Html(f'<th{align(c)}>{text(name)}</th>') for c, name in enumerate(head))
    lines.append(Html(f'<thead><tr>{cells}</tr></thead>'))
  width = max(map(len, [head, *rows]))
  for r, row in enumerate(rows):
    if len(row) == 1 < width:
      lines.append(Html(f'<tr class="head"><td colspan="{width}">{text(row[0])}</td></tr>'))
    else:
      cells = join(Html(f'<td{align(c)}>{text(cell)}</td>') for c, cell in enumerate(row))
      lines.append(Html(f'<tr{" class=strong" if r in strong else ""}>{cells}</tr>'))
  return Html(f'<div class="scroll"><table class="{kind}">{join(lines)}</table></div>')


def charts(drawn: Sequence[curves.Chart]) -> Html:
  """Charts side by side as far as there is room, each in a light and a dark form of which the browser shows one."""
  return Html(f'<div class="charts">{join(map(_chart, drawn))}</div>') if drawn else Html('')


def legend(labels: Sequence, areas: Sequence[str] = ()) -> Html:
  """Names of lines in their colours, and of grey areas."""
  entries = [Html(f'<li>{dot(i)}{text(label)}</li>') for i, label in enumerate(labels)]
  entries += [Html(f'<li><span class="dot area"></span>{text(label)}</li>') for label in areas]
  return Html(f'<ul class="legend">{join(entries)}</ul>')


def dot(color: int) -> Html:
  """A short line in the style of a chart's line of that number."""
  style = ('solid', 'dashed', 'dotted')[color // len(pictures.COLORS) % len(curves.STYLES)]
  return Html(
    f'<span class="dot" style="border-color: var(--c{color % len(pictures.COLORS)}); border-top-style: {style}"></span>'
  )


def photo(content: bytes, alt: str) -> Html:
  """A picture given as the bytes of an image file, as JPEG where that is smaller. Raises ValueError for other bytes."""
  image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
  if image is None:
    raise ValueError(f'{alt}: {len(content)} bytes that are no picture')
  sampling = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]  # colours of patches stay apart
  small = cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, 88, *sampling])[1].tobytes()
  if len(small) >= len(content):
    return _image(uri(content), image.shape[1], image.shape[0], alt)
  return _image(uri(small, 'image/jpeg'), image.shape[1], image.shape[0], alt)


def uri(content: bytes, kind: str = 'image/png') -> str:
  return f'data:{kind};base64,{base64.b64encode(content).decode()}'


def _chart(chart: curves.Chart) -> Html:
  width, height = (round(inches * curves.DPI) for inches in curves.SIZE)
  dark = f'<source media="(prefers-color-scheme: dark)" srcset="{uri(curves.png(chart, curves.DARK))}">'
  light = _image(uri(curves.png(chart)), width, height, f'{chart.title} over steps')
  return Html(f'<figure><picture>{dark}{light}</picture></figure>')


def _image(source: str, width: int, height: int, alt: str) -> Html:
  return Html(f'<img src="{source}" width="{width}" height="{height}" alt="{text(alt)}">')


def _anchor(name: str) -> str:
  return '-'.join(name.lower().split())


def _style() -> str:
  style = STYLE
  for theme, prefix in ((curves.LIGHT, 'LIGHT'), (curves.DARK, 'DARK')):
    colors = ' '.join(f'--c{i}: {color};' for i, color in enumerate(theme.colors))
    for name in ('paper', 'ink', 'soft', 'rule'):
      style = style.replace(f'{prefix}_{name.upper()}', getattr(theme, name))
    style = style.replace(f'{prefix}_COLORS', colors)
  return style
