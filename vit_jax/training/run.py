"""A training run, from the first image to the report."""

import contextlib
import dataclasses
import functools
import gc
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax.data import Source, remarks
from vit_jax.errors import UserError, full_disk_explained
from vit_jax.escape import printable
from vit_jax.evaluation.metrics import EvalStep, Scores, evaluate, make_eval_step
from vit_jax.files import as_path, bucket_errors, keep_compiled
from vit_jax.models.kernels import Choice, choose_kernels
from vit_jax.models.stack import unstack_blocks
from vit_jax.pretrained import STYLE, Pretrained
from vit_jax.sharding import batch_sharding, device_kinds, make_mesh, to_host
from vit_jax.signals import StopSignal
from vit_jax.training.checkpoints import Checkpoints
from vit_jax.training.config import (
    FIELDS,
    check_config,
    flatten,
    weights_source,
    without_effect,
)
from vit_jax.training.distributed import (
    SharedStop,
    assert_equal_across_processes,
    broadcast_from_main,
    exit_with_others,
    is_main_process,
    raise_on_all_processes,
    share_of_cores,
)
from vit_jax.training.hardware import Profile, Usage, trace_folder, untold
from vit_jax.training.inputs import DevicePrefetcher, RunData, open_data, to_device
from vit_jax.training.network import as_trained, make_network
from vit_jax.training.optimizer import make_optimizer
from vit_jax.training.outputs import (
    Result,
    last_test,
    load_result,
    score_figures,
    score_text,
    write_outputs,
    write_weights,
)
from vit_jax.training.progress import RunLog
from vit_jax.training.state import TrainState
from vit_jax.training.step import MUST_BE_FINITE, Step, make_step_from_config
from vit_jax.training.workdir import (
    BEST_WEIGHTS,
    CHECKPOINTS,
    IN_MEMORY_SUFFIX,
    lock_holder,
    open_workdir,
    write_config,
)

# Steps that follow before the metrics of a step are read: the device works on these meanwhile. The
# same number in all processes of a run, so that they go back from a bad step at the same place.
READ_DELAY = 2
MAX_BAD_STEPS = 10  # In a row, or since the checkpoint to go back to.


def run(
    config: ConfigDict,
    workdir: str | os.PathLike,
    *,
    sources: tuple[Source, Source] | None = None,
) -> Result:
    """Trains as a configuration says, or goes on where a run in the same workdir stopped.

    The workdir gets config.json, metrics.jsonl, TensorBoard events, checkpoints/, and at the end
    weights.npz with its weights.json (`vit_jax.load(workdir)`), report.html and report.png. SIGTERM
    and Ctrl-C save and return. Of several processes (see `training.distributed`) the first writes;
    the others return the same.

    Args:
      config: fields of `default_config`; what is not given has its default.
      workdir: the folder of this run, made if it isn't there.
      sources: images to train on and to test on, e.g. of `data.from_arrays`, in place of what
        `config.dataset` names.

    Raises UserError for a bad configuration, bad data, a workdir in use, a loss that is not finite,
    or a disk that can't be written. What was saved before stays good.
    """
    folder, disk = as_path(workdir), full_disk_explained(f"the workdir {workdir}")
    with contextlib.ExitStack() as stack, disk, bucket_errors(folder):
        own_stop = stack.enter_context(StopSignal(alone=jax.process_count() == 1))
        with raise_on_all_processes():
            config = check_config(config)
            if sources:
                config.dataset = sources[0].name + IN_MEMORY_SUFFIX
        result = None
        with raise_on_all_processes():
            if is_main_process():
                stack.enter_context(open_workdir(workdir, config))
                result = load_result(folder, config.total_steps)
        if result := _result_of_main(result):
            return result
        assert_equal_across_processes({"in the workdir a lock of process": lock_holder(folder)})

        context, step, scores, signal = train(config, folder, sources, own_stop)

        with raise_on_all_processes():
            if is_main_process() and scores:
                network = context.vit.spec.description
                result = write_outputs(folder, config, network, scores, context.data.test)
            elif is_main_process():
                place = printable(str(folder / CHECKPOINTS))
                saved = f"saved in {place}" if step else "nothing to save yet"
                summary = (
                    f"stopped by {signal} at step {step:,} of {config.total_steps:,}, {saved}: "
                    "start the same command again to go on"
                )
                result = Result(step, False, summary, last_test(folder))
        result = _result_of_main(result)
        assert result is not None
        return result


def _result_of_main(result: Result | None) -> Result | None:
    fields = broadcast_from_main(result and dataclasses.asdict(result))
    return fields and Result(**fields)


