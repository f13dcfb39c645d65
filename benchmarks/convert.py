"""What memory and time `convert` takes for ViT-L/16 (1.2 GB) between every two kinds of file.

    python benchmarks/convert.py

Each run is a process of its own. The memory is the process's peak less that of one that only
imports and traces the network, in units of the largest array.
"""

import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from load import make_file, peak_memory

from vit_jax.checkpoints import ENDINGS, open_arrays, read_spec, to_linen


def measure(source: Path, target: Path | None) -> dict[str, float]:
    """Converts once, or only looks: {"seconds", "peak"}, the latter in bytes."""
    from vit_jax.checkpoints.convert import convert

    start = time.perf_counter()
    if target is None:
        with open_arrays(source) as arrays:
            read_spec(to_linen(arrays))
    else:
        convert(source, target, style="prelinen")
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak": peak_memory()}


def run(*arguments: object) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measures every pair once."""
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "source.npz"
        make_file(first)
        with open_arrays(first) as arrays:
            largest = max(array.nbytes for array in arrays.values())
            total = sum(array.nbytes for array in arrays.values())
        base = run(first)["peak"]
        print(
            f"{total / 1e6:,.0f} MB in all, the largest array {largest / 1e6:.1f} MB; "
            f"a process that only understands the file: {base / 1e6:.0f} MB\n"
        )
        print("| from | to | seconds | peak, MB | more than that, largest arrays |")
        print("| --- | --- | --- | --- | --- |")
        for source in ENDINGS:
            path = first if source == ".npz" else Path(folder) / f"npz-to{source}"
            for target in ENDINGS:
                new = Path(folder) / f"{source[1:]}-to{target}"
                result = run(path, new)
                more = max(0, result["peak"] - base) / largest
                print(
                    f"| `{source}` | `{target}` | {result['seconds']:.1f} | "
                    f"{result['peak'] / 1e6:,.0f} | {math.ceil(more * 100) / 100:.2f} |"
                )
                if source != ".npz" or target == ".npz":
                    subprocess.run(["rm", "-r", str(new)], check=True)


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(measure(*map(Path, sys.argv[1:]), *[None] * (3 - len(sys.argv)))))
    else:
        main()
