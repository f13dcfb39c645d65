"""Any number of images through a network, into a file: what is on them, or their features."""

import contextlib
import csv
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from vit_jax import data
from vit_jax.checkpoints.digests import crc32c
from vit_jax.checkpoints.labels import probabilities
from vit_jax.errors import UserError
from vit_jax.escape import cell, printable
from vit_jax.evaluation.metrics import prefetched
from vit_jax.evaluation.zero_shot import text_classifier
from vit_jax.files import atomic_write, is_bucket
from vit_jax.pretrained import Pretrained
from vit_jax.sharding import batch_sharding, divisible, make_mesh, replicated

if TYPE_CHECKING:
    from collections.abc import Iterable

Progress = Callable[[int, int], None]


class Answers(NamedTuple):
    """What a network says of some images.

    Attributes:
      paths: of the images.
      values: float32 (n, ...), NaN of those that can't be read.
      errors: why an image can't be read, "" of those that can.
    """

    paths: list[str]
    values: np.ndarray
    errors: list[str]


def answers(
    vit: Pretrained, paths: Sequence[str], function: Callable, model: Any, params: Any, batch: int
) -> Iterator[Answers]:
    """What `function(model, params, images)` gives of the images at some paths, in their order.

    They are read and preprocessed by all cores and go through all devices.

    Args:
      vit: tells the preprocessing.
      model, params: a network for all devices and its weights.
      batch: images at once, rounded up to a multiple of the number of devices.
    """
    mesh, channels = make_mesh(), vit.spec.channels
    colours = {1: "gray|", 3: "rgb|"}.get(channels, "")
    preprocess = data.parse(f"{colours}{vit.preprocess}", train=False)
    ops, normalize = preprocess.split()
    params = jax.device_put(params, replicated(mesh))  # Once, not with each batch.

    def forward(params: Any, images: jax.Array) -> jax.Array:
        return function(model, params, normalize(images) if normalize else images)

    step = jax.jit(
        forward, in_shardings=(None, batch_sharding(mesh)), out_shardings=replicated(mesh)
    )
    batches = data.eval_batches(
        data.unlabelled(paths, channels, preprocess),
        ops,
        batch_size=divisible(min(batch, len(paths) + 1)),
        workers=-1,
        corrupt="skip",
    )
    with contextlib.closing(batches):
        results = (
            {"values": step(params, b["image"]), "mask": b["mask"], "index": b["index"]}
            for b in batches
        )
        for found in prefetched(results):
            # Behind the images there is a blank one, and padding.
            here = (found["index"] >= 0) & (found["index"] < len(paths))
            some = [paths[i] for i in found["index"][here]]
            read = found["mask"][here]
            values = np.array(found["values"][here], np.float32)
            values[~read] = np.nan
            errors = ["" if r else _why(vit, ops, p) for r, p in zip(read, some, strict=True)]
            yield Answers(some, values, errors)


def _why(vit: Pretrained, ops: data.Preprocess, path: str) -> str:
    """Why an image can't be read, found out by trying once more."""
    try:
        ops(vit.read(path))
    except UserError as e:
        return str(e)
    return f"{path}: it could not be read, and now it can"


def write_predictions_csv(
    vit: Pretrained,
    paths: Sequence[str],
    file: str | os.PathLike,
    *,
    top: int | None = 5,
    labels: Sequence[str] | None = None,
    batch_size: int = 64,
    progress: Progress = lambda done, total: None,
) -> tuple[int, list[str]]:
    """Writes a table with a row for each image: its path, the most probable classes with their
    probabilities, and why it can't be read, if so.

    Rows are written to FILE.DIGEST.partial as they come. If this is stopped and called again with
    the same weights, images and wishes, it goes on behind the last row that is whole; FILE is there
    when all is written.

    Args:
      vit: see `vit_jax.load`.
      paths: of images, see `data.list_images`.
      file: to be written, not in a bucket.
      top: how many classes; None for the probabilities of all.
      labels: of LiT weights, what may be on the images.
      batch_size: images at once, over all devices.
      progress: called with the numbers of images done and of all.

    Returns:
      how many images had been done before, and why some can't be read, of those that were new.

    Raises UserError if the network gives no classes, or the file can't be written.
    """
    if is_bucket(file):
        raise UserError(f"{file} can't grow in a bucket: write here, and copy it there")
    model: Any
    params: Any
    if labels is not None:
        (model, params), names, loss = text_classifier(vit, labels, ("{}",)), [*labels], "softmax"
    elif not vit.spec.gives_classes:
        raise UserError("these weights give no classes: load weights that have a head")
    else:
        model, params, loss = vit.model_on(jax.devices()), vit.params, vit.loss
        names = [vit.label(i) for i in range(vit.spec.num_classes)]

    def function(model: Any, params: Any, images: jax.Array) -> jax.Array:
        return probabilities(model.apply({"params": params}, images), loss)

    count = len(names) if top is None else min(top, len(names))
    places = ["", *(f" {i}" for i in range(2, count + 1))] if top else [""]
    columns = ["picture", *(f"{c}{i}" for i in places for c in ("prediction", "probability"))]
    columns += [f"probability of {name}" for name in names] if top is None else []
    header = [*columns, "error"]
    wish = json.dumps([header, names, list(paths), vit.preprocess, _digest(vit)])
    name = hashlib.sha256(wish.encode()).hexdigest()[:8]
    partial = Path(f"{os.fspath(file)}.{name}.partial")
    mistakes: list[str] = []
    try:
        with _growing_table(partial, header) as (before, write):
            progress(done := before, len(paths))
            for some in answers(vit, paths[before:], function, model, params, batch_size):
                rows = []
                for path, row, error in zip(*some, strict=True):
                    best = np.argsort(-row, kind="stable")[: len(places)]
                    said = [text for i in best for text in (names[i], f"{row[i]:.6f}")]
                    said += [f"{p:.6f}" for p in row] if top is None else []
                    rows.append([path, *([""] * (len(columns) - 1) if error else said), error])
                write(rows)
                mistakes += filter(None, some.errors)
                progress(done := done + len(rows), len(paths))
        os.replace(partial, file)
    except OSError as e:
        raise UserError(f"{file} can't be written ({e.strerror or e})") from e
    return before, mistakes


