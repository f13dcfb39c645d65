"""A training run, from the first picture to the report."""

import contextlib
import dataclasses
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax.cache import keep_compiled
from vit_jax.data import Source
from vit_jax.errors import full_disk_explained
from vit_jax.evaluation.metrics import EvalStep, Scores, evaluate, make_eval_step
from vit_jax.models.blocks import unstack_blocks
from vit_jax.parallel import join, make_mesh, split, to_host
from vit_jax.pretrained import Pretrained
from vit_jax.training.attention import choose_attention
from vit_jax.training.checkpointing import Checkpoints
from vit_jax.training.config import check_config, flatten, weights_source
from vit_jax.training.feed import Feed, Figures
from vit_jax.training.fields import CHANGING, FREE_FIELDS
from vit_jax.training.guard import LIMIT, BadStep, heed
from vit_jax.training.hardware import Usage
from vit_jax.training.metrics import MetricsWriter
from vit_jax.training.network import as_trained, make_network
from vit_jax.training.optimizer import make_optimizer, schedule_of
from vit_jax.training.outcome import (
    Result,
    finish,
    finished,
    last_test,
    read_tests,
    score_figures,
    score_text,
)
from vit_jax.training.processes import SharedStop, check_same, gather, is_first, together
from vit_jax.training.profile import Profile, trace_folder
from vit_jax.training.progress import Progress
from vit_jax.training.signals import StopRequest
from vit_jax.training.state import TrainState
from vit_jax.training.step import Step, make_train_step
from vit_jax.training.task import Task, mixup, open_task
from vit_jax.training.watch import Watch
from vit_jax.training.workdir import (
    BEST_WEIGHTS,
    CHECKPOINTS,
    claim_workdir,
    lock_holder,
    open_workdir,
)

# What a progress line shows at its end, by its names in a step's figures and in `Usage`.
MORE = {
    "grad": "grad_norm",
    "mfu": "time/mfu",
    "img/s/device": "time/images_per_s_per_device",
    "GiB": "time/memory_peak_gib",
    "update": "update_norm",
    "weights": "param_norm",
}


def run(
    config: ConfigDict,
    workdir: str | os.PathLike,
    *,
    sources: tuple[Source, Source] | None = None,
) -> Result:
    """Trains as a configuration says, or goes on where a run in the same workdir stopped.

    The workdir gets config.json, metrics.jsonl, TensorBoard events, checkpoints/, and at the end
    weights.npz with its weights.json (`vit_jax.load(workdir)`), report.html and report.png. SIGTERM
    and Ctrl-C save and return. Of several processes (see `training.processes`) the first writes;
    the others return the same.

    Args:
      config: fields of `default_config`; what is not given has its default.
      workdir: the folder of this run, made if it isn't there.
      sources: pictures to train on and to test on, e.g. of `data.from_arrays`, in place of what
        `config.dataset` names.

    Raises UserError for a bad configuration, bad data, a workdir in use, a loss that is not finite,
    or a disk that can't be written. What was saved before stays good.
    """
    folder, explained = Path(workdir), full_disk_explained(f"the workdir {workdir}")
    done: Result | None = None
    with StopRequest() as stop:
        with together():
            config = check_config(config)
            if sources:
                config.dataset = sources[0].name
        with Watch(config.silence_timeout) as watch, explained, contextlib.ExitStack() as stack:
            with together():
                if is_first():
                    stack.enter_context(open_workdir(workdir, config))
                    done = finished(folder, config.total_steps)
            if done := _of_first(done):
                return done
            check_same({"in the workdir a lock of process": lock_holder(folder)})
            return _train(config, folder, stop, watch, sources)


def _of_first(result: Result | None) -> Result | None:
    """The first process's result, in all of them."""
    fields = gather(result and dataclasses.asdict(result))[0]
    return fields and Result(**fields)


