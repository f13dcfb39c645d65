"""How fast a GPU trains and runs our networks, in several forms, beside timm and torch.compile.

    python benchmarks/gpu.py [--networks=B/16,...] [--minutes=5] [--tiny] [--torch-python=PYTHON]

Needs no data, and no installed package: a checkout, jax, flax, optax, opencv, scipy and
ml_collections. torch and timm may be those of another Python.

All do the same: bfloat16, images of 224 px on the device, 1,000 classes, no dropout; forwards only,
or forwards, backwards, the gradient clipped to norm 1, SGD with momentum. Ours is the step of
`vit-jax train` (which normalises uint8 images and returns norms besides) in each of `variants()`;
timm's has autocast, a fused SGD and PyTorch's own fused attention. First everything is compiled, in
threads, while torch compiles in processes beside; then all of a network take turns on the same
card, and figures are medians of the rounds. What could not be compiled, or was left out for lack of
time, is a row that says so.

MFU is 3 x (forward: 1 x) the operations of the way forwards / (time x the chip's peak). The report
begins with the best variant of each network and whether GOALS are met; it is printed and added to
benchmarks/results/gpu.md, or `--out`. `--variants=PATTERN` and `--networks` leave more time for the
rest. Without a GPU `--tiny` shows that the script works.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import glob
import gzip
import importlib.util
import json
import os
import queue
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("jax", "flax", "optax", "numpy", "cv2", "scipy", "ml_collections")
ROUNDS = 3
FORMS = ("train", "forward")
TORCH = ("timm eager", "timm torch.compile")
# Of an NVIDIA H100 (SXM): times the speed of torch.compile in the same run, and least MFU.
GOALS = {"B/16": (1.15, 0.42), "S/16": (1.15, 0.0), "L/16": (1.05, 0.0)}
WHERE = """
Where the time of a training step of the best variant goes, ms; a kernel of several operations
counts as what the last of them is for:

"""
# Stands in the results as long as it is true.
NOT_RUN = "This list of variants has not run on a GPU yet.\n"


@dataclasses.dataclass(frozen=True)
class Network:
    """Ours and timm's of the same shape; `ours` and `timm` are fields that differ from theirs."""

    names: tuple[str, str]
    batch: int
    size: int = 224
    classes: int = 1000
    ours: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    timm: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# In the order of their importance.
