"""Small networks of timm and transformers with random weights, and files of them in every layout.

Made by those libraries, they need torch; `python -m tests.torch_models` writes of each a file into
tests/official/torch, of its arrays, its config.json, an image and what the library answers, for
the tests that have no torch. Facebook's own files are written down from timm's by their keys.
"""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FOLDER = Path(__file__).parent / "official" / "torch"


class Case(NamedTuple):
    """A layout.

    Attributes:
      kind: what it is recognised as.
      make: () -> (model, its file {name: tensor}, its config.json or None).
      answer: which of transformers' outputs, None for timm's logits.
      writes: the library that the network is written for again, and gives the same file.
    """

    kind: str
    make: Callable[[], tuple[Any, dict[str, Any], dict | None]]
    answer: str | None = None
    writes: str | None = None


_TIMM = dict(img_size=(12, 20), patch_size=4, embed_dim=12, depth=2, num_heads=3, mlp_ratio=1.5)


def _randomize(model: Any) -> Any:
    """Every parameter by chance, in steps of 1/64 so that stored files are small."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            near = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            p.copy_(near + (torch.randn(p.shape, generator=generator) * 16).round() / 64)
    return model.eval()


def _timm(architecture: str, **changes: Any):
    def make():
        import timm

        args = _TIMM | changes
        model = _randomize(timm.create_model(architecture, **args))
        config = {"architecture": architecture, "model_args": args, "num_features": 12}
        config["global_pool"] = model.global_pool
        config["pretrained_cfg"] = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
        return model, model.state_dict(), json.loads(json.dumps(config))

    return make


_SQUARE = dict(img_size=(16, 16))  # Without a config.json other grids are a guess.


def _facebook(architecture: str, rename: Callable[[dict], dict], wrapper: str = "", **changes: Any):
    """timm's own reading of such a file computes what is expected."""

    def make():
        import timm
        from timm.models.deit import checkpoint_filter_fn as filter_deit
        from timm.models.vision_transformer import checkpoint_filter_fn

        model = _randomize(timm.create_model(architecture, **(_TIMM | _SQUARE | changes)))
        file = rename(dict(model.state_dict()))
        deit = "deit" in architecture
        known = (filter_deit if deit else checkpoint_filter_fn)(
            dict(file), model, **({"adapt_layer_scale": True} if deit else {})
        )
        model.load_state_dict({k: v for k, v in known.items() if not k.startswith("decoder")})
        return model, {f"{wrapper}{k}": v for k, v in file.items()}, None

    return make


def _deit3(state: dict) -> dict:
    return {k.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v
            for k, v in state.items()}  # fmt: skip


def _dinov2(state: dict) -> dict:
    import torch

    state["mask_token"] = torch.zeros(1, 12)
    if "reg_token" in state:
        state["register_tokens"] = state.pop("reg_token")
        row = torch.full((1, 1, 12), 0.125)
        state["pos_embed"] = torch.cat([row, state["pos_embed"]], dim=1)
    return {k.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
            if state["blocks.0.mlp.fc1.bias"].shape[0] != state["blocks.0.mlp.fc2.weight"].shape[1]
            else k: v for k, v in state.items()}  # fmt: skip


def _mae(state: dict) -> dict:
    import torch

    decoder = {"decoder_pos_embed": torch.ones(1, 17, 8), "mask_token": torch.ones(1, 1, 8)}
    return state | decoder | {"decoder_blocks.0.norm1.weight": torch.ones(8)}


def _hf(name: str, **changes: Any):
    def make():
        import transformers

        sizes = dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=3)
        sizes |= dict(image_size=12, patch_size=4)
        family = name.split("For")[0].replace("VisionModel", "Vision").replace("Model", "")
        if "Dinov2" not in name:
            sizes["intermediate_size"] = 18
        if family == "Siglip":
            text = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1)
            text |= dict(num_attention_heads=1, vocab_size=9, max_position_embeddings=4)
            text |= dict(bos_token_id=1, eos_token_id=2)
            sizes = dict(vision_config=sizes, text_config=text)
        config = getattr(transformers, f"{family}Config")(**(sizes | changes))
        model = _randomize(getattr(transformers, name)(config))
        from transformers.core_model_loading import revert_weight_conversion

        file = revert_weight_conversion(model, model.state_dict())
        return model, file, json.loads(config.to_json_string(use_diff=False))

    return make


