"""Weights of timm, Facebook and Hugging Face: what they are, what they compute, and back again.

The networks of tests/official/torch are those libraries' own, with what they answer.
"""

import dataclasses
import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from tests import families, reference, torch_models
from tests.torch_models import CASES, stored
from vit_jax import create_model, load
from vit_jax.checkpoints import huggingface, load_weights, open_arrays, read_layout, to_tree, torch
from vit_jax.checkpoints.convert import convert
from vit_jax.checkpoints.export import export
from vit_jax.data import parse
from vit_jax.errors import UserError
from vit_jax.models import Spec
from vit_jax.pretrained import Pretrained

POSITIONS = "Transformer/posembed_input/pos_embedding"
WRITTEN = [name for name, case in CASES.items() if case.writes]


def written(name: str, folder, **changes):
    """A case as a file, with its config.json beside it."""
    case = stored(name)
    save_file(case.arrays | changes, folder / "model.safetensors")
    if case.config:
        (folder / "config.json").write_text(json.dumps(case.config))
    return folder / "model.safetensors"


def close(found, expected):
    __tracebackhide__ = True
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.fixture(autouse=True)
def _exact():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_recognised_and_computes_what_its_library_does(name, tmp_path):
    path, case = written(name, tmp_path), stored(name)

    vit = load(path, heads=None if case.config else 3)

    close(vit(case.images), case.answer)
    with open_arrays(path) as arrays:
        assert read_layout(arrays, path, heads=3).style == CASES[name].kind


@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_comes_back_the_same(name, tmp_path):
    vit = load(written(name, tmp_path), heads=3)
    vit.save(tmp_path / "saved.npz")
    convert(tmp_path / "model.safetensors", tmp_path / "converted.npz", heads=3)

    for file in ("saved", "converted"):
        again = load(tmp_path / f"{file}.npz")
        assert again.spec == vit.spec
        assert (again.preprocess, again.labels) == (vit.preprocess, vit.labels)
        jax.tree.map(np.testing.assert_array_equal, again.params, vit.params)


def exported(vit: Pretrained, folder, library: str):
    arrays = flatten_dict(vit.params, sep="/")
    export(folder, library, arrays, vit.spec, labels=vit.labels, preprocess=vit.preprocess)
    return folder / "model.safetensors"


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("name", WRITTEN)
def test_written_for_its_library_again_it_is_the_same_file(name, tmp_path):
    vit, case = load(written(name, tmp_path)), stored(name)

    path = exported(vit, tmp_path / "out", CASES[name].writes)

    found = load_file(path)
    unused = {k for k in case.arrays if k.endswith("mask_token")}
    assert found.keys() | unused == case.arrays.keys()
    for key in case.arrays.keys() - unused:
        np.testing.assert_array_equal(found[key], case.arrays[key], key)
    again = load(path)
    assert again.spec.replace(layer_scale=vit.spec.layer_scale) == vit.spec
    np.testing.assert_allclose(again(case.images), vit(case.images), atol=1e-6)
    assert again.preprocess == as_theirs(vit.preprocess)


def as_theirs(preprocess: str) -> str:
    """What is written of it: that of TensorFlow they don't do."""
    return re.sub(r"resize\(([^)'m]+\)?)\)\|", r"resize(\1, method='pil_bilinear')|", preprocess)


@pytest.mark.parametrize("library", ["timm", "hf"])
@pytest.mark.parametrize(
    "text",
    [
        "resize(16, method='pil_bicubic')|value_range(-1, 1)",
        "resize_small(18, method='pil_bicubic')|central_crop(16{even})|normalize(0.4, 0.2)",
        "resize_small(23, method='pil_lanczos')|central_crop(16{even})|normalize(0.1, 0.5)",
    ],
)
def test_the_preprocessing_is_written_and_comes_back(text, library, tmp_path, caplog):
    text = text.format(even=", round_even=True" if library == "timm" else "")
    vit = dataclasses.replace(ours("the original"), preprocess=text)
    again = load(exported(vit, tmp_path, library))
    assert again.preprocess == parse(text).spec
    assert "doesn't resize" not in caplog.text


