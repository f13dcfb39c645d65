"""What a run tells while it goes on: a bar on a terminal or plain lines, and metrics.jsonl."""

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Container, Mapping
from contextlib import closing
from typing import Self, TextIO

from etils import epath
from ml_collections import ConfigDict
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vit_jax.escape import printable
from vit_jax.training.distributed import (
    broadcast_from_main,
    is_main_process,
    raise_on_all_processes,
)
from vit_jax.training.hardware import Usage
from vit_jax.training.inputs import Clock
from vit_jax.training.state import new_guard
from vit_jax.training.workdir import (
    BEST_WEIGHTS,
    METRICS,
    MetricsWriter,
    read_metrics,
    set_best_aside,
)

HIDDEN = new_guard().keys() - {"bad_steps"}  # What a step remembers, and nobody wants to see.

# What a progress line shows at its end, by its names in a step's metrics and in `Usage`.
MORE = {
    "grad": "grad_norm",
    "mfu": "time/mfu",
    "img/s/device": "time/images_per_s_per_device",
    "GiB": "time/memory_peak_gib",
    "update": "update_norm",
    "weights": "param_norm",
}
REDRAW_SECONDS = 0.1  # A terminal's lines are drawn no oftener, as this takes a millisecond.


class RunLog:
    """A context in which a run tells how it goes: the main process alone prints and writes.

    All processes have to open it together.

    Args:
      folder: the workdir. step: that of the restored state; what metrics.jsonl holds of later ones
        is removed.
      usage: of the devices.
      bad_steps: how many there have been; a run that goes back doesn't write them down.

    Attributes:
      gap: what to tell of lines that metrics.jsonl has lost, if it has. Then nobody knows how good
        the best weights were, and they get another name, so that no worse ones replace them.
      accuracies: {step: "test/top1"} of the evaluations in metrics.jsonl.
      say: prints a line. write, sync: see `MetricsWriter`.
    """

    def __init__(
        self, folder: epath.Path, config: ConfigDict, step: int, usage: Usage, bad_steps: int = 0
    ):
        self.folder, self._config, self._usage = folder, config, usage
        # Of one device it would be the column img/s once more.
        self._more = {k: v for k, v in MORE.items() if usage.devices > 1 or k != "img/s/device"}
        self._stack = contextlib.ExitStack()
        self.write: Callable[..., None] = lambda *_: None
        self.sync: Callable[[], None] = lambda: None
        self.gap = ""
        accuracies: list[tuple[int, float]] = []
        with raise_on_all_processes():
            if is_main_process():
                writer = self._stack.enter_context(closing(MetricsWriter(folder, step)))
                self.write, self.sync = writer.write, writer.sync
                lines = read_metrics(folder / METRICS)
                accuracies = [(x["step"], x["test/top1"]) for x in lines if "test/top1" in x]
                told = {x["step"] for x in lines if "train/loss" in x}
                lost = _lacking(told, config.progress_every, step + 1)
                lost = lost if len(lost) > bad_steps else []
                # That of the restored state itself is made now, if need be.
                lost_tests = _lacking(dict(accuracies), config.eval_every, step)
                if gap := sorted({*lost, *lost_tests}):
                    self.gap = f"; {METRICS} has lost lines of steps {gap[0]:,} to {gap[-1]:,}"
                if lost_tests and (folder / BEST_WEIGHTS).exists():
                    name = set_best_aside(folder)
                    self.gap += f", and with them how good {BEST_WEIGHTS} is: kept as {name}"
        self.accuracies: dict[int, float] = dict(broadcast_from_main(accuracies))
        nowhere = self._stack.enter_context(open(os.devnull, "w"))  # noqa: SIM115
        stream = None if is_main_process() else nowhere
        self._progress = Progress(config.total_steps, step, stream=stream)
        self.say = self._progress.message

    def __enter__(self) -> Self:
        self._stack.enter_context(self._progress)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def restart_clock(self, clock: Clock, step: int | None = None) -> None:
        """Speed is measured from here on; with a step, the time that is left too."""
        self._before = clock
        if step is not None:
            self._progress.restart_clock(step)

    def step(self, step: int, metrics: Mapping[str, float], clock: Clock) -> None:
        """Shows and writes the metrics of a step that was done at a clock."""
        steps, seconds = clock.steps - self._before.steps, clock.at - self._before.at
        wait_share = (clock.idle - self._before.idle) / seconds if steps else math.nan
        self._before = clock
        times = self._usage.figures(self._config.batch * steps / seconds if steps else math.nan)
        values = {k: v for k, v in metrics.items() if k not in HIDDEN}
        now = values | times
        self._progress.update(
            step,
            loss=values["loss"],
            lr=values["lr"],
            images_per_s=times.get("time/images_per_s", math.nan),
            wait_share=wait_share,
            more={short: now[name] for short, name in self._more.items() if name in now},
        )
        if self._config.on_bad_step == "stop":
            del values["bad_steps"]
        if steps:
            times["time/data_wait"] = wait_share
        self.write(step, {f"train/{key}": value for key, value in values.items()} | times)


