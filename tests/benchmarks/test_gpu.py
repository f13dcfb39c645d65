"""The benchmark for GPUs runs in a tiny form, and what it is made of computes and judges right."""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.training import default_config, make_optimizer

ROOT = Path(__file__).resolve().parents[2]
BENCHMARK = ROOT / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("gpu", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu"] = module  # Dataclasses look their module up.
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu"]


# Packages that a bare image with a GPU lacks.
LACKING = ("grain", "array_record", "portpicker", "tensorboardX", "zstandard")
LACKING += ("importlib_resources", "tensorflow_datasets")


def run(*options: str, lacking: tuple[str, ...], folder: Path) -> subprocess.CompletedProcess:
    """The script from another folder, where some packages can't be imported."""
    lines = [f"import sys; sys.modules.update(dict.fromkeys({lacking!r}))"]
    (folder / "sitecustomize.py").write_text("\n".join(lines))
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, str(BENCHMARK), "--tiny", "--minutes=3", *options],
        cwd=folder,
        env=env | {"PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.ci
def test_a_tiny_form_runs_on_a_cpu_without_what_a_bare_image_lacks(tmp_path):
    out = tmp_path / "gpu.md"
    out.write_text("# Before\n\nThis list of variants has not run on a GPU yet.\n")
    options = ["--variants=^(stock|cudnn)$", f"--out={out}"]
    done = run(*options, lacking=(*LACKING, "timm", "torch"), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    text = out.read_text()
    assert text.startswith("# Before\n\n## cpu, ")
    assert text.endswith(done.stdout.rstrip("\n") + "\n")
    number = r"[\d,.]+"
    for form in ("train", "forward"):
        measured = rf"\| tiny, 8 \| {form} \| stock \| {number} \| {number} \| {number}% \| - \|"
        assert re.search(measured, text)
        assert re.search(rf"\| tiny, 8 \| {form} \| cudnn \| RuntimeError: .*cuDNN", text)
        assert re.search(
            rf"\| tiny, 8 \| {form} \| timm torch.compile \| not installed: timm", text
        )
    assert "No MFU: the peak of cpu is not known." in text
    assert "tiny: best is **stock**, torch.compile was not measured" in text
    assert "no goals for this device" in text
    assert "tiny: no device events in the trace" in text


def test_what_cannot_be_run_is_told_in_one_line(tmp_path):
    for lacking, option, expected in [
        (("ml_collections",), "", "missing: ml_collections. Run: pip install ml_collections"),
        ((), "--torch-python=no-such", "--torch-python: there is no program no-such"),
        ((), "--networks=B/16", "unknown network 'B/16': known are tiny"),
    ]:
        done = run(*[option] * bool(option), lacking=lacking, folder=tmp_path)
        assert done.returncode == 1
        (line,) = done.stderr.strip().splitlines()
        assert line.startswith(expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_patches_as_a_product_are_the_convolution(gpu, dtype):
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (2, 12, 8, 3), dtype)
    kernel = jax.random.normal(keys[1], (4, 2, 3, 5), dtype)

    def of(function, x, kernel):
        # As Flax calls it.
        numbers = jax.lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
        y = function(
            x,
            kernel,
            (4, 2),
            "VALID",
            lhs_dilation=(1, 1),
            rhs_dilation=(1, 1),
            dimension_numbers=numbers,
            feature_group_count=1,
            precision=None,
        )
        return jnp.sin(y.astype(jnp.float32)).sum()

    product, convolution = (
        functools.partial(of, function)
        for function in (gpu.patches_as_product, jax.lax.conv_general_dilated)
    )
    assert "conv_general_dilated" not in str(jax.make_jaxpr(product)(x, kernel))
    found, expected = (
        jax.tree.leaves(jax.value_and_grad(function, (0, 1))(x, kernel))
        for function in (product, convolution)
    )
    tolerance = 1e-5 if dtype == jnp.float32 else 0.05
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.float32(a), np.float32(b), tolerance, 10 * tolerance)


@pytest.mark.parametrize(
    ("strides", "padding", "more"),
    [
        ((2, 2), "VALID", {}),
        ((4, 2), "SAME", {}),
        ((4, 2), [(1, 1), (0, 0)], {}),
        ((4, 2), "VALID", {"rhs_dilation": (2, 1)}),
        ((4, 2), "VALID", {"dimension_numbers": ("NWHC", "HWIO", "NHWC")}),
        ((4, 2), [(0, 0), (0, 0)], {"lhs_dilation": (2, 1)}),
        ((5, 2), "VALID", {}),
    ],
)
def test_any_other_convolution_is_left_to_jax(gpu, strides, padding, more):
    x, kernel = jnp.ones((2, 13, 8, 3)), jnp.ones((4, 2, 3, 5))
    more = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")} | more
    y = gpu.patches_as_product(x, kernel, strides, padding, **more)
    expected = jax.lax.conv_general_dilated(x, kernel, strides, padding, **more)
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("optim_dtype", ["bfloat16", "float32"])
def test_one_pass_of_the_optimizer_is_the_optimizer(gpu, optim_dtype):
    config = default_config()
    config.optim_dtype, config.warmup_steps = optim_dtype, 2
    params = {"a": {"kernel": jnp.ones((3, 4))}, "b": jnp.ones(5)}
    made = [make(config, 10) for make in (make_optimizer, gpu.one_pass)]
    states = [tx.init(params) for tx in made]
    for i in range(4):
        size = 10.0 ** (i - 1)  # Some gradients are clipped, some not.
        keys = jax.random.split(jax.random.key(i))
        grads = {"a": {"kernel": jax.random.normal(keys[0], (3, 4)) * size}}
        grads["b"] = jax.random.normal(keys[1], (5,)) * size
        results = [jax.jit(tx.update)(grads, s, params) for tx, s in zip(made, states, strict=True)]
        states = [state for _, state in results]
        for a, b in zip(*map(jax.tree.leaves, results), strict=True):
            np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=1e-6)
        first, second = (jax.tree.map(lambda x: x.dtype, state) for state in states)
        assert first == second


