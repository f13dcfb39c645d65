"""Where the state lies, and that this changes nothing but that."""

import json
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec
from ml_collections import ConfigDict

from vit_jax.errors import UserError
from vit_jax.models import create_model
from vit_jax.sharding import make_mesh, shardings
from vit_jax.training import default_config, make_optimizer

EIGHT = AbstractMesh((1, 8), ("replica", "fsdp"))


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((768, 3072), (None, "fsdp")),
        ((3072, 768), ("fsdp",)),
        ((128, 128), (None, "fsdp")),  # Of equal axes the last.
        ((1001, 768), (None, "fsdp")),  # The largest is not divisible.
        ((1001, 1003), ()),
        ((127, 128), ()),  # Small.
        ((), ()),
    ],
)
def test_an_array_is_split_along_its_largest_divisible_axis_unless_it_is_small(shape, axes):
    assert shardings(jax.ShapeDtypeStruct(shape, jnp.float32), EIGHT).spec == PartitionSpec(*axes)


def test_of_stacked_blocks_each_is_split_as_it_would_be_alone():
    shapes = {"scale": (16, 768), "query": (64, 31, 1003), "kernel": (16, 1001, 768)}
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    found = shardings({"Transformer": {"encoderblock": tree}}, EIGHT)["Transformer"]
    specs = {name: place.spec for name, place in found["encoderblock"].items()}
    kernel = PartitionSpec(None, None, "fsdp")
    assert specs == {"scale": PartitionSpec(), "query": PartitionSpec(), "kernel": kernel}


def test_an_eighth_of_vit_b_takes_less_than_a_sixth_of_its_memory():
    model = create_model("ViT-B_16", num_classes=1000)
    config = default_config()
    config.optim = "adamw"
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
    state = params, jax.eval_shape(make_optimizer(config, 10).init, params)

    def size(shape_of):
        sizes = jax.tree.map(
            lambda x, place: np.prod(shape_of(x, place)) * x.dtype.itemsize,
            state,
            shardings(state, EIGHT),
        )
        return sum(jax.tree.leaves(sizes))

    whole = size(lambda x, _: x.shape)
    assert whole > 86e6 * (4 + 2 + 4)
    assert size(lambda x, place: place.shard_shape(x.shape)) < whole / 6


def test_a_batch_that_cannot_be_split_is_refused():
    config = ConfigDict(dict(batch=10, accum_steps=4, sharding="fsdp"))
    with pytest.raises(UserError, match=r"batch 10 is not divisible by 1 devices x 4 accum_steps"):
        make_mesh(config)


STEPS = """
    import json, re
    import jax, numpy as np
    from vit_jax.models import create_model
    from vit_jax.sharding import make_mesh, replicated, shardings, batch_sharding, to_host
    from vit_jax.training import TrainState, default_config, make_optimizer, make_train_step
    from vit_jax.training.network import as_trained

    rng = np.random.default_rng(0)
    batch = {
        "image": rng.standard_normal((32, 8, 8, 1)).astype(np.float32),
        "label": rng.integers(0, 10, 32, dtype=np.int32),
    }
    config = default_config()
    fields = dict(optim="adamw", optim_dtype="float32", warmup_steps=0, base_lr=1e-3, batch=32)
    config.update(fields | dict(weight_decay=0.1, decay_type="constant", accum_steps=2))
    sizes = dict(patch_size=(4, 4), hidden_size=64, num_layers=2, num_heads=2, mlp_dim=256)
    model = create_model("ViT-Ti_16", num_classes=10, dropout_rate=0.1, **sizes)
    params = jax.device_get(model.init(jax.random.key(0), batch["image"])["params"])
    result = {}
    for sharding in ("replicate", "fsdp"):
        config.sharding = sharding
        mesh, tx = make_mesh(config), make_optimizer(config, 10)
        state = TrainState.create(params=params, tx=tx, mesh=mesh, ema=True)
        assert state.params["head"]["kernel"].sharding.is_fully_replicated
        kernel = state.params["Transformer"]["encoderblock_0"]["MlpBlock_0"]["Dense_0"]["kernel"]
        parts = {s.data.shape for s in kernel.addressable_shards}
        step = make_train_step(model, tx, mesh=mesh, accum_steps=2, ema_decay=0.9)
        program = step.lower(state, batch).compile()
        names = ("all-gather", "all-to-all", "collective-permute")
        moves = {n: len(re.findall(rf" {n}(-start)?\\(", program.as_text())) for n in names}
        losses = []
        for _ in range(5):
            state, metrics = step(state, jax.device_put(batch, batch_sharding(mesh)))
            losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
        places = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state,
                              shardings(state, mesh))
        same = jax.tree.map(lambda a, b: a.sharding == b.sharding, state.params, state.ema)
        assert all(jax.tree.leaves((places, same))) and step._cache_size() == 1
        after = jax.tree.leaves(to_host(state.params))
        norm = sum(float(np.abs(x).sum(dtype=np.float64)) for x in after)
        result[sharding] = dict(losses=losses, moves=moves, parts=sorted(parts), norm=norm,
                                temp=program.memory_analysis().temp_size_in_bytes)

    # Without dropout, of which these draw other numbers.
    model, result["knobs"] = model.clone(dropout_rate=0.0), {}
    for fields in ({}, dict(compile="pmap"), dict(sharding="fsdp", remat="full"),
                   dict(sharding="fsdp", scan_layers=True), dict(scan_layers=True, remat="dots"),
                   dict(sharding="fsdp", scan_layers=True, remat="full")):
        config.update(dict(sharding="replicate", scan_layers=False, remat="none") | fields)
        network, own = as_trained(config, model, params)
        mesh = make_mesh(config)
        state = TrainState.create(params=own, tx=tx, mesh=mesh)
        step = make_train_step(network, tx, mesh=mesh, accum_steps=2,
                               compile=fields.get("compile", "jit"))
        losses = []
        for _ in range(4):
            state, metrics = step(state, jax.device_put(batch, batch_sharding(mesh)))
            losses.append([float(x) for x in metrics.values()])
        result["knobs"][str(fields)] = losses
        if fields.get("scan_layers"):
            kernel = state.params["Transformer"]["encoderblock"]["MlpBlock_0"]["Dense_0"]["kernel"]
            assert kernel.shape == (2, 64, 256)
            parts = jax.device_count() if config.sharding == "fsdp" else 1
            assert {s.data.shape for s in kernel.addressable_shards} == {(2, 64, 256 // parts)}
    print(json.dumps(result))
"""


def steps_on(devices):
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    code = [sys.executable, "-c", textwrap.dedent(STEPS)]
    done = subprocess.run(code, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_sharding_and_the_number_of_devices_change_where_the_state_lies_and_no_figure():
    one, eight = steps_on(1), steps_on(8)
    reference = one["replicate"]
    for found in (one["fsdp"], eight["replicate"], eight["fsdp"]):
        np.testing.assert_allclose(found["losses"], reference["losses"], rtol=1e-4)
        assert found["norm"] == pytest.approx(reference["norm"], rel=1e-5)
    expected = one["knobs"]["{}"]
    for found in (*one["knobs"].values(), *eight["knobs"].values()):
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert eight["replicate"]["parts"] == [[64, 256]]
    assert eight["fsdp"]["parts"] == [[64, 32]]
    assert not any(eight["replicate"]["moves"].values())
    assert eight["fsdp"]["moves"]["all-gather"] > 0
    # Weights travel, images stay.
    assert eight["fsdp"]["moves"]["all-to-all"] == 0
    assert eight["fsdp"]["moves"]["collective-permute"] == 0
