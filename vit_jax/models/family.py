"""What a family of networks for images says of itself, and the list of all families.

A family is a subclass of `ImageModel` in a file of its own. Everything that the rest of the package
wants to know of it is asked here; nothing else tells one family from another.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.errors import UserError

Size = tuple[int, int]  # (height, width)
Shapes = Mapping[str, tuple[int, ...]]
Arrays = dict[str, np.ndarray]

_Family = TypeVar("_Family", bound="type[ImageModel]")

FAMILIES: list[type["ImageModel"]] = []
VARIANTS: dict[str, dict[str, Any]] = {}  # The fields of every model that has a name.


def register(family: _Family) -> _Family:
    """Makes a family known: its variants by name, its weights by their shapes.

    A decorator. Of several families that recognise a file's arrays the last registered one has it;
    what none recognises is taken for the first.
    """
    FAMILIES.append(family)
    VARIANTS.update(family.variants)
    return family


def unregister(family: type["ImageModel"]) -> None:
    """Undoes `register`."""
    FAMILIES.remove(family)
    for name in family.variants:
        del VARIANTS[name]


def weightless_fields() -> list[str]:
    """The fields that have no weights, of any family."""
    return list(dict.fromkeys(name for family in FAMILIES for name in family.weightless))


class Hints(NamedTuple):
    """What is known of a set of arrays beside their shapes.

    Attributes:
      classifier: how the network pools, see `VisionTransformer`.
      image_size: that the position embeddings are for.
      likely_size: to believe where no square grid is possible and it fits.
      untold: fields of `ImageModel.untold`; None if nobody noted any.
      where: the file's name, for messages.
      window: to believe where nothing tells how large the windows are.
    """

    classifier: str | None = None
    image_size: Size | None = None
    likely_size: Size | None = None
    untold: Mapping[str, Any] | None = None
    where: str = "the checkpoint"
    window: int | None = None


class ImageModel(nn.Module):
    """A network of images. What its fields don't say, these attributes and methods do.

    Every family has the fields `num_layers`, `hidden_size`, `dtype`, `loop` (see `stack.BlockLoop`)
    and `kernels` (see `kernels.Kernels`), and, if it has classes, `num_classes`.

    Attributes:
      kind: what a person calls such a network.
      variants: the models that have a name, and their fields.
      blocks: the parts of the tree of weights that are numbered blocks, "NAME_0", "NAME_1", ...
      classifiers: what the field `classifier` may be.
      weightless: fields that have no weights, so that they may be chosen for stored ones.
      untold: fields that no shape tells; they are noted beside saved weights.
      frozen: names of weights that are constants: they are stored, but never trained.
      shows_attention: whether it has `attention_weights`; without them there is nothing to explain.
      classifies_by_text: whether the classes are texts, as LiT's; then there is no head.
      value_range: the operation that gives pixels the values that the published weights are for.
    """

    kind: ClassVar[str]
    variants: ClassVar[Mapping[str, dict[str, Any]]] = {}
    blocks: ClassVar[tuple[str, ...]] = ("encoderblock",)
    classifiers: ClassVar[tuple[str, ...]] = ("gap",)
    weightless: ClassVar[tuple[str, ...]] = ("stochastic_depth_rate", "dtype")
    untold: ClassVar[tuple[str, ...]] = ()
    frozen: ClassVar[tuple[str, ...]] = ()
    shows_attention: ClassVar[bool] = False
    classifies_by_text: ClassVar[bool] = False
    value_range: ClassVar[str] = "value_range(-1, 1)"

    # Weights that become a network.

    @classmethod
    def recognizes(cls, shapes: Shapes) -> bool:
        """Whether arrays of these names and shapes are weights of this family."""
        raise NotImplementedError

    @classmethod
    def from_shapes(cls, shapes: Shapes, hints: Hints) -> "Spec":
        """The network that arrays of these shapes are the weights of.

        Only what is needed is looked at: `checkpoints.read_spec` compares all of them. Raises
        UserError if that isn't there.
        """
        raise NotImplementedError

    def shapes(self: Any, image_size: Size, channels: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter, {"a/b/c": shape}."""
        images = jax.ShapeDtypeStruct((1, *image_size, channels), jnp.float32)
        return traced_shapes(self, images)

    # Weights for another task. `arrays` are {"a/b/c": array}, and new ones are returned.

    def resize(self, arrays: Arrays, old: Size, new: Size) -> Arrays:
        """The weights for images of another size, by the family's rule for positions.

        Raises UserError if the family can't.
        """
        raise NotImplementedError

    def for_images(
        self, arrays: Arrays, old: Size, new: Size, window: int | None = None
    ) -> tuple[Self, Arrays]:
        """The network and its weights for images of another size, or with other windows.

        Raises UserError as `resize`, or if there are no windows.
        """
        own = getattr(self, "window", None)
        if window is not None and own is None:
            raise UserError(f"a {self.kind} has no windows: leave window out")
        if window not in (None, own):
            raise UserError(
                f"window is {window}, but a {self.kind} keeps that of its weights, {own}: leave it "
                "out"
            )
        return self, arrays if old == new else self.resize(arrays, old, new)

    @property
    def first_layer(self) -> str:
        """The name of the array (h, w, channels, filters) that looks at the pixels."""
        raise NotImplementedError

    def with_channels(self, arrays: Arrays, channels: int) -> Arrays:
        """The weights for images of another number of channels, by timm's rule.

        For grey, the filters of the colours are added up, which gives what three equal channels
        would. For others they are repeated in turn, and scaled by what there were by what there
        are. Raises UserError if they aren't those of grey or colours.
        """
        kernel = arrays[self.first_layer]
        stored = kernel.shape[2]
        if stored not in (1, 3):
            raise UserError(
                f"the weights take images of {stored} channels and can't be made ready for "
                f"{channels}: only those of 1 or 3 channels can"
            )
        if channels == 1:
            kernel = kernel.sum(axis=2, keepdims=True)
        else:
            turns = np.arange(channels) % stored
            kernel = kernel[:, :, turns] * np.float32(stored / channels)
        return {**arrays, self.first_layer: kernel}

    def with_head(
        self: Any, arrays: Arrays, num_classes: int | None, pre_logits: bool | None
    ) -> tuple[Any, Arrays]:
        """The network with a new head or none, or without its tanh layer; see `Spec.adapt`."""
        stored, arrays = self.representation_size, dict(arrays)
        if pre_logits and stored is None:
            raise UserError(
                "pre_logits=True, but the weights have no pre_logits layer: leave it out"
            )
        model = self
        if stored is not None and not (not num_classes if pre_logits is None else pre_logits):
            if num_classes is None and self.num_classes and stored != self.hidden_size:
                raise UserError(
                    f"the head takes {stored} features and does not fit without pre_logits, "
                    f"which leaves {self.hidden_size}: pass num_classes for a new head"
                )
            del arrays["pre_logits/kernel"], arrays["pre_logits/bias"]
            model = model.clone(representation_size=None)
        if num_classes == 0:
            heads = ("head/kernel", "head/bias", "head_dist/kernel", "head_dist/bias")
            model = model.clone(num_classes=None)
            arrays = {name: array for name, array in arrays.items() if name not in heads}
        elif num_classes is not None:
            if num_classes < 0:
                raise UserError(f"num_classes is {num_classes}, expected at least 0")
            model = model.clone(num_classes=num_classes)
            arrays["head/kernel"] = np.zeros((model.num_features, num_classes), np.float32)
            arrays["head/bias"] = np.zeros((num_classes,), np.float32)
        return model, arrays

    # Sizes.

    @property
    def stride(self) -> Size:
        """(height, width) in pixels from one patch to the next."""
        raise NotImplementedError

    def grid_size(self, image_size: Size) -> tuple[int, int]:
        """The (rows, columns) of patches in an image of (height, width) pixels.

        Raises UserError if there is none.
        """
        raise NotImplementedError

    @property
    def usual_size(self) -> Size:
        """(height, width) of the images that published networks of this kind are for."""
        return 224, 224

    @property
    def num_prefix_tokens(self) -> int:
        """How many tokens stand before those of the patches."""
        return 0

    @property
    def has_class_token(self) -> bool:
        """Whether the first token is a learned class token, which the head reads and no other."""
        return False

    @property
    def head_reads(self) -> tuple[slice, ...]:
        """The tokens that the head reads, without attention pooling; those of each slice count as
        much as those of another."""
        return (slice(0, 1) if self.has_class_token else slice(self.num_prefix_tokens, None),)

    def num_tokens(self, image_size: Size) -> int:
        """How many tokens go through the blocks, for an image of (height, width) pixels."""
        return math.prod(self.grid_size(image_size)) + self.num_prefix_tokens

    @property
    def num_features(self: Any) -> int:
        """Width of what the head sees."""
        return self.representation_size or self.hidden_size

    def attention_size(self, image_size: Size) -> tuple[int, int, int] | None:
        """(tokens, heads, channels of a head) of the attention that `kernels.attention` computes.

        None if there is none. With it there is a field `attention_dropout_rate`.
        """
        return None

    @property
    def gives_classes(self: Any) -> bool:
        """Whether the answer is one vector of logits an image."""
        return self.num_classes is not None

    # For people.

    def architecture(self) -> dict[str, Any]:
        """The fields that say what the network is, not how it is trained or computed."""
        how = (*self.weightless, "head_bias_init", "loop", "kernels", "name", "parent")
        names = [f.name for f in dataclasses.fields(self) if f.name not in how]
        return {name: getattr(self, name) for name in names}

    def facts(self, image_size: Size, channels: int) -> dict[str, Any]:
        """The architecture and its images in numbers and names, for a program to read."""
        return self.architecture() | {"channels": channels, "image_size": image_size}

    def official_name(self: Any) -> str | None:
        """The name of the variant that this is; its head and its weightless fields don't matter."""
        own = self.architecture()
        # Nor how its positions would become those of other images.
        free = ("num_classes", "representation_size", "position_resize")
        head = {k: v for k, v in own.items() if k in free}
        for name, fields in self.variants.items():
            if type(self)(**(fields | head), parent=None).architecture() == own:
                return name
        return None

    def description(self: Any) -> str:
        """The official name, or what the network is."""
        return self.official_name() or (
            f"a {self.kind} of width {self.hidden_size} and {self.num_layers} blocks"
        )

    def summary(self) -> dict[str, str]:
        """What a person wants to know of the network beside its sizes, {title: text}."""
        return {}

    # What `explain` looks at. "intermediates" and "perturbations" are the collections of Flax in
    # which attention shows its weights, see `layers.MultiHeadAttention`.

    def image_tower(self) -> "ImageModel":
        """The part of the network that looks at images, by itself: all of it."""
        return self

    def image_params(self, params: Any) -> Any:
        """The weights of `image_tower`."""
        return params

    def attention_weights(self: Any, collection: Any) -> tuple[jax.Array, jax.Array | None]:
        """The weights of attention in "intermediates" or "perturbations" of one image.

        Returns:
          (blocks, heads, t, t), a row for each query token; and of attention pooling (heads, t),
          None without it.
        """
        raise NotImplementedError

    def attended_grid(self, image_size: Size) -> Size:
        """The (rows, columns) of the tokens that `attention_weights` is about: the patches."""
        return self.grid_size(image_size)

    @property
    def attended_blocks(self: Any) -> range:
        """The numbers of the blocks of `attention_weights` and `block_outputs`: of all."""
        return range(self.num_layers)

    def further_maps(self, collection: Any) -> dict[str, jax.Array]:
        """Other attention in "intermediates" of one image: {title: (rows, columns)} of any size."""
        return {}

    @property
    def final_norm(self) -> str:
        """Name of the module, and of the feature, that ends the blocks: (n, t, d) -> (n, t, d)."""
        return "encoder_norm"

    def block_outputs(self: Any, features: Mapping[str, jax.Array]) -> jax.Array:
        """(blocks, t, d): what comes out of each block, from the features of one image."""
        return jnp.concatenate([features[f"{self.blocks[0]}_{i}"] for i in range(self.num_layers)])

    def position_vectors(self, params: Any, grid: tuple[int, int]) -> jax.Array:
        """(patches, d): the position embeddings of the patches. Raises UserError without any."""
        raise UserError(f"a {self.kind} has no position embeddings to look at")

    def embedding_filters(self, params: Any) -> np.ndarray:
        """float64 (h, w, channels, filters): what looks at the pixels, as it is used."""
        raise UserError(f"a {self.kind} has no filters to look at")


