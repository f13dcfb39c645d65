"""Any number of images through a network, into a file: what is on them, or their features."""

import contextlib
import csv
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
from vit_jax.files import atomic_write, is_bucket, locks
from vit_jax.pretrained import Pretrained
from vit_jax.sharding import batch_sharding, divisible, make_mesh, replicated

Progress = Callable[[int, int], None]


class Batch(NamedTuple):
    """What a network says of some images.

    Attributes:
      paths: of the images.
      values: float32 (n, ...), NaN of those that can't be read.
      errors: why an image can't be read, "" of those that can.
    """

    paths: list[str]
    values: np.ndarray
    errors: list[str]


def apply_to_files(
    vit: Pretrained,
    paths: Sequence[str],
    function: Callable,
    model: Any,
    params: Any,
    batch_size: int,
) -> Iterator[Batch]:
    """What `function(model, params, images)` gives of the images at some paths, in their order.

    They are read and preprocessed by all cores and go through all devices.

    Args:
      vit: tells the preprocessing.
      model, params: a network for all devices and its weights.
      batch_size: images at once, rounded up to a multiple of the number of devices.
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
        data.unlabelled(paths, channels, preprocess, vit.image_size),
        ops,
        batch_size=divisible(min(batch_size, len(paths) + 1)),
        workers=-1,
        corrupt="skip",
        warns=False,  # Errors are told with the images.
    )
    with contextlib.closing(batches):
        results = (
            {"values": step(params, b["image"]), "mask": b["mask"], "index": b["index"]}
            for b in batches
        )
        for result in prefetched(results):
            # Behind the images there is a blank one, and padding.
            is_image = (result["index"] >= 0) & (result["index"] < len(paths))
            names = [paths[i] for i in result["index"][is_image]]
            was_read = result["mask"][is_image]
            values = np.array(result["values"][is_image], np.float32)
            values[~was_read] = np.nan
            errors = [
                "" if good else _read_error(vit, ops, path)
                for good, path in zip(was_read, names, strict=True)
            ]
            yield Batch(names, values, errors)


def _read_error(vit: Pretrained, ops: data.Preprocess, path: str) -> str:
    """Why an image can't be read, found out by trying once more."""
    try:
        ops(vit.read(path))
    except UserError as e:
        return str(e)
    return f"{path}: it could not be read, and now it can"


def check_target(
    file: str | os.PathLike, inputs: Iterable[str | os.PathLike], overwrite: bool
) -> None:
    """Raises UserError if a file can't be written, or would replace one of the inputs or, without
    `overwrite`, anything."""
    if os.path.isdir(file):
        raise UserError(f"{file} is a folder: name the file to write")
    if not os.path.exists(file):
        return
    if any(os.path.exists(path) and os.path.samefile(file, path) for path in inputs):
        raise UserError(f"{file} is read by this command: name another file to write")
    if not overwrite:
        raise UserError(f"{file} is there already: name another file, or replace it with --force")


def _checked(paths: Sequence[str | os.PathLike]) -> list[str]:
    if isinstance(paths, str | bytes | os.PathLike) or not len(paths):
        raise UserError(f"paths are {paths!r}, expected a list of one or more")
    return [os.fspath(path) for path in paths]


