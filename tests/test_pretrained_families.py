"""Files of every family are loaded, used and adapted to another task."""

import dataclasses
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import reference, swin_reference, t2t
from tests.families import LABELS, LITS, OTHERS, SPECS, WORDS, make
from vit_jax import checkpoints
from vit_jax.data import parse
from vit_jax.errors import UserError
from vit_jax.models.positions import resample
from vit_jax.pretrained import PretrainedLiT, load


def images(n: int, size: int = 16) -> np.ndarray:
    return np.random.default_rng(n).uniform(-1, 1, (n, size, size, 3)).astype(np.float32)


def papers_logits(spec, arrays, x: np.ndarray) -> np.ndarray:
    """In float64 and NumPy."""
    if spec.kind == "Mixer":
        return reference.mixer_forward(arrays, x)
    if spec.kind == "T2T-ViT":
        return t2t.forward(t2t.named_officially(arrays, spec.num_layers), x, spec.num_heads)
    if spec.kind == "Swin Transformer":
        windows = dict(window=spec.window, pretrained=spec.pretrained_windows)
        return swin_reference.forward(arrays, x, **windows)
    return reference.forward(arrays, x, classifier=spec.classifier)


@pytest.fixture(scope="module")
def lit(tmp_path_factory) -> PretrainedLiT:
    return make("LiT", tmp_path_factory.mktemp("lit"))


# Save and load.


@pytest.mark.parametrize("family", SPECS)
def test_what_was_saved_in_any_file_and_style_is_what_is_loaded(family, tmp_path):
    vit = make(family, tmp_path / "words")
    kinds = [(style, ".npz") for style in checkpoints.STYLES]
    kinds += [("prelinen", ending) for ending in checkpoints.ENDINGS if ending != ".npz"]
    for style, ending in kinds:
        path = tmp_path / f"{style}{ending}"
        vit.save(path, style=style)

        found = load(path)

        assert type(found) is type(vit)
        assert (found.spec, found.model) == (vit.spec, vit.model)
        assert (found.labels, found.preprocess) == (vit.labels, vit.preprocess)
        np.testing.assert_equal(found.params, vit.params)
        if isinstance(found, PretrainedLiT):
            assert found.vocabulary == path.with_suffix(".txt")
            assert found.vocabulary.read_bytes() == vit.vocabulary.read_bytes()


def test_what_neither_arrays_nor_notes_can_tell_is_said_on_saving(tmp_path, caplog):
    vit = make("LiT", tmp_path / "words")
    vit.save(tmp_path / "usual.npz")
    assert not caplog.records

    image = {**vit.spec.image, "activation": "gelu_erf"}
    spec = vit.spec.replace(image=image)
    dataclasses.replace(vit, spec=spec, model=spec.model()).save(tmp_path / "other.npz")

    assert "other.npz: neither its arrays nor its notes can tell image.activation gelu_erf: " in (
        caplog.text
    )


@pytest.mark.parametrize("family", ["hybrid", "root", "MAP", "Mixer", "LiT", "LiT of BERT"])
def test_without_notes_the_arrays_tell_nearly_everything(family, saved):
    path = saved(family)
    path.with_suffix(".json").unlink()

    found = load(path)

    assert found.spec == SPECS[family]
    assert found.labels is None
    size = found.image_size[0]
    rounding = "uint8|" if family in LITS else ""
    assert found.preprocess == f"resize({size})|{rounding}value_range(-1, 1)"


@st.composite
def networks(draw) -> tuple[str, dict]:
    """(family, changes of its spec): another head, size and representation layer."""
    family = draw(st.sampled_from(OTHERS))
    spec = SPECS[family]
    changes = {"num_classes": draw(st.none() | st.integers(1, 9))}
    stride = spec.model().stride
    grid = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    changes["image_size"] = tuple(a * b for a, b in zip(stride, grid, strict=True))
    if "representation_size" in {field.name for field in dataclasses.fields(spec.module)}:
        changes["representation_size"] = draw(st.none() | st.integers(1, 9))
    return family, changes


@pytest.mark.slow
@pytest.mark.ci
@settings(max_examples=8, deadline=None)
@given(network=networks(), style=st.sampled_from(checkpoints.STYLES), data=st.data())
def test_any_network_comes_back_and_gives_the_papers_logits(network, style, data):
    family, changes = network
    ending = data.draw(st.sampled_from([".npz", ".safetensors"]))
    with tempfile.TemporaryDirectory() as folder:
        vit = make(family, Path(folder), **changes)
        path = Path(folder) / f"w{ending}"
        vit.save(path, style=style)
        found = load(path)
    assert found.spec == vit.spec
    x = np.random.default_rng(0).uniform(-1, 1, (2, *found.image_size, 3)).astype(np.float32)
    arrays = reference.make_params(found.spec.shapes(), seed=2)

    np.testing.assert_allclose(found(x), papers_logits(found.spec, arrays, x), atol=1e-4)


