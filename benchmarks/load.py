"""How long loading ViT-L/16 (1.2 GB) takes and what memory, compared with `np.load` of every array;
and a file of timm's ViT-B/16 (350 MB), compared with `safetensors.numpy.load_file`.

    python benchmarks/load.py

Each run is a process of its own; the file is in the page cache. The time is that of the call,
without imports; the memory is the peak of the process, with them.
"""

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

RUNS = 8
KINDS = ("np.load", "npz", "safetensors", "orbax")
TIMM = ("load_file", "timm")


def make_file(path: Path, name: str = "ViT-L_16", num_classes: int = 21_843) -> None:
    """Writes an official model with random weights in the layout of the published files."""
    import jax

    import vit_jax
    from vit_jax.checkpoints import save_weights

    model = vit_jax.create_model(name, num_classes=num_classes)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
    save_weights(path, params, style="prelinen")


def make_timm_folder(folder: Path) -> None:
    """Writes a DeiT-B/16 with random weights as timm would."""
    from vit_jax import create_model
    from vit_jax.checkpoints.export import export
    from vit_jax.models import Spec

    spec = Spec(create_model("DeiT-B_16", num_classes=1000), (224, 224), 3)
    rng = np.random.default_rng(0)
    arrays = {key: rng.standard_normal(shape, np.float32) for key, shape in spec.shapes().items()}
    preprocess = "resize(224, method='pil_bicubic')|value_range(-1, 1)"
    export(folder, "timm", arrays, spec, preprocess=preprocess)


def measure(kind: str, path: Path) -> dict[str, float]:
    """Loads once: {"seconds", "peak"}, the latter in bytes."""
    if kind == "np.load":
        start = time.perf_counter()
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        assert arrays
    elif kind == "load_file":
        from safetensors.numpy import load_file

        start = time.perf_counter()
        loaded = load_file(path)
        assert loaded
    else:
        from vit_jax.checkpoints import load_weights

        start = time.perf_counter()
        loaded = load_weights(path)
        assert loaded
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak": peak_memory()}


def peak_memory() -> int:
    """The most memory that this process has had, in bytes.

    From Linux's own file: getrusage would count the process that started this one too.
    """
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def main() -> None:
    """Measures every kind of file in turn, RUNS times, and prints the medians."""
    from vit_jax.checkpoints.convert import convert

    with tempfile.TemporaryDirectory() as folder:
        paths = dict.fromkeys(KINDS, Path(folder) / "L_16.npz")
        make_file(paths["npz"])
        for kind in ("safetensors", "orbax"):
            paths[kind] = Path(folder) / f"L_16.{kind}"
            convert(paths["npz"], paths[kind])
        make_timm_folder(Path(folder) / "timm")
        paths |= dict.fromkeys(TIMM, Path(folder) / "timm" / "model.safetensors")
        kinds = (*KINDS, *TIMM)
        runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
        for i in range(RUNS):
            for kind in kinds[i % len(kinds) :] + kinds[: i % len(kinds)]:  # None is always first.
                command = [sys.executable, __file__, kind, str(paths[kind])]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                runs[kind].append(json.loads(output))
    medians = {
        kind: {key: statistics.median(run[key] for run in runs[kind]) for key in runs[kind][0]}
        for kind in kinds
    }
    print("| | seconds | ratio | peak memory, MB | ratio |\n| --- | --- | --- | --- | --- |")
    for kind, median in medians.items():
        peer = medians["load_file" if kind in TIMM else "np.load"]
        print(
            f"| {kind} | {median['seconds']:.2f} | {median['seconds'] / peer['seconds']:.2f} | "
            f"{median['peak'] / 1e6:,.0f} | {median['peak'] / peer['peak']:.2f} |"
        )


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))))
    else:
        main()
