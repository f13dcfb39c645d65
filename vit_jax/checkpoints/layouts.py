"""Every layout in which weights were published, and the way to today's names and back.

In memory the arrays always have the names of today's Flax Linen modules. Each other layout is
undone by one step, a function arrays -> arrays that leaves alone what it does not know. Which ones
a file needs is seen from its keys and shapes; it can need several.

The values may be NumPy arrays or `LazyArray`s: no step reads one.
"""

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from vit_jax.checkpoints import (  # noqa: F401 (they make a family's layout known)
    torch_swin,
    torch_t2t,
)
from vit_jax.checkpoints.formats import rows, with_zero_token
from vit_jax.checkpoints.torch import IMAGENET, from_flax, is_torch, read_torch
from vit_jax.errors import UserError
from vit_jax.models.shapes import below

Arrays = Mapping[str, Any]

# Those that are written, from the newest to the oldest.
STYLES = ("linen", "prelinen", "2020")

_POSITIONS = "Transformer/posembed_input/pos_embedding"
_MAX_LAYERS = 1000  # The deepest published network has 56.

_log = logging.getLogger(__name__)


class Layout(NamedTuple):
    """What a file turned out to be.

    Attributes:
      arrays: the network's arrays under today's names.
      steps: which of STEPS it needed; none if it had today's names already.
      left_out: keys of arrays that are not the network's.
      hints, about: of a file of PyTorch's, see `torch.TorchFile`.
    """

    arrays: dict[str, Any]
    steps: tuple[str, ...]
    left_out: tuple[str, ...]
    hints: Mapping[str, Any] = MappingProxyType({})
    about: Mapping[str, Any] = MappingProxyType({})

    @property
    def style(self) -> str:
        """The layout in words: "linen", or which of STEPS it needs, or whose it is."""
        return ", ".join(self.steps) or "linen"


def read_layout(
    arrays: Arrays,
    path: Path | None = None,
    *,
    tower: str | None = None,
    **wishes: Any,
) -> Layout:
    """Undoes every known layout.

    Args:
      arrays: name -> array, as they stand in a file.
      path: the file.
      tower: of a file with several networks the one to take, e.g. "img"; None for the image tower,
        but for all of a LiT bundle.
      **wishes: for a file of PyTorch's, see `torch.read_torch`.

    Raises UserError if the arrays contradict each other, or there is no such tower.
    """
    steps, left_out = [], []
    arrays = from_flax(arrays)
    if is_torch(arrays):
        if tower is not None:
            raise UserError(f"there is no tower {tower!r} in the file: leave it out")
        file = read_torch(arrays, path, **wishes)
        return Layout(file.arrays, (file.kind,), file.left_out, file.hints, file.about)
    for name, step in STEPS.items():
        new = step(arrays, tower) if step is choose_tower else step(arrays)
        if new is not arrays:
            steps.append(name)
        if len(new) < len(arrays):
            kept = {id(array) for array in new.values()}
            left_out += [key for key, array in arrays.items() if id(array) not in kept]
        arrays = new
    told = _told_of_deit3_jax(arrays) if "deit3-jax" in steps else ()
    return Layout(dict(arrays), tuple(steps), tuple(left_out), *told)


def to_linen(
    arrays: Arrays, *, tower: str | None = None, where: str = "the checkpoint"
) -> dict[str, Any]:
    """The network's arrays under today's names, see `logged_layout`."""
    return logged_layout(arrays, where=where, tower=tower).arrays


def logged_layout(
    arrays: Arrays, path: Path | None = None, *, where: str | None = None, **wishes: Any
) -> Layout:
    """`read_layout` that logs what is left out. Errors and the log name `where`, else the file."""
    where = where or str(path)
    try:
        layout = read_layout(arrays, path, **wishes)
    except UserError as e:
        raise UserError(f"{where}: {e}") from e
    if layout.left_out:
        groups = sorted({re.split(r"/|\.\d+\.", key)[0] for key in layout.left_out})
        _log.warning(
            "%s: %d of its %d arrays are taken, those of the network; left out: %s",
            *(where, len(arrays) - len(layout.left_out), len(arrays), ", ".join(groups)),
        )
    return layout