def _digest(vit: Pretrained) -> str:
    """What tells these weights from others."""
    arrays = flatten_dict(vit.params, sep="/")
    return " ".join(f"{name} {crc32c(np.asarray(arrays[name]))}" for name in sorted(arrays))


@contextlib.contextmanager
def _growing_table(
    path: Path, header: Sequence[str]
) -> Iterator[tuple[int, Callable[[Sequence[Sequence[str]]], None]]]:
    """(rows that are there, what writes more): a CSV file with one line a row, of which a last line
    that is not whole is cut off."""
    with open(path, "a+b") as file:
        file.seek(0)
        whole = (content := file.read()).rfind(b"\n") + 1
        file.truncate(whole)

        def write(rows: Sequence[Sequence[str]]) -> None:
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows(map(cell, row) for row in rows)
            file.write(text.getvalue().encode())
            file.flush()

        if not whole:
            write([header])
        yield max(content[:whole].count(b"\n") - 1, 0), write


def write_features(
    vit: Pretrained,
    paths: Sequence[str],
    file: str | os.PathLike,
    *,
    what: str = "pooled",
    layer: str | None = None,
    batch_size: int = 64,
    progress: Progress = lambda done, total: None,
) -> list[str]:
    """Writes the features of images, in their order, with memory for some of them at a time.

    Args:
      vit: see `vit_jax.load`.
      paths: of images, see `data.list_images`.
      file: FILE.npz with "features" float32 (n, ...), "pictures" and "errors" (n,); or FILE.parquet
        with a row for each image in the columns "picture", "features" (a list of numbers) and
        "error". The features of an image that can't be read are NaN.
      what, layer: see `Pretrained.features`.
      batch_size: images at once, over all devices.
      progress: called with the numbers of images done and of all.

    Returns:
      why some images can't be read.

    Raises UserError for features that there are none of, another ending, or a file that can't be
    written.
    """
    kind = os.path.splitext(os.fspath(file))[1].lower()
    if kind not in (".npz", ".parquet"):
        raise UserError(f"{file} is named as neither .npz nor .parquet: name it so")
    function = vit.feature_function(what, layer)
    model = vit.model_on(jax.devices())
    images = jax.ShapeDtypeStruct((1, *vit.image_size, vit.spec.channels), np.float32)
    shape = jax.eval_shape(lambda p, x: function(model, p, x), vit.params, images).shape[1:]
    errors: list[str] = []

    def found() -> Iterator[Answers]:
        for some in answers(vit, paths, function, model, vit.params, batch_size):
            yield some
            errors.extend(some.errors)
            progress(len(errors), len(paths))

    write = _write_npz if kind == ".npz" else _write_parquet
    with atomic_write(file) as out:
        write(out, len(paths), shape, found())
    return list(filter(None, errors))


def _write_npz(out: Any, count: int, shape: tuple[int, ...], found: "Iterable[Answers]") -> None:
    """Array by array, as `np.savez` would, but without having all of them."""
    pictures: list[str] = []
    errors: list[str] = []
    with zipfile.ZipFile(out, "w") as archive:
        with archive.open("features.npy", "w", force_zip64=True) as member:
            about = {"descr": "<f4", "fortran_order": False, "shape": (count, *shape)}
            np.lib.format.write_array_header_2_0(member, about)
            for some in found:
                member.write(some.values.astype("<f4").tobytes())
                pictures += map(printable, some.paths)
                errors += map(printable, some.errors)
        for name, texts in (("pictures", pictures), ("errors", errors)):
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, np.array(texts, np.str_), allow_pickle=False)


def _write_parquet(
    out: Any, count: int, shape: tuple[int, ...], found: "Iterable[Answers]"
) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as e:
        raise UserError(
            "what writes .parquet isn't installed: run pip install 'vit_jax[parquet]', or name the "
            "file .npz"
        ) from e
    numbers = pa.list_(pa.float32(), int(np.prod(shape)))
    schema = pa.schema([("picture", pa.string()), ("features", numbers), ("error", pa.string())])
    schema = schema.with_metadata({"shape": json.dumps(shape)})
    with pq.ParquetWriter(out, schema) as writer:
        for some in found:
            rows = pa.FixedSizeListArray.from_arrays(
                pa.array(some.values.ravel()), numbers.list_size
            )
            columns = [[*map(printable, some.paths)], rows, [*map(printable, some.errors)]]
            writer.write_table(pa.table(columns, schema=schema))
