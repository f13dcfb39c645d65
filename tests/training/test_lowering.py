"""The program of a training step as a GPU or a TPU gets it, lowered on this machine.

It proves that the step can be lowered for them, what is in the program, and that JAX's own checks
of cuDNN's attention pass. What their compilers make of it, only they can tell.
"""

import itertools
import os
import re
import subprocess
import sys
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax import export
from jax.sharding import AbstractMesh, AxisType

from vit_jax import create_model
from vit_jax.models import kernels as kernels_module
from vit_jax.models.kernels import CUDNN, Kernels, choose_kernels, cpu_kernels
from vit_jax.models.stack import BlockLoop, stack_blocks
from vit_jax.sharding import shardings
from vit_jax.training import TrainState, default_config, make_mesh, make_optimizer, make_train_step
from vit_jax.training.state import new_guard

# Wide enough for some weights to be split over 8 devices.
VIT = dict(patch_size=(4, 4), hidden_size=128, num_layers=2, num_heads=2, mlp_dim=256)
T2T = dict(hidden_size=128, num_layers=2, num_heads=2, mlp_dim=256)
SWIN = dict(patch_size=(2, 2), hidden_size=128, depths=(2,), heads=(2,), window=3)
SWIN |= dict(pretrained_windows=(0,))
MIXER = dict(patch_size=(4, 4), hidden_size=128, num_layers=2, tokens_mlp_dim=8)
FAMILIES = {
    "class token": ("ViT-Ti_16", VIT),
    "mean": ("ViT-S_16-gap-norep", VIT),
    "attention pooling": ("ViT-mu_16", VIT),
    "hybrid": ("R+ViT-Ti_16", VIT | dict(patch_size=(1, 1), resnet=(1,))),
    "Mixer": ("Mixer-B_16", MIXER | dict(channels_mlp_dim=256)),
    "Swin": ("Swin-T_4-w7", SWIN),
    "Swin v2": ("SwinV2-T_4-w8", SWIN),
    "T2T": ("T2T-ViT-7", T2T),
    "T2T of a transformer": ("T2T-ViT-t-14", T2T),
}
SIZE, BATCH = (16, 16), 16
ONE = AbstractMesh((1, 1), ("replica", "fsdp"), axis_types=(AxisType.Auto,) * 2)
EIGHT = AbstractMesh((1, 8), ("replica", "fsdp"), axis_types=(AxisType.Auto,) * 2)
# (mesh, loop) -> the barriers by which remat keeps XLA from merging what is computed twice: one a
# block that isn't in a loop; of weights in parts one, around all that is not computed again.
LAYOUTS = {
    "one device": (ONE, BlockLoop(), 0),
    "remat": (ONE, BlockLoop(remat="dots"), 2),
    "fsdp": (EIGHT, BlockLoop(), 1),
    "fsdp, scan, remat": (EIGHT, BlockLoop(scan=True, remat="full"), 0),
}


def network(family: str):
    name, fields = FAMILIES[family]
    return create_model(name, num_classes=10, dtype=jnp.bfloat16, **fields)


