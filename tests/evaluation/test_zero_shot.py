"""Zero-shot classification picks the class whose mean prompt lies nearest to the image."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from vit_jax import data
from vit_jax.data import Source
from vit_jax.errors import UserError
from vit_jax.evaluation import Scores
from vit_jax.evaluation.zero_shot import class_embeddings, classify, zero_shot
from vit_jax.models.lit import LiT
from vit_jax.pretrained import Pretrained

CLASSES = ("cat", "sea_lion", "dog", "owl", "emu", "gnu")
MODEL = LiT(
    image=dict(patch_size=(8, 8), hidden_size=16, num_layers=1, num_heads=2, mlp_dim=32),
    text_model="text_transformer",
    text=dict(hidden_size=12, num_layers=1, num_heads=2, mlp_dim=24, vocab_size=128, max_len=24),
    out_dim=(None, 16),
)
APPLY = jax.jit(MODEL.apply)


@dataclasses.dataclass
class Towers:
    """A small LiT that reads letters instead of pieces of words."""

    params: Any
    asked: list[str] = dataclasses.field(default_factory=list)
    preprocess = "resize(16)|value_range(-1, 1)"
    spec = SimpleNamespace(channels=3)
    prepared, read = Pretrained.prepared, Pretrained.read

    def model_on(self, devices):
        return MODEL

    def embed_images(self, images):
        return np.asarray(APPLY({"params": self.params}, images=images)[0])

    def embed_texts(self, texts):
        self.asked += texts
        tokens = np.array([[ord(c) for c in text.ljust(24)[:24]] for text in texts], np.int32)
        return np.asarray(APPLY({"params": self.params}, tokens=tokens)[1])


@pytest.fixture(scope="module")
def weights():
    def init():
        images, tokens = np.zeros((1, 16, 16, 3), np.float32), np.zeros((1, 24), np.int32)
        return MODEL.init(jax.random.key(0), images=images, tokens=tokens)["params"]

    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(init)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    return {**params, "t": np.array([2.0], np.float32)}


@pytest.fixture
def towers(weights):
    return Towers(weights)


def random_images(n=22, channels=3):
    return np.random.default_rng(0).integers(0, 256, (n, 20, 24, channels), dtype=np.uint8)


def source_of(images, broken=()):
    def read(key):
        if key in broken:
            raise UserError(f"image {key} is broken")
        return images[key]

    return Source(
        name="zoo",
        labels=CLASSES,
        channels=images.shape[3],
        keys=range(len(images)),
        label_ids=np.arange(len(images), dtype=np.int32) % len(CLASSES),
        read_key=read,
        describe_key=str,
    )


def probabilities(towers, images, labels, templates):
    """The formula, in float64."""
    prompts = [
        towers.embed_texts([template.replace("{}", label) for label in labels]).astype(np.float64)
        for template in templates
    ]
    classes = np.mean(prompts, axis=0)
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    preprocess = data.parse(towers.preprocess)
    colours = [np.repeat(image, 3 // image.shape[2], axis=2) for image in images]
    zimg = towers.embed_images(np.stack([preprocess(image) for image in colours]))
    weights = np.exp(np.exp(np.float64(towers.params["t"])) * zimg @ classes.T)
    return weights / weights.sum(axis=1, keepdims=True)


TEMPLATES = ("a photo of a {}.", "the {}, {}")
NAMES = [name.replace("_", " ") for name in CLASSES]


@pytest.mark.parametrize(("channels", "batch_size"), [(3, 5), (1, 64)], ids=["colour", "grey"])
def test_scores_are_those_of_the_formula_for_any_batch(towers, channels, batch_size):
    source = source_of(random_images(channels=channels))
    scores = zero_shot(towers, source, templates=TEMPLATES, batch_size=batch_size)
    expected = probabilities(towers, random_images(channels=channels), NAMES, TEMPLATES)
    truth = source.label_ids
    assert isinstance(scores, Scores)
    assert (scores.count, scores.skipped) == (22, 0)
    assert scores.top1 == np.mean(expected.argmax(axis=1) == truth)
    five = np.argsort(-expected, axis=1)[:, :5]
    assert scores.top5 == np.mean([t in row for t, row in zip(truth, five, strict=True)])
    np.testing.assert_array_equal(scores.prediction, expected.argmax(axis=1))
    np.testing.assert_allclose(scores.probability, expected.max(axis=1), rtol=1e-4)
    loss = -np.log(expected[np.arange(len(truth)), truth]).mean()
    assert scores.loss == pytest.approx(loss, rel=1e-5)


def test_classes_may_be_called_by_other_names(towers):
    names = ["Katze", "Seehund", "Hund", "Eule", "Strauss", "Gnu"]
    scores = zero_shot(towers, source_of(random_images()), names, templates=("ein {}",))
    expected = probabilities(towers, random_images(), names, ["ein {}"])
    np.testing.assert_array_equal(scores.prediction, expected.argmax(axis=1))
    assert "ein Seehund" in towers.asked


def test_underscores_of_folder_names_are_read_as_spaces(towers):
    zero_shot(towers, source_of(random_images(2)))
    assert "a photo of a sea lion." in towers.asked


def test_a_name_for_some_classes_only_is_refused(towers):
    with pytest.raises(UserError, match="2 labels were given for the 6 classes of zoo: give one"):
        zero_shot(towers, source_of(random_images()), ["cat", "dog"])


def test_broken_images_are_counted_out_if_asked_for(towers):
    source = source_of(random_images(), broken=(3, 7))
    with pytest.raises(UserError, match="image 3 is broken"):
        zero_shot(towers, source)
    scores = zero_shot(towers, source, corrupt="skip")
    assert (scores.count, scores.skipped) == (20, 2)


def test_descriptions_are_ranked_for_files_and_arrays(towers, tmp_path):
    images = random_images(35)
    files = [tmp_path / f"{i}.png" for i in range(2)]
    for file, image in zip(files, images, strict=False):
        Image.fromarray(image).save(file)
    labels = ["a cat", "a dog on a lawn", "an owl"]
    answers = classify(towers, [*files, *images[2:]], labels, top=2)
    expected = probabilities(towers, images, labels, ["{}"])
    assert len(answers) == 35
    for answer, row in zip(answers, expected, strict=True):
        best = np.argsort(-row)[:2]
        assert [label for label, _ in answer] == [labels[i] for i in best]
        np.testing.assert_allclose([p for _, p in answer], row[best], rtol=1e-4)


def test_templates_go_around_labels(towers):
    images = random_images(1)
    (answer,) = classify(towers, list(images), ["cat", "owl"], templates=("a {}", "the {}"))
    expected = probabilities(towers, images, ["cat", "owl"], ["a {}", "the {}"])[0]
    assert dict(answer)["cat"] == pytest.approx(expected[0], rel=1e-4)


def test_one_image_or_a_strange_array_is_refused(towers):
    with pytest.raises(UserError, match=r"one image was given, .*write \[image\]"):
        classify(towers, "photo.jpg", ["cat"])
    with pytest.raises(UserError, match=r"shape \(4, 4, 2\) and type uint8, expected a path"):
        classify(towers, [np.zeros((4, 4, 2), np.uint8)], ["cat"])


def test_a_class_lies_at_the_mean_direction_of_its_prompts():
    prompts = {"a cat": [3.0, 0, 0], "the cat": [0, 2, 0], "a dog": [0, 0, 1], "the dog": [0, 0, 5]}

    def embed(texts):
        return np.array([prompts[text] for text in texts], np.float32)

    classes = class_embeddings(embed, ["cat", "dog"], ["a {}", "the {}"])
    assert classes.dtype == np.float32
    # Every prompt counts the same, however long its embedding.
    np.testing.assert_allclose(classes, [[0.5**0.5, 0.5**0.5, 0], [0, 0, 1]], atol=1e-7)


def test_braces_in_a_label_are_left_alone():
    texts = []
    class_embeddings(lambda t: texts.extend(t) or np.ones((len(t), 2)), ["{0} {x}"], ["a {}!"])
    assert texts == ["a {0} {x}!"]


@pytest.mark.parametrize(
    ("labels", "templates", "message"),
    [
        ([], ["a {}"], r"labels are \[\], expected a list of names"),
        ("cat", ["a {}"], "labels are 'cat', expected a list of names"),
        (["cat"], [], r"templates are \[\], expected a list of texts"),
        (["cat"], "a {}", "templates are 'a {}', expected a list of texts"),
        (["cat"], ["a cat"], "template 'a cat' has no place for the class: write {} where"),
    ],
)
def test_what_makes_no_prompt_is_refused(labels, templates, message):
    with pytest.raises(UserError, match=message):
        class_embeddings(lambda texts: np.ones((len(texts), 2)), labels, templates)
