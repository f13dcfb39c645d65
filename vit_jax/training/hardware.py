"""What the devices are, and how much of what they could do a run makes use of."""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from vit_jax.errors import UserError
from vit_jax.models.cost import training_flops


class Chip(NamedTuple):
    """What JAX calls one device: dense bfloat16 (V100, T4: float16) TFLOP/s, and GiB of memory."""

    tflops: float
    memory: float


# From cloud.google.com/tpu/docs/system-architecture-tpu-vm, its page of each version, and NVIDIA's
# data sheets, which double most figures ("with sparsity"). Of v2 and v3 a device is a core, half a
# chip. Of chips that are sold with several sizes of memory, the smallest. The first chip counts all
# of whose words are in a device's name.
CHIPS = {
    "TPU v2": Chip(22.5, 8),
    "TPU v3": Chip(61.5, 16),
    "TPU v4 lite": Chip(138, 8),
    "TPU v4": Chip(275, 32),
    "TPU v5 lite": Chip(197, 16),
    "TPU v5e": Chip(197, 16),
    "TPU v5p": Chip(459, 95),
    "TPU v5": Chip(459, 95),
    "TPU v6 lite": Chip(918, 32),
    "TPU v6e": Chip(918, 32),
    "H200 NVL": Chip(836, 141),
    "H200": Chip(989, 141),
    "H100 NVL": Chip(836, 94),
    "H100 PCIe": Chip(756, 80),
    "H100": Chip(989, 80),
    "A100": Chip(312, 40),
    "L4": Chip(121, 24),
    "V100 PCIe": Chip(112, 16),
    "V100": Chip(125, 16),
    "T4": Chip(65, 16),
}


def find_chip(name: str) -> Chip | None:
    """The chip that a name is of, e.g. "NVIDIA A100-SXM4-40GB", "TPU v5 lite" or "h100".

    None for an unknown one, a CPU, or a part of a GPU (MIG).
    """
    words = set(re.findall(r"\w+", name.lower()))
    for known, chip in CHIPS.items():
        if set(known.lower().split()) <= words and "mig" not in words:
            return chip
    return None


def chip_named(name: str) -> Chip:
    """The chip that a user means. Raises UserError if it is unknown."""
    chip = find_chip(name) or find_chip(f"TPU {name}")
    if chip is None:
        raise UserError(f"unknown chip {name!r}: known are {', '.join(CHIPS)}")
    return chip


def memory_stats(device: jax.Device) -> Mapping[str, int]:
    """What a device tells of its memory; empty if its platform or allocator tells nothing."""
    try:
        return device.memory_stats() or {}
    except RuntimeError:  # So say plugins that do not implement it.
        return {}


def untold() -> str:
    """What `Usage` leaves out because the devices don't tell it; "" if nothing, or on CPUs, where
    these figures are never expected."""
    if jax.devices()[0].platform == "cpu":
        return ""
    kinds = dict.fromkeys(device.device_kind for device in jax.devices())
    unknown = [kind for kind in kinds if find_chip(kind) is None]
    found = [f"no time/mfu: the peak of {', '.join(unknown)} is not known"] if unknown else []
    if not _peaks():
        found.append("no time/memory_peak_gib: the devices do not tell their memory")
    return "; ".join(found)


def _peaks() -> list[int]:
    """The most bytes that the devices of this process have held, of those that tell."""
    stats = map(memory_stats, jax.local_devices())
    return [told["peak_bytes_in_use"] for told in stats if "peak_bytes_in_use" in told]


class Usage:
    """How fast the devices of a run are, and how full.

    Args:
      model, image_shape: the network, and (h, w, channels) of its images.
    """

    def __init__(self, model: Any, image_shape: tuple[int, int, int]):
        self._devices = jax.device_count()
        chips = [find_chip(device.device_kind) for device in jax.devices()]
        self._share_of_peak = 0.0  # That an image a second makes.
        if None not in chips:
            *size, channels = image_shape
            operations = training_flops(model, (size[0], size[1]), channels=channels)
            self._share_of_peak = operations / (1e12 * sum(chip.tflops for chip in chips if chip))

    def figures(self, images_per_s: float) -> dict[str, float]:
        """Figures by their names in metrics.jsonl.

        "time/images_per_s", of all devices; "time/images_per_s_per_device"; "time/mfu", the share
        in [0, 1] of the devices' peak that the network's own operations make (arXiv:2204.02311,
        appendix B), where the peak is known; "time/memory_peak_gib", the most that a device of this
        process has held since it started, where it tells.
        """
        values = {
            "time/images_per_s": images_per_s,
            "time/images_per_s_per_device": images_per_s / self._devices,
        }
        if self._share_of_peak:
            values["time/mfu"] = images_per_s * self._share_of_peak
        if peak := max(_peaks(), default=0):
            values["time/memory_peak_gib"] = peak / 2**30
        return {key: value for key, value in values.items() if not math.isnan(value)}