NETWORKS = {
    "B/16": Network(("ViT-B_16", "vit_base_patch16_224"), 256),
    "S/16": Network(("ViT-S_16", "vit_small_patch16_224"), 512),
    "L/16": Network(("ViT-L_16", "vit_large_patch16_224"), 128),
    "Ti/16": Network(("ViT-Ti_16", "vit_tiny_patch16_224"), 1024),
    "Swin-T": Network(("Swin-T_4-w7", "swin_tiny_patch4_window7_224"), 256),
}
TINY = {
    "tiny": Network(
        ("ViT-Ti_16", "vit_tiny_patch16_224"),
        batch=8,
        size=32,
        classes=10,
        ours=dict(num_layers=2, hidden_size=64, mlp_dim=128, num_heads=2),
        timm=dict(depth=2, embed_dim=64, mlp_ratio=2, num_heads=2, img_size=32),
    )
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One form of our step.

    Attributes:
      name: in the table.
      kernels: of the model, a `vit_jax.models.kernels.Kernels`.
      optimizer: from a configuration and a number of steps, as `make_optimizer`.
      options: of XLA, (name, value) each.
      batch: times the network's.
      update_norm_every: how often the norm of the update is computed.
      fields: of the model, (name, value) each. With another batch or fields a variant is not
        compared with timm.
      forward: whether the way forwards alone is measured, too.
    """

    name: str
    kernels: Any
    optimizer: Callable | None = None
    options: tuple[tuple[str, Any], ...] = ()
    batch: int = 1
    update_norm_every: int = 1
    fields: tuple[tuple[str, Any], ...] = ()
    forward: bool = False


FIRST = 3  # So many variants are measured for every network before any network gets the others.


def variants() -> list[Variant]:
    """All forms of our step, the most important first."""
    import flax.linen as nn

    from vit_jax.models import kernels

    stock, cudnn = kernels.Kernels(), kernels.CUDNN
    product = dict(conv_general_dilated=patches_as_product)
    triton_off = ("xla_gpu_enable_triton_gemm", False)

    def form(name: str, base: kernels.Kernels = cudnn, **changed: Any) -> Callable[..., Variant]:
        return functools.partial(Variant, name, dataclasses.replace(base, **changed))

    return [
        form("cudnn")(forward=True),
        form("cudnn, product and one pass", **product)(optimizer=one_pass, forward=True),
        form("stock", stock)(forward=True),
        form("cudnn, patches as a product", **product)(),
        form("cudnn, GELU in bfloat16 (less exact)", gelu=nn.gelu)(),
        form("cudnn, one pass of the optimizer")(optimizer=one_pass),
        form("cudnn, batch x 2")(batch=2),
        form("cudnn, Triton's products off")(options=(triton_off,)),
        form("cudnn, cuBLASLt's epilogues")(
            options=(("xla_gpu_enable_cublaslt", True), triton_off)
        ),
        form("cudnn, GELU recomputed", gelu=kernels.recomputed_gelu)(),
        form("cudnn, LayerNorm with own derivative", layer_norm=kernels.LayerNorm)(),
        form("cudnn, product and one pass, batch x 2", **product)(optimizer=one_pass, batch=2),
        form("cudnn, norm of the update every 20 steps")(update_norm_every=20),
        form("cudnn, command buffers off")(options=(("xla_gpu_enable_command_buffer", ""),)),
        form("cudnn, latency-hiding scheduler")(
            options=(("xla_gpu_enable_latency_hiding_scheduler", True),)
        ),
        form("stock, product and one pass", stock, **product)(optimizer=one_pass),
        form("cudnn, dropout 0.1")(fields=(("dropout_rate", 0.1),)),
    ]


def patches_as_product(
    lhs: Any,
    rhs: Any,
    window_strides: Any,
    padding: Any,
    lhs_dilation: Any = None,
    rhs_dilation: Any = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    **more: Any,
) -> Any:
    """`jax.lax.conv_general_dilated`, as a product of matrices where windows are side by side.

    For channels last, no padding, a stride of the window's size that divides the image, and
    arithmetic by default; anything else is left to JAX.

    Args:
      lhs: (n, h, w, c). rhs: (p, q, c, d).

    Returns:
      (n, h / p, w / q, d).
    """
    import jax

    numbers = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    channels_last = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, ("NHWC", "HWIO", "NHWC"))
    default = all(set(x or (1,)) == {1} for x in (lhs_dilation, rhs_dilation))
    default = default and feature_group_count == batch_group_count == 1 and not more
    default = default and preferred_element_type in (None, lhs.dtype)
    unpadded = padding == "VALID" or all(tuple(x) == (0, 0) for x in padding)
    if not (
        numbers == channels_last
        and default
        and isinstance(padding, str | tuple | list)
        and unpadded
        and tuple(window_strides) == rhs.shape[:2]
        and not lhs.shape[1] % rhs.shape[0]
        and not lhs.shape[2] % rhs.shape[1]
    ):
        return jax.lax.conv_general_dilated(
            lhs, rhs, window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers,
            feature_group_count, batch_group_count, precision, preferred_element_type, **more,
        )  # fmt: skip
    (n, h, w, c), (p, q, _, d) = lhs.shape, rhs.shape
    patches = lhs.reshape(n, h // p, p, w // q, q, c).transpose(0, 1, 3, 2, 4, 5)
    patches = patches.reshape(n, h // p, w // q, p * q * c)
    return jax.numpy.matmul(patches, rhs.reshape(-1, d), precision=precision)


def one_pass(config: Any, total_steps: int) -> Any:
    """`make_optimizer` of SGD without decay, as one function of each weight, of the same state."""
    import jax
    import jax.numpy as jnp
    import optax

    from vit_jax.training.optimizer import make_optimizer, schedule_of

    assert config.optim == "sgd"
    assert config.grad_norm_clip > 0 == config.weight_decay
    schedule = schedule_of(config, total_steps)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        clip, trace, scale = state
        factor = jnp.minimum(1.0, config.grad_norm_clip / optax.tree.norm(grads))
        rate = -schedule(scale.count)

        def one(grad: Any, moment: Any) -> tuple[Any, Any]:
            new = grad * factor.astype(grad.dtype) + config.momentum * moment
            return rate.astype(new.dtype) * new, new.astype(moment.dtype)

        pairs = jax.tree.map(one, grads, trace.trace)
        updates, moments = jax.tree.transpose(
            jax.tree.structure(grads), jax.tree.structure((0, 0)), pairs
        )
        count = optax.safe_increment(scale.count)
        return updates, (clip, trace._replace(trace=moments), scale._replace(count=count))

    return optax.GradientTransformation(make_optimizer(config, total_steps).init, update)


@dataclasses.dataclass
class Row:
    """What was found of one program; `note` says why there is no time.

    `fair` if it does the same as timm's. `seconds` it took to compile; `memory` bytes in all,
    `temporary` those beside what goes in.
    """

    network: str
    name: str
    form: str
    batch: int
    fair: bool = True
    rounds: list[float] = dataclasses.field(default_factory=list)
    seconds: float | None = None
    memory: int | None = None
    temporary: int | None = None
    note: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.network, self.name, self.form

    @property
    def ms(self) -> float | None:
        return statistics.median(self.rounds) if self.rounds else None

    @property
    def images_per_s(self) -> float:
        """0 if it was not measured."""
        return 1000 * self.batch / self.ms if self.ms else 0.0


def first_line(error: BaseException) -> str:
    """Of an error's message, at most 150 characters, for a cell of a table."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:150].replace("|", "/")


# Our process.


class Ours:
    """Compiles and runs our programs on the first device, as the main process says."""

    def __init__(self, tiny: bool):
        import jax
        import numpy as np
        from jax.sharding import AxisType, Mesh

        self._networks = TINY if tiny else NETWORKS
        self._variants = {variant.name: variant for variant in variants()}
        self._device = jax.devices()[0]
        grid = np.array([[self._device]])
        self._mesh = Mesh(grid, ("replica", "fsdp"), axis_types=(AxisType.Auto,) * 2)
        self._programs: dict[tuple[str, ...], Any] = {}
        self._state: dict[str, Any] = {}  # Of the network at work.
        self._batches: dict[tuple[str, int], Any] = {}
        self._step_ms: dict[tuple[str, ...], float] = {}

    def hello(self) -> dict[str, Any]:
        """The device, its peak, operations of the networks' ways forwards, names of variants."""
        import flax
        import jax

        from vit_jax.models.cost import flops
        from vit_jax.training.hardware import CHIPS, find_chip

        chip = find_chip(self._device.device_kind)
        runtime = self._device.client.platform_version.replace("\n", " ")
        return {
            "device": self._device.device_kind,
            "platform": self._device.platform,
            "tflops": chip and chip.tflops,
            "goals": chip == CHIPS["H100"],
            "versions": f"JAX {jax.__version__}, flax {flax.__version__}, {runtime}",
            "flops": {
                name: flops(self._model(name, None), (net.size, net.size))
                for name, net in self._networks.items()
            },
            "variants": [
                {
                    "name": v.name,
                    "batch": v.batch,
                    "forward": v.forward,
                    "fair": v.batch == 1 and not v.fields,
                }
                for v in self._variants.values()
            ],
        }

    def compile(self, keys: list, start_until: float, wait_until: float) -> dict[str, Any]:
        """Compiles in threads; a dict of a row's fields for each (network, variant, form).

        Lowering holds the interpreter's lock, so that it happens here, one after the other.

        Args:
          start_until, wait_until: on the clock of `time.time`.
        """
        found: dict[tuple[str, ...], dict[str, Any]] = {}

        def compile(key: tuple[str, ...], lowered: Any, seconds: float) -> None:
            if time.time() > start_until:
                found[key] = {"note": "left out: no time to compile it"}
                return
            start = time.perf_counter()
            try:
                options = dict(self._variants[key[1]].options)
                program = lowered.compile(compiler_options=options)
            except Exception as e:
                found[key] = {"note": first_line(e)}
                return
            self._programs[key] = program
            found[key] = {"seconds": seconds + time.perf_counter() - start, **_memory(program)}
            print(f"compiled {', '.join(key)}", file=sys.stderr, flush=True)

        pool = ThreadPoolExecutor(max(2, (os.cpu_count() or 1) - 4))
        jobs, lowered = [], functools.cache(self._lower)
        for key in map(tuple, keys):
            start = time.perf_counter()
            if time.time() > start_until:
                found[key] = {"note": "left out: no time to compile it"}
                continue
            try:
                # Those that differ in XLA's options alone are lowered once.
                variant = dataclasses.replace(self._variants[key[1]], name="", options=())
                program = lowered(key[0], variant, key[2])
            except Exception as e:
                found[key] = {"note": first_line(e)}
                continue
            jobs.append(pool.submit(compile, key, program, time.perf_counter() - start))
        for job in jobs:
            with contextlib.suppress(TimeoutError):
                job.result(timeout=max(0, wait_until - time.time()))
        pool.shutdown(wait=False)
        return {
            json.dumps(key): found.get(
                tuple(key), {"note": "left out: compiling took too long, and went on beside"}
            )
            for key in keys
        }

    def time(self, key: list, turn: float) -> dict[str, Any]:
        """Milliseconds of a step, over about `turn` seconds; or a note why there are none."""
        key = tuple(key)
        try:
            if key not in self._step_ms:
                self._run(key, 1)
                self._step_ms[key] = self._run(key, 2)
            steps = max(2, round(1000 * turn / self._step_ms[key]))
            self._step_ms[key] = self._run(key, steps)
        except Exception as e:
            self._state.clear()  # Its arrays may have been donated.
            self._programs.pop(key, None)
            return {"note": first_line(e)}
        return {"ms": self._step_ms[key]}

    def reserve(self) -> dict[str, Any]:
        """Makes JAX's allocator take one piece of memory for all programs. It gives nothing back
        and joins nothing: from programs of growing needs torch would not get the card again."""
        import jax.numpy as jnp

        from vit_jax.training.hardware import memory_stats

        half = memory_stats(self._device).get("bytes_limit", 0) / 2
        sizes = [_memory(program).get("temporary", 0) for program in self._programs.values()]
        size = max((size for size in sizes if size <= half), default=0)
        with contextlib.suppress(RuntimeError):  # No room: the programs will say so.
            jnp.zeros(size, jnp.uint8).block_until_ready()
        return {}

    def profile(self, key: list, steps: int) -> dict[str, Any]:
        """Milliseconds a step by what they are spent on, see `spent`."""
        import jax

        key = tuple(key)
        try:
            with tempfile.TemporaryDirectory() as folder:
                jax.profiler.start_trace(folder)
                try:
                    self._run(key, steps)
                finally:
                    jax.profiler.stop_trace()
                files = glob.glob(f"{folder}/**/*.trace.json.gz", recursive=True)
                if not files:
                    return {"note": "the profiler wrote no trace"}
                with gzip.open(files[0]) as f:
                    trace = json.load(f)
        except Exception as e:
            return {"note": first_line(e)}
        text = self._programs[key].as_text() or ""
        return {"ms": spent(device_events(trace), operations(text), steps)}

    def _model(self, network: str, variant: Variant | None) -> Any:
        import jax.numpy as jnp

        import vit_jax

        net = NETWORKS.get(network) or TINY[network]
        fields = dict(net.ours, dtype=jnp.bfloat16, dropout_rate=0.0)
        if variant is not None:
            fields |= {"kernels": variant.kernels} | dict(variant.fields)
        return vit_jax.create_model(net.names[0], num_classes=net.classes, **fields)

    def _optimizer(self, variant: Variant) -> Any:
        from vit_jax.training import default_config, make_optimizer

        config = default_config()
        make = variant.optimizer or make_optimizer
        return make(config, config.total_steps)

    def _shapes(self, network: str, variant: Variant) -> Any:
        """Of the state."""
        import jax
        import numpy as np

        from vit_jax.training import TrainState
        from vit_jax.training.state import new_guard

        net, tx = self._networks[network], self._optimizer(variant)

        def state() -> TrainState:
            images = np.zeros((1, net.size, net.size, 3), np.float32)
            params = self._model(network, None).init(jax.random.key(0), images)["params"]
            scalars = dict(step=np.int32(0), seed=np.uint32(0), guard=new_guard())
            return TrainState(params=params, opt_state=tx.init(params), **scalars)

        return jax.eval_shape(state)

    def _new_state(self, network: str, variant: Variant) -> Any:
        """Random weights, of which nothing has to be compiled."""
        import jax
        import numpy as np

        from vit_jax.sharding import replicated

        noise = np.random.default_rng(0).normal(0, 0.02, 999_983).astype(np.float32)

        def weight(path: Any, x: Any) -> np.ndarray:
            return np.resize(noise, x.shape) + np.float32(path[-1].key == "scale")

        shapes = self._shapes(network, variant)
        state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
        params = jax.tree_util.tree_map_with_path(weight, shapes.params)
        return jax.device_put(state.replace(params=params), replicated(self._mesh))

    def _lower(self, network: str, variant: Variant, form: str) -> Any:
        import jax
        import numpy as np

        from vit_jax.sharding import replicated
        from vit_jax.training import make_train_step

        net, model = self._networks[network], self._model(network, variant)
        place = replicated(self._mesh)
        state, batch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            (self._shapes(network, variant), jax.eval_shape(lambda: _batch(net, variant.batch))),
        )
        if form == "forward":

            def forward(params: Any, images: Any) -> Any:
                images = (images.astype(np.float32) - 127.5) / 127.5
                return model.apply({"params": params}, images)

            return jax.jit(forward).lower(state.params, batch["image"])
        every = variant.update_norm_every
        step: Any = make_train_step(
            model,
            self._optimizer(variant),
            mesh=self._mesh,
            update_norm_at=None if every == 1 else lambda step: step % every == 0,
        )
        return step.lower(state, batch)

    def _run(self, key: tuple[str, ...], steps: int) -> float:
        """Milliseconds of each step. Raises ArithmeticError if what comes out is not finite."""
        import jax
        import numpy as np

        from vit_jax.sharding import batch_sharding

        (network, name, form), program = key, self._programs[key]
        variant, net = self._variants[name], self._networks[network]
        if network not in self._state:
            self._state = {}
            self._batches = {}
            self._state = {network: self._new_state(network, variant)}
        at = network, variant.batch
        if at not in self._batches:
            batch = jax.jit(lambda: _batch(net, variant.batch))()
            self._batches[at] = jax.device_put(batch, batch_sharding(self._mesh))
        batch, state = self._batches[at], self._state[network]
        jax.block_until_ready((state, batch))
        start = time.perf_counter()
        for _ in range(steps):
            if form == "forward":
                result = program(state.params, batch["image"])
            else:
                state, result = program(state, batch)
                self._state[network] = state
        jax.block_until_ready(result)
        ms = 1000 * (time.perf_counter() - start) / steps
        if not np.isfinite(result["loss"] if form == "train" else result).all():
            raise ArithmeticError("loss or outputs are not finite")
        return ms


