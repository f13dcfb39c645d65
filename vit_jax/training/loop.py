"""The steps of a run, and what is due between them."""

import contextlib
import dataclasses
import gc
import itertools
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax.evaluation.metrics import EvalStep, Scores, evaluate
from vit_jax.models.blocks import unstack_blocks
from vit_jax.pretrained import Pretrained
from vit_jax.sharding import batch_sharding, to_host
from vit_jax.training.checkpointing import Checkpoints
from vit_jax.training.distributed import (
    SharedStop,
    StopSignal,
    broadcast_from_main,
    is_main_process,
    raise_on_all_processes,
)
from vit_jax.training.feed import DevicePrefetcher, MetricsBuffer, StepMetrics, to_device
from vit_jax.training.guard import LIMIT, BadStep, heed, new_guard
from vit_jax.training.hardware import Profile, Usage, trace_folder
from vit_jax.training.metrics import MetricsWriter
from vit_jax.training.outcome import read_tests, score_figures, score_text
from vit_jax.training.progress import Progress
from vit_jax.training.state import TrainState
from vit_jax.training.step import Step
from vit_jax.training.task import Task
from vit_jax.training.workdir import BEST_WEIGHTS

# Steps that follow before the metrics of a step are read: the device works on these meanwhile. The
# same number in all processes of a run, so that they go back from a bad step at the same place.
REPORT_DELAY = 2

# What a step remembers of others, and nobody wants to see.
HIDDEN = new_guard().keys() - {"bad_steps"}

# What a progress line shows at its end, by its names in a step's figures and in `Usage`.
MORE = {
    "grad": "grad_norm",
    "mfu": "time/mfu",
    "img/s/device": "time/images_per_s_per_device",
    "GiB": "time/memory_peak_gib",
    "update": "update_norm",
    "weights": "param_norm",
}


@dataclasses.dataclass(frozen=True)
class Work:
    """What a run does, without the state that it changes.

    Attributes:
      vit: the network as it will be left, still without weights.
      train_step, eval_step: compiled, over the devices of the mesh.
      introduction: a line about all this.
    """

    config: ConfigDict
    task: Task
    vit: Pretrained
    mesh: Mesh
    train_step: Step
    eval_step: EvalStep
    introduction: str