@pytest.mark.parametrize("library", ["timm", "hf"])
@pytest.mark.parametrize("short", ["(13, 22)", "22", "(18, 22)"])
def test_a_crop_that_is_not_square_is_written_where_they_have_it(short, library, tmp_path, caplog):
    even = ", round_even=True" if library == "timm" else ""
    text = f"resize_small({short}, method='pil_bicubic')|central_crop((12, 20){even})|"
    text += "value_range(-1, 1)"
    vit = dataclasses.replace(ours("the original", image_size=(12, 20)), preprocess=text)

    again = load(exported(vit, tmp_path, library))

    if short == {"timm": "(13, 22)", "hf": "22"}[library]:
        assert again.preprocess == text
        assert "doesn't resize" not in caplog.text
    else:
        assert again.preprocess == "resize((12, 20), method='pil_bilinear')|value_range(-1, 1)"
        assert "doesn't resize images as" in caplog.text


def test_notes_of_other_weights_are_not_left_beside_what_is_written(tmp_path):
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(UserError, match=r"model\.json would be taken for the notes of what is"):
        exported(ours("the original"), tmp_path, "timm")
    assert [file.name for file in tmp_path.iterdir()] == ["model.json"]


def test_a_preprocessing_that_they_do_not_do_is_told(tmp_path, caplog):
    exported(ours("the original"), tmp_path, "timm")
    assert (
        "timm doesn't resize images as 'resize(16)|value_range(-1, 1)' does: "
        "resize(16, method='pil_bilinear') is written in its place"
    ) in caplog.text


# Networks of ours that their libraries have no own name for, but compute.
_BLOCKS = dict(layer_scale=0.1, activation="gelu_erf", mlp_dim=32)
OURS = {
    "the original": ({}, ("timm", "hf")),
    "pre_logits": (dict(num_classes=None, representation_size=16), ("hf",)),
    "without a class token": (dict(classifier="gap"), ("timm",)),
    "attention pooling": (dict(classifier="map", num_classes=None), ("timm", "hf")),
    "quick GELU": (dict(activation="quick_gelu"), ("timm", "hf")),
    "another epsilon": (dict(layer_norm_epsilon=1e-3), ("hf",)),
    "DeiT": (dict(distilled="heads", activation="gelu_erf"), ("timm", "hf")),
    "DeiT-III": (dict(cls_has_position=False, **_BLOCKS), ("timm", "hf")),
    "registers": (dict(num_registers=3, **_BLOCKS), ("timm", "hf")),
    "registers without LayerScale": (
        dict(num_registers=3, num_classes=None, mlp_dim=32),
        ("timm", "hf"),
    ),
    "SwiGLU": (dict(_BLOCKS, mlp="swiglu", mlp_dim=48), ("timm", "hf")),
    "class token and mean": (dict(classifier="token_gap", mlp_dim=16), ("hf",)),
    "registers without a class token": (
        dict(classifier="gap", num_registers=2, mlp_dim=32),
        ("timm",),
    ),
    "the first token": (dict(classifier="first"), ()),
    "a distillation token alone": (dict(distilled="token"), ("hf",)),
    "a mean, then the norm": (
        dict(classifier="gap", fc_norm=True, unread_class_token=True),
        ("timm",),
    ),
}


def ours(name: str, **changes) -> Pretrained:
    spec = families.vit_spec(**(OURS[name][0] | changes))
    arrays = reference.make_params(spec.shapes(), seed=4)
    return Pretrained(spec.model(), to_tree(arrays), spec, None, "resize(16)|value_range(-1, 1)")


def images(spec: Spec) -> np.ndarray:
    size = (2, *spec.image_size, spec.channels)
    return np.random.default_rng(0).normal(size=size).astype(np.float32)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("library", ["timm", "hf"])
@pytest.mark.parametrize("name", OURS)
def test_ours_are_written_so_that_they_compute_the_same_or_refused(name, library, tmp_path):
    vit = ours(name)
    if library not in OURS[name][1]:
        with pytest.raises(UserError, match=r"^(timm|transformers) doesn't compute .+"):
            exported(vit, tmp_path, library)
        assert not any(tmp_path.iterdir())
        return
    again = load(exported(vit, tmp_path, library), pre_logits=vit.spec.representation_size and True)
    close(again(images(vit.spec)), vit(images(vit.spec)))
    assert again.preprocess == as_theirs(vit.preprocess)


