"""The libraries themselves: every layout, read and written, and their positions of other sizes.

Skipped where torch, timm and transformers are not installed: `pip install -e '.[reference]'`.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest

from tests import families, reference, torch_models
from tests.checkpoints.test_fold import folded, network
from tests.checkpoints.test_torch import OURS, close, exported, images, ours
from vit_jax import load
from vit_jax.checkpoints import to_tree
from vit_jax.models.positions import resample
from vit_jax.pretrained import STYLE

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
from safetensors.torch import save_file  # noqa: E402

pytestmark = pytest.mark.reference


@pytest.fixture(autouse=True)
def _exact():
    with jax.default_matmul_precision("highest"):
        yield


def library_answer(folder, library: str, x: np.ndarray) -> np.ndarray:
    """What timm or transformers say, of a folder that we wrote."""
    tensor = torch.tensor(x.transpose(0, 3, 1, 2))
    with torch.no_grad():
        if library == "timm":
            return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(tensor).numpy()
        name = json.loads((folder / "config.json").read_text())["architectures"][0]
        model, report = getattr(transformers, name).from_pretrained(
            folder, output_loading_info=True
        )
        unused = {key for key in report["missing_keys"] if not key.startswith("pooler.")}
        assert not unused | set(report["unexpected_keys"]) | set(report["mismatched_keys"])
        out = model.eval()(tensor)
    if "logits" in out:
        return out.logits.numpy()
    if report["missing_keys"]:  # The pooler, which wasn't ours.
        return out.last_hidden_state[:, 0].numpy()
    return out.pooler_output.numpy()


@pytest.mark.parametrize("name", torch_models.CASES)
def test_a_librarys_network_computes_the_same_here_and_there_again(name, tmp_path):
    model, made = torch_models.make(name)
    case = torch_models.CASES[name]
    stored = torch_models.stored(name)
    np.testing.assert_allclose(made.answer, stored.answer, atol=2e-5 * abs(made.answer).max())
    folder = tmp_path / "theirs"
    if case.answer:
        model.save_pretrained(folder)
    else:
        folder.mkdir()
        tensors = {k: torch.tensor(v) for k, v in made.arrays.items()}
        save_file(tensors, folder / "model.safetensors")
        if made.config:
            (folder / "config.json").write_text(json.dumps(made.config))

    vit = load(folder / "model.safetensors", heads=None if made.config else 3)

    close(vit(made.images), made.answer)
    if case.writes:
        out = tmp_path / "ours"
        exported(vit, out, case.writes)
        close(library_answer(out, case.writes, made.images), made.answer)


@pytest.mark.parametrize("library", ["timm", "hf"])
@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("name", OURS)
def test_the_library_computes_what_ours_does(name, channels, library, tmp_path):
    if library not in OURS[name][1]:
        pytest.skip("refused")
    vit = ours(name, channels=channels)
    x = images(vit.spec)

    exported(vit, tmp_path, library)

    close(library_answer(tmp_path, library, x), vit(x))


@pytest.mark.parametrize(
    ("fields", "library"),
    [
        (dict(layer_norm_epsilon=1e-3, activation="gelu_erf"), "timm"),
        (dict(layer_norm_epsilon=1e-12, layer_scale=0.1, num_registers=2), "timm"),
        (dict(position_embedding="sincos2d", qkv_bias=False), "timm"),
        (dict(position_embedding="sincos2d", cls_has_position=False, layer_scale=0.1), "hf"),
    ],
)
def test_what_is_folded_is_the_same_to_the_library(fields, library, tmp_path):
    vit = folded(network(**fields))

    exported(vit, tmp_path, library)

    x = images(vit.spec)
    close(library_answer(tmp_path, library, x), vit(x))


def test_both_libraries_take_images_that_are_not_square(tmp_path):
    vit = ours("the original", image_size=(12, 20))
    for library in ("timm", "hf"):
        exported(vit, tmp_path / library, library)
        x = images(vit.spec)
        close(library_answer(tmp_path / library, library, x), vit(x))


@pytest.mark.parametrize("new", [(3, 5), (24, 30), (16, 11), (7, 16), (40, 4)])
@pytest.mark.parametrize("old", [(16, 16), (9, 14)])
def test_positions_of_another_size_are_the_librarys(old, new):
    from timm.layers import resample_abs_pos_embed
    from torch.nn.functional import interpolate

    stored = np.random.default_rng(0).normal(size=(1, 1 + old[0] * old[1], 5)).astype(np.float32)
    grid = torch.tensor(stored[:, 1:].reshape(1, *old, 5)).permute(0, 3, 1, 2)
    sized = dict(size=new, align_corners=False)
    offset = [(n + 0.1) / o for n, o in zip(new, old, strict=True)]
    rules = {
        "torch": interpolate(grid, mode="bicubic", **sized),
        "dinov2": interpolate(grid, mode="bicubic", scale_factor=offset, align_corners=False),
        "bilinear": interpolate(grid, mode="bilinear", **sized),
    }
    expected = {k: v.permute(0, 2, 3, 1).reshape(1, -1, 5).numpy() for k, v in rules.items()}
    timms = resample_abs_pos_embed(torch.tensor(stored), list(new), list(old))
    expected["torch-antialias"] = timms.numpy()[:, 1:]
    for rule, values in expected.items():
        found = resample(stored, old, new, prefix=1, rule=rule)
        np.testing.assert_array_equal(found[:, :1], stored[:, :1])
        np.testing.assert_allclose(found[:, 1:], values, atol=1e-5 * abs(values).max())


@pytest.mark.parametrize("name", ["Dinov2Model", "Dinov2WithRegistersModel"])
def test_a_network_for_other_images_is_the_librarys(name, tmp_path):
    family = name.removesuffix("Model")
    sizes = dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=3)
    config = getattr(transformers, f"{family}Config")(image_size=36, patch_size=4, **sizes)
    model = getattr(transformers, name)(config).eval()
    model.save_pretrained(tmp_path)
    for size in ((20, 28), (48, 44)):
        vit = load(tmp_path / "model.safetensors", image_size=size)
        x = images(vit.spec)
        close(vit(x), torch_models.ask(model, x, "pooler_output"))


def test_all_parameters_of_a_published_size_are_there():
    model = timm.create_model("deit3_small_patch16_224")
    from vit_jax import create_model
    from vit_jax.models import Spec

    spec = Spec(create_model("DeiT3-S_16", num_classes=1000), (224, 224), 3)
    assert spec.num_parameters == sum(p.numel() for p in model.parameters())


def test_timm_reads_what_a_run_writes(tmp_path):
    """Where timm's GELU is ours: its networks have the one by erf, those of a run that by tanh."""
    vit = families.make("MAP", tmp_path)
    spec = families.vit_spec(activation="gelu_erf")
    params = to_tree(reference.make_params(spec.shapes(), seed=3))
    vit = dataclasses.replace(vit, model=spec.model(), params=params, spec=spec)
    vit.save(tmp_path / "weights.npz", style=STYLE)
    model = timm.models.vision_transformer.VisionTransformer(
        **dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=5),
        mlp_ratio=1.5,
    )
    model.load_pretrained(str(tmp_path / "weights.npz"))
    x = np.random.default_rng(0).normal(size=(3, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        found = model.eval()(torch.tensor(x.transpose(0, 3, 1, 2))).numpy()
    close(found, vit(x))