_LOGITS = dict(num_labels=5)
CASES = {
    "timm-vit": Case(
        "timm ViT or DeiT", _timm("vit_tiny_patch16_224", num_classes=5), None, "timm"
    ),
    "timm-tanh": Case(
        "timm ViT or DeiT",
        _timm("vit_tiny_patch16_224", num_classes=5, act_layer="gelu_tanh", qkv_bias=False),
        None,
        "timm",
    ),
    "timm-quick": Case(
        "timm ViT or DeiT",
        _timm("vit_tiny_patch16_224", num_classes=0, act_layer="quick_gelu"),
        None,
        "timm",
    ),
    "timm-gap": Case(
        "timm ViT or DeiT",
        _timm("vit_base_patch16_siglip_gap_224", num_classes=5),
        None,
        "timm",
    ),
    "timm-mean": Case(
        "timm MAE, fine-tuned, or another that takes the mean",
        _timm("vit_base_patch16_224", global_pool="avg", num_classes=5),
        None,
        "timm",
    ),
    "timm-deit-distilled": Case(
        "timm DeiT, distilled",
        _timm("deit_tiny_distilled_patch16_224", num_classes=5),
        None,
        "timm",
    ),
    "timm-deit3": Case(
        "timm DeiT-III", _timm("deit3_small_patch16_224", num_classes=5), None, "timm"
    ),
    "timm-dinov2": Case("timm DINOv2", _timm("vit_small_patch14_dinov2"), None, "timm"),
    "timm-dinov2-reg": Case(
        "timm DINOv2 with registers", _timm("vit_small_patch14_reg4_dinov2"), None, "timm"
    ),
    "timm-dinov2-giant": Case(
        "timm DINOv2", _timm("vit_giant_patch14_dinov2", mlp_ratio=3.0), None, "timm"
    ),
    "timm-siglip": Case("timm SigLIP", _timm("vit_base_patch16_siglip_224"), None, "timm"),
    "fb-deit": Case(
        "fb ViT or DeiT (model)",
        _facebook("deit_tiny_patch16_224", dict, "model.", num_classes=5),
    ),
    "fb-deit3": Case(
        "fb DeiT-III (model)",
        _facebook("deit3_small_patch16_224", _deit3, "model.", num_classes=5),
    ),
    "fb-dinov2": Case("fb DINOv2", _facebook("vit_small_patch14_dinov2", _dinov2)),
    "fb-dinov2-reg": Case(
        "fb DINOv2 with registers", _facebook("vit_small_patch14_reg4_dinov2", _dinov2)
    ),
    "fb-dinov2-giant": Case(
        "fb DINOv2", _facebook("vit_giant_patch14_dinov2", _dinov2, mlp_ratio=3.0)
    ),
    "fb-mae": Case(
        "fb MAE, pre-trained (model)",
        _facebook("vit_base_patch16_224", _mae, "model.", num_classes=0),
    ),
    "fb-mae-fine-tuned": Case(
        "fb MAE, fine-tuned, or another that takes the mean (model)",
        _facebook("vit_base_patch16_224", dict, "model.", global_pool="avg", num_classes=5),
    ),
    "hf-vit": Case("HF ViT", _hf("ViTForImageClassification", **_LOGITS), "logits", "hf"),
    "hf-vit-rectangle": Case(
        "HF ViT", _hf("ViTForImageClassification", image_size=(12, 20), **_LOGITS), "logits", "hf"
    ),
    "hf-deit": Case("HF DeiT", _hf("DeiTForImageClassification", **_LOGITS), "logits", "hf"),
    "hf-deit-distilled": Case(
        "HF DeiT", _hf("DeiTForImageClassificationWithTeacher", **_LOGITS), "logits", "hf"
    ),
    "hf-dinov2": Case(
        "HF DINOv2", _hf("Dinov2ForImageClassification", mlp_ratio=2, **_LOGITS), "logits", "hf"
    ),
    "hf-dinov2-features": Case("HF DINOv2", _hf("Dinov2Model", mlp_ratio=2), "pooler_output", "hf"),
    "hf-dinov2-giant": Case(
        "HF DINOv2", _hf("Dinov2Model", use_swiglu_ffn=True), "pooler_output", "hf"
    ),
    "hf-dinov2-reg": Case(
        "HF DINOv2 with registers",
        _hf("Dinov2WithRegistersForImageClassification", mlp_ratio=2, **_LOGITS),
        "logits",
        "hf",
    ),
    "hf-siglip": Case("HF SigLIP", _hf("SiglipVisionModel"), "pooler_output", "hf"),
    "hf-siglip-classes": Case(
        "HF SigLIP", _hf("SiglipForImageClassification", **_LOGITS), "logits"
    ),
}


def ask(model: Any, images: np.ndarray, answer: str | None) -> np.ndarray:
    """What the library's network says of images (n, h, w, 3)."""
    import torch

    with torch.no_grad():
        found = model(torch.tensor(images.transpose(0, 3, 1, 2)))
    return (found if answer is None else found[answer]).numpy()


class Made(NamedTuple):
    """A case made: its file's arrays, its config.json, images and the library's answer."""

    arrays: dict[str, np.ndarray]
    config: dict | None
    images: np.ndarray
    answer: np.ndarray


def make(name: str) -> tuple[Any, Made]:
    """(the library's network, the case)."""
    model, file, config = CASES[name].make()
    size = (16, 16) if name.startswith("fb") else (12, 20)
    if name.startswith("hf") and "rectangle" not in name:
        size = (12, 12)
    images = np.random.default_rng(0).normal(size=(2, *size, 3)).round(1).astype(np.float32)
    arrays = {key: value.numpy() for key, value in file.items()}
    return model, Made(arrays, config, images, ask(model, images, CASES[name].answer))


def stored(name: str, folder: Path = FOLDER) -> Made:
    """A case as tests/official/torch has it."""
    file = np.load(folder / f"{name}.npz")
    shapes, config = json.loads(str(file["shapes_and_config"]))
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    parts = np.split(file["values"] / np.float32(64), ends[:-1])
    arrays = {k: part.reshape(shapes[k]) for k, part in zip(shapes, parts, strict=True)}
    return Made(arrays, config, file["images"], file["answer"])


def store(file: Path, case: Made) -> None:
    """Writes a case, for `stored`."""
    values = np.concatenate([array.reshape(-1) for array in case.arrays.values()]) * 64
    assert (values == np.round(values)).all()
    shapes = {key: array.shape for key, array in case.arrays.items()}
    np.savez_compressed(
        file,
        values=values.astype(np.int16),
        shapes_and_config=np.array(json.dumps([shapes, case.config])),
        images=case.images,
        answer=case.answer,
    )


if __name__ == "__main__":
    for case_name in sys.argv[1:] or CASES:
        store(FOLDER / f"{case_name}.npz", make(case_name)[1])