@pytest.mark.parametrize("name", ["timm-deit3", "fb-dinov2-reg", "hf-dinov2", "fb-mae-fine-tuned"])
def test_they_can_be_fine_tuned_on_other_images(name, tmp_path):
    path = written(name, tmp_path)
    vit = load(path, heads=3, num_classes=7, image_size=(24, 16))
    assert vit(images(vit.spec)).shape == (2, 7)
    assert vit.spec.grid_size == (6, 4)
    before = load(path, heads=3)
    assert {k: v.shape for k, v in flatten_dict(vit.params, sep="/").items()} == vit.spec.shapes()
    assert before.preprocess.split("|")[-1] == vit.preprocess.split("|")[-1]


def test_without_a_class_token_only_patches_have_positions_beside_registers(tmp_path):
    exported(ours("registers without a class token"), tmp_path, "timm")
    args = json.loads((tmp_path / "config.json").read_text())["model_args"]
    assert (args["class_token"], args["reg_tokens"], args["no_embed_class"]) == (False, 2, True)


def test_a_loss_of_classes_that_do_not_exclude_each_other_is_written_or_said(tmp_path, caplog):
    vit = dataclasses.replace(ours("the original"), loss="sigmoid")
    for library in ("timm", "hf"):
        arrays, about = flatten_dict(vit.params, sep="/"), dict(preprocess=vit.preprocess)
        export(tmp_path / library, library, arrays, vit.spec, loss=vit.loss, **about)
    assert "timm notes no loss" in caplog.text
    assert load(tmp_path / "hf" / "model.safetensors").loss == "sigmoid"


def test_of_files_of_deit_3_and_dino_what_their_training_did_is_taken(tmp_path):
    vit = load(written("fb-deit3", tmp_path), heads=3)
    assert vit.spec.drop_path_mode == "constant"
    arrays = stored("fb-deit").arrays
    dino = {k.replace("model.", "teacher.backbone."): v for k, v in arrays.items()}
    save_file(dino, tmp_path / "dino_deitsmall16_pretrain.safetensors")
    vit = load(tmp_path / "dino_deitsmall16_pretrain.safetensors", heads=3)
    assert vit.spec.position_resize == "dinov2"


# What a file is.


def test_heads_are_asked_for_where_nothing_tells_them(tmp_path):
    path = written("timm-vit", tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"nor does the width 12, .* give their number, --heads N"):
        load(path)
    with pytest.raises(UserError, match="5 attention heads do not divide the width 12"):
        load(path, heads=5)


@pytest.mark.parametrize(
    ("name", "width", "heads"),
    [("timm-vit", 768, 12), ("timm-dinov2", 1536, 24), ("timm-siglip", 1536, 16)],
)
def test_published_widths_tell_the_heads(name, width, heads):
    shapes = {k: v.shape for k, v in stored(name).arrays.items()}
    wide = {k: tuple(width if n == 12 else 3 * width if n == 36 else n for n in s)
            for k, s in shapes.items()}  # fmt: skip
    if name == "timm-siglip":
        wide |= {k: (2 * width, *s[1:]) for k, s in wide.items() if ".kv." in k}
    empty = {k: np.broadcast_to(np.float32(0), shape) for k, shape in wide.items()}
    found = read_layout(empty).arrays["Transformer/encoderblock_0/"
                                      "MultiHeadDotProductAttention_0/query/kernel"]  # fmt: skip
    assert found.shape == (width, heads, width // heads)


def test_a_config_of_another_network_is_refused(tmp_path):
    path = written("hf-vit", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 24}))
    with pytest.raises(UserError, match="is of a network of width 24, but this one is 12 wide"):
        load(path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(UserError, match="asks for activation 'relu', expected one of gelu"):
        load(path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json can't be read .*: mend or remove it"):
        load(path)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "vit", "image_size": "x"},
        {"model_type": "vit", "image_size": []},
        {"model_type": "vit", "layer_norm_eps": "x"},
        {"model_type": "vit", "num_attention_heads": "x"},
        {"model_type": "vit", "hidden_act": []},
        {"model_type": "vit", "id2label": {"a": "b"}},
        {"model_type": "vit", "vision_config": 3},
        {"architecture": "vit", "model_args": [1]},
        {"architecture": "vit", "pretrained_cfg": 3},
        {"architecture": "vit", "pretrained_cfg": {"mean": 1, "std": 2}},
        {"architecture": "vit", "pretrained_cfg": {"input_size": [3, math.inf, math.inf]}},
    ],
)
def test_a_damaged_config_is_one_line(config, tmp_path):
    path = written("hf-vit", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"^[^\n]*safetensors: [^\n]*$"):
        load(path)


