"""The cores are counted in one way: those that this process was given."""

import os

import pytest

from vit_jax.data import cores, own_cores


def test_the_cores_are_those_that_this_process_was_given(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5, 6, 7})
    monkeypatch.setattr(cores, "_QUOTA", "/nowhere")
    assert own_cores() == 4


@pytest.mark.parametrize(
    ("quota", "number"),
    [("max 100000", 8), ("350000 100000", 4), ("50000 100000", 1), ("1600000 100000", 8)],
)
def test_a_container_s_quota_counts(quota, number, monkeypatch, tmp_path):
    (tmp_path / "cpu.max").write_text(quota + "\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(cores, "_QUOTA", str(tmp_path / "cpu.max"))
    assert own_cores() == number
