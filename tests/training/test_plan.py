"""What a run will need, told beforehand, is what it needs."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from tests.training.conftest import TINY
from vit_jax.errors import UserError
from vit_jax.sharding import batch_sharding, make_mesh
from vit_jax.training import TrainState, make_optimizer
from vit_jax.training import plan as plan_module
from vit_jax.training.inputs import open_data
from vit_jax.training.network import as_trained, make_network
from vit_jax.training.options import load_config, override
from vit_jax.training.plan import plan
from vit_jax.training.run import choose_kernels_from_config
from vit_jax.training.step import make_step_from_config


def config_of(*fields):
    return override(load_config(str(TINY)), [f"--config.{field}" for field in fields])


DEEP = (
    *("accum_steps=1", "model.hidden_size=64", "model.mlp_dim=256", "model.num_layers=3"),
    *("pp.train=resize(32)|value_range(-1, 1)", "pp.eval=resize(32)|value_range(-1, 1)"),
)
CONFIGS = {
    "AdamW in slices": config_of(),
    "SGD, mixup, float32 images": config_of(
        "optim=sgd", "optim_dtype=bfloat16", "accum_steps=1", "mixup=0.5", "image_dtype=float32",
        "model.hidden_size=64", "model.num_layers=3", "pp.train=resize(32)|value_range(-1, 1)",
        "pp.eval=resize(32)|value_range(-1, 1)",
    ),
    "bfloat16 moments, in a loop": config_of(*DEEP, "scan_layers=True"),
    "in a loop, computed again": config_of(
        *DEEP, "optim_dtype=float32", "scan_layers=True", "remat=full", "ema_decay=0.9"
    ),
    "fsdp in a loop": config_of(
        *DEEP, "sharding=fsdp", "scan_layers=True", "remat=dots", "ema_decay=0.9"
    ),
}  # fmt: skip


def real_step(config):
    """The step that a run compiles, its state and its first batch."""
    task = open_data(config)
    vit = make_network(
        config, image_shape=task.image_shape, labels=task.labels, preprocess=task.eval_ops.spec
    )
    mesh = make_mesh(config)
    tx = make_optimizer(config, config.total_steps)
    model, params = as_trained(config, vit.model, vit.params)
    kernels = choose_kernels_from_config(config, model, task.image_shape[:2], mesh).kernels
    model = model.clone(kernels=kernels)
    state = TrainState.create(params=params, tx=tx, mesh=mesh, ema=config.ema_decay > 0)
    batches = task.train_batches(0)
    batch = jax.device_put(next(batches), batch_sharding(mesh))
    batches.close()
    return make_step_from_config(task.config, model, tx, mesh, task.train_split[1]), state, batch


def nbytes(tree):
    """Of arrays, what lies on the first device."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


FAST = ("AdamW in slices",)


@pytest.mark.parametrize(
    "name",
    [
        name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
        for name in CONFIGS
        if "fsdp" not in name
    ],
)
def test_memory_is_that_of_the_real_step(name):
    check_memory(name)


def on(devices, expression):
    """What an expression of this file is, in another process with so many devices."""
    code = f"import json; from tests.training.test_plan import *; print(json.dumps({expression}))"
    flags = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    return json.loads(
        subprocess.run(
            [sys.executable, "-c", code],
            **dict(env=os.environ | flags, check=True, stdout=subprocess.PIPE),
        ).stdout
    )


@pytest.mark.slow
def test_memory_of_a_split_state_is_that_of_the_real_step():
    on(8, "check_memory('fsdp in a loop')")


def check_memory(name):
    config = CONFIGS[name]
    step, state, batch = real_step(config)
    needed = step.lower(state, batch).compile().memory_analysis()
    found = plan(config)["training"]

    parameters = nbytes((state.params, state.ema))
    assert parameters == nbytes(state.params) * (2 if config.ema_decay else 1)
    assert (found["parameters"], found["optimizer"]) == (parameters, nbytes(state) - parameters)
    assert found["batches"] == nbytes(batch) * (1 + config.prefetch)
    ahead = nbytes(batch) * config.prefetch
    compiled = (
        needed.argument_size_in_bytes
        + needed.temp_size_in_bytes
        + needed.output_size_in_bytes
        - needed.alias_size_in_bytes
    )
    assert found["total"] - ahead == pytest.approx(compiled, rel=0.01)