def train(
    config: ConfigDict,
    folder: epath.Path,
    sources: tuple[Source, Source] | None,
    own_stop: StopSignal,
) -> tuple["RunContext", int, Scores | None, str | None]:
    """Trains to the last step or to a signal, the name of which is given; the state is then saved.

    In an order that a kill at any moment does not disturb: metrics are written before the state is
    saved, and on resuming those after the saved state go. What may fail by other causes than the
    state, an evaluation, comes after it and the weights. The step and, if all is done, scores are
    given.
    """
    context, state = prepare(config, folder, sources)
    rolls_back, total = config.on_bad_step == "rollback", config.total_steps
    with contextlib.ExitStack() as stack:
        every = config.checkpoint_every if rolls_back else None
        checkpoints = Checkpoints(folder / CHECKPOINTS, keep=config.keep_checkpoints, every=every)
        stack.enter_context(contextlib.closing(checkpoints))
        # Once more than in the command line: checkpoints that are being written wait, when they are
        # closed, for all processes, so a process that fails alone has to end before that.
        stack.enter_context(exit_with_others(config.silence_timeout))
        # Within, as what that tells is to be a line; around the files, whose closing may fail, too.
        stack.enter_context(full_disk_explained(f"the workdir {folder}"))
        assert_equal_across_processes({"checkpoint": checkpoints.latest})
        state, damaged = checkpoints.restore(state)
        step = start = int(state.step)
        usage = Usage(context.vit.model, context.data.image_shape)
        bad_steps = int(state.guard["bad_steps"])
        log = stack.enter_context(RunLog(folder, config, step, usage, bad_steps))
        batches = stack.enter_context(open_batches(context, step))
        unread: deque[UnreadStep] = deque()
        profile = stack.enter_context(Profile(config.profile, trace_folder(folder)))
        stop = SharedStop(own_stop)
        stack.callback(gc.unfreeze)
        if is_main_process():  # The others' logs go nowhere.
            stack.callback(setattr, own_stop, "say", own_stop.say)
            own_stop.say = log.say
        log.say(context.introduction)
        if damaged:
            log.say(damaged)
        if step:
            log.say(f"going on from step {step}, saved in {checkpoints.folder}{log.gap}")
        log.restart_clock(batches.clock)

        while True:
            last, stopping = step == total, stop.check()
            evaluates = last or is_due(step, config.eval_every)
            saves = last or is_due(step, config.checkpoint_every)
            saves |= rolls_back and checkpoints.latest is None
            # What is evaluated or saved is known to be good.
            all_read = evaluates or saves or stopping
            if bad := read_metrics(unread, step if all_read else step - READ_DELAY, config, log):
                state, step = roll_back(checkpoints, state, bad, log), bad.step
                batches.close()
                batches = stack.enter_context(open_batches(context, step))
                unread.clear()
                log.restart_clock(batches.clock)
                continue
            if told := profile.at(step, functools.partial(wait_for, unread)):
                log.say(f"step {step}: {told}")
            unsaved = (step or rolls_back) and checkpoints.latest != step
            if unsaved and (saves or stopping):
                log.sync()
                checkpoints.save(step, state)
            if last:
                vit = context.with_weights(state)
                with raise_on_all_processes():
                    if is_main_process():
                        write_weights(folder, vit)
            scores = None
            if evaluates and not stopping and (last or step not in log.accuracies):
                scores = evaluate_and_log(context, state, step, stop, log)
                stopping = stop.check()
                if unsaved and stopping and not saves:
                    log.sync()
                    checkpoints.save(step, state)
            if all_read or stopping:
                log.restart_clock(batches.restart_clock())
            if last or stopping:
                return context, step, scores if last else None, stop.signal_name

            state, metrics = context.train_step(state, next(batches))
            step += 1
            unread.append(UnreadStep(step, metrics, batches.watch(metrics)))
            if step == start + 1:  # The compiler's time is not the steps' time.
                log.restart_clock(unread[-1].done.result(), step)
                # Else Python looks through all that the compiler left, for garbage, every few
                # hundred steps: 0.15 s in which no step is sent off.
                gc.collect()
                gc.freeze()


def is_due(step: int, every: int) -> bool:
    """Whether what is done every so many steps (0 for never) is to be done after a step."""
    return every > 0 and step > 0 and step % every == 0


# What a run starts with.


@dataclasses.dataclass(frozen=True)
class RunContext:
    """What a run works with, without the state that it changes.

    Attributes:
      vit: the network as it will be left, still without weights.
      train_step, eval_step: compiled, over the devices of the mesh.
      introduction: a line about all this.
    """

    config: ConfigDict
    data: RunData
    vit: Pretrained
    mesh: Mesh
    train_step: Step
    eval_step: EvalStep
    introduction: str

    def with_weights(self, state: TrainState) -> Pretrained:
        """The network with the weights of a state. All processes have to call it together."""
        params = unstack_blocks(to_host(state.averaged))
        return dataclasses.replace(self.vit, params=params)


