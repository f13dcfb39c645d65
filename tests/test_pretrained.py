"""`vit_jax.load`: weights with all that is needed to use them, and the refusals on the way."""

import copy
import dataclasses
import io
import json
import pickle

import cv2
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import tifffile

from tests import reference
from tests.families import vit_spec
from vit_jax import checkpoints, data
from vit_jax.errors import UserError
from vit_jax.models.positions import resample
from vit_jax.pretrained import Pretrained, find_weights, load

SPEC = vit_spec()
LABELS = ("ape", "bär", "cat", "狗", "eel")


def make(**changes) -> Pretrained:
    fields = {"labels": LABELS, "preprocess": "resize(16)|value_range(-1, 1)", "loss": "softmax"}
    fields |= {key: changes.pop(key) for key in list(changes) if key in fields}
    spec = SPEC.replace(**changes)
    params = checkpoints.to_tree(reference.make_params(spec.shapes(), seed=2))
    return Pretrained(model=spec.model(), params=params, spec=spec, **fields)


@pytest.fixture(scope="module")
def vit() -> Pretrained:
    return make()


@pytest.fixture
def saved(vit, tmp_path):
    vit.save(tmp_path / "weights.npz")
    return tmp_path / "weights.npz"


def test_weights_that_cannot_be_written_leave_the_notes_of_those_before(saved, vit, monkeypatch):
    before = {file: file.read_bytes() for file in saved.parent.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", full)
    with pytest.raises(UserError, match=r"weights\.npz can't be written \(No space left on device"):
        dataclasses.replace(vit, labels=None).save(saved)
    assert {file: file.read_bytes() for file in saved.parent.iterdir()} == before


def images(n: int, *, size=(16, 16), channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng(n)
    return rng.uniform(-1, 1, (n, *size, channels)).astype(np.float32)


def assert_same_params(found, expected) -> None:
    np.testing.assert_equal(found, expected)


# Load and save.


def test_what_was_saved_is_what_is_loaded(vit, saved):
    for source in (saved, str(saved), saved.parent):
        found = load(source)
        assert (found.spec, found.labels, found.preprocess) == (vit.spec, LABELS, vit.preprocess)
        assert found.model == vit.model
        assert_same_params(found.params, vit.params)
        np.testing.assert_array_equal(found(images(2)), vit(images(2)))


def test_a_saved_file_is_an_official_one(vit, tmp_path):
    vit.save(tmp_path / "old.npz", style="prelinen")

    keys = set(np.load(tmp_path / "old.npz").files)
    assert keys == set(checkpoints.to_style(SPEC.shapes(), "prelinen"))


@pytest.mark.parametrize(
    "changes",
    [
        {"classifier": "gap", "image_size": (8, 20), "preprocess": "value_range(0, 1)"},
        {"image_size": (18, 19), "preprocess": "resize((18, 19))|value_range(-1, 1)"},
        {"image_size": (8, 32), "preprocess": "resize((8, 32))|value_range(-1, 1)"},
        {"classifier": "unpooled", "labels": None},
        {"num_classes": None, "labels": None, "channels": 1},
    ],
)
def test_the_notes_tell_what_the_arrays_can_not(tmp_path, changes):
    vit = make(**changes)

    vit.save(tmp_path / "w.npz")
    found = load(tmp_path / "w.npz")

    assert (found.spec, found.labels, found.preprocess) == (vit.spec, vit.labels, vit.preprocess)
    x = images(1, size=vit.image_size, channels=vit.spec.channels)
    np.testing.assert_array_equal(found(x), vit(x))


def test_without_notes_the_original_preprocessing_is_assumed(saved):
    saved.with_suffix(".json").unlink()

    found = load(saved)

    assert found.labels is None
    assert found.preprocess == "resize(16)|value_range(-1, 1)"
    assert load(saved, image_size=(12, 24)).preprocess == "resize((12, 24))|value_range(-1, 1)"


def test_a_likely_size_tells_a_stored_grid_that_is_not_square(tmp_path):
    ready = "resize((20, 12))|value_range(-1, 1)"
    make(image_size=(20, 12), preprocess=ready).save(tmp_path / "w.npz")
    (tmp_path / "w.json").unlink()

    found = load(tmp_path / "w.npz", image_size=(20, 12))

    assert found.spec.grid_size == (5, 3)
    assert_same_params(found.params, make(image_size=(20, 12)).params)


def test_a_size_with_as_many_patches_as_the_stored_square_grid_is_resampled(saved):
    saved.with_suffix(".json").unlink()

    found = load(saved, image_size=(8, 32))

    assert found.spec.grid_size == (2, 8)
    position = found.params["Transformer"]["posembed_input"]["pos_embedding"]
    stored = make().params["Transformer"]["posembed_input"]["pos_embedding"]
    expected = resample(stored, (4, 4), (2, 8), prefix=1)
    np.testing.assert_array_equal(position, expected)


def test_a_new_head_has_neither_weights_nor_labels(saved):
    found = load(saved, num_classes=5)

    assert found.labels is None
    np.testing.assert_array_equal(found(images(3)), np.zeros((3, 5), np.float32))


def test_sizes_may_be_numbers_of_numpy(saved):
    found = load(saved, num_classes=np.int64(3), image_size=np.array([24, 20]))
    assert (found.spec.num_classes, found.image_size) == (3, (24, 20))
    assert type(found.spec.num_classes) is type(found.image_size[0]) is int
    assert load(saved, image_size=np.int32(24)).image_size == (24, 24)


def test_another_size_keeps_labels_and_the_range_of_values(tmp_path):
    make(preprocess="central_crop(16)|value_range(0, 2)").save(tmp_path / "w.npz")

    found = load(tmp_path / "w.npz", image_size=24)

    assert found.image_size == (24, 24)
    assert found.labels == LABELS
    assert found.preprocess == "resize(24)|value_range(0, 2)"
    assert found(images(2, size=(24, 24))).shape == (2, 5)


def test_fields_without_weights_may_be_chosen(saved):
    found = load(saved, dtype=jnp.bfloat16, dropout_rate=0.2)

    assert (found.model.dtype, found.model.dropout_rate) == (jnp.bfloat16, 0.2)
    assert found(images(1)).dtype == np.float32


def test_pre_logits_are_kept_or_dropped_as_said(tmp_path):
    make(representation_size=16).save(tmp_path / "w.npz")

    assert load(tmp_path / "w.npz").spec.representation_size == 16
    assert load(tmp_path / "w.npz", num_classes=3).spec.representation_size is None
    kept = load(tmp_path / "w.npz", num_classes=3, pre_logits=True)
    assert kept.spec.representation_size == 16


@pytest.mark.parametrize("classifier", ["first", "unpooled"])
def test_a_pooling_that_no_array_tells_is_said_by_the_caller(tmp_path, caplog, classifier):
    vit = make(classifier=classifier)
    vit.save(tmp_path / "w.npz")
    (tmp_path / "w.json").unlink()

    found = load(tmp_path / "w.npz", classifier=classifier)
    assert not caplog.records
    np.testing.assert_array_equal(found(images(2)), vit(images(2)))

    assert load(tmp_path / "w.npz").spec.classifier == "gap"
    assert "w.npz: no array tells how its tokens are pooled; taken as their mean (gap)" in (
        caplog.text
    )


def test_the_caller_s_word_goes_before_the_notes(saved):
    assert load(saved, classifier="token_unpooled").spec.classifier == "token_unpooled"
    found = load(saved, activation="gelu_erf", layer_norm_epsilon=1e-5)
    assert (found.spec.activation, found.spec.layer_norm_epsilon) == ("gelu_erf", 1e-5)
    assert found.model.activation == "gelu_erf"
    for wishes, message in [
        ({"classifier": "0"}, "its classifier is said to be '0', but a ViT has token or gap or"),
        ({"classifier": "map"}, "its 17 positions do not fit images of 16x16 pixels"),
        ({"activation": "relu"}, "unknown activation 'relu'"),
        ({"layer_norm_epsilon": "1"}, "layer_norm_epsilon is '1', expected another kind"),
    ]:
        with pytest.raises(UserError, match=message):
            load(saved, **wishes)


def test_a_network_unlike_the_original_s_is_said_to_be_guessed(tmp_path, caplog):
    make(qkv_bias=False, num_registers=2, activation="gelu_erf").save(tmp_path / "w.npz")
    assert load(tmp_path / "w.npz").spec.activation == "gelu_erf"
    assert not caplog.records

    (tmp_path / "w.json").unlink()

    assert load(tmp_path / "w.npz").spec.activation == "gelu_tanh"
    assert "w.npz: it has attention without biases and registers, so it is no" in caplog.text
    caplog.clear()
    assert load(tmp_path / "w.npz", activation="gelu_erf").spec.activation == "gelu_erf"
    assert not caplog.records


def test_names_of_classes_that_are_guessed_are_said(tmp_path, caplog, monkeypatch):
    make(num_classes=1000, labels=None).save(tmp_path / "w.npz")
    assert load(tmp_path / "w.npz").labels is None
    (tmp_path / "w.json").unlink()

    assert load(tmp_path / "w.npz").labels[0] == "tench, Tinca tinca"
    assert "w.npz: nothing names its 1000 classes; taken as those of ImageNet" in caplog.text

    caplog.clear()
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path))  # Where what is published lies.
    assert load(tmp_path / "w.npz").labels
    assert not caplog.records