def to_style(arrays: Arrays, style: str) -> dict[str, Any]:
    """Gives arrays with today's names those of an older style, one of STYLES.

    "prelinen" is that of the published files of 2020 and 2021, "2020" that of the first hybrids
    among them; for other networks the two are the same, and for Mixers all three.

    Raises UserError for an unknown style.
    """
    if style not in STYLES:
        raise UserError(f"unknown key style {style!r}, expected one of {', '.join(STYLES)}")
    if style == "linen":
        return dict(arrays)
    styled = _rename_in_blocks(arrays, _PRELINEN)
    if style == "2020":
        for key, array in styled.items():
            if _GROUP_NORM.search(key):
                styled[key] = array.reshape((1, 1, 1, *array.shape))
    return styled


# The steps.


def unwrap_optimizer(arrays: Arrays) -> Arrays:
    """2020: training checkpoints, in which the parameters lie beside the optimizer's state.

    The original code saved a Flax optimizer, "opt/target/..." (its Linen version
    "optimizer/target/..."); big_vision and Optax's train states have "params/...". Its Linen
    version later saved the tuple (parameters, optimizer's state, step), "0/...".
    """
    if arrays and all(re.match("[012](/|$)", key) for key in arrays):
        arrays = below(arrays, "0/")
    for prefix in ("opt/target/", "optimizer/target/", "params/"):
        if any(key.startswith(prefix) for key in arrays):
            arrays = below(arrays, prefix)
    return arrays


def choose_tower(arrays: Arrays, tower: str | None) -> Arrays:
    """2022: contrastive models of big_vision (SigLIP, arXiv:2303.15343), "img/..." and "txt/...".

    A LiT bundle of the original code (arXiv:2111.07991) has the same two towers, but its image
    tower the names of the original's ViT; it is a network of its own and stays whole.
    """
    if tower is not None:
        chosen = below(arrays, f"{tower}/")
        if not chosen:
            groups = sorted({key.partition("/")[0] for key in arrays if "/" in key})
            raise UserError(
                f"there is no tower {tower!r} in the file: expected one of {', '.join(groups[:8])}"
            )
        return chosen
    is_lit = f"img/{_POSITIONS}" in arrays and any(key.startswith("txt/") for key in arrays)
    if is_lit or not any(key.startswith("img/") for key in arrays):
        return arrays
    return below(arrays, "img/")


def rename_deit3_jax(arrays: Arrays) -> Arrays:
    """2024: deit3-jax, DeiT and DeiT-III (arXiv:2204.07118) trained in Flax.

    Positions have shape (rows, columns, d).
    """
    if "model/embed/wte/kernel" not in arrays:
        return arrays

    def name(key: str) -> str:
        for pattern, new in _DEIT3_JAX:
            key = re.sub(pattern, new, key)
        return key

    renamed = _renamed(arrays, name)
    positions = renamed.get("pos_embedding")
    if positions is not None and len(positions.shape) == 3:
        height, width, d = positions.shape
        renamed["pos_embedding"] = positions.reshape((1, height * width, d))
    return renamed


_DEIT3_JAX = (
    (r"^model/embed/wte/", "embedding/"),
    (r"^model/embed/wpe$", "pos_embedding"),
    (r"^model/embed/cls_token$", "cls"),
    (r"^model/layer_(\d+)/", r"Transformer/encoderblock_\1/"),
    *(
        (rf"/attn/w{part[0]}/", f"/MultiHeadDotProductAttention_0/{part}/")
        for part in ("query", "key", "value", "out")
    ),
    (r"/ff/w1/", "/MlpBlock_0/Dense_0/"),
    (r"/ff/w2/", "/MlpBlock_0/Dense_1/"),
    (r"/norm1/", "/LayerNorm_0/"),
    (r"/norm2/", "/LayerNorm_1/"),
    (r"/scale1$", "/LayerScale_0/scale"),
    (r"/scale2$", "/LayerScale_1/scale"),
    (r"^model/norm/", "Transformer/encoder_norm/"),
    (r"^model/head/", "head/"),
)


def _told_of_deit3_jax(arrays: Arrays) -> tuple[dict[str, Any], dict[str, Any]]:
    """(hints, about): what no array tells, see `Layout`."""
    is_deit3 = any("/LayerScale_0/" in key for key in arrays)
    untold = {"position_resize": "torch-antialias", "drop_path_mode": "constant"}
    hints = {"untold": untold | ({"layer_scale": 1e-4} if is_deit3 else {})}
    config = {"pretrained_cfg": IMAGENET | {"crop_pct": 1.0 if is_deit3 else 0.875}}
    return hints, IMAGENET | {"labels": None, "config": config}