def _batch(net: Network, times: int) -> dict[str, Any]:
    """Random uint8 images, and labels."""
    import jax
    import jax.numpy as jnp

    n = net.batch * times
    shape = (n, net.size, net.size, 3)
    images = jax.random.randint(jax.random.key(1), shape, 0, 256, jnp.uint8)
    return {"image": images, "label": jnp.arange(n, dtype=jnp.int32) % net.classes}


def _memory(program: Any) -> dict[str, int]:
    """Of a compiled program, as far as its platform tells."""
    try:
        told = program.memory_analysis()
        temporary = told.temp_size_in_bytes
        total = temporary + told.argument_size_in_bytes
        total += told.output_size_in_bytes - told.alias_size_in_bytes
    except (AttributeError, RuntimeError):  # None, or a figure is not there; not implemented.
        return {}
    return {"memory": total, "temporary": temporary}


# Traces.


def device_events(trace: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """(name, HLO operation or "", microseconds) of all that the devices did.

    Args:
      trace: what JAX's profiler writes as .trace.json.gz. Of a GPU the lines of its streams count,
        of a TPU that of its operations; others tell the same once more.
    """
    lines: dict[tuple[Any, Any], str] = {}
    devices = set()
    for event in trace["traceEvents"]:
        if event.get("ph") != "M":
            continue
        if event["name"] == "process_name" and "/device:" in event["args"]["name"]:
            devices.add(event["pid"])
        if event["name"] == "thread_name":
            lines[event["pid"], event["tid"]] = event["args"]["name"]
    counted = {
        line
        for line, name in lines.items()
        if line[0] in devices and (name.startswith("Stream") or name == "XLA Ops")
    }
    streams = {line for line in counted if lines[line].startswith("Stream")}
    return [
        (event["name"], str(event.get("args", {}).get("hlo_op", "")), float(event["dur"]))
        for event in trace["traceEvents"]
        if event.get("ph") == "X" and (event["pid"], event["tid"]) in (streams or counted)
    ]


def operations(hlo: str) -> dict[str, tuple[str, str]]:
    """(target of a custom call or "", place in the program or "") by the names of operations.

    Args:
      hlo: the text of a compiled program.
    """
    found = {}
    for line in hlo.splitlines():
        if name := re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line):
            target = re.search(r'custom_call_target="([^"]*)"', line)
            place = re.search(r'op_name="([^"]*)"', line)
            found[name[1]] = (target[1] if target else "", place[1] if place else "")
    return found