def test_weights_that_are_no_numbers_are_loaded_only_to_look_at_them(vit, tmp_path):
    bias = np.array([1, np.nan, 0, 0, np.inf], np.float32)
    broken = {**vit.params, "head": {**vit.params["head"], "bias": bias}}
    dataclasses.replace(vit, params=broken).save(tmp_path / "w.npz")

    with pytest.raises(UserError, match=r"w\.npz holds .* NaN or infinite \(1\): head/bias 2 of 5"):
        load(tmp_path / "w.npz")
    found = load(tmp_path / "w.npz", allow_nonfinite=True)
    np.testing.assert_array_equal(found.params["head"]["bias"], bias)


def test_without_a_recorded_range_another_size_gets_none(tmp_path):
    make(preprocess="resize(16)").save(tmp_path / "w.npz")

    assert load(tmp_path / "w.npz", image_size=24).preprocess == "resize(24)"


# Use.


@pytest.mark.parametrize("n", [1, 33, 65])
def test_any_number_of_images_gives_what_each_gives_alone(vit, n):
    together = vit(images(n))
    alone = np.concatenate([vit(image[None]) for image in images(n)])

    assert together.shape == (n, 5)
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_logits_are_the_papers(vit):
    arrays = reference.make_params(SPEC.shapes(), seed=2)

    expected = reference.forward(arrays, images(3), classifier="token")

    np.testing.assert_allclose(vit(images(3)), expected, atol=1e-4)


