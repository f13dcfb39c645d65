"""`vit-jax plan`: what it prints, and when it fails."""

import json
import subprocess
import sys

import jax
import pytest

from tests.training.conftest import TINY
from vit_jax.cli import main
from vit_jax.cli.plan import _size, _verdict

PLAN = ("plan", f"--config={TINY}", "--config.total_steps=3600", "--config.warmup_steps=1")


def child(*options):
    """Exit status, what is printed, what is told meanwhile; devices are set before JAX starts."""
    done = subprocess.run(
        [sys.executable, "-m", "vit_jax", *PLAN, *options], capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


def test_a_person_gets_a_table_a_verdict_time_and_cost_and_sees_that_it_is_at_work():
    status, text, told = child("--devices=2", "--chip=v5e", "--price=2.5")
    assert status == 0
    assert told.splitlines() == [
        "compiling the training with accum_steps 2",
        "compiling the evaluation with batch_eval 120",
    ]
    assert "16 images on 2 devices, 4 at once on each (2 accum_steps)" in text
    for part in ("parameters", "optimizer", "gradients", "activations", "batches", "total"):
        assert f"\n  {part} " in text
    assert "fits        yes, into 16.0 GiB" in text
    assert "if 40% of 197 TFLOP/s are made use of" in text
    assert "\ncost " in text


@pytest.mark.slow
def test_json_says_it_all_and_what_does_not_fit_is_status_1():
    status, text, _ = child("--memory=0.1MiB", "--peak-tflops=2", "--mfu=0.5", "--json")
    assert status == 1
    found = json.loads(text)
    assert found["fits"] is False
    assert found["picture_shape"] == [8, 8, 1]
    assert found["memory"] == 0.1 * 2**20
    assert found["training"]["total"] > found["memory"]
    assert found["seconds_per_step"] == pytest.approx(found["flops_per_step"] / 1e12)
    assert found["hours"] == pytest.approx(found["seconds_per_step"])


def test_a_verdict_names_what_would_make_it_fit():
    state = {"parameters": 2**30, "optimizer": 2**30}
    found = {
        **dict(fits=False, memory=2**34, training=state, evaluation=state),
        "changes": {"scan_layers": True, "remat": "dots", "accum_steps": 4},
    }
    flags = "--config.scan_layers=True --config.remat=dots --config.accum_steps=4"
    assert _verdict(found) == f"no, not into 16.0 GiB; it would with {flags}"
    found["changes"] = None
    assert "were tried (the state is 2.0 GiB): take a smaller" in _verdict(found)


def test_memory_that_is_not_told_is_said_and_nothing_is_concluded(capsys, monkeypatch):
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # JAX has started.
    monkeypatch.setattr(jax.stages.Compiled, "memory_analysis", lambda _: None)
    assert main([*PLAN, "--chip=v5e"]) == 0
    text = capsys.readouterr().out
    assert "\n  activations          not told   not told\n" in text
    assert "\n  total                not told   not told\nthe compiler does not tell here" in text
    assert "fits        not known, into 16.0 GiB" in text
    assert "as XLA lays it out" not in text

    assert main([*PLAN, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["training"]["total"] is found["fits"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory=lots"], "'lots' is no size such as 16GiB"),
        (["--memory=0GB"], "'0GB' is no size"),
        (["--mfu=40"], "--mfu is 40.0, expected a share of at most 1"),
        (["--mfu=-1"], "no number above 0"),
        (["--chip=abacus"], "unknown chip 'abacus': known are TPU v2"),
        (["--price=2"], "add --chip or --peak-tflops"),
        (["--devices=0"], "no whole number of at least 1"),
        (["--config.bach=3"], "did you mean config.batch"),
    ],
)
def test_mistakes_are_told_in_one_line(fails, options, message):
    assert message in fails(*PLAN, *options)


def test_sizes_have_units():
    assert _size("16GiB") == _size("16") == 16 * 2**30
    assert (_size("80 GB"), _size("1.5mib")) == (80e9, 1.5 * 2**20)