# What a kernel is, by its name or the library that it is called from: the first that fits.
KERNELS = {
    "attention": r"sdpa|fmha|flash",
    "copies and fills": r"^mem(cpy|set)",
    "convolution": r"conv(?!ert)|[fdw](prop|grad)|im2col|nhwc|nchw",
    "products of matrices": r"gemm|gemv|nvjet|cublas|cutlass|splitk|_dot|^dot|xmma",
}
# What the rest belongs to, by its place in the program.
PLACES = {
    "attention": r"MultiHeadDotProductAttention_\d+/(?!query|key|value|out/)",
    "query, key, value, out: biases, casts": r"MultiHeadDotProductAttention_\d+/",
    "LayerNorm": r"LayerNorm_\d+/|encoder_norm/",
    "MLP: biases, casts": r"MlpBlock_\d+/Dense_\d+/",
    "GELU": r"MlpBlock_\d+/",
    "residual sums": r"encoderblock_\d+/",
    "patches, positions, head, loss": r"jvp\(",
    "optimizer, norms, state": r"jit\(step\)/",
}


def classify(kernel: str, target: str = "", place: str = "") -> str:
    """What a kernel's time counts as: a key of KERNELS or PLACES, or its name without numbers.

    Args:
      kernel: its name.
      target, place: see `operations`.
    """
    for name, pattern in KERNELS.items():
        if re.search(pattern, f"{kernel} {target}", re.IGNORECASE):
            # Without a kernel of its own attention is products and passes over memory.
            products = name.startswith("products")
            return "attention" if products and re.search(PLACES["attention"], place) else name
    for name, pattern in PLACES.items():
        if re.search(pattern, place):
            return name
    return re.sub(r"[._]?\d+$", "", kernel)


