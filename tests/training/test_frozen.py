"""Weights that a family calls constants are stored and go through a run as they are."""

import math
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests import t2t
from tests.models.networks import random_images
from vit_jax.models import T2TViT
from vit_jax.models.t2t import sinusoid
from vit_jax.pretrained import load
from vit_jax.training import TrainState, default_config, make_optimizer, make_train_step, run

T2T = ("model.name=T2T-ViT-7", "model.hidden_size=12", "model.num_heads=3", "model.num_layers=1")


def numbers(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "optim", ["adamw", pytest.param("sgd", marks=[pytest.mark.slow, pytest.mark.ci])]
)
def test_a_step_changes_all_weights_but_those_that_are_constants(optim):
    model = T2TViT(**t2t.SMALL)
    images = random_images(4, 32, 32, 3)
    params = jax.jit(model.init)(jax.random.key(0), images[:1])["params"]
    # Of a head of zeros nothing before it would learn.
    params["head"]["kernel"] = random_images(12, 5)
    config = default_config()
    config.update(dict(optim=optim, weight_decay=0.3, base_lr=0.1, warmup_steps=0))
    tx = make_optimizer(config, 100, model.frozen)
    step = make_train_step(model, tx, ema_decay=0.6, skip_bad=True)
    state = TrainState.create(params=params, tx=tx, ema=True)
    assert numbers(state.opt_state) <= 2 * numbers(params) + 2
    before = flatten_dict(jax.device_get(state.params), sep="/")

    for _ in range(2):
        batch = {"image": images, "label": np.arange(4, dtype=np.int32)}
        state, metrics = step(state, batch)

    for weights in (state.params, state.ema):
        after = flatten_dict(jax.device_get(weights), sep="/")
        same = {name for name in before if np.array_equal(before[name], after[name])}
        assert same == set(model.frozen)
    # The moments of all others, and counts.
    moments = {"sgd": 1, "adamw": 2}[optim]
    trained = numbers(params) - sum(before[name].size for name in model.frozen)
    counts = numbers(state.opt_state) - moments * trained
    assert 0 < counts <= 2
    assert math.isfinite(metrics["update_norm"])


@pytest.mark.slow
@pytest.mark.ci
def test_a_run_that_goes_on_from_a_checkpoint_ends_as_one_that_was_left_alone(
    tiny, tmp_path, outcome
):
    fields = (*T2T, "total_steps=6", "checkpoint_every=2", "eval_every=6", "ema_decay=0.9")
    config = tiny(*fields)
    del config.model["patch_size"]
    assert run(config, tmp_path / "whole").finished
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "6")
    (tmp_path / "parts" / "weights.npz").unlink()

    assert run(config, tmp_path / "parts").finished

    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")
    vit = load(tmp_path / "whole")
    assert type(vit.model) is T2TViT
    np.testing.assert_array_equal(
        vit.params["Transformer"]["posembed_input"]["pos_embedding"], sinusoid(2, 12)
    )
