"""What is known of devices, and how a run's use of them is counted."""

import math
from types import SimpleNamespace

import pytest

from vit_jax.errors import UserError
from vit_jax.models import create_model
from vit_jax.models.cost import flops
from vit_jax.training import hardware
from vit_jax.training.hardware import CHIPS, Usage, chip_named, find_chip


@pytest.mark.parametrize(
    ("kind", "chip"),
    [
        ("TPU v2", "TPU v2"),
        ("TPU v4", "TPU v4"),
        ("TPU v5 lite", "TPU v5e"),
        ("TPU v5", "TPU v5p"),
        ("TPU v6 lite", "TPU v6e"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA L4", "L4"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("cpu", None),
        ("NVIDIA L40S", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
    ],
)
def test_devices_are_known_by_what_jax_calls_them(kind, chip):
    assert find_chip(kind) == (chip and CHIPS[chip])


def test_a_user_may_name_a_chip_shortly():
    assert chip_named("v5e") == chip_named("TPU v5 lite") == CHIPS["TPU v5e"]
    assert chip_named("h100") == CHIPS["H100"]
    with pytest.raises(UserError, match="unknown chip 'h1000': known are TPU v2"):
        chip_named("h1000")


def devices(kind, count, stats):
    found = [SimpleNamespace(device_kind=kind, memory_stats=lambda: stats)] * count
    return {"devices": lambda: found, "local_devices": lambda: found, "device_count": lambda: count}


def usage_on(monkeypatch, kind, count, stats):
    monkeypatch.setattr(hardware, "jax", SimpleNamespace(**devices(kind, count, stats)))
    return Usage(create_model("ViT-Ti_16", num_classes=10, num_layers=2), (32, 32, 3))


def test_mfu_is_the_share_of_the_peak_that_the_networks_operations_make(monkeypatch):
    usage = usage_on(monkeypatch, "TPU v4", 4, {"peak_bytes_in_use": 3 * 2**29})
    operations = 3 * flops(create_model("ViT-Ti_16", num_classes=10, num_layers=2), (32, 32))
    assert usage.figures(1000.0) == {
        "time/images_per_s": 1000.0,
        "time/images_per_s_per_device": 250.0,
        "time/mfu": pytest.approx(1000 * operations / (4 * 275e12)),
        "time/memory_peak_gib": 1.5,
    }


def test_what_is_not_known_is_left_out(monkeypatch):
    usage = usage_on(monkeypatch, "cpu", 1, None)
    assert set(usage.figures(10.0)) == {"time/images_per_s", "time/images_per_s_per_device"}
    assert usage.figures(math.nan) == {}
