"""Exact figures of merit: every example is counted once."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from vit_jax.checkpoints.labels import check_loss, probabilities
from vit_jax.errors import UserError
from vit_jax.sharding import batch_sharding, replicated

BINS = 15  # of `calibrate`, as in most of the literature; the error depends on it.
THRESHOLD_RULE = "the best F1 on these same images, so that it is higher than on others"

if TYPE_CHECKING:
    from vit_jax.data import Normalize


def example_losses(
    logits: jax.Array, labels: jax.Array, loss: str = "softmax", label_smoothing: float = 0.0
) -> jax.Array:
    """The loss of each example.

    Args:
      logits: (n, classes) float32.
      labels: int (n,), or float (n, classes) of weights.
      loss: "softmax": -sum(labels * log softmax(logits)). "sigmoid": the sum over the classes of
        the binary cross-entropy, each class for itself.
      label_smoothing: labels become labels * (1 - s) + s / classes.

    Returns:
      (n,) float32.

    Raises UserError for another loss.
    """
    check_loss(loss)
    classes = logits.shape[-1]
    if labels.ndim == 1:
        labels = jax.nn.one_hot(labels, classes)
    if label_smoothing:
        labels = optax.smooth_labels(labels, label_smoothing)
    if loss == "softmax":
        return -jnp.sum(jax.nn.log_softmax(logits) * labels, axis=-1)
    return optax.sigmoid_binary_cross_entropy(logits, labels).sum(axis=-1)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A network's confidence beside how often it was right, in bins of equal width: bin m of M
    holds the examples with a confidence in (m / M, (m + 1) / M]. Guo et al., "On Calibration of
    Modern Neural Networks", arXiv:1706.04599.

    Attributes:
      count: int64 (bins,), examples in each.
      confidence, accuracy: float64 (bins,), mean confidence and share of right ones, nan of none.
    """

    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def error(self) -> float:
        """The expected calibration error, Equation 3: the mean over all examples of
        |accuracy - confidence| of their bin; nan without examples."""
        if not self.count.any():
            return float("nan")
        gaps = np.abs(self.accuracy - self.confidence)
        return float(np.nansum(gaps * self.count) / self.count.sum())


def calibrate(probability: np.ndarray, right: np.ndarray, bins: int = BINS) -> Calibration:
    """Sorts examples into bins by the probability (n,) of the predicted class, in [0, 1]; `right`,
    bool (n,), says whether it was true. Examples with nan are left out."""
    known = ~np.isnan(probability)
    p, hits = probability[known].astype(np.float64), right[known].astype(np.float64)
    inner = np.arange(1, bins) / bins
    which = np.searchsorted(inner, p)  # Of equal ones the lower bin: its upper end belongs to it.
    count = np.bincount(which, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(which, p, bins) / count
        accuracy = np.bincount(which, hits, bins) / count
    return Calibration(count, confidence, accuracy)


@dataclasses.dataclass(frozen=True)
class LabelScores:
    """How well each label is found, where an image may have several; nan of a label that no image
    has.

    Attributes:
      count: int64 (labels,), images that have it.
      average_precision: float64 (labels,), the area under precision over recall as the sum over n
        of (R_n - R_(n-1)) P_n: recall R and precision P if the images of at least the n-th highest
        probability are said to have the label. Equal probabilities are one n; nothing is
        interpolated.
      f1: float64 (labels,), 2 TP / (2 TP + FP + FN), if those of at least 0.5 are.
      threshold: float64 (labels,), the probability to take in place of 0.5 for the highest F1 on
        these images; of several the highest.
      best_f1: float64 (labels,), F1 with this threshold, which flatters: it was chosen on the same
        images.
    """

    count: np.ndarray
    average_precision: np.ndarray
    f1: np.ndarray
    threshold: np.ndarray
    best_f1: np.ndarray

    def mean(self, name: str) -> float:
        """The mean of a column over the labels that an image has, each counting the same; of
        "average_precision" the mAP, of "f1" the macro F1. nan if there are none."""
        values = getattr(self, name)[self.count > 0]
        return float(values.mean()) if len(values) else float("nan")

    def to_dict(self, labels: Sequence[str]) -> dict[str, Any]:
        """All of it for JSON, with the names of the labels."""
        columns = {f.name: getattr(self, f.name).tolist() for f in dataclasses.fields(self)}
        rows = zip(labels, *columns.values(), strict=True)
        return {
            "mean_average_precision": self.mean("average_precision"),
            "mean_f1": self.mean("f1"),
            "mean_best_f1": self.mean("best_f1"),
            "threshold_rule": THRESHOLD_RULE,
            "per_label": [dict(zip(("label", *columns), row, strict=True)) for row in rows],
        }


def score_labels(probability: np.ndarray, labels: np.ndarray) -> LabelScores:
    """Scores of probabilities, float (n, labels), by the true labels, bool (n, labels). An image of
    which the network says nan is never said to have the label."""
    rows = [_score_label(p, true) for p, true in zip(probability.T, labels.T, strict=True)]
    columns = np.array(rows, np.float64).reshape(-1, 4).T
    return LabelScores(labels.sum(axis=0, dtype=np.int64), *columns)


def _score_label(p: np.ndarray, true: np.ndarray) -> tuple[float, float, float, float]:
    """Average precision, F1 from 0.5 on, the best threshold and its F1 of one label."""
    count = np.count_nonzero(true)
    if not count:
        return (float("nan"),) * 4
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(-p[known], kind="stable")]
    p, found = p[order], np.cumsum(true[order])  # Those that have it, of so many most probable.
    if not len(p):
        return 0.0, 0.0, float("nan"), 0.0
    ends = np.flatnonzero(np.append(p[1:] != p[:-1], True))  # Where another threshold follows.
    precision, recall = found[ends] / (ends + 1), found[ends] / count
    f1 = 2 * found[ends] / (ends + 1 + count)  # TP + FP are said to have it, TP + FN have it.
    best = int(f1.argmax())
    half = np.count_nonzero(p >= 0.5)
    half_f1 = 2 * found[half - 1] / (half + count) if half else 0.0
    area = np.sum(np.diff(recall, prepend=0) * precision)
    return float(area), float(half_f1), float(p[ends[best]]), float(f1[best])


