"""Runs the notebooks of colab/ from top to bottom, each in an empty folder and without a network.

    python scripts/run_notebooks.py [--write] [NAME ...]

With --write the outputs are kept in the files, else nothing is changed. Ends with 1 if a cell fails
or a notebook takes longer than three minutes.
"""

import argparse
import base64
import io
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "colab"
LIMIT = 180  # Seconds for a notebook.


def run(path: Path) -> nbformat.NotebookNode:
    """The executed notebook. Raises CellExecutionError if a cell fails, or CellTimeoutError."""
    notebook = nbformat.read(path, as_version=4)
    search = os.pathsep.join(
        filter(None, (str(ROOT), str(FOLDER), os.environ.get("PYTHONPATH", "")))
    )
    with tempfile.TemporaryDirectory(prefix="notebook_") as folder:
        client = NotebookClient(
            notebook,
            kernel_name="python3",
            extra_arguments=["--log-level=ERROR"],
            timeout=LIMIT,
            resources={"metadata": {"path": folder}},
            record_timing=False,
            coalesce_streams=True,
        )
        client.execute(env=os.environ | {"PYTHONPATH": search, "VIT_JAX_OFFLINE": "1"})
    return tidy(notebook, folder)


def tidy(notebook: nbformat.NotebookNode, folder: str) -> nbformat.NotebookNode:
    """Leaves out what differs from run to run without saying anything, and makes images small."""
    notebook.metadata = {
        "accelerator": notebook.metadata.get("accelerator", "None"),
        "colab": {"provenance": []},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                text = output.text.replace(f"{folder}/", "")
                output.text = text.replace(str(Path.home()), "~")
            elif "image/png" in output.get("data", {}):
                output.data["image/png"] = smaller(output.data["image/png"])
    return notebook


def smaller(png: str) -> str:
    """The same PNG, in base64, with 256 colours: a third of the size, and hard to tell apart."""
    content = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(png))) as image:
        image.convert("RGB").quantize(256).save(content, "PNG", optimize=True)
    return base64.b64encode(content.getvalue()).decode()


def main() -> int:
    """Runs what the arguments name, and says how long it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="such as quickstart; all if none is given")
    parser.add_argument("--write", action="store_true", help="keep the outputs in the files")
    args = parser.parse_args()
    paths = [FOLDER / f"{name}.ipynb" for name in args.names] or sorted(FOLDER.glob("*.ipynb"))
    failed = 0
    for path in paths:
        start, result = time.monotonic(), "ran"
        try:
            notebook = run(path)
            if args.write:
                nbformat.write(notebook, path)
        except (CellExecutionError, CellTimeoutError) as error:
            print(error, file=sys.stderr)
            result = "FAILED"
        seconds = time.monotonic() - start
        if seconds > LIMIT:
            result = f"took longer than {LIMIT} seconds:"
        failed += result != "ran"
        print(f"{path.name} {result} in {seconds:.0f} s", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
