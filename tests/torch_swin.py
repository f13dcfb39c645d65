"""Small Swin Transformers of timm and transformers with random weights, and Microsoft's files.

`python -m tests.torch_swin`, where those libraries are installed, stores their numbers in
tests/official/torch_swin. Microsoft's own layout is written down from timm's by its keys, with its
buffers; timm's own reading of such a file computes what is expected.
"""

import json
import math
import re
from typing import Any

import numpy as np

from tests import torch_models
from tests.torch_models import Case, Made, ask

FOLDER = torch_models.FOLDER.with_name("torch_swin")

_SIZES = dict(embed_dim=8, depths=[2, 2], num_heads=[2, 4], mlp_ratio=2.0, patch_size=2)
_TRAINED = [2, 4]


def _timm(version: int, **changes: Any):
    def make():
        import timm

        name = "swin_tiny_patch4_window7_224" if version == 1 else "swinv2_tiny_window8_256"
        args = _SIZES | dict(window_size=3, num_classes=5, img_size=[20, 28]) | changes
        if version == 2:
            args["pretrained_window_sizes"] = _TRAINED
        model = torch_models._randomize(timm.create_model(name, **args))
        config = {"architecture": name, "model_args": args, "num_features": 16}
        config["pretrained_cfg"] = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
        return model, model.state_dict(), config

    return make


def _microsoft(version: int):
    def make():
        model, file, _ = _timm(version, img_size=[24, 24])()
        renamed = {}
        for key, value in file.items():
            key = re.sub(r"(?<=layers\.)1(?=\.downsample)", "0", key.replace("head.fc.", "head."))
            renamed[f"model.{key}"] = value
        return model, renamed, None

    return make


def buffers(version: int, window: int = 3, side: int = 12) -> dict[str, np.ndarray]:
    """Those of Microsoft's file of the network above, of its first stage and of its second."""
    found = {}
    places = np.argwhere(np.ones((window, window)))
    steps = places[:, None] - places + window - 1
    for stage, block in np.ndindex(2, 2):
        name = f"model.layers.{stage}.blocks.{block}"
        found[f"{name}.attn.relative_position_index"] = steps @ [2 * window - 1, 1]
        count = (side // 2**stage // window) ** 2
        if block:
            found[f"{name}.attn_mask"] = np.zeros((count, window**2, window**2), np.float32)
        if version == 2:
            line = 8 * np.arange(1 - window, window) / (_TRAINED[stage] - 1)
            line = np.sign(line) * np.log2(np.abs(line) + 1) / math.log2(8)
            table = np.stack(np.meshgrid(line, line, indexing="ij"), -1)[None]
            found[f"{name}.attn.relative_coords_table"] = table.astype(np.float32)
    return found


def _hf(version: int, name: str):
    def make():
        import transformers
        from transformers.core_model_loading import revert_weight_conversion

        family = "Swin" if version == 1 else "Swinv2"
        more = {} if version == 1 else dict(pretrained_window_sizes=_TRAINED)
        sizes = _SIZES | dict(image_size=24, window_size=3, num_labels=5) | more
        config = getattr(transformers, f"{family}Config")(**sizes)
        model = torch_models._randomize(getattr(transformers, f"{family}{name}")(config))
        file = revert_weight_conversion(model, model.state_dict())
        file = {k: v for k, v in file.items() if not k.endswith(("_index", "_table_buffer"))}
        return model, file, json.loads(config.to_json_string(use_diff=False))

    return make


CASES = {
    "timm-swin": Case("timm Swin", _timm(1), None, "timm"),
    "timm-swin-features": Case("timm Swin", _timm(1, num_classes=0), None, "timm"),
    "timm-swinv2": Case("timm SwinV2", _timm(2), None, "timm"),
    "ms-swin": Case("Microsoft's Swin (model)", _microsoft(1)),
    "ms-swinv2": Case("Microsoft's SwinV2 (model)", _microsoft(2)),
    "hf-swin": Case("HF Swin", _hf(1, "ForImageClassification"), "logits", "hf"),
    "hf-swin-features": Case("HF Swin", _hf(1, "Model"), "pooler_output", "hf"),
    "hf-swinv2": Case("HF SwinV2", _hf(2, "ForImageClassification"), "logits", "hf"),
}


def make(name: str) -> tuple[Any, Made]:
    """(the library's network, the case)."""
    model, file, config = CASES[name].make()
    size = (20, 28) if name.startswith("timm") else (24, 24)
    images = np.random.default_rng(0).normal(size=(2, *size, 3)).round(1).astype(np.float32)
    arrays = {key: value.numpy() for key, value in file.items()}
    return model, Made(arrays, config, images, ask(model, images, CASES[name].answer))


def stored(name: str) -> Made:
    """A case as tests/official/torch_swin has it, with Microsoft's buffers."""
    made = torch_models.stored(name, FOLDER)
    if name.startswith("ms"):
        made.arrays.update(buffers(2 if "v2" in name else 1))
    return made


if __name__ == "__main__":
    for case_name in CASES:
        torch_models.store(FOLDER / f"{case_name}.npz", make(case_name)[1])
