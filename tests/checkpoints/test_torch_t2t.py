"""Published files of T2T-ViT: what is taken, what is guessed and said, and what is refused."""

import collections
import json
import logging
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import t2t
from tests.checkpoints.test_pth import Call, Values, tensor, write_legacy, write_zip
from vit_jax import load
from vit_jax.checkpoints import hub, read_layout, read_spec
from vit_jax.checkpoints.convert import convert
from vit_jax.cli import main
from vit_jax.errors import UserError
from vit_jax.models import create_model

NORMALIZE = "normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))"


class Shape(collections.namedtuple("Shape", "shape")):
    """An array of which only the shape is looked at."""

    dtype = np.dtype("float32")

    def reshape(self, shape):
        return Shape(tuple(shape))

    def __getitem__(self, _):
        return Shape(self.shape[1:])


def pth(path, arrays, *, write=write_zip, prefix="", wrapper="state_dict_ema", beside=()):
    """A training checkpoint as its authors' script wrote it."""
    storages = [Values(array.ravel(), str(i)) for i, array in enumerate(arrays.values())]
    items = zip(arrays.items(), storages, strict=True)
    state = {prefix + name: tensor(s, array.shape) for (name, array), s in items}
    content = {"epoch": 3, "arch": "t2t_vit", "args": Call("argparse Namespace")}
    content |= dict(beside) | {wrapper: state}
    return write(path, content, storages)


@pytest.mark.parametrize("kind", t2t.KINDS)
@pytest.mark.parametrize(
    ("write", "prefix", "wrapper"),
    [
        (write_zip, "", "state_dict_ema"),
        (write_legacy, "module.", "state_dict"),
        (write_zip, "module.", "net"),
    ],
)
def test_a_published_file_computes_what_its_network_does(
    kind, write, prefix, wrapper, tmp_path, caplog
):
    arrays = t2t.official_arrays(kind, grid=(2, 2))
    file = pth(tmp_path / "a.pth.tar", arrays, write=write, prefix=prefix, wrapper=wrapper)

    with jax.default_matmul_precision("highest"):
        vit = load(file, heads=3)
        images = np.random.default_rng(0).uniform(-2, 2, (2, 32, 32, 3)).astype(np.float32)
        logits = vit(images)

    expected = t2t.forward(arrays, images, heads=3)
    np.testing.assert_allclose(logits, expected, atol=1e-6 * np.abs(expected).max())
    assert f"{wrapper} is taken; left out: epoch, arch, args" in caplog.text
    short = f"resize_small({int(32 / 0.9)}, method='pil_bicubic')"
    assert vit.preprocess == f"{short}|central_crop(32, round_even=True)|{NORMALIZE}"
    positions = vit.params["Transformer"]["posembed_input"]["pos_embedding"]
    np.testing.assert_array_equal(positions, arrays["pos_embed"])  # As they are in the file.


def test_the_average_goes_before_the_last_weights(tmp_path):
    average, last = (t2t.official_arrays("performer", seed) for seed in (0, 1))
    storages = [Values(a.ravel(), f"last{i}") for i, a in enumerate(last.values())]
    items = zip(last.items(), storages, strict=True)
    beside = {"state_dict": {name: tensor(s, a.shape) for (name, a), s in items}}

    def write(path, content, own):
        return write_zip(path, content, [*own, *storages])

    file = pth(tmp_path / "a.pth.tar", average, write=write, beside=beside)
    vit = load(file, heads=3)

    np.testing.assert_array_equal(vit.params["head"]["kernel"], average["head.weight"].T)


def test_what_is_converted_and_saved_comes_back(tmp_path):
    arrays = t2t.official_arrays("performer")
    file = pth(tmp_path / "a.pth.tar", arrays)
    vit = load(file, heads=3)
    vit.save(tmp_path / "saved.npz")
    convert(file, tmp_path / "converted.npz", heads=3)
    for name in ("saved", "converted"):
        again = load(tmp_path / f"{name}.npz")
        assert (again.spec, again.preprocess) == (vit.spec, vit.preprocess)
        jax.tree.map(np.testing.assert_array_equal, again.params, vit.params)


@pytest.mark.parametrize("library", ["timm", "hf"])
def test_no_other_library_has_it(library, tmp_path, capsys):
    pth(tmp_path / "a.pth.tar", t2t.official_arrays("performer"))
    command = ["convert", str(tmp_path / "a.pth.tar"), str(tmp_path / "out"), f"--to={library}"]
    assert main([*command, "--heads=3"]) == 2
    error = capsys.readouterr().err
    assert "doesn't compute a T2T-ViT" in error
    assert not (tmp_path / "out").exists()


# What no array tells. Files of the published size, of which only the shapes are looked at.


def published(kind="performer", **changes):
    sizes = dict(grid=(14, 14), width=384, depth=14, mlp_dim=1152, classes=1000) | changes
    return {name: Shape(shape) for name, shape in t2t.official_shapes(kind, **sizes).items()}


def understood(arrays, **wishes):
    """The layout of a file, and its network."""
    layout = read_layout(arrays, **wishes)
    return layout, read_spec(layout.arrays, **layout.hints)


def heads_of(layout) -> int:
    name = "Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"
    return layout.arrays[name].shape[1]


def zeros(shapes):
    return {name: np.broadcast_to(np.float32(0), x.shape) for name, x in shapes.items()}


