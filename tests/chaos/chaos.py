"""Random faults over one run of several processes, which must end as if nothing had happened.

    python tests/chaos/chaos.py --faults=50 --seed=0

The run, on the digits, is started again after each fault that ends it. Its weights and figures must
be those of an undisturbed run, bit for bit, and each process must end as documented.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.group import Group

EACH = 200  # Steps a fault, about: JAX takes a second to stop all at one step.
SILENCE = 4  # Seconds.
ABORTED = -signal.SIGABRT  # By JAX, as another process was lost.
ROOM = "400m"


class Chaos:
    """One disturbed run; each fault returns the exit statuses that the processes may have."""

    def __init__(self, workdir: Path, faults: int, seed: int, processes: int):
        self.workdir, self.count = workdir, processes
        self.chance = random.Random(seed)
        self.fields = (
            *(f"total_steps={EACH * (faults + 1)}", "checkpoint_every=50", "eval_every=100"),
            *("progress_every=1", "keep_checkpoints=3", f"silence_timeout={SILENCE}"),
        )
        self.kinds: list[Callable[[Group], list[set[int]] | None]] = [
            *(self.kill, self.terminate, self.pause, self.silence, self.tear, self.fill)
        ]

    def start(self) -> Group:
        return Group(self.workdir, *self.fields, count=self.count)

    def kill(self, group: Group, victim: int | None = None) -> list[set[int]]:
        """kill -9 of one process: the others say whom they miss."""
        victim = self.chance.randrange(self.count) if victim is None else victim
        group.processes[victim].kill()
        return [{-9} if i == victim else {ABORTED} for i in range(self.count)]

    def terminate(self, group: Group) -> list[set[int]]:
        """SIGTERM to one process: all save the same step."""
        self.chance.choice(group.processes).terminate()
        return [{75}] * self.count

    def pause(self, group: Group) -> None:
        """SIGSTOP for less than the time-out: nothing happens."""
        victim = self.chance.choice(group.processes)
        victim.send_signal(signal.SIGSTOP)
        time.sleep(self.chance.uniform(0.1, 0.5 * SILENCE))
        victim.send_signal(signal.SIGCONT)

    def silence(self, group: Group) -> list[set[int]]:
        """SIGSTOP for longer: JAX ends the others, and it too when it wakes."""
        victim = self.chance.choice(group.processes)
        victim.send_signal(signal.SIGSTOP)
        for process in group.processes:
            if process is not victim:
                process.wait(60)
        victim.send_signal(signal.SIGCONT)
        return [{ABORTED}] * self.count

    def tear(self, group: Group) -> list[set[int]]:
        """A kill after which the newest checkpoint is torn or damaged, if there is one before."""
        statuses = self.kill(group)
        for process in group.processes:
            process.wait(60)
        steps = (p for p in (self.workdir / "checkpoints").iterdir() if p.name.isdigit())
        folders = sorted(steps, key=lambda p: int(p.name))
        if len(folders) > 1:
            files = sorted(p for p in folders[-1].rglob("*") if p.is_file())
            largest = max(files, key=lambda p: p.stat().st_size)  # Else most often a trifle.
            file = self.chance.choice([largest, self.chance.choice(files)])
            content = bytearray(file.read_bytes())
            match self.chance.randrange(3):
                case 0:
                    file.unlink()
                case 1:
                    del content[self.chance.randrange(len(content) or 1) :]
                    file.write_bytes(content)
                case 2:
                    for _ in range(16 if content else 0):
                        content[self.chance.randrange(len(content))] ^= self.chance.randint(1, 255)
                    file.write_bytes(content)
        return statuses

    def fill(self, group: Group) -> list[set[int]]:
        """The disk is full until all have ended."""
        filler = self.workdir.parent / "filler"
        if os.path.ismount(self.workdir.parent):
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while file.write(bytes(2**16)):
                    pass
        else:  # Files of more than 300 bytes can't be written.
            for process in group.processes:
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (300, 300))
        for process in group.processes:
            process.wait(120)
        filler.unlink(missing_ok=True)
        return [{2, ABORTED}] * self.count

    def run(self, faults: int) -> collections.Counter:
        """Faults of all kinds in random order, at random steps, and then the rest of the run."""
        order = [self.kinds[i % len(self.kinds)] for i in range(faults)]
        self.chance.shuffle(order)
        done: collections.Counter = collections.Counter()
        group, before, at = self.start(), time.monotonic(), 0
        for i, fault in enumerate(order):
            # Not while it starts: who does not come is waited for, for minutes.
            step = max(EACH * i + self.chance.randrange(1, EACH), at + 1)
            assert group.wait_for(step), group.end()
            begun = time.monotonic()
            expected = fault(group)
            if expected is not None:
                ends = group.end()
                took = time.monotonic() - begun
                assert all(
                    end[0] in want and "Traceback" not in end[2]
                    for end, want in zip(ends, expected, strict=True)
                ), (fault.__name__, expected, ends)
                texts = (out or err for status, out, err in ends if status != -9)
                said = next(texts).strip().splitlines()[-1]
                at = group.step
                group = self.start()
            else:
                took, said = time.monotonic() - begun, "goes on"
            done[fault.__name__] += 1
            total = time.monotonic() - before
            what = f"{i + 1:3} {fault.__name__:9} at step {step:5}, {took:4.1f} s: {said}"
            print(f"{total:6.0f} s {what}", flush=True)
        ends = group.end()
        assert all(status == 0 for status, _, _ in ends), ends
        return done


def outcome(workdir: Path) -> tuple[dict[str, bytes], list[dict]]:
    """All that a run leaves and that must be the same."""
    with np.load(workdir / "weights.npz", allow_pickle=False) as arrays:
        weights = {name: arrays[name].tobytes() for name in arrays.files}
    lines = map(json.loads, (workdir / "metrics.jsonl").open())
    return weights, [{k: v for k, v in x.items() if not k.startswith("time/")} for x in lines]


@contextlib.contextmanager
def own_disk(folder: Path) -> Iterator[None]:
    """A small file system of its own, where that is allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(folder)]
    mounted = os.getuid() == 0 and subprocess.run(command, check=False).returncode == 0
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        for name, value in (
            ("JAX_COMPILATION_CACHE_DIR", f"{folder}/compiled"),
            ("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0"),
            ("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1"),
        ):
            os.environ.setdefault(name, value)
        begun = time.monotonic()
        with own_disk(Path(folder) / "disk"):
            chaos = Chaos(Path(folder) / "disk" / "run", args.faults, args.seed, args.processes)
            done = chaos.run(args.faults)
            whole = Path(folder) / "whole"
            ends = Group(whole, *chaos.fields, count=args.processes).end()
            assert all(status == 0 for status, _, _ in ends), ends
            assert outcome(chaos.workdir) == outcome(whole), "another outcome"
            aside = [p.name for p in (chaos.workdir / "checkpoints").glob("*.damaged*")]
    print(
        f"{args.faults} faults ({', '.join(f'{n} {kind}' for kind, n in sorted(done.items()))}; "
        f"{len(aside)} checkpoints set aside) over {args.processes} processes in "
        f"{time.monotonic() - begun:.0f} s: weights and figures equal, bit for bit"
    )


if __name__ == "__main__":
    main()
