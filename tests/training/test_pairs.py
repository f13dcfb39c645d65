"""Every two fields of training, at every two of their values, in one run or another."""

import itertools
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest

from tests.training.test_fields import PLAIN
from vit_jax.training.config import FIELDS

# An empty text leaves the field at its default.
VALUES = {
    **{name: FIELDS[name].values for name in ("sharding", "remat", "on_bad_step", "decay_type")},
    **{
        name: FIELDS[name].values
        for name in ("dtype", "image_dtype", "optim", "optim_dtype", "loss")
    },
    "compile": FIELDS["compile"].values,
    "augment": ("none", "light1", "strong1"),
    "workers": ("", "0", "2"),
    "accum_steps": ("1", "4"),
    "scan_layers": ("false", "true"),
    "mixup": ("0", "0.5"),
    "cutmix": ("0", "1"),
    "ema_decay": ("0", "0.5"),
    "label_smoothing": ("0", "0.1"),
    "grad_norm_clip": ("1", "0"),
    "model.stochastic_depth_rate": ("0", "0.5"),
}
Value = tuple[str, str]  # Of a field.
REFUSED = {
    frozenset({("compile", "pmap"), ("sharding", "fsdp")}),
    frozenset({("compile", "pmap"), ("sharding", "hybrid")}),
}


def pairs_of(row: dict[str, str]) -> Iterator[frozenset[Value]]:
    return map(frozenset, itertools.combinations(row.items(), 2))


def all_pairs() -> set[frozenset[Value]]:
    every = [[(name, value) for value in values] for name, values in VALUES.items()]
    both = (itertools.product(a, b) for a, b in itertools.combinations(every, 2))
    return {frozenset(pair) for pair in itertools.chain(*both)} - REFUSED


def covering_rows() -> list[dict[str, str]]:
    """Settings of all fields, in as few rows as a greedy choice finds, that hold every pair: each
    begins with a pair that is missing, and takes of each field in turn the value that adds most."""
    rows: list[dict[str, str]] = []
    missing = all_pairs()
    while missing:
        row = dict(min(missing, key=sorted))
        for name in VALUES:
            if name in row:
                continue
            new = [
                (sum(frozenset({(name, v), old}) in missing for old in row.items()), -i, v)
                for i, v in enumerate(VALUES[name])
                if not any(frozenset({(name, v), old}) in REFUSED for old in row.items())
            ]
            row[name] = max(new)[-1]
        rows.append(row)
        missing -= set(pairs_of(row))
    return rows


def test_the_rows_hold_every_pair_that_is_not_refused_and_are_few():
    rows = covering_rows()
    held = set(itertools.chain(*map(pairs_of, rows)))
    assert held == all_pairs()
    assert not held & REFUSED
    assert all(row.keys() == VALUES.keys() for row in rows)
    assert len(rows) < 30


def options(row: dict[str, str]) -> list[str]:
    return [f"--config.{name}={value}" for name, value in row.items() if value]


@pytest.mark.parametrize(
    "pair", sorted(REFUSED, key=sorted), ids=lambda pair: " ".join(sorted(dict(pair).values()))
)
def test_two_fields_that_do_not_go_together_are_refused_in_one_line(pair, tmp_path, capfd):
    from vit_jax.cli import main

    argv = ["train", f"--config={PLAIN}", f"--workdir={tmp_path / 'run'}", *options(dict(pair))]
    assert main(argv) == 2
    assert len(capfd.readouterr().err.splitlines()) == 1


RUNS = """
    import json, sys
    import jax
    from vit_jax.cli import main
    from vit_jax.training import outputs

    if __name__ == "__main__":
        assert jax.device_count() == 2
        outputs.write_report = lambda report, path: path.touch()  # Most of the time of such a run.
        for row in map(json.loads, sys.stdin):
            print(json.dumps(["status", main(row)]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.timeout(1800)
def test_every_pair_of_values_trains_on_two_devices(tmp_path):
    script = tmp_path / "runs.py"
    script.write_text(textwrap.dedent(RUNS))
    environment = os.environ | {
        # Each program runs twice: to make it fast would take longer.
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    rows = covering_rows()
    commands = []
    for i, row in enumerate(rows):
        command = ["train", f"--config={PLAIN}", f"--workdir={tmp_path / str(i)}", *options(row)]
        commands.append(json.dumps(command))
    done = subprocess.run(
        [sys.executable, script],
        env=environment,
        input="\n".join(commands),
        capture_output=True,
        text=True,
        check=False,
    )
    found = [json.loads(line)[1] for line in done.stdout.splitlines() if '"status"' in line]
    failed = [row for row, status in zip(rows, found, strict=False) if status != 0]
    assert (len(found), failed) == (len(rows), []), done.stderr[-10_000:]
    for i in range(len(rows)):
        lines = [json.loads(line) for line in (tmp_path / str(i) / "metrics.jsonl").open()]
        assert lines[-1]["step"] == 2