def trace_of(*events):
    """Two lines of a GPU that count, one that repeats them, and the host."""
    names = {1: "/device:GPU:0", 2: "/host:CPU"}
    lines = {(1, 13): "Stream #13(Compute)", (1, 14): "Stream #14(MemcpyD2D)"}
    lines |= {(1, 99): "XLA Ops", (2, 5): "python3"}
    told = [
        {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}
        for pid, name in names.items()
    ]
    told += [
        {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}}
        for (pid, tid), name in lines.items()
    ]
    told.append({"ph": "M", "name": "process_sort_index", "pid": 1, "args": {"sort_index": 1}})
    return {"traceEvents": [*told, *events, {}]}


def event(name, microseconds, op="", line=(1, 13)):
    args = {"hlo_op": op} if op else {}
    pid, tid = line
    return {"ph": "X", "name": name, "pid": pid, "tid": tid, "dur": microseconds, "args": args}


BLOCK = "jit(step)/jvp(VisionTransformer)/Transformer/encoderblock_0"
HLO = f"""
HloModule jit_step
  %cublas.1 = (bf16[8], s8[4]) custom-call(%a), custom_call_target="__cublas$gemm", metadata={{op_name="{BLOCK}/MlpBlock_0/Dense_0/dot_general"}}
  loop_add_fusion.7 = bf16[8] fusion(%a), kind=kLoop, metadata={{op_name="{BLOCK}/MlpBlock_0/tanh"}}
  ROOT %fusion.3 = f32[] fusion(%b), kind=kInput, metadata={{op_name="jit(step)/reduce_sum"}}
"""  # noqa: E501


def test_the_time_of_a_step_is_divided_by_what_its_kernels_do(gpu):
    trace = trace_of(
        event("nvjet_hsh_192x192_64x3_1x2_h_bz_coopB_TNT", 4000, "cublas.1"),
        event("loop_add_fusion_7", 1000),  # In a CUDA graph no operation is told.
        event("input_reduce_fusion_3", 500, "fusion.3"),
        event("MemcpyD2D", 100, line=(1, 14)),
        event("unknown_kernel_12", 60),
        event("cublas.1", 4000, line=(1, 99)),
        event("python", 9000, line=(2, 5)),
    )
    events = gpu.device_events(trace)
    assert gpu.spent(events, gpu.operations(HLO), steps=2) == {
        "products of matrices": 2.0,
        "GELU": 0.5,
        "optimizer, norms, state": 0.25,
        "copies and fills": 0.05,
        "unknown_kernel": 0.03,
    }


