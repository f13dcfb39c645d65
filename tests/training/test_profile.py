"""A trace of some steps: there when asked for, and only then."""

import jax
import pytest

from vit_jax.errors import UserError
from vit_jax.training import run
from vit_jax.training.config import config_from_json, config_to_json, differing_fields


def traces(workdir):
    return list(workdir.rglob("plugins/profile/*/*.xplane.pb"))


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("steps", ["(2, 3)", "(2, 100)"])
def test_steps_are_traced_also_where_the_run_ends_first(tiny, tmp_path, steps, capsys):
    run(tiny("total_steps=4", "eval_every=0", f"profile={steps}"), tmp_path)
    (trace,) = traces(tmp_path)
    assert b"PjitFunction(step)" in trace.read_bytes()
    assert list(trace.parent.glob("*.trace.json.gz"))  # Perfetto opens it.
    told = f"step 3: a trace is in {tmp_path / 'profile'}" in capsys.readouterr().err
    assert told == (steps == "(2, 3)")


@pytest.mark.slow
@pytest.mark.ci
def test_a_profiler_that_is_in_use_costs_the_trace_and_not_the_run(tiny, tmp_path, capsys):
    with jax.profiler.trace(tmp_path / "other"):
        run(tiny("total_steps=4", "eval_every=0", "profile=(1, 2)"), tmp_path / "run")
    said = [line for line in capsys.readouterr().err.splitlines() if "trace" in line]
    assert len(said) == 1
    assert said[0].startswith("step 1: no trace: ")
    assert traces(tmp_path / "other")
    assert traces(tmp_path / "run") == []


def test_a_run_may_go_on_with_another_trace(tiny, whole):
    assert traces(whole) == []
    config = tiny("profile=(1, 2)")
    assert differing_fields(config, tiny()) == []
    assert config_from_json(config_to_json(config)) == config


@pytest.mark.parametrize("steps", ["(3,)", "(3, 3)", "(5, 2)", "(-1, 2)", "(1, 2.5)", "(1, 2, 3)"])
def test_steps_that_make_no_trace_are_refused(tiny, steps):
    with pytest.raises(UserError, match=r"config.profile is .* expected the steps \(start, stop\)"):
        tiny(f"profile={steps}")