def test_parameters_and_operations_are_those_of_the_compiler():
    fields = ("mlp_dim=768", "hidden_size=192", "num_heads=3", "num_layers=4", "patch_size=(8,8)")
    sizes = ("pp.train=resize(112)|value_range(-1, 1)", "pp.eval=resize(112)|value_range(-1, 1)")
    config = config_of(
        *(f"model.{field}" for field in fields), *sizes, "batch=2", "batch_eval=2", "accum_steps=1",
        "model.dropout_rate=0.0",
    )  # fmt: skip
    step, state, batch = real_step(config)
    found = plan_without_compiling(config)
    assert found["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(state.params))
    counted = step.lower(state, batch).cost_analysis()["flops"]
    # The compiler counts the optimizer too, a few operations a parameter, and knows that nobody
    # wants the gradient of the images.
    assert found["flops_per_step"] == pytest.approx(counted, rel=0.03)


def plan_without_compiling(config, **options):
    nothing = dict.fromkeys(("parameters", "optimizer", "gradients", "activations", "total"), 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "_memory", lambda *_: nothing)
        return plan(config, **options)


def refuse(_):
    raise NotImplementedError("memory_analysis")


@pytest.mark.parametrize(
    "answer",
    [
        lambda _: None,
        lambda _: SimpleNamespace(temp_size_in_bytes=1000),
        lambda _: SimpleNamespace(
            temp_size_in_bytes=-1, output_size_in_bytes=0, alias_size_in_bytes=0
        ),
        refuse,
    ],
    ids=["None", "a figure is missing", "no real figures", "raises"],
)
def test_memory_that_the_compiler_does_not_tell_is_not_known(monkeypatch, answer):
    monkeypatch.setattr(jax.stages.Compiled, "memory_analysis", answer)
    found = plan(CONFIGS["AdamW in slices"], memory=2**40)
    for phase in (found["training"], found["evaluation"]):
        assert min(phase[part] for part in ("parameters", "optimizer", "batches")) > 0
        assert phase["activations"] is phase["total"] is None
    assert found["training"]["gradients"] is None
    assert found["fits"] is found["changes"] is None


@pytest.mark.slow
def test_what_would_make_it_fit_does_and_nothing_less_would():
    config = config_of("batch=64", "accum_steps=1", "batch_eval=512", "model.hidden_size=32")
    whole = plan(config)
    least = plan(override(config, ["--config.accum_steps=64", "--config.batch_eval=1"]))
    middle = (whole["training"]["total"] + least["training"]["total"]) / 2

    found = plan(config, memory=middle)
    slices = found["changes"]["accum_steps"]
    assert slices in (2, 4, 8, 16, 32, 64)
    for accum_steps, fits in ((slices, True), (slices // 2, False)):
        other = plan(override(config, [f"--config.accum_steps={accum_steps}"]))
        assert (other["training"]["total"] <= middle) == fits
    if found["evaluation"]["total"] > middle:
        other = plan(override(config, [f"--config.batch_eval={found['changes']['batch_eval']}"]))
        assert other["evaluation"]["total"] <= middle

    assert plan(config, memory=whole["training"]["total"] * 9)["changes"] == {}
    assert plan(config, memory=1000)["changes"] is None


@pytest.mark.slow
def test_what_slices_cannot_save_is_computed_again():
    """A run that holds many activations of one image, and has no more than that at once."""
    config = config_of(*DEEP, "batch=8", "batch_eval=8", "model.num_layers=8")
    whole = plan(config)
    again = plan(override(config, ["--config.scan_layers=True", "--config.remat=full"]))
    memory = again["training"]["total"] * 1.02
    assert whole["training"]["total"] > memory

    found = plan(config, memory=memory)

    assert found["changes"]["scan_layers"] is True
    assert found["changes"]["remat"] in ("dots", "full")
    flags = [f"--config.{field}={value}" for field, value in found["changes"].items()]
    other = plan(override(config, flags))
    assert max(other["training"]["total"], other["evaluation"]["total"]) <= memory


WIDE = (*DEEP, "batch=8", "batch_eval=8", "model.mlp_dim=4096")


@pytest.mark.slow
def test_a_state_that_is_too_large_for_a_device_is_split():
    state = plan(config_of(*WIDE))["training"]
    memory = (state["parameters"] + state["optimizer"]) * 1.2

    found = on(8, f"plan(config_of(*WIDE), memory={memory})")

    assert found["changes"]["sharding"] == "fsdp"
    flags = [f"{field}={value}" for field, value in found["changes"].items()]
    other = on(8, f"plan(config_of(*WIDE, *{flags}))")
    assert max(other["training"]["total"], other["evaluation"]["total"]) <= memory


@pytest.mark.slow
def test_on_several_devices_the_batch_is_split_and_the_weights_are_not():
    one = plan(CONFIGS["AdamW in slices"])
    four = on(4, "plan(CONFIGS['AdamW in slices'])")
    assert four["devices"] == 4
    assert four["training"]["parameters"] == one["training"]["parameters"]
    assert four["training"]["optimizer"] == one["training"]["optimizer"]
    assert four["training"]["batches"] == one["training"]["batches"] / 4
    assert four["training"]["activations"] < 0.6 * one["training"]["activations"]
    assert four["flops_per_step"] == one["flops_per_step"]


def test_the_search_for_what_fits_ends_and_says_so(monkeypatch):
    """Two programs are compiled for what was asked for; no more, if that took long."""
    monkeypatch.setattr(plan_module, "SEARCH_S", -1)
    told = []
    found = plan(CONFIGS["AdamW in slices"], memory=1000, say=told.append)
    assert (found["fits"], found["changes"]) == (False, None)
    assert [line.split(" with ")[0] for line in told] == [
        *("compiling the training", "compiling the evaluation"),
        "after -1 s nothing more is tried",
    ]


def test_a_data_set_that_is_not_there_needs_the_number_of_classes_alone():
    config = config_of("dataset=cifar10", "pp.train=resize(8)", "pp.eval=resize(8)")
    with pytest.raises(UserError, match=r"classes of 'cifar10' is not known.*give --classes"):
        plan(config)
    found = plan_without_compiling(config, classes=100)
    assert (found["classes"], found["picture_shape"]) == (100, (8, 8, 3))
    config = config_of("dataset=cifar10", "pp.train=flip", "pp.eval=value_range(-1, 1)")
    with pytest.raises(UserError, match=r"size of the images of 'cifar10' is not known"):
        plan(config, classes=10)