def _train(
    config: ConfigDict,
    workdir: Path,
    own_stop: StopRequest,
    watch: Watch,
    sources: tuple[Source, Source] | None,
) -> Result:
    with together():
        compiled = keep_compiled(config.compile_cache)
        mesh = make_mesh(config)
        task = open_task(config, sources)
        vit = make_network(
            config,
            picture_shape=task.picture_shape,
            labels=task.labels,
            preprocess=task.eval_ops.spec,
        )
        attention, told = choose_attention(config, vit.model, task.picture_shape[:2], mesh)
        introduction = _introduction(config, vit, task)
        fingerprints = task.fingerprints
    check_same(_what_matters(config, fingerprints) | {"attention": attention})
    tx = make_optimizer(config, config.total_steps)
    model, params = as_trained(config, vit.model, vit.params)
    model = model if attention == "xla" else model.clone(attention=attention)
    vit = dataclasses.replace(vit, params={})
    state = TrainState.create(params=params, tx=tx, seed=config.seed, mesh=mesh, ema=config.ema_decay > 0)
    del params  # The host's memory is not needed any more.
    train_step = step_of(task, model, tx, mesh)
    usage = Usage(vit.model, task.picture_shape)
    eval_step = make_eval_step(model, mesh=mesh, loss=config.loss)
    schedule = schedule_of(config, config.total_steps)

    def learning_rate(step: int) -> float:
        with jax.transfer_guard("allow"):  # Of a few numbers, where a line is written anyway.
            return float(schedule(step))

    with together():
        if is_first():
            claim_workdir(workdir, config, fingerprints)

    with contextlib.ExitStack() as stack:
        folder = workdir / CHECKPOINTS
        goes_back = config.on_bad_step == "rollback"
        checkpoints = stack.enter_context(
            contextlib.closing(
                Checkpoints(
                    folder,
                    keep=config.keep_checkpoints,
                    every=config.checkpoint_every if goes_back else None,
                )
            )
        )
        check_same({"checkpoint": checkpoints.latest})
        state, damaged = checkpoints.restore(state)
        start = step = int(state.step)
        metrics: MetricsWriter | None = None
        accuracies: dict[int, float] = {}
        with together():
            if is_first():
                metrics = stack.enter_context(MetricsWriter(workdir, resume_step=start))
                accuracies = {line["step"]: line["test/top1"] for line in read_tests(workdir)}
        accuracies = dict(gather([*accuracies.items()])[0])
        console = None if is_first() else stack.enter_context(open(os.devnull, "w"))
        progress = stack.enter_context(Progress(config.total_steps, start, stream=console))

        def feed_from(step: int) -> Feed:
            feed = Feed(task.train_batches(step), split(mesh), config.prefetch)
            return stack.enter_context(contextlib.closing(feed))

        feed = feed_from(start)
        figures = Figures()
        traces = trace_folder(workdir)
        profile = stack.enter_context(Profile(config.profile, traces))
        scores: Scores | None = None
        stop = SharedStop(own_stop, mesh)
        stack.push(watch.fail)
        stack.enter_context(full_disk_explained(f"the workdir {workdir}"))
        progress.message("; ".join(filter(None, (introduction, told, compiled))))
        if damaged:
            progress.message(damaged)
        if start:
            progress.message(f"going on from step {start}, saved in {folder}")

        def look() -> dict[str, float] | None:
            """The figures of the last step; None if the run has gone back for a bad one."""
            nonlocal state, step, feed
            values, bad = figures.look()
            first = heed(bad, config.on_bad_step, progress.message)
            if first is None:
                return values
            state, step = _gone_back(checkpoints, state, first, progress.message), first.step
            feed.close()
            feed = feed_from(step)
            return None

        while True:
            if profile.at(step, figures.wait):
                progress.message(f"step {step}: a trace is in {traces}")
            # What is due after a step, in an order that a kill at any moment does not disturb:
            # figures are written before the state is saved, and on resuming those after the saved
            # state go.
            last = step == config.total_steps
            if last or _due(step, config.eval_every):
                if look() is None:
                    continue
                if last or step not in accuracies:  # It was in, if a run goes on from this step.
                    scores = _evaluate(eval_step, state, task, stop, mesh)
                if scores is not None and step not in accuracies:
                    if config.keep_best and scores.top1 > max(accuracies.values(), default=-1.0):
                        best = _with_params(vit, state)
                        if is_first():
                            best.save(workdir / BEST_WEIGHTS)
                    accuracies[step] = scores.top1
                    if metrics:
                        metrics.write(step, score_figures(scores))
                    progress.message(f"step {step}: {score_text(scores)}")
                feed.restart_clock()
            stopping = stop.check(wait=step == start)
            begins = goes_back and checkpoints.latest is None
            if last or stopping or begins or _due(step, config.checkpoint_every):
                if look() is None:
                    continue
                if (step or goes_back) and checkpoints.latest != step:
                    if metrics:
                        metrics.sync()
                    checkpoints.save(step, state)
                feed.restart_clock()
            if last or stopping:
                break

            # JAX would send off any number of steps, each with its batch in the device's memory:
            # one is running while the next is made ready.
            figures.wait(running=1)
            state, step_figures = train_step(state, feed.take(drain=figures.wait))
            step += 1
            figures.add(step, step_figures)
            if step == start + 1:  # The compiler's time is not the steps' time.
                figures.wait()
                learning_rate(step)
                feed.restart_clock()
                progress.restart_clock(step)
            if _due(step, config.progress_every) or step == config.total_steps:
                if (values := look()) is None:
                    continue
                speed = feed.speed()
                times = usage.figures(speed.batches_per_s * config.batch)
                lr, now = learning_rate(step - 1), values | times
                progress.update(
                    step,
                    loss=values["loss"],
                    lr=lr,
                    images_per_s=times.get("time/images_per_s", math.nan),
                    wait_share=speed.wait_share,
                    more={short: now[name] for short, name in MORE.items() if name in now},
                )
                if config.on_bad_step == "stop":
                    del values["bad_steps"]
                values = {f"train/{key}": value for key, value in values.items()}
                if not math.isnan(speed.wait_share):
                    times["time/data_wait"] = speed.wait_share
                if metrics:
                    metrics.write(step, values | times | {"train/lr": lr})

    if scores is None or step < config.total_steps:
        saved = f"saved in {folder}" if step else "nothing to save yet"
        summary = (
            f"stopped by {stop.signal_name} at step {step:,} of {config.total_steps:,}, {saved}: "
            "start the same command again to go on"
        )
        result = Result(step, False, summary, last_test(workdir)) if is_first() else None
    else:
        vit, result = _with_params(vit, state), None
        with together(), full_disk_explained(f"the workdir {workdir}"):
            if is_first():
                result = finish(vit, scores, task, workdir, config.total_steps)
    result = _of_first(result)
    assert result is not None
    return result