def _lacking(found: Container[int], every: int, end: int) -> list[int]:
    """The multiples of a number of steps (0 for none), below `end`, that aren't found."""
    return [step for step in range(every, end, every) if step not in found] if every else []


class Progress:
    """Shows how far a run is, how well it goes and what it waits for.

    On a terminal, two lines that stay at the bottom and fit 60 columns; a wider one shows further
    figures, as many as fit:

        120/600 ━━━━━━━━━━━━━                   20%  eta 0:01:12
        loss  0.4312  lr 9.2e-03    1,234 img/s  data wait   3%

    Elsewhere (a file, a pipe, a notebook) each update is one line of aligned columns.

    Args:
      total_steps, start_step: the last step of the run, and the one that it starts from.
      stream: where to write; standard error if None.
    """

    def __init__(self, total_steps: int, start_step: int, *, stream: TextIO | None = None):
        self._stream = sys.stderr if stream is None else stream
        self._total = total_steps
        self._step = start_step
        self._eta = "-:--:--"
        self._numbers = "the first step is being compiled"
        self._more: list[str] = []
        self._drawn = -math.inf
        self.restart_clock(start_step)
        self._live: Live | None = None
        if self._stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
            self._live = Live(
                console=Console(file=self._stream, force_terminal=True),
                get_renderable=self._bar,
                auto_refresh=False,
                redirect_stdout=sys.stdout.isatty(),  # what is piped elsewhere must get there
            )

    def update(
        self,
        step: int,
        *,
        loss: float,
        lr: float,
        images_per_s: float,
        wait_share: float,
        more: Mapping[str, float] | None = None,
    ) -> None:
        """Shows the state after so many updates: images a second of all devices together and the
        share of the time in which they waited for data, both NaN if not measured yet; and more
        figures by short names, the most important first."""
        self._step = step
        self._eta = self._time_left(step)
        self._numbers = (
            f"loss {_loss(loss):>7}  lr {lr:.1e}  {_rate(images_per_s):>7} img/s  "
            f"data wait {'-' if math.isnan(wait_share) else f'{wait_share:.0%}':>4}"
        )
        self._more = [f"  {name} {value:<8.3g}" for name, value in (more or {}).items()]
        if self._live is None:
            line = f"step {self._counter()}  {self._numbers}  eta {self._eta}"
            self._print("".join([line, *self._more]).rstrip())
        elif time.monotonic() > self._drawn + REDRAW_SECONDS:
            self._live.refresh()
            self._drawn = time.monotonic()

    def restart_clock(self, step: int) -> None:
        """The time left comes from the steps after this one, which has just been done."""
        self._since = step, time.monotonic()

    def message(self, text: str) -> None:
        """Prints a line that stays: above the bar, or between the plain lines."""
        text = printable(text)
        if self._live is None:
            self._print(text)
        else:
            self._live.console.print(Text(text), soft_wrap=True)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def _print(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()

    def _counter(self) -> str:
        return f"{self._step:>{len(str(self._total))}}/{self._total}"

    def _time_left(self, step: int) -> str:
        """Time to the last step at the rate since `restart_clock`, as h:mm:ss."""
        then, since = self._since
        if step <= then:
            return "-:--:--"
        passed = time.monotonic() - since
        seconds = round(passed / (step - then) * max(self._total - step, 0))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def _bar(self) -> Group:
        """The two lines at the bottom of the terminal."""
        share = self._step / self._total if self._total else 1.0
        numbers, width = self._numbers, self._live.console.width if self._live else 0
        for text in self._more:
            if len(numbers) + len(text.rstrip()) > width:
                break
            numbers += text
        line = Table.grid(padding=(0, 1), expand=True)
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True, justify="right")
        line.add_row(
            self._counter(),
            ProgressBar(total=self._total, completed=self._step),
            f"{share:4.0%}  eta {self._eta}",
        )
        return Group(line, Text(numbers.rstrip(), no_wrap=True, overflow="ellipsis"))


def _loss(loss: float) -> str:
    """Four decimals while they say something, else an exponent; seven characters at most."""
    plain = loss == 0 or 1e-3 <= abs(loss) < 100 or not math.isfinite(loss)
    return f"{loss:.4f}" if plain else f"{loss:.1e}"


def _rate(images_per_s: float) -> str:
    if math.isnan(images_per_s):
        return "-"
    return f"{images_per_s:,.0f}" if images_per_s >= 10 else f"{images_per_s:.1f}"
