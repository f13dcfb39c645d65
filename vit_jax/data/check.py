"""Looks at images before training: `check` finds what can't be read, what is there twice, what
sizes there are, and tells it; `draw_page` shows what a preprocessing makes of some."""

import csv
import hashlib
import itertools
import os
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vit_jax.data.images import shrink
from vit_jax.data.levels import sample, sliver
from vit_jax.data.preprocess import Preprocess
from vit_jax.data.source import HELD_OUT, Source, similar_labels, some_of
from vit_jax.data.tables import is_label
from vit_jax.data.workers import own_cores
from vit_jax.errors import UserError
from vit_jax.escape import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLOCK = 64  # Images that a thread takes at once.
_MANY_CLASSES = 40  # More can't be named in the drawing.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe & Ito
_TITLE_CHARS = 24  # What fits above an image.
_DAMAGE = "libjpeg"  # What it says, see `images.decode`.
_VALUES = 1 << 16  # Of a split, at least, if there are as many.
_TINY = 96  # Images of fewer pixels a side are magnified as they are, without smoothing.

Mix = Callable[[np.ndarray, int], tuple[np.ndarray, float]]


class Image(NamedTuple):
    """An image: the split it is in, what it is called, its class or classes."""

    split: str
    name: str
    label: str


@dataclass(frozen=True)
class CheckedSplit:
    """What was found in one split.

    Attributes:
      count: images, those that can't be read included.
      unreadable: of each, why it can't be read; the text names it.
      kinds: the endings of their names: how many unreadable images have it.
      class_counts: int64 (classes,), the readable images of each class.
      sizes: int32 (readable, 2), height and width in pixels.
      channels: number of channels: how many images have it.
      grey: how many images of 3 channels have three equal ones.
      types: type of the values: how many images have it.
      values: float32, some of the values of every image.
      remarks: what decoding leaves out, or finds odd: how many images it is true of.
      damaged: of each image that may be damaged, why; the text names it.
    """

    count: int
    unreadable: list[str]
    kinds: dict[str, int]
    class_counts: np.ndarray
    sizes: np.ndarray
    channels: dict[int, int]
    grey: int
    types: dict[str, int]
    values: np.ndarray
    remarks: dict[str, int]
    damaged: list[str]


@dataclass(frozen=True)
class Check:
    """What was found in a data set.

    Attributes:
      labels: class names.
      splits: by name.
      identical: groups of images whose pixels, as decoded, are all the same.
      notes: how images were found, and what was left out, if a person should know.
      doubts: the same, of what training may suffer from.
    """

    labels: tuple[str, ...]
    splits: dict[str, CheckedSplit]
    identical: list[list[Image]]
    notes: list[str]
    doubts: list[str]

    @cached_property
    def leaks(self) -> list[list[Image]]:
        """Groups of identical images that lie in several splits."""
        return [group for group in self.identical if len({p.split for p in group}) > 1]

    @cached_property
    def contradictions(self) -> list[list[Image]]:
        """Groups of identical images of different classes."""
        return [group for group in self.identical if len({p.label for p in group}) > 1]

    def duplicates(self, split: str) -> int:
        """How many images of a split are there already, under another name."""
        counts = (sum(p.split == split for p in group) for group in self.identical)
        return sum(count - 1 for count in counts if count > 1)

    @property
    def problems(self) -> list[str]:
        """What training would suffer from, a line each."""
        found = [*self.doubts, *similar_labels(self.labels)]
        for name, split in self.splits.items():
            found += [
                f"{_count_of(count)} of {name} may be damaged, {remark}"
                for remark, count in split.remarks.items()
                if _DAMAGE in remark
            ]
            if len(split.types) > 1:
                types = " and ".join(f"{n:,} of {dtype}" for dtype, n in split.types.items())
                found.append(f"{name} has images of several types, {types}")
            elif split.types and (told := sliver(split.values, next(iter(split.types)))):
                found.append(f"{name}: {told}")
            if split.unreadable:
                kinds = ", ".join(f"{count:,} {kind}" for kind, count in split.kinds.items())
                found.append(
                    f"{_count_of(len(split.unreadable))} of {name} can't be read"
                    + f" ({kinds})" * bool(kinds)
                )
            empty = [self.labels[i] for i in np.flatnonzero(split.class_counts == 0)]
            if empty and name.startswith("train"):
                found.append(f"{name} has no image of {some_of(empty)}")
        if self.leaks:
            text = f"{_count_of(len(self.leaks))} found in several splits"
            if HELD_OUT in self.notes:
                text += "; train on a table whose column group keeps what is the same together, as"
                text += " groups.csv, which --out writes of a folder"
            found.append(text)
        if self.contradictions:
            found.append(f"{_count_of(len(self.contradictions))} found under several classes")
        return found