TIMM_ARGS = {
    "block_fn": "ParallelThingsBlock",
    "pre_norm": True,
    "qk_norm": True,
    "scale_attn_norm": True,
    "pos_embed": "none",
    "final_norm": False,
    "norm_layer": "rmsnorm",
    "rope": 1,
}


def reconfigured(name, folder, args=None, **changes):
    """A case of which config.json says something else."""
    path = written(name, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    config["model_args"] |= args or {}
    (folder / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("name", TIMM_ARGS)
def test_what_timm_is_asked_for_and_is_not_computed_is_refused(name, tmp_path):
    with pytest.raises(UserError, match=rf"config\.json asks for {name} .*, which is not known$"):
        load(reconfigured("timm-vit", tmp_path, {name: TIMM_ARGS[name]}))


def test_what_timm_does_anyway_may_be_said(tmp_path):
    usual = {"qk_norm": False, "pos_embed": "learn", "final_norm": True, "norm_layer": None}
    load(reconfigured("timm-vit", tmp_path, usual))


@pytest.mark.parametrize(
    "name",
    [
        *("vit_base_patch16_rpn_224", "vit_base_patch16_rope_224", "vit_relpos_base_patch16_224"),
        *("vit_srelpos_small_patch16_224", "vit_base_patch16_xp_224", "samvit_base_patch16"),
        *("vit_base_r50_s16_224", "vit_tiny_r_s16_p8_224", "vit_base_patch16_clip_224"),
        *("beit_base_patch16_224", "eva_large_patch14_196", "cait_s24_224"),
        *("vit_small_patch16_18x2_224", "vit_pwee_patch16_reg1_gap_256"),
    ],
)
def test_other_networks_of_timm_are_refused_by_name(name, tmp_path):
    with pytest.raises(UserError, match=rf"it is timm's {name}, by its config\.json"):
        load(reconfigured("timm-vit", tmp_path, architecture=name))


def test_an_unknown_name_is_told_with_what_it_is_taken_for(tmp_path, caplog):
    load(reconfigured("timm-vit", tmp_path, architecture="myvit"))
    assert "timm's myvit is not known here: taken as timm ViT or DeiT" in caplog.text


def test_every_token_is_given_where_timm_does_not_pool(tmp_path):
    vit = load(reconfigured("timm-vit", tmp_path, {"global_pool": ""}))
    assert vit.spec.classifier == "token_unpooled"


def test_registers_in_other_places_are_refused(tmp_path):
    tokens = {"reg_token": np.zeros((1, 4, 12), np.float32)}
    with pytest.raises(
        UserError, match="it has attention pooling beside a class token or registers, which"
    ):
        load(written("timm-siglip", tmp_path, **tokens))
    tokens["pos_embed"] = np.zeros((1, 1 + 4 + 15, 12), np.float32)
    with pytest.raises(UserError, match="it has registers that have positions, which is not"):
        load(written("timm-vit", tmp_path, **tokens))


def test_a_size_that_the_positions_are_not_for_is_refused(tmp_path):
    with pytest.raises(UserError, match="images of 12x24, which need 18 positions, but 16 are"):
        load(reconfigured("timm-vit", tmp_path, {"img_size": [12, 24]}))


@pytest.mark.parametrize(
    ("name", "key", "shape"),
    [
        ("timm-vit", "pos_embed", (12,)),
        ("timm-siglip", "patch_embed.proj.weight", (12, 48)),
        ("timm-vit", "patch_embed.proj.weight", (12, 3, 0, 0)),
        ("hf-vit", "vit.embeddings.position_embeddings", (12,)),
        ("hf-siglip", "embeddings.position_embedding.weight", (12,)),
    ],
)
def test_what_a_network_is_known_by_has_its_axes(name, key, shape, tmp_path):
    assert key in stored(name).arrays
    path = written(name, tmp_path, **{key: np.zeros(shape, np.float32)})
    with pytest.raises(UserError, match=rf"{re.escape(key)} has shape {re.escape(str(shape))}, ex"):
        load(path, heads=3)


def test_arrays_of_odd_shapes_are_named(tmp_path):
    path = written("timm-vit", tmp_path, **{"head.weight": np.zeros(5, np.float32)})
    with pytest.raises(UserError, match=r"head\.weight has shape \(5,\), expected 2 axes"):
        load(path)
    odd = {"blocks.0.attn.proj.weight": np.zeros((12, 13), np.float32)}
    with pytest.raises(
        UserError, match=r"proj\.weight has shape \(12, 13\), not divided by 3 heads"
    ):
        load(written("timm-vit", tmp_path, **odd))


NEAR = {
    "BEiT": {"blocks.0.attn.relative_position_bias_table": (4, 3)},
    "CaiT": {"blocks_token_only.0.norm1.weight": (12,)},
    "EVA": {"blocks.0.attn.q_bias": (12,)},
    "CLIP": {"norm_pre.weight": (12,)},
    "T2T-ViT": {"tokens_to_token.project.weight": (12, 9)},
    "Swin": {"layers.0.blocks.0.attn.relative_position_bias_table": (9, 3)},
    "DINOv3": {"storage_tokens": (1, 4, 12)},
    "norms within attention": {"blocks.0.attn.q_norm.weight": (4,)},
    "networks? of videos": {"patch_embed.proj.weight": (12, 3, 2, 4, 4)},
    "a hybrid": {"patch_embed.backbone.stem.conv.weight": (4, 3, 7, 7)},
}


@pytest.mark.parametrize("name", NEAR)
def test_networks_that_look_alike_are_refused_by_name(name, tmp_path):
    more = {key: np.zeros(shape, np.float32) for key, shape in NEAR[name].items()}
    with pytest.raises(UserError, match=rf"safetensors: it is .*{name}"):
        load(written("timm-vit", tmp_path, **more))


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        (("conv_proj.weight", "class_token"), "torchvision's ViT"),
        (("visual.conv1.weight", "visual.class_embedding"), "CLIP"),
        (("vision_model.embeddings.class_embedding",), "CLIP"),
        (("layer.0.attention.q_proj.weight", "embeddings.register_tokens"), "DINOv3"),
        (("swin.features.1.0.attn.qkv.weight",), "torchvision's Swin"),
        (("beit.encoder.layer.0.lambda_1",), "BEiT"),
    ],
)
def test_foreign_files_are_refused_by_name(keys, name, tmp_path):
    save_file({key: np.zeros(3, np.float32) for key in keys}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=rf"it is {name}, by its arrays, which has no place here"):
        load(tmp_path / "w.safetensors")


