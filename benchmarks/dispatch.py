"""What a training step costs the main thread, and how near the loop comes to its step alone.

    python benchmarks/dispatch.py [--quick]

The first table runs the loop of `training.run` with a step that has the state of a real one, leaf
by leaf, but arrays of one or two elements along each axis, and does next to nothing with them. What
is left is the main thread's own work: its processor time (`time.thread_time`), so that neither
waiting nor the time of other programs counts. The call is JAX's, in C++, and grows with the leaves;
on a CPU it includes XLA's work. A report is the metrics of a step read, printed as a line, written
to metrics.jsonl and TensorBoard; it comes every 20 steps, among which its time is divided. Batches
are made beforehand.

The second table is the configuration `digits` with its own step: the compiled step alone, called
with one batch that lies on the device; the loop with batches made beforehand; and as it is, with
digits made ready by threads. In turns, so that whatever else the machine does slows all alike.

Figures are medians of the rounds. No data are needed but what comes with the package.
"""

import contextlib
import dataclasses
import importlib
import io
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

import vit_jax
from vit_jax.sharding import batch_sharding, make_global_batch, replicated, shardings
from vit_jax.training import TrainState, make_optimizer
from vit_jax.training.inputs import DevicePrefetcher
from vit_jax.training.options import load_config, override
from vit_jax.training.signals import StopRequest
from vit_jax.training.watch import Watch

run_module = importlib.import_module("vit_jax.training.run")  # `training.run` is the function.
RunContext = run_module.RunContext
DIGITS = Path(__file__).parents[1] / "configs" / "digits.py"
WARM_UP = 10
# (what, where, function), timed each.
PARTS = [
    ("batch", DevicePrefetcher, "__next__"),
    ("watching", DevicePrefetcher, "watch"),
    ("report", run_module, "read_metrics"),
]


def training(
    context: RunContext, state: TrainState, steps: int, rounds: int
) -> dict[str, list[float]]:
    """Runs the loop. Milliseconds of the main thread's processor a step, in all and by parts, and
    steps a second, of each round."""
    spent = dict.fromkeys(("call", *(name for name, *_ in PARTS)), 0.0)
    marks: list[tuple[dict[str, float], float, float]] = []
    stop, called = StopRequest(), 0

    def timed(name: str, function: Callable) -> Callable:
        def wrapper(*args, **options):
            start = time.thread_time()
            try:
                return function(*args, **options)
            finally:
                spent[name] += time.thread_time() - start

        return wrapper

    call = timed("call", context.train_step)

    def step(state, batch):
        nonlocal called
        if called >= WARM_UP and (called - WARM_UP) % steps == 0:
            marks.append((dict(spent), time.thread_time(), time.perf_counter()))
        if called == WARM_UP + rounds * steps:
            stop.signal_name = "SIGTERM"  # As if somebody had asked: the loop saves and returns.
        called += 1
        return call(state, batch)

    prepared = [(dataclasses.replace(context, train_step=step), state)]
    del state  # The first step gives it up.
    with contextlib.ExitStack() as stack:
        folder = epath.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        for name, owner, function in PARTS:
            replaced = mock.patch.object(owner, function, timed(name, getattr(owner, function)))
            stack.enter_context(replaced)
        prepare = mock.patch.object(run_module, "prepare", side_effect=lambda *_: prepared.pop())
        stack.enter_context(prepare)
        run_module.train(context.config, folder, None, stop, Watch(60))

    figures: dict[str, list[float]] = {}
    for (parts, cpu, clock), (parts_later, cpu_later, later) in itertools.pairwise(marks):
        ms = {name: 1e3 * (parts_later[name] - parts[name]) / steps for name in parts}
        total = 1e3 * (cpu_later - cpu) / steps
        ms |= {"rest": total - sum(ms.values()), "total": total}
        for name, value in (ms | {"steps/s": steps / (later - clock)}).items():
            figures.setdefault(name, []).append(value)
    return figures


def made_beforehand(context: RunContext) -> RunContext:
    """The same with one batch again and again."""
    with contextlib.closing(context.data.train_batches(0)) as batches:  # type: ignore[type-var]
        batch = {name: np.array(x) for name, x in next(batches).items()}

    class Repeated(type(context.data)):  # type: ignore[misc]
        def train_batches(self, start_step: int) -> Iterator:
            while True:
                yield batch

    fields = {f.name: getattr(context.data, f.name) for f in dataclasses.fields(context.data)}
    return dataclasses.replace(context, data=Repeated(**fields))


