"""The architecture is read from the arrays, and every array that doesn't fit is named."""

import logging
import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import families, reference
from vit_jax.checkpoints import Spec, check_arrays, read_spec
from vit_jax.errors import UserError
from vit_jax.models import MlpMixer, T2TViT, create_model, list_models, variant

TINY = families.vit_spec(num_layers=3)
BLOCK = "Transformer/encoderblock_"
POSITIONS = "Transformer/posembed_input/pos_embedding"


class Shape:
    """An array without its numbers."""

    def __init__(self, shape: tuple[int, ...], dtype: str = "float32") -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)


def arrays_of(spec: Spec, **changes) -> dict[str, Shape]:
    shapes = spec.replace(**changes).shapes()
    return {key: Shape(shape) for key, shape in shapes.items()}


def refusal(arrays, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        read_spec(arrays, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Reading.


@pytest.mark.parametrize("name", list(reference.facts("manifests")))
def test_official_arrays_tell_their_official_name(name):
    shapes = reference.official_shapes(name, "21843+rep", 384)
    spec = read_spec({key: Shape(shape) for key, shape in shapes.items()})

    assert spec.name == name
    assert (spec.num_classes, spec.representation_size) == (21843, spec.hidden_size)
    assert spec.image_size[0] in (378, 384)  # 14 does not divide 384.
    assert spec.num_tokens == shapes[POSITIONS][1]


@pytest.mark.parametrize("name", sorted(set(list_models()) - set(reference.facts("manifests"))))
def test_arrays_of_the_other_families_tell_their_official_name(name):
    model = create_model(name, 1000)
    shapes = model.shapes(model.usual_size, 3)

    untold = {k: v for k, v in variant(name).items() if k in getattr(model, "untold", ())}
    spec = read_spec(
        {key: Shape(shape) for key, shape in shapes.items()},
        classifier=model.classifier if untold else None,
        untold=untold,
    )

    assert spec.name == name.replace("SigLIP-So400m_14", "ViT-So400m_14")  # The same network.
    assert (spec.num_classes, spec.image_size) == (1000, model.usual_size)
    assert spec.num_parameters == sum(np.prod(shape) for shape in shapes.values())


def _family(**fields) -> Spec:
    return TINY.replace(**({"image_size": (64, 96)} | fields))


FAMILIES = {
    "root": _family(resnet=(), patch_size=(2, 3)),
    "hybrid": _family(resnet=(1, 2, 1), patch_size=(1, 1), classifier="gap"),
    "MAP": _family(classifier="map", representation_size=7),
    "sincos2d": _family(position_embedding="sincos2d", classifier="gap"),
    "sincos2d MAP": _family(position_embedding="sincos2d", classifier="map"),
    "sincos2d token": _family(position_embedding="sincos2d"),
    "Mixer": Spec(MlpMixer(5, (8, 6), 16, 3, 7, 9), (64, 96), 2),
    "T2T": Spec(T2TViT(5, 16, 3, 2, 24, "transformer"), (64, 96), 2),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_arrays_of_any_family_with_notes_tell_everything(family):
    spec = FAMILIES[family]
    arrays = {key: Shape(shape) for key, shape in spec.shapes().items()}

    found = read_spec(arrays, classifier=spec.classifier, image_size=spec.image_size)

    assert found == spec
    assert found.description
    assert all(isinstance(text, str) for text in found.summary().values())


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("hybrid", "block2/unit1/conv_proj/kernel"),
        ("hybrid", "block1/unit1/gn3/scale"),
        ("root", "gn_root/bias"),
        ("MAP", "MAPHead_0/probe"),
        ("Mixer", "MixerBlock_1/token_mixing/Dense_1/bias"),
        ("Mixer", "pre_head_layer_norm/scale"),
        ("T2T", "tokens_to_token/attention2/value/kernel"),
        ("T2T", "cls"),
    ],
)
def test_a_missing_array_of_any_family_is_named(family, key):
    spec = FAMILIES[family]
    arrays = {k: Shape(shape) for k, shape in spec.shapes().items()}
    del arrays[key]

    assert f"missing (1): {key}" in refusal(
        arrays, classifier=spec.classifier, image_size=spec.image_size
    )


@st.composite
def specs(draw) -> Spec:
    heads = draw(st.integers(1, 4))
    patch = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    grid = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    return families.vit_spec(
        patch_size=patch,
        hidden_size=heads * draw(st.integers(1, 8)),
        num_layers=draw(st.integers(1, 12)),
        num_heads=heads,
        mlp_dim=draw(st.integers(1, 40)),
        classifier=draw(st.sampled_from(["token", "gap", "first", "unpooled", "token_unpooled"])),
        representation_size=draw(st.none() | st.integers(1, 20)),
        num_classes=draw(st.none() | st.integers(1, 30)),
        channels=draw(st.integers(1, 5)),
        image_size=tuple(
            p * g + draw(st.integers(0, p - 1)) for p, g in zip(patch, grid, strict=True)
        ),
    )


@settings(max_examples=20, deadline=None)
@given(spec=specs())
def test_arrays_with_notes_tell_everything(spec):
    found = read_spec(arrays_of(spec), classifier=spec.classifier, image_size=spec.image_size)

    assert found == spec


@pytest.mark.parametrize("classifier", ["token", "gap"])
@pytest.mark.parametrize("grid", [1, 2, 7, 14])
def test_arrays_alone_tell_a_square_grid(classifier, grid):
    spec = TINY.replace(classifier=classifier, image_size=(grid * 4, grid * 4))

    assert read_spec(arrays_of(spec)) == spec


def test_a_grid_that_is_not_square_is_taken_lying_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        spec = read_spec(arrays_of(TINY, image_size=(12, 20)), where="some.npz")

    assert spec.grid_size == (3, 5)
    assert "some.npz: its 15 positions are no square grid; taken as 3 rows of 5" in caplog.text


def test_a_likely_size_is_believed_where_no_square_is_possible(caplog):
    arrays = arrays_of(TINY, image_size=(20, 12))

    assert read_spec(arrays, likely_size=(21, 14)).image_size == (21, 14)
    assert not caplog.records
    assert read_spec(arrays, likely_size=(8, 8)).grid_size == (3, 5)


def test_a_square_grid_is_believed_rather_than_a_likely_size():
    arrays = arrays_of(TINY)  # 4 rows of 4 patches, as many as 2 rows of 8.

    assert read_spec(arrays, likely_size=(8, 32)).grid_size == (4, 4)
    assert read_spec(arrays, image_size=(8, 32)).grid_size == (2, 8)


def test_a_known_size_that_does_not_fit_is_refused():
    message = refusal(arrays_of(TINY), image_size=(20, 16), where="some.npz")

    assert "some.npz: its 16 positions do not fit images of 20x16 pixels" in message


def test_ten_positions_are_a_grid_if_a_size_or_classifier_says_so():
    """Ten are nine and a class token, or two rows of five."""
    arrays = arrays_of(TINY, classifier="gap", image_size=(8, 20))

    assert "missing (1): cls (1, 1, 16)" in refusal(arrays)
    assert read_spec(arrays, classifier="gap").grid_size == (2, 5)
    assert read_spec(arrays, likely_size=(8, 20)).grid_size == (2, 5)


# Refusing.


def test_missing_unexpected_and_misshaped_arrays_are_all_named_at_once():
    arrays = arrays_of(TINY)
    del arrays["cls"], arrays[f"{BLOCK}1/LayerNorm_0/bias"]
    arrays["opt/step"] = Shape(())
    arrays["head/bias"] = Shape((6,))
    arrays["embedding/bias"] = Shape((16,), "int32")

    message = refusal(arrays, where="some.npz")

    assert message.startswith("some.npz does not fit a ViT of width 16 and 3 blocks: ")
    assert f"missing (2): {BLOCK}1/LayerNorm_0/bias (16,), cls (1, 1, 16)" in message
    assert "unexpected (1): opt/step ()" in message
    assert "wrong shape (1): head/bias (6,), expected (5,)" in message
    assert "not floating (1): embedding/bias int32" in message


@pytest.mark.parametrize("missing", sorted(TINY.shapes()))
def test_any_single_missing_array_is_named(missing):
    arrays = arrays_of(TINY)
    del arrays[missing]

    assert missing in refusal(arrays)


@pytest.mark.parametrize("key", sorted(TINY.shapes()))
@pytest.mark.parametrize("change", ["longer", "deeper", "empty", "scalar"])
def test_any_single_misshaped_array_is_named(key, change):
    arrays = arrays_of(TINY)
    shape = arrays[key].shape
    arrays[key] = Shape(
        {
            "longer": (shape[0] + 1, *shape[1:]),
            "deeper": (*shape, 1),
            "empty": (*shape[:-1], 0),
            "scalar": (),
        }[change]
    )

    if (key, change) == ("embedding/kernel", "longer"):
        assert read_spec(arrays).patch_size == (5, 4)  # A patch may have any size.
    else:
        assert key in refusal(arrays)


def test_a_missing_block_is_named_and_a_stray_one_unexpected():
    arrays = arrays_of(TINY, num_layers=4)
    holed = {k: v for k, v in arrays.items() if not k.startswith(f"{BLOCK}2/")}
    assert f"missing (16): {BLOCK}2/LayerNorm_0/bias (16,)" in refusal(holed)

    for number in ("99999999999", "9" * 5000, "9999"):
        stray = arrays | {f"{BLOCK}{number}/LayerNorm_0/bias": Shape((16,))}
        assert f"unexpected (1): {BLOCK}{number[:99]}" in refusal(stray)


def test_what_is_no_vit_is_told_by_what_it_holds():
    message = refusal({"fc/kernel": Shape((2, 3))}, where="other.npz")
    assert message == (
        "other.npz is no ViT checkpoint: missing (3): embedding/kernel, "
        f"{POSITIONS}, {BLOCK}0/...; it holds 1 arrays: fc/kernel"
    )
    assert "it holds 0 arrays" in refusal({})


def test_names_can_not_break_the_line():
    assert r"a\nb\x1b[2J ()" in refusal(arrays_of(TINY) | {"a\nb\x1b[2J": Shape(())})


def test_a_classifier_that_does_not_fit_the_arrays_is_refused():
    assert "unexpected (1): cls" in refusal(arrays_of(TINY), classifier="gap", image_size=(68, 4))
    assert "missing (1): cls" in refusal(
        arrays_of(TINY, classifier="gap", image_size=(4, 20)), classifier="token"
    )


def test_heads_that_do_not_divide_the_width_are_refused():
    arrays = arrays_of(TINY)
    for i in range(3):
        arrays[f"{BLOCK}{i}/MultiHeadDotProductAttention_0/query/kernel"] = Shape((16, 3, 5))

    assert "3 attention heads do not divide the width 16" in refusal(arrays)


@pytest.mark.parametrize("family", families.LITS)
def test_heads_that_do_not_divide_the_width_of_words_are_refused(family):
    arrays = {key: Shape(shape) for key, shape in families.SPECS[family].shapes().items()}
    key = next(k for k in arrays if re.search(r"Embed_0/embedding|token_ids/embedding", k))
    if family == "LiT of BERT":
        for i in range(2):
            layer = f"txt/BertEncoder_0/encoder_block/layer_sequence/layers_{i}/attention_block"
            arrays[f"{layer}/attention_layer/query/kernel"] = Shape((129, 129))
    arrays[key] = Shape((14, 129))

    assert "2 attention heads do not divide the width 129" in refusal(arrays)


def test_towers_that_end_with_unequal_widths_are_refused_with_the_name_of_the_file():
    found = families.SPECS["LiT of BERT"].shapes()
    arrays = {key: Shape(shape) for key, shape in found.items()} | {
        "txt/head/kernel": Shape((64, 3)),
        "txt/head/bias": Shape((3,)),
    }

    assert refusal(arrays, where="x.npz").startswith("x.npz: the image tower gives 64 numbers")


def test_an_empty_root_is_refused():
    arrays = {key: Shape(shape) for key, shape in FAMILIES["root"].shapes().items()}
    arrays["conv_root/kernel"] = Shape((7, 7, 0, 64))

    assert "conv_root/kernel (7, 7, 0, 64), expected 4 axes" in refusal(arrays)


def test_stray_units_of_a_resnet_are_unexpected():
    arrays = {key: Shape(shape) for key, shape in FAMILIES["hybrid"].shapes().items()}
    stray = ["block99/unit1/x", "block9/unit1/x", "block1/unit999/x", "block2/unit99/x"]

    message = refusal(arrays | {key: Shape((1,)) for key in stray}, image_size=(64, 96))

    assert "unexpected (4): block1/unit999/x (1,), block2/unit99/x (1,), block9" in message


def test_of_many_bad_arrays_twenty_are_named():
    message = refusal(arrays_of(TINY) | {f"{'x' * 999}{i:02}": Shape(()) for i in range(50)})

    assert "unexpected (50): xxx" in message
    assert message.endswith(" and 30 more")
    assert len(message) < 5_000


def test_fixed_positions_cost_nothing_to_check():
    spec = FAMILIES["sincos2d"].replace(patch_size=(1, 1), hidden_size=4000)
    start = time.monotonic()

    assert read_spec(arrays_of(spec), image_size=(8000, 8000)).image_size == (8000, 8000)
    assert time.monotonic() - start < 5
    with pytest.raises(UserError, match="smaller than one patch"):
        read_spec(arrays_of(FAMILIES["sincos2d"]), image_size=(3, 8000))


def test_arrays_that_fit_are_accepted_in_any_floating_type():
    arrays = {k: Shape(v.shape, "float16") for k, v in arrays_of(TINY).items()}
    check_arrays(arrays, TINY, where="here")

    with pytest.raises(UserError, match="here does not fit"):
        check_arrays(arrays, TINY.replace(num_classes=6), where="here")


# The spec itself.


def test_a_spec_counts_its_tokens_and_parameters():
    assert TINY.grid_size == (4, 4)
    assert TINY.num_tokens == 17
    assert TINY.replace(classifier="gap").num_tokens == 16
    assert TINY.num_parameters == sum(np.prod(shape) for shape in TINY.shapes().values())
    assert TINY.name is None


def test_a_spec_makes_its_network():
    model = TINY.model(dropout_rate=0.1)

    assert (model.patch_size, model.mlp_dim, model.dropout_rate) == ((4, 4), 24, 0.1)