# Files by the names of their arrays: a case, what is put to it or taken from it, what it then is.
RECOGNISED = {
    "plain": ("timm-vit", {}, "timm ViT or DeiT"),
    "dist_token": ("timm-deit-distilled", {}, "timm DeiT, distilled"),
    "fc_norm": ("timm-mean", {}, "timm MAE, fine-tuned, or another that takes the mean"),
    "attn_pool.latent": ("timm-siglip", {}, "timm SigLIP"),
    "gamma_1": ("fb-deit3", {}, "fb DeiT-III (model)"),
    "ls1 and positions of a square": ("timm-deit3", {"pos_embed": (1, 16, 12)}, "timm DeiT-III"),
    "ls1 and one position more": ("timm-dinov2", {"pos_embed": (1, 17, 12)}, "timm DINOv2"),
    "ls1 and a mask token": ("timm-dinov2", {"mask_token": (1, 12)}, "fb DINOv2"),
    "register_tokens": ("fb-dinov2-reg", {}, "fb DINOv2 with registers"),
    "reg_token and ls1": ("timm-dinov2-reg", {}, "timm DINOv2 with registers"),
    "decoder_pos_embed": ("fb-mae", {}, "fb MAE, pre-trained (model)"),
    "DINO's heads": ("timm-quick", {"head.mlp.0.weight": (8, 12)}, "timm ViT or DeiT"),
    "distillation_token": ("hf-deit", {}, "HF DeiT"),
    "layer_scale1": ("hf-dinov2", {}, "HF DINOv2"),
    "register_tokens of HF": ("hf-dinov2-reg", {}, "HF DINOv2 with registers"),
    "layernorm_before": ("hf-vit", {}, "HF ViT"),
    "head.probe": ("hf-siglip", {}, "HF SigLIP"),
}