def write_predictions_csv(
    vit: Pretrained,
    paths: Sequence[str | os.PathLike],
    file: str | os.PathLike,
    *,
    top: int | None = 5,
    labels: Sequence[str] | None = None,
    batch_size: int = 64,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> tuple[int, list[str]]:
    """Writes a table with a row for each image: its path, the most probable classes with their
    probabilities, and why it can't be read, if so.

    Rows are written to FILE.DIGEST.partial as they come. If this is stopped and called again with
    the same weights, images and options, it goes on behind the last row that is whole; FILE is
    there when all is written.

    Args:
      vit: see `vit_jax.load`.
      paths: of images, see `data.list_images`.
      file: to be written, not in a bucket.
      top: how many classes; None for the probabilities of all.
      labels: of LiT weights, what may be on the images.
      batch_size: images at once, over all devices.
      overwrite: whether a file of this name may be replaced.
      progress: called with the numbers of images done and of all.

    Returns:
      how many images had been done before, and why some can't be read.

    Raises UserError if the network gives no classes, no image can be read, another process writes
    the same, or the file can't be written.
    """
    paths = _checked(paths)
    if is_bucket(file):
        raise UserError(f"{file} can't grow in a bucket: write here, and copy it there")
    if top is not None and top < 1:
        raise UserError(f"top is {top}, expected at least 1")
    check_target(file, paths, overwrite)
    model: Any
    params: Any
    if labels is not None:
        (model, params), names, loss = text_classifier(vit, labels, ("{}",)), [*labels], "softmax"
    else:
        vit.check_gives_classes()
        model, params, loss = vit.model_on(jax.devices()), vit.params, vit.loss
        names = [vit.label(i) for i in range(vit.spec.num_classes)]

    def function(model: Any, params: Any, images: jax.Array) -> jax.Array:
        return probabilities(model.apply({"params": params}, images), loss)

    ranks = range(1, (1 if top is None else min(top, len(names))) + 1)
    suffixes = ["" if rank == 1 else f" {rank}" for rank in ranks]
    columns = ["path", *(f"{c}{end}" for end in suffixes for c in ("prediction", "probability"))]
    columns += [f"probability of {name}" for name in names] if top is None else []
    header = [*columns, "error"]

    def row_of(path: str, values: np.ndarray, error: str) -> list[str]:
        if error:
            return [path, *[""] * (len(columns) - 1), error]
        best = np.argsort(-values, kind="stable")[: len(ranks)]
        cells = [text for i in best for text in (names[i], f"{values[i]:.6f}")]
        return [path, *cells, *(f"{p:.6f}" for p in values if top is None), ""]

    about = [header, names, paths, vit.preprocess, loss, _digest(vit)]
    key = hashlib.sha256(repr(about).encode("utf-8", "backslashreplace")).hexdigest()[:8]
    partial = Path(f"{os.fspath(file)}.{key}.partial")
    try:
        with _growing_table(partial, header) as (rows, write):
            before, errors = len(rows), [row[-1] for row in rows]
            progress(before, len(paths))
            for batch in apply_to_files(vit, paths[before:], function, model, params, batch_size):
                write([row_of(*image) for image in zip(*batch, strict=True)])
                errors += batch.errors
                progress(len(errors), len(paths))
            if all(errors):
                partial.unlink()
                raise UserError(f"none of the {len(paths):,} images can be read: {errors[0]}")
            os.replace(partial, file)
    except OSError as e:
        raise UserError(f"{file} can't be written ({e.strerror or e})") from e
    return before, list(filter(None, errors))


def _digest(vit: Pretrained) -> str:
    """What tells a network and its weights from others."""
    arrays = flatten_dict(vit.params, sep="/")
    sums = [f"{name} {crc32c(np.asarray(arrays[name]))}" for name in sorted(arrays)]
    return f"{vit.spec.architecture()} {vit.image_size} {sums}"


@contextlib.contextmanager
def _growing_table(
    path: Path, header: Sequence[str]
) -> Iterator[tuple[list[list[str]], Callable[[Sequence[Sequence[str]]], None]]]:
    """(rows that are there, what writes more): a CSV file with one line a row, of which a last line
    that is not whole is cut off. No other process may write it meanwhile."""
    fcntl = locks()
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
        except BlockingIOError:
            is_ours = False
        if not is_ours:
            raise UserError(f"another process writes {path}: wait for it, or name another file")
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
        yield list(csv.reader(content[:whole].decode().splitlines()))[1:], write


def write_features(
    vit: Pretrained,
    paths: Sequence[str | os.PathLike],
    file: str | os.PathLike,
    *,
    what: str = "pooled",
    layer: str | None = None,
    batch_size: int = 64,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> list[str]:
    """Writes the features of images, in their order, with memory for some of them at a time.

    Args:
      vit: see `vit_jax.load`.
      paths: of images, see `data.list_images`.
      file: FILE.npz with "features" float32 (n, ...), "paths" and "errors" (n,); or FILE.parquet
        with a row for each image in the columns "path", "features" (a list of numbers) and "error".
        The features of an image that can't be read are NaN.
      what, layer: see `Pretrained.features`.
      batch_size: images at once, over all devices.
      overwrite: whether a file of this name may be replaced.
      progress: called with the numbers of images done and of all.

    Returns:
      why some images can't be read.

    Raises UserError for features that there are none of, another ending, if no image can be read,
    or the file can't be written; then it stays as it was.
    """
    paths = _checked(paths)
    kind = os.path.splitext(os.fspath(file))[1].lower()
    if kind not in (".npz", ".parquet"):
        raise UserError(f"{file} is named as neither .npz nor .parquet: name it so")
    check_target(file, paths, overwrite)
    function = vit.feature_function(what, layer)
    model = vit.model_on(jax.devices())
    images = jax.ShapeDtypeStruct((1, *vit.image_size, vit.spec.channels), np.float32)
    shape = jax.eval_shape(lambda p, x: function(model, p, x), vit.params, images).shape[1:]
    errors: list[str] = []

    def batches() -> Iterator[Batch]:
        for batch in apply_to_files(vit, paths, function, model, vit.params, batch_size):
            yield batch
            errors.extend(batch.errors)
            progress(len(errors), len(paths))
        if all(errors):
            raise UserError(f"none of the {len(paths):,} images can be read: {errors[0]}")

    write = _write_npz if kind == ".npz" else _write_parquet
    with atomic_write(file) as out:
        write(out, len(paths), shape, batches())
    return list(filter(None, errors))


def _write_npz(out: Any, count: int, shape: tuple[int, ...], batches: Iterable[Batch]) -> None:
    """Array by array, as `np.savez` would, but without having all of them."""
    paths: list[str] = []
    errors: list[str] = []
    with zipfile.ZipFile(out, "w") as archive:
        with archive.open("features.npy", "w", force_zip64=True) as member:
            about = {"descr": "<f4", "fortran_order": False, "shape": (count, *shape)}
            np.lib.format.write_array_header_2_0(member, about)
            for batch in batches:
                member.write(batch.values.astype("<f4").tobytes())
                paths += map(printable, batch.paths)
                errors += map(printable, batch.errors)
        for name, texts in (("paths", paths), ("errors", errors)):
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, np.array(texts, np.str_), allow_pickle=False)


def _write_parquet(out: Any, count: int, shape: tuple[int, ...], batches: Iterable[Batch]) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as e:
        raise UserError(
            "what writes .parquet isn't installed: run pip install 'vit_jax[parquet]', or name the "
            "file .npz"
        ) from e
    numbers = pa.list_(pa.float32(), int(np.prod(shape)))
    schema = pa.schema([("path", pa.string()), ("features", numbers), ("error", pa.string())])
    schema = schema.with_metadata({"shape": json.dumps(shape)})
    with pq.ParquetWriter(out, schema) as writer:
        for batch in batches:
            values = pa.array(batch.values.ravel())
            rows = pa.FixedSizeListArray.from_arrays(values, numbers.list_size)
            columns = [[*map(printable, batch.paths)], rows, [*map(printable, batch.errors)]]
            writer.write_table(pa.table(columns, schema=schema))
