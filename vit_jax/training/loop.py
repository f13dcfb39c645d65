"""The steps of a run, and what is due between them."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax.evaluation.metrics import EvalStep, Scores, evaluate
from vit_jax.models.blocks import unstack_blocks
from vit_jax.parallel import join, split, to_host
from vit_jax.pretrained import Pretrained
from vit_jax.training.checkpointing import Checkpoints
from vit_jax.training.feed import Feed, Figures
from vit_jax.training.guard import LIMIT, heed
from vit_jax.training.hardware import Usage
from vit_jax.training.metrics import MetricsWriter
from vit_jax.training.optimizer import schedule_of
from vit_jax.training.outcome import read_tests, score_figures, score_text
from vit_jax.training.processes import SharedStop, gather, is_first, together
from vit_jax.training.profile import Profile, trace_folder
from vit_jax.training.progress import Progress
from vit_jax.training.signals import StopRequest
from vit_jax.training.state import TrainState
from vit_jax.training.step import Step
from vit_jax.training.task import Task
from vit_jax.training.workdir import BEST_WEIGHTS

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
        own_stop: StopRequest,
        stack: contextlib.ExitStack,
    ):
        self.state, self.step = state, int(state.step)
        self.scores: Scores | None = None
        self._work, self._config, self._workdir = work, work.config, workdir
        self._checkpoints, self._stack = checkpoints, stack
        self._start = self.step
        self._goes_back = self._config.on_bad_step == "rollback"
        self._metrics: MetricsWriter | None = None
        tests: list[tuple[int, float]] = []
        with together():
            if is_first():
                self._metrics = stack.enter_context(MetricsWriter(workdir, resume_step=self.step))
                tests = [(line["step"], line["test/top1"]) for line in read_tests(workdir)]
        self._accuracies: dict[int, float] = dict(gather(tests)[0])
        console = None if is_first() else stack.enter_context(open(os.devnull, "w"))  # noqa: SIM115
        total = self._config.total_steps
        self._progress = stack.enter_context(Progress(total, self.step, stream=console))
        self.say = self._progress.message
        self._feed = self._feed_from(self.step)
        self._figures = Figures()
        self._profile = stack.enter_context(Profile(self._config.profile, trace_folder(workdir)))
        self._stop = SharedStop(own_stop, work.mesh)
        self._usage = Usage(work.vit.model, work.task.picture_shape)
        self._schedule = schedule_of(self._config, total)

    @property
    def signal_name(self) -> str | None:
        """Of the signal that stopped the run, in any of the processes."""
        return self._stop.signal_name

    def run(self) -> None:
        """Goes on until the last step is done, or a signal has come; the state is then saved."""
        ended = False
        while not ended:
            try:
                ended = self._do_what_is_due()
                if not ended:
                    self._take_step()
            except _GoneBackError:
                continue

    def weights(self) -> Pretrained:
        """The network with the weights of the state. All processes have to call it together."""
        params = unstack_blocks(to_host(self.state.averaged))
        return dataclasses.replace(self._work.vit, params=params)

    def _do_what_is_due(self) -> bool:
        """What is due after a step; True if the run ends with that.

        In an order that a kill at any moment does not disturb: figures are written before the state
        is saved, and on resuming those after the saved state go.
        """
        if told := self._profile.at(self.step, self._figures.wait):
            self.say(f"step {self.step}: {told}")
        last = self.step == self._config.total_steps
        if last or self._due(self._config.eval_every):
            self._test(last)
        stopping = self._stop.check(wait=self.step == self._start)
        begins = self._goes_back and self._checkpoints.latest is None
        if last or stopping or begins or self._due(self._config.checkpoint_every):
            self._save()
        return last or stopping

    def _take_step(self) -> None:
        # JAX would send off any number of steps, each with its batch in the device's memory:
        # one is running while the next is made ready.
        self._figures.wait(running=1)
        self.state, figures = self._work.train_step(
            self.state, self._feed.take(drain=self._figures.wait)
        )
        self.step += 1
        self._figures.add(self.step, figures)
        if self.step == self._start + 1:  # The compiler's time is not the steps' time.
            self._figures.wait()
            self._learning_rate(self.step)
            self._feed.restart_clock()
            self._progress.restart_clock(self.step)
        if self._due(self._config.progress_every) or self.step == self._config.total_steps:
            self._report()

    def _report(self) -> None:
        """Shows and writes the figures of the last step."""
        values = self._look()
        speed = self._feed.speed()
        times = self._usage.figures(speed.batches_per_s * self._config.batch)
        lr, now = self._learning_rate(self.step - 1), values | times
        self._progress.update(
            self.step,
            loss=values["loss"],
            lr=lr,
            images_per_s=times.get("time/images_per_s", math.nan),
            wait_share=speed.wait_share,
            more={short: now[name] for short, name in MORE.items() if name in now},
        )
        if self._config.on_bad_step == "stop":
            del values["bad_steps"]
        values = {f"train/{key}": value for key, value in values.items()}
        if not math.isnan(speed.wait_share):
            times["time/data_wait"] = speed.wait_share
        if self._metrics:
            self._metrics.write(self.step, values | times | {"train/lr": lr})

    def _test(self, last: bool) -> None:
        """Evaluates the state; writes the scores, unless they stand there from before a restart."""
        self._look()
        new = self.step not in self._accuracies
        if last or new:
            self.scores = self._evaluate()
        if self.scores is not None and new:
            best = max(self._accuracies.values(), default=-1.0)
            if self._config.keep_best and self.scores.top1 > best:
                weights = self.weights()
                if is_first():
                    weights.save(self._workdir / BEST_WEIGHTS)
            self._accuracies[self.step] = self.scores.top1
            if self._metrics:
                self._metrics.write(self.step, score_figures(self.scores))
            self.say(f"step {self.step}: {score_text(self.scores)}")
        self._feed.restart_clock()

    def _evaluate(self) -> Scores | None:
        """Scores on the test pictures; None if the run is to end before all were seen."""
        task, place = self._work.task, split(self._work.mesh)

        def until_stopped() -> Iterator[Mapping[str, Any]]:
            for batch in task.eval_batches():
                if self._stop.check():
                    raise _StoppedError
                yield join(batch, place)

        try:
            return evaluate(
                self._work.eval_step, self.state.averaged, until_stopped(), len(task.labels)
            )
        except _StoppedError:
            return None

    def _save(self) -> None:
        self._look()  # What is saved is known to be good.
        if (self.step or self._goes_back) and self._checkpoints.latest != self.step:
            if self._metrics:
                self._metrics.sync()
            self._checkpoints.save(self.step, self.state)
        self._feed.restart_clock()

    def _look(self) -> dict[str, float]:
        """The figures of the last step.

        Of a bad one among those since the last look, raises UserError, tells, or goes back to the
        checkpoint before it, for the batch after it, and raises _GoneBackError.
        """
        values, steps = self._figures.look()
        bad = heed(steps, self._config.on_bad_step, self.say)
        if bad is None:
            return values
        since, saved = self._checkpoints.restore_scheduled(self.state)
        if bad.bad - int(saved.guard["bad_steps"]) >= LIMIT:
            raise bad.error(f", the {LIMIT}th time since step {since}")
        self.say(
            f"step {bad.step}: {bad.reason}: gone back to the weights of step {since}, {bad.bad} "
            "in all"
        )
        self.state, self.step = saved.moved(bad), bad.step
        self._feed.close()
        self._feed = self._feed_from(self.step)
        raise _GoneBackError

    def _feed_from(self, step: int) -> Feed:
        batches = self._work.task.train_batches(step)
        feed = Feed(batches, split(self._work.mesh), self._config.prefetch)
        return self._stack.enter_context(contextlib.closing(feed))

    def _learning_rate(self, step: int) -> float:
        with jax.transfer_guard("allow"):  # Of a few numbers, where a line is written anyway.
            return float(self._schedule(step))

    def _due(self, every: int) -> bool:
        return every > 0 and self.step > 0 and self.step % every == 0


class _StoppedError(Exception):
    """An evaluation is broken off because the run is to end."""


class _GoneBackError(Exception):
    """The state is now another: that of a checkpoint, to leave out a bad step."""
