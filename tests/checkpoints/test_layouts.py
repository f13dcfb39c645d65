"""Every layout that was published is understood, and comes back as it was."""

import logging
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import published, reference
from vit_jax.checkpoints import (
    ENDINGS,
    STYLES,
    load_weights,
    open_arrays,
    read_layout,
    read_spec,
    save_weights,
    to_linen,
    to_style,
    to_tree,
    write_npz,
)
from vit_jax.errors import UserError

GUIDE = Path(__file__).parents[2] / "docs" / "checkpoints.md"
BLOCK = "Transformer/encoderblock_11"
CASES = [
    pytest.param(family, layout, id=f"{family}-{layout.__name__}")
    for _, layout, _, families in published.LAYOUTS
    for family in families
]
OFFICIAL = {name: reference.official_shapes(name, "1000+rep") for name in ("ViT-Ti_16", "ViT-H_14")}
OFFICIAL |= {
    name: published.official_shapes(name)
    for name in ("R+ViT-Ti_16", "R50+ViT-B_16", "R50+ViT-L_32", "Mixer-L_16", "LiT-B16B")
}


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_a_published_file_is_understood(family, layout, tmp_path):
    stored, expected = layout(published.arrays(family))
    np.savez(tmp_path / "w.npz", **stored)

    found, spec = load_weights(tmp_path / "w.npz")

    assert published.same(found, expected)
    assert spec.shapes() == published.shapes(family)


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_arrays_in_memory_are_understood_like_those_in_a_file(family, layout):
    stored, expected = layout(published.arrays(family))

    assert published.same(to_linen(stored), expected)


def test_the_table_in_the_guide_is_what_comes_out(tmp_path):
    rows = []
    for title, layout, style, families in published.LAYOUTS:
        cells = [
            _cell(f, layout, style, tmp_path) if f in families else "" for f in published.FAMILIES
        ]
        rows.append([title, *cells])
    for ending in ENDINGS:
        cells = [_kept(f, tmp_path / f"w{ending}", "linen") for f in published.FAMILIES]
        rows.append([f"`{ending}`", *("reads, writes" if kept else "" for kept in cells)])
    header = ["layout, kind of file", *published.FAMILIES]
    table = "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])

    assert table in GUIDE.read_text(), f"docs/checkpoints.md should have this table:\n{table}"


def _cell(family: str, layout, style: str | None, folder: Path) -> str:
    stored, expected = layout(published.arrays(family))
    np.savez(folder / "w.npz", **stored)
    reads = published.same(_load(folder / "w.npz"), expected)
    writes = style is not None and _kept(family, folder / "w.npz", style)
    if writes:
        with np.load(folder / "w.npz") as written:
            writes = published.same(written, stored)
    return ", ".join(word for word, holds in (("reads", reads), ("writes", writes)) if holds)


def _kept(family: str, path: Path, style: str) -> bool:
    arrays = published.arrays(family)
    save_weights(path, to_tree(arrays), style=style)
    return published.same(_load(path), arrays)


def _load(path: Path) -> published.Arrays:
    with open_arrays(path) as stored:
        return {key: array.read() for key, array in to_linen(stored).items()}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", OFFICIAL)
def test_a_style_leads_back_to_todays_names_and_shapes(name, style):
    arrays = published.empty(OFFICIAL[name])

    styled = to_style(arrays, style)

    assert len(styled) == len(arrays)
    assert {key: a.shape for key, a in to_linen(styled).items()} == OFFICIAL[name]
    assert read_spec(to_linen(styled)).name == name


def test_the_style_of_a_file_is_told():
    hybrid = published.arrays("hybrid")
    assert read_layout(hybrid).style == "linen"
    assert read_layout(to_style(hybrid, "prelinen")).style == "prelinen"
    assert read_layout(to_style(hybrid, "2020")).style == "prelinen, 2020"
    assert read_layout(published.siglip(published.arrays("ViT MAP"))[0]).style == (
        "optimizer, towers, top-level positions"
    )


def test_the_published_names_are_those_of_one_counter_over_all_sub_modules():
    shapes = OFFICIAL["ViT-Ti_16"]
    new_names = to_style({key: key for key in shapes}, "prelinen")

    renamed = {new: old for new, old in new_names.items() if new != old}
    # A block has 16 arrays; those of LayerNorm_0 alone keep their names.
    assert len(renamed) == 12 * 14
    assert renamed[f"{BLOCK}/LayerNorm_2/scale"] == f"{BLOCK}/LayerNorm_1/scale"
    assert (
        renamed[f"{BLOCK}/MultiHeadDotProductAttention_1/query/kernel"]
        == f"{BLOCK}/MultiHeadDotProductAttention_0/query/kernel"
    )
    assert renamed[f"{BLOCK}/MlpBlock_3/Dense_0/bias"] == f"{BLOCK}/MlpBlock_0/Dense_0/bias"


