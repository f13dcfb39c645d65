"""What a run leaves behind: weights, a report and the last line."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vit_jax.evaluation.metrics import Scores
from vit_jax.evaluation.report import write_report
from vit_jax.pretrained import WEIGHTS, Pretrained
from vit_jax.training.metrics import read_metrics
from vit_jax.training.review import make_report, score_text
from vit_jax.training.task import Task
from vit_jax.training.workdir import CONFIG, METRICS, PAGE, REPORT


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
      step: updates done. finished: whether these are all; if not, the same call goes on from here.
      summary: what to tell a person.
      test: the last figures on the test images, {"test/loss", "test/top1", "test/top5"}; empty if
        there were none.
    """

    step: int
    finished: bool
    summary: str
    test: Mapping[str, float]


def finished(workdir: Path, total_steps: int) -> Result | None:
    """The result of a run that has left everything it has to leave; else None."""
    if not all((workdir / name).exists() for name in (CONFIG, WEIGHTS, REPORT)):
        return None
    test = last_test(workdir)
    accuracy = f", test accuracy {test['test/top1']:.1%}" if test else ""
    return Result(
        total_steps,
        True,
        f"the run in {workdir} has finished its {total_steps:,} steps{accuracy}: nothing to do. "
        "For a new run choose another workdir",
        test,
    )


def finish(vit: Pretrained, scores: Scores, task: Task, workdir: Path, total_steps: int) -> Result:
    """Writes weights and report."""
    (workdir / REPORT).unlink(missing_ok=True)  # One of the run on its way says nothing of its end.
    vit.save(workdir / WEIGHTS)
    report = make_report(workdir, task.config, vit.spec.description, scores, task.test)
    for name in (PAGE, REPORT):
        write_report(report, workdir / name)
    summary = (
        f"finished {total_steps:,} steps: {score_text(scores)}\n"
        f"{workdir} holds {WEIGHTS}, {PAGE}, {REPORT}, {METRICS} and the TensorBoard events"
    )
    return Result(total_steps, True, summary, score_figures(scores))


def read_tests(workdir: Path) -> list[dict[str, Any]]:
    """The lines with "test/..." figures in the metrics of a run."""
    return [line for line in read_metrics(workdir / METRICS) if "test/top1" in line]


def last_test(workdir: Path) -> dict[str, float]:
    """The last "test/..." figures in the metrics of a run."""
    lines = read_tests(workdir)
    return {k: v for k, v in lines[-1].items() if k.startswith("test/")} if lines else {}


def score_figures(scores: Scores) -> dict[str, float]:
    """Scores as they stand in the metrics."""
    return {"test/loss": scores.loss, "test/top1": scores.top1, "test/top5": scores.top5}
