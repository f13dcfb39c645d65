"""How many images a second are trained on, compared with timm (PyTorch eager), on the CPU.

    pip install -e . timm torch
    python benchmarks/train.py [MODEL ...]

(Of T2T-ViT, which timm hasn't, with the plain network of tests/torch_t2t.py.)

Both do the same: float32 images of 224 px and 1,000 classes, forwards, backwards, the gradient
clipped to norm 1, SGD with momentum. Ours is what `vit-jax train` runs. Each side is a process of
its own that lives through all rounds; they take turns of a second, so that whatever else the
machine does slows both alike. Figures are medians of the rounds, the ratio is that of the ratios of
single rounds, with its quartiles; the first steps don't count.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Our name, timm's (None for the plain network), images in a batch, steps a round, and the least
# ratio that is wanted.
MODELS = {
    "ViT-Ti_16": ("vit_tiny_patch16_224", 8, 3, 1.0),
    "ViT-S_16": ("vit_small_patch16_224", 8, 1, 1.05),
    "ViT-B_16": ("vit_base_patch16_224", 4, 1, 1.05),
    "Swin-T_4-w7": ("swin_tiny_patch4_window7_224", 8, 1, 1.0),
    "T2T-ViT-14": (None, 8, 1, 1.0),
}
ROUNDS = 31
UNCOUNTED = 3
SIDES = ("ours", "timm")


def ours(name: str, batch_size: int) -> Callable[[int], object]:
    """A function that trains so many steps, with the same step as a run."""
    from vit_jax.cli.train import keep_memory

    keep_memory()
    import jax
    import numpy as np

    import vit_jax
    from vit_jax import training
    from vit_jax.models.kernels import choose_kernels
    from vit_jax.sharding import batch_sharding, make_global_batch

    config = training.default_config()
    config.batch, config.accum_steps = batch_size, 1
    mesh = training.make_mesh(config)
    model = vit_jax.create_model(name, num_classes=1000)
    kernels = choose_kernels(model, (224, 224), jax.devices()).kernels
    levels = np.random.default_rng(0).integers(0, 256, (batch_size, 224, 224, 3), np.uint8)
    images = np.zeros((1, 224, 224, 3), np.float32)
    params = jax.device_get(jax.jit(model.init)(jax.random.key(0), images)["params"])
    tx = training.make_optimizer(config, config.total_steps, model.frozen)
    state = training.TrainState.create(params=params, tx=tx, mesh=mesh)
    step = training.make_train_step(
        model.clone(kernels=kernels),
        tx,
        mesh=mesh,
        update_norm_at=lambda step: step % config.progress_every == 0,
    )

    def train(steps: int) -> None:
        nonlocal state
        for _ in range(steps):
            batch = {"image": levels, "label": np.arange(batch_size, dtype=np.int32)}
            state, metrics = step(state, make_global_batch(batch, batch_sharding(mesh)))
        float(metrics["loss"])

    return train


def timm(name: str, batch_size: int) -> Callable[[int], object]:
    """The same of timm's."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if theirs := MODELS[name][0]:
        import timm

        model = timm.create_model(theirs, num_classes=1000).train()
    else:
        sys.path.insert(0, str(ROOT))
        from tests.torch_t2t import T2T
        from vit_jax.models import variant

        model = T2T(**variant(name), num_classes=1000, patches=14 * 14).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.03, momentum=0.9)
    images = torch.randn(batch_size, 3, 224, 224)
    labels = torch.arange(batch_size)

    def train(steps: int) -> None:
        for _ in range(steps):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        loss.item()

    return train


def worker(side: str, name: str) -> None:
    """Trains as many steps as each line of the input says, and prints what they took."""
    train = {"ours": ours, "timm": timm}[side](name, MODELS[name][1])
    train(3)
    for line in sys.stdin:
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        train(int(line))
        seconds = time.perf_counter() - start
        after, steps = resource.getrusage(resource.RUSAGE_SELF), int(line)
        figures = {
            "ms": 1000 * seconds / steps,
            "processor ms": 1000 * _processor(before, after) / steps,
            "page faults": (after.ru_minflt - before.ru_minflt) / steps,
            "peak MB": after.ru_maxrss / 1e3,
        }
        print(json.dumps(figures), flush=True)


def _processor(before: resource.struct_rusage, after: resource.struct_rusage) -> float:
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def compare(name: str) -> dict[str, list[dict[str, float]]]:
    """The figures of both sides, of each round."""
    command = [sys.executable, __file__, "--worker"]
    sides = {
        side: subprocess.Popen(
            [*command, side, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"},
        )
        for side in SIDES
    }
    rounds: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for i in range(UNCOUNTED + ROUNDS):  # The first round waits until both are ready.
        for side in SIDES[:: (-1) ** i]:
            process = sides[side]
            assert process.stdin is not None
            assert process.stdout is not None
            print(MODELS[name][2], file=process.stdin, flush=True)
            figures = json.loads(process.stdout.readline())
            if i >= UNCOUNTED:
                rounds[side].append(figures)
    for process in sides.values():
        process.communicate()
    return rounds


def main(names: list[str]) -> None:
    """Prints a table, a row a network."""
    print(
        "| network, batch | | ms a step | of processors | page faults | peak MB | ratio | wanted |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in names or MODELS:
        _, batch_size, _, wanted = MODELS[name]
        rounds = compare(name)
        pairs = zip(rounds["timm"], rounds["ours"], strict=True)
        low, middle, high = statistics.quantiles(a["ms"] / b["ms"] for a, b in pairs)
        ratios = {"ours": f"{middle:.2f} ({low:.2f} to {high:.2f}) | {wanted}", "timm": "|"}
        for side, runs in rounds.items():
            medians = [statistics.median(figures[key] for figures in runs) for key in runs[0]]
            cells = " | ".join(f"{value:,.0f}" for value in medians)
            print(f"| {name}, {batch_size} | {side} | {cells} | {ratios[side]} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
    else:
        main(sys.argv[1:])
