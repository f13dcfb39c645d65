"""What the devices are, how much of what they could do a run makes use of, and traces of steps."""

import contextlib
import json
import math
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from vit_jax.buckets import GrowingFiles
from vit_jax.errors import UserError
from vit_jax.models.cost import training_flops
from vit_jax.training.distributed import allgather


class Chip(NamedTuple):
    """One device: its peak in TFLOP/s, dense, in bfloat16 or float16, and its memory in GiB."""

    tflops: float
    memory: float


_TABLE = json.loads(Path(__file__).with_name("chips.json").read_text(encoding="utf-8"))
CHIPS = {name: Chip(*figures) for name, figures in _TABLE["chips"].items()}


def find_chip(name: str) -> Chip | None:
    """The chip of a device's name, e.g. "NVIDIA A100-SXM4-40GB", "TPU v5 lite" or "h100".

    None for an unknown one, a CPU, or a part of a GPU (MIG).
    """
    words = set(re.findall(r"\w+", name.lower()))
    fitting = (chip for known, chip in CHIPS.items() if set(known.lower().split()) <= words)
    return None if "mig" in words else next(fitting, None)


def chip_named(name: str) -> Chip:
    """The chip that a user means. Raises UserError if it is unknown."""
    chip = find_chip(name) or find_chip(f"TPU {name}")
    if chip is None:
        raise UserError(f"unknown chip {name!r}: known are {', '.join(CHIPS)}")
    return chip


def memory_stats(device: jax.Device) -> Mapping[str, int]:
    """What a device reports of its memory; empty if its platform or allocator reports nothing."""
    try:
        return device.memory_stats() or {}
    except RuntimeError:  # So say plugins that do not implement it.
        return {}


def _memory_peaks() -> list[int]:
    """The most bytes that the devices of this process have held, of those that report it."""
    stats = map(memory_stats, jax.local_devices())
    return [reported["peak_bytes_in_use"] for reported in stats if "peak_bytes_in_use" in reported]


def untold() -> str:
    """What `Usage` leaves out because the devices don't report it; "" if nothing, or on CPUs, where
    these figures are never expected."""
    if jax.devices()[0].platform == "cpu":
        return ""
    kinds = dict.fromkeys(device.device_kind for device in jax.devices())
    unknown = [kind for kind in kinds if find_chip(kind) is None]
    found = [f"no time/mfu: the peak of {', '.join(unknown)} is not known"] if unknown else []
    if not _memory_peaks():
        found.append("no time/memory_peak_gib: the devices do not tell their memory")
    return "; ".join(found)


class Usage:
    """How fast the devices of a run are, and how full.

    Args:
      model, image_shape: the network, and (h, w, channels) of its images.
    """

    def __init__(self, model: Any, image_shape: tuple[int, int, int]):
        height, width, channels = image_shape
        self.devices = jax.device_count()
        chips = [find_chip(device.device_kind) for device in jax.devices()]
        self._mfu_of_one_image = 0.0  # At one image a second.
        if None not in chips:
            peak = 1e12 * sum(chip.tflops for chip in chips if chip)
            operations = training_flops(model, (height, width), channels=channels)
            self._mfu_of_one_image = operations / peak

    def figures(self, images_per_s: float) -> dict[str, float]:
        """Figures by their names in metrics.jsonl.

        "time/images_per_s", of all devices; "time/images_per_s_per_device"; "time/mfu", the share
        in [0, 1] of the devices' peak that the network's own operations make (arXiv:2204.02311,
        appendix B), where the peak is known; "time/memory_peak_gib", the most that a device of this
        process has held since it started, where it tells.
        """
        values = {
            "time/images_per_s": images_per_s,
            "time/images_per_s_per_device": images_per_s / self.devices,
        }
        if self._mfu_of_one_image:
            values["time/mfu"] = images_per_s * self._mfu_of_one_image
        if peak := max(_memory_peaks(), default=0):
            values["time/memory_peak_gib"] = peak / 2**30
        return {key: value for key, value in values.items() if not math.isnan(value)}


def trace_folder(workdir: Path) -> Path:
    """Where in a workdir this process writes its trace: files are named by the host, so that those
    who share one with an earlier process need a folder of their own. All have to call it together.
    """
    hosts, me = allgather(platform.node()), jax.process_index()
    own = [f"process_{me}"] if hosts[me] in hosts[:me] else []
    return workdir.joinpath("profile", *own)


class Profile(contextlib.AbstractContextManager):
    """A trace of what host and devices do between two steps, for TensorBoard or Perfetto.

    Args:
      steps: (start, stop): from the end of step `start` to that of step `stop`; empty for none.
      folder: gets plugins/profile/TIME/HOST.xplane.pb and a .trace.json.gz.
    """

    def __init__(self, steps: Sequence[int], folder: Path):
        self._start, self._stop = steps or (0, 0)
        self._folder, self._files = folder, GrowingFiles(folder, [])
        self._running = False

    def at(self, step: int, wait: Callable[[], None]) -> str:
        """Starts or stops where that is due after `step`; `wait` is called first, which waits until
        the devices have done the steps so far. What to tell: where a trace was just written, or why
        there is none."""
        due = self._start <= step < self._stop
        if due == self._running:
            return ""
        wait()
        try:
            if due:
                jax.profiler.start_trace(self._files.folder)
            else:
                self._stop_trace()
        except RuntimeError as e:  # Somebody else traces, or the platform has no profiler.
            self._running, self._stop = False, self._start
            return "no trace: " + str(e).partition("\n")[0]
        self._running = due
        return "" if due else f"a trace is in {self._folder}"

    def __exit__(self, *exc: object) -> None:
        if self._running:
            self._running = False
            self._stop_trace()
        self._files.close()

    def _stop_trace(self) -> None:
        jax.profiler.stop_trace()
        self._files.sync()
