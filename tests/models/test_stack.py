"""A network that goes through its blocks in a loop, or keeps less of them, computes the same."""

import itertools

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vit_jax.models import create_model
from vit_jax.models.stack import BlockLoop, stack_blocks, unstack_blocks

NETWORKS = {
    "ViT-Ti_16": dict(num_heads=2, mlp_dim=24),
    "Mixer-B_16": dict(tokens_mlp_dim=10, channels_mlp_dim=24),
}
PLAIN = BlockLoop()
IMAGES = np.random.default_rng(0).uniform(-1, 1, (3, 8, 8, 3)).astype(np.float32)


def network(name, loop=PLAIN, **fields):
    sizes = dict(patch_size=(4, 4), hidden_size=16, num_layers=3) | NETWORKS[name]
    return create_model(name, num_classes=5, loop=loop, **(sizes | fields))


def weights(model):
    """Weights of which none is zero."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), shapes)


def loss_and_gradient(model, params):
    def loss(params):
        rngs = {"dropout": jax.random.key(2)}
        logits = model.apply({"params": params}, IMAGES, train=True, rngs=rngs)
        return (jax.nn.log_softmax(logits)[:, 0] ** 2).mean()

    return jax.jit(jax.value_and_grad(loss))(params)


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5), a, b)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(
    ("name", "loop"),
    [
        ("ViT-Ti_16", BlockLoop(remat="full")),
        ("ViT-Ti_16", BlockLoop(scan=True)),
        ("ViT-Ti_16", BlockLoop(scan=True, remat="dots")),
        ("Mixer-B_16", BlockLoop(scan=True, remat="full")),
    ],
    ids=str,
)
def test_loss_and_gradient_are_those_of_the_plain_network(name, loop):
    params = weights(network(name))
    loss, gradient = loss_and_gradient(network(name), params)

    own = stack_blocks(params) if loop.scan else params
    other_loss, other_gradient = loss_and_gradient(network(name, loop), own)

    assert float(other_loss) == pytest.approx(float(loss), rel=1e-5)
    assert_close(unstack_blocks(other_gradient), gradient)


@pytest.mark.parametrize("name", NETWORKS)
def test_features_are_those_of_the_plain_network(name):
    params = weights(network(name))
    apply = network(name).apply
    plain = apply({"params": params}, IMAGES, return_features=True)
    model = network(name, BlockLoop(scan=True))
    scanned = model.apply({"params": stack_blocks(params)}, IMAGES, return_features=True)
    assert_close(scanned, plain)


@pytest.mark.parametrize("name", NETWORKS)
def test_stacking_loses_nothing_and_gives_what_the_scanned_network_wants(name):
    params = weights(network(name, num_layers=11))  # So many that "10" comes after "9".
    stacked = stack_blocks(params)
    wanted = network(name, BlockLoop(scan=True), num_layers=11).init
    wanted = jax.eval_shape(wanted, jax.random.key(0), IMAGES)["params"]
    assert jax.tree.map(np.shape, stacked) == jax.tree.map(np.shape, wanted)

    back = flatten_dict(unstack_blocks(stacked))
    for key, array in flatten_dict(params).items():
        np.testing.assert_array_equal(back.pop(key), array)
    assert not back


def features_in_a_loop(name, loop, images, **fields):
    """What comes out of each block while training, and the stacked weights."""
    params = stack_blocks(weights(network(name, **fields)))
    rngs, model = {"dropout": jax.random.key(0)}, network(name, loop, **fields)
    _, features = model.apply(
        {"params": params}, images, train=True, return_features=True, rngs=rngs
    )
    return [np.asarray(features[k]) for k in sorted(features) if "lock_" in k], params


def test_in_a_loop_each_block_has_its_own_rate_of_stochastic_depth():
    """The first block is never left out, the last one, whose rate is almost 1, almost always."""
    images = np.repeat(IMAGES[:1], 64, axis=0)
    fields = dict(stochastic_depth_rate=0.999, num_layers=2)
    (first, last), params = features_in_a_loop(
        "Mixer-B_16", BlockLoop(scan=True, remat="full"), images, **fields
    )
    plain = network("Mixer-B_16", num_layers=2)
    _, whole = plain.apply({"params": unstack_blocks(params)}, images, return_features=True)
    np.testing.assert_allclose(first, whole["MixerBlock_0"], rtol=2e-4, atol=2e-5)
    assert np.all(first == last, axis=(1, 2)).mean() > 0.9


def test_in_a_loop_blocks_draw_for_themselves():
    """Of one draw for all, what a block leaves out the next, whose rate is higher, would too."""
    images = np.repeat(IMAGES[:1], 64, axis=0)
    fields = dict(stochastic_depth_rate=0.6, num_layers=9)
    out, _ = features_in_a_loop("ViT-Ti_16", BlockLoop(scan=True), images, **fields)
    left_out = [np.all(a == b, axis=(1, 2)) for a, b in itertools.pairwise(out[5:])]
    for one, next_one in itertools.pairwise(left_out):
        assert np.any(one & ~next_one)