def test_a_trace_without_devices_has_no_events(gpu):
    assert gpu.device_events(trace_of(event("python", 9000, line=(2, 5)))) == []
    assert gpu.spent([], {}, steps=1) == {}


PRODUCTS, ATTENTION = "products of matrices", "MultiHeadDotProductAttention_0"


@pytest.mark.parametrize(
    ("kernel", "target", "place", "expected"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop", "", "", "attention"),
        ("fusion", "__cudnn$fmhaSoftmax", "", "attention"),
        ("gemm_fusion_dot_12", "", f"{BLOCK}/MlpBlock_0/Dense_1/dot_general", PRODUCTS),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "", "", PRODUCTS),
        ("gemm_fusion_dot_1", "", f"{BLOCK}/{ATTENTION}/nhts,nshc->nthc/dot_general", "attention"),
        ("loop_fusion", "", f"{BLOCK}/{ATTENTION}/exp", "attention"),
        ("nvjet_tst", "", f"{BLOCK}/{ATTENTION}/query/dot_general", PRODUCTS),
        (
            "loop_fusion",
            "",
            f"{BLOCK}/{ATTENTION}/out/add",
            "query, key, value, out: biases, casts",
        ),
        ("sm90_xmma_fprop_implicit_gemm_bf16", "", "", "convolution"),
        ("wgrad_alg0_engine", "__cudnn$convBackwardFilter", "", "convolution"),
        ("loop_convert_fusion_4", "", f"{BLOCK}/LayerNorm_1/reduce_sum", "LayerNorm"),
        (
            "loop_fusion",
            "",
            "jit(step)/transpose(jvp(X))/Transformer/encoder_norm/mul",
            "LayerNorm",
        ),
        ("loop_fusion", "", f"{BLOCK}/MlpBlock_0/jit(gelu)/tanh", "GELU"),
        ("loop_fusion", "", f"{BLOCK}/MlpBlock_0/Dense_0/add", "MLP: biases, casts"),
        ("loop_fusion", "", f"{BLOCK}/add", "residual sums"),
        ("fusion", "", "jit(step)/jvp(X)/embedding/add", "patches, positions, head, loss"),
        ("loop_multiply_fusion_2", "", "jit(step)/mul", "optimizer, norms, state"),
        ("loop_multiply_fusion_2", "", "", "loop_multiply_fusion"),
        ("MemcpyH2D", "", "", "copies and fills"),
    ],
)
def test_kernels_are_told_apart_by_name_library_and_place(gpu, kernel, target, place, expected):
    assert gpu.classify(kernel, target, place) == expected


def rows(gpu, *found):
    """(network, name, images/s) of training steps; a last True: not the same as timm's."""
    return [
        gpu.Row(network, name, "train", 100, not unfair, [1e5 / rate] if rate else [])
        for network, name, rate, *unfair in found
    ]


HELLO = {"tflops": 989.0, "goals": True, "flops": {"B/16": 35e9, "S/16": 9e9, "Ti/16": 2e9}}


def test_the_best_variant_is_judged_by_the_goals(gpu):
    found = rows(
        gpu,
        ("B/16", "stock", 3000),
        ("B/16", "cudnn", 3700),
        ("B/16", "cudnn, batch x 2", 9999, True),
        ("B/16", "timm eager", 2500),
        ("B/16", "timm torch.compile", 3200),
        ("S/16", "cudnn", 8800),
        ("S/16", "timm torch.compile", 8100),
        ("Ti/16", "cudnn", 20000),
        ("Ti/16", "timm torch.compile", 0),
    )
    assert gpu.judged(found, HELLO) == [
        "B/16: best is **cudnn**, 1.16 times torch.compile, 39.3% MFU; goal of 1.15 times met; "
        "goal of 42% MFU missed",
        "S/16: best is **cudnn**, 1.09 times torch.compile, 24.0% MFU; goal of 1.15 times missed",
        "Ti/16: best is **cudnn**, torch.compile was not measured, 12.1% MFU; "
        "no goals for this network",
    ]


