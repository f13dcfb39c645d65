"""The script behind `make chaos`, with one fault of each kind."""

import pytest

from tests.chaos import chaos


@pytest.mark.slow
def test_a_run_with_each_kind_of_fault_ends_like_one_left_alone(capsys):
    chaos.main(["--faults=6", "--seed=3"])
    assert capsys.readouterr().out.endswith("weights and figures equal, bit for bit\n")