class Loop:
    """Trains from a state on; evaluates, writes and saves where the configuration says so.

    Args:
      work: what is done.
      workdir: of the run, claimed.
      checkpoints: of the workdir.
      state: is given up.
      own_stop: set when this process is to stop.
      stack: closes what is opened here.

    Attributes:
      state: after step number `step`.
      scores: of the last evaluation; None if there was none, or it was broken off.
      say: prints a line.
    """

    def __init__(
        self,
        work: Work,
        workdir: Path,
        checkpoints: Checkpoints,
        state: TrainState,
        own_stop: StopSignal,
        stack: contextlib.ExitStack,
    ):
        self.state, self.step = state, int(state.step)
        self.scores: Scores | None = None
        self._work, self._config, self._workdir = work, work.config, workdir
        self._checkpoints, self._stack = checkpoints, stack
        self._start = self.step
        self._goes_back = self._config.on_bad_step == "rollback"
        self._writer: MetricsWriter | None = None
        tests: list[tuple[int, float]] = []
        with raise_on_all_processes():
            if is_main_process():
                self._writer = stack.enter_context(MetricsWriter(workdir, resume_step=self.step))
                tests = [(line["step"], line["test/top1"]) for line in read_tests(workdir)]
        self._accuracies: dict[int, float] = dict(broadcast_from_main(tests))
        console = None if is_main_process() else stack.enter_context(open(os.devnull, "w"))  # noqa: SIM115
        total = self._config.total_steps
        self._progress = stack.enter_context(Progress(total, self.step, stream=console))
        self.say = self._progress.message
        self._start_batches()
        self._profile = stack.enter_context(Profile(self._config.profile, trace_folder(workdir)))
        self._stop = SharedStop(own_stop)
        self._usage = Usage(work.vit.model, work.task.image_shape)
        stack.callback(gc.unfreeze)

    @property
    def signal_name(self) -> str | None:
        """Of the signal that stopped the run, in any of the processes."""
        return self._stop.signal_name

    def run(self) -> None:
        """Goes on until the last step is done, or a signal has come; the state is then saved.

        In an order that a kill at any moment does not disturb: metrics are written before the state
        is saved, and on resuming those after the saved state go.
        """
        while True:
            if told := self._profile.at(self.step, self._metrics.wait):
                self.say(f"step {self.step}: {told}")
            last = self.step == self._config.total_steps
            if last or self._due(self._config.eval_every):
                if not self._read_metrics():
                    continue
                self._test(last)
            stopping = self._stop.check()
            begins = self._goes_back and self._checkpoints.latest is None
            if last or stopping or begins or self._due(self._config.checkpoint_every):
                if not self._read_metrics():  # What is saved is known to be good.
                    continue
                self._save()
            if last or stopping:
                return
            self._train_step()

    def weights(self) -> Pretrained:
        """The network with the weights of the state. All processes have to call it together."""
        params = unstack_blocks(to_host(self.state.averaged))
        return dataclasses.replace(self._work.vit, params=params)

    def _train_step(self) -> None:
        self.state, metrics = self._work.train_step(self.state, next(self._batches))
        self.step += 1
        done = self._batches.watch(metrics)
        self._metrics.add(self.step, metrics, done, wanted=self._is_reported(self.step))
        if self.step == self._start + 1:  # The compiler's time is not the steps' time.
            self._reported = done.result()
            self._progress.restart_clock(self.step)
            # Else Python looks through all that the compiler left, for garbage, every few hundred
            # steps: 0.15 s in which no step is sent off.
            gc.collect()
            gc.freeze()
        if self._is_reported(self.step - REPORT_DELAY):
            self._read_metrics(self.step - REPORT_DELAY)

    def _is_reported(self, step: int) -> bool:
        return step % self._config.progress_every == 0 or step == self._config.total_steps

    def _read_metrics(self, last: int | None = None) -> bool:
        """Heeds the bad ones and reports the due ones of the steps up to `last`, by default of all.

        Of a bad one it raises UserError, tells, or goes back to the checkpoint before it, for the
        batch after it. False if it has gone back: state and step are then others.
        """
        for done in self._metrics.read(self.step if last is None else last):
            if done.bad and heed(done.bad, self._config.on_bad_step, self.say):
                self._go_back(done.bad)
                return False
            if self._is_reported(done.step):
                self._report(done)
        return True

    def _go_back(self, bad: BadStep) -> None:
        since, saved = self._checkpoints.restore_scheduled(self.state)
        if bad.bad - int(saved.guard["bad_steps"]) >= LIMIT:
            raise bad.error(f", the {LIMIT}th time since step {since}")
        self.say(
            f"step {bad.step}: {bad.reason}: gone back to the weights of step {since}, {bad.bad} "
            "in all"
        )
        self.state, self.step = saved.moved(bad), bad.step
        self._batches.close()
        self._start_batches()

    def _report(self, done: StepMetrics) -> None:
        """Shows and writes the metrics of a step."""
        before, self._reported = self._reported, done.clock
        steps, seconds = done.clock.steps - before.steps, done.clock.at - before.at
        wait_share = (done.clock.idle - before.idle) / seconds if steps else math.nan
        rate = steps / seconds if steps else math.nan
        times = self._usage.figures(rate * self._config.batch)
        values = {k: v for k, v in done.values.items() if k not in HIDDEN}
        now = values | times
        self._progress.update(
            done.step,
            loss=values["loss"],
            lr=values["lr"],
            images_per_s=times.get("time/images_per_s", math.nan),
            wait_share=wait_share,
            more={short: now[name] for short, name in MORE.items() if name in now},
        )
        if self._config.on_bad_step == "stop":
            del values["bad_steps"]
        if steps:
            times["time/data_wait"] = wait_share
        if self._writer:
            values = {f"train/{key}": value for key, value in values.items()}
            self._writer.write(done.step, values | times)

    def _test(self, last: bool) -> None:
        """Evaluates the state; writes the scores, unless they stand there from before a restart."""
        new = self.step not in self._accuracies
        if last or new:
            self.scores = self._evaluate()
        if self.scores is not None and new:
            best = max(self._accuracies.values(), default=-1.0)
            if self._config.keep_best and self.scores.top1 > best:
                weights = self.weights()
                if is_main_process():
                    weights.save(self._workdir / BEST_WEIGHTS)
            self._accuracies[self.step] = self.scores.top1
            if self._writer:
                self._writer.write(self.step, score_figures(self.scores))
            self.say(f"step {self.step}: {score_text(self.scores)}")
        self._restart_clock()

    def _evaluate(self) -> Scores | None:
        """Scores on the test images; None if the run is to end before all were seen."""
        task, sharding = self._work.task, batch_sharding(self._work.mesh)

        def until_stopped() -> Iterator[Mapping[str, Any]]:
            for batch in map(to_device, task.eval_batches(), itertools.repeat(sharding)):
                if self._stop.check():
                    raise _StoppedError
                yield batch

        try:
            return evaluate(
                self._work.eval_step, self.state.averaged, until_stopped(), len(task.labels)
            )
        except _StoppedError:
            return None

    def _save(self) -> None:
        if (self.step or self._goes_back) and self._checkpoints.latest != self.step:
            if self._writer:
                self._writer.sync()
            self._checkpoints.save(self.step, self.state)
        self._restart_clock()

    def _start_batches(self) -> None:
        """The batches from the current step on, and no metrics to read."""
        batches = DevicePrefetcher(
            self._work.task.train_batches(self.step),
            batch_sharding(self._work.mesh),
            self._config.prefetch,
        )
        self._batches = self._stack.enter_context(contextlib.closing(batches))
        self._metrics = MetricsBuffer()
        self._restart_clock()

    def _restart_clock(self) -> None:
        """Speed is measured from here on; all steps are done."""
        self._batches.restart_clock()
        self._reported = self._batches.clock

    def _due(self, every: int) -> bool:
        return every > 0 and self.step > 0 and self.step % every == 0


class _StoppedError(Exception):
    """An evaluation is broken off because the run is to end."""