def test_no_images_give_no_answers(vit):
    assert vit(images(0)).shape == (0, 5)
    assert vit.predict([]) == []


def test_images_are_named_from_files_and_arrays(vit, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    assert cv2.imwrite(str(tmp_path / "drawn.png"), image[:, :, ::-1])

    from_file, from_array = vit.predict([tmp_path / "drawn.png", image])

    small = cv2.resize(image.astype(np.float32), (16, 16), interpolation=cv2.INTER_LINEAR)
    logits = vit(small[None] / 127.5 - 1)[0].astype(np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum()
    best = np.argsort(-probabilities)
    assert from_file == from_array
    assert [label for label, _ in from_file] == [LABELS[i] for i in best]
    np.testing.assert_allclose([p for _, p in from_file], probabilities[best], atol=1e-5)


def test_many_images_are_answered_in_order(vit):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (9, 9 + i, 3), np.uint8) for i in range(40)]

    answers = vit.predict(images, top=2)

    assert [len(answer) for answer in answers] == [2] * 40
    for image, answer in list(zip(images, answers, strict=True))[::13]:
        ((label, probability), _) = vit.predict([image], top=2)[0]
        assert answer[0] == (label, pytest.approx(probability, abs=1e-5))


def test_classes_without_names_are_called_by_their_index():
    vit = make(labels=None)

    (answer,) = vit.predict([np.zeros((8, 8, 3), np.uint8)], top=99)

    assert sorted(label for label, _ in answer) == list("01234")
    assert sum(probability for _, probability in answer) == pytest.approx(1)


def test_the_loss_that_a_head_was_trained_with_makes_its_logits_probabilities(tmp_path):
    make(loss="sigmoid").save(tmp_path / "w.npz")
    vit = load(tmp_path / "w.npz")
    assert vit.loss == "sigmoid"
    pictures = [np.full((16, 16, 3), value, np.uint8) for value in (0, 90, 255)]
    batch = np.stack(pictures).astype(np.float32) / 127.5 - 1
    expected = 1 / (1 + np.exp(-vit(batch).astype(np.float64)))
    for answer, row in zip(vit.predict(pictures), expected, strict=True):
        assert answer == sorted(answer, key=lambda pair: -pair[1])
        for label, probability in answer:
            assert probability == pytest.approx(row[LABELS.index(label)], rel=1e-5)
    assert load(tmp_path / "w.npz", num_classes=5).loss == "softmax"  # A head without training.
    notes = tmp_path / "w.json"
    old = json.loads(notes.read_text(encoding="utf-8"))
    del old["loss"]  # As before there was such a note.
    notes.write_text(json.dumps(old))
    assert load(tmp_path / "w.npz").loss == "softmax"


