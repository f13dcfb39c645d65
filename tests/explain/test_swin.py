"""What is looked at of a Swin Transformer: the blocks of its last stage as of a ViT, and how its
windows attend in the stages before."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests import families, swin_reference
from tests.models.networks import apply
from vit_jax import explain
from vit_jax.errors import UserError
from vit_jax.explain.network import observe, open_tower
from vit_jax.explain.pages import explanations, page_figure, page_html
from vit_jax.models.swin import cut_windows, places_in_windows


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    def made(family: str, size: tuple[int, int]):
        vit = families.make(family, tmp_path_factory.mktemp("x"), image_size=size)
        return dataclasses.replace(vit, preprocess=f"resize({size})|value_range(-1, 1)")

    return made


def noise(vit) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, (*vit.image_size, 3)).astype(np.float32)


@pytest.mark.parametrize(
    ("size", "window", "shift"), [((6, 9), (3, 3), (1, 1)), ((5, 7), (3, 3), (1, 1)),
                                  ((3, 8), (3, 3), (0, 1))]
)  # fmt: skip
def test_each_token_has_one_place(size, window, shift):
    grid = tuple(-(-n // w) * w for n, w in zip(size, window, strict=True))
    places = places_in_windows(size, grid, window, shift)
    assert sorted(places.ravel()) == list(range(grid[0] * grid[1]))
    rolled = np.full(grid, -1)
    for r, c in np.ndindex(size):
        rolled[r, c] = (r + shift[0]) % size[0] * size[1] + (c + shift[1]) % size[1]
    real = places < size[0] * size[1]
    np.testing.assert_array_equal(np.where(real, places, -1), cut_windows(rolled[None], window)[0])


@pytest.mark.parametrize("size", [(20, 16), (12, 12)])
def test_what_is_padded_gives_no_attention(size, make):
    vit = make("Swin", size)
    _, state = vit.model.apply({"params": vit.params}, noise(vit)[None], mutable=["intermediates"])
    for block in state["intermediates"]["stage_1"].values():
        (received,), (weights,) = (
            block["WindowAttention_0"][f"attention_{name}"] for name in ("received", "weights")
        )
        expected = np.asarray(weights).mean(axis=-2).reshape(received.shape)
        np.testing.assert_allclose(received, expected, rtol=1e-5)


@pytest.mark.parametrize("family", ["Swin", "Swin v2"])
@pytest.mark.parametrize(
    "size", [(24, 30), pytest.param((16, 16), marks=[pytest.mark.slow, pytest.mark.ci])]
)
def test_looking_changes_nothing_and_the_last_stage_is_shown(family, size, make):
    vit = make(family, size)
    pixels, tower = noise(vit), open_tower(vit)
    with jax.default_matmul_precision("highest"):
        seen = observe(tower, pixels)
        logits = apply(vit.model, flatten_dict(vit.params, sep="/"), pixels[None])
    np.testing.assert_allclose(seen.answer, logits[0], atol=1e-5)
    grid = tower.grid
    assert grid == (-(-size[0] // 4), -(-size[1] // 4))
    count = grid[0] * grid[1]
    assert seen.attention.shape == (2, 4, count, count)
    assert seen.blocks.shape == (2, count, 16)
    for block, shifted in enumerate((False, True)):
        places, added = swin_reference.places_and_scores(grid, 3, shifted)
        numbers = [None if p is None else p[0] * grid[1] + p[1] for p in places]
        together = np.zeros((count, count), bool)
        for i, j in np.argwhere(added > -np.inf):
            if numbers[i] is not None and numbers[j] is not None:
                together[numbers[i], numbers[j]] = True
        assert not seen.attention[block][:, ~together].any()
        sums = seen.attention[block].sum(axis=-1)
        assert (sums < 1 + 1e-5).all()  # What is missing goes to padding.
        if not any(n % 3 for n in grid):
            np.testing.assert_allclose(sums, 1, rtol=1e-5)


def test_the_other_stages_show_what_each_token_receives(make):
    vit = make("Swin", (16, 24))
    seen = observe(open_tower(vit), noise(vit))
    assert list(seen.further) == [f"stage 1, head {i}, received" for i in (1, 2)]
    for values in seen.further.values():
        assert values.shape == (8, 12)
        assert 0 < values.sum() <= 1 + 1e-5


@pytest.mark.slow
@pytest.mark.ci
def test_all_maps_are_those_of_the_last_stage(make):
    vit = make("Swin", (24, 24))
    image = noise(vit)
    uint8 = ((image + 1) * 127).astype(np.uint8)
    assert explain.attention_maps(vit, [uint8]).shape == (1, 2, 4, 36, 36)
    assert explain.rollout(vit, [uint8]).shape == (1, 6, 6)
    np.testing.assert_allclose(explain.rollout(vit, [uint8]).sum(), 1, rtol=1e-5)
    assert explain.relevance(vit, [uint8], [3]).shape == (1, 1, 6, 6)
    assert explain.relevance(vit, [uint8], [3]).max() > 0
    assert explain.token_norms(vit, [uint8]).shape == (1, 2, 6, 6)
    distance = explain.attention_distance(vit, [uint8])
    assert distance.shape == (1, 2, 4)
    assert 4 < distance.max() < 2 * 4 * 2**0.5  # Within windows of three tokens of four pixels.
    assert explain.embedding_filters(vit, 3).shape == (3, 2, 2, 3)
    with pytest.raises(UserError, match="a Swin Transformer has no position embeddings to look at"):
        explain.position_similarity(vit)
    with pytest.raises(UserError, match="block is 0, expected 2 to 3"):
        explain.plot_attention_maps(vit, [uint8], block=0)


def test_the_gradient_of_relevance_is_that_of_finite_differences(make):
    """Of attention that is looked at, where there are windows, shifts and padding."""
    vit = make("Swin v2", (16, 18))
    tower, pixels = open_tower(vit), noise(vit)[None]
    shapes = jax.eval_shape(
        lambda: tower.model.apply({"params": vit.params}, pixels, mutable=["perturbations"])[1]
    )["perturbations"]
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    assert len(jax.tree.leaves(zeros)) == 2  # The blocks of the last stage.

    @jax.jit
    def logit(changes):
        return tower.model.apply({"params": vit.params, "perturbations": changes}, pixels)[0, 1]

    with jax.default_matmul_precision("highest"):
        gradient = jax.grad(logit)(zeros)
        rng = np.random.default_rng(0)
        step = jax.tree.map(lambda g: rng.normal(size=g.shape).astype(np.float32) * (g != 0),
                            gradient)  # fmt: skip
        expected = sum(
            float((a * b).sum())
            for a, b in zip(*map(jax.tree.leaves, (gradient, step)), strict=True)
        )
        scaled = [jax.tree.map(lambda x, s=s: s * x, step) for s in (1e-3, -1e-3)]
        found = float(logit(scaled[0]) - logit(scaled[1])) / 2e-3
    np.testing.assert_allclose(found, expected, rtol=1e-2)


def test_the_maps_of_each_stage_are_a_pyramid(make):
    vit = make("Swin", (24, 20))
    uint8 = ((noise(vit) + 1) * 127).astype(np.uint8)
    shapes = [vit.features([uint8], "patches", layer=f"stage_{i}").shape for i in (0, 1)]
    assert shapes == [(1, 12, 10, 8), (1, 6, 5, 16)]
    assert vit.features([uint8]).shape == (1, 16)


def test_the_page_says_what_it_shows(make, tmp_path):
    vit = make("Swin", (24, 24))
    from PIL import Image

    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(tmp_path / "a.png")
    explained = list(explanations(vit, [tmp_path / "a.png"]))
    html = page_html(vit, explained).decode()
    assert "24x24 pixels, 12x12 patches" in html
    assert "are those of the last stage, of 6x6 tokens: what the stages before it mix" in html
    assert "stage 1, head 2, received" in html
    assert "block 4, head 1" in html
    assert "Position embeddings" not in html
    assert re.search(r'"layers": ?\[\[2, ?null\]', html)
    page_figure(vit, explained)
