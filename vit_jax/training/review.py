"""What can be said of a run: when it ends, or of what lies in its workdir."""

import os
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from vit_jax import data
from vit_jax.checkpoints import open_arrays, read_spec, to_tree
from vit_jax.evaluation.images import evaluate_images
from vit_jax.evaluation.metrics import Scores
from vit_jax.evaluation.report import Report, choose_examples, environment
from vit_jax.pretrained import WEIGHTS, Pretrained, load
from vit_jax.training.config import flatten
from vit_jax.training.fields import default_config
from vit_jax.training.metrics import read_metrics
from vit_jax.training.task import eval_spec
from vit_jax.training.workdir import CHECKPOINTS, METRICS, check_named, read_config


def make_report(
    workdir: Path,
    config: ConfigDict,
    network: str,
    scores: Scores | None = None,
    test: data.Source | None = None,
    note: str = "",
) -> Report:
    """What a report of a run shows.

    Args:
      workdir: with the metrics.
      config: of the run.
      network: what it is called.
      scores: of it on the images `test`; without both there are curves only.
      note: what else is to be said.

    Raises UserError if there are no metrics, or an image can't be read.
    """
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


def review(workdir: str | os.PathLike, *, batch_size: int = 64) -> Report:
    """A report of the run in a workdir, whose weights are evaluated on its own test images: the
    last weights, those of the last checkpoint if it has not finished, or none if it has not saved.

    Raises UserError if it is no workdir, or something in it or the images can't be read.
    """
    workdir = Path(workdir)
    config = read_config(workdir)
    folders = (workdir / CHECKPOINTS).glob("*")
    saved = max((int(p.name) for p in folders if p.name.isdecimal()), default=None)
    unfinished = f"The run has not finished its {config.total_steps:,} steps: "
    if not (workdir / WEIGHTS).is_file() and saved is None:
        name = config.model.name or config.model_or_filename
        return make_report(workdir, config, name, note=f"{unfinished}nothing is saved yet.")
    check_named(workdir, config)
    test = data.open_source(
        config.dataset,
        config.splits.test,
        seed=config.seed,
        data_dir=config.tfds_data_dir,
        manual_dir=config.tfds_manual_dir,
    )
    if (workdir / WEIGHTS).is_file():
        vit, note = load(workdir), ""
    else:
        vit = _saved(workdir / CHECKPOINTS / str(saved), config, test.labels)
        note = f"{unfinished}this is what step {saved:,} saved."
    scores = evaluate_images(
        vit, test, batch_size=batch_size, corrupt=config.corrupt, loss=config.loss
    )
    return make_report(workdir, config, vit.spec.description, scores, test, note)


def _saved(folder: Path, config: ConfigDict, labels: tuple[str, ...]) -> Pretrained:
    """The network of a checkpoint."""
    preprocess = eval_spec(config)
    with open_arrays(folder) as stored:
        part = "ema/" if any(k.startswith("ema/") for k in stored) else "params/"
        params = {k.removeprefix(part): x for k, x in stored.items() if k.startswith(part)}
        spec = read_spec(
            params,
            classifier=config.model.get("classifier"),
            image_size=data.parse(preprocess, train=False).output_size,
            where=str(folder),
        )
        arrays = {k: np.asarray(array) for k, array in params.items()}
    return Pretrained(spec.model(), to_tree(arrays), spec, labels, preprocess)


def score_text(scores: Scores) -> str:
    """Scores in one line."""
    right = int(np.trace(scores.confusion))
    text = (
        f"test accuracy {scores.top1:.1%} ({right:,} of {scores.count:,}), loss {scores.loss:.4f}"
    )
    return text + (f", {scores.skipped:,} unreadable left out" if scores.skipped else "")
