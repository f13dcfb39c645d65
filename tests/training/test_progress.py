"""What a run shows: a bar on a terminal, aligned plain lines elsewhere."""

import functools
import io
import os
import pty
import re
import struct
import subprocess
import sys
import textwrap

import pytest

from vit_jax.training import progress, run
from vit_jax.training.progress import Progress

VALUES = {"loss": 0.4312, "lr": 9.2e-3, "images_per_s": 1234.4, "wait_share": 0.03}


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves by hand: clock[0] is the time in seconds."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def plain(updates, clock, total=600, start=0):
    """The lines of a run that goes to a file; updates are (step, seconds passed, values)."""
    stream = io.StringIO()
    with Progress(total, start, stream=stream) as shown:
        for step, seconds, values in updates:
            clock[0] += seconds
            shown.update(step, **{**VALUES, **values})
    return stream.getvalue().splitlines()


def test_a_plain_line_says_everything(clock):
    (line,) = plain([(120, 18, {})], clock)
    assert line == (
        "step 120/600  loss  0.4312  lr 9.2e-03    1,234 img/s  data wait   3%  eta 0:01:12"
    )


def test_further_figures_stand_at_the_end_of_a_plain_line(clock):
    more = {"grad": 1.23456, "mfu": 0.4, "weights": 1.5e-7}
    (line,) = plain([(120, 18, {"more": more})], clock)
    assert line.endswith("  eta 0:01:12  grad 1.23      mfu 0.4       weights 1.5e-07")


@pytest.mark.parametrize(
    "values",
    [
        {"loss": 6.9078}, {"loss": 12.5}, {"loss": 1234.5}, {"loss": 3.21e-5}, {"loss": 0.0},
        {"loss": float("nan")}, {"loss": float("inf")}, {"lr": 0.0}, {"lr": 1e-12},
        {"images_per_s": 3.14}, {"images_per_s": 123456.0}, {"wait_share": 0.0},
        {"wait_share": 1.0},
    ],
)  # fmt: skip
def test_columns_stand_under_each_other(clock, values):
    one, other = plain([(20, 10, {}), (600, 10, values)], clock)
    assert [m.start() for m in re.finditer("loss|lr|img/s|data|eta", one)] == [
        m.start() for m in re.finditer("loss|lr|img/s|data|eta", other)
    ]


def test_what_was_not_measured_yet_is_a_dash(clock):
    nan = float("nan")
    (line,) = plain([(0, 18, {"images_per_s": nan, "wait_share": nan})], clock)
    assert line.endswith("lr 9.2e-03        - img/s  data wait    -  eta -:--:--")


def test_time_left_counts_from_the_resumed_step(clock):
    lines = plain([(510, 10, {}), (520, 1, {})], clock, start=500)
    assert [line.split("eta ")[1] for line in lines] == ["0:01:30", "0:00:44"]


def test_time_left_leaves_out_what_came_before_the_clock_was_restarted(clock):
    stream = io.StringIO()
    with Progress(600, 500, stream=stream) as shown:
        clock[0] += 1000  # The compiler's.
        shown.restart_clock(501)
        for step in (501, 503):
            shown.update(step, **VALUES)
            clock[0] += 2
        shown.update(505, **VALUES)
    etas = [line.split("eta ")[1] for line in stream.getvalue().splitlines()]
    assert etas == ["-:--:--", "0:01:37", "0:01:35"]


def test_time_left_is_open_where_nothing_was_measured_and_long_where_it_is_long(clock):
    assert plain([(0, 5, {})], clock)[0].endswith("eta -:--:--")
    assert plain([(1, 3600, {})], clock, total=101)[0].endswith("eta 100:00:00")


def test_a_terminal_is_drawn_ten_times_a_second_at_most_and_ends_with_the_last_step(
    clock, monkeypatch
):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with Progress(600, 0, stream=stream) as shown:
        for step in range(1, 501):  # In five seconds.
            clock[0] += 0.01
            shown.update(step, **VALUES)
    drawn = re.findall(r"(\d+)/600", stream.getvalue())
    assert 40 < len(drawn) <= 55
    assert drawn[-1] == "500"


def test_messages_are_lines_of_their_own():
    stream = io.StringIO()
    with Progress(10, 0, stream=stream) as shown:
        shown.message("saved [bold]checkpoints/5[/bold]")
    assert stream.getvalue() == "saved [bold]checkpoints/5[/bold]\n"


def test_without_a_stream_it_writes_to_standard_error(capsys):
    with Progress(10, 0) as shown:
        shown.message("hello")
    assert capsys.readouterr() == ("", "hello\n")


@functools.cache
def on_terminal(columns, **environment):
    """All that a terminal of that width gets from a short run, and what goes to piped stdout."""
    import fcntl
    import termios

    program = textwrap.dedent(f"""
        from vit_jax.training.progress import Progress
        with Progress(600, 0) as shown:
            shown.update(120, **{VALUES})
            shown.message("saved [bold]checkpoints/120[/bold]")
            print("result")
            shown.update(300, **{VALUES}, more={{"grad": 1.25, "mfu": 0.5, "GiB": 7}})
    """)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    env |= {"TERM": "xterm-256color", **environment}
    out = subprocess.run(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=env,
        timeout=60,
        check=True,
    ).stdout
    os.close(theirs)
    text = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # Linux says so where other systems give an empty read
            break
        if not piece:
            break
        text += piece
    os.close(ours)
    return text.decode(), out.decode()


@pytest.mark.parametrize("columns", [60, 120])
def test_a_terminal_gets_a_bar_and_the_numbers_whole(columns):
    text, _ = on_terminal(columns)
    bare = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", bare)]
    assert max(map(len, lines)) <= columns
    numbers = "loss  0.4312  lr 9.2e-03    1,234 img/s  data wait   3%"
    assert numbers in lines
    further = f"{numbers}  grad 1.25      mfu 0.5       GiB 7"
    assert (further in lines) == (columns == 120)
    assert any(re.fullmatch(r"300/600 ━.*  50%  eta \d:\d\d:\d\d", line) for line in lines)
    assert "saved [bold]checkpoints/120[/bold]" in lines


def test_what_a_program_prints_to_a_pipe_gets_there_despite_the_bar():
    text, out = on_terminal(80)
    assert out == "result\n"
    assert "result" not in text


def test_no_color_is_obeyed():
    colors = re.compile(r"\x1b\[[0-9;]+m")
    assert colors.search(on_terminal(80)[0])
    assert not colors.search(on_terminal(80, NO_COLOR="1")[0])


def test_a_dumb_terminal_gets_plain_lines():
    text, _ = on_terminal(80, TERM="dumb")
    assert "\x1b" not in text
    assert "step 300/600  loss" in text


@pytest.mark.slow
@pytest.mark.ci
def test_one_device_has_no_column_of_its_own(tiny, tmp_path, capfd, no_image):
    """Its img/s would be those of the run once more."""
    run(tiny("total_steps=10"), tmp_path / "run")
    lines = [x for x in capfd.readouterr().err.splitlines() if x.startswith("step  5/10")]
    assert re.findall(r"[a-z][a-z/]+", lines[0]) == [
        *("step", "loss", "lr", "img/s", "data", "wait", "eta", "grad", "update", "weights")
    ]


def test_a_terminal_without_such_letters_gets_a_bar_of_others():
    bare = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", on_terminal(80, PYTHONIOENCODING="ascii")[0])
    assert re.search(r"300/600 -+ .* 50%  eta", bare)
    assert "━" not in bare
    assert "\\u" not in bare
