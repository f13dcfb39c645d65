"""What the devices are, and how much of what they could do a run makes use of."""

import math
import re
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


class Usage:
    """How fast the devices of a run are, and how full.

    Args:
      model, picture_shape: the network, and (h, w, channels) of its pictures.
    """

    def __init__(self, model: Any, picture_shape: tuple[int, int, int]):
        self._devices = jax.device_count()
        chip = find_chip(jax.devices()[0].device_kind)
        self._share_of_peak = 0.0  # That an image a second makes.
        if chip is not None:
            *size, channels = picture_shape
            operations = training_flops(model, (size[0], size[1]), channels=channels)
            self._share_of_peak = operations / (chip.tflops * 1e12 * self._devices)

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
        held = [(device.memory_stats() or {}) for device in jax.local_devices()]
        if peak := max(stats.get("peak_bytes_in_use", 0) for stats in held):
            values["time/memory_peak_gib"] = peak / 2**30
        return {key: value for key, value in values.items() if not math.isnan(value)}
