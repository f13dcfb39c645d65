"""Relevance is what its formula says, and names no patch that the network ignores."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from tests.explain.conftest import random_images
from vit_jax import explain
from vit_jax.errors import UserError
from vit_jax.explain.network import observe, open_tower
from vit_jax.explain.relevance import class_index
from vit_jax.models.layers import ATTENTION_NAME
from vit_jax.pretrained import Pretrained


def slopes(vit: Pretrained, image: np.ndarray, index: int) -> tuple:
    """dy/dA of the blocks and of the pooling by central differences, without automatic ones."""
    variables = {"params": vit.params}
    _, state = jax.eval_shape(
        lambda: vit.model.apply(variables, image[None], mutable=["perturbations"])
    )
    flat, build = ravel_pytree(
        jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state["perturbations"])
    )

    @jax.jit
    @jax.vmap
    def y(i, by):
        changed = build(flat.at[i].add(by))
        return vit.model.apply(variables | {"perturbations": changed}, image[None])[0, index]

    every = np.arange(len(flat))
    eps = np.full(len(flat), 1e-2, np.float32)
    found = (np.asarray(y(every, eps)) - np.asarray(y(every, -eps))) / 2e-2
    return jax.device_get(vit.model.attention_weights(build(found)))


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("kind", ["token", "MAP"])
def test_relevance_is_the_formula_with_numerical_gradients(network, kind):
    vit = network(kind, image_size=(8, 12))
    image = random_images(vit, 1)[0]
    seen = observe(open_tower(vit), image)
    by_blocks, by_pooling = slopes(vit, image, 3)
    relevant = np.eye(len(seen.tokens))
    for weights, slope in zip(seen.attention, by_blocks, strict=True):
        relevant = relevant + np.maximum(weights * slope, 0).mean(axis=0) @ relevant
    gathered = relevant - np.eye(len(relevant))
    gathered /= gathered.sum(axis=1, keepdims=True)
    if kind == "token":
        expected = gathered[0, 1:]
    else:
        read = np.maximum(seen.pooling * by_pooling, 0).mean(axis=0)
        expected = read @ (np.eye(len(relevant)) + gathered)

    found = explain.relevance(vit, image[None], [3])[0, 0].ravel()

    assert found.max() > 0
    np.testing.assert_allclose(found / found.max(), expected / expected.max(), atol=5e-3)


def test_without_attention_the_mean_of_the_tokens_is_explained_by_the_activation_map(network):
    vit = network("gap")
    silent = jax.tree.map(np.array, vit.params)
    for i in range(2):  # What attention gathers is nothing.
        value = silent["Transformer"][f"encoderblock_{i}"][ATTENTION_NAME]["value"]
        value["kernel"][:], value["bias"][:] = 0, 0
    vit = dataclasses.replace(vit, params=silent)
    image = random_images(vit, 1)
    tokens = observe(open_tower(vit), image[0]).tokens
    expected = np.maximum(tokens @ silent["head"]["kernel"][:, 2] / len(tokens), 0)

    found = explain.relevance(vit, image, [2])[0, 0]

    assert expected.max() > 0
    np.testing.assert_allclose(found.ravel(), expected, atol=1e-6)


def ignoring(vit: Pretrained, token: int) -> Pretrained:
    """The network with weights that make nobody attend to one token.

    Its position makes feature 0 very negative; of each head one key feature is feature 0, and the
    query has a large constant there.
    """
    params = jax.tree.map(np.array, vit.params)
    encoder = params["Transformer"]
    encoder["posembed_input"]["pos_embedding"][0, token, 0] = -1e4
    modules = [encoder[f"encoderblock_{i}"] for i in range(vit.spec.num_layers)]
    if vit.spec.classifier == "map":
        modules.append(params["MAPHead_0"])
    for module in modules:
        query, key = module[ATTENTION_NAME]["query"], module[ATTENTION_NAME]["key"]
        query["kernel"][..., 0], query["bias"][..., 0] = 0, 1000
        key["kernel"][..., 0], key["kernel"][0, :, 0], key["bias"][..., 0] = 0, 1, 0
        if "LayerNorm_0" in module:
            module["LayerNorm_0"]["scale"][0], module["LayerNorm_0"]["bias"][0] = 1, 0
    encoder["encoder_norm"]["scale"][0], encoder["encoder_norm"]["bias"][0] = 1, 0
    return dataclasses.replace(vit, params=params)


@pytest.mark.parametrize("kind", ["token", "MAP"])
def test_a_patch_that_the_network_ignores_has_no_relevance(network, kind):
    row, column = 2, 3
    usual = network(kind)
    vit = ignoring(usual, row * 6 + column + (kind == "token"))
    image = random_images(vit, 1)
    other = image.copy()
    other[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] *= -1
    np.testing.assert_array_equal(vit(image), vit(other))  # It is ignored indeed.
    assert np.abs(usual(image) - usual(other)).max() > 1e-3

    for classes in ([0], [4], None):
        found = explain.relevance(vit, image, classes)[0, 0]
        assert found[row, column] == 0
        assert found.max() > 0


@pytest.mark.parametrize("kind", ["gap", "hybrid"])
def test_every_kind_of_network_gives_a_map_a_class(network, kind):
    vit = network(kind)
    found = explain.relevance(vit, random_images(vit), ["ape", 4])
    assert found.shape == (2, 2, *vit.spec.grid_size)
    assert found.min() >= 0
    assert found.max() > 0
    best = explain.relevance(vit, random_images(vit))
    index = int(vit(random_images(vit))[0].argmax())
    np.testing.assert_array_equal(best[:1], explain.relevance(vit, random_images(vit)[:1], [index]))


def test_of_lit_weights_texts_are_explained(network):
    vit = network("LiT")
    found = explain.relevance(vit, random_images(vit), ["a cat", "a dog"])
    assert found.shape == (2, 2, 4, 4)
    assert np.abs(found[:, 0] - found[:, 1]).max() > 0
    with pytest.raises(UserError, match="say which texts"):
        explain.relevance(vit, random_images(vit))


def test_classes_go_by_index_label_or_a_word_of_it(network):
    labels = ("ape, Affe", "3", "cat", "crane", "crane, Kran")
    vit = dataclasses.replace(network("token"), labels=labels)
    found = [class_index(vit, name) for name in ("ape", "affe", 3, "3", "crane")]
    assert found == [0, 0, 3, 1, 3]
    with pytest.raises(UserError, match=r"no class '0': give a name$"):
        class_index(vit, "0")  # Where one is called "3", that is no index.
    with pytest.raises(UserError, match=r"no class 'caat': did you mean 'cat'\?"):
        class_index(vit, "caat")
    with pytest.raises(UserError, match=r"no class 5: give a name or an index, 0 to 4"):
        class_index(vit, 5)
    vit = dataclasses.replace(vit, labels=("a, crane", "b, crane", "c", "d", "e"))
    assert class_index(vit, "4") == 4
    with pytest.raises(UserError, match=r"several classes are called 'crane': .* \[0, 1\]"):
        class_index(vit, "crane")


def test_a_network_without_classes_has_none_to_explain(network):
    vit = network("unpooled")
    with pytest.raises(UserError, match="give no classes to explain"):
        explain.relevance(vit, random_images(vit), [0])
