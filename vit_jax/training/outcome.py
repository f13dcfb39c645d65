"""What a run leaves behind: weights, a report and the last line."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.evaluation.metrics import Scores
from vit_jax.evaluation.report import training_report
from vit_jax.pretrained import WEIGHTS, Pretrained
from vit_jax.training.metrics import read_metrics
from vit_jax.training.task import Task
from vit_jax.training.workdir import CONFIG, METRICS, REPORT


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
      step: updates done. finished: whether these are all; if not, the same call goes on from here.
      summary: what to tell a person.
      test: the last figures on the test pictures, {"test/loss", "test/top1", "test/top5"}; empty if
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
    vit.save(workdir / WEIGHTS)
    training_report(
        workdir / REPORT,
        metrics=read_metrics(workdir / METRICS),
        confusion=scores.confusion,
        labels=task.labels,
        pictures=[
            (
                task.test[int(scores.index[i])]["image"],
                int(scores.truth[i]),
                int(scores.prediction[i]),
                float(scores.probability[i]),
            )
            for i in _examples(scores)
        ],
        title=f"{vit.spec.description} on {task.config.dataset}: {score_text(scores)}",
    )
    summary = (
        f"finished {total_steps:,} steps: {score_text(scores)}\n"
        f"{workdir} holds {WEIGHTS}, {REPORT}, {METRICS} and the TensorBoard events"
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


def score_text(scores: Scores) -> str:
    """Scores in one line."""
    right = int(np.trace(scores.confusion))
    text = (
        f"test accuracy {scores.top1:.1%} ({right:,} of {scores.count:,}), loss {scores.loss:.4f}"
    )
    return text + (f", {scores.skipped:,} unreadable left out" if scores.skipped else "")


def _examples(scores: Scores, count: int = 12) -> np.ndarray:
    """Which test pictures to show: the most confident mistakes, and successes from all over the
    set."""
    wrong = np.flatnonzero((scores.truth != scores.prediction) & (scores.truth >= 0))
    right = np.flatnonzero(scores.truth == scores.prediction)
    wrong = wrong[np.argsort(-scores.probability[wrong], kind="stable")][: count // 2]
    missing = min(count - len(wrong), len(right))
    return np.concatenate([wrong, right[np.linspace(0, len(right) - 1, missing).astype(int)]])
