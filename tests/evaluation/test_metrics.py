"""Figures of merit: every example counts once, whatever the batches; nothing counts as right by
accident."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax

from vit_jax.errors import UserError
from vit_jax.evaluation import evaluate, make_eval_step
from vit_jax.evaluation.metrics import BINS, calibrate, score_labels
from vit_jax.training import make_mesh


class Known:
    """A network whose images are its logits."""

    def apply(self, variables, images):
        return images.reshape(len(images), -1)


STEP = make_eval_step(Known(), mesh=make_mesh())
SIGMOID_STEP = make_eval_step(Known(), mesh=make_mesh(), loss="sigmoid")


def batches_of(logits, labels, batch_size, unreadable=()):
    """Padded batches, as `eval_batches` makes them."""
    n, classes = logits.shape
    for start in range(0, n, batch_size):
        index = np.arange(start, start + batch_size, dtype=np.int32)
        there = index < n
        rows = np.where(there, index, 0)
        mask = there & ~np.isin(index, unreadable)
        yield {
            "image": np.where(mask[:, None], logits[rows], 0).reshape(-1, 1, classes, 1),
            "label": np.where(there, labels[rows], 0).astype(np.int32),
            "mask": mask,
            "index": np.where(there, index, -1).astype(np.int32),
        }


def scores_of(logits, labels, batch_size=8, unreadable=(), step=STEP):
    logits, labels = np.asarray(logits, np.float32), np.asarray(labels)
    batches = batches_of(logits, labels, batch_size, unreadable)
    return evaluate(step, {}, batches, logits.shape[1])


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    batch_size=st.sampled_from([1, 8]),  # Each combination is compiled.
    classes=st.sampled_from([2, 10]),
    skip=st.sets(st.integers(0, 39), max_size=5),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_example_counts_once_whatever_the_batches(n, batch_size, classes, skip, seed):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((n, classes)).astype(np.float32)
    labels = rng.integers(0, classes, n)
    kept = np.setdiff1d(np.arange(n), list(skip))
    if not len(kept):
        return
    scores = scores_of(logits, labels, batch_size, sorted(skip))

    z, y = logits[kept].astype(np.float64), labels[kept]
    order = np.argsort(-z, axis=1, kind="stable")
    confusion = np.zeros((classes, classes), np.int64)
    for truth, prediction in zip(y, order[:, 0], strict=True):
        confusion[truth, prediction] += 1
    assert (scores.count, scores.skipped) == (len(kept), n - len(kept))
    assert scores.top1 == np.mean(order[:, 0] == y)
    assert scores.top5 == np.mean((order[:, :5] == y[:, None]).any(axis=1))
    assert scores.loss == pytest.approx(-np.mean(log_softmax(z, axis=1)[range(len(y)), y]), 1e-5)
    np.testing.assert_array_equal(scores.confusion, confusion)
    np.testing.assert_array_equal(scores.index, kept)
    np.testing.assert_array_equal(scores.truth, y)
    np.testing.assert_array_equal(scores.prediction, order[:, 0])
    np.testing.assert_allclose(scores.probability, softmax(z, axis=1).max(axis=1), rtol=1e-5)
    for i, share in enumerate(scores.per_class):
        expected = np.mean(order[y == i, 0] == i) if (y == i).any() else np.nan
        np.testing.assert_equal(share, expected)
    for i, share in enumerate(scores.precision):
        expected = np.mean(y[order[:, 0] == i] == i) if (order[:, 0] == i).any() else np.nan
        np.testing.assert_equal(share, expected)
    probability, right = softmax(z, axis=1).max(axis=1), order[:, 0] == y
    bins = np.ceil(probability * 15)
    gaps = [abs(np.sum(right[bins == b] - probability[bins == b])) for b in np.unique(bins)]
    assert scores.calibration.error == pytest.approx(sum(gaps) / len(kept), abs=1e-6)


def test_a_network_that_says_nothing_is_right_by_chance_only():
    scores = scores_of(np.zeros((20, 10)), np.arange(20) % 10)
    assert (scores.top1, scores.top5) == (0.1, 0.5)
    np.testing.assert_array_equal(scores.prediction, 0)


def test_of_equal_logits_the_first_counts():
    scores = scores_of([[1, 3, 3], [1, 3, 3]], [1, 2])
    np.testing.assert_array_equal(scores.prediction, [1, 1])
    assert scores.top1 == 0.5


@pytest.mark.parametrize("bad", [[np.nan] * 3, [np.nan, 0, 9], [9, np.nan, 0], [0, 9, np.nan]])
def test_nan_is_wrong_in_every_figure_whatever_the_true_class(bad):
    scores = scores_of([bad, bad, bad], [0, 1, 2])
    assert (scores.top1, scores.top5, np.trace(scores.confusion)) == (0, 0, 0)
    assert (scores.prediction != scores.truth).all()
    np.testing.assert_array_equal(scores.per_class, [0, 0, 0])
    assert np.isnan(scores.loss)


def test_infinite_logits_are_still_ordered():
    scores = scores_of([[np.inf, 0, 1], [-np.inf, 0, 1]], [0, 2])
    assert scores.top1 == 1


def test_with_fewer_than_five_classes_all_are_among_the_first_five():
    assert scores_of(np.zeros((6, 3)), [0, 1, 2, 0, 1, 2]).top5 == 1


def test_the_sigmoid_loss_is_its_formula():
    logits = np.random.default_rng(0).standard_normal((7, 4))
    labels = np.array([0, 1, 2, 3, 0, 1, 2])
    p, y = 1 / (1 + np.exp(-logits)), np.eye(4)[labels]
    expected = -(y * np.log(p) + (1 - y) * np.log(1 - p)).sum(axis=1).mean()
    scores = scores_of(logits, labels, step=SIGMOID_STEP)
    assert scores.loss == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(scores.probability, p.max(axis=1), rtol=1e-6)


def test_sums_are_exact_for_more_examples_than_float32_can_count():
    # A mean of float32 partial sums would drift; here each example gives the same loss.
    logits = np.tile(np.array([[0.1, 0.7]], np.float32), (4096, 1))
    one = scores_of(logits[:1], [0], 1).loss
    assert scores_of(logits, np.zeros(4096, int), 256).loss == one


def test_no_example_at_all_is_an_error_of_one_line():
    with pytest.raises(UserError, match="no image to evaluate"):
        evaluate(STEP, {}, [], 3)
    with pytest.raises(UserError, match="no image to evaluate"):
        scores_of(np.zeros((2, 3)), [0, 1], unreadable=[0, 1])


def test_figures_come_from_one_compilation():
    step = make_eval_step(Known(), mesh=make_mesh())
    for seed in range(3):
        logits = np.random.default_rng(seed).standard_normal((9, 3))
        scores_of(logits, np.zeros(9, int), 4, step=step)
    assert step._cache_size() == 1
    assert jax.tree.map(jnp.shape, step({}, next(batches_of(np.zeros((4, 3)), np.zeros(4), 4))))


@settings(max_examples=30, deadline=None)
@given(n=st.sampled_from([1, 9]), classes=st.sampled_from([2, 6]), seed=st.integers(0, 2**32 - 1))
def test_of_several_true_classes_the_likeliest_counts(n, classes, seed):
    rng = np.random.default_rng(seed)
    logits = rng.permuted(np.tile(np.arange(classes), (n, 1)), axis=1).astype(np.float32)
    hot = (rng.random((n, classes)) < 0.4).astype(np.float32)
    index = np.arange(n, dtype=np.int32)
    batch = {"image": logits.reshape(n, 1, classes, 1), "label": hot, "index": index}
    scores = evaluate(SIGMOID_STEP, {}, [batch | {"mask": np.ones(n, bool)}], classes)
    order = np.argsort(-logits, axis=1)
    ranked = np.take_along_axis(hot, order, axis=1) > 0
    assert scores.top1 == pytest.approx(ranked[:, 0].mean())
    assert scores.top5 == pytest.approx(ranked[:, :5].any(axis=1).mean())
    some = ranked.any(axis=1)
    truth = np.where(some, order[index, ranked.argmax(axis=1)], -1)
    np.testing.assert_array_equal(scores.truth, truth)
    assert scores.confusion.sum() == some.sum()
    assert np.trace(scores.confusion) == round(scores.top1 * n)
    losses = np.logaddexp(0, logits.astype(np.float64)) - hot * logits
    assert scores.loss == pytest.approx(losses.sum(axis=1).mean(), rel=1e-5)


def reference_calibration(probability, right, bins):
    """Equations 2 and 3 of arXiv:1706.04599, word for word in float64."""
    n, error, rows = len(probability), 0.0, []
    for m in range(1, bins + 1):
        members = [
            (float(p), bool(hit))
            for p, hit in zip(probability, right, strict=True)
            if (m - 1) / bins < p <= m / bins or (m == 1 and p == 0)
        ]
        if members:
            accuracy = math.fsum(hit for _, hit in members) / len(members)
            confidence = math.fsum(p for p, _ in members) / len(members)
            error += len(members) / n * abs(accuracy - confidence)
        else:
            accuracy = confidence = math.nan
        rows.append((len(members), confidence, accuracy))
    return error, rows


@given(
    st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=200),
    st.integers(1, 20),
)
def test_the_error_is_the_formula_of_the_paper(examples, bins):
    probability, right = map(np.array, zip(*examples, strict=True))
    found = calibrate(probability.astype(np.float32), right, bins)
    error, rows = reference_calibration(probability, right, bins)
    assert found.error == pytest.approx(error, abs=1e-12)
    assert found.count.tolist() == [count for count, _, _ in rows]
    np.testing.assert_allclose(found.confidence, [c for _, c, _ in rows], rtol=1e-12)
    np.testing.assert_allclose(found.accuracy, [a for _, _, a in rows], rtol=1e-12)


def test_the_upper_end_belongs_to_a_bin():
    found = calibrate(np.arange(16) / 15, np.ones(16, bool))
    assert BINS == 15
    assert found.count.tolist() == [2, *[1] * 14]


def test_one_that_is_as_good_as_it_says_has_no_error():
    found = calibrate(np.array([0.75] * 4 + [1.0]), np.array([1, 1, 1, 0, 1], bool))
    assert found.error == pytest.approx(0)


def test_a_confidence_a_little_above_one_counts_as_one():
    assert calibrate(np.float32([1.0000001]), np.array([True])).count[-1] == 1


def test_what_is_no_number_is_left_out_and_nothing_has_no_error():
    assert calibrate(np.array([np.nan, 0.5]), np.array([False, True])).error == 0.5
    assert math.isnan(calibrate(np.array([np.nan]), np.array([False])).error)


# Labels of which an image may have several.


def average_precision(p, true):
    """Its definition, threshold by threshold in exact fractions."""
    area, before = Fraction(0), Fraction(0)
    for threshold in sorted(set(p), reverse=True):
        said = [x >= threshold for x in p]
        hits = sum(s and t for s, t in zip(said, true, strict=True))
        recall, precision = Fraction(hits, sum(true)), Fraction(hits, sum(said))
        area, before = area + (recall - before) * precision, recall
    return area


def f1(p, true, threshold):
    """2 / (1 / precision + 1 / recall), in exact fractions."""
    said = [x >= threshold for x in p]
    hits = sum(s and t for s, t in zip(said, true, strict=True))
    if not hits:
        return Fraction(0)
    return 2 / (1 / Fraction(hits, sum(said)) + 1 / Fraction(hits, sum(true)))


@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.1, 0.5, 0.7, 1.0]) | st.floats(0, 1), st.booleans()),
        min_size=1,
        max_size=12,
    )
)
def test_the_figures_of_a_label_are_their_definitions(examples):
    p, true = zip(*examples, strict=True)
    found = score_labels(np.array([p]).T, np.array([true]).T)
    assert found.count.tolist() == [sum(true)]
    columns = (found.average_precision, found.f1, found.threshold, found.best_f1)
    if not any(true):
        assert np.isnan(columns).all()
        return
    values = [column.item() for column in columns]
    best = max(f1(p, true, threshold) for threshold in p)
    highest = max(threshold for threshold in p if f1(p, true, threshold) == best)
    exact = [average_precision(p, true), f1(p, true, 0.5), highest, best]
    np.testing.assert_allclose(values, [float(x) for x in exact], rtol=1e-12)
    assert values[2] == highest


def test_figures_known_from_a_textbook():
    # Ranked: right, right, wrong, right, wrong, wrong, right.
    p = np.array([[0.9, 0.8, 0.7, 0.6, 0.3, 0.2, 0.1]]).T
    found = score_labels(p, np.array([[1, 1, 0, 1, 0, 0, 1]], bool).T)
    assert found.average_precision.item() == pytest.approx((1 + 1 + 3 / 4 + 4 / 7) / 4)
    assert found.f1.item() == found.best_f1.item() == pytest.approx(2 * 3 / (4 + 4))
    assert found.threshold.item() == 0.6


def test_a_label_that_no_image_has_counts_in_no_mean():
    p = np.array([[0.9, 0.9], [0.1, 0.9]])
    found = score_labels(p, np.array([[True, False], [False, False]]))
    assert [found.mean(name) for name in ("average_precision", "f1", "best_f1")] == [1, 1, 1]
    rows = found.to_dict(["a", "b"])
    assert rows["per_label"][0] == {
        "label": "a",
        "count": 1,
        "average_precision": 1.0,
        "f1": 1.0,
        "threshold": 0.9,
        "best_f1": 1.0,
    }
    assert (rows["mean_average_precision"], "same images" in rows["threshold_rule"]) == (1, True)
    assert math.isnan(score_labels(p, np.zeros((2, 2), bool)).mean("f1"))


def test_an_image_of_which_nothing_is_said_is_a_miss():
    true = np.array([[True, True]]).T
    found = score_labels(np.array([[0.9, np.nan]]).T, true)
    assert (found.average_precision.item(), found.best_f1.item()) == (0.5, pytest.approx(2 / 3))
    found = score_labels(np.array([[np.nan, np.nan]]).T, true)
    assert (found.average_precision.item(), found.f1.item(), found.best_f1.item()) == (0, 0, 0)


def test_every_probability_is_kept_where_an_image_may_have_several_labels_and_else_none():
    rng = np.random.default_rng(0)
    logits, hot = rng.standard_normal((9, 4)).astype(np.float32), rng.random((9, 4)) < 0.4
    batches = [
        {
            "image": np.where(there[:, None], logits[rows], 0).reshape(-1, 1, 4, 1),
            "label": np.where(there[:, None], hot[rows], 0).astype(np.float32),
            "mask": there & (rows != 2),
            "index": np.where(there, rows, -1).astype(np.int32),
        }
        for start in (0, 8)
        for there in [np.arange(start, start + 8) < 9]
        for rows in [np.minimum(np.arange(start, start + 8), 8)]
    ]
    scores = evaluate(SIGMOID_STEP, {}, batches, 4)
    kept = scores.index
    assert kept.tolist() == [0, 1, 3, 4, 5, 6, 7, 8]
    np.testing.assert_allclose(scores.probabilities, 1 / (1 + np.exp(-logits[kept])), rtol=1e-5)
    np.testing.assert_array_equal(scores.labels, hot[kept])
    assert scores.by_label.count.tolist() == hot[kept].sum(axis=0).tolist()
    assert scores_of(logits, np.zeros(9, int)).by_label is None