def trivial(
    context: RunContext, name: str, optim: str, **overrides
) -> tuple[RunContext, TrainState]:
    """The context and the state of a model, with a step that has nothing to compute."""
    model = vit_jax.create_model(name, num_classes=10, **overrides)
    images = jnp.zeros((1, 32, 32, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    params = jax.tree.map(lambda x: np.zeros(np.minimum(x.shape, 2), x.dtype), shapes)
    config = override(context.config, [f"--config.optim={optim}"])
    tx = make_optimizer(config, config.total_steps)
    state = TrainState.create(params=params, tx=tx, mesh=context.mesh)

    def step(state, batch):
        names = ("loss", "grad_norm", "param_norm", "update_norm", "lr")
        metrics = dict.fromkeys(names, batch["label"].sum().astype(jnp.float32))
        state = state.replace(step=state.step + 1)
        state = jax.lax.with_sharding_constraint(state, shardings(state, context.mesh))
        return state, metrics | state.guard

    train_step = jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(None, batch_sharding(context.mesh)),
        out_shardings=(None, replicated(context.mesh)),
    )
    vit = dataclasses.replace(context.vit, model=model)
    return dataclasses.replace(context, vit=vit, train_step=train_step), state


def alone(context: RunContext, state: TrainState, steps: int, rounds: int) -> list[float]:
    """Steps a second of the compiled step, called with one batch that lies on the device."""
    batch = make_global_batch(
        next(made_beforehand(context).data.train_batches(0)), batch_sharding(context.mesh)
    )
    found = []
    for i in range(rounds + 1):  # The first doesn't count.
        start = time.perf_counter()
        for _ in range(steps if i else WARM_UP):
            state, metrics = context.train_step(state, batch)
        jax.block_until_ready(metrics)
        found.append(steps / (time.perf_counter() - start))
    return found[1:]


def copied(state: TrainState) -> TrainState:
    """A step gives up its state."""
    return jax.tree.map(lambda x: jnp.array(x, copy=True), state)


def main(quick: bool = False) -> None:
    """Prints both tables."""
    rounds, steps, real_steps = (1, 20, 5) if quick else (7, 300, 200)
    fields = ["total_steps=1000000", "eval_every=0", "checkpoint_every=0"]
    fields += ["model.num_layers=1"] if quick else []
    config = override(load_config(str(DIGITS)), [f"--config.{field}" for field in fields])
    with tempfile.TemporaryDirectory() as folder:
        context, digits = run_module.prepare(config, epath.Path(folder), None)
    print(f"{context.introduction}\n")

    trees: dict[str, tuple] = {"digits, AdamW": ("ViT-Ti_16", "adamw", {"num_layers": 4})}
    if not quick:
        trees["Ti/16, SGD"] = ("ViT-Ti_16", "sgd", {})
        trees["B/16, AdamW"] = ("ViT-B_16", "adamw", {})
    names = ["call", "batch", "watching", "report", "rest", "total"]
    print(f"| state of, leaves | {' | '.join(names)} (ms) | steps/s |")
    print(f"|{' --- |' * (len(names) + 2)}")
    for label, (name, optim, overrides) in trees.items():
        small, state = trivial(made_beforehand(context), name, optim, **overrides)
        leaves = len(jax.tree.leaves(state))
        figures = training(small, state, steps, rounds)
        cells = [f"{statistics.median(figures[name]):.3f}" for name in names]
        rate = statistics.median(figures["steps/s"])
        print(f"| {label}, {leaves} | {' | '.join(cells)} | {rate:,.0f} |", flush=True)

    found: dict[str, list[float]] = {}
    for _ in range(1 if quick else 3):
        ways = {
            "step alone": lambda: alone(context, copied(digits), real_steps, 1),
            "loop, batches made beforehand": lambda: training(
                made_beforehand(context), copied(digits), real_steps, 1
            )["steps/s"],
            "loop": lambda: training(context, copied(digits), real_steps, 1)["steps/s"],
        }
        for way, rates in ways.items():
            found.setdefault(way, []).extend(rates())
    print("\n| digits | steps/s | of the step alone |\n| --- | --- | --- |")
    for way, rates in found.items():
        shares = [b / a for a, b in zip(found["step alone"], rates, strict=True)]
        share = statistics.median(shares)
        print(f"| {way} | {statistics.median(rates):,.1f} | {share:.2f} |", flush=True)


if __name__ == "__main__":
    main("--quick" in sys.argv[1:])
