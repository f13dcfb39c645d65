"""Swin Transformers of Microsoft, timm and Hugging Face: what they are, what they compute, and the
way back.

The networks of tests/official/torch_swin are those libraries' own, with what they answer.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.checkpoints.test_pth import Call, Values, tensor, write_zip
from tests.checkpoints.test_torch import close, exported
from tests.torch_swin import CASES, make, stored
from vit_jax import create_model, load
from vit_jax.checkpoints import open_arrays, read_layout, read_spec
from vit_jax.checkpoints.convert import convert
from vit_jax.checkpoints.torch import write_torch
from vit_jax.checkpoints.torch_swin import swin_table
from vit_jax.errors import UserError
from vit_jax.models import Spec

WRITTEN = [name for name, case in CASES.items() if case.writes]


def written(name: str, folder: Path, *without: str, config: dict | None = None, **changes) -> Path:
    """A case as a file, with its config.json beside it."""
    case = stored(name)
    arrays = {k: v for k, v in case.arrays.items() if not k.endswith(without or ("?",))}
    path = folder / f"{changes.pop('file', 'model')}.safetensors"
    save_file({k: np.ascontiguousarray(v) for k, v in (arrays | changes).items()}, path)
    if case.config:
        (folder / "config.json").write_text(json.dumps(case.config | (config or {})))
    return path


@pytest.fixture(autouse=True)
def _exact():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_recognised_computes_what_its_library_does_and_comes_back(name, tmp_path):
    path, case = written(name, tmp_path), stored(name)

    vit = load(path)

    close(vit(case.images), case.answer)
    with open_arrays(path) as arrays:
        layout = read_layout(arrays, path)
    assert layout.style == CASES[name].kind
    assert len(layout.left_out) == sum("relative_position_index" in k or "attn_mask" in k
                                       or "coords_table" in k for k in case.arrays)  # fmt: skip
    assert "normalize" in vit.preprocess
    vit.save(tmp_path / "saved.npz")
    convert(path, tmp_path / "converted.npz")
    for file in ("saved", "converted"):
        again = load(tmp_path / f"{file}.npz")
        assert (again.spec, again.preprocess) == (vit.spec, vit.preprocess)
        jax.tree.map(np.testing.assert_array_equal, again.params, vit.params)


@pytest.mark.parametrize("name", WRITTEN)
def test_written_for_its_library_again_it_is_the_same_file(name, tmp_path):
    vit, case = load(written(name, tmp_path)), stored(name)

    path = exported(vit, tmp_path / "out", CASES[name].writes)

    found = load_file(path)
    assert found.keys() == case.arrays.keys()
    for key, array in case.arrays.items():
        np.testing.assert_array_equal(found[key], array, key)
    again = load(path)
    assert again.spec == vit.spec
    assert again.preprocess == vit.preprocess


def test_the_guide_lists_what_is_read_and_written():
    guide = (Path(__file__).parents[2] / "docs" / "weights.md").read_text()
    for case in CASES.values():
        back = f"`--to {case.writes}`" if case.writes else ""
        assert f"| {case.kind.removesuffix(' (model)')} | yes | {back} | yes |" in guide


# What no array tells.


@pytest.mark.parametrize("name", ["ms-swin", "ms-swinv2"])
def test_microsofts_pth_is_read_fine_tuned_and_evaluated_as_theirs(name, tmp_path):
    case = stored(name)
    arrays = {key.removeprefix("model."): value for key, value in case.arrays.items()}
    kinds = {"f": "torch FloatStorage", "i": "torch LongStorage"}
    storages = [
        Values(array.ravel(), str(i), kinds[array.dtype.kind])
        for i, array in enumerate(arrays.values())
    ]
    items = zip(arrays.items(), storages, strict=True)
    state = {key: tensor(values, array.shape) for (key, array), values in items}
    content = {"model": state, "config": Call("yacs.config CfgNode"), "epoch": 299}
    path = write_zip(tmp_path / "swin.pth", content, storages)
    close(load(path)(case.images), case.answer)
    vit = load(path, num_classes=2, image_size=(20, 28))
    assert vit(np.ones((1, 20, 28, 3), np.float32)).shape == (1, 2)
    assert load(path).preprocess == (
        "resize_small(27, method='pil_bicubic')|central_crop(24, round_even=True)"
        "|normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))"
    )


def test_a_folder_of_timms_without_arguments_is_known_by_its_architecture(tmp_path):
    """As published: the name tells windows, the values' part the size."""
    spec = Spec(create_model("SwinV2-B_4-w12to24", 5), (384, 384), 3)
    arrays = {k: np.broadcast_to(np.float32(0), shape) for k, shape in spec.shapes().items()}
    architecture = "swinv2_base_window12to24_192to384"
    config = {"architecture": architecture, "pretrained_cfg": {"input_size": [3, 384, 384]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = write_torch(arrays, swin_table("timm", 2, spec.depths), 0)
    tensors = {k: np.broadcast_to(np.float32(0), v.shape) for k, v in tensors.items()}
    layout = read_layout(tensors, tmp_path / "model.safetensors")
    found = read_spec(layout.arrays, **layout.hints)
    assert (found.name, found.image_size) == ("SwinV2-B_4-w12to24", (384, 384))
    assert layout.about["known_from"]["window"] == "its name"


def test_buffers_tell_windows_and_images(tmp_path):
    spec = load(written("ms-swinv2", tmp_path)).spec
    assert (spec.window, spec.pretrained_windows, spec.image_size) == (3, (2, 4), (24, 24))
    spec = load(written("ms-swin", tmp_path)).spec
    assert (spec.window, spec.image_size) == (3, (24, 24))


def test_the_name_tells_windows_and_images(tmp_path):
    changes = {"file": "swinv2_base_patch4_window2to3_16to24_ft"}
    without = ("relative_coords_table", "relative_position_index", "attn_mask")
    spec = load(written("ms-swinv2", tmp_path, *without, **changes)).spec
    assert (spec.window, spec.pretrained_windows, spec.image_size) == (3, (2, 2), (24, 24))


def test_without_anything_the_window_is_asked_for(tmp_path, caplog):
    without = ("relative_coords_table", "relative_position_index", "attn_mask")
    path = written("ms-swinv2", tmp_path, *without)
    with pytest.raises(UserError, match=r"no array tells the windows .*load\(\.\.\., window=N\)"):
        load(path)
    vit = load(path, window=3)
    assert (vit.spec.window, vit.spec.pretrained_windows) == (3, (0, 0))
    assert "nothing tells for which windows its positions were trained" in caplog.text
    told = load(path, window=3, pretrained_windows=(2, 4), image_size=24)
    case = stored("ms-swinv2")
    close(told(case.images), case.answer)


def test_other_windows_may_be_wished_for(tmp_path):
    one = load(written("timm-swin", tmp_path), window=4, image_size=32)
    assert (one.spec.window, one.image_size) == (4, (32, 32))
    two = load(written("timm-swinv2", tmp_path), window=4, image_size=32)
    assert (two.spec.window, two.spec.pretrained_windows) == (4, (2, 4))
    assert one(np.zeros((1, 32, 32, 3), np.float32)).shape == (1, 5)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        (
            "timm-swin",
            {"architecture": "swinv2_cr_tiny_224"},
            "swinv2_cr_tiny_224, which has no pl",
        ),
        ("timm-swin", {"architecture": "swin_s3_tiny_224"}, "swin_s3_tiny_224, which has no place"),
        ("hf-swin", {"hidden_act": "relu"}, "asks for hidden_act 'relu', which is not known"),
        ("hf-swin", {"layer_norm_eps": 1e-6}, "asks for layer_norm_eps 1e-06, which is not known"),
        ("hf-swin", {"use_absolute_embeddings": True}, "asks for use_absolute_embeddings True"),
        ("timm-swin", {"model_args": {"window_size": [7, 14]}}, r"windows of \[7, 14\]"),
        ("hf-swinv2", {"window_size": "x"}, r"config.json beside it is damaged \(ValueError"),
        ("hf-swin", {"image_size": 8}, r"does not fit a Swin .*relative_position_bias"),
    ],
)
def test_configurations_of_other_networks_are_refused(name, config, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load(written(name, tmp_path, config=config))


ONE = np.zeros((1, 1, 1, 1), np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.mask_token": ONE}, "pre-trained by SimMIM"),
        ({"model.decoder.0.weight": ONE}, "pre-trained by SimMIM"),
        ({"model.layers.0.blocks.0.spatial_mlp.weight": ONE}, "it is Swin-MLP"),
        ({"model.stages.0.blocks.0.attn.meta_mlp.fc1.weight": ONE}, "it is timm's SwinV2-CR"),
        ({"model.features.1.0.attn.qkv.weight": ONE}, "it is torchvision's Swin"),
        ({"model.absolute_pos_embed": ONE}, r"arrays that are not known .*absolute_pos_embed"),
        (
            {"model.layers.0.blocks.0.attn.relative_position_index": np.zeros((16, 16), np.int64)},
            "relative_position_index is of windows of 4, but its table has 25 rows",
        ),
    ],
)
def test_other_networks_are_refused_by_name(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load(written("ms-swin", tmp_path, **changes))


def test_a_missing_array_is_named(tmp_path):
    with pytest.raises(
        UserError, match=r"missing \(1\): stage_1/encoderblock_1/MlpBlock_0/Dense_1"
    ):
        load(written("ms-swin", tmp_path, "layers.1.blocks.1.mlp.fc2.weight"))
    with pytest.raises(UserError, match="relative_position_bias_table of stage 1 is not there"):
        load(written("ms-swin", tmp_path, "layers.1.blocks.0.attn.relative_position_bias_table"))
    with pytest.raises(UserError, match=r"heads are given, .*each stage \(2, 4\): leave heads out"):
        load(written("ms-swin", tmp_path), heads=2)


def test_what_a_library_would_compute_otherwise_is_refused(tmp_path):
    vit = load(written("timm-swin", tmp_path))
    with pytest.raises(UserError, match="transformers doesn't compute images that are not square"):
        exported(vit, tmp_path / "out", "hf")
    padded = load(written("timm-swin", tmp_path), image_size=20)
    with pytest.raises(UserError, match="it pads before it rolls"):
        exported(padded, tmp_path / "out", "hf")


# The libraries themselves.


@pytest.mark.reference
@pytest.mark.parametrize("name", CASES)
def test_a_librarys_network_computes_the_same_here_and_there_again(name, tmp_path):
    pytest.importorskip("timm")
    from tests.checkpoints.test_torch_reference import library_answer

    _, made = make(name)
    np.testing.assert_allclose(made.answer, stored(name).answer, atol=2e-5 * abs(made.answer).max())
    vit = load(written(name, tmp_path))
    close(vit(made.images), made.answer)
    if writes := CASES[name].writes:
        exported(vit, tmp_path / "ours", writes)
        close(library_answer(tmp_path / "ours", writes, made.images), made.answer)


@pytest.mark.reference
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("size", [(224, 224), (256, 256), (200, 312)])
@pytest.mark.parametrize("library", ["timm", "hf"])
def test_the_published_tiny_networks_give_the_librarys_logits(version, size, library, tmp_path):
    """In both directions, with random weights, at any size in timm."""
    torch = pytest.importorskip("torch")
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
    from tests.checkpoints.test_torch_reference import library_answer

    if library == "hf" and size != ((224, 224) if version == 1 else (256, 256)):
        pytest.skip("it pads before it rolls")
    torch.manual_seed(0)
    name = "swin_tiny_patch4_window7_224" if version == 1 else "swinv2_tiny_window8_256"
    window = 7 if version == 1 else 8
    if library == "timm":
        model = timm.create_model(name, img_size=size)
        config = {"architecture": name, "model_args": dict(img_size=size)}
    else:
        family = "Swin" if version == 1 else "Swinv2"
        hf = getattr(transformers, f"{family}Config")(
            image_size=size[0], window_size=window, num_labels=1000
        )
        model = getattr(transformers, f"{family}ForImageClassification")(hf)
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * 0.03 + (1 if "norm" in key and "weight" in key else 0))
    model.eval()
    if library == "timm":
        arrays = {key: value.numpy() for key, value in model.state_dict().items()}
        save_file(arrays, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(config))
    else:
        model.save_pretrained(tmp_path)
    x = np.random.default_rng(0).normal(size=(1, *size, 3)).astype(np.float32)
    with torch.no_grad():
        answer = model(torch.tensor(x.transpose(0, 3, 1, 2)))
    answer = (answer if library == "timm" else answer.logits).numpy()

    vit = load(tmp_path)

    close(vit(x), answer)
    exported(vit, tmp_path / "ours", library)
    close(library_answer(tmp_path / "ours", library, x), answer)


@pytest.mark.reference
def test_timm_reads_microsofts_layout_as_we_do(tmp_path):
    timm = pytest.importorskip("timm")
    from timm.models.swin_transformer import checkpoint_filter_fn

    _, made = make("ms-swin")
    torch = pytest.importorskip("torch")
    args = stored("timm-swin").config["model_args"] | dict(img_size=[24, 24])
    model = timm.create_model("swin_tiny_patch4_window7_224", **args).eval()
    tensors = {k.removeprefix("model."): torch.tensor(v) for k, v in made.arrays.items()}
    model.load_state_dict(checkpoint_filter_fn(tensors, model))
    with torch.no_grad():
        answer = model(torch.tensor(made.images.transpose(0, 3, 1, 2))).numpy()
    close(load(written("ms-swin", tmp_path))(made.images), answer)
