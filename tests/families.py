"""Small weights of the families beside the ViT: hybrids, attention pooling, Mixer, LiT."""

from pathlib import Path
from typing import Any

from tests import reference
from vit_jax import checkpoints
from vit_jax.models import LiT, MlpMixer, Spec, SwinTransformer, T2TViT, VisionTransformer
from vit_jax.pretrained import Pretrained, PretrainedLiT

LABELS = ("ape", "bär", "cat", "狗", "eel")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "a", "photo", "of", ".", "bright", "dark", "cat", "##s", "dog"]
WORDS += ["##gy", "grey"]


def vit_spec(*, channels: int = 3, image_size: tuple[int, int] = (16, 16), **fields: Any) -> Spec:
    """A small ViT; fields as of `VisionTransformer`."""
    small: dict[str, Any] = dict(patch_size=(4, 4), hidden_size=16, num_layers=2, num_heads=2)
    small |= dict(mlp_dim=24, num_classes=5)
    return Spec(VisionTransformer(**(small | fields)), image_size, channels)


_HYBRID = vit_spec(patch_size=(1, 1), image_size=(64, 64), resnet=(1, 1))
_TEXT = dict(hidden_size=64, num_layers=2, num_heads=2, mlp_dim=24, vocab_size=len(WORDS))


def _lit(image: Spec, text_model: str, text: dict[str, int], text_classes: int | None) -> Spec:
    fields = {k: v for k, v in image.architecture().items() if k != "num_classes"}
    return Spec(LiT(fields, text_model, text, (image.num_classes, text_classes)), (16, 16), 3)


_SWIN = dict(window=3, pretrained_windows=(0, 0), mlp_ratio=2.0)


def _swin(**fields: Any) -> Spec:
    return Spec(SwinTransformer(5, (2, 2), 8, (2, 2), (2, 4), **_SWIN, **fields), (16, 16), 3)


SPECS = {
    "Swin": _swin(),
    "Swin v2": _swin(version=2),
    "hybrid": _HYBRID,
    "root": _HYBRID.replace(patch_size=(2, 2), resnet=(), classifier="gap"),
    "MAP": vit_spec(classifier="map", representation_size=9),
    "sincos2d": vit_spec(position_embedding="sincos2d", classifier="gap"),
    "sincos2d token": vit_spec(position_embedding="sincos2d"),
    "Mixer": Spec(MlpMixer(5, (4, 4), 16, 2, tokens_mlp_dim=12, channels_mlp_dim=24), (16, 16), 3),
    "T2T": Spec(T2TViT(5, 16, num_layers=2, num_heads=2, mlp_dim=24), (16, 16), 3),
    "LiT": _lit(
        vit_spec(num_classes=64), "text_transformer", _TEXT | dict(max_len=16), text_classes=None
    ),
    "LiT of BERT": _lit(
        vit_spec(num_classes=None, representation_size=64),
        "bert",
        _TEXT | dict(max_len=20, num_heads=1),
        text_classes=64,
    ),
}
LITS = ("LiT", "LiT of BERT")
OTHERS = tuple(name for name in SPECS if name not in LITS)


def make(family: str, folder: Path, **changes) -> Pretrained:
    """A family's small weights. The vocabulary of LiT is put into `folder`."""
    spec = SPECS[family].replace(**changes)
    params = checkpoints.to_tree(reference.make_params(spec.shapes(), seed=2))
    height, width = spec.image_size
    size = height if height == width else (height, width)
    fields = dict(model=spec.model(), params=params, spec=spec)
    if family not in LITS:
        preprocess = f"resize({size})|value_range(-1, 1)"
        labels = LABELS if spec.num_classes == 5 else None
        return Pretrained(**fields, labels=labels, preprocess=preprocess)
    folder.mkdir(exist_ok=True)
    vocabulary = folder / "words.txt"
    vocabulary.write_text("\n".join(WORDS) + "\n")
    preprocess = f"resize({size})|uint8|value_range(-1, 1)"
    return PretrainedLiT(**fields, labels=None, preprocess=preprocess, vocabulary=vocabulary)
