"""What a check of images found, told in words, JSON and histograms."""

import os
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from vit_jax.data.check import Check, CheckedSplit, Image, count_of
from vit_jax.errors import UserError

_MANY_CLASSES = 40  # more can't be named in the drawing
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe & Ito


def summary(result: Check) -> str:
    """What a person reads first, some lines for each split."""
    lines = []
    for name, split in result.splits.items():
        lines.append(f"{name}: {count_of(split.count)}")
        facts = {"classes": f"{len(result.labels):,}", **_facts(split)}
        if split.class_counts.any():
            counts = split.class_counts
            least, most = np.argmin(counts), np.argmax(counts)
            facts["classes"] += f", each of {counts[least]:,}"
            if counts[least] < counts[most]:
                facts["classes"] += f" ({result.labels[least]}) to {counts[most]:,}"
                facts["classes"] += f" ({result.labels[most]})"
            facts["classes"] += " images"
        facts["duplicates"] = f"{result.duplicates(name) or 'none'}"
        facts["unreadable"] = f"{len(split.unreadable) or 'none'}"
        lines += [f"  {title:<12}{text}" for title, text in facts.items()]
    if not result.problems:
        return "\n".join([*lines, "", "Nothing was found that training would suffer from."])
    return "\n".join([*lines, "", "Problems", *(f"  {problem}" for problem in result.problems)])


def details(result: Check, limit: int | None = None) -> str:
    """Every image that something is the matter with, by name; `limit` of a kind at most."""

    def section(title: str, found: Sequence[str]) -> list[str]:
        left = len(found) - len(shown := found[:limit])
        more = [f"  ... and {left:,} more"] if left else []
        return ["", title, *(f"  {text}" for text in shown), *more] if found else []

    def groups(found: Iterable[Sequence[Image]]) -> list[str]:
        named = ([f"{p.name} ({p.split}, {p.label})" for p in group] for group in found)
        return ["\n    = ".join(group) for group in named]

    unreadable = [text for split in result.splits.values() for text in split.unreadable]
    within = [g for g in result.identical if len({(p.split, p.label) for p in g}) == 1]
    lines = [
        *section("Unreadable", unreadable),
        *section("The same pixels in several splits", groups(result.leaks)),
        *section("The same pixels under several classes", groups(result.contradictions)),
        *section("The same pixels several times", groups(within)),
    ]
    return "\n".join(lines[1:])


def as_dict(result: Check) -> dict[str, Any]:
    """All of it, for JSON."""
    return {
        "problems": result.problems,
        "splits": {
            name: {
                "count": split.count,
                "unreadable": split.unreadable,
                "classes": dict(zip(result.labels, split.class_counts.tolist(), strict=True)),
                "height": _range(split.sizes[:, 0]),
                "width": _range(split.sizes[:, 1]),
                "aspect": _range(split.sizes[:, 1] / split.sizes[:, 0]),
                "channels": {str(number): count for number, count in split.channels.items()},
                "grey": split.grey,
                "duplicates": result.duplicates(name),
            }
            for name, split in result.splits.items()
        },
        "identical": [[image._asdict() for image in group] for group in result.identical],
    }


def write_report(result: Check, folder: str | os.PathLike, title: str) -> list[str]:
    """Writes check.txt and check.png, and tells their paths."""
    text, drawing = (os.path.join(folder, name) for name in ("check.txt", "check.png"))
    try:
        os.makedirs(folder, exist_ok=True)
        with open(text, "w", encoding="utf-8", errors="backslashreplace") as file:
            print(title, "", summary(result), "", details(result), sep="\n", file=file)
            print("\nImages of each class:", ", ".join(result.splits), file=file)
            counts = np.stack([split.class_counts for split in result.splits.values()], axis=1)
            for label, row in zip(result.labels, counts.tolist(), strict=True):
                print(" ", *(f"{count:>9,}" for count in row), f" {label}", file=file)
        _draw(result, drawing, title)
    except OSError as error:
        raise UserError(
            f"{folder}: can't be written to ({error.strerror}); choose another folder"
        ) from None
    return [text, drawing]


