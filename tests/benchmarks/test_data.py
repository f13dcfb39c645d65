"""The benchmark of reading runs as it is, and leaves out, by name, what isn't installed."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_tiny_form_of_it_fills_the_table():
    command = [sys.executable, "benchmarks/data.py", "--images=4", "--seconds=0.1", "--rounds=1"]
    command += ["--processes=1,2", "--loaders=ours, processes;torchvision"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert re.match(r"4 JPEGs of \d+ KB; .+, \d+ cores, \d+ of them physical\n", done.stdout)
    number = r"[\d,]+ \| \d\.\d\d"
    cell = number if "torchvision, 1: " not in done.stderr else r"- \| -"
    for count in (1, 2):
        assert re.search(rf"^\| {count} \| {number} \| {cell} \|$", done.stdout, re.MULTILINE)