def prepare(
    config: ConfigDict, folder: epath.Path, sources: tuple[Source, Source] | None
) -> tuple[RunContext, TrainState]:
    """Opens the data, makes network, first state and compiled steps. If all is well and all
    processes have the same, config.json is written."""
    cores = share_of_cores()
    with raise_on_all_processes():
        compiled = keep_compiled(config.compile_cache)
        mesh = make_mesh(config)
        data = open_data(config, sources, cores)
        vit = make_network(
            config,
            image_shape=data.image_shape,
            labels=data.labels,
            preprocess=data.eval_ops.spec,
        )
        chosen = choose_kernels_from_config(config, vit.model, data.image_shape[:2], mesh)
        introduction = introduce(config, vit, data)
        fingerprints = data.fingerprints
    found = {"attention by": chosen.attention, "preprocessing": data.eval_ops.spec}
    assert_equal_across_processes(run_signature(config, fingerprints) | found)
    tx = make_optimizer(config, config.total_steps, vit.model.frozen)
    model, params = as_trained(config, vit.model, vit.params)
    model = model.clone(kernels=chosen.kernels)
    ema = config.ema_decay > 0
    state = TrainState.create(params=params, tx=tx, seed=config.seed, mesh=mesh, ema=ema)
    context = RunContext(
        config=config,
        data=data,
        vit=dataclasses.replace(vit, params={}),  # The host's memory is not needed any more.
        mesh=mesh,
        train_step=make_step_from_config(config, model, tx, mesh, data.train_split[1]),
        eval_step=make_eval_step(model, mesh=mesh, loss=config.loss, normalize=data.eval_split[1]),
        introduction="; ".join(filter(None, (introduction, str(chosen), untold(), compiled))),
    )
    with raise_on_all_processes():
        if is_main_process():
            write_config(folder, config, fingerprints)
    return context, state