@dataclasses.dataclass(frozen=True)
class Spec:
    """A network, and the images that its weights are for. The network's fields are attributes too.

    Attributes:
      module: the network, without what has no weights, e.g. dropout.
      image_size: (height, width) in pixels that the position embeddings are for.
      channels: colour channels of an image.
    """

    module: Any
    image_size: Size
    channels: int

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "module":
            raise AttributeError(name)
        return getattr(self.module, name)

    @property
    def name(self) -> str | None:
        return self.module.official_name()

    @property
    def description(self) -> str:
        return self.module.description()

    @property
    def grid_size(self) -> tuple[int, int]:
        return self.module.grid_size(self.image_size)

    @property
    def num_tokens(self) -> int:
        return self.module.num_tokens(self.image_size)

    @property
    def num_parameters(self) -> int:
        """How many numbers the weights are."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.module.shapes(self.image_size, self.channels)

    def facts(self) -> dict[str, Any]:
        return self.module.facts(self.image_size, self.channels)

    def model(self, **overrides: Any) -> Any:
        """The network. Overrides are fields of the module, e.g. dropout_rate."""
        return self.module.clone(**overrides)

    def replace(self, **changes: Any) -> Self:
        """Another image_size, other channels, or other fields of the network."""
        own = {k: changes.pop(k) for k in ("image_size", "channels") if k in changes}
        return dataclasses.replace(self, module=self.module.clone(**changes), **own)

    def image_tower(self) -> Self:
        """The part of the network that looks at images."""
        return dataclasses.replace(self, module=self.module.image_tower())

    def summary(self) -> dict[str, str]:
        """What a person wants to know of the network, {title: text}."""
        (rows, columns), (h, w) = self.grid_size, self.image_size
        return {
            "architecture": self.description,
            "parameters": f"{self.num_parameters:,}",
            "blocks": "",
            "patches": "{}x{} pixels, ".format(*self.stride)
            + f"{rows}x{columns} of them, {self.num_tokens} tokens in all",
            "images": f"{h}x{w} pixels, {self.channels} channels",
        } | self.module.summary()

    def adapt(
        self,
        arrays: Arrays,
        *,
        num_classes: int | None = None,
        image_size: Size | None = None,
        pre_logits: bool | None = None,
        channels: int | None = None,
        window: int | None = None,
    ) -> tuple[Arrays, Self]:
        """Weights for another task: another head, another size of image, other channels.

        Args:
          arrays: {"a/b/c": array}, see `checkpoints.load_weights`.
          num_classes: None keeps the head; a number puts a new head of zeros in its place, 0 none.
          image_size: (height, width); None keeps the grid, else positions are resampled.
          pre_logits: None keeps the tanh layer with a kept head or none and drops it with a new
            one, as the paper's fine-tuning does; True keeps it, False drops it.
          channels: None keeps the first layer; a number changes it, see `ImageModel.with_channels`.
          window: None keeps the windows, of which only a Swin Transformer has any.

        Returns:
          (arrays, spec) of the changed network. Arrays that didn't change are shared.

        Raises UserError if there is no layer to keep, the kept head doesn't fit without it, or the
        network can't change so: a Mixer its number of tokens, a LiT its head.
        """
        module, arrays = self.module.with_head(arrays, num_classes, pre_logits)
        new_size = image_size or self.image_size
        module, arrays = module.for_images(arrays, self.image_size, new_size, window)
        if channels not in (None, self.channels):
            arrays = module.with_channels(arrays, channels)
        return arrays, dataclasses.replace(
            self,
            module=module,
            image_size=new_size,
            channels=channels or self.channels,
        )


def path_name(path: tuple[Any, ...]) -> str:
    """ "a/b/c", the name of a weight, of its key path of `jax.tree_util`."""
    return "/".join(key.key for key in path)


def traced_shapes(module: Any, inputs: jax.ShapeDtypeStruct) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter. All blocks have the same shapes, so one is traced."""
    init = module.clone(num_layers=1).init
    # The key is made while tracing, or it would be a number moved to a device.
    with jax.disable_jit():  # Twice as fast where each function is traced once.
        params = jax.eval_shape(lambda x: init(jax.random.key(0), x), inputs)["params"]
    first = re.compile(rf"(.*\b(?:{'|'.join(module.blocks)})_)0(/.+)")
    shapes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        key = path_name(path)
        if match := first.fullmatch(key):
            for i in range(module.num_layers):
                shapes[f"{match[1]}{i}{match[2]}"] = leaf.shape
        else:
            shapes[key] = leaf.shape
    return shapes