def test_fixed_positions_without_notes_are_taken_for_the_usual_size_with_a_warning(saved, caplog):
    path = saved("sincos2d")
    path.with_suffix(".json").unlink()

    assert load(path).image_size == (224, 224)
    assert "w.npz: it has no position embeddings; taken as fixed sines and cosines" in caplog.text
    assert load(path, image_size=16).spec == SPECS["sincos2d"]


def test_saving_onto_its_own_place_keeps_the_vocabulary(tmp_path):
    vit = make("LiT", tmp_path)

    vit.save(tmp_path / "words.npz")

    assert load(tmp_path / "words.npz").vocabulary == vit.vocabulary
    assert vit.vocabulary.read_text().split() == WORDS


# Use.


@pytest.mark.parametrize("family", OTHERS)
def test_logits_are_the_papers_and_each_image_stands_alone(family, tmp_path):
    vit = make(family, tmp_path)
    x = images(33, vit.image_size[0])

    logits = vit(x)

    arrays = reference.make_params(vit.spec.shapes(), seed=2)
    assert logits.shape == (33, 5)
    np.testing.assert_allclose(logits[30:], papers_logits(vit.spec, arrays, x[30:]), atol=1e-4)
    np.testing.assert_allclose(vit(x[31:32])[0], logits[31], atol=1e-5)


@pytest.mark.parametrize("family", ["hybrid", "MAP", "Mixer"])
def test_a_image_is_named(family, tmp_path):
    vit = make(family, tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)

    ((best, *_),) = vit.predict([image])

    size = vit.image_size[0]
    small = cv2.resize(image.astype(np.float32), (size, size), interpolation=cv2.INTER_LINEAR)
    assert best[0] == LABELS[int(np.argmax(vit(small[None] / 127.5 - 1)))]


@pytest.mark.parametrize("family", LITS)
def test_embeddings_have_length_one_and_each_stands_alone(family, tmp_path):
    vit = make(family, tmp_path)
    texts = [" ".join(WORDS[3 + i % 9 : 3 + i % 9 + i % 5]) for i in range(37)]
    x = images(37)

    zimg, ztxt = vit.embed_images(x), vit.embed_texts(texts)

    assert zimg.shape == ztxt.shape == (37, 64)
    assert zimg.dtype == ztxt.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(zimg, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(ztxt, axis=1), 1, atol=1e-6)
    for i in (0, 31, 32, 36):
        np.testing.assert_allclose(vit.embed_images(x[i : i + 1])[0], zimg[i], atol=1e-6)
        np.testing.assert_allclose(vit.embed_texts(texts[i : i + 1])[0], ztxt[i], atol=1e-6)
    assert len({text.tobytes() for text in ztxt.round(4)}) == len(set(texts))


def test_nothing_has_no_embeddings(lit):
    assert lit.embed_images(images(0)).shape == (0, 64)
    assert lit.embed_texts([]).shape == (0, 64)


def test_long_texts_are_cut_and_unknown_words_are_read_as_such(lit):
    long = "a photo of " * 9
    same = lit.embed_texts([long, long + "cat", "zebra", "[UNK]zebra", "Cats", "CATS"])

    np.testing.assert_array_equal(same[0], same[1])
    np.testing.assert_array_equal(same[4], same[5])
    assert not np.allclose(same[2], same[4])


def test_one_tower_of_a_bundle_is_a_vit_that_can_be_fine_tuned(saved):
    path = saved("LiT")

    tower = load(f"{path}:img", num_classes=3)

    assert tower.spec == SPECS["LiT"].image_tower().replace(num_classes=3)
    np.testing.assert_array_equal(tower(images(2)), np.zeros((2, 3), np.float32))


# Another task.


def test_a_hybrid_is_resampled_at_its_stride(saved):
    path = saved("hybrid")
    before = load(path).params["Transformer"]["posembed_input"]["pos_embedding"]

    found = load(path, image_size=(96, 129), num_classes=2)

    after = found.params["Transformer"]["posembed_input"]["pos_embedding"]
    assert (found.spec.grid_size, found.spec.num_tokens) == ((12, 17), 205)
    expected = resample(before, (8, 8), (12, 17), prefix=1)
    np.testing.assert_array_equal(after, expected)
    assert found(np.zeros((1, 96, 129, 3), np.float32)).shape == (1, 2)


def test_fixed_positions_follow_the_size(saved):
    found = load(saved("sincos2d"), image_size=(24, 40))

    x = np.random.default_rng(0).uniform(-1, 1, (2, 24, 40, 3)).astype(np.float32)
    arrays = reference.make_params(SPECS["sincos2d"].shapes(), seed=2)
    np.testing.assert_allclose(found(x), reference.forward(arrays, x, classifier="gap"), atol=1e-4)


def test_a_mixer_keeps_its_size_and_takes_a_new_head(saved):
    path = saved("Mixer")

    assert load(path, num_classes=3, image_size=16)(images(1)).shape == (1, 3)
    assert load(path, image_size=15).spec.grid_size == (4, 4)  # The border is padded.
    with pytest.raises(UserError, match=r"has 16 tokens, for images of 16x16.* can't take 24x24"):
        load(path, image_size=24)
    with pytest.raises(UserError, match="the weights have no pre_logits layer"):
        load(path, num_classes=3, pre_logits=True)
    with pytest.raises(UserError, match="has no dropout_rate: leave it out"):
        load(path, dropout_rate=0.1)


