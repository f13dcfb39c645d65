"""Official files come in and go out unchanged, and are changed for other tasks as officially."""

import jax
import ml_dtypes
import numpy as np
import pytest

from tests import reference
from tests.families import vit_spec
from vit_jax import checkpoints
from vit_jax.checkpoints import load_weights, save_weights, to_style, to_tree
from vit_jax.errors import UserError
from vit_jax.models.positions import resample

SPEC = vit_spec(representation_size=16)
POSITIONS = "Transformer/posembed_input/pos_embedding"
ARRAYS = reference.make_params(SPEC.shapes(), seed=1)


def assert_same(found, expected) -> None:
    assert found.keys() == expected.keys()
    for key in expected:
        np.testing.assert_array_equal(found[key], expected[key], strict=True)


# In and out.


@pytest.mark.parametrize("style", checkpoints.STYLES)
def test_a_file_of_any_style_comes_back_bit_for_bit(tmp_path, style):
    np.savez(tmp_path / "in.npz", **to_style(ARRAYS, style))

    arrays, spec = load_weights(tmp_path / "in.npz")
    save_weights(tmp_path / "out.npz", to_tree(arrays), style=style)

    assert spec == SPEC
    assert_same(arrays, ARRAYS)
    assert_same(dict(np.load(tmp_path / "out.npz")), to_style(ARRAYS, style))


def test_a_style_can_be_turned_into_the_other_and_back(tmp_path):
    save_weights(tmp_path / "old.npz", to_tree(ARRAYS), style="prelinen")
    arrays, _ = load_weights(tmp_path / "old.npz")
    save_weights(tmp_path / "new.npz", to_tree(arrays))

    assert_same(dict(np.load(tmp_path / "new.npz")), ARRAYS)


def test_a_real_published_file_comes_back_bit_for_bit(shared, tmp_path):
    (path,) = (shared / "checkpoints").glob("Ti_16-*.npz")

    arrays, spec = load_weights(path)
    save_weights(tmp_path / "out.npz", to_tree(arrays), style="prelinen")

    assert (spec.name, spec.num_classes, spec.image_size) == ("ViT-Ti_16", 1000, (224, 224))
    assert_same(dict(np.load(tmp_path / "out.npz")), dict(np.load(path)))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64, ">f4"])
def test_other_floating_types_become_float32(tmp_path, dtype):
    stored = {key: array.astype(dtype) for key, array in ARRAYS.items()}
    np.savez(tmp_path / "in.npz", **stored)

    arrays, spec = load_weights(tmp_path / "in.npz")

    assert spec == SPEC
    assert_same(arrays, {key: array.astype(np.float32) for key, array in stored.items()})


def test_a_grid_that_is_not_square_is_read_with_its_size(tmp_path):
    shapes = SPEC.shapes() | {POSITIONS: (1, 16, 16)}  # 3 rows of 5, and the class token.
    np.savez(tmp_path / "in.npz", **reference.make_params(shapes, seed=1))

    _, known = load_weights(tmp_path / "in.npz", image_size=(20, 12))
    _, likely = load_weights(tmp_path / "in.npz", likely_size=(22, 13))

    assert known.grid_size == likely.grid_size == (5, 3)


def test_a_file_of_something_else_is_refused_by_name(tmp_path):
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(UserError, match=r"other.npz is no ViT checkpoint: .*holds 1 arrays: x"):
        load_weights(tmp_path / "other.npz")

    strings = {key: np.full(array.shape, "a") for key, array in ARRAYS.items()}
    np.savez(tmp_path / "strings.npz", **strings)
    with pytest.raises(UserError, match=r"not floating \(\d+\): .*encoder_norm/bias <U1"):
        load_weights(tmp_path / "strings.npz")


# Another task.


def test_without_wishes_nothing_changes():
    arrays, spec = SPEC.adapt(ARRAYS)

    assert spec == SPEC
    assert all(arrays[key] is ARRAYS[key] for key in ARRAYS)


@pytest.mark.parametrize("num_classes", [1, 5, 7])
def test_a_new_head_is_zeros_even_for_as_many_classes(num_classes):
    arrays, spec = SPEC.adapt(ARRAYS, num_classes=num_classes)

    assert (spec.num_classes, spec.representation_size) == (num_classes, None)
    zeros = np.zeros((16, num_classes), np.float32)
    np.testing.assert_array_equal(arrays["head/kernel"], zeros, strict=True)
    np.testing.assert_array_equal(arrays["head/bias"], zeros[0], strict=True)
    assert {k: v.shape for k, v in arrays.items()} == spec.shapes()
    assert ARRAYS["head/kernel"].any()