def test_labels_that_are_no_text_lose_no_weights(tmp_path):
    labels = ("cat\udcff", "\ud800", "\x1b[2J", "狗", "eel\n")
    make(labels=labels).save(tmp_path / "w.npz")
    found = load(tmp_path / "w.npz").labels
    assert found == (r"cat\udcff", r"\ud800", "\x1b[2J", "狗", "eel\n")


def test_one_channel_images_are_read_in_one_channel(tmp_path):
    vit = make(channels=1)
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 1), np.uint8)
    assert cv2.imwrite(str(tmp_path / "gray.png"), image)

    assert vit.predict([tmp_path / "gray.png"]) == vit.predict([image])


# Refusals.


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((2, 16, 12, 3), np.float32), r"shape \(2, 16, 12, 3\), expected \(n, 16, 16, 3"),
        (np.zeros((16, 16, 3), np.float32), r"shape \(16, 16, 3\), expected \(n, 16, 16, 3\)"),
        (np.zeros((2, 16, 16, 3), np.uint8), "images are uint8, expected preprocessed float32"),
    ],
)
def test_images_that_are_not_ready_are_refused(vit, x, message):
    with pytest.raises(UserError, match=message):
        vit(x)


@pytest.mark.parametrize(
    ("images", "wishes", "message"),
    [
        ("one.jpg", {}, r"one image was given, expected a list of images: write \[image\]"),
        (np.zeros((8, 8, 3), np.uint8), {}, "one image was given"),
        (b"content", {}, "one image was given"),
        (7, {}, "one image was given"),
        ([np.zeros((8, 8, 3))], {}, r"image is of type float64, .* put levels\(lo, hi\) first"),
        ([np.zeros((8, 8, 3), bool)], {}, r"shape \(8, 8, 3\) and type bool, expected a path, the"),
        ([np.zeros((8, 8, 2), np.uint8)], {}, r"or an array \(h, w, 3\) of uint8"),
        ([None], {}, r"shape \(\) and type object, expected a path"),
        ([b"no image"], {}, "image: "),
        (["absent.jpg"], {}, "absent.jpg: can't be read"),
        ([], {"top": 0}, "top is 0, expected at least 1"),
    ],
)
def test_what_is_no_list_of_images_is_refused(vit, images, wishes, message):
    with pytest.raises(UserError, match=message):
        vit.predict(images, **wishes)


def test_an_image_may_be_given_in_any_usual_form(vit, tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 24, 4), np.uint8)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # To be turned.
    PIL.Image.fromarray(pixels[..., :3]).save(tmp_path / "a.png", exif=exif)
    content = (tmp_path / "a.png").read_bytes()
    expected = vit.read(tmp_path / "a.png")
    turned = np.rot90(pixels, -1)
    forms = [str(tmp_path / "a.png"), content, bytearray(content), io.BytesIO(content)]
    forms += [PIL.Image.open(tmp_path / "a.png"), turned, jnp.asarray(turned[..., :3])]
    forms += [PIL.Image.fromarray(turned)]
    for form in forms:
        np.testing.assert_array_equal(vit.read(form), expected)
    grey = pixels[..., 0]
    for form in (grey, grey[..., None], PIL.Image.fromarray(grey)):
        np.testing.assert_array_equal(vit.read(form), np.repeat(grey[..., None], 3, axis=2))
    deep = grey.astype(np.uint16) * 257
    np.testing.assert_array_equal(vit.read(PIL.Image.fromarray(deep))[..., 0], deep)
    one = make(channels=1).read(PIL.Image.fromarray(grey).convert("RGB"))
    np.testing.assert_array_equal(one, grey[..., None])
    forms[3].seek(0)
    answers = vit.predict((form for form in forms), top=1)  # Any iterable.
    assert len(answers) == len(forms)
    assert all(answer[0][0] == answers[0][0][0] for answer in answers)


