"""What memory and time `convert` takes for ViT-L/16 (1.2 GB) between every two kinds of file, and
from a folder that Orbax itself wrote.

    python benchmarks/convert.py

Each run is a process of its own. The memory is the process's peak, and how much that is more than
the peak of one that does the same with small weights, in units of the largest array.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from load import make_file, peak_memory

from vit_jax.checkpoints import ENDINGS, open_arrays, read_npz, to_tree

DEFAULT = "-default.orbax"  # What Orbax writes when nothing is said: compressed.


def measure(source: Path, target: Path) -> dict[str, float]:
    """Converts once: {"seconds", "peak"}, the latter in bytes."""
    from vit_jax.checkpoints.convert import convert

    start = time.perf_counter()
    convert(source, target, style="prelinen", force=True)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak": peak_memory()}


def run(source: Path, target: Path) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, str(source), str(target)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measures every pair once."""
    from orbax.checkpoint import v1

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_file(folder / "large.npz")
        make_file(folder / "small.npz", "ViT-mu_16", 10)
        with open_arrays(folder / "large.npz") as arrays:
            sizes = [array.nbytes for array in arrays.values()]
        print(f"{sum(sizes) / 1e6:,.0f} MB in all, the largest array {max(sizes) / 1e6:.1f} MB\n")
        for size in ("large", "small"):
            v1.save(folder / f"{size}{DEFAULT}", to_tree(read_npz(folder / f"{size}.npz")))
        print("| from | to | seconds | peak, MB | of a small file, MB | more, largest arrays |")
        print("| --- | --- | --- | --- | --- | --- |")
        for source in (*ENDINGS, DEFAULT):  # The first, .npz, makes the files of the others.
            for target in ENDINGS:
                large, small = (
                    run(folder / f"{size}{source}", folder / f"{size}-new{target}")
                    for size in ("large", "small")
                )
                more = (large["peak"] - small["peak"]) / max(sizes)
                print(
                    f"| `{source}` | `{target}` | {large['seconds']:.1f} | "
                    f"{large['peak'] / 1e6:,.0f} | {small['peak'] / 1e6:,.0f} | {more:.2f} |",
                    flush=True,
                )
                for size in ("large", "small"):
                    new, kept = folder / f"{size}-new{target}", folder / f"{size}{target}"
                    if kept.exists():
                        subprocess.run(["rm", "-r", str(new)], check=True)
                    else:
                        new.rename(kept)


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(measure(Path(sys.argv[1]), Path(sys.argv[2]))))
    else:
        main()
