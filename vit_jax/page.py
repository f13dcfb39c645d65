"""Pages of HTML that stand alone: one file, no request, readable on a phone and in the dark.

Everything that comes from outside (names, paths, numbers) goes through `escape` or `data`.
"""

import base64
import hashlib
import html
import io
import json
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_jax.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TINY = 96  # Images of fewer pixels a side are magnified as they are, without smoothing.

_STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --back: #fff; --soft: #f1f3f5; --line: #c9ced4;
  --dim: #5b6168; --accent: #0b5cad; --good: #00694b; --bad: #b3261e; --cell: 0, 92, 175 }
@media (prefers-color-scheme: dark) { :root { --text: #e8e8e8; --back: #16181b; --soft: #23272c;
  --line: #454b53; --dim: #a4abb3; --accent: #7ab8ff; --good: #5fd0a5; --bad: #ff8a80;
  --cell: 95, 165, 240 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--back); color: var(--text); font: 1rem/1.45 system-ui,
  sans-serif; overflow-wrap: anywhere }
main { max-width: 76rem; margin: auto; padding: 1rem }
h1 { font-size: 1.5rem; line-height: 1.2 } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem }
p { max-width: 46rem } .dim, figcaption { color: var(--dim); font-size: .875rem }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%,
  var(--column, 21rem)), 1fr)) }
figure { margin: 0 } .grid > * { min-width: 0 }
img, svg, canvas { max-width: 100%; height: auto; display: block }
svg text { fill: currentColor }
.tiny { image-rendering: pixelated; width: 100% }
.wide { overflow: auto; max-height: 34rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: right }
th:first-child, td:first-child { text-align: left } thead th { position: sticky; top: 0;
  background: var(--back); z-index: 1 }
button, input, select { font: inherit; color: inherit; background: var(--soft);
  border: 1px solid var(--line); border-radius: .3rem; padding: .15rem .5rem }
@media (max-width: 30rem) { table { font-size: .875rem } th, td { padding: .2rem .3rem }
  th button { padding: .15rem .2rem } }
th button { border: 0; font-weight: 600; cursor: pointer; white-space: nowrap }
th[aria-sort=ascending] button::after { content: " \\25b2" }
th[aria-sort=descending] button::after { content: " \\25bc" }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 1px }
.good { color: var(--good) } .bad { color: var(--bad) }
"""

# Sorts a table by the column whose heading was pressed: numbers by value, what is missing last.
_SORT = """
for (const button of document.querySelectorAll("th button")) button.onclick = () => {
  const head = button.parentElement, body = head.closest("table").tBodies[0];
  const up = head.getAttribute("aria-sort") === "descending";
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = row => row.cells[head.cellIndex].dataset.value;
  const compare = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
  body.append(...[...body.rows].sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    return x === "" || y === "" ? (x === "") - (y === "") : (up ? 1 : -1) * compare(x, y);
  }));
};
"""


def escape(text: object) -> str:
    """Text, safe as content and in quoted attributes of HTML. What can't be seen or written, such
    as control characters and the undecodable bytes of a file's name, is shown by its code."""
    seen = (
        c if c.isprintable() or c in "\u200c\u200d" else c.encode("unicode_escape").decode()
        for c in str(text)
    )
    return html.escape("".join(seen))


def image(pixels: np.ndarray, alt: str, *, photo: bool = False) -> str:
    """An <img> that holds its image.

    Args:
      pixels: uint8 (h, w), or (h, w, c) with 1 channel, 3 (RGB) or 4 (RGBA).
      alt: what it shows, in words.
      photo: JPEG, which is smaller, in place of PNG, which is exact; tiny ones are exact anyway.
    """
    height, width = pixels.shape[:2]
    tiny = max(height, width) < TINY
    css = ' class="tiny"' if tiny else ""
    uri = data_uri(pixels, photo=photo and not tiny)
    return f'<img src="{uri}" width="{width}" height="{height}" alt="{escape(alt)}"{css}>'


def data_uri(pixels: np.ndarray, *, photo: bool = False) -> str:
    """The image as an address that holds it; see `image`."""
    import cv2

    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    order = {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[pixels.shape[2]]
    _, file = cv2.imencode(".jpg" if photo else ".png", np.ascontiguousarray(pixels[..., order]))
    kind = "jpeg" if photo else "png"
    return f"data:image/{kind};base64,{base64.b64encode(file.tobytes()).decode()}"


def png(figure: "Figure") -> bytes:
    """A matplotlib figure as a file."""
    return _saved(figure, "png")


def _saved(figure: "Figure", kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings():
        # Browsers have the glyphs that matplotlib's font lacks, in a PNG they are boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(out, format=kind, **options)
    return out.getvalue()


def elide(text: str, width: int) -> str:
    """The text, cut to so many characters."""
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def drawing(figure: "Figure", alt: str) -> str:
    """A matplotlib figure as an inline <svg>: what is black in it takes the colour of the page's
    text, and its background is the page's."""
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "page"}):
        svg = _saved(figure, "svg", transparent=True, metadata={"Date": None}).decode()
    svg = svg[svg.index("<svg") :].replace("#000000", "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # Nothing refers to them, and pages may hold several.
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1)


def table(
    heads: Sequence[str], rows: Iterable[Sequence[object]], *, name: str, sortable: bool = False
) -> str:
    """A table that scrolls inside itself where it is too wide or long for the page.

    Args:
      heads: of the columns.
      rows: of cells; a float is a share, shown in percent, nan for none.
      name: what it shows, for those who can't see it.
      sortable: whether pressing a heading sorts the rows.
    """

    def cell(value: object) -> str:
        if isinstance(value, float):
            known = value == value
            text, key = (f"{value:.1%}", repr(value)) if known else ("-", "")
        else:
            text, key = f"{value:,}" if isinstance(value, int) else escape(value), escape(value)
        return f'<td data-value="{key}">{text}</td>' if sortable else f"<td>{text}</td>"

    button = '<button type="button">{}</button>' if sortable else "{}"
    top = "".join(f'<th scope="col">{button.format(escape(head))}</th>' for head in heads)
    body = "\n".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(name)}"><table>'
        f"<thead><tr>{top}</tr></thead><tbody>\n{body}\n</tbody></table></div>"
    )


def data(name: str, value: Any) -> str:
    """A value for the page's script: JSON.parse(document.getElementById(name).textContent)."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)  # ASCII, whatever is in it.
    safe = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return f'<script type="application/json" id="{name}">{safe}</script>'


def document(title: str, body: str, *, style: str = "", script: str = "") -> bytes:
    """A whole page, as bytes to write.

    Args:
      title: plain text, which becomes the heading, too.
      body: HTML that comes after the heading.
      style: CSS in addition.
      script: JavaScript in addition, run when the page is there. Nothing else may run or be fetched
        on the page: its policy says so, in case something in the body was not escaped.
    """
    script = _SORT + script
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{allowed}'; base-uri 'none'; form-action 'none'"
    )
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{_STYLE}{style}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""
    return page.encode()


def kind_of(path: str | os.PathLike) -> str:
    """What a file to write is to be by its ending, html or png. Raises UserError for another."""
    kind = os.fspath(path).rpartition(".")[2].lower()
    if kind not in ("html", "png"):
        raise UserError(f"can't tell what to write as {path}: expected a name in .html or .png")
    return kind
