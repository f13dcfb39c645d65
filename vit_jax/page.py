"""Pages of HTML that stand alone (one file, no request, readable on a phone and in the dark), and
the one style of all figures.

A page is a template of `templates/`. What is put into it is escaped, wherever it comes from.
"""

import base64
import functools
import hashlib
import io
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np

from vit_jax.errors import UserError
from vit_jax.escape import printable

if TYPE_CHECKING:
    import jinja2
    from markupsafe import Markup
    from matplotlib.figure import Figure

P = ParamSpec("P")
T = TypeVar("T")

_TEMPLATES = Path(__file__).with_name("templates")

TINY = 96  # Images of fewer pixels a side are magnified as they are, without smoothing.

# Of Okabe & Ito's palette, told apart with any colour vision.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"


def render(template: str, title: str, **values: Any) -> bytes:
    """A page, as bytes to write.

    Args:
      template: X for templates/X.html, with X.css and X.js after the style and the script of every
        page. Nothing but this script may run, and nothing be fetched: the page's policy says so,
        in case something was not escaped.
      title: plain text, which becomes the heading, too.
      **values: what the template names.
    """
    from markupsafe import Markup

    names = dict.fromkeys(("page", template))
    style, script = (
        "".join((_TEMPLATES / f"{name}.{kind}").read_text("utf-8") for name in names)
        for kind in ("css", "js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    values |= {"title": title, "style": Markup(style), "script": Markup(script), "digest": digest}
    return _environment().get_template(f"{template}.html").render(values).encode()


@functools.cache
def _environment() -> "jinja2.Environment":
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        finalize=_visible,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "data_uri": data_uri, "drawing": drawing}
    environment.globals["tiny"] = TINY
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment


def _visible(value: object) -> object:
    """The text with codes for what can't be seen or written: control characters, broken bytes."""
    return value if hasattr(value, "__html__") else printable(str(value))


def _number(value: object) -> object:
    """A value as it is read: of a float, which is a share, the percent, "-" for nan."""
    if isinstance(value, float):
        return f"{value:.1%}" if value == value else "-"
    return f"{value:,}" if isinstance(value, int) else value


def data_uri(pixels: np.ndarray, photo: bool = False) -> str:
    """An address that holds its image.

    Args:
      pixels: uint8 (h, w), or (h, w, c) with 1 channel, 3 (RGB) or 4 (RGBA).
      photo: JPEG, which is smaller, in place of PNG, which is exact; tiny ones are exact anyway.
    """
    import cv2

    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    kind = "jpeg" if photo and max(pixels.shape[:2]) >= TINY else "png"
    order = {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[pixels.shape[2]]
    _, file = cv2.imencode(f".{kind}", np.ascontiguousarray(pixels[..., order]))
    return f"data:image/{kind};base64,{base64.b64encode(file.tobytes()).decode()}"


def styled(draw: Callable[P, T]) -> Callable[P, T]:
    """Makes a function draw in the style of all figures."""

    @functools.wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        from matplotlib import style

        with style.context(_TEMPLATES / "figures.mplstyle"):
            return draw(*args, **kwargs)

    return wrapper


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of so many inches, made without pyplot: no window, no state left behind."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: "Figure") -> bytes:
    """A figure as a file."""
    return _saved(figure, "png")


def drawing(figure: "Figure", alt: str) -> "Markup":
    """A figure as an inline <svg>: what is black in it takes the colour of the page's text, and its
    background is the page's."""
    from markupsafe import Markup, escape

    svg = _saved(figure, "svg", transparent=True, metadata={"Date": None}).decode()
    svg = svg[svg.index("<svg") :].replace("#000000", "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # Nothing refers to them, and pages may hold several.
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(printable(alt))}"', 1))


@styled
def _saved(figure: "Figure", kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings():
        # Browsers have the glyphs that matplotlib's font lacks, in a PNG they are boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(out, format=kind, **options)
    return out.getvalue()


def elide(text: str, width: int) -> str:
    """The text, printable and cut to so many characters."""
    text = printable(text)
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def kind_of(path: str | os.PathLike) -> str:
    """What a file to write is to be by its ending, html or png. Raises UserError for another."""
    kind = os.fspath(path).rpartition(".")[2].lower()
    if kind not in ("html", "png"):
        raise UserError(f"can't tell what to write as {path}: expected a name in .html or .png")
    return kind