def test_fourteen_blocks_have_six_heads_and_may_have_32(tmp_path, caplog):
    arrays = zeros(published())
    caplog.set_level(logging.WARNING)

    named = read_layout(arrays, tmp_path / "81.5_T2T_ViT_14.pth.tar")
    assert (heads_of(named), caplog.text) == (6, "")
    for file in ("cirfar100_t2t-vit-14_88.4.pth", "cifar10_t2t-vit_14_98.3.pth"):
        assert heads_of(read_layout(arrays, tmp_path / file)) == 6
    assert caplog.text == ""
    guessed = read_layout(arrays, tmp_path / "model_best.pth.tar")
    assert heads_of(guessed) == 6
    assert "no array tells T2T-ViT-14 from T2T-ViT-14-resnext: taken as the former" in caplog.text
    caplog.clear()
    told = read_layout(arrays, tmp_path / "model_best.pth.tar", heads=32)
    assert (heads_of(told), caplog.text) == (32, "")
    with pytest.raises(UserError, match=r"T2T-ViT-14-resnext, of 32 attention heads, .* heads=32"):
        read_layout(arrays, tmp_path / "t2t_vit_14_resnext.pth.tar")
    resnext = read_layout(arrays, tmp_path / "t2t_vit_14_resnext.pth.tar", heads=32)
    assert heads_of(resnext) == create_model("T2T-ViT-14-resnext").num_heads


@pytest.mark.parametrize(
    ("kind", "sizes", "name"),
    [
        ("performer", dict(width=256, depth=7, mlp_dim=512), "T2T-ViT-7"),
        ("performer", dict(width=448, depth=19, mlp_dim=1344), "T2T-ViT-19"),
        ("performer", dict(grid=(24, 24)), "T2T-ViT-14"),
        ("transformer", dict(width=512, depth=24, mlp_dim=1536), "T2T-ViT-t-24"),
        ("performer", dict(width=768, depth=4, mlp_dim=2304), "T2T-ViT-14-wide"),
    ],
)
def test_a_published_network_is_known_by_its_shapes(kind, sizes, name):
    layout, spec = understood(zeros(published(kind, **sizes)))
    side = sizes.get("grid", (14, 14))[0] * 16
    assert (spec.name, spec.image_size) == (name, (side, side))
    assert layout.style == f"T2T-ViT of a {kind}"


def test_files_of_cifar_are_for_its_values(tmp_path):
    arrays = t2t.official_arrays("performer", classes=10)
    vit = load(pth(tmp_path / "cifar10_t2t-vit_14_98.3.pth", arrays, wrapper="net"), heads=3)
    assert vit.preprocess == (
        "resize_small(32, method='pil_bilinear')|central_crop(32, round_even=True)"
        "|normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.201))"
    )


def test_a_network_with_more_arrays_is_refused_by_their_names(tmp_path):
    arrays = t2t.official_arrays("performer") | {"aux_head.weight": np.zeros((5, 12), "f4")}
    with pytest.raises(UserError, match=r"has arrays that are not known .* aux_head.weight \(5, 1"):
        load(pth(tmp_path / "84.2_T2T_ViT_24.pth.tar", arrays), heads=3)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("performer", {"pos_embed": None}, "T2T-ViT of a performer without position embeddings"),
        (
            "performer",
            {"tokens_to_token.attention2.w": None},
            r"missing \(1\): tokens_to_token/attention2/features",
        ),
        ("transformer", {"cls_token": None}, r"missing \(1\): cls"),
        (
            "transformer",
            {"tokens_to_token.attention1.attn.qkv.weight": (190, 147)},
            "3 equal parts",
        ),
        ("performer", {"tokens_to_token.project.weight": (12,)}, "expected 2 axes"),
        (
            "performer",
            {"tokens_to_token.attention2.mlp.0.weight": (64, 60)},
            r"attention2/MlpBlock_0/Dense_0/kernel \(60, 64\), expected \(64, 64\)",
        ),
        ("performer", {"tokens_to_token.attention1.norm1.weight": (50,)}, "wrong shape"),
        ("transformer", {"blocks.0.dwconv.weight": (12, 1, 3, 3)}, "unknown .* it is another"),
    ],
)
def test_a_file_that_is_not_whole_is_refused_in_one_line(kind, change, message):
    arrays = t2t.official_arrays(kind)
    for name, shape in change.items():
        arrays.pop(name, None)
        if shape:
            arrays[name] = np.zeros(shape, np.float32)
    with pytest.raises(UserError, match=message):
        understood(arrays, heads=3)


def test_info_says_what_was_taken_and_from_where(tmp_path, capsys):
    file = pth(tmp_path / "71.7_T2T_ViT_7.pth.tar", t2t.official_arrays("transformer"))
    assert main(["info", str(file), "--heads=3", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["key_style"].startswith("T2T-ViT of a transformer")
    assert facts["token_attention"] == "transformer"
    assert facts["known_from"]["num_heads"] == "what was given"


@pytest.mark.parametrize("kind", t2t.KINDS)
def test_a_new_head_and_other_images_are_taken_as_the_docs_say(kind, tmp_path):
    vit = load(
        pth(tmp_path / "a.pth.tar", t2t.official_arrays(kind)),
        heads=3,
        num_classes=2,
        image_size=(48, 80),
    )
    assert vit(np.zeros((1, 48, 80, 3), np.float32)).tolist() == [[0, 0]]
    guide = Path(__file__).parents[2] / "docs" / "weights.md"
    assert f"| T2T-ViT of a {kind} | yes |  | yes |\n" in guide.read_text()


def test_a_published_name_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path))
    file = hub.cache_path(hub.url_for("t2t/cifar100/T2T-ViT-14"))
    file.parent.mkdir(parents=True)
    pth(file, t2t.official_arrays("performer", classes=100), wrapper="net")

    vit = load("t2t/cifar100/T2T-ViT-14", heads=3)

    assert vit.spec.num_classes == 100
    assert "0.4914" in vit.preprocess  # CIFAR's, though the file is called cirfar100.