def check(
    sources: Mapping[str, Source],
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Check:
    """Reads and decodes every image.

    Memory: the images in the works, and some 60 bytes for each one that was read.

    Args:
      sources: splits by name, of one data set.
      threads: that read and decode; by default one a core, 16 at most.
      progress: called with the numbers of images done and of all.
    """
    threads = min(own_cores(), 16) if threads is None else threads
    total, done = sum(map(len, sources.values())), 0
    classes = next(iter(sources.values())).labels
    splits: dict[str, CheckedSplit] = {}
    facts = [np.empty(0, _FACTS)]
    labels: list[tuple[int, ...]] = []
    owners: list[str] = []
    same: dict[tuple[int, ...], tuple[int, ...]] = {}  # Equal labels share their memory.
    for name, source in sources.items():
        blocks = [range(i, min(i + _BLOCK, len(source))) for i in range(0, len(source), _BLOCK)]
        seen, first = [np.empty(0, _FACTS)], len(labels)
        unreadable: list[tuple[str, str]] = []
        look = partial(_look, source, max(_VALUES // max(len(source), 1), 4))
        values = [np.empty(0, np.float32)]
        types: Counter[str] = Counter()
        remarks: Counter[str] = Counter()
        damaged: list[str] = []
        pool = ThreadPoolExecutor(threads)
        try:
            for block, found in zip(blocks, pool.map(look, blocks), strict=True):
                seen.append(found[0])
                labels += [same.setdefault(ids, ids) for ids in found[1]]
                unreadable += found[2]
                values.append(found[3])
                types.update(found[4])
                remarks.update(text for _, text in found[5])
                damaged += [f"{image}: {text}" for image, text in found[5] if _DAMAGE in text]
                done += len(block)
                progress(done, total)
        finally:
            pool.shutdown(cancel_futures=True)
        facts.append(np.concatenate(seen))
        owners += [name] * len(facts[-1])
        ids = np.fromiter(itertools.chain.from_iterable(labels[first:]), np.int64)
        endings = (os.path.splitext(image)[1].lower() for image, _ in unreadable)
        splits[name] = CheckedSplit(
            count=len(source),
            unreadable=[text for _, text in unreadable],
            kinds=dict(Counter(filter(None, endings)).most_common(8)),
            class_counts=np.bincount(ids, minlength=len(classes)),
            sizes=facts[-1]["size"],
            channels=dict(Counter(facts[-1]["channels"].tolist())),
            grey=int(facts[-1]["grey"].sum()),
            types=dict(sorted(types.items())),
            values=np.concatenate(values),
            remarks=dict(sorted(remarks.items())),
            damaged=damaged,
        )
    everything = np.concatenate(facts)

    def image(i: int) -> Image:
        name = sources[owners[i]].describe(int(everything["index"][i]))
        label = ";".join(classes[id_] for id_ in labels[i]) or "no class"
        return Image(owners[i], name, label)

    groups = [[image(i) for i in group] for group in _equal(everything["digest"])]
    notes, doubts = (
        list(dict.fromkeys(text for source in sources.values() for text in getattr(source, field)))
        for field in ("notes", "doubts")
    )
    return Check(classes, splits, groups, notes, doubts)


_FACTS = np.dtype(
    [("index", "i8"), ("digest", "S16"), ("size", "i4", 2), ("channels", "i4"), ("grey", "?")]
)


def _look(
    source: Source, count: int, indices: Iterable[int]
) -> tuple[np.ndarray, list, list, np.ndarray, list, list]:
    """Facts and labels of the images that can be read; names of others, and why they can't; `count`
    values of each, types, and remarks with names."""
    facts, labels, unreadable, types, remarks = [], [], [], [], []
    values = [np.empty(0, np.float32)]
    for index in indices:
        try:
            said: list[str] = []
            stored, label = source.stored(index)
            image = np.ascontiguousarray(source.decode(stored, index, said))
            label = source.label(label)
            if image.dtype.kind == "f" and not np.isfinite(image).all():
                raise UserError(f"{source.describe(index)}: holds NaN or infinite values")
        except UserError as error:
            unreadable.append((source.describe(index), str(error)))
            continue
        remarks += [(source.describe(index), text) for text in said]
        types.append(image.dtype.name)
        some = sample(image, count).ravel()
        places = np.linspace(0, len(some) - 1, min(len(some), 2 * count)).astype(int)
        values.append(some[places].astype(np.float32))
        digest = hashlib.blake2b(f"{image.shape}{image.dtype}".encode(), digest_size=16)
        digest.update(image.data)
        # A few pixels tell of most images that they are coloured.
        grey = image.shape[2] == 3 and all(
            (part == part[..., :1]).all() for part in (image[::16, ::16], image)
        )
        facts.append((index, digest.digest(), image.shape[:2], image.shape[2], grey))
        labels.append((label,) if np.ndim(label) == 0 else tuple(np.flatnonzero(label).tolist()))
    return np.array(facts, _FACTS), labels, unreadable, np.concatenate(values), types, remarks


def _equal(values: np.ndarray) -> list[np.ndarray]:
    """The indices of each value that is there several times."""
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.r_[True, values[order][1:] != values[order][:-1]])
    groups = np.split(order, starts[1:])
    return sorted((g for g in groups if len(g) > 1), key=lambda group: group[0])


def _count_of(number: int) -> str:
    return f"{number:,} image{'' if number == 1 else 's'}"


# What was found, told in words, JSON and histograms.


def summary(result: Check) -> str:
    """What a person reads first, some lines for each split."""
    lines = []
    for name, split in result.splits.items():
        lines.append(f"{name}: {_count_of(split.count)}")
        facts = {"classes": f"{len(result.labels):,}"}
        counts = split.class_counts
        if counts.any():
            least, most = np.argmin(counts), np.argmax(counts)
            facts["classes"] += f", each of {counts[least]:,}"
            if counts[least] < counts[most]:
                facts["classes"] += f" ({result.labels[least]}) to {counts[most]:,}"
                facts["classes"] += f" ({result.labels[most]})"
            facts["classes"] += " images"
        if len(split.sizes):
            height, width = split.sizes.T
            facts["height"] = _told(height, ",.0f", " pixels")
            facts["width"] = _told(width, ",.0f", " pixels")
            facts["aspect"] = _told(width / height, ".3g", "")
            facts["channels"] = " or ".join(map(str, sorted(split.channels)))
            if split.grey:
                facts["channels"] += f"; {_count_of(split.grey)} without colour"
            facts["values"] = _told(split.values, ",.6g", "") + f", {' or '.join(split.types)}"
        facts["duplicates"] = f"{result.duplicates(name) or 'none'}"
        facts["unreadable"] = f"{len(split.unreadable) or 'none'}"
        lines += [f"  {title:<12}{text}" for title, text in facts.items()]
        lines += [f"  {_count_of(count)} {remark}" for remark, count in split.remarks.items()]
    if result.notes:
        lines += ["", "Noticed", *(f"  {note}" for note in result.notes)]
    if not result.problems:
        return "\n".join([*lines, "", "Nothing was found that training would suffer from."])
    return "\n".join([*lines, "", "Problems", *(f"  {problem}" for problem in result.problems)])


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
    damaged = [text for split in result.splits.values() for text in split.damaged]
    within = [g for g in result.identical if len({(p.split, p.label) for p in g}) == 1]
    lines = [
        *section("Unreadable", unreadable),
        *section("Perhaps damaged", damaged),
        *section("The same pixels in several splits", groups(result.leaks)),
        *section("The same pixels under several classes", groups(result.contradictions)),
        *section("The same pixels several times", groups(within)),
    ]
    return "\n".join(lines[1:])


def as_dict(result: Check) -> dict[str, Any]:
    """All of it, for JSON."""
    return {
        "problems": result.problems,
        "notes": result.notes,
        "splits": {
            name: {
                "count": split.count,
                "unreadable": split.unreadable,
                "unreadable_kinds": split.kinds,
                "classes": dict(zip(result.labels, split.class_counts.tolist(), strict=True)),
                "height": _range(split.sizes[:, 0]),
                "width": _range(split.sizes[:, 1]),
                "aspect": _range(split.sizes[:, 1] / split.sizes[:, 0]),
                "channels": {str(number): count for number, count in split.channels.items()},
                "grey": split.grey,
                "types": split.types,
                "values": _range(split.values),
                "remarks": split.remarks,
                "damaged": split.damaged,
                "duplicates": result.duplicates(name),
            }
            for name, split in result.splits.items()
        },
        "identical": [[image._asdict() for image in group] for group in result.identical],
    }


def write_report(result: Check, folder: str | os.PathLike, title: str) -> list[str]:
    """Writes check.txt and check.png, and tells their paths."""
    title = printable(title)
    text, drawing = (os.path.join(folder, name) for name in ("check.txt", "check.png"))
    try:
        os.makedirs(folder, exist_ok=True)
        with open(text, "w", encoding="utf-8", errors="backslashreplace") as file:
            print(title, "", summary(result), "", details(result), sep="\n", file=file)
            print("\nImages of each class:", ", ".join(result.splits), file=file)
            counts = np.stack([split.class_counts for split in result.splits.values()], axis=1)
            for label, row in zip(result.labels, counts.tolist(), strict=True):
                print(" ", *(f"{count:>9,}" for count in row), f" {label}", file=file)
        _save(_histograms(result, title), drawing)
    except OSError as error:
        raise UserError(
            f"{folder}: can't be written to ({error.strerror}); choose another folder"
        ) from None
    return [text, drawing]


def write_groups(sources: Mapping[str, Source], result: Check, folder: str) -> list[str]:
    """Writes groups.csv, a table of all images in which those of the same pixels are one group, and
    tells its path: training on it keeps them on one side of what is held out.

    Writes nothing unless such images were parted by holding out, of images that are files. Raises
    UserError if a class has a name that no table can have.
    """
    if not result.leaks or HELD_OUT not in result.notes:
        return []
    path = os.path.join(os.path.realpath(folder), "groups.csv")
    if strange := [name for name in result.labels if not is_label(name)]:
        raise UserError(
            f"{path} is not written, as no class of a table can be called {some_of(strange)}: "
            "rename its folder"
        )
    groups = {image.name: same[0].name for same in result.identical for image in same}
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        table = csv.writer(file)
        table.writerow(["path", "label", "group"])
        for source in sources.values():
            assert source.label_ids is not None  # As of all folders.
            for i, (key, label_id) in enumerate(zip(source.keys, source.label_ids, strict=True)):
                name, label = source.describe(i), source.labels[label_id]
                image = os.path.realpath(source.describe_key(key))
                image = os.path.relpath(image, os.path.dirname(path))
                table.writerow([image, label, groups.get(name, name)])
    return [path]


def _figure(width: float, height: float) -> "Figure":
    """Of matplotlib's objects alone: no pyplot, no window, no state left behind."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: "Figure", path: str | os.PathLike) -> None:
    with warnings.catch_warnings():
        # Names in scripts that the font lacks are drawn as boxes: a warning says no more.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path, format="png")


def _histograms(result: Check, title: str) -> "Figure":
    from matplotlib.ticker import MaxNLocator

    found = [*(f"! {text}" for text in result.problems), *result.notes]
    told = [line for text in found for line in textwrap.wrap(text, 150, subsequent_indent="   ")]
    figure = _figure(12, 8 + 0.2 * len(told))
    figure.suptitle(title, fontsize=14, fontweight="bold", parse_math=False)
    figure.supxlabel("\n".join(told), x=0.02, ha="left", fontsize=9, parse_math=False)
    upper, *lower = figure.subplot_mosaic([["c"] * 4, ["h", "w", "a", "v"]]).values()
    _draw_classes(upper, result)
    sizes = [split.sizes for split in result.splits.values()]
    values = {
        "height in pixels": [size[:, 0] for size in sizes],
        "width in pixels": [size[:, 1] for size in sizes],
        "aspect (width / height)": [size[:, 1] / size[:, 0] for size in sizes],
        "values of pixels": [split.values for split in result.splits.values()],
    }
    for ax, (name, found) in zip(lower, values.items(), strict=True):
        everything = np.concatenate(found)
        if not len(everything):
            continue
        log = everything.max() > 20 * everything.min() and name != "values of pixels"
        edges = np.histogram_bin_edges(np.log(everything) if log else everything, 40)
        edges = np.exp(edges) if log else edges
        for i, one in enumerate(found):  # The first filled, so that none hides another.
            color = _COLORS[i % len(_COLORS)]
            ax.hist(one, edges.tolist(), histtype="step", fill=i == 0, color=color, linewidth=1.5)
        if log:
            ax.set_xscale("log")
        ax.set_xlabel(name)
        ax.set_ylabel("values looked at" if name == "values of pixels" else "images")
    for ax in (upper, *lower):
        ax.spines[["top", "right"]].set_visible(False)
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    return figure


def _draw_classes(ax: "Axes", result: Check) -> None:
    count = len(result.labels)
    first = next(iter(result.splits.values())).class_counts
    named = count <= _MANY_CLASSES
    order = np.arange(count) if named else np.argsort(-first, kind="stable")
    width = 0.8 / len(result.splits)
    for i, (name, split) in enumerate(result.splits.items()):
        color = _COLORS[i % len(_COLORS)]
        if named:
            places = order + (i - (len(result.splits) - 1) / 2) * width
            ax.bar(places, split.class_counts, width, label=name, color=color)
        else:
            ax.step(np.arange(count), split.class_counts[order], label=name, color=color)
    if named:
        labels = [_short(name, 18) for name in result.labels]
        long = count * max(map(len, labels)) > 120
        ax.set_xticks(order, labels, rotation=90 if long else 0, parse_math=False)
    else:
        ax.set_xlabel(f"{count:,} classes, from the largest to the smallest")
    ax.set_ylim(bottom=0)
    ax.set_title("Images of each class", fontsize=11, loc="left")
    ax.legend(frameon=False, loc="upper right", ncols=len(result.splits), bbox_to_anchor=(1, 1.12))


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


# What a preprocessing makes of images.


def draw_page(
    path: str | os.PathLike,
    source: Source,
    preprocess: Preprocess,
    *,
    count: int = 6,
    draws: int = 5,
    seed: int = 0,
    mix: Mix | None = None,
) -> None:
    """Draws a PNG with a row for each of some images: as it is, then preprocessed again and again.

    Args:
      path: the file to write; its folder is made if it isn't there.
      source: of which `count` images are chosen at random.
      preprocess: what is done to them; the range of values is undone.
      draws: how often each is preprocessed; once, if nothing is random.
      seed: decides the choice and everything random.
      mix: (float32 (count, h, w, c), draw) -> those images mixed, each with the one before, and
        the share in [0, 1] that is its own.

    Raises:
      UserError: an image can't be read or preprocessed, or the file not be written.
    """
    count = min(count, len(source))
    draws = draws if preprocess.random or mix else 1
    chosen = np.sort(np.random.default_rng(seed).choice(len(source), count, replace=False))
    examples = [source[int(i)] for i in chosen]
    labels = []
    for example in examples:
        ids = np.flatnonzero(example["label"]) if source.multi_label else [example["label"]]
        label = ", ".join(source.labels[i] for i in ids) or "no label"
        labels.append(_short(" ".join(label.split()), _TITLE_CHARS))
    figure = _figure(2.3 * (1 + draws), 2.5 * count + 0.6)
    axes = figure.subplots(count, 1 + draws, squeeze=False)
    for row, example, label in zip(axes, examples, labels, strict=True):
        height, width, _ = example["image"].shape
        _draw_image(row[0], example["image"], f"{label}\n{height} x {width}")
    for draw in range(draws):
        images = [
            preprocess(example["image"], np.random.default_rng((seed, draw, row)))
            for row, example in enumerate(examples)
        ]
        titles = [""] * count
        if mix:
            mixed, share = mix(np.stack(images), draw)
            images = list(mixed)
            if share < 0.995:
                titles = [
                    f"{share:.2f} {own}\n+ {1 - share:.2f} {labels[row - 1]}"
                    for row, own in enumerate(labels)
                ]
        for ax, image, title in zip(axes[:, 1 + draw], images, titles, strict=True):
            _draw_image(ax, preprocess.undo_range(image), title)
    figure.suptitle(f"{preprocess.spec}{', mixed' if mix else ''}", fontsize=10, parse_math=False)
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        _save(figure, path)
    except OSError as error:
        raise UserError(
            f"{os.fspath(path)} can't be written ({error.strerror}): choose another place"
        ) from None


def _draw_image(ax: "Axes", image: np.ndarray, title: str) -> None:
    pixels = shrink(image, 512)  # matplotlib makes floats of all that it gets.
    pixels = pixels[..., 0] if image.shape[2] == 1 else pixels
    smooth = "nearest" if max(image.shape[:2]) < _TINY else "antialiased"
    ax.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation=smooth)
    ax.set_title(title, fontsize=8, parse_math=False)
    ax.set(xticks=[], yticks=[])