@dataclasses.dataclass(frozen=True)
class Scores:
    """How good a network is on a set of images.

    Attributes:
      count: examples that were counted; skipped: those that could not be read and were left out.
      loss: mean loss. top1, top5: share of examples whose class is the first, is among the first
        five.
      confusion: int64 (classes, classes), true class in the rows and predicted class in the
        columns.
      index, truth, prediction: int (count,), position in the source, true and predicted class.
        Of several true classes the one that the network finds likeliest counts as the true one: so
        top1 is the share of examples whose first guess is among their classes. An example without
        a class has truth -1, is never right and isn't in the confusion matrix.
      probability: float (count,), of the predicted class: of the softmax, or with the loss
        "sigmoid" that of this class for itself.
      probabilities, labels: float and bool (count, classes), the probability of each class and
        whether it is true, where an image may have several; else None.
    """

    count: int
    skipped: int
    loss: float
    top1: float
    top5: float
    confusion: np.ndarray
    index: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    probability: np.ndarray
    probabilities: np.ndarray | None = None
    labels: np.ndarray | None = None

    @functools.cached_property
    def by_label(self) -> LabelScores | None:
        """The figures of each label, where an image may have several; else None."""
        if self.probabilities is None or self.labels is None:
            return None
        return score_labels(self.probabilities, self.labels)

    @property
    def per_class(self) -> np.ndarray:
        """float64 (classes,): share of each class's examples that were right; nan of none."""
        return self._right_of(self.confusion.sum(axis=1))

    @property
    def precision(self) -> np.ndarray:
        """float64 (classes,): share of each class's predictions that were right; nan of none."""
        return self._right_of(self.confusion.sum(axis=0))

    def _right_of(self, total: np.ndarray) -> np.ndarray:
        return np.where(total > 0, np.diag(self.confusion) / np.maximum(total, 1), np.nan)

    @property
    def calibration(self) -> Calibration:
        """The probabilities beside how often the predictions were right."""
        return calibrate(self.probability, self.truth == self.prediction)


EvalStep = Callable[[Any, Mapping[str, Any]], dict[str, jax.Array]]


