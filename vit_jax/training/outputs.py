"""What a run leaves behind, and what can be said of a workdir: weights, scores and a report."""

import dataclasses
import logging
import os
from collections.abc import Mapping

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from vit_jax import data
from vit_jax.buckets import local_copy
from vit_jax.checkpoints import open_arrays, read_spec, to_tree
from vit_jax.errors import UserError, first_line
from vit_jax.escape import printable
from vit_jax.evaluation.images import evaluate_images
from vit_jax.evaluation.metrics import Scores
from vit_jax.evaluation.report import Report, choose_examples, environment, write_report
from vit_jax.files import as_path, is_bucket
from vit_jax.models import variant
from vit_jax.pretrained import (
    STYLE,
    WEIGHTS,
    Pretrained,
    find_weights,
    load,
    read_weights,
    untold_fields,
)
from vit_jax.training.checkpoints import saved_steps
from vit_jax.training.config import default_config, flatten, given_heads, weights_source
from vit_jax.training.inputs import open_split, preprocessing
from vit_jax.training.workdir import (
    CHECKPOINTS,
    CONFIG,
    METRICS,
    NOTES,
    PAGE,
    REPORT,
    check_named,
    read_config,
    read_metrics,
)

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
      step: updates done. finished: whether these are all; if not, the same call goes on from here.
      summary: what to tell a person, in lines that can be printed.
      test: the last figures on the test images, {"test/loss", "test/top1", "test/top5"}, where
        they may have several labels also "test/map" and "test/f1"; empty if there were none.
    """

    step: int
    finished: bool
    summary: str
    test: Mapping[str, float]


def load_result(workdir: epath.Path, total_steps: int) -> Result | None:
    """The result of a run that has left everything it has to leave; else None.

    Raises UserError if that lacks something, and there is no state to make it from.
    """
    if not all((workdir / name).exists() for name in (CONFIG, WEIGHTS)):
        return None
    lacking = [name for name in (NOTES, PAGE, REPORT) if not (workdir / name).exists()]
    problem = f"it lacks {', '.join(lacking)}" if lacking else ""
    try:
        load(workdir)
    except UserError as e:
        problem = str(e)
    if problem:
        problem = f"the run in {workdir} has finished, but {problem}"
        if total_steps in saved_steps(workdir / CHECKPOINTS):
            _log.warning("%s: this is made again from the last checkpoint", problem)
            return None
        raise UserError(
            f"{problem}, and there is no checkpoint of step {total_steps:,} to make this again "
            "from: vit-jax report makes reports of whole weights; to train anew choose another "
            "workdir"
        )
    test = last_test(workdir)
    accuracy = f", test accuracy {test['test/top1']:.1%}" if test else ""
    return Result(
        total_steps,
        True,
        f"the run in {printable(str(workdir))} has finished its {total_steps:,} steps{accuracy}: "
        "nothing to do. For a new run choose another workdir",
        test,
    )


def write_weights(workdir: epath.Path, vit: Pretrained) -> None:
    """Writes what a run is for, before anything else that may fail after its last step."""
    (workdir / REPORT).unlink(missing_ok=True)  # One of the run on its way says nothing of its end.
    vit.save(workdir / WEIGHTS, style=STYLE)


def write_outputs(
    workdir: epath.Path, config: ConfigDict, network: str, scores: Scores, test: data.Source
) -> Result:
    """Writes the report of a run that has done all its steps, of a network of that name.

    Whatever goes wrong with it is said: the run has finished, and its weights are there.
    """
    place = printable(str(workdir))
    holds = f"{place} holds {WEIGHTS}, {PAGE}, {REPORT}, {METRICS} and the TensorBoard events"
    try:
        report = _make_report(workdir, config, network, scores, test)
        for name in (PAGE, REPORT):
            write_report(report, workdir / name)
    except Exception as e:  # Fonts, images that have gone meanwhile, a full disk.
        reason = printable(f"{type(e).__name__}: {first_line(e)}")
        holds = (
            f"{place} holds {WEIGHTS}, but its report can't be made ({reason}): mend the cause, "
            "then start the same command again"
        )
    summary = f"finished {config.total_steps:,} steps: {score_text(scores)}\n{holds}"
    return Result(config.total_steps, True, summary, score_figures(scores))


def last_test(workdir: epath.Path) -> dict[str, float]:
    """The last "test/..." figures in the metrics of a run, if there are any."""
    lines = [line for line in read_metrics(workdir / METRICS) if "test/top1" in line]
    return {k: v for k, v in lines[-1].items() if k.startswith("test/")} if lines else {}


def score_figures(scores: Scores) -> dict[str, float]:
    """Scores as they stand in the metrics."""
    figures = {"test/loss": scores.loss, "test/top1": scores.top1, "test/top5": scores.top5}
    if found := scores.by_label:
        figures |= {"test/map": found.mean("average_precision"), "test/f1": found.mean("f1")}
    return figures


def score_text(scores: Scores) -> str:
    """Scores in one line."""
    right = int(np.trace(scores.confusion))
    text = (
        f"test accuracy {scores.top1:.1%} ({right:,} of {scores.count:,}), loss {scores.loss:.4f}"
    )
    if found := scores.by_label:
        text += f", mAP {found.mean('average_precision'):.1%}, F1 {found.mean('f1'):.1%}"
    return text + (f", {scores.skipped:,} unreadable left out" if scores.skipped else "")


def evaluate_workdir(workdir: str | os.PathLike, *, batch_size: int = 64) -> Report:
    """A report of the run in a workdir, whose weights are evaluated on its own test images: the
    last weights, those of the last checkpoint if it has not finished, or none if it has not saved.

    Raises UserError if it is no workdir, or something in it or the images can't be read.
    """
    folder = as_path(workdir)
    config = read_config(folder)
    saved = max(saved_steps(folder / CHECKPOINTS), default=None)
    finished = (folder / WEIGHTS).exists()
    unfinished = f"The run has not finished its {config.total_steps:,} steps: "
    if not finished and saved is None:
        name = config.model.name or config.model_or_filename
        return _make_report(folder, config, name, note=f"{unfinished}nothing is saved yet.")
    check_named(folder, config)
    test = open_split(config, config.splits.test)
    if finished:
        vit, note = load(folder), ""
    else:
        vit = _load_checkpoint(folder / CHECKPOINTS / str(saved), config, test.labels)
        note = f"{unfinished}this is what step {saved:,} saved."
    scores = evaluate_images(
        vit, test, batch_size=batch_size, corrupt=config.corrupt, loss=config.loss
    )
    return _make_report(folder, config, vit.spec.description, scores, test, note)


def _load_checkpoint(folder: epath.Path, config: ConfigDict, labels: tuple[str, ...]) -> Pretrained:
    """The network of a checkpoint."""
    preprocess = preprocessing(config, open_split(config, config.splits.train))[1].spec
    # What no array tells: of the weights that the run started from, its network's name, its fields.
    fields = variant(config.model.name) if config.model.name else {}
    if path := weights_source(config):
        file = find_weights(path)
        fields = read_weights(*file, values=False, heads=given_heads(config))[1].architecture()
    fields = fields | dict(config.model)
    with open_arrays(local_copy(folder) if is_bucket(folder) else folder) as stored:
        part = "ema/" if any(k.startswith("ema/") for k in stored) else "params/"
        params = {k.removeprefix(part): x for k, x in stored.items() if k.startswith(part)}
        spec = read_spec(
            params,
            classifier=fields.get("classifier"),
            untold={name: fields[name] for name in untold_fields() if name in fields},
            image_size=data.parse(preprocess, train=False).output_size,
            where=str(folder),
        )
        arrays = {k: np.asarray(array) for k, array in params.items()}
    model = spec.model()
    return Pretrained(model, to_tree(arrays), spec, labels, preprocess, loss=config.loss)


def _make_report(
    workdir: epath.Path,
    config: ConfigDict,
    network: str,
    scores: Scores | None = None,
    test: data.Source | None = None,
    note: str = "",
) -> Report:
    """What a report of a run shows: of a network of that name its scores on the images `test`;
    without both there are curves only. Raises UserError if metrics or an image can't be read."""
    dataset = config.dataset
    if os.path.isabs(dataset):
        dataset = os.path.basename(dataset)  # The whole path stands in the configuration.
    title = f"{network} on {dataset}" + (f": {score_text(scores)}" if scores else "")
    return Report(
        title=title[:1].upper() + title[1:],
        metrics=read_metrics(workdir / METRICS),
        labels=test.labels if test else (),
        scores=scores,
        examples=choose_examples(scores, test) if scores and test else [],
        config=flatten(config),
        defaults=flatten(default_config()),
        environment=environment(),
        multi_label=bool(test and test.multi_label),
        note=note,
    )