def with_arrays(name: str, more: dict[str, tuple[int, ...]]):
    return stored(name).arrays | {k: np.zeros(s, np.float32) for k, s in more.items()}


@pytest.mark.parametrize("row", RECOGNISED)
def test_arrays_tell_what_a_file_is(row):
    name, more, kind = RECOGNISED[row]
    assert read_layout(with_arrays(name, more), heads=3).style == kind


@pytest.mark.parametrize(
    ("wrapper", "part"),
    [
        *((f"{w}.", w) for w in ("model", "state_dict_ema", "model_ema", "state_dict", "net")),
        *(("teacher.module.backbone.", "teacher.module.backbone"), ("student.", "student")),
        *(("module.", "module"), ("_orig_mod.", "_orig_mod"), ("base_model.", "base_model")),
        *(("backbone.", "backbone"), ("state_dict.module.base_encoder.", None)),
    ],
)
def test_what_stands_before_the_names_is_taken_off_and_told(wrapper, part):
    arrays = {f"{wrapper}{k}": v for k, v in stored("timm-vit").arrays.items()}
    style = read_layout(arrays, heads=3).style
    assert style == f"fb ViT or DeiT ({part or wrapper.rstrip('.')})"


def test_names_as_transformers_5_has_them_in_memory_are_known():
    new = [
        (r"encoder\.layer\.", "layers."),
        (r"attention\.attention\.(query|key|value)", lambda m: f"attention.{m[1][0]}_proj"),
        (r"attention\.output\.dense", "attention.o_proj"),
        (r"intermediate\.dense", "mlp.fc1"),
        (r"(?<!attention)\.output\.dense", ".mlp.fc2"),
    ]
    arrays = {}
    for key, array in stored("hf-vit").arrays.items():
        for pattern, name in new:
            key = re.sub(pattern, name, key)
        arrays[key] = array
    assert any(key.startswith("vit.layers.0.attention.q_proj") for key in arrays)
    found, expected = (read_layout(a, heads=3) for a in (arrays, stored("hf-vit").arrays))
    assert found.style == "HF ViT"
    assert found.arrays.keys() == expected.arrays.keys()
    for key in found.arrays:
        np.testing.assert_array_equal(found.arrays[key], expected.arrays[key])


REFUSED = {
    # Near-misses: arrays put to a network that would be taken.
    "BEiT: relative positions": ("timm-vit", {"rel_pos_bias.relative_position_bias_table": (4, 3)}),
    "BEiT: of HF": ("hf-vit", {"vit.encoder.layer.0.lambda_1": (12,)}),
    "BEiT: relative positions of HF": (
        "hf-vit",
        {
            "vit.encoder.layer.0.attention.attention.relative_position_bias."
            "relative_position_bias_table": (4, 3)
        },
    ),
    "DINOv3: of Facebook": ("fb-dinov2", {"rope_embed.periods": (16,)}),
    "DINOv3: tokens of Facebook": ("fb-dinov2", {"storage_tokens": (1, 4, 12)}),
    "DINOv3: of timm": (
        "timm-dinov2-reg",
        {"pos_embed": None, "blocks.0.gamma_1": (12,), "blocks.1.gamma_1": (12,)},
    ),
    "EVA: two gates": ("timm-vit", {"blocks.0.mlp.fc1_g.weight": (8, 12)}),
    "EVA: rotations": ("timm-vit", {"rope.freqs_cos": (16, 4)}),
    "EVA: no positions": ("fb-deit3", {"model.pos_embed": None}),
    "CLIP: of timm": ("timm-vit", {"norm_pre.weight": (12,), "norm_pre.bias": (12,)}),
    "CLIP: of HF": (
        "hf-siglip",
        {"embeddings.class_embedding": (12,), "pre_layrnorm.weight": (12,)},
    ),
    "CLIP: of OpenAI": (None, {"visual.transformer.resblocks.0.ln_1.weight": (12,)}),
    "CaiT": ("fb-deit3", {"model.blocks_token_only.0.norm1.weight": (12,)}),
    "a network of videos (V-JEPA, VideoMAE)": (
        None,
        {"encoder.module.backbone.patch_embed.proj.weight": (12, 3, 2, 4, 4)},
    ),
    "torchvision's ViT": (None, {"conv_proj.weight": (12, 3, 4, 4), "class_token": (1, 1, 12)}),
    "a hybrid or another stem of timm's": (
        "timm-vit",
        {"patch_embed.backbone.stem.conv.weight": (4, 3, 7, 7)},
    ),
    "a ViT with norms within attention": ("timm-vit", {"blocks.0.attn.k_norm.weight": (4,)}),
}


