import logging
import re

import jax
import jax.numpy as jnp
import pytest

import vit_jax
from vit_jax.checkpoints import save_weights
from vit_jax.checkpoints.hub import IMAGENET21K, cache_path, class_names


@pytest.fixture(autouse=True)
def offline_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path))
    monkeypatch.setenv("VIT_JAX_OFFLINE", "1")


def put(text: str) -> None:
    path = cache_path(IMAGENET21K)
    path.parent.mkdir(parents=True)
    path.write_text(text)


def test_imagenet_has_a_thousand_names_without_a_network():
    names = class_names(1000)
    assert names is not None
    assert len(names) == 1000
    assert all(names)
    assert names[0] == "tench, Tinca tinca"
    assert names[207] == "golden retriever"
    assert names[999] == "toilet tissue, toilet paper, bathroom tissue"


def test_the_names_are_in_the_order_of_the_heads(shared):
    names = class_names(1000)
    assert names is not None
    images = sorted((shared / "images" / "imagenet_samples").glob("*.jpg"))
    assert images
    for image in images:
        index, _, name = image.stem.partition("_")
        assert name.replace("_", " ").lower() in names[int(index)].lower()


def test_imagenet21k_is_read_from_the_cache():
    put("".join(f"thing_{i}, Res_{i}\n" for i in range(21_843)))
    names = class_names(21_843)
    assert names is not None
    assert len(names) == 21_843
    assert names[1] == "thing 1, Res 1"


def test_imagenet21k_goes_without_names_if_they_cannot_be_had(caplog):
    with caplog.at_level(logging.WARNING):
        assert class_names(21_843) is None
    assert re.search(r"go without names: .*wordnet_lemmas\.txt by hand", caplog.text)


@pytest.mark.parametrize("content", ["one\ntwo\n", ""])
def test_a_damaged_list_is_not_used(caplog, content):
    put(content)
    with caplog.at_level(logging.WARNING):
        assert class_names(21_843) is None
    assert "expected 21843" in caplog.text


@pytest.mark.parametrize("num_classes", [None, 10, 999, 21_841])
def test_other_heads_have_no_known_names(num_classes):
    assert class_names(num_classes) is None


def test_loaded_heads_have_their_names(tmp_path):
    for num_classes in (1000, 7):
        model = vit_jax.create_model("ViT-Ti_16", num_classes, num_layers=1)
        variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
        save_weights(tmp_path / f"{num_classes}.npz", variables["params"])
    vit = vit_jax.load(tmp_path / "1000.npz")
    assert vit.label(0) == "tench, Tinca tinca"
    assert vit_jax.load(tmp_path / "1000.npz", num_classes=1000).labels is None
    assert vit_jax.load(tmp_path / "7.npz").labels is None
    vit.save(tmp_path / "again.npz")
    assert vit_jax.load(tmp_path / "again.npz").labels == vit.labels