def test_a_lit_bundle_is_resampled_and_has_no_head_to_change(saved):
    path = saved("LiT")

    found = load(path, image_size=24)

    assert found.spec.grid_size == (6, 6)
    assert found.preprocess == "resize(24)|uint8|value_range(-1, 1)"
    assert found.embed_images(images(2, 24)).shape == (2, 64)
    for wish in ({"num_classes": 3}, {"pre_logits": True}):
        with pytest.raises(UserError, match="a LiT bundle, which has no classes: leave num_class"):
            load(path, **wish)


# Refusals.


def test_a_lit_bundle_has_no_classes_of_its_own(lit):
    with pytest.raises(UserError, match="LiT bundle without classes: call embed_images"):
        lit(images(1))
    with pytest.raises(UserError, match="LiT bundle, which classifies by words: give labels"):
        lit.predict([np.zeros((8, 8, 3), np.uint8)])
    with pytest.raises(UserError, match=r"write embed_texts\(\[text\]\)"):
        lit.embed_texts("a cat")
    with pytest.raises(UserError, match=r"expected \(n, 16, 16, 3\)"):
        lit.embed_images(images(1, 20))


def test_a_vocabulary_of_other_weights_is_refused(saved):
    path = saved("LiT")
    path.with_suffix(".txt").write_text("\n".join([*WORDS, "zebra"]))

    assert np.isfinite(load(path).embed_texts(["a cat"])).all()
    with pytest.raises(UserError, match=r"w\.txt has a piece number 14, but .* know 14 pieces"):
        load(path).embed_texts(["a zebra"])


@pytest.mark.parametrize(("family", "ending"), [("LiT", ".model"), ("LiT of BERT", ".txt")])
def test_the_vocabulary_is_of_the_kind_that_the_text_tower_needs(family, ending, saved):
    path = saved(family)
    path.with_suffix(".model").write_bytes(b"")

    assert load(path).vocabulary == path.with_suffix(ending)


def test_saving_leaves_a_file_alone_that_has_the_name_of_the_vocabulary(tmp_path):
    vit = make("LiT", tmp_path)
    (tmp_path / "w.txt").write_text("my notes")

    with pytest.raises(UserError, match=r"w\.txt is there already"):
        vit.save(tmp_path / "w.npz")

    assert (tmp_path / "w.txt").read_text() == "my notes"
    assert not (tmp_path / "w.npz").exists()
    (tmp_path / "w.txt").write_bytes(vit.vocabulary.read_bytes())
    vit.save(tmp_path / "w.npz")
    assert load(tmp_path / "w.npz").vocabulary == tmp_path / "w.txt"


def test_a_missing_vocabulary_is_asked_for_when_it_is_needed(saved):
    path = saved("LiT")
    path.with_suffix(".txt").unlink()

    found = load(path)

    assert found.vocabulary is None
    assert found.embed_images(images(1)).shape == (1, 64)
    with pytest.raises(UserError, match=r"no vocabulary beside the weights: put NAME\.txt"):
        found.embed_texts(["a cat"])
    found.save(path.with_name("copy.npz"))
    assert not path.with_name("copy.txt").exists()


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(
            name,
            marks=[] if name in ("Swin", "Mixer", "LiT") else [pytest.mark.slow, pytest.mark.ci],
        )
        for name in SPECS
    ],
)
def test_every_family_has_pooled_features_and_those_of_its_patches(family, tmp_path):
    vit = make(family, tmp_path)
    h, w = vit.image_size
    pictures = list(np.random.default_rng(0).integers(0, 256, (3, h, w, 3), np.uint8))
    pooled = vit.features(pictures)
    assert (pooled.shape[0], pooled.ndim) == (3, 2)
    if family in OTHERS and vit.spec.num_classes:
        head = vit.params["head"]
        x = np.stack([parse(vit.preprocess)(image) for image in pictures])
        close = dict(rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(pooled @ head["kernel"] + head["bias"], vit(x), **close)
    patches = vit.features(pictures, "patches")
    assert patches.ndim == 3
    assert np.isfinite(patches).all()


@pytest.mark.parametrize("family", ["Swin", "Swin v2"])
def test_windows_that_nothing_tells_are_those_that_are_given(family, tmp_path, caplog):
    spec = SPECS[family].replace(window=5, image_size=(24, 24))
    vit = make(family, tmp_path, window=5, image_size=(24, 24))
    vit.save(tmp_path / "w.npz")
    (tmp_path / "w.json").unlink()
    caplog.clear()
    found = load(tmp_path / "w.npz", window=5, image_size=24)
    assert found.spec == spec
    assert not any("window" in record.getMessage() for record in caplog.records)
    x = images(2, 24)
    np.testing.assert_array_equal(found(x), vit(x))
