"""The package stays small enough to be read: the number of its lines only goes down."""

from pathlib import Path

import vit_jax

# Docstrings, comments and empty lines count too. Only a new capability may raise these.
LINES, FILES = 25881, 107
# A change that makes the package this much smaller lowers the number above, too.
SLACK = 100


def test_the_package_has_no_more_lines_and_files_than_it_had():
    files = sorted(Path(vit_jax.__file__).parent.rglob("*.py"))
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)

    assert len(files) <= FILES, f"{len(files)} files, expected at most {FILES}"
    assert lines <= LINES, f"{lines:,} lines, expected at most {LINES:,}"
    assert lines > LINES - SLACK, f"only {lines:,} lines: lower LINES to that"
