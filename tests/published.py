"""Small networks of every family, and their arrays in every layout that was published.

The layouts are made here from their descriptions, not with the code that undoes them.
"""

import functools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from vit_jax.models import MlpMixer, VisionTransformer
from vit_jax.models.lit import LiT

Arrays = dict[str, np.ndarray]

POSITIONS = "Transformer/posembed_input/pos_embedding"
FAMILIES = ("ViT", "ViT gap", "ViT MAP", "hybrid", "Mixer", "LiT")
VITS = ("ViT", "ViT gap", "ViT MAP")

_SIZES = dict(hidden_size=16, num_layers=3, num_heads=2, mlp_dim=24)
_VIT = dict(_SIZES, num_classes=5, patch_size=(8, 8))
_TEXT = dict(_SIZES, vocab_size=50, max_len=16)
_MODELS = {
    "ViT": VisionTransformer(representation_size=16, **_VIT),
    "ViT gap": VisionTransformer(classifier="gap", **_VIT),
    "ViT MAP": VisionTransformer(classifier="map", **_VIT),
    "hybrid": VisionTransformer(resnet=(1, 2), **dict(_VIT, patch_size=(1, 1))),
    "Mixer": MlpMixer(5, (8, 8), 16, 3, tokens_mlp_dim=12, channels_mlp_dim=24),
    "LiT": LiT(
        image=dict(_SIZES, patch_size=(8, 8)),
        text_model="text_transformer",
        text=_TEXT,
        out_dim=(None, 16),
    ),
    "LiT of BERT": LiT(
        image=dict(_SIZES, patch_size=(8, 8)),
        text_model="bert",
        text=dict(_TEXT, hidden_size=64, num_heads=1),
        out_dim=(64, None),
    ),
    "sincos2d": VisionTransformer(position_embedding="sincos2d", classifier="gap", **_VIT),
}


@functools.cache
def shapes(family: str, num_layers: int = 3) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of a family's small network, for images of 32x32 pixels."""
    model = _MODELS[family]
    if family.startswith("LiT"):
        towers = {
            name: dict(getattr(model, name), num_layers=num_layers) for name in ("image", "text")
        }
        model = model.clone(**towers)
    else:
        model = model.clone(num_layers=num_layers)
    inputs = [jnp.zeros((1, 32, 32, 3))] + [jnp.zeros((1, 16), int)] * family.startswith("LiT")
    variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    return {k: leaf.shape for k, leaf in flatten_dict(variables["params"], sep="/").items()}


def arrays(family: str, num_layers: int = 3) -> Arrays:
    """Seeded random arrays of a family, float32, under today's names."""
    rng = np.random.default_rng(len(family))
    return {
        key: rng.normal(size=s).astype(np.float32) for key, s in shapes(family, num_layers).items()
    }


