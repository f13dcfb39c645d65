"""The script behind `make fuzz`, for a few seconds, and that it notices what it is for."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("fuzz.py")
BAD_READERS = """
import fuzz, os, sys, time
bad = {
    "traceback": lambda path: 1 / 0,
    "crash": lambda path: os.abort(),
    "memory": lambda path: len(bytes(range(256)) * 5_000_000),
    "hang": lambda path: time.sleep(60),
    "none": lambda path: None,
}
fuzz.SECONDS = 1
for name, read in bad.items():
    print(name, "|", fuzz.attempt(read, None)[0].splitlines()[-1])
print(fuzz.attempt(bad["memory"], None)[2] > 1 << 30)
"""


@pytest.mark.slow
@pytest.mark.ci
def test_every_reader_takes_damaged_files(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--minutes=0.3", "--seed=1", f"--keep={tmp_path}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith(" cases, 0 failures\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.ci
def test_what_is_no_refusal_is_a_failure():
    lines = subprocess.run(
        [sys.executable, "-c", BAD_READERS],
        cwd=SCRIPT.parent,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert lines == [
        "traceback | ZeroDivisionError: division by zero",
        "crash | ended by SIGABRT",
        "memory | read",  # And how much it took:
        "hang | no answer in 1 s",
        "none | read",
        "True",
    ]