def spent(
    events: Iterable[tuple[str, str, float]], places: Mapping[str, tuple[str, str]], steps: int
) -> dict[str, float]:
    """Milliseconds of a step by `classify`, the longest first; empty without events.

    A kernel whose operation the trace does not tell (in a CUDA graph) is found by its name.
    """
    by_kernel = {re.sub(r"[.\-]", "_", name): found for name, found in places.items()}
    total: dict[str, float] = defaultdict(float)
    for kernel, op, microseconds in events:
        target, place = places.get(op) or by_kernel.get(re.sub(r"[.\-]", "_", kernel), ("", ""))
        total[classify(kernel, target, place)] += microseconds / 1000 / steps
    return dict(sorted(total.items(), key=lambda item: -item[1]))


# timm's process, one for each network.


class Timm:
    """timm's network, eager and compiled; the Python that runs it may have no JAX."""

    def __init__(self, network: str, tiny: bool):
        import timm
        import torch

        self._torch, self._version = torch, timm.__version__
        net = (TINY if tiny else NETWORKS)[network]
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        model = timm.create_model(net.names[1], num_classes=net.classes, **net.timm)
        self._model = model.to(self._device).train()
        self._compiled = torch.compile(self._model)
        self._optimizer = torch.optim.SGD(
            model.parameters(), lr=0.03, momentum=0.9, fused=self._device == "cuda"
        )
        shape = net.batch, 3, net.size, net.size
        self._images = torch.randn(shape, device=self._device)
        self._labels = torch.arange(net.batch, device=self._device) % net.classes
        self._step_ms: dict[tuple[str, str], float] = {}

    def hello(self) -> dict[str, Any]:
        """The versions, and the device."""
        torch = self._torch
        cuda = torch.cuda.get_device_name() if self._device == "cuda" else "cpu"
        return {"versions": f"torch {torch.__version__}, timm {self._version}", "device": cuda}

    def compile(self, start_until: float, wait_until: float) -> dict[str, Any]:
        """A dict of a row's fields for each (name, form): all have run once after it."""
        found = {}
        for form in FORMS:
            for name in reversed(TORCH):
                start = time.perf_counter()
                try:
                    if time.time() > start_until:
                        raise TimeoutError("left out: no time to compile it")
                    memory = self._once(name, form, wait_until)
                    found[json.dumps([name, form])] = {
                        "seconds": None if name == TORCH[0] else time.perf_counter() - start,
                        "memory": memory,
                    }
                except Exception as e:
                    note = str(e) if isinstance(e, TimeoutError) else first_line(e)
                    found[json.dumps([name, form])] = {"note": note}
                print(f"timm: {name}, {form}", file=sys.stderr, flush=True)
        return found

    def time(self, key: list, turn: float) -> dict[str, Any]:
        """As `Ours.time`."""
        name, form = key
        try:
            if (name, form) not in self._step_ms:
                self._run(name, form, 1)
                self._step_ms[name, form] = self._run(name, form, 2)
            steps = max(2, round(1000 * turn / self._step_ms[name, form]))
            ms = self._step_ms[name, form] = self._run(name, form, steps)
        except Exception as e:
            return {"note": first_line(e)}
        finally:
            self._free()
        return {"ms": ms}

    def _once(self, name: str, form: str, until: float) -> int | None:
        """Bytes at most; others use the card, too, so that there may be room only later."""
        cuda = self._torch.cuda
        while True:
            try:
                if self._device == "cuda":
                    cuda.reset_peak_memory_stats()
                self._run(name, form, 1)
                return cuda.max_memory_allocated() if self._device == "cuda" else None
            except cuda.OutOfMemoryError:
                if time.time() > until:
                    raise
            finally:
                self._free()
            time.sleep(3)

    def _free(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        if self._device == "cuda":
            self._torch.cuda.empty_cache()

    def _run(self, name: str, form: str, steps: int) -> float:
        torch = self._torch
        model = self._model if name == TORCH[0] else self._compiled
        train = form == "train"
        self._model.train(train)
        self._synchronize()
        start = time.perf_counter()
        with torch.set_grad_enabled(train):
            for _ in range(steps):
                with torch.autocast(self._device, torch.bfloat16):
                    logits = model(self._images)
                    if train:
                        loss = torch.nn.functional.cross_entropy(logits, self._labels)
                if train:
                    self._optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
                    self._optimizer.step()
        self._synchronize()
        return 1000 * (time.perf_counter() - start) / steps

    def _synchronize(self) -> None:
        if self._device == "cuda":
            self._torch.cuda.synchronize()


# The main process.


def serve(make: Callable[[], Any]) -> None:
    """Answers each line [method, arguments] of the input with one of JSON."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Whatever else is printed is no answer.
    try:
        served = make()
    except ImportError as e:
        print(json.dumps({"note": f"not installed: {e.name or e}"}), file=out, flush=True)
        return
    except Exception as e:
        print(json.dumps({"note": first_line(e)}), file=out, flush=True)
        return
    for line in sys.stdin:
        method, arguments = json.loads(line)
        print(json.dumps(getattr(served, method)(**arguments)), file=out, flush=True)
    os._exit(0)  # Threads may still compile.


class Process:
    """A process that `serve`s."""

    def __init__(self, python: str, *arguments: str):
        self._process = subprocess.Popen(
            [python, __file__, "--serve", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # JAX and torch share the card, and all torch's processes the cores.
            env=os.environ
            | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
            | {"TORCHINDUCTOR_COMPILE_THREADS": "4"},
        )
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(json.loads(line))
        self._answers.put(None)

    def tell(self, method: str, **arguments: Any) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # The answer will say so.
            print(json.dumps([method, arguments]), file=self._process.stdin, flush=True)

    def answer(self, seconds: float) -> dict[str, Any]:
        """The next one; a "note" why there is none."""
        try:
            found = self._answers.get(timeout=max(0.1, seconds))
        except queue.Empty:
            self.end()
            return {"note": "left out: no answer in time"}
        if found is None:
            self._answers.put(None)  # For whoever asks next.
            return {"note": "its process ended, see the messages above"}
        return found

    def ask(self, method: str, seconds: float, **arguments: Any) -> dict[str, Any]:
        self.tell(method, **arguments)
        return self.answer(seconds)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def planned(networks: Iterable[str], found: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """(network, variant, form) of all programs, in the order in which they are compiled."""
    ways = [(v["name"], form) for form in FORMS for v in found if form == "train" or v["forward"]]
    first = {v["name"] for v in found[:FIRST]}
    keys = [(network, *way) for network in networks for way in ways]
    return sorted(keys, key=lambda key: (key[1] not in first, key[2] == "forward"))


def measure(arguments: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    """All rows, and what is known of the device and of where time goes."""
    networks = TINY if arguments.tiny else NETWORKS
    names = arguments.networks.split(",") if arguments.networks else [*networks]
    for name in names:
        if name not in networks:
            sys.exit(f"unknown network {name!r}: known are {', '.join(networks)}")
    begin, budget = time.time(), 60 * arguments.minutes
    tiny = ["--tiny"] * arguments.tiny
    ours = Process(sys.executable, "ours", *tiny)
    # While torch compiles, so do we.
    theirs = {name: Process(arguments.torch_python, name, *tiny) for name in names}
    with contextlib.ExitStack() as stack:
        for process in (ours, *theirs.values()):
            stack.callback(process.end)
        start_until, wait_until = begin + 0.5 * budget, begin + 0.65 * budget
        for process in theirs.values():
            process.tell("hello")
            process.tell("compile", start_until=start_until, wait_until=wait_until)
        hello = ours.ask("hello", budget)
        if "note" in hello:
            sys.exit(f"our process: {hello['note']}")
        if hello["platform"] == "cpu" and not arguments.tiny:
            sys.exit("JAX sees no GPU or TPU here: use --tiny to try this script on a CPU")
        wanted = re.compile(arguments.variants)
        chosen = [v for v in hello["variants"] if wanted.search(v["name"])]
        if not chosen:
            sys.exit(f"no variant's name has the pattern {arguments.variants!r}")
        ways = {v["name"]: v for v in chosen}
        keys = planned(names, chosen)
        limits = {"start_until": start_until, "wait_until": wait_until}
        found = ours.ask("compile", wait_until + 20 - time.time(), keys=keys, **limits)
        rows = [
            Row(
                *key,
                networks[key[0]].batch * ways[key[1]]["batch"],
                ways[key[1]]["fair"],
                **_fields(found, key),
            )
            for key in keys
        ]
        for name, process in theirs.items():
            told = process.answer(wait_until - time.time())
            hello.setdefault("torch", told.get("versions", told.get("note")))
            found = told if "note" in told else process.answer(wait_until - time.time())
            rows += [
                Row(name, way, form, networks[name].batch, **_fields(found, (way, form)))
                for form in FORMS
                for way in TORCH
            ]
        timing(
            names, rows, ours, theirs, begin + 0.95 * budget, 2 if arguments.tiny else ROUNDS, hello
        )
    hello["minutes"] = (time.time() - begin) / 60
    return rows, hello


def _fields(found: Mapping[str, Any], key: tuple[str, ...]) -> dict[str, Any]:
    return found if "note" in found else found[json.dumps(key)]


def timing(
    names: list[str],
    rows: list[Row],
    ours: Process,
    theirs: Mapping[str, Process],
    deadline: float,
    rounds: int,
    hello: dict[str, Any],
) -> None:
    """Fills in the rows' rounds, and hello["spent"], by network, of the best variant.

    Larger batches come last, when torch has left the card.
    """
    hello["spent"] = {}
    usual = {row.network: row.batch for row in rows if row.fair}
    large = [row for row in rows if row.batch > usual[row.network]]
    groups = [(name, [r for r in rows if r.network == name and r not in large]) for name in names]
    groups += [(name, [r for r in large if r.network == name]) for name in names]
    groups = [(name, group) for name, group in groups if group]
    ours.ask("reserve", 60)
    for i, (name, group) in enumerate(groups):
        here = [row for row in group if not row.note]
        # Each row has its share of the time left, of which a third is for what is not timed:
        # warming up, memory, the trace.
        left = sum(not row.note for _, rest in groups[i:] for row in rest)
        turn = min(1.0, (deadline - time.time()) / 1.5 / max(1, rounds * left))
        for round_ in range(rounds):
            for row in here[:: (-1) ** round_]:
                if row.note:
                    continue
                if time.time() > deadline:
                    row.note = "" if row.rounds else "left out: no time to run it"
                    continue
                if row.name in TORCH:
                    told = theirs[name].ask("time", 60, key=[row.name, row.form], turn=turn)
                else:
                    told = ours.ask("time", 60, key=[*row.key], turn=turn)
                row.note = told.get("note", "")
                row.rounds = [*row.rounds, told["ms"]] if "ms" in told else []
        if group[0] not in large:
            print(f"timed {name}", file=sys.stderr, flush=True)
            theirs[name].end()
            if row := best(rows, name):
                told = {"note": "left out: no time for a trace"}
                if time.time() < deadline:
                    told = ours.ask("profile", 60, key=[*row.key], steps=3)
                hello["spent"][name] = row.name, told | {"step": row.ms}


def best(rows: Iterable[Row], network: str) -> Row | None:
    """Our fastest training step of those that do the same as timm."""
    ours = [
        row
        for row in rows
        if row.fair
        and row.ms
        and row.name not in TORCH
        and (row.network, row.form) == (network, "train")
    ]
    return max(ours, key=lambda row: row.images_per_s, default=None)


def mfu(row: Row, hello: Mapping[str, Any]) -> float | None:
    """The share of the device's peak that the network's own operations make, where it is known."""
    if not hello["tflops"] or not row.ms:
        return None
    operations = hello["flops"][row.network] * (3 if row.form == "train" else 1)
    return row.images_per_s * operations / (1e12 * hello["tflops"])


def judged(rows: list[Row], hello: Mapping[str, Any]) -> list[str]:
    """A line for each network: the best variant, its ratio to torch.compile, its MFU, the goals."""
    lines = []
    for network in dict.fromkeys(row.network for row in rows):
        ours = best(rows, network)
        if ours is None:
            lines.append(f"{network}: none of our variants was measured")
            continue
        line = f"{network}: best is **{ours.name}**"
        theirs = [row for row in rows if row.key == (network, TORCH[1], "train")]
        ratio = None
        if theirs and theirs[0].ms:
            ratio = ours.images_per_s / theirs[0].images_per_s
            line += f", {ratio:.2f} times torch.compile"
        else:
            line += ", torch.compile was not measured"
        share = mfu(ours, hello)
        line += f", {share:.1%} MFU" if share else ", no MFU"
        if not hello["goals"]:
            line += "; no goals for this device"
        elif network not in GOALS:
            line += "; no goals for this network"
        else:
            least_ratio, least_share = GOALS[network]
            for what, value, least in (("times", ratio, least_ratio), ("MFU", share, least_share)):
                if least:
                    goal = f"{least:.2f} times" if what == "times" else f"{least:.0%} MFU"
                    met = "not measured" if value is None else "met" if value >= least else "missed"
                    line += f"; goal of {goal} {met}"
        lines.append(line)
    return lines


def report(rows: list[Row], hello: Mapping[str, Any]) -> str:
    """All of it, in Markdown."""
    today = datetime.date.today().isoformat()
    text = f"## {hello['device']}, {today}\n\n"
    python = ".".join(map(str, sys.version_info[:3]))
    text += f"Python {python}, {hello['versions']}; {hello['torch']}. "
    text += f"{os.cpu_count()} CPU cores. The run took {hello['minutes']:.1f} minutes.\n"
    if not hello["tflops"]:
        text += f"No MFU: the peak of {hello['device']} is not known.\n"
    text += "\n" + "".join(f"- {line}\n" for line in judged(rows, hello))
    text += "\n| network, batch | form | | images/s | ms | spread | MFU | memory, GB | of it "
    text += "temporary | compiled in s |\n"
    text += "| --- " * 10 + "|\n"
    networks = [*dict.fromkeys(row.network for row in rows)]
    for row in sorted(rows, key=lambda r: (networks.index(r.network), FORMS.index(r.form))):
        text += f"| {row.network}, {row.batch} | {row.form} | {row.name} | "
        if row.ms:
            spread = (max(row.rounds) - min(row.rounds)) / row.ms
            share = mfu(row, hello)
            cells = [f"{row.images_per_s:,.0f}", f"{row.ms:.1f}", f"{spread:.1%}"]
            cells += [f"{share:.1%}" if share else "-"]
        else:
            cells = [row.note or "not measured", "", "", ""]
        cells += ["-" if x is None else f"{x / 1e9:.2f}" for x in (row.memory, row.temporary)]
        cells += ["-" if row.seconds is None else f"{row.seconds:.0f}"]
        text += " | ".join(cells) + " |\n"
    return text + WHERE + _spent_table(hello["spent"])


def _spent_table(found: Mapping[str, tuple[str, dict[str, Any]]]) -> str:
    text, columns, steps = "", {}, []
    for network, (name, told) in found.items():
        if told.get("ms"):
            columns[f"{network}, {name}"] = told["ms"]
            steps.append(f"{told['step']:.2f}")
        else:
            text += f"{network}: {told.get('note', 'no device events in the trace')}.\n"
    if not columns:
        return text or "No step was traced.\n"
    kinds: dict[str, float] = defaultdict(float)
    for column in columns.values():
        for kind, ms in column.items():
            kinds[kind] += ms
    text += "\n" * bool(text) + f"| | {' | '.join(columns)} |\n"
    text += "| --- " * (len(columns) + 1) + "|\n"
    for kind in sorted(kinds, key=lambda kind: -kinds[kind]):
        cells = " | ".join(f"{column.get(kind, 0):.2f}" for column in columns.values())
        text += f"| {kind} | {cells} |\n"
    cells = " | ".join(f"{sum(column.values()):.2f}" for column in columns.values())
    return text + f"| sum | {cells} |\n| the step as timed | {' | '.join(steps)} |\n"


def add_to(file: Path, text: str) -> None:
    """Adds a run to a file of results."""
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    before = before.replace(NOT_RUN, "").rstrip()
    file.write_text(f"{before}\n\n{text}".lstrip(), encoding="utf-8")


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", default="", help="e.g. B/16,L/16; by default all")
    parser.add_argument("--variants", default="", help="those whose name has this pattern")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--tiny", action="store_true", help="two small blocks, for a CPU")
    parser.add_argument("--torch-python", default=sys.executable, help="that has torch and timm")
    parser.add_argument("--out", type=Path, help="by default benchmarks/results/gpu.md")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve and arguments.serve != "ours":
        return serve(lambda: Timm(arguments.serve, arguments.tiny))
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        packages = " ".join({"cv2": "opencv-python-headless"}.get(x, x) for x in missing)
        sys.exit(
            f"missing: {', '.join(missing)}. Run: pip install {packages} (or, where there is a "
            f"network: pip download --no-deps -d wheels {packages}, and here: pip install wheels/*)"
        )
    sys.path.insert(0, str(ROOT))
    if shutil.which(arguments.torch_python) is None:
        sys.exit(f"--torch-python: there is no program {arguments.torch_python}")
    if arguments.serve:
        return serve(lambda: Ours(arguments.tiny))
    text = report(*measure(arguments))
    print(text)
    if arguments.out or not arguments.tiny:
        add_to(arguments.out or ROOT / "benchmarks/results/gpu.md", text)
    return None


if __name__ == "__main__":
    main()
