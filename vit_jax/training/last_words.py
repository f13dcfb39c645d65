"""A program that tells in one line why JAX's distributed runtime aborts a process.

JAX's C++ code prints pages of logs and a stack, and aborts before any Python of that process could
say more. So `distributed.initialize` gives this program the C++ code's standard error:

    python last_words.py PROCESS COUNT SECONDS < what the C++ code prints > standard error

It imports nothing of the package: it starts in milliseconds.
"""

import json
import re
import sys

HOSTS = "vit-jax hosts: "  # Starts a line with the JSON list of each process's host.
# The logs that can end in an abort; they are held back until it is known whether they do.
_BEGINNING = re.compile(r"[EF]\d{4} .*(coordination_service|preemption_sync|client\.h:\d+\] Term)")
_STACK = "*** Check failure stack trace: ***"
_NOISE = re.compile(r"\[Gloo\] Rank|W\d{4} .*preemption_")


def explain(text: str, process: int, count: int, seconds: str, hosts: list[str]) -> str:
    """What has happened, in one line, by what JAX has printed up to its stack."""

    def name(numbers: list[str]) -> str:
        places = (f" on {hosts[int(n)]}" if int(n) < len(hosts) else "" for n in numbers)
        return ", ".join(f"process {n}{place}" for n, place in zip(numbers, places, strict=True))

    again = "start the same command again to go on from the last checkpoint"
    if "RegisterTask" in text:
        if "newer incarnation" in text or "Unexpected task" in text:
            return (
                f"process {process} of {count} does not fit to the others: give every process the "
                "same --num-processes and its own --process-id"
            )
        return (
            f"process {process}: not all of {count} processes came within {seconds} s: look why "
            "in the logs of the others, and whether they reach the address of process 0"
        )
    silent = re.search(r"tasks are unhealthy[^\n]*\n((?:\d+\n)+)", text)
    numbers = silent[1].split() if silent else re.findall(r"Task (\d+) heartbeat timeout", text)
    if numbers:
        lost = name(sorted(set(numbers), key=int))
        return f"{lost} ended, see its log, or gave no sign of life: {again}"
    if early := re.search(r"first task at the barrier: (\d+)", text):
        return f"{name([early[1]])} ended before the others, see its log: {again}"
    if "Failed to send RPC to coordination service" in text or "DEADLINE_EXCEEDED" in text:
        return f"{name(['0'])} ended, see its log, or can't be reached: {again}"
    status = re.search(r"absl::Status: (.*)", text)
    return (
        f"JAX ended process {process} ({status[1] if status else 'it does not say why'}): {again}"
    )


def main() -> None:
    """Passes lines on, but for the last words of JAX, which become one line."""
    process, count, seconds = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    hosts: list[str] = []
    held, told = "", False
    # The cursor may be hidden by a progress line.
    start = "\n\x1b[?25h" if sys.stdout.isatty() else ""
    for line in sys.stdin:
        shown = ""
        if line.startswith(HOSTS):
            hosts = json.loads(line.removeprefix(HOSTS))
        elif held and line.startswith(_STACK):
            # At once: the end of the first process of a container is the end of this one.
            shown = f"{start}vit-jax: {explain(held, process, count, seconds, hosts)}\n"
            told = True
        elif held or _BEGINNING.match(line):
            held += line
        elif not _NOISE.match(line):
            shown = line
        if shown:
            print(shown, end="", flush=True)
    if held and not told:
        print(held, end="", flush=True)


if __name__ == "__main__":
    main()