def official_shapes(name: str, num_classes: int = 1000) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published hybrid, Mixer or LiT model, as the original code makes them.

    The file writes "encoderblock_{12}/..." for twelve equal blocks.
    """
    path = Path(__file__).parent / "official" / "families.json"
    found = {}
    for key, shape in json.loads(path.read_text())[name].items():
        many = re.fullmatch(r"(.*){(\d+)}(.*)", key)
        keys = [f"{many[1]}{i}{many[3]}" for i in range(int(many[2]))] if many else [key]
        found |= dict.fromkeys(keys, tuple(shape))
    if not name.startswith("LiT"):
        (width,) = found.get("Transformer/encoder_norm/bias") or found["pre_head_layer_norm/bias"]
        found |= {"head/kernel": (width, num_classes), "head/bias": (num_classes,)}
    return found


def empty(found: Mapping[str, tuple[int, ...]]) -> Arrays:
    """Arrays of these shapes that take no memory."""
    return {key: np.broadcast_to(np.zeros((), np.float32), shape) for key, shape in found.items()}


# The layouts: arrays under today's names -> (as they were published, as they should be understood).


def linen(a: Arrays) -> tuple[Arrays, Arrays]:
    return dict(a), a


def prelinen(a: Arrays) -> tuple[Arrays, Arrays]:
    changes = (("LayerNorm_1/", "LayerNorm_2/"), ("MlpBlock_0/", "MlpBlock_3/"))
    changes += (("MultiHeadDotProductAttention_0/", "MultiHeadDotProductAttention_1/"),)
    stored = {}
    for key, array in a.items():
        for new, old in changes:
            if "encoderblock_" in key:
                key = key.replace(new, old)
        stored[key] = array
    return stored, a


def first_hybrids(a: Arrays) -> tuple[Arrays, Arrays]:
    stored = {
        key: array[None, None, None] if key.split("/")[-2].startswith("gn") else array
        for key, array in prelinen(a)[0].items()
        if "/" in key
    }
    return {**{key: array for key, array in a.items() if "/" not in key}, **stored}, a


def optimizer(a: Arrays) -> tuple[Arrays, Arrays]:
    stored = {f"opt/target/{key}": array for key, array in prelinen(a)[0].items()}
    stored |= {f"opt/state/param_states/{key}/momentum": 0 * array for key, array in a.items()}
    return stored | {"opt/state/step": np.array(7)}, a


def train_state(a: Arrays) -> tuple[Arrays, Arrays]:
    stored = {f"params/{key}": array for key, array in a.items()}
    return stored | {f"opt/0/mu/{key}": 0 * array for key, array in a.items()}, a


def big_vision(a: Arrays) -> tuple[Arrays, Arrays]:
    stored, expected = dict(a), dict(a)
    positions = stored.pop(POSITIONS)
    if "cls" in a:
        positions = positions[:, 1:]
        expected[POSITIONS] = np.pad(positions, ((0, 0), (1, 0), (0, 0)))
    return stored | {"pos_embedding": positions}, expected


def inlined_map_head(a: Arrays) -> tuple[Arrays, Arrays]:
    stored, expected = big_vision(a)
    return {key.removeprefix("MAPHead_0/"): array for key, array in stored.items()}, expected


def scanned(a: Arrays) -> tuple[Arrays, Arrays]:
    stored, expected = big_vision(a)
    block = "Transformer/encoderblock_0/"
    for key in [key for key in stored if key.startswith(block)]:
        layers = [stored.pop(key.replace("_0/", f"_{i}/", 1)) for i in range(3)]
        stored[key.replace("_0/", "/", 1)] = np.stack(layers)
    return stored, expected


def siglip(a: Arrays) -> tuple[Arrays, Arrays]:
    stored, expected = big_vision(a)
    stored = {f"params/img/{key}": array for key, array in stored.items()}
    rest = {"txt/Embed_0/embedding": np.ones((9, 16), np.float32), "t": np.ones(1), "b": np.ones(1)}
    return stored | {f"params/{key}": array for key, array in rest.items()}, expected


# Title, the function above, the style that writes it if there is one, families it was published of.
LAYOUTS = (
    ("Linen, 2021 and today", linen, "linen", FAMILIES),
    ("pre-Linen, 2020 and 2021", prelinen, "prelinen", FAMILIES),
    ("the first hybrids', 2020", first_hybrids, "2020", FAMILIES),
    ("within a Flax optimizer, 2020", optimizer, None, FAMILIES),
    ("within a train state, 2022", train_state, None, FAMILIES),
    ("big_vision, 2022", big_vision, None, VITS),
    ("big_vision before `MAPHead_0`, 2021", inlined_map_head, None, ("ViT MAP",)),
    ("big_vision, scanned, 2023", scanned, None, VITS),
    ("big_vision, two towers (SigLIP), 2023", siglip, None, VITS),
)


def same(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> bool:
    """Whether two sets of arrays are equal bit by bit."""
    return found.keys() == expected.keys() and all(
        found[k].dtype == expected[k].dtype
        and found[k].shape == expected[k].shape
        and np.asarray(found[k]).tobytes() == np.asarray(expected[k]).tobytes()
        for k in expected
    )


def count(found: Mapping[str, tuple[int, ...]]) -> int:
    """How many numbers arrays of these shapes hold."""
    return sum(math.prod(shape) for shape in found.values())
