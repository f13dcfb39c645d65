"""The benchmark of dispatch runs in a small form, and a step costs the main thread little."""

import importlib.util
import re
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "dispatch.py"


@pytest.mark.slow
@pytest.mark.ci
def test_a_step_costs_the_main_thread_less_than_a_millisecond(capsys):
    spec = importlib.util.spec_from_file_location("dispatch", BENCHMARK)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    benchmark.main(quick=True)

    text = capsys.readouterr().out
    (row,) = re.findall(r"^\| digits, AdamW, \d+ \|(.*)\|$", text, re.MULTILINE)
    *parts, total, rate = (float(cell.replace(",", "")) for cell in row.split("|"))
    assert abs(sum(parts) - total) < 0.01
    assert 0 < total < 1  # Processor time: 0.3 to 0.4 ms whatever else the machine does.
    assert rate > 0
    for way in ("step alone", "loop, batches made beforehand", "loop"):
        assert re.search(rf"^\| {way} \| [\d.,]+ \| [\d.]+ \|$", text, re.MULTILINE)
