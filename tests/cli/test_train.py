"""`vit-jax train` keeps memory between steps: what the allocator is told, in other processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Page faults while 256 MB are taken, written and given back, eight times over.
CHILD = """
import ctypes, fnmatch, resource
from vit_jax.cli import train
train.glob.glob = lambda pattern: fnmatch.filter({found}, pattern)
print(train.keep_memory())
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
size = ctypes.c_size_t(2**28)
for i in range(9):
    if i == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = ctypes.c_void_p(libc.malloc(size))
    libc.memset(block, 1, size)
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or "glibc" not in os.confstr("CS_GNU_LIBC_VERSION"),
    reason="about glibc",
)


def kept(found=(), **environment: str) -> tuple[bool, int]:
    """What `keep_memory` returns, and the page faults after the first block."""
    path = {"PYTHONPATH": str(Path(__file__).parents[2])}
    lines = subprocess.run(
        [sys.executable, "-c", CHILD.format(found=[*found])],
        env=os.environ | path | environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    return lines[0] == "True", int(lines[1])


def test_memory_is_taken_from_the_system_once():
    told, faults = kept()

    assert told
    assert faults < 1_000  # 500,000 without.


@pytest.mark.slow
@pytest.mark.ci
def test_nothing_is_changed_where_that_is_said_or_of_no_use():
    told, faults = kept(VIT_JAX_KEEP_MEMORY="0")
    assert not told
    assert faults > 1_000

    for accelerator in ("/dev/nvidia0", "/dev/dxg"):
        assert not kept(found=[accelerator])[0]


def test_training_is_told_before_it_has_threads(tmp_path):
    """A heap for another thread would not be the one whose memory is kept."""
    child = (
        "import sys, threading\n"
        "from vit_jax.cli import train\n"
        "def keep(): print('numpy' in sys.modules, threading.active_count()); sys.exit()\n"
        "train.keep_memory = keep\n"
        "from vit_jax.cli import main\n"
        f"main(['train', '--config=digits', '--workdir={tmp_path}/run'])\n"
    )
    run = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True)
    assert run.stdout == "False 1\n"
