"""Fixtures shared by all tests."""

import atexit
import os
import shutil
import tempfile
import uuid
from pathlib import Path

import pytest

os.environ["VIT_JAX_OFFLINE"] = "1"  # No test asks the Internet, nor do the processes it starts.
# And none writes into the user's cache.
os.environ["VIT_JAX_CACHE"] = tempfile.mkdtemp(prefix="vit_jax-tests-")
atexit.register(shutil.rmtree, os.environ["VIT_JAX_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def _compile_once(tmp_path_factory):
    """Equal programs are compiled once for all tests and for the processes that they start."""
    import jax

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    settings = {
        "jax_compilation_cache_dir": str(folder / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real images, a real checkpoint and the original code's numbers, beside the repository.

    They may not be redistributed, so tests that use them are skipped where they are absent.
    """
    path = Path(__file__).resolve().parents[2] / "shared"
    if not (path / "official").is_dir():
        pytest.skip("needs the unpublished reference material beside the repository")
    return path


@pytest.fixture(scope="session")
def _emulator():
    from tests import bucket

    with bucket.emulator() as environment:
        yield environment


@pytest.fixture
def bucket(_emulator, monkeypatch, request):
    """An empty folder of a bucket, here and in processes that a test starts."""
    from vit_jax.files import as_path

    for name, value in _emulator.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("VIT_JAX_OFFLINE")
    return as_path(f"gs://bucket/{request.node.name}-{uuid.uuid4().hex[:8]}")


@pytest.fixture(scope="session")
def _chromium(tmp_path_factory):
    from tests.browser import Browser

    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.driver.quit()


@pytest.fixture
def browser(_chromium):
    """See `tests.browser.Browser`. Tests that use it are skipped where there is none."""
    _chromium.driver.get("about:blank")
    return _chromium


@pytest.fixture
def saved(tmp_path):
    """Writes a family's small weights, and gives the file."""
    from tests import families

    def save(family: str, **changes) -> Path:
        path = tmp_path / "saved" / "w.npz"
        path.parent.mkdir()
        families.make(family, tmp_path / "words", **changes).save(path)
        return path

    return save
