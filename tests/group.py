"""`vit-jax train` as several processes."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

TINY = Path(__file__).resolve().parent / "tiny.py"
PATIENCE = 400  # Seconds until a process that shows no sign of life fails a test.


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Group:
    """A run of `count` processes with so many simulated devices each.

    `fields` are those of the configuration, `own` further arguments of single processes.
    """

    def __init__(
        self,
        workdir: Path,
        *fields: str,
        count: int = 2,
        devices: int = 1,
        own: Mapping[int, list[str]] | None = None,
    ):
        self.workdir = workdir
        self.processes: list[subprocess.Popen] = []
        self._texts: list[tuple[TextIO, TextIO]] = []
        self.port = free_port()
        address = f"127.0.0.1:{self.port}"
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        }
        for i in range(count):
            command = [sys.executable, "-m", "vit_jax", "train", f"--config={TINY}"]
            command += [f"--workdir={workdir}", *(f"--config.{field}" for field in fields)]
            command += (own or {}).get(i, [])
            if count > 1:
                command += [f"--coordinator={address}", f"--num-processes={count}"]
                command += [f"--process-id={i}"]
            # Not pipes: they fill up while nobody reads.
            out, err = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115
            self._texts.append((out, err))
            self.processes.append(
                subprocess.Popen(command, env=environment, stdout=out, stderr=err)
            )

    @property
    def step(self) -> int:
        """The last step in the metrics."""
        try:
            return json.loads((self.workdir / "metrics.jsonl").read_bytes().split(b"\n")[-2])[
                "step"
            ]
        except (OSError, IndexError, ValueError):
            return 0

    def wait_for(self, step: int) -> bool:
        """Whether the run comes to a step; else a process has ended."""
        deadline = time.monotonic() + PATIENCE
        while self.step < step:
            if any(p.poll() is not None for p in self.processes):
                return False
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return True

    def send(self, number: int, process: int, step: int) -> None:
        """Sends a signal to one process when the run is at a step."""
        assert self.wait_for(step), self.end()
        self.processes[process].send_signal(number)

    def end(self) -> list[tuple[int, str, str]]:
        """Exit status, output and errors of each."""
        ends = []
        for process, files in zip(self.processes, self._texts, strict=True):
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
            for file in files:
                file.seek(0)
            ends.append((process.returncode, *(file.read() for file in files)))
        return ends