def test_pre_logits_go_with_a_new_head_and_stay_with_the_old_one_unless_said_otherwise():
    def kept(**wishes):
        arrays, spec = SPEC.adapt(ARRAYS, **wishes)
        assert {k: v.shape for k, v in arrays.items()} == spec.shapes()
        return "pre_logits/kernel" in arrays

    assert kept()
    assert kept(pre_logits=True)
    assert kept(num_classes=7, pre_logits=True)
    assert not kept(num_classes=7)
    assert not kept(num_classes=7, pre_logits=False)
    assert not kept(pre_logits=False)


def test_pre_logits_of_another_width_stay_with_the_old_head():
    arrays, spec = _with_pre_logits(width=9)

    with pytest.raises(UserError, match=r"takes 9 features and does not fit .* leaves 16"):
        spec.adapt(arrays, pre_logits=False)
    new, _ = spec.adapt(arrays, num_classes=3, pre_logits=True)
    assert new["head/kernel"].shape == (9, 3)
    new, _ = spec.adapt(arrays, num_classes=3)
    assert new["head/kernel"].shape == (16, 3)


def _with_pre_logits(width: int):
    spec = SPEC.replace(representation_size=width)
    return reference.make_params(spec.shapes(), seed=1), spec


def test_pre_logits_that_are_not_there_can_not_be_kept():
    arrays, spec = SPEC.adapt(ARRAYS, num_classes=3)

    with pytest.raises(UserError, match="the weights have no pre_logits layer: leave it out"):
        spec.adapt(arrays, pre_logits=True)


def test_no_classes_leave_the_head_out_and_fewer_are_refused():
    arrays, spec = SPEC.adapt(ARRAYS, num_classes=0)
    assert spec == SPEC.replace(num_classes=None)
    assert arrays.keys() == spec.shapes().keys()
    with pytest.raises(UserError, match="num_classes is -1, expected at least 0"):
        SPEC.adapt(ARRAYS, num_classes=-1)


def test_another_size_resamples_the_positions_and_nothing_else():
    arrays, spec = SPEC.adapt(ARRAYS, image_size=(24, 8))

    assert (spec.image_size, spec.grid_size) == ((24, 8), (6, 2))
    expected = resample(ARRAYS[POSITIONS], (4, 4), (6, 2), prefix=1)
    np.testing.assert_array_equal(arrays[POSITIONS], expected)
    assert all(arrays[key] is ARRAYS[key] for key in ARRAYS if key != POSITIONS)
    with pytest.raises(UserError, match="3x8 pixels is smaller than one patch"):
        SPEC.adapt(ARRAYS, image_size=(3, 8))


@pytest.mark.parametrize("case", list(reference.facts("interp")))
def test_the_original_codes_numbers_come_out_at_another_resolution(case, tmp_path):
    """Published file -> other resolution and head -> logits, on seeded weights and images."""
    facts = reference.facts("interp")[case]
    expected = np.load(reference.OFFICIAL / f"interp_{case}.npz")
    shapes = reference.official_shapes(facts["config"], facts["head"], facts["res"])
    source = reference.make_params(shapes, facts["seed"])
    assert reference.digest(source) == facts["src_sha256"]
    np.savez(tmp_path / "in.npz", **to_style(source, facts["style"]))

    size = (facts["dst_res"],) * 2
    arrays, spec = load_weights(tmp_path / "in.npz")
    arrays, spec = spec.adapt(arrays, num_classes=facts["dst_classes"], image_size=size)

    changed = [k for k in source if k not in arrays or not np.array_equal(arrays[k], source[k])]
    assert changed == sorted(facts["changed_keys"])
    head = {key: spec.shapes()[key] for key in ("head/kernel", "head/bias")}
    params = to_tree(arrays | reference.make_params(head, facts["init_seed"]))
    images = reference.make_images(facts["image_seed"], 2, facts["dst_res"])
    with jax.default_matmul_precision("highest"):
        logits = jax.jit(spec.model().apply)({"params": params}, images)
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-5)
