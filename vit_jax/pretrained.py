"""What `vit_jax.load` gives: network, weights, labels and preprocessing in one object."""

import dataclasses
import functools
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from vit_jax import checkpoints, data
from vit_jax.buckets import local_copy
from vit_jax.checkpoints import hub, huggingface
from vit_jax.checkpoints.formats import notes_beside
from vit_jax.checkpoints.hub import class_names
from vit_jax.checkpoints.labels import check_loss, ranked
from vit_jax.errors import UserError
from vit_jax.escape import to_json
from vit_jax.files import as_path, atomic_write, bucket_errors, cache_folder, is_bucket, list_folder
from vit_jax.models import FAMILIES, LiT, Spec
from vit_jax.models.family import weightless_fields
from vit_jax.models.kernels import choose_kernels

WEIGHTS = "weights.npz"  # What the end of a training run leaves in its workdir,
STYLE = "prelinen"  # with the names that the original, big_vision and timm read.

_LARGEST_NOTES = 64 << 20  # Bytes of a .json beside weights: the names of a million classes.
_LARGEST_IMAGE = 4096  # Pixels a side that notes can ask for.
_BATCH = 32  # Images that `Pretrained.__call__` puts through the network at once.

Image = Any  # Whatever `Pretrained.read` takes.

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)  # Arrays have no truth value to compare by.
class Pretrained:
    """A Vision Transformer with its weights and what is needed to use it.

    Attributes:
      model: the Linen module, in stock forms; what is faster on the devices here is chosen by the
        methods, see `models.kernels`.
      params: nested dict of float32 arrays; flattened with "/" it has the official keys.
      spec: the architecture in numbers.
      labels: names of the classes, or None if nobody noted them.
      preprocess: how images are made ready, e.g. "resize(224)|value_range(-1, 1)".
      loss: what the head was trained with, by which logits become probabilities: "softmax", of
        classes that exclude each other, or "sigmoid", where each is for itself.
      notes: what was done to the stored weights that a person should know.
    """

    model: nn.Module
    params: Mapping[str, Any]
    spec: Spec
    labels: tuple[str, ...] | None
    preprocess: str
    loss: str = "softmax"
    notes: tuple[str, ...] = ()

    @property
    def classifies_by_text(self) -> bool:
        """Whether classes are texts, see `PretrainedLiT`; else the network has a head for them."""
        return self.spec.classifies_by_text

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the position embeddings are for."""
        return self.spec.image_size

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Logits of preprocessed images.

        Args:
          images: (n, h, w, c) float32 of `image_size`, preprocessed.

        Returns:
          float32 (n, num_classes); without a head its input, (n, features).

        Raises UserError for another shape, or for integers, which are not preprocessed.
        """
        return self._batched(
            lambda model, params, x: model.apply({"params": params}, x), "logits", images
        )

    def _batched(self, function: Callable, name: str, images: np.ndarray) -> np.ndarray:
        """function(model, params, images) of checked images, some at once, compiled once."""
        images = np.asarray(images)
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise UserError(
                f"images are {images.dtype}, expected preprocessed float32: "
                "use predict, which preprocesses, or do it yourself"
            )
        images = images.astype(np.float32, copy=False)
        expected = (*self.image_size, self.spec.channels)
        if images.shape[1:] != expected:
            raise UserError(
                f"images have shape {images.shape}, expected (n, {', '.join(map(str, expected))}): "
                "preprocess them, or load the weights with image_size=(h, w)"
            )
        if name not in self._compiled:
            model = self.model_on(jax.local_devices()[:1])
            self._compiled[name] = jax.jit(functools.partial(function, model))
        padding = -len(images) % _BATCH if len(images) > _BATCH else 0
        padded = np.concatenate([images, np.zeros((padding, *expected), np.float32)])
        results = [
            self._compiled[name](self._device_params, padded[i : i + _BATCH])
            for i in range(0, max(len(padded), 1), _BATCH)
        ]
        return np.concatenate([np.asarray(x) for x in results])[: len(images)]

    def model_on(self, devices: Sequence[jax.Device]) -> Any:
        """The model in the forms that are fastest on the devices that will run it."""
        return self.model.clone(kernels=choose_kernels(self.model, self.image_size, devices)[0])

    @functools.cached_property
    def _device_params(self) -> Any:
        return jax.device_put(self.params)

    @functools.cached_property
    def _compiled(self) -> dict[str, Callable]:
        return {}

    def predict(self, images: Iterable[Image], *, top: int = 5) -> list[list[tuple[str, float]]]:
        """Says what is on images.

        Args:
          images: any number of images as `read` takes them, of any size.
          top: how many classes to name.

        Returns:
          for each image the `top` most probable (label, probability), best first. Classes without
          a name are called by their index. With the loss "sigmoid" the probability is that of the
          class for itself.

        Raises UserError if an image can't be read or the network has no head.
        """
        self.check_gives_classes()
        if top < 1:
            raise UserError(f"top is {top}, expected at least 1")
        answers: list[list[tuple[int, float]]] = []
        for batch in self.prepared(images):
            answers += [ranked(row, range(len(row)), top, loss=self.loss) for row in self(batch)]
        return [[(self.label(i), p) for i, p in answer] for answer in answers]

    def check_gives_classes(self) -> None:
        """Raises UserError if the network has no head for classes."""
        if self.classifies_by_text:
            raise UserError(
                "these weights are a LiT bundle, which classifies by words: give labels, with "
                "evaluation.classify(vit, images, labels) or vit-jax predict --labels"
            )
        if not self.spec.gives_classes:
            raise UserError("these weights give no classes: load weights that have a head")

    def features(
        self, images: Iterable[Image], what: str = "pooled", *, layer: str | None = None
    ) -> np.ndarray:
        """What the network makes of images, for a model of one's own.

        Args:
          images: any number of images as `read` takes them, of any size.
          what: "pooled", what the head would read (of LiT weights the embedding); "class", the
            class token; "patches", those of the patches, row by row or as a map; or "tokens", all.
          layer: whose tokens: the name of a block ("encoderblock_3") or of another feature that
            `model.apply(..., return_features=True)` gives; by default what the last block gives,
            normalised.

        Returns:
          float32 (n, ...).

        Raises UserError if an image can't be read, or the network has no such features.
        """
        function = self.feature_function(what, layer)
        name = f"features {what} {layer}"
        found = [self._batched(function, name, batch) for batch in self.prepared(images)]
        if not found:
            raise UserError("no image to take the features of: give one at least")
        return np.concatenate(found)

    def feature_function(
        self, what: str = "pooled", layer: str | None = None
    ) -> Callable[[Any, Any, jax.Array], jax.Array]:
        """(model, params, preprocessed images) -> float32 features; see `features`.

        Raises UserError for features that there are none of.
        """
        kinds = ("pooled", "class", "patches", "tokens")
        if what not in kinds:
            raise UserError(f"features are {what!r}, expected one of {', '.join(kinds)}")
        # Whether or not the head reads it.
        if what == "class" and "cls" not in self.spec.image_params(self.params):
            raise UserError(f"{self.spec.description} has no class token: take the pooled features")
        if what == "pooled" and layer:
            raise UserError(f"pooled features are those of the end: leave out the layer {layer!r}")

        def function(model: Any, params: Any, images: jax.Array) -> jax.Array:
            if what == "pooled" and self.classifies_by_text:
                return model.apply({"params": params}, images=images)[0]
            variables = {"params": model.image_params(params)}
            network = model.image_tower()
            _, found = network.apply(variables, images, return_features=True)
            name = layer or ("pre_logits" if what == "pooled" else network.final_norm)
            if name not in found:
                raise UserError(f"there is no layer {name!r}, only {', '.join(found)}")
            x = found[name].astype(jnp.float32)
            if what in ("pooled", "tokens"):
                return x
            if what == "patches" and x.ndim == 4:  # A map, of patches alone.
                return x
            if x.ndim != 3 or x.shape[1] <= network.num_prefix_tokens:
                raise UserError(f"{name} has no {what} {x.shape}: take its tokens, which are all")
            return x[:, 0] if what == "class" else x[:, network.num_prefix_tokens :]

        return function

    def prepared(self, images: Iterable[Image]) -> Iterator[np.ndarray]:
        """Batches of preprocessed images: memory for one, however many images there are."""
        one = isinstance(images, str | bytes | bytearray | memoryview | os.PathLike)
        one = one or hasattr(images, "read") or not np.iterable(images)
        if one or len(getattr(images, "shape", range(4))) < 4:  # Of arrays, a batch.
            raise UserError("one image was given, expected a list of images: write [image]")
        preprocess, rest = data.parse(self.preprocess), iter(images)
        while batch := [preprocess(self.read(x)) for x in itertools.islice(rest, _BATCH)]:
            yield np.stack(batch)

    def read(self, image: Image) -> np.ndarray:
        """An image with the channels that the network takes, (h, w, channels).

        Args:
          image: a path; the content of an image file, as bytes or an open file; an image of Pillow;
            or an array (h, w) or (h, w, channels) of uint8, or of what `levels` in the recorded
            preprocessing are for. Where the network takes colours, grey ones get three channels and
            transparency is dropped, as of files.

        Raises UserError if it can't be read or has other channels.
        """
        channels = self.spec.channels
        if isinstance(image, str | os.PathLike):
            return data.read(image, channels=channels)
        if hasattr(image, "read"):
            image = image.read()
        if isinstance(image, bytes | bytearray | memoryview):
            return data.decode(bytes(image), channels=channels)
        if hasattr(image, "getexif"):
            from PIL import ImageOps

            image = ImageOps.exif_transpose(image)
            if not image.mode.startswith(("I", "F")):  # Those of more than 8 bits keep them.
                image = image.convert("L" if channels == 1 else "RGB")
        array = np.asarray(image)
        array = array[..., None] if array.ndim == 2 else array
        if channels == 3 and array.ndim == 3 and array.shape[2] in (1, 4):
            array = np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array[..., :3]
        if array.ndim != 3 or array.shape[2] != channels or array.dtype.kind not in "iuf":
            raise UserError(
                f"the image has shape {array.shape} and type {array.dtype}, expected a path, the "
                f"content of an image file, an image of Pillow or an array (h, w, {channels}) of "
                "uint8, or of numbers for which the preprocessing has levels"
            )
        return array

    def __getstate__(self) -> dict[str, Any]:
        """The fields: what was compiled or put on a device stays here."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def label(self, index: int) -> str:
        """The name of a class, or its index as text."""
        return self.labels[index] if self.labels else str(int(index))

    def embed_images(self, images: np.ndarray) -> np.ndarray:
        raise UserError("these weights have no text tower: load a LiT bundle")

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        raise UserError("these weights have no text tower: load a LiT bundle")

    def to_notes(self) -> "Notes":
        """What is noted beside the weights.

        Raises UserError for labels or a preprocessing that `load` would refuse.
        """
        defaults = {f.name: f.default for f in dataclasses.fields(self.spec.module)}
        untold = {name: getattr(self.spec, name) for name in self.spec.untold}
        untold = {name: value for name, value in untold.items() if value != defaults[name]}
        notes = Notes(
            self.spec.classifier, self.image_size, self.preprocess, self.labels, untold, self.loss
        )
        notes.check()
        if self.labels and len(self.labels) != self.spec.num_classes:
            raise UserError(
                f"{len(self.labels)} labels for a head of {self.spec.num_classes} classes: give as "
                "many"
            )
        return notes

    def save(self, path: str | os.PathLike, *, style: str = "linen") -> None:
        """Writes the weights in the official layout; the original code reads the .npz too.

        What the layout has no place for (labels, preprocessing, image size) goes into a small .json
        file of the same name beside it, which `load` reads if it is there.

        Args:
          path: a name ending in .npz, .safetensors or .orbax (a folder).
          style: "linen" for today's key names, "prelinen" for those of the 2020 and 2021 files,
            "2020" for those of the first hybrids.

        Raises UserError for another ending or style, for what `to_notes` refuses, or if it can't be
        written.
        """
        file = as_path(path)
        checkpoints.check_ending(file)
        notes = self.to_notes()  # What load would refuse is refused before anything is written.
        checkpoints.to_style({}, style)  # And so is an unknown style.
        # Both are written before either takes its name, so that the notes of other weights stand
        # beside these, if a crash comes just then, for a moment only.
        with atomic_write(file.with_suffix(".json")) as out:
            out.write(notes.to_json())
            out.flush()
            checkpoints.save_weights(file, self.params, style=style)
        read = checkpoints.read_spec(
            flatten_dict(self.params, sep="/"),
            classifier=notes.classifier,
            image_size=notes.image_size,
            untold=notes.untold,
            where=str(path),
        )
        own, found = (flatten_dict(s.architecture(), sep=".") for s in (self.spec, read))
        if lost := [f"{field} {value}" for field, value in own.items() if found[field] != value]:
            _log.warning(
                "%s: neither its arrays nor its notes can tell %s: load will take it for another "
                "network than this",
                *(path, ", ".join(lost)),
            )


@dataclasses.dataclass(frozen=True, eq=False)
class PretrainedLiT(Pretrained):
    """A LiT bundle: images and texts are embedded into one space.

    Attributes:
      vocabulary: the file of the tokenizer, .txt (WordPiece) or .model (SentencePiece), or None if
        there is none beside the weights; then only images can be embedded.
    """

    model: LiT
    vocabulary: Path | None = None

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Raises UserError: a LiT bundle has no classes."""
        raise UserError("these weights are a LiT bundle without classes: call embed_images instead")

    def embed_images(self, images: np.ndarray) -> np.ndarray:
        """Embeds preprocessed images.

        Args:
          images: (n, h, w, c) float32 of `image_size`, preprocessed.

        Returns:
          float32 (n, d), of length 1.
        """
        return self._batched(
            lambda model, params, x: model.apply({"params": params}, images=x)[0], "images", images
        )

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embeds texts.

        Args:
          texts: any number of them; what is longer than 16 tokens is cut.

        Returns:
          float32 (n, d), of length 1.

        Raises UserError if the vocabulary is not there, or has more pieces than the weights.
        """
        if isinstance(texts, str):
            raise UserError("embed_texts takes a list of texts: write embed_texts([text])")
        tokens = self._tokenizer(texts)
        known = self.spec.text["vocab_size"]
        if tokens.max(initial=0) >= known:  # The network would answer with NaN.
            raise UserError(
                f"{self.vocabulary} has a piece number {tokens.max()}, but these weights know "
                f"{known:,} pieces: put the vocabulary that was published with them beside them"
            )
        embeddings = []
        for start in range(0, len(tokens), _BATCH):
            rows = tokens[start : start + _BATCH]
            padded = np.pad(rows, ((0, _BATCH - len(rows)), (0, 0)), mode="edge")
            embeddings.append(self._embed_tokens(self._device_params, padded)[: len(rows)])
        none = np.zeros((0, self.model.embedding_size), np.float32)
        return np.concatenate([none, *(np.asarray(x) for x in embeddings)])

    def save(self, path: str | os.PathLike, *, style: str = "linen") -> None:
        """As `Pretrained.save`, with the vocabulary copied beside the weights.

        Raises UserError too if another file has that name.
        """
        if self.vocabulary is None:
            super().save(path, style=style)
            return
        copy = as_path(path).with_suffix(self.vocabulary.suffix)
        content = self.vocabulary.read_bytes()
        if copy.exists() and not (copy.is_file() and copy.read_bytes() == content):
            raise UserError(
                f"{copy} is there already and is not the vocabulary that belongs beside {path}: "
                "choose another name"
            )
        super().save(path, style=style)
        if not copy.exists():
            with atomic_write(copy) as file:
                file.write(content)

    @functools.cached_property
    def _embed_tokens(self) -> Callable:
        return jax.jit(lambda params, t: self.model.apply({"params": params}, tokens=t)[1])

    @functools.cached_property
    def _tokenizer(self) -> Callable[[Sequence[str]], np.ndarray]:
        from vit_jax.tokenizers import open_tokenizer

        if self.vocabulary is None:
            raise UserError(
                "there is no vocabulary beside the weights: put NAME.txt (WordPiece) or NAME.model "
                "(SentencePiece) next to NAME.npz"
            )
        return open_tokenizer(self.vocabulary)


def load(
    source: str | os.PathLike,
    *,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    pre_logits: bool | None = None,
    classifier: str | None = None,
    heads: int | None = None,
    allow_nonfinite: bool = False,
    channels: int | None = None,
    window: int | None = None,
    **overrides: Any,
) -> Pretrained:
    """Loads weights. The architecture is read from the file.

    Args:
      source: a file of weights (.npz, .safetensors or an Orbax folder; of a file with several
        networks, "FILE:img" takes one), the workdir of a training run, or a name or address of
        published weights ("augreg/B_16", "imagenet21k/ViT-B_16", "facebook/dinov2-small",
        "gs://...", "https://..."; see `checkpoints.hub.resolve`), which are downloaded once. Files
        and workdirs may be in buckets.
      num_classes: None keeps the stored head; a number gives a new head of zeros, for fine-tuning,
        even if the stored one has as many classes; 0 gives none, and the network answers with what
        its head would read.
      image_size: None keeps the stored position embeddings; a size in pixels, one number or
        (height, width), resamples them.
        Images are then made that large as recorded: by the same method, with the same crop and
        values.
      pre_logits: None keeps the tanh layer before the head with a kept head or none, and drops it
        with a new one (the paper's fine-tuning); True and False say so outright.
      classifier: how tokens are pooled, where neither the arrays nor notes beside them tell it or
        they are wrong: "gap", "first" (big_vision's "0"), "unpooled" ("none"), "token_unpooled".
      heads: attention heads, of a file of PyTorch's that doesn't tell them.
      allow_nonfinite: whether weights that hold NaN or infinity are loaded, to look at them.
      channels: None keeps the first layer; a number makes it that of images of so many channels, by
        timm's rule: filters are added up for grey, and repeated and scaled for others.
      window: None keeps the windows of a Swin Transformer; a number of tokens changes them, and
        resizes the tables of biases as the original does.
      **overrides: fields of the model that have no weights: dropout_rate, attention_dropout_rate,
        stochastic_depth_rate, drop_path_mode and dtype, the one that is computed in. And what else
        no array tells, before notes: activation, layer_norm_epsilon, position_resize, layer_scale.

    Raises UserError if the source can't be read or doesn't fit.
    """
    known, kinds = weightless_fields(), untold_fields()
    for field in overrides:
        if field not in (*known, *kinds):
            of_model = ", ".join((*known, *kinds))
            raise UserError(f"load takes no {field!r}: of the model only {of_model}")
    told = {field: overrides.pop(field) for field in kinds if field in overrides}
    _check_untold(told)
    no_head = type(num_classes) is int and num_classes == 0
    if num_classes is not None and not (no_head or is_count(num_classes)):
        raise UserError(f"num_classes is {num_classes!r}, expected a whole number of at least 0")
    if channels is not None and not is_count(channels):
        raise UserError(f"channels is {channels!r}, expected a whole number of at least 1")
    if window is not None and not is_count(window):
        raise UserError(f"window is {window!r}, expected a whole number of at least 1")
    size = None if image_size is None else height_width(image_size)
    path, tower = find_weights(source)
    told |= {"classifier": classifier} if classifier else {}
    arrays, spec, notes = read_weights(
        *(path, tower),
        likely_size=size,
        told=told,
        allow_nonfinite=allow_nonfinite,
        heads=heads,
        pre_logits=pre_logits,
        window=window,
    )
    arrays, new = spec.adapt(
        arrays,
        num_classes=None if num_classes is None else int(num_classes),
        image_size=size,
        pre_logits=pre_logits,
        channels=None if channels is None else int(channels),
        window=window,
    )
    for field in overrides:
        if field not in new.weightless:
            raise UserError(f"{new.name or 'this network'} has no {field}: leave it out")
    bundle: dict[str, Any] = {
        "model": new.model(**overrides),
        "params": checkpoints.to_tree(arrays),
        "spec": new,
        "labels": class_labels(path, notes, new) if num_classes is None else None,
        "preprocess": preprocess_for(notes, spec, new),
        # A new head has not been trained at all.
        "loss": notes.loss if notes and num_classes is None else "softmax",
    }
    if (old := spec.channels) != new.channels:
        how = "added up" if new.channels == 1 else f"repeated and scaled by {old}/{new.channels}"
        bundle["notes"] = (
            f"its first layer, of {old} channels, {how} for images of {new.channels}",
        )
    if not new.classifies_by_text:
        return Pretrained(**bundle)
    # The tokenizer's file, first of the kind that the text tower needs.
    files = map(path.with_suffix, new.vocabulary_suffixes)
    return PretrainedLiT(**bundle, vocabulary=next((f for f in files if f.is_file()), None))


def find_weights(source: str | os.PathLike) -> tuple[Path, str | None]:
    """The file that a source means: the file itself, the one in a workdir, or a download.

    Returns:
      (path, tower): the tower is what ":img" at the end of the source asks for.

    Raises UserError if there is none.
    """
    source, tower = checkpoints.split_tower(source)
    if is_bucket(source) and hub.needs_credentials(os.fspath(source)):
        return _copy_from_bucket(as_path(source)), tower
    path = hub.resolve(source)
    if path.is_dir() and not checkpoints.is_orbax(path):
        if (path / WEIGHTS).is_file():
            return path / WEIGHTS, tower
        if weights := huggingface.weights_in(path):
            return weights, tower
        if (path / "config.json").is_file():
            raise UserError(f"the run in {path} has not finished: start it again, and it goes on")
        if last := _last_of_the_original(path):
            return last, tower
        raise UserError(
            f"{path} is no workdir of a training run and no folder of timm or transformers: it "
            f"holds no {WEIGHTS} and no model.safetensors"
        )
    return path, tower


def _last_of_the_original(workdir: Any) -> Any | None:
    """The last checkpoint_N in a folder of the original's training, which is said; None if there is
    none."""
    found = [name for name in list_folder(workdir) if re.fullmatch(r"checkpoint_\d+", name)]
    if not found:
        return None
    last = max(found, key=lambda name: int(name.rpartition("_")[2]))
    _log.warning("%s: its last checkpoint is taken, %s", workdir, last)
    return workdir / last


ORBAX_MARKERS = ("_CHECKPOINT_METADATA", "_METADATA")


def _copy_from_bucket(path: Any) -> Path:
    """The local copy of a file, an Orbax folder, or the weights of a workdir or of a folder of timm
    or transformers in a bucket."""
    with bucket_errors(path):
        if (path / WEIGHTS).exists():
            path = path / WEIGHTS
        elif weights := huggingface.weights_in(path):
            if weights.suffix == ".json":  # Of several files.
                return huggingface.weights_in(local_copy(path)) or path
            path = weights
        elif (path / "config.json").exists():
            raise UserError(f"the run in {path} has not finished: start it again, and it goes on")
        elif path.is_dir() and not any((path / name).exists() for name in ORBAX_MARKERS):
            if not (last := _last_of_the_original(path)):
                raise UserError(f"{path} is no workdir of a training run: it holds no {WEIGHTS}")
            path = last
    siblings = huggingface.CONFIGS if path.suffix in huggingface.ENDINGS else ()
    return local_copy(path, beside=(".json", ".txt", ".model"), siblings=siblings)


def read_weights(
    path: Path,
    tower: str | None,
    *,
    likely_size: tuple[int, int] | None = None,
    told: Mapping[str, Any] | None = None,
    values: bool = True,
    allow_nonfinite: bool = False,
    **wishes: Any,
) -> tuple[dict[str, np.ndarray], Spec, "Notes | None"]:
    """(arrays, spec, notes) of what `find_weights` gave.

    Args:
      path, tower: a file, and of several networks in it the one to take.
      likely_size: see `checkpoints.read_spec`.
      told: fields that no array tells, the classifier among them; they go before the notes.
      values, allow_nonfinite: see `checkpoints.load_weights`.
      **wishes: heads, pre_logits, window: see `checkpoints.open_network`.

    Raises UserError if the file can't be read, or the notes are about other weights.
    """
    notes, told = read_notes(path), dict(told or {})
    hints: dict[str, Any] = {"likely_size": likely_size}
    if notes:
        hints["image_size"] = notes.image_size
        if not tower:  # The notes are those of the whole file: they don't tell how its tower pools.
            told = {"classifier": notes.classifier, **notes.untold, **told}
            hints["untold"] = {}
    hints["classifier"] = told.pop("classifier", None)
    hints |= {"untold": told} if told else {}
    with checkpoints.open_network(path, tower=tower, **wishes, **hints) as (layout, spec):
        # Of a file of PyTorch's, what it and the config.json beside it say.
        found = None if notes else checkpoints.library_notes(layout, spec, path)
        if found:
            labels = found["labels"]
            notes = Notes(**found | {"labels": tuple(labels) if labels else None})
            notes.check()
        arrays = checkpoints.read_values(layout, path, allow_nonfinite) if values else {}
    return arrays, spec, notes


# What the official layouts have no place for is kept in a small .json file beside the weights.


@dataclasses.dataclass(frozen=True)
class Notes:
    """How weights are to be used.

    Attributes:
      classifier: one of the family's `ImageModel.classifiers`.
      image_size: (height, width) in pixels.
      preprocess: how images are made ready, e.g. "resize(224)|value_range(-1, 1)".
      labels: names of the classes, or None.
      untold: the fields of `ImageModel.untold` that are not as they are by default.
      loss: what the head was trained with, see `Pretrained`.
    """

    classifier: str
    image_size: tuple[int, int]
    preprocess: str
    labels: tuple[str, ...] | None
    untold: Mapping[str, Any]
    loss: str = "softmax"

    def check(self) -> None:
        """Raises UserError if these can't be true of any weights, or ask for huge images."""
        known = list(dict.fromkeys(c for family in FAMILIES for c in family.classifiers))
        if self.classifier not in known:
            raise UserError(f"classifier {self.classifier!r} is none of {', '.join(known)}")
        if max(self.image_size) > _LARGEST_IMAGE:
            raise UserError(
                f"image_size is {self.image_size}, expected at most {_LARGEST_IMAGE} pixels"
            )
        # Whoever looks at an image asked for none that is many times as large.
        largest = max(1024, 4 * max(self.image_size))
        preprocess = data.parse(self.preprocess, train=False, max_pixels=largest)
        if preprocess.output_size not in (None, self.image_size):
            raise UserError(
                f"preprocess makes images of {preprocess.output_size}, not {self.image_size}"
            )
        check_loss(self.loss)
        _check_untold(self.untold)

    def to_json(self) -> bytes:
        """The content of the file."""
        notes = dataclasses.asdict(self)
        if not self.untold:
            del notes["untold"]
        return to_json(notes, indent=1, ensure_ascii=False).encode() + b"\n"


def read_notes(weights: Path) -> Notes | None:
    """The notes beside a file of weights; None if there are none. Raises UserError if they are
    damaged."""
    file = notes_beside(weights)
    if file is None:
        return None
    try:
        if file.stat().st_size > _LARGEST_NOTES:
            raise ValueError(f"it has more than {_LARGEST_NOTES:,} bytes")
        notes = json.loads(file.read_text(encoding="utf-8"))
        if (labels := notes["labels"]) is not None and type(labels) is not list:
            raise ValueError("labels is no list")
        untold = dict(notes.get("untold", {}))
        found = Notes(
            notes["classifier"],
            height_width(notes["image_size"]),
            notes["preprocess"],
            tuple(map(str, labels)) if labels else None,
            {k: tuple(v) if isinstance(v, list) else v for k, v in untold.items()},
            notes.get("loss", "softmax"),
        )
        found.check()
        return found
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(
            f"{file} is damaged ({type(e).__name__}: {e}): mend it, or remove it"
        ) from e


def untold_fields() -> dict[str, type]:
    """The fields that no array tells, of any family, and their types."""
    fields = [(f, family) for family in FAMILIES for f in dataclasses.fields(family)]
    return {f.name: type(f.default) for f, family in fields if f.name in family.untold}


def _check_untold(values: Mapping[str, Any]) -> None:
    kinds = untold_fields()
    for name, value in values.items():
        optional = kinds.get(name) is type(None)  # Then it is a number, or not there.
        if name in kinds and type(value) is not (float if optional else kinds[name]):
            raise UserError(f"{name} is {value!r}, expected another kind of value")


def original_preprocess(image_size: tuple[int, int]) -> str:
    """How the original evaluates: the whole image squeezed to (h, w), values in [-1, 1]."""
    height, width = image_size
    size = height if height == width else (height, width)
    return f"resize({size})|value_range(-1, 1)"


def preprocess_for(notes: Notes | None, stored: Spec, new: Spec) -> str:
    """How images are made ready for stored weights, perhaps resampled for `new.image_size`.

    Without notes it is the original's preprocessing. For another size it is the recorded one with
    its method, crop and values; where that can't be, the original's with the recorded values.
    """
    if notes and new.image_size == stored.image_size:
        return notes.preprocess
    if notes and (text := data.at_size(notes.preprocess, stored.image_size, new.image_size)):
        return text
    resize = original_preprocess(new.image_size).split("|")[0]
    if not notes:
        return f"{resize}|{new.value_range}"
    recorded = re.findall(
        # Numbers in brackets, for each channel, may stand in the brackets.
        r"(?:uint8\|)?(?:value_range|normalize)\((?:[^()]|\([^()]*\))*\)",
        notes.preprocess,
    )
    levels = re.match(r"levels\((?:[^()]|\([^()]*\))*\)", notes.preprocess)
    return "|".join([*([levels[0]] if levels else []), resize, *recorded[-1:]])


def class_labels(weights: Path, notes: Notes | None, spec: Spec) -> tuple[str, ...] | None:
    """The names of the classes: those noted, without notes those of the published heads.

    Raises UserError if they are not as many as the head has.
    """
    labels = notes.labels if notes else class_names(spec.num_classes)
    if labels and not notes and cache_folder() not in weights.parents:  # Not published, perhaps.
        _log.warning(
            "%s: nothing names its %d classes; taken as those of ImageNet%s",
            *(weights, len(labels), "" if len(labels) == 1000 else "-21k"),
        )
    if labels is not None and len(labels) != spec.num_classes:
        raise UserError(
            f"{weights.with_suffix('.json')} names {len(labels)} classes, but the head has "
            f"{spec.num_classes}: mend or remove that file"
        )
    return labels


def height_width(image_size: Any) -> tuple[int, int]:
    """(height, width) of one number of pixels or two. Raises UserError for anything else."""
    pair = list(image_size) if np.ndim(image_size) == 1 else [image_size] * 2
    if len(pair) != 2 or not all(is_count(size) for size in pair):
        raise UserError(f"image_size is {image_size!r}, expected pixels or (height, width) of them")
    return int(pair[0]), int(pair[1])


def is_count(value: Any) -> bool:
    """Whether a value is a whole number of at least 1."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return whole and value >= 1