def test_other_devices_have_no_goals_and_an_unmeasured_ratio_is_not_met(gpu):
    found = rows(gpu, ("B/16", "cudnn", 3700), ("B/16", "timm torch.compile", 0))
    assert gpu.judged(found, HELLO) == [
        "B/16: best is **cudnn**, torch.compile was not measured, 39.3% MFU; "
        "goal of 1.15 times not measured; goal of 42% MFU missed"
    ]
    other = HELLO | {"goals": False, "tflops": None}
    assert gpu.judged(found, other) == [
        "B/16: best is **cudnn**, torch.compile was not measured, no MFU; no goals for this device"
    ]
    nothing = rows(gpu, ("B/16", "cudnn", 0))
    assert gpu.judged(nothing, HELLO) == ["B/16: none of our variants was measured"]


def test_what_matters_most_is_compiled_first(gpu):
    found = [{"name": str(i), "forward": i == 0} for i in range(gpu.FIRST + 1)]
    keys = gpu.planned(["B/16", "S/16"], found)
    last = str(gpu.FIRST)
    assert len(keys) == len({json.dumps(key) for key in keys}) == 2 * (gpu.FIRST + 2)
    assert keys[-2:] == [("B/16", last, "train"), ("S/16", last, "train")]
    assert [key[2] for key in keys[:6]] == ["train"] * 6
    assert {key[0] for key in keys[:6]} == {"B/16", "S/16"}


class Stand:
    """In place of a process: answers at once, or as it is told to, and notes what is asked."""

    def __init__(self, log, name, failing=()):
        self.log, self.name, self.failing = log, name, failing

    def ask(self, method, seconds, **arguments):
        key = arguments.get("key", [""])
        self.log.append((self.name, method, *key))
        return (
            {"note": "RuntimeError: out of memory"} if set(key) & set(self.failing) else {"ms": 5}
        )

    def end(self):
        self.log.append((self.name, "end"))


def test_all_take_turns_and_larger_batches_run_when_torch_has_left_the_card(gpu):
    log, hello = [], {}
    ours = Stand(log, "ours", failing=["stock"])
    found = [gpu.Row("B/16", name, "train", 8) for name in ("cudnn", "stock", gpu.TORCH[1])]
    found += [gpu.Row("B/16", "cudnn, batch x 2", "train", 16, fair=False)]
    found += [gpu.Row("B/16", "cudnn, more", "train", 8, note="left out: no time to compile it")]
    theirs = {"B/16": Stand(log, "timm")}
    gpu.timing(["B/16"], found, ours, theirs, time.time() + 60, 2, hello)
    assert log == [
        ("ours", "reserve", ""),
        ("ours", "time", "B/16", "cudnn", "train"),
        ("ours", "time", "B/16", "stock", "train"),
        ("timm", "time", gpu.TORCH[1], "train"),
        ("timm", "time", gpu.TORCH[1], "train"),
        ("ours", "time", "B/16", "cudnn", "train"),
        ("timm", "end"),
        ("ours", "profile", "B/16", "cudnn", "train"),
        *[("ours", "time", "B/16", "cudnn, batch x 2", "train")] * 2,
    ]
    assert [row.ms for row in found] == [5, None, 5, 5, None]
    assert found[1].note == "RuntimeError: out of memory"
    assert hello["spent"]["B/16"][0] == "cudnn"


def test_what_there_is_no_time_for_is_told(gpu):
    hello, found = {}, [gpu.Row("B/16", "cudnn", "train", 8)]
    stands = Stand([], "ours"), {"B/16": Stand([], "timm")}
    gpu.timing(["B/16"], found, *stands, time.time() - 1, 2, hello)
    assert found[0].note == "left out: no time to run it"


def test_every_variant_has_a_name_of_its_own_and_can_be_a_key(gpu):
    found = gpu.variants()
    assert len({variant.name for variant in found}) == len(set(found)) == len(found)