@pytest.mark.parametrize("row", REFUSED)
def test_near_misses_are_refused_by_their_name(row):
    name, changes = REFUSED[row]
    arrays = dict(stored(name).arrays) if name else {}
    for key, shape in changes.items():
        if shape is None:
            del arrays[key]
        else:
            arrays[key] = np.zeros(shape, np.float32)
    words = re.escape(row.partition(":")[0])
    with pytest.raises(UserError, match=rf"^it is {words}, by its arrays, which has no place here"):
        read_layout(arrays, heads=3)


def test_arrays_that_nobody_knows_are_named(tmp_path):
    path = written("timm-vit", tmp_path, **{"neck.weight": np.zeros(3, np.float32)})
    with pytest.raises(UserError, match=r"not known there, unknown \(1\): neck\.weight \(3,\)"):
        load(path)


def test_the_average_is_taken_before_the_raw_weights(tmp_path, caplog):
    case = stored("timm-vit")
    both = {f"model.module.{k}": v + 1 for k, v in case.arrays.items()}
    both |= {f"state_dict_ema.module.{k}": v for k, v in case.arrays.items()}
    save_file(both | {"optimizer.lr": np.ones(1, np.float32)}, tmp_path / "w.safetensors")
    vit = load(tmp_path / "w.safetensors", heads=3, image_size=(12, 20))
    found = vit.params["Transformer"]["encoder_norm"]["scale"]
    np.testing.assert_array_equal(found, case.arrays["norm.weight"])
    assert "left out: model.module.blocks" in caplog.text
    with open_arrays(tmp_path / "w.safetensors") as arrays:
        style = read_layout(arrays, heads=3).style
    assert style == "fb ViT or DeiT (state_dict_ema.module)"


def test_what_is_not_the_networks_is_named(tmp_path, caplog):
    load(written("hf-dinov2", tmp_path))
    assert "left out: dinov2.embeddings.mask_token" in caplog.text


