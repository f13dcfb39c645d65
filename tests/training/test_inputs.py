"""Batches are on the device before they are needed, not too many of them, and only an idle device
waits for them."""

import gc
import threading
import time

import jax
import numpy as np
import pytest

from vit_jax.sharding import batch_sharding, make_mesh
from vit_jax.training.inputs import DevicePrefetcher


class Step:
    """What a step gives, on a device that works as long as the test wants."""

    def __init__(self, error=None):
        self._done = threading.Event()
        self._error = error

    def finish(self):
        self._done.set()

    def block_until_ready(self):
        self._done.wait(60)
        if self._error:
            raise self._error
        return self


class Batches:
    """Endless batches, each of which takes a while."""

    def __init__(self, seconds=0.0):
        self.asked = 0
        self.closed = False
        self._seconds = seconds

    def __next__(self):
        self.asked += 1
        time.sleep(self._seconds)
        return {"image": np.full(8, self.asked)}

    def close(self):
        self.closed = True


def prefetcher(batches, prefetch):
    return DevicePrefetcher(batches, batch_sharding(make_mesh()), prefetch)


def settled(batches):
    """How many batches were asked for, when no more are."""
    asked = -1
    while asked != batches.asked:
        asked = batches.asked
        time.sleep(0.1)
    return asked


@pytest.mark.parametrize("prefetch", [1, 3])
def test_beside_the_batch_at_work_no_more_than_prefetch_are_on_the_device(prefetch):
    batches, steps = Batches(), []
    feed = prefetcher(batches, prefetch)
    for done in range(4):
        # All that are there can be taken at once, but more come only when a step is done.
        while len(steps) < done + prefetch + 1:
            assert np.asarray(next(feed)["image"])[0] == len(steps) + 1
            steps.append(Step())
            feed.watch({"loss": steps[-1]})
        assert settled(batches) == done + prefetch + 1
        steps[done].finish()
        assert settled(batches) == done + prefetch + 2
    for step in steps:
        step.finish()
    feed.close()


@pytest.mark.parametrize(("busy", "least", "most"), [(0.0, 0.7, 1.0), (0.4, 0.0, 0.2)])
def test_only_the_time_in_which_the_device_has_nothing_to_do_is_idle(busy, least, most):
    feed = prefetcher(Batches(0.2), 1)
    done = None
    for i in range(5):
        next(feed)
        step = Step()
        if done is not None:
            done.result()  # A device does one step after the other.
        threading.Timer(busy, step.finish).start()
        done = feed.watch({"loss": step})
        if i == 1:
            feed_begins = done.result()
    clock = done.result()
    assert clock.steps - feed_begins.steps == 3
    assert least <= (clock.idle - feed_begins.idle) / (clock.at - feed_begins.at) <= most
    feed.close()


def test_what_passes_before_the_clock_is_restarted_is_not_idle():
    feed = prefetcher(Batches(0.3), 1)
    next(feed)
    feed.restart_clock()
    step = Step()
    step.finish()
    clock = feed.watch({"loss": step}).result()
    assert clock.idle == 0
    assert clock.at - feed.clock.at == 0
    feed.close()


def test_closing_ends_the_threads_and_the_reading_and_leaves_nothing_on_the_devices():
    batches, before = Batches(), threading.active_count()
    arrays = len(jax.live_arrays())
    feed = prefetcher(batches, 2)
    next(feed)
    feed.close()
    assert batches.closed
    assert threading.active_count() == before
    gc.collect()
    assert len(jax.live_arrays()) == arrays


def test_the_error_of_a_step_comes_where_its_metrics_are_read():
    feed = prefetcher(Batches(), 1)
    for _ in range(4):  # More than there is room for: the error keeps none of them away.
        next(feed)
        step = Step(RuntimeError("out of memory"))
        step.finish()
        done = feed.watch({"loss": step})
    with pytest.raises(RuntimeError, match="out of memory"):
        done.result()
    feed.close()
