"""Small weights of the families beside the ViT: hybrids, attention pooling, Mixer, LiT."""

import dataclasses
from pathlib import Path

from tests import reference
from vit_jax import checkpoints
from vit_jax.checkpoints.spec import LiTSpec, MixerSpec, Spec
from vit_jax.pretrained import Pretrained, PretrainedLiT

LABELS = ("ape", "bär", "cat", "狗", "eel")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "a", "photo", "of", ".", "bright", "dark", "cat", "##s", "dog"]
WORDS += ["##gy", "grey"]

_VIT = Spec(
    patch_size=(4, 4),
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    mlp_dim=24,
    classifier="token",
    num_classes=5,
    channels=3,
    image_size=(16, 16),
)
_HYBRID = dataclasses.replace(_VIT, patch_size=(1, 1), image_size=(64, 64), resnet=(1, 1))
_TEXT = dict(hidden_size=64, num_layers=2, num_heads=2, mlp_dim=24, vocab_size=len(WORDS))
_TOWER = dataclasses.replace(_VIT, num_classes=None, representation_size=64)

SPECS = {
    "hybrid": _HYBRID,
    "root": dataclasses.replace(_HYBRID, patch_size=(2, 2), resnet=(), classifier="gap"),
    "MAP": dataclasses.replace(_VIT, classifier="map", representation_size=9),
    "sincos2d": dataclasses.replace(_VIT, position_embedding="sincos2d", classifier="gap"),
    "sincos2d token": dataclasses.replace(_VIT, position_embedding="sincos2d"),
    "Mixer": MixerSpec((4, 4), 16, 2, 5, 3, (16, 16), tokens_mlp_dim=12, channels_mlp_dim=24),
    "LiT": LiTSpec(
        image=dataclasses.replace(_TOWER, representation_size=None, num_classes=64),
        text_model="text_transformer",
        text=tuple((_TEXT | dict(max_len=16)).items()),
        text_classes=None,
    ),
    "LiT of BERT": LiTSpec(
        image=_TOWER,
        text_model="bert",
        text=tuple((_TEXT | dict(max_len=20, num_heads=1)).items()),
        text_classes=64,
    ),
}
LITS = ("LiT", "LiT of BERT")
OTHERS = tuple(name for name in SPECS if name not in LITS)


def make(family: str, folder: Path, **changes) -> Pretrained:
    """A family's small weights. The vocabulary of LiT is put into `folder`."""
    spec = dataclasses.replace(SPECS[family], **changes)
    params = checkpoints.to_tree(reference.make_params(spec.shapes(), seed=2))
    size = spec.image_size[0]
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