def make_eval_step(
    model: Any, *, mesh: Mesh, loss: str = "softmax", normalize: "Normalize | None" = None
) -> EvalStep:
    """Compiles a network (a Linen module) and its figures of each example of a batch.

    Args:
      normalize: what is done to the images first; None if they are normalised already.

    Returns:
      step(params, batch) -> {"loss", "rank", "truth", "prediction", "probability"}, each (n,): the
      rank is the number of classes that come before the true one. The batch holds "image", and
      "label" int32 (n,) or, of several classes an example, float32 (n, classes) of 0 and 1; then
      the figures have "probabilities" and "labels", see `Scores`. What else it holds is passed
      through. The parameters may be sharded.
    """

    def step(params: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        rest = dict(batch)
        images, labels = rest.pop("image"), rest.pop("label")
        logits = model.apply({"params": params}, normalize(images) if normalize else images)
        classes = logits.shape[-1]
        truth, unknown = labels, jnp.zeros(len(labels), bool)
        if labels.ndim == 2:
            truth = jnp.where(labels > 0, logits, -jnp.inf).argmax(axis=-1)
            unknown = ~(labels > 0).any(axis=-1)
        own = jnp.take_along_axis(logits, truth[:, None], axis=-1)
        # Of equal logits the first counts, as in argmax: a network that says nothing isn't always
        # right.
        before = (logits > own) | ((logits == own) & (jnp.arange(classes) < truth[:, None]))
        # NaN says nothing, so it is never right: its rank is last, its prediction a wrong class.
        nan = jnp.isnan(logits).any(axis=-1)
        likely = probabilities(logits, loss)
        if labels.ndim == 2:
            rest |= {"probabilities": likely, "labels": labels > 0}
        return rest | {
            "loss": example_losses(logits, labels, loss),
            "rank": jnp.where(nan | unknown, jnp.iinfo(jnp.int32).max, before.sum(axis=-1)),
            "truth": jnp.where(unknown, -1, truth),
            "prediction": jnp.where(nan, (truth + 1) % classes, jnp.argmax(logits, axis=-1)),
            "probability": likely.max(axis=-1),
        }

    return jax.jit(step, in_shardings=(None, batch_sharding(mesh)), out_shardings=replicated(mesh))


def evaluate(
    eval_step: EvalStep, params: Any, batches: Iterable[Mapping[str, np.ndarray]], num_classes: int
) -> Scores:
    """Puts every example through a network once and counts.

    Args:
      eval_step: see `make_eval_step`.
      params: the weights.
      batches: "image", "label" and "index" of equal length, and "mask", which is False for padding
        and for images that could not be read.
      num_classes: number of classes of the head.

    Returns:
      Scores. Sums are taken in float64 and int64 on the host, so they don't depend on the batch
      size.

    Raises UserError if there is no example that counts.
    """
    kept, examples = collections.defaultdict(list), 0
    for figures in prefetched(eval_step(params, batch) for batch in batches):
        examples = max(examples, int(figures["index"].max()) + 1)
        for name, values in figures.items():
            kept[name].append(values[figures["mask"]])
    rows = {name: np.concatenate(parts) for name, parts in kept.items()}
    count = len(rows["truth"]) if rows else 0
    if count == 0:
        raise UserError("no image to evaluate: none was given, or none of them can be read")
    confusion = np.zeros((num_classes, num_classes), np.int64)
    known = rows["truth"] >= 0
    np.add.at(confusion, (rows["truth"][known], rows["prediction"][known]), 1)
    return Scores(
        count=count,
        skipped=examples - count,
        loss=float(rows["loss"].astype(np.float64).mean()),
        top1=int((rows["rank"] < 1).sum()) / count,
        top5=int((rows["rank"] < 5).sum()) / count,
        confusion=confusion,
        **{name: rows[name] for name in ("index", "truth", "prediction", "probability")},
        **{name: rows[name] for name in ("probabilities", "labels") if name in rows},
    )


def prefetched(results: Iterable[dict[str, jax.Array]]) -> Iterator[dict[str, np.ndarray]]:
    """Results on the host; the device works on two batches while the host reads the next."""
    waiting: collections.deque[dict[str, jax.Array]] = collections.deque()
    for result in results:
        waiting.append(result)
        if len(waiting) > 2:
            yield jax.device_get(waiting.popleft())
    yield from map(jax.device_get, waiting)
