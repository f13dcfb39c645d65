"""The doctor, a real process each time, in surroundings that were made up around it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vit_jax
from vit_jax.cli import doctor
from vit_jax.data import own_cores

ROOT = Path(vit_jax.__file__).parents[1]


@pytest.fixture
def ask(tmp_path):
    """Runs the command with `site` before everything else that Python imports, and `bin` before
    all other programs: exit status, and what it found."""
    (tmp_path / "site").mkdir()
    (tmp_path / "bin").mkdir()

    def run(**environment):
        hidden = ("JAX_", "XLA_", "CUDA_", "VIT_JAX_")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
        paths = {
            "PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{ROOT}",
            "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "XDG_CACHE_HOME": str(tmp_path / "files"),
        }
        command = [sys.executable, "-m", "vit_jax", "doctor", "--json"]
        done = subprocess.run(
            command, env=clean | paths | environment, capture_output=True, text=True, timeout=200
        )
        assert done.stderr == "" or "Traceback" not in done.stderr
        return done.returncode, json.loads(done.stdout)

    return run


def install(tmp_path, name, version):
    """A package of which nothing is there but its name and version."""
    folder = tmp_path / "site" / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def install_gpu(tmp_path, used=5):
    program = tmp_path / "bin" / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho 'NVIDIA L4, 23034, {used}'\n")
    program.chmod(0o755)


def the_fault(found, beginning):
    (fault,) = [fault for fault in found["faults"] if fault["what"].startswith(beginning)]
    return fault


def test_where_nothing_is_wrong_it_says_what_is_there(ask):
    status, found = ask(JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=3")
    gpu = "NVIDIA GPU"  # On a machine with one, it is rightly said to be hidden.
    assert [x for x in found["faults"] if not x["what"].startswith(gpu)] == []
    assert status == (1 if found["faults"] else 0)
    assert found["versions"]["jax"] == __import__("jax").__version__
    assert found["jax"]["devices"] == [{"kind": "cpu", "memory": None}] * 3
    assert found["jax"]["computes"] is True
    assert found["settings"]["JAX_PLATFORMS"] == "cpu"
    assert found["machine"]["cpus"] == own_cores()


def test_a_gpu_that_jax_does_not_see_is_told_with_the_cause(ask, tmp_path):
    install_gpu(tmp_path)
    status, found = ask(CUDA_VISIBLE_DEVICES="-1")
    fault = the_fault(found, "NVIDIA GPU (NVIDIA L4), but JAX computes on the CPU")
    assert (status, fault["mend"]) == (1, "unset CUDA_VISIBLE_DEVICES")


@pytest.mark.parametrize(
    ("setting", "packages", "cause", "mend"),
    [
        ({}, {}, "the jaxlib here is for CPUs only", 'pip install "vit_jax[gpu]"'),
        ({"JAX_PLATFORMS": "cpu"}, {}, "JAX_PLATFORMS=cpu hides it", "unset JAX_PLATFORMS"),
        ({}, {"jax-cuda12-plugin": "0.4.1"}, "don't fit together", "pip install --upgrade"),
        ({}, {"jax-cuda13-plugin": "0.10.2"}, "driver is too old", "update the NVIDIA driver"),
    ],
)
def test_the_cause_is_found_among_several(monkeypatch, setting, packages, cause, mend):
    for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    log = "INFO:jax:Unable to initialize backend 'cuda': the driver is too old\n"
    gpus = [{"name": "NVIDIA L4", "memory": None, "used": None}]
    machine, installed = {"gpus": gpus, "tpu_devices": []}, {"jax": "0.10.2"} | packages
    answer = doctor.Answer("", log, "")
    (fault,) = doctor._device_faults(machine, answer, {"backend": "cpu"}, installed)
    assert cause in fault["what"]
    assert fault["mend"].startswith(mend)


def test_what_takes_the_memory_of_a_gpu_is_told(ask, tmp_path):
    install_gpu(tmp_path, used=20000)
    install(tmp_path, "tensorflow", "2.21.0")
    status, found = ask()
    assert status == 1
    assert "20,000 of 23,034 MiB" in the_fault(found, "GPU 0 (NVIDIA L4)")["what"]
    assert "vit_jax[tf]" in the_fault(found, "tensorflow 2.21.0 takes")["mend"]


def test_a_tpu_that_another_process_holds_is_told_with_that_process(ask, tmp_path):
    # What JAX 0.4 to 0.10 log in this case, though with no TPU it takes somebody else to say it.
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import sys\n"
        "sys.stderr.write(\"INFO: Unable to initialize backend 'tpu': ABORTED: The TPU is already "
        'in use by process with pid 176028. Not attempting to load libtpu.so in this process.\\n")'
    )
    status, found = ask(JAX_PLATFORMS="cpu")
    assert status == 1
    assert "process 176028 holds it" in the_fault(found, "TPU, but JAX")["what"]
    assert "kill 176028" in the_fault(found, "TPU, but JAX")["mend"]


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"XLA_FLAGS": "--xla_no_such_flag=1"}, "--xla_no_such_flag=1"),
        ({"JAX_PLATFORMS": "nonsense"}, "nonsense"),
    ],
)
def test_where_jax_does_not_start_its_reason_is_told(ask, setting, reason):
    status, found = ask(**setting)
    assert status == 1
    fault = the_fault(found, "JAX does not work")
    assert reason in fault["what"]
    assert next(iter(setting)) in fault["mend"]


def test_a_jax_that_never_answers_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(doctor, "PATIENCE", 0.5)
    answer = doctor._ask("import time; time.sleep(60)")
    (fault,) = doctor._jax_faults(answer, {})
    assert "no answer within 0.5 s" in fault["what"]


def test_a_broken_package_and_a_cache_that_cannot_be_written_are_told(ask, tmp_path):
    missing = "libGL.so.1: cannot open shared object file"
    (tmp_path / "site" / "cv2.py").write_text(f"raise ImportError({missing!r})")
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "files"
    status, found = ask(VIT_JAX_CACHE=str(place), JAX_PLATFORMS="cpu")
    assert status == 1
    fault = the_fault(found, "cv2 can't be imported")
    assert missing in fault["what"]
    assert "opencv-python-headless" in fault["mend"]
    assert "VIT_JAX_CACHE" in the_fault(found, f"the cache {place} can't be written")["mend"]


@pytest.mark.parametrize(
    "answer", ["None", "{}", "{'bytes_in_use': 1}", "(_ for _ in ()).throw(RuntimeError('no'))"]
)
def test_a_device_need_not_tell_its_memory(answer):
    line = "for d in jax.local_devices()"
    stand_in = f"for d in [type('D', (), dict(device_kind='X', memory_stats=lambda s: {answer}))()]"
    assert line in doctor.LOOK_AT_JAX
    said = doctor._ask(doctor.LOOK_AT_JAX.replace(line, stand_in), JAX_PLATFORMS="cpu")
    assert json.loads(said.out)["devices"] == [{"kind": "X", "memory": None}]


def test_a_person_gets_lines_and_each_fault_with_its_mend():
    found = {
        "versions": {"python": "3.11"},
        "machine": {"system": "Linux", "cpus": 2, "gpus": [], "tpu_devices": []},
        "settings": {},
        "jax": {"backend": "gpu", "devices": [{"kind": "NVIDIA L4", "memory": 18 * 2**30}] * 2},
        "faults": [],
    }
    text = doctor._text(found)
    assert "JAX sees     2 x NVIDIA L4 (18.0 GiB)" in text
    assert text.endswith("no faults found")
    found["jax"]["devices"] = [{"kind": "NVIDIA L4", "memory": None}]
    assert "JAX sees     1 x NVIDIA L4 (memory not told)" in doctor._text(found)
    found["faults"] = [{"what": "a", "mend": "b"}]
    assert doctor._text(found).endswith("FAULT  a\nmend   b")