def run_signature(config: ConfigDict, fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """What all processes of a run must have the same."""
    free = {f"config.{field.name}" for field in FIELDS.values() if field.changes == "process"}
    fields = {k: v for k, v in flatten(config).items() if k not in free}
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*")):
        if file.suffix in (".py", ".toml", ".json"):
            code.update(file.read_bytes())
    versions = {"the code of vit_jax": code.hexdigest()[:12]}
    versions |= {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    return fields | versions | {f"the {k} images": v for k, v in fingerprints.items()}


def choose_kernels_from_config(
    config: ConfigDict, model: Any, image_size: tuple[int, int], mesh: Mesh
) -> Choice:
    """The kernels that a configuration asks for, see `choose_kernels`.

    Raises UserError if it asks for what doesn't work here.
    """
    chosen = choose_kernels(model, image_size, [*mesh.devices.flat], config.attention)
    if config.attention == "cudnn" and chosen.attention != "cudnn":
        raise UserError(f"config.attention is cudnn, but {chosen.why}: use auto or xla")
    return chosen


def introduce(config: ConfigDict, vit: Pretrained, data: RunData) -> str:
    """A line about what is trained on what."""
    parameters = sum(x.size for x in jax.tree.leaves(vit.params))
    weights = weights_source(config)
    return (
        f"{vit.spec.description}, {parameters / 1e6:.2f} M parameters, "
        f"{'from scratch' if weights is None else f'from {weights}'}, {len(data.labels)} classes, "
        f"{len(data.train):,} images to train on and {len(data.test):,} to test on, "
        f"read by {data.readers[0]}, {device_kinds()}"
        + "".join(f"; {note}" for note in (*vit.notes, *data.notes))
        + "".join(f"; no effect has {field}" for field in without_effect(config))
        + "".join(f"; {text}" for text in remarks(data.train, data.test))
    )


def open_batches(
    context: RunContext, step: int
) -> contextlib.AbstractContextManager[DevicePrefetcher]:
    """The batches from a step on, on the devices."""
    batches = context.data.train_batches(step)
    place = batch_sharding(context.mesh)
    return contextlib.closing(DevicePrefetcher(batches, place, context.config.prefetch))


# What is done between two steps.


def evaluate_and_log(
    context: RunContext, state: TrainState, step: int, stop: SharedStop, log: RunLog
) -> Scores | None:
    """Scores on the test images, written unless they stand there from before a restart; None if
    the run is to stop before all were seen."""
    place, stopped = batch_sharding(context.mesh), False

    def until_stopped() -> Iterator[Mapping[str, Any]]:
        nonlocal stopped
        for i, batch in enumerate(context.data.eval_batches()):
            stopped = i > 0 and stop.check()
            if stopped:
                return
            yield to_device(batch, place)

    classes = len(context.data.labels)
    scores = None
    try:
        scores = evaluate(context.eval_step, state.averaged, until_stopped(), classes)
    except UserError:
        if not stopped:  # Else nothing was readable so far.
            raise
    if stopped or scores is None:
        return None
    if step not in log.accuracies:
        if context.config.keep_best and scores.top1 > max(log.accuracies.values(), default=-1.0):
            best = context.with_weights(state)
            if is_main_process():
                best.save(log.folder / BEST_WEIGHTS, style=STYLE)
        log.accuracies[step] = scores.top1
        log.write(step, score_figures(scores))
        log.say(f"step {step}: {score_text(scores)}")
    return scores


class UnreadStep(NamedTuple):
    """A step that the devices were given: its metrics on them, and the clock when it is done."""

    step: int
    metrics: Mapping[str, jax.Array]
    done: Future


def wait_for(unread: deque[UnreadStep]) -> None:
    """Waits until the devices have done the steps so far."""
    if unread:
        unread[-1].done.result()


class BadStep(NamedTuple):
    """A step that went wrong: its number, why, and the numbers of bad steps so far and in a row."""

    step: int
    reason: str
    bad_steps: int
    consecutive_bad: int


def read_metrics(
    unread: deque[UnreadStep], last: int, config: ConfigDict, log: RunLog
) -> BadStep | None:
    """Reads the metrics of the steps up to number `last`, and reports those that are due.

    Nothing is read, and so nothing waited for, unless step `last` is due or the latest one. Bad
    steps are handled by `apply_bad_step_policy`; one that the run has to go back for is returned.
    """
    total = config.total_steps

    def is_reported(step: int) -> bool:
        return step % config.progress_every == 0 or step == total

    if not unread or not (is_reported(last) or last == unread[-1].step):
        return None
    steps = []
    while unread and unread[0].step <= last:
        steps.append(unread.popleft())
    # A copy of each scalar takes a GPU ten microseconds: most steps need this one alone.
    flags = jax.device_get([metrics["consecutive_bad"] for _, metrics, _ in steps])
    for (step, metrics, done), is_bad in zip(steps, flags, strict=True):
        clock = done.result()
        if not is_bad and not is_reported(step):
            continue
        values = {name: float(x) for name, x in jax.device_get(metrics).items()}
        if is_bad:
            bad = describe_bad_step(step, values)
            if apply_bad_step_policy(bad, config.on_bad_step, log.say):
                return bad
        if is_reported(step):
            log.step(step, values, clock)
    return None


def describe_bad_step(step: int, values: Mapping[str, float]) -> BadStep:
    """What was wrong with a step that `update_guard` calls bad, by its metrics."""
    not_finite = [name for name in MUST_BE_FINITE if not np.isfinite(values[name])]
    if not_finite:
        reason = f"the {not_finite[0]} became {values[not_finite[0]]}"
    else:
        norm, usual = values["grad_norm"], values["grad_norm_ema"]
        reason = f"the grad_norm {norm:.3g} was {norm / usual:.3g} times the usual {usual:.3g}"
    return BadStep(step, reason, int(values["bad_steps"]), int(values["consecutive_bad"]))


def apply_bad_step_policy(bad: BadStep, on_bad_step: str, say: Callable[[str], None]) -> bool:
    """What `config.on_bad_step` says of a bad step: raises UserError, tells of it, or gives True
    if the run has to go back."""
    if on_bad_step == "stop":
        raise bad_step_error(bad)
    if bad.consecutive_bad >= MAX_BAD_STEPS:
        raise bad_step_error(bad, f", the last of {MAX_BAD_STEPS} bad steps in a row")
    if on_bad_step == "skip":
        say(f"step {bad.step}: {bad.reason}: skipped, as {bad.bad_steps} in all")
    return on_bad_step == "rollback"


def bad_step_error(bad: BadStep, how_often: str = "") -> UserError:
    """To stop at a bad step."""
    return UserError(
        f"at step {bad.step} {bad.reason}{how_often}; what was saved before is kept: try a "
        "lower config.base_lr, more config.warmup_steps or a smaller config.grad_norm_clip, in "
        "another workdir"
        + ("" if how_often else ", or go on in this one with --config.on_bad_step=skip")
    )


def roll_back(checkpoints: Checkpoints, state: TrainState, bad: BadStep, log: RunLog) -> TrainState:
    """The weights of the last scheduled checkpoint, as those right after the bad step: the batches
    between are left out. The state is given up."""
    since, saved = checkpoints.restore_scheduled(state)
    if bad.bad_steps - int(saved.guard["bad_steps"]) >= MAX_BAD_STEPS:
        raise bad_step_error(bad, f", the {MAX_BAD_STEPS}th time since step {since}")
    log.say(
        f"step {bad.step}: {bad.reason}: gone back to the weights of step {since}, "
        f"{bad.bad_steps} in all"
    )
    return saved.with_counts(bad.step, bad_steps=bad.bad_steps, consecutive_bad=bad.consecutive_bad)
