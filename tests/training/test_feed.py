"""Batches are fetched ahead, and only an idle device waits for them."""

import threading
import time

import numpy as np
import pytest

from vit_jax.parallel import make_mesh, split
from vit_jax.training.feed import Feed, Figures


def batches(seconds, closed=None):
    """Endless batches, each of which takes a while."""
    try:
        for i in range(10**6):
            time.sleep(seconds)
            yield {"image": np.full(8, i)}
    finally:
        if closed is not None:
            closed.set()


@pytest.mark.parametrize(("busy", "least", "most"), [(0.0, 0.6, 1.0), (0.4, 0.0, 0.2)])
def test_only_the_time_in_which_the_device_has_nothing_to_do_is_waiting(busy, least, most):
    feed = Feed(batches(0.2), split(make_mesh()), 1)
    feed.take(lambda: None)
    feed.restart_clock()
    taken = [feed.take(lambda: time.sleep(busy)) for _ in range(3)]
    assert least <= feed.speed().wait_share <= most
    assert [np.asarray(batch["image"])[0] for batch in taken] == [1, 2, 3]
    feed.close()


def test_batches_that_are_there_are_taken_while_the_device_works():
    feed = Feed(batches(0.0), split(make_mesh()), 3)
    time.sleep(0.5)
    for i in range(3):
        assert feed.take(lambda: pytest.fail("waited for the device"))["image"][0] == i
        time.sleep(0.1)
    assert feed.speed().wait_share == 0
    assert np.isnan(feed.speed().batches_per_s)  # None since.
    feed.close()


def test_closing_ends_the_thread_and_the_reading():
    closed, before = threading.Event(), threading.active_count()
    feed = Feed(batches(0.0, closed), split(make_mesh()), 2)
    feed.take(lambda: None)
    feed.close()
    assert closed.is_set()
    assert threading.active_count() == before


def test_waiting_leaves_the_last_steps_running():
    waited = []

    class Scalar:
        def __init__(self, step):
            self.step = step

        def block_until_ready(self):
            waited.append(self.step)
            return self

    figures = Figures()
    figures.wait()
    for step in (1, 2, 3):
        figures.add(step, {"loss": Scalar(step)})
        figures.wait(running=1)
    figures.wait()
    assert waited == [1, 2, 3]
