"""How many cores there are for this process. Imports nothing that can be missing."""

import contextlib
import os

_QUOTA = "/sys/fs/cgroup/cpu.max"  # Of a container.


def own_cores() -> int:
    """The cores that this process was given: a container or a job may have fewer than there are."""
    given = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if given else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError), open(_QUOTA) as file:
        quota, period = file.read().split()  # "max 100000" where there is no limit.
        cores = min(cores, max(round(int(quota) / int(period)), 1))
    return cores
