"""Ctrl-C and SIGTERM are answered at once, whatever the main thread is busy with."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.training.conftest import TINY
from vit_jax.signals import StopSignal

# A library that does not come back to Python for minutes: so does XLA's compiler. Something is said
# when it is at work.
BUSY = (
    "import hashlib, threading\n"
    " threading.Timer(0.3, lambda: print('ready', flush=True)).start()\n"
    " hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
)


class Child:
    """A Python program that says "ready"."""

    def __init__(self, code: str):
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        assert self._process.stdout.readline() == "ready\n"

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def line(self) -> str:
        return self._process.stderr.readline()

    def end(self) -> tuple[int, str]:
        _, text = self._process.communicate(timeout=60)
        return self._process.returncode, text


def test_ctrl_c_ends_a_program_that_a_library_keeps():
    child = Child(
        f"from vit_jax import signals\nsignals.PATIENCE_S = 0.5\nwith signals.Answered():\n {BUSY}"
    )
    child.send(signal.SIGINT)
    assert child.end() == (130, "vit-jax: interrupted\n")


def test_ctrl_c_lets_a_program_clear_up_first():
    child = Child(
        "import time\nfrom vit_jax import signals\n"
        "try:\n with signals.Answered():\n  print('ready', flush=True)\n  time.sleep(60)\n"
        "except KeyboardInterrupt:\n time.sleep(0.1)\n raise SystemExit(7)"
    )
    child.send(signal.SIGINT)
    assert child.end() == (7, "")


def test_the_first_ctrl_c_of_a_run_is_answered_while_a_library_is_at_work_and_the_second_ends():
    child = Child(
        "from vit_jax import signals\n"
        "signals.PATIENCE_S = 0.5\n"
        "with signals.Answered(), signals.NothingToSave(), signals.StopSignal():\n"
        f" {BUSY}"
    )
    child.send(signal.SIGINT)
    assert child.line().startswith("SIGINT: stopping; what is under way is finished and saved")
    child.send(signal.SIGINT)
    assert child.end() == (130, "vit-jax: interrupted\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_stop_while_it_imports_asks_to_be_started_again(number, tmp_path):
    child = Child(
        "import sys\nfrom vit_jax import signals\nfrom vit_jax.cli import main\n"
        "enter = signals.NothingToSave.__enter__\n"
        "def ready(block):\n enter(block)\n print('ready', flush=True)\n"
        "signals.NothingToSave.__enter__ = ready\n"
        f"sys.exit(main(['train', '--config={TINY}', '--workdir={tmp_path / 'run'}']))"
    )
    child.send(number)
    said = f"vit-jax: stopped by {number.name}, nothing to save: start the same command again\n"
    assert child.end() == (75, said)
    assert not (tmp_path / "run").exists()


def test_a_block_leaves_everything_as_it_was_and_a_library_is_never_ended():
    def state():
        fd = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(fd)
        return fd, signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    before, threads, said = state(), threading.active_count(), []
    with StopSignal() as stop:
        stop.say = said.append
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal_name == "SIGTERM"
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert state() == before
    deadline = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == threads
    assert len(said) == 1
    assert said[0].startswith("SIGTERM: stopping;")


def test_in_another_thread_signals_are_left_alone():
    before = signal.getsignal(signal.SIGINT)

    def inside():
        with StopSignal() as stop:
            assert signal.getsignal(signal.SIGINT) == before
            assert not stop

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
