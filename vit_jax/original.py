"""Answers programs that were written for google-research/vision_transformer, which has this import
name, too, but other modules."""

import sys
from collections.abc import Sequence
from typing import Any

# Its modules that are not here, and what does their work.
MODULES = {
    "checkpoint": "vit_jax.load(FILE) reads weights, vit_jax.checkpoints.augreg their table",
    "configs": "recipes are in the folder configs of the repository, models in list_models()",
    "inference_time": "vit-jax plan estimates times, and benchmarks measures them",
    "input_pipeline": "vit_jax.data.open_source opens data sets, train_batches makes batches",
    "models_lit": "vit_jax.load('lit/LiT-B16B') has embed_images and embed_texts",
    "models_mixer": "vit_jax.create_model('Mixer-B_16', num_classes=N) makes the network",
    "models_resnet": "vit_jax.create_model('R50+ViT-B_16', num_classes=N) makes the network",
    "models_vit": "vit_jax.create_model('ViT-B_16', num_classes=N) makes the network",
    "preprocess": "vit_jax.data.parse makes preprocessing, vit_jax.load(...).embed_texts tokens",
    "train": "vit_jax.training.run trains, make_train_step is one step of it",
    "utils": "vit_jax.training has schedules, optimizers and steps",
}


def explain(name: str) -> ImportError:
    """What to do without a module of the original."""
    return ImportError(
        f"vit_jax.{name} is a module of google-research/vision_transformer, and this is another "
        f"vit_jax: {MODULES[name]}; see docs/migrating.md",
        name=f"vit_jax.{name}",
    )


class _Finder:
    """Raises for `import vit_jax.NAME` where NAME is one of MODULES."""

    @staticmethod
    def find_spec(fullname: str, path: Sequence[str] | None = None, target: Any = None) -> None:
        package, _, name = fullname.partition(".")
        if package == "vit_jax" and name.partition(".")[0] in MODULES:
            raise explain(name.partition(".")[0])


def answer_imports() -> None:
    """Has the import of a module of the original say what is here in its place."""
    if _Finder not in sys.meta_path:
        sys.meta_path.append(_Finder)