def test_only_group_norms_have_four_axes_in_the_first_hybrids():
    arrays = published.empty(OFFICIAL["R50+ViT-B_16"])
    plain, old = to_style(arrays, "prelinen"), to_style(arrays, "2020")

    changed = {key for key in plain if plain[key].shape != old[key].shape}

    assert {key.split("/")[-2] for key in changed} == {"gn1", "gn2", "gn3", "gn_proj", "gn_root"}
    assert old["block1/unit1/gn_proj/scale"].shape == (1, 1, 1, 256)


def test_the_names_of_a_published_file_are_known(shared):
    (path,) = (shared / "checkpoints").glob("Ti_16-*.npz")
    with open_arrays(path) as arrays:
        assert read_layout(arrays).style == "prelinen"
        assert set(arrays) == set(
            to_style(published.empty(reference.official_shapes("ViT-Ti_16")), "prelinen")
        )


def test_positions_before_the_class_token_give_the_same_network():
    """big_vision adds positions to the patches alone, and puts the class token in front then."""
    linen = published.arrays("ViT")
    stored, _ = published.big_vision(linen)
    found = to_linen(stored)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)

    # In the reference the positions are added after the token; so give it the bare ones by hand.
    by_hand = dict(linen)
    by_hand[published.POSITIONS] = np.concatenate(
        [0 * linen["cls"], stored["pos_embedding"]], axis=1
    )
    expected = reference.forward(by_hand, images, classifier="token")
    with jax.default_matmul_precision("highest"):
        logits = read_spec(found).model().apply({"params": to_tree(found)}, images)
    np.testing.assert_allclose(logits, expected, atol=2e-5)


def test_a_tower_is_chosen_by_name(tmp_path):
    lit = published.arrays("LiT")
    write_npz(tmp_path / "lit.npz", lit)

    found, spec = load_weights(tmp_path / "lit.npz", tower="img")

    assert set(found) == {k.removeprefix("img/") for k in lit if k.startswith("img/")}
    assert spec.classifier == "token"
    with pytest.raises(UserError, match="no tower 'image' in the file: expected one of img, txt"):
        load_weights(tmp_path / "lit.npz", tower="image")


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (published.siglip, "left out: b, t, txt"),
        (published.optimizer, "left out: opt"),
        (published.linen, None),
    ],
)
def test_what_is_left_out_is_told(layout, message, caplog):
    with caplog.at_level(logging.INFO):
        to_linen(layout(published.arrays("ViT"))[0], where="here.npz")

    if message is None:
        assert not caplog.records
    else:
        (record,) = caplog.records
        assert message in record.getMessage()
        assert record.getMessage().startswith("here.npz: ")


def test_other_names_are_left_alone():
    arrays = {"encoderblock_0/LayerNorm_2/scale": 1, "LayerNorm_2/scale": 2, "opt/step": 3}

    assert to_linen(arrays) == {
        "encoderblock_0/LayerNorm_1/scale": 1,
        "LayerNorm_2/scale": 2,
        "opt/step": 3,
    }


@pytest.mark.parametrize(
    ("key", "twin"),
    [
        (f"{BLOCK}/LayerNorm_1/scale", f"{BLOCK}/LayerNorm_2/scale"),
        (published.POSITIONS, "pos_embedding"),
        (f"{BLOCK}/x", "Transformer/encoderblock/x"),
    ],
)
def test_one_array_under_two_names_is_refused(key, twin):
    arrays = {key: np.zeros((1, 1, 1)), twin: np.zeros((12, 1, 1))}

    with pytest.raises(UserError, match=re.escape(f"{key!r} is there twice, in two layouts")):
        to_linen(arrays)


@pytest.mark.parametrize("stacks", [((2, 3), (4, 3)), ((), ()), ((0, 3),), ((10**9, 0),)])
def test_layers_that_disagree_or_are_too_many_are_refused(stacks):
    arrays = {
        f"Transformer/encoderblock/{i}": np.broadcast_to(np.float32(0), shape)
        for i, shape in enumerate(stacks)
    }

    with pytest.raises(UserError, match=r"of 'encoderblock' have first axes of .* damaged"):
        to_linen(arrays)


def test_an_unknown_style_is_refused():
    with pytest.raises(UserError, match="unknown key style 'keras', expected one of linen, pre"):
        to_style({}, "keras")
