"""The memory of a batch is filled anew when nobody can see it any more, and not before."""

import gc

import jax
import numpy as np
import pytest

from tests.data.test_pipeline import AUGMENTED, DIGITS, numbered
from vit_jax.data import from_arrays, parse, train_batches
from vit_jax.data.buffers import Buffers, Layout, anonymous_file

LAYOUT = Layout(
    {
        "image": ((3, 5, 7, 3), np.dtype(np.uint8)),
        "label": ((3,), np.dtype(np.int32)),
        "mask": ((3,), np.dtype(bool)),
    }
)


@pytest.mark.parametrize("shared", [False, True])
def test_arrays_have_their_shapes_and_don_t_overlap(shared):
    buffers = Buffers(LAYOUT, anonymous_file() if shared else None)
    (one, first), (two, second) = buffers.take(), buffers.take()
    assert one != two
    for i, batch in enumerate((first, second)):
        for j, array in enumerate(batch.values()):
            array[...] = 2 * i + j
    for i, batch in enumerate((first, second)):
        for j, (name, array) in enumerate(batch.items()):
            assert (array.shape, array.dtype) == LAYOUT.arrays[name]
            assert array.ctypes.data % 64 == 0
            assert (array == np.array(2 * i + j).astype(array.dtype)).all()


@pytest.mark.parametrize(
    "keep",
    [
        lambda batch: batch["label"],
        lambda batch: batch["image"][1, ::2, ::-1].T[0].view(),
        lambda batch: memoryview(batch["image"]),
        lambda batch: {"deep": [batch["mask"].T]},
    ],
)
def test_a_buffer_is_used_again_when_no_view_of_it_is_left(keep):
    buffers = Buffers(LAYOUT)
    number, batch = buffers.take()
    kept = keep(batch)
    del batch
    other, _ = buffers.take()
    assert other != number
    del kept, _
    assert {buffers.take()[0], buffers.take()[0]} <= {number, other}


@pytest.mark.parametrize("workers", [0, 2])
def test_what_jax_took_in_place_stays_as_it_was_while_others_are_filled(workers):
    options = {"batch_size": 64, "seed": 3, "prefetch": 1}
    expected = train_batches(DIGITS, AUGMENTED, threads=1, **options)
    batches = train_batches(DIGITS, AUGMENTED, threads=2, workers=workers, **options)
    taken, in_place = [], 0
    for _ in range(6):
        batch = next(batches)
        arrays = jax.device_put(batch)
        in_place += arrays["image"].unsafe_buffer_pointer() == batch["image"].ctypes.data
        taken.append(arrays)
        del batch
    for _ in range(6):
        next(batches)  # Let go at once.
    batches.close()
    assert in_place == 6, "JAX copied: this shows nothing"
    for arrays in taken:
        batch = next(expected)
        np.testing.assert_array_equal(arrays["image"], batch["image"])
        np.testing.assert_array_equal(arrays["label"], batch["label"])
    expected.close()


def addresses(batches, count):
    return {next(batches)["image"].ctypes.data for _ in range(count)}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_consumer_that_lets_go_needs_no_more_buffers_than_are_ahead(workers):
    source = from_arrays(np.zeros((9, 8, 8), np.uint8), np.arange(9) % 2)
    options = {"batch_size": 4, "seed": 0, "prefetch": 2, "workers": workers}
    batches = train_batches(source, parse("rgb"), **options)
    gc.disable()  # Nothing waits for it.
    try:
        assert len(addresses(batches, 40)) <= 4
    finally:
        gc.enable()
    batches.close()


def test_batches_outlive_their_iterator():
    batches = train_batches(numbered(8), parse("rgb"), batch_size=4, seed=0, prefetch=1)
    kept = [next(batches) for _ in range(5)]
    copies = [batch["image"].copy() for batch in kept]
    batches.close()
    del batches
    for batch, copy in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(batch["image"], copy)
