"""A training run, from the first image to the report."""

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax.data import Source
from vit_jax.errors import UserError, full_disk_explained
from vit_jax.evaluation.metrics import make_eval_step
from vit_jax.files import keep_compiled
from vit_jax.models.kernels import Kernels, choose_kernels
from vit_jax.pretrained import Pretrained
from vit_jax.sharding import device_kinds, make_mesh
from vit_jax.training.checkpointing import Checkpoints
from vit_jax.training.config import check_config, flatten, weights_source, without_effect
from vit_jax.training.distributed import (
    StopSignal,
    assert_equal_across_processes,
    broadcast_from_main,
    exit_with_others,
    is_main_process,
    raise_on_all_processes,
    share_of_cores,
)
from vit_jax.training.fields import CHANGING, FREE_FIELDS
from vit_jax.training.hardware import untold
from vit_jax.training.loop import Loop, Work
from vit_jax.training.network import as_trained, make_network
from vit_jax.training.optimizer import make_optimizer, schedule_of
from vit_jax.training.outcome import Result, finish, finished, last_test
from vit_jax.training.state import TrainState
from vit_jax.training.step import Step, make_train_step
from vit_jax.training.task import Task, mixup, open_task
from vit_jax.training.workdir import (
    CHECKPOINTS,
    GIVEN,
    claim_workdir,
    lock_holder,
    open_workdir,
)


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
    folder, explained = Path(workdir), full_disk_explained(f"the workdir {workdir}")
    done: Result | None = None
    with StopSignal() as stop:
        with raise_on_all_processes():
            config = check_config(config)
            if sources:
                config.dataset = sources[0].name + GIVEN
        with explained, contextlib.ExitStack() as stack:
            with raise_on_all_processes():
                if is_main_process():
                    stack.enter_context(open_workdir(workdir, config))
                    done = finished(folder, config.total_steps)
            if done := _of_first(done):
                return done
            assert_equal_across_processes({"in the workdir a lock of process": lock_holder(folder)})
            return _train(config, folder, stop, sources)


def _of_first(result: Result | None) -> Result | None:
    """The first process's result, in all of them."""
    fields = broadcast_from_main(result and dataclasses.asdict(result))
    return fields and Result(**fields)


def _train(
    config: ConfigDict,
    workdir: Path,
    own_stop: StopSignal,
    sources: tuple[Source, Source] | None,
) -> Result:
    work, state = _prepare(config, workdir, sources)
    with contextlib.ExitStack() as stack:
        folder = workdir / CHECKPOINTS
        every = config.checkpoint_every if config.on_bad_step == "rollback" else None
        checkpoints = Checkpoints(folder, keep=config.keep_checkpoints, every=every)
        stack.enter_context(contextlib.closing(checkpoints))
        assert_equal_across_processes({"checkpoint": checkpoints.latest})
        state, damaged = checkpoints.restore(state)
        loop = Loop(work, workdir, checkpoints, state, own_stop, stack)
        del state  # The first step gives it up, and its memory.
        # Checkpoints that are being written wait, when they are closed, for all processes.
        stack.enter_context(exit_with_others(config.silence_timeout))
        stack.enter_context(full_disk_explained(f"the workdir {workdir}"))
        loop.say(work.introduction)
        if damaged:
            loop.say(damaged)
        if loop.step:
            loop.say(f"going on from step {loop.step}, saved in {folder}")
        loop.run()
    result = _of_first(_end(loop, work, workdir))
    assert result is not None
    return result


def _prepare(
    config: ConfigDict, workdir: Path, sources: tuple[Source, Source] | None
) -> tuple[Work, TrainState]:
    """What a run does, and the state that it begins with; claims the workdir if all is well."""
    cores = share_of_cores()
    with raise_on_all_processes():
        compiled = keep_compiled(config.compile_cache)
        mesh = make_mesh(config)
        task = open_task(config, sources, cores)
        vit = make_network(
            config,
            image_shape=task.image_shape,
            labels=task.labels,
            preprocess=task.eval_ops.spec,
        )
        kernels, why = kernels_of(config, vit.model, task.image_shape[:2], mesh)
        introduction = _introduction(config, vit, task)
        fingerprints = task.fingerprints
    assert_equal_across_processes(
        _what_matters(config, fingerprints) | {"attention": why.partition(":")[0]}
    )
    tx = make_optimizer(config, config.total_steps)
    model, params = as_trained(config, vit.model, vit.params)
    model = model.clone(kernels=kernels)
    ema = config.ema_decay > 0
    state = TrainState.create(params=params, tx=tx, seed=config.seed, mesh=mesh, ema=ema)
    work = Work(
        config=config,
        task=task,
        vit=dataclasses.replace(vit, params={}),  # The host's memory is not needed any more.
        mesh=mesh,
        train_step=step_of(task, model, tx, mesh),
        eval_step=make_eval_step(model, mesh=mesh, loss=config.loss),
        introduction="; ".join(filter(None, (introduction, why, untold(), compiled))),
    )
    with raise_on_all_processes():
        if is_main_process():
            claim_workdir(workdir, config, fingerprints)
    return work, state