def test_features_are_what_the_head_reads_tokens_and_those_of_any_block(vit, saved):
    given = list(np.random.default_rng(0).integers(0, 256, (35, 16, 16, 3), np.uint8))
    x = np.stack([data.parse(vit.preprocess)(image) for image in given])
    _, all_features = vit.model.apply({"params": vit.params}, x, return_features=True)
    tokens, block = all_features["encoder_norm"], all_features["encoderblock_0"]
    expected = {
        ("pooled", None): all_features["pre_logits"],
        ("class", None): tokens[:, 0],
        ("patches", None): tokens[:, 1:],
        ("tokens", None): tokens,
        ("patches", "encoderblock_0"): block[:, 1:],
    }
    for (what, layer), values in expected.items():
        found = vit.features(given, what, layer=layer)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, values, rtol=1e-5, atol=1e-5)
    headless = load(saved, num_classes=0)
    assert (headless.spec.num_classes, "head" in headless.params) == (None, False)
    np.testing.assert_allclose(headless(x), all_features["pre_logits"], rtol=1e-5, atol=1e-5)
    headless.save(saved.with_name("headless.npz"))
    assert load(saved.with_name("headless.npz")).spec == headless.spec


def test_weights_are_pickled_and_copied(vit):
    vit(images(1))
    for other in (pickle.loads(pickle.dumps(vit)), copy.deepcopy(vit)):
        np.testing.assert_array_equal(other(images(3)), vit(images(3)))
        assert (other.spec, other.labels, other.preprocess) == (vit.spec, LABELS, vit.preprocess)


def test_weights_that_give_no_classes_are_refused_for_prediction():
    for changes in ({"num_classes": None}, {"classifier": "unpooled"}):
        with pytest.raises(UserError, match="these weights give no classes"):
            make(**changes).predict([np.zeros((8, 8, 3), np.uint8)])


def test_a_file_of_other_channels_than_the_weights_is_refused(tmp_path):
    assert cv2.imwrite(str(tmp_path / "a.png"), np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(UserError, match=r"a\.png: 3 channels, expected 4"):
        make(channels=4).predict([tmp_path / "a.png"])


def test_a_file_of_twelve_channels_is_predicted_as_its_array(tmp_path):
    vit = dataclasses.replace(
        make(channels=12), preprocess="levels(0, 4095)|resize(16)|value_range(-1, 1)"
    )
    image = np.random.default_rng(0).integers(0, 4096, (20, 24, 12), np.uint16)
    np.save(tmp_path / "a.npy", image)
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="minisblack", planarconfig="contig")
    expected = vit(data.parse(vit.preprocess)(image)[None])[0]
    for given in (image, tmp_path / "a.npy", tmp_path / "a.tif"):
        (answer,) = vit.predict([given], top=1)
        assert answer[0][0] == vit.labels[expected.argmax()]


@pytest.mark.parametrize("channels", [1, 3, 5, 12])
def test_load_makes_the_first_layer_that_of_other_channels_and_notes_it(tmp_path, channels):
    make().save(tmp_path / "a.npz")
    vit = load(tmp_path / "a.npz", channels=channels)
    assert vit(images(2, channels=channels)).shape == (2, 5)
    how = {1: "added up", 3: None}.get(channels, f"repeated and scaled by 3/{channels}")
    assert [how in note for note in vit.notes] == [True] * (channels != 3)
    if channels == 1:
        grey = images(2, channels=1)
        np.testing.assert_allclose(vit(grey), make()(np.repeat(grey, 3, axis=3)), atol=1e-5)


def test_channels_that_are_no_number_or_for_weights_of_neither_grey_nor_colour_are_refused(
    tmp_path,
):
    make(channels=5).save(tmp_path / "a.npz")
    with pytest.raises(UserError, match="channels is 0, expected"):
        load(tmp_path / "a.npz", channels=0)
    with pytest.raises(UserError, match="take images of 5 channels and can't be made ready for 3"):
        load(tmp_path / "a.npz", channels=3)