def test_labels_and_values_come_from_the_files_beside(tmp_path):
    path = written("hf-vit", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["id2label"] = {str(i): name for i, name in enumerate("abcde")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    values = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    values |= {"image_processor_type": "ViTImageProcessor", "size": 12, "resample": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    vit = load(path)
    assert vit.labels == tuple("abcde")
    assert vit.preprocess == (
        "resize(12, method='pil_bilinear')|normalize((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))"
    )


def test_names_of_classes_are_those_of_the_head(tmp_path, caplog):
    path = reconfigured("timm-vit", tmp_path, label_names=["a", "b"])
    with pytest.raises(UserError, match=r"the config\.json .* 2 classes, but the head has 5"):
        load(path)
    vit = load(reconfigured("timm-quick", tmp_path, label_names=["a", "b"]))
    assert vit.labels is None
    assert "names classes, but there is no head" in caplog.text


def test_a_thousand_classes_without_names_are_those_of_imagenet(tmp_path, caplog):
    head = {"head.weight": np.zeros((1000, 12), np.float32)}
    head["head.bias"] = np.arange(1000, dtype=np.float32)
    vit = load(written("timm-vit", tmp_path, **head))
    ((best, _),) = vit.predict([np.zeros((20, 20, 3), np.uint8)], top=1)[0]
    assert best == "toilet tissue, toilet paper, bathroom tissue"
    assert "nothing names its 1000 classes; taken as those of ImageNet" in caplog.text


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_a_configuration_without_end_is_refused(name, tmp_path, monkeypatch):
    path = written("hf-vit", tmp_path)
    monkeypatch.setattr(huggingface, "_LARGEST", 10_000)
    (tmp_path / name).write_text(" " * 10_001)
    with pytest.raises(UserError, match=r"can't be read \(it has more than 10,000 bytes\)"):
        load(path)


def test_what_lies_beside_a_file_of_google_is_not_looked_at(tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert huggingface.licence(tmp_path / "B_16.npz") is None


def test_no_value_is_read_to_know_what_it_is(tmp_path, monkeypatch):
    path = written("timm-vit", tmp_path)
    monkeypatch.setattr(torch.LazyArray, "read", None, raising=False)
    _, spec = load_weights(path, values=False)
    assert spec.num_classes == 5


# Parameters, counted by their authors. DINOv2's count has the mask token.
TOTALS = {
    ("DeiT-Ti_16", 224, 1000): 5_717_416,
    ("DeiT-S_16", 224, 1000): 22_050_664,
    ("DeiT-B_16", 224, 1000): 86_567_656,
    ("DeiT-Ti_16-distilled", 224, 1000): 5_910_800,
    ("DeiT-S_16-distilled", 224, 1000): 22_436_432,
    ("DeiT-B_16-distilled", 224, 1000): 87_338_192,
    ("DeiT-B_16", 384, 1000): 86_859_496,
    ("DeiT-B_16-distilled", 384, 1000): 87_630_032,
    ("DeiT3-S_16", 224, 1000): 22_059_496,
    ("DeiT3-M_16", 224, 1000): 38_849_512,
    ("DeiT3-B_16", 224, 1000): 86_585_320,
    ("DeiT3-L_16", 224, 1000): 304_374_760,
    ("DeiT3-H_14", 224, 1000): 632_126_440,
    ("DINOv2-S_14", 518, None): 22_056_576 - 384,
    ("DINOv2-B_14", 518, None): 86_580_480 - 768,
    ("DINOv2-L_14", 518, None): 304_368_640 - 1024,
    ("DINOv2-g_14", 518, None): 1_136_480_768 - 1536,
    ("DINOv2-S_14-reg", 518, None): 22_056_576 + 3 * 384,
    ("DINOv2-B_14-reg", 518, None): 86_580_480 + 3 * 768,
    ("DINOv2-L_14-reg", 518, None): 304_368_640 + 3 * 1024,
    ("DINOv2-g_14-reg", 518, None): 1_136_480_768 + 3 * 1536,
}


@pytest.mark.parametrize(("name", "size", "classes"), TOTALS)
def test_variants_have_as_many_parameters_as_published(name, size, classes):
    spec = Spec(create_model(name, num_classes=classes), (size, size), 3)
    assert spec.num_parameters == TOTALS[name, size, classes]


def test_the_docs_have_the_table_of_layouts(tmp_path):
    rows = []
    for name, case in CASES.items():
        folder = tmp_path / name
        folder.mkdir()
        vit = load(written(name, folder), heads=3, num_classes=2)
        tuned = vit.spec.num_classes == 2
        back = f"`--to {case.writes}`" if case.writes else ""
        rows.append([re.sub(r" \(model\)", "", case.kind), case.answer is None, back, tuned])
    lines = ["| whose, of what | reads | writes the same file | fine-tunes |", "|---|---|---|---|"]
    seen = {}
    for kind, _, back, tuned in rows:
        seen.setdefault(kind, (back, tuned))
    lines += [f"| {k} | yes | {b} | {'yes' if t else ''} |" for k, (b, t) in seen.items()]
    table = "\n".join(lines)
    guide = Path(__file__).parents[2] / "docs" / "weights.md"
    assert table in guide.read_text(), f"docs/weights.md should have this table:\n{table}"


def test_the_cases_are_of_the_layouts_of_both_libraries():
    assert {file.stem for file in torch_models.FOLDER.iterdir()} == set(CASES)


def test_the_name_of_a_file_tells_a_deit(tmp_path, caplog):
    path = tmp_path / "deit_small_patch16_224.safetensors"
    save_file(stored("timm-vit").arrays, path)

    vit = load(path, heads=3, image_size=(12, 20))

    assert vit.preprocess.endswith("normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))")
    assert "nothing tells whether it is a ViT" not in caplog.text
