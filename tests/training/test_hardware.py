"""What is known of devices, and how a run's use of them is counted."""

import json
import math
from types import SimpleNamespace

import jax
import pytest
from jax.errors import JaxRuntimeError

from tests.training.conftest import TINY
from vit_jax.cli import main
from vit_jax.errors import UserError
from vit_jax.models import create_model
from vit_jax.models.cost import flops
from vit_jax.training import hardware
from vit_jax.training.hardware import CHIPS, Usage, chip_named, find_chip, untold


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


def device(kind, stats):
    """One that tells `stats` of its memory, or raises them."""

    def memory_stats():
        if isinstance(stats, Exception):
            raise stats
        return stats

    platform = "cpu" if kind == "cpu" else "tpu" if "TPU" in kind else "gpu"
    return SimpleNamespace(device_kind=kind, platform=platform, memory_stats=memory_stats)


def usage_on(monkeypatch, *devices):
    found = {name: lambda: [*devices] for name in ("devices", "local_devices")}
    found["device_count"] = lambda: len(devices)
    monkeypatch.setattr(hardware, "jax", SimpleNamespace(**found, Device=None))
    return Usage(create_model("ViT-Ti_16", num_classes=10, num_layers=2), (32, 32, 3))


OPERATIONS = 3 * flops(create_model("ViT-Ti_16", num_classes=10, num_layers=2), (32, 32))


def test_mfu_is_the_share_of_the_peak_that_the_networks_operations_make(monkeypatch):
    usage = usage_on(monkeypatch, *[device("TPU v4", {"peak_bytes_in_use": 3 * 2**29})] * 4)
    assert usage.figures(1000.0) == {
        "time/images_per_s": 1000.0,
        "time/images_per_s_per_device": 250.0,
        "time/mfu": pytest.approx(1000 * OPERATIONS / (4 * 275e12)),
        "time/memory_peak_gib": 1.5,
    }
    assert untold() == ""


def test_the_peak_of_unequal_devices_is_their_sum_and_their_memory_that_of_the_fullest(monkeypatch):
    told = [{"peak_bytes_in_use": 2**30}, {"peak_bytes_in_use": 2**31}]
    usage = usage_on(monkeypatch, device("NVIDIA L4", told[0]), device("NVIDIA H100", told[1]))
    figures = usage.figures(1000.0)
    assert figures["time/mfu"] == pytest.approx(1000 * OPERATIONS / ((121 + 989) * 1e12))
    assert figures["time/memory_peak_gib"] == 2.0

    usage = usage_on(monkeypatch, device("NVIDIA L4", told[0]), device("NVIDIA L40S", told[1]))
    assert "time/mfu" not in usage.figures(1000.0)
    assert untold() == "no time/mfu: the peak of NVIDIA L40S is not known"


# As the platforms of JAX do: an allocator that doesn't count, one that counts something else, a
# plugin without that function.
SILENT = [
    None,
    {},
    {"bytes_limit": 2**34},
    NotImplementedError("no"),
    JaxRuntimeError("UNIMPLEMENTED"),
]


@pytest.mark.parametrize("stats", SILENT, ids=repr)
def test_memory_that_no_device_tells_is_left_out_and_that_is_said(monkeypatch, stats):
    usage = usage_on(monkeypatch, *[device("NVIDIA L4", stats)] * 2)
    names = {"time/images_per_s", "time/images_per_s_per_device", "time/mfu"}
    assert set(usage.figures(10.0)) == names
    assert untold() == "no time/memory_peak_gib: the devices do not tell their memory"
    # One that tells is enough.
    usage = usage_on(monkeypatch, device("L4", stats), device("L4", {"peak_bytes_in_use": 2**30}))
    assert usage.figures(10.0)["time/memory_peak_gib"] == 1.0
    assert untold() == ""


def test_cpus_have_neither_figure_and_nobody_expects_them(monkeypatch):
    usage = usage_on(monkeypatch, device("cpu", None))
    assert set(usage.figures(10.0)) == {"time/images_per_s", "time/images_per_s_per_device"}
    assert usage.figures(math.nan) == {}
    assert untold() == ""


@pytest.mark.slow
@pytest.mark.ci
def test_a_run_needs_nothing_that_a_platform_may_not_tell(monkeypatch, tmp_path, capsys):
    """Cost, memory of programs, memory of devices, the host as a device of its own: nothing is
    there, as on some GPUs and TPUs."""
    real = jax.local_devices

    def no_cpu(*args, backend=None, **kwargs):
        if backend == "cpu":
            raise RuntimeError("Unknown backend: 'cpu' requested")
        return real(*args, **kwargs)

    asked = []
    for kind, name in (
        (jax.stages.Lowered, "cost_analysis"),
        (jax.stages.Compiled, "cost_analysis"),
        (jax.stages.Compiled, "memory_analysis"),
    ):
        monkeypatch.setattr(kind, name, lambda _, name=name: asked.append(name))
    monkeypatch.setattr(jax, "local_devices", no_cpu)
    monkeypatch.setattr(hardware, "memory_stats", lambda device: {})
    monkeypatch.setattr(hardware, "find_chip", lambda name: CHIPS["H100"])

    fields = ("total_steps=4", "progress_every=2", "eval_every=2", "checkpoint_every=2")
    fields = [f"--config.{field}" for field in fields]
    assert main(["train", f"--config={TINY}", f"--workdir={tmp_path}", *fields]) == 0

    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    (last,) = [line for line in lines if line["step"] == 4 and "train/loss" in line]
    assert last["time/mfu"] > 0
    assert "time/memory_peak_gib" not in last
    assert (tmp_path / "weights.npz").exists()