def test_sources_that_are_no_weights_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no such file: .*absent.npz"):
        load(tmp_path / "absent.npz")
    with pytest.raises(UserError, match=r"no workdir .*: it holds no weights.npz"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has not finished: start it again"):
        find_weights(tmp_path)
    with pytest.raises(UserError, match=r"config.json holds no weights: expected an .npz, "):
        load(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        (
            {"patch_size": 3},
            "load takes no 'patch_size': of the model only .*dropout_rate.*activation",
        ),
        ({"image_size": (16,)}, r"image_size is \(16,\), expected pixels or \(height, width\)"),
        ({"image_size": 0}, "image_size is 0, expected"),
        ({"image_size": 3}, "3x3 pixels is smaller than one patch of 4x4"),
        ({"image_size": "16"}, "image_size is '16', expected pixels or"),
        ({"image_size": (16, 16.0)}, r"image_size is \(16, 16.0\), expected pixels or"),
        ({"image_size": True}, "image_size is True, expected"),
        ({"num_classes": -1}, "num_classes is -1"),
        ({"num_classes": False}, "num_classes is False"),
        ({"num_classes": "3"}, "num_classes is '3', expected a whole number of at least 0"),
        ({"num_classes": True}, "num_classes is True, expected"),
        ({"num_classes": 3.0}, "num_classes is 3.0, expected"),
        ({"pre_logits": True}, "no pre_logits layer"),
    ],
)
def test_wishes_that_make_no_sense_are_refused(saved, wishes, message):
    with pytest.raises(UserError, match=message):
        load(saved, **wishes)


@pytest.mark.parametrize(
    "change",
    [
        "{",
        "[]",
        "\xff",
        "[" * 100_000,
        {"labels": "abc"},
        {"image_size": [16]},
        {"image_size": ["wide", 16]},
        {"classifier": "mean"},
        {"preprocess": "blur(3)"},
        {"preprocess": None},
        {"preprocess": "random_crop(16)|value_range(-1, 1)"},
        {"preprocess": "resize(13000)|value_range(-1, 1)"},
        {"preprocess": "resize(13000)|central_crop(16)|value_range(-1, 1)"},
        {"preprocess": "resize_small(13000)|central_crop(16)|value_range(-1, 1)"},
        {"image_size": [float("inf"), 16]},
        {"image_size": [16.5, 16]},
        {"image_size": [True, 16]},
        {"image_size": [10**9, 10**9]},
        {"untold": {"layer_norm_epsilon": "abc"}},
        {"untold": {"layer_scale": [1]}},
        {"untold": None},
        {"loss": "hinge"},
        {"loss": None},
    ],
)
def test_damaged_notes_are_refused_by_name(saved, change):
    notes = saved.with_suffix(".json")
    if isinstance(change, dict):
        notes.write_text(json.dumps(json.loads(notes.read_text(encoding="utf-8")) | change))
    else:
        notes.write_bytes(change.encode("latin1"))

    with pytest.raises(UserError, match=r"weights.json is damaged .*mend it, or remove it") as e:
        load(saved)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ["a", "b"]}, "names 2 classes, but the head has 5: mend or remove"),
        (
            {"image_size": [16, 20], "preprocess": "resize((16, 20))"},
            "16 positions do not fit images of 16x20",
        ),
        (
            {"classifier": "gap", "image_size": [4, 68], "preprocess": "value_range(-1, 1)"},
            r"unexpected \(1\): cls",
        ),
        ({"classifier": "lit"}, "is said to be 'lit', but a ViT has token or gap or map or first"),
    ],
)
def test_notes_that_do_not_fit_the_weights_are_refused(saved, change, message):
    notes = saved.with_suffix(".json")
    notes.write_text(json.dumps(json.loads(notes.read_text(encoding="utf-8")) | change))

    with pytest.raises(UserError, match=message):
        load(saved)


def test_a_name_that_tells_no_kind_of_file_is_refused(vit, tmp_path):
    with pytest.raises(UserError, match=r"can't tell .* 'w.json': expected a name .* \.npz"):
        vit.save(tmp_path / "w.json")
    with pytest.raises(UserError, match="there is no folder"):
        vit.save(tmp_path / "absent" / "w.npz")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preprocess": "resize(4000)|central_crop(8)"}, "expected 1 to 1024 pixels"),
        ({"preprocess": "resize(9)"}, r"makes images of \(9, 9\), not"),
        ({"preprocess": "flip"}, "flip .* is random"),
        ({"labels": ("a", "b")}, "2 labels for a head of"),
        ({"loss": "mean"}, "mean"),
    ],
)
def test_what_load_would_refuse_is_not_written(vit, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(vit, **change).save(tmp_path / "w.npz")
    assert not list(tmp_path.iterdir())


def test_an_unknown_style_writes_nothing(vit, tmp_path):
    with pytest.raises(UserError, match="unknown key style 'keras'"):
        vit.save(tmp_path / "w.npz", style="keras")
    assert list(tmp_path.iterdir()) == []