def step_and_arguments(model, mesh):
    """The compiled step and the shapes of its arguments, in their places."""
    tx = make_optimizer(default_config(), 100, model.frozen)
    image = jax.ShapeDtypeStruct((1, *SIZE, 3), jnp.float32)
    params = jax.eval_shape(model.clone(loop=BlockLoop()).init, jax.random.key(0), image)["params"]
    if model.loop.scan:
        params = jax.eval_shape(stack_blocks, params)
    state = TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32),
        params=params,
        opt_state=jax.eval_shape(tx.init, params),
        seed=jax.ShapeDtypeStruct((), jnp.uint32),
        guard=new_guard(),
        ema=None,
    )
    state = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        state,
        shardings(state, mesh),
    )
    batch = {
        "image": jax.ShapeDtypeStruct((BATCH, *SIZE, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((BATCH,), jnp.int32),
    }
    return make_train_step(model, tx, mesh=mesh), (state, batch)


def lowered(model, mesh, *platforms: str) -> Counter:
    """How often each operation occurs in the program of a step, for each of the platforms."""
    step, arguments = step_and_arguments(model, mesh)
    cudnn = [f"__cudnn$fmhaSoftmax{way}" for way in ("", "Backward")]
    program = export.export(
        step,
        platforms=platforms,
        disabled_checks=[*map(export.DisabledSafetyCheck.custom_call, cudnn)],
    )(*arguments)
    assert program.nr_devices == mesh.size
    return Counter(
        re.findall(r"stablehlo\.(?!custom_call)\w+|custom_call @[\w$]+", program.mlir_module())
    )


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        # Each family in one layout, and one family in each.
        pytest.param(*pair, marks=[pytest.mark.slow, pytest.mark.ci] if 0 not in at else [])
        for at, pair in zip(
            itertools.product(range(len(FAMILIES)), range(len(LAYOUTS))),
            itertools.product(FAMILIES, LAYOUTS),
            strict=True,
        )
    ],
)
def test_gpus_and_tpus_get_no_form_for_cpus(monkeypatch, family, layout):
    """Those have barriers, to keep XLA's compiler for CPUs from what is slow there."""
    mesh, loop, barriers = LAYOUTS[layout]
    model = network(family)
    for platform in ("gpu", "tpu"):
        monkeypatch.setattr(kernels_module, "platform_of", lambda _, platform=platform: platform)
        assert choose_kernels(model, SIZE, jax.devices())[0] == Kernels()

    operations = lowered(model.clone(loop=loop), mesh, "cuda", "tpu")

    assert operations["stablehlo.optimization_barrier"] == barriers
    assert not [name for name in operations if "custom_call" in name]  # Nor calls of the host.
    assert operations["stablehlo.dot_general"] > 20


def test_the_forms_for_cpus_would_be_found():
    model = network("class token").clone(kernels=cpu_kernels(1))
    assert lowered(model, make_mesh(), "cuda")["stablehlo.optimization_barrier"] > 5


@pytest.fixture
def gpu_with_cudnn(monkeypatch):
    """JAX's checks of cuDNN's attention ask for its version and the GPU: those of an H100."""
    module = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(module, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(module, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(module, "is_cuda_compute_capability_equal", lambda capability: False)


def test_cudnn_takes_what_a_class_token_makes_odd(gpu_with_cudnn):
    """In each of two blocks, forwards and backwards."""
    operations = lowered(network("class token").clone(kernels=CUDNN), make_mesh(), "cuda")

    assert operations["custom_call @__cudnn$fmhaSoftmax"] == 2
    assert operations["custom_call @__cudnn$fmhaSoftmaxBackward"] == 2


EIGHT_DEVICES = """
from jax._src.cudnn import fused_attention_stablehlo as checks
checks.check_cudnn_version = lambda: 91000
checks.check_compute_capability = lambda capability: True
checks.is_cuda_compute_capability_equal = lambda capability: False

import jax, re
from ml_collections import ConfigDict
from tests.training.test_lowering import BlockLoop, CUDNN, network, step_and_arguments
from vit_jax.training import make_mesh

for sharding in ("replicate", "fsdp"):
    mesh = make_mesh(ConfigDict(dict(batch=16, accum_steps=1, sharding=sharding)))
    for loop in (BlockLoop(), BlockLoop(scan=True, remat="full")):
        model = network("class token").clone(kernels=CUDNN, loop=loop)
        step, arguments = step_and_arguments(model, mesh)
        program = step.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
        print(len(re.findall("CustomSPMDPartitioning", program)))
"""


@pytest.mark.slow
@pytest.mark.ci
def test_cudnn_is_split_with_the_batch_over_eight_devices():
    """Each call is one that JAX splits. Forwards and backwards in each block, or once in a loop,
    where remat computes the forward one again."""
    pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    done = subprocess.run(
        [sys.executable, "-c", EIGHT_DEVICES],
        env=os.environ
        | {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["4", "3", "4", "3"]


def test_cudnn_refuses_odd_numbers_of_tokens(gpu_with_cudnn):
    """Why they are padded."""
    unpadded = Kernels(attention=CUDNN.attention)
    with pytest.raises(NotImplementedError, match="Unsupported sequence length Q 17, KV 17"):
        lowered(network("class token").clone(kernels=unpadded), make_mesh(), "cuda")