def _what_matters(config: ConfigDict, fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """What all processes of a run must have the same."""
    free = {f"config.{field}" for field in FREE_FIELDS - CHANGING}
    fields = {k: v for k, v in flatten(config).items() if k not in free}
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(file.read_bytes())
    versions = {"the code of vit_jax": code.hexdigest()[:12]}
    versions |= {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    return fields | versions | {f"the {k} pictures": v for k, v in fingerprints.items()}


def step_of(
    task: Task, model: Any, tx: optax.GradientTransformation, mesh: Mesh | None = None
) -> Step:
    """The compiled step of a run, as its configuration says; see `make_train_step`."""
    return make_train_step(
        model,
        tx,
        mesh=mesh,
        compile=task.config.compile,
        accum_steps=task.config.accum_steps,
        loss=task.config.loss,
        label_smoothing=task.config.label_smoothing,
        mixup=mixup(task.config),
        cutmix=task.config.cutmix,
        value_range=task.value_range,
        skip_bad=task.config.on_bad_step != "stop",
        spike=task.config.spike,
        ema_decay=task.config.ema_decay,
    )


def _gone_back(
    checkpoints: Checkpoints, state: TrainState, bad: BadStep, say: Callable[[str], None]
) -> TrainState:
    """The state of the checkpoint before a bad step, for the batch after it."""
    since, saved = checkpoints.restore_scheduled(state)
    count = bad.bad - int(saved.guard["bad_steps"])
    if count >= LIMIT:
        raise bad.error(f", the {LIMIT}th time since step {since}")
    say(
        f"step {bad.step}: {bad.reason}: gone back to the weights of step {since}, {bad.bad} in all"
    )
    return saved.moved(bad)


def _due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0


class _StoppedError(Exception):
    """An evaluation is broken off because the run is to end."""


def _evaluate(
    eval_step: EvalStep, state: TrainState, task: Task, stop: SharedStop, mesh: Mesh
) -> Scores | None:
    """Scores on the test pictures; None if the run is to end before all were seen."""

    def until_stopped() -> Iterator[Mapping[str, Any]]:
        for batch in task.eval_batches():
            if stop.check():
                raise _StoppedError
            yield join(batch, split(mesh))

    try:
        return evaluate(eval_step, state.averaged, until_stopped(), len(task.labels))
    except _StoppedError:
        return None


def _with_params(vit: Pretrained, state: TrainState) -> Pretrained:
    return dataclasses.replace(vit, params=unstack_blocks(to_host(state.averaged)))


def _introduction(config: ConfigDict, vit: Pretrained, task: Task) -> str:
    parameters = sum(x.size for x in jax.tree.leaves(vit.params))
    weights = weights_source(config)
    devices = jax.devices()
    return (
        f"{vit.spec.description}, {parameters / 1e6:.2f} M parameters, "
        f"{'from scratch' if weights is None else f'from {weights}'}, {len(task.labels)} classes, "
        f"{len(task.train):,} pictures to train on and {len(task.test):,} to test on, "
        f"{len(devices)} x {devices[0].device_kind}"
    )