def _facts(split: CheckedSplit) -> dict[str, str]:
    if not len(split.sizes):
        return {}
    height, width = split.sizes.T
    channels = " or ".join(map(str, sorted(split.channels)))
    grey = f"; {count_of(split.grey)} without colour" if split.grey else ""
    return {
        "height": _told(height, ",.0f", " pixels"),
        "width": _told(width, ",.0f", " pixels"),
        "aspect": _told(width / height, ".3g", ""),
        "channels": f"{channels}{grey}",
    }


def _told(values: np.ndarray, form: str, unit: str) -> str:
    low, middle, high = (format(value, form) for value in _range(values).values())
    return f"{low}{unit}" if low == high else f"{low} to {high}{unit}, median {middle}"


def _range(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    return {
        "min": values.min().item(),
        "median": float(np.median(values)),
        "max": values.max().item(),
    }


def _draw(result: Check, path: str, title: str) -> None:
    """Histograms, of matplotlib's objects alone: no pyplot, no window, no state left behind."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12, 8), dpi=100, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=14, fontweight="bold", parse_math=False)
    upper, *lower = figure.subplot_mosaic([["c"] * 3, ["h", "w", "a"]]).values()
    _draw_classes(upper, result)
    sizes = [split.sizes for split in result.splits.values()]
    values = {
        "height in pixels": [size[:, 0] for size in sizes],
        "width in pixels": [size[:, 1] for size in sizes],
        "aspect (width / height)": [size[:, 1] / size[:, 0] for size in sizes],
    }
    for ax, (name, found) in zip(lower, values.items(), strict=True):
        everything = np.concatenate(found)
        if not len(everything):
            continue
        log = everything.max() > 20 * everything.min()
        edges = np.histogram_bin_edges(np.log(everything) if log else everything, 40)
        edges = np.exp(edges) if log else edges
        for i, one in enumerate(found):  # the first filled, so that none hides another
            color = _COLORS[i % len(_COLORS)]
            ax.hist(one, edges.tolist(), histtype="step", fill=i == 0, color=color, linewidth=1.5)
        if log:
            ax.set_xscale("log")
        ax.set_xlabel(name)
        ax.set_ylabel("images")
    for ax in (upper, *lower):
        ax.spines[["top", "right"]].set_visible(False)
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    with warnings.catch_warnings():
        # Names in scripts that the font lacks are drawn as boxes: a warning says no more.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path, format="png")


def _draw_classes(ax: Any, result: Check) -> None:
    count = len(result.labels)
    first = next(iter(result.splits.values())).class_counts
    named = count <= _MANY_CLASSES
    order = np.arange(count) if named else np.argsort(-first, kind="stable")
    width = 0.8 / len(result.splits)
    for i, (name, split) in enumerate(result.splits.items()):
        color = _COLORS[i % len(_COLORS)]
        if named:
            ax.bar(
                order + (i - (len(result.splits) - 1) / 2) * width,
                split.class_counts,
                width,
                label=name,
                color=color,
            )
        else:
            ax.step(np.arange(count), split.class_counts[order], label=name, color=color)
    if named:
        labels = [name if len(name) <= 18 else f"{name[:17]}…" for name in result.labels]
        long = count * max(map(len, labels)) > 120
        ax.set_xticks(order, labels, rotation=90 if long else 0, parse_math=False)
    else:
        ax.set_xlabel(f"{count:,} classes, from the largest to the smallest")
    ax.set_ylim(bottom=0)
    ax.set_title("Images of each class", fontsize=11, loc="left")
    ax.legend(frameon=False, loc="upper right", ncols=len(result.splits), bbox_to_anchor=(1, 1.12))