def _end(loop: Loop, work: Work, workdir: Path) -> Result | None:
    """Leaves weights and report if the run is finished; the result, in the first process."""
    step, total = loop.step, work.config.total_steps
    if loop.scores is None or step < total:
        saved = f"saved in {workdir / CHECKPOINTS}" if step else "nothing to save yet"
        summary = (
            f"stopped by {loop.signal_name} at step {step:,} of {total:,}, {saved}: "
            "start the same command again to go on"
        )
        return Result(step, False, summary, last_test(workdir)) if is_main_process() else None
    vit = loop.weights()
    with raise_on_all_processes(), full_disk_explained(f"the workdir {workdir}"):
        if is_main_process():
            return finish(vit, loop.scores, work.task, workdir, total)
    return None


def _what_matters(config: ConfigDict, fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """What all processes of a run must have the same."""
    free = {f"config.{field}" for field in FREE_FIELDS - CHANGING}
    fields = {k: v for k, v in flatten(config).items() if k not in free}
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(file.read_bytes())
    versions = {"the code of vit_jax": code.hexdigest()[:12]}
    versions |= {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    return fields | versions | {f"the {k} images": v for k, v in fingerprints.items()}


def kernels_of(
    config: ConfigDict, model: Any, image_size: tuple[int, int], mesh: Mesh
) -> tuple[Kernels, str]:
    """The kernels that a configuration asks for, and why: see `choose_kernels`.

    Raises UserError if it asks for what doesn't work here.
    """
    kernels, why = choose_kernels(model, image_size, [*mesh.devices.flat], config.attention)
    if config.attention == "cudnn" and why.startswith("attention by xla"):
        reason = why.removeprefix("attention by xla: ")
        raise UserError(f"config.attention is cudnn, but {reason}: use auto or xla")
    return kernels, why


def step_of(
    task: Task, model: Any, tx: optax.GradientTransformation, mesh: Mesh | None = None
) -> Step:
    """The compiled step of a run, as its configuration says; see `make_train_step`."""
    config = task.config
    on_cpus = (mesh or make_mesh()).devices.flat[0].platform == "cpu"

    def is_reported(step: jax.Array) -> jax.Array:
        return (step % config.progress_every == 0) | (step == config.total_steps)

    return make_train_step(
        model,
        tx,
        mesh=mesh,
        compile=config.compile,
        accum_steps=config.accum_steps,
        loss=config.loss,
        label_smoothing=config.label_smoothing,
        mixup=mixup(config),
        cutmix=config.cutmix,
        value_range=task.value_range,
        skip_bad=config.on_bad_step != "stop",
        spike=config.spike,
        ema_decay=config.ema_decay,
        # On CPUs it pays to leave it out of the other steps (with Adam it would have to be computed
        # anew); a GPU would wait for the decision.
        update_norm_at=is_reported if on_cpus and config.optim == "sgd" else None,
        learning_rate=schedule_of(config, config.total_steps),
    )


def _introduction(config: ConfigDict, vit: Pretrained, task: Task) -> str:
    parameters = sum(x.size for x in jax.tree.leaves(vit.params))
    weights = weights_source(config)
    return (
        f"{vit.spec.description}, {parameters / 1e6:.2f} M parameters, "
        f"{'from scratch' if weights is None else f'from {weights}'}, {len(task.labels)} classes, "
        f"{len(task.train):,} images to train on and {len(task.test):,} to test on, "
        f"read by {task.readers[0]}, {device_kinds()}"
        + "".join(f"; no effect has {field}" for field in without_effect(config))
    )