def unstack_blocks(arrays: Arrays) -> Arrays:
    """2023: big_vision's scanned models, with one "encoderblock" for all layers.

    Its arrays have an axis of layers first.
    """
    depths = {array.shape[:1] for key, array in arrays.items() if "/encoderblock/" in key}
    if not depths:
        return arrays
    if len(depths) > 1 or depths == {()} or not 0 < max(depths)[0] <= _MAX_LAYERS:
        raise UserError(
            "the arrays of 'encoderblock' have first axes of "
            f"{', '.join(str(*depth) or 'no size' for depth in sorted(depths)[:5])}, expected the "
            f"same number of layers in all, at most {_MAX_LAYERS}: the file is damaged"
        )

    def pairs():
        for key, array in arrays.items():
            if "/encoderblock/" in key:
                for i, row in enumerate(rows(array)):
                    yield key.replace("/encoderblock/", f"/encoderblock_{i}/", 1), row
            else:
                yield key, array

    return _collect(pairs())


def move_positions(arrays: Arrays) -> Arrays:
    """2022: big_vision's ViT (arXiv:2205.01580), with "pos_embedding" at the top level.

    It is added to the patches before the class token comes in front of them: a class token has no
    position there, which is to say one of zeros.
    """
    if "pos_embedding" not in arrays:
        return arrays
    if "cls" in arrays and len(arrays["pos_embedding"].shape) == 3:
        arrays = {**arrays, "pos_embedding": with_zero_token(arrays["pos_embedding"])}
    return _renamed(arrays, lambda key: _POSITIONS if key == "pos_embedding" else key)


def move_map_head(arrays: Arrays) -> Arrays:
    """2021: big_vision's attention pooling as in the making of ViT-G (arXiv:2106.04560).

    Its four parts stood at the top level.
    """
    if "probe" not in arrays:
        return arrays
    part = re.compile(r"(probe$|(LayerNorm_0|MlpBlock_0|MultiHeadDotProductAttention_0)/)")
    return _renamed(arrays, lambda key: f"MAPHead_0/{key}" if part.match(key) else key)


def rename_prelinen(arrays: Arrays) -> Arrays:
    """2020: the original's files up to 2021 (ViT, AugReg, SAM), made before Flax had Linen.

    One counter ran over all sub-modules of an encoder block.
    """
    renamed = _rename_in_blocks(arrays, _LINEN)
    return arrays if renamed.keys() == arrays.keys() else renamed


def flatten_group_norms(arrays: Arrays) -> Arrays:
    """2020: the first hybrids (R50+ViT-B_16), whose GroupNorms have shape (1, 1, 1, channels)."""
    old = {
        key
        for key, array in arrays.items()
        if _GROUP_NORM.search(key) and len(array.shape) == 4 and array.shape[:3] == (1, 1, 1)
    }
    if not old:
        return arrays
    return {key: a.reshape((a.shape[-1],)) if key in old else a for key, a in arrays.items()}


# In the order in which they have to be undone: wrappings first.
STEPS: dict[str, Callable[..., Arrays]] = {
    "optimizer": unwrap_optimizer,
    "towers": choose_tower,
    "deit3-jax": rename_deit3_jax,
    "scanned": unstack_blocks,
    "top-level positions": move_positions,
    "top-level MAP head": move_map_head,
    "prelinen": rename_prelinen,
    "2020": flatten_group_norms,
}

_PRELINEN = {
    "LayerNorm_1": "LayerNorm_2",
    "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
    "MlpBlock_0": "MlpBlock_3",
}
_LINEN = {old: new for new, old in _PRELINEN.items()}

_GROUP_NORM = re.compile(r"(^|/)gn([0-9]+|_root|_proj)/(scale|bias)$")


def _rename_in_blocks(arrays: Arrays, names: Mapping[str, str]) -> dict[str, Any]:
    block = re.compile(rf"(?<=encoderblock_)([0-9]+)/({'|'.join(names)})(?=/)")
    return _renamed(arrays, lambda key: block.sub(lambda m: f"{m[1]}/{names[m[2]]}", key))


def _renamed(arrays: Arrays, name: Callable[[str], str]) -> dict[str, Any]:
    return _collect((name(key), array) for key, array in arrays.items())


def _collect(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    arrays: dict[str, Any] = {}
    for key, array in pairs:
        if key in arrays:
            raise UserError(
                f"the array {key!r} is there twice, in two layouts: write the file in one of them"
            )
        arrays[key] = array
    return arrays
