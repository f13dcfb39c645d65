"""What every notebook of colab/ has; scripts/run_notebooks.py runs them."""

import re
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "colab"
NAMES = ("quickstart", "finetune_tpu", "augreg", "lit", "inside_vit", "families")
COLAB = "https://colab.research.google.com/github/vit-jax/vit_jax/blob/main/colab"


@pytest.fixture(params=NAMES)
def path(request) -> Path:
    return FOLDER / f"{request.param}.ipynb"


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts_of(cell) -> str:
    """Everything that a code cell has printed or shown as text."""
    return "".join(str(o.get("text", "")) + str(o.get("data", "")) for o in cell.outputs)


def test_no_other_notebooks_are_there():
    assert sorted(p.stem for p in FOLDER.glob("*.ipynb")) == sorted(NAMES)


def test_it_is_valid(notebook):
    nbformat.validate(notebook)


def test_it_begins_with_a_title_its_own_badge_and_one_cell_that_installs(path, notebook):
    title, install = notebook.cells[:2]
    assert title.source.startswith("# ")
    assert f"{COLAB}/{path.name}" in title.source
    assert "github.com/vit-jax/vit_jax" in install.source
    assert 'find_spec("vit_jax") is None' in install.source
    assert [cell for cell in notebook.cells if "%pip" in cell.source] == [install]


def test_one_switch_is_set_at_the_top(notebook):
    cells = [
        i for i, c in enumerate(code_of(notebook)) if re.search(r"^OFFLINE = ", c.source, re.M)
    ]
    assert cells == [1]


def test_it_was_run_in_order_without_an_error_and_says_on_what(notebook):
    cells = code_of(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error"]
    assert re.search(r"\d+ x .*CPU cores\nPython [\d.]+, JAX [\d.]+, vit_jax", texts_of(cells[-1]))


def test_it_shows_images_and_stays_small(path, notebook):
    shown = [o for c in code_of(notebook) for o in c.outputs if "image/png" in o.get("data", {})]
    assert len(shown) >= 2
    assert path.stat().st_size < 400_000


def test_no_path_of_the_machine_it_was_run_on_is_in_it(notebook):
    for cell in notebook.cells:
        text = cell.source + (texts_of(cell) if cell.cell_type == "code" else "")
        text = re.sub(r"image/png': '[^']*'", "", text)
        assert not re.search(r"(?<![\w.:/])/(tmp|home|root|work|usr|Users)/", text)
