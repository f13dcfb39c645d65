"""Repositories of huggingface.co, against a server here that speaks its protocol."""

import hashlib
import http.server
import json
import logging
import os
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save

from vit_jax.checkpoints import hub, read_npz
from vit_jax.checkpoints.hub import resolve
from vit_jax.checkpoints.huggingface import origin, weights_in
from vit_jax.errors import UserError
from vit_jax.pretrained import find_weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ARRAYS = {"a": np.arange(50_000, dtype=np.float32)}


class Site:
    """What the server has, {repository: {file: content}}, and what it was asked for."""

    def __init__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.asked: list[tuple[str, str, str | None]] = []
        self.cut = 0  # So many answers with a file end in the middle.
        self.url = self.files_url = ""

    def add(self, name: str, **files) -> None:
        defaults = {"config.json": b"{}", "README.md": b"---\nlicense: mit\n---\n"}
        self.repositories[name] = defaults | files


class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        site: Site = self.server.site
        token = self.headers.get("Authorization")
        site.asked.append((self.command, self.path, token))
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/(revision|tree)/(\w+)", path):
            repository, kind, revision = match.groups()
        elif match := re.fullmatch(r"(?:/files)?/([\w.-]+/[\w.-]+)/resolve/(\w+)/(.+)", path):
            repository, revision, kind = match.groups()
        else:
            return self.answer(404)
        files = site.repositories.get(repository)
        if files is None:
            return self.answer(401, {"X-Error-Code": "RepoNotFound"})
        if repository in site.gated and token != "Bearer secret" and "/files/" not in path:
            return self.answer(401, {"X-Error-Code": "GatedRepo"})
        if revision not in ("main", COMMIT):
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        if kind == "revision":
            return self.answer(200, content=json.dumps({"id": repository, "sha": COMMIT}).encode())
        if kind == "tree":
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": self.mark(content)[:40]}
                for name, content in files.items()
            ]
            return self.answer(200, content=json.dumps(tree).encode())
        if kind not in files:
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        content = files[kind]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{self.mark(content)[:40]}"'}
        if path.startswith("/files/") or len(content) < 10_000:
            return self.answer(200, headers, content)
        headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{self.mark(content)}"'}
        return self.answer(302, headers | {"Location": f"{site.files_url}/files{path}"})

    @staticmethod
    def mark(content: bytes) -> str:
        return hashlib.sha256(content).hexdigest()

    def answer(self, status, headers=(), content=b""):
        whole = len(content)
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(asked[1])
            status, content = 206, content[start:]
            headers = {**headers, "Content-Range": f"bytes {start}-{whole - 1}/{whole}"}
        self.send_response(status)
        for name, value in {**dict(headers), "Content-Length": len(content)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            if whole > 10_000 and self.server.site.cut:
                self.server.site.cut -= 1
                content = content[: len(content) // 2]
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def site(monkeypatch, tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.site = site = Site()
    port = server.server_address[1]
    # The files are elsewhere than the repositories, as those of huggingface.co are.
    site.url, site.files_url = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", site.url)
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", site.url + template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VIT_JAX_OFFLINE")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield site
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_repository_is_a_folder_of_weights_and_what_describes_them(site):
    config = b'{"model_type": "dinov2"}'
    files = {"model.safetensors": save(ARRAYS), "tf_model.h5": b"x", "pytorch_model.bin": b"x"}
    site.add("facebook/dinov2-small", **{"config.json": config}, **files)

    path, tower = find_weights("facebook/dinov2-small")

    assert path.name == "model.safetensors"
    assert tower is None
    assert (path.parent / "config.json").read_bytes() == config
    assert sorted(p.name for p in path.parent.iterdir()) == [
        *("README.md", "config.json", "model.safetensors")
    ]
    np.testing.assert_array_equal(read_npz(path)["a"], ARRAYS["a"])
    assert origin(path) == ("facebook/dinov2-small", COMMIT)
    assert origin(path.parent) is None
    site.asked.clear()
    assert find_weights("hf-hub:facebook/dinov2-small@main") == (path, None)
    assert [method for method, url, _ in site.asked if "resolve" in url] == []


def test_sharded_weights_and_pickles_come_where_there_is_nothing_better(site):
    shards = {f"model-0000{i}-of-00002.safetensors": save({f"a{i}": ARRAYS["a"]}) for i in (1, 2)}
    index = {"weight_map": {f"a{i + 1}": name for i, name in enumerate(shards)}}
    site.add("timm/large", **{"model.safetensors.index.json": json.dumps(index).encode()}, **shards)
    site.add("timm/old", **{"pytorch_model.bin": b"x" * 20_000})

    path, _ = find_weights("timm/large")

    assert sorted(read_npz(path)) == ["a1", "a2"]
    assert find_weights("timm/old")[0].name == "pytorch_model.bin"


def test_the_token_goes_to_the_site_and_no_further(site, monkeypatch):
    site.add("google/gated", **{"model.safetensors": save(ARRAYS)})
    site.gated.add("google/gated")

    with pytest.raises(
        UserError, match=r"accepted its terms: do so at http.*google/gated.*HF_TOKEN"
    ):
        resolve("google/gated")
    monkeypatch.setenv("HF_TOKEN", "secret")

    assert weights_in(resolve("google/gated"))
    elsewhere = [token for _, url, token in site.asked if url.startswith("/files/")]
    assert elsewhere
    assert set(elsewhere) == {None}


def test_a_download_that_was_cut_off_goes_on(site):
    site.add("timm/x", **{"model.safetensors": save(ARRAYS)})
    site.cut = 1

    np.testing.assert_array_equal(read_npz(find_weights("timm/x")[0])["a"], ARRAYS["a"])


def test_without_a_network_what_is_there_is_used(site, monkeypatch):
    site.add("timm/x", **{"pytorch_model.bin": b"x" * 20_000})
    path = resolve("timm/x")
    site.asked.clear()
    monkeypatch.setenv("VIT_JAX_OFFLINE", "1")

    assert resolve("timm/x") == path
    assert site.asked == []
    with pytest.raises(
        UserError, match="timm/y is not in the cache, and downloads are switched off"
    ):
        resolve("timm/y")
    monkeypatch.delenv("VIT_JAX_OFFLINE")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert resolve("timm/x") == path
    with pytest.raises(UserError, match=r"timm/y can't be reached at http://127\.0\.0\.1:9/timm/y"):
        resolve("timm/y")


def test_other_failures_are_one_line(site):
    site.add("timm/x", **{"weights.onnx": b"x"})

    for name, text in [
        ("timm/nothing", "is not at http://127.*, or is private: check the name"),
        ("timm/x@other", "has no revision 'other'"),
        ("timm/x", "holds none of model.safetensors, "),
        ("hf-hub:a/b/c", "is no name: expected ORG/NAME or ORG/NAME@REVISION"),
        ("hf-hub:", "no such file"),
    ]:
        with pytest.raises(UserError, match=text):
            resolve(name)
    with pytest.raises(UserError, match=r"one of huggingface\.co would be hf-hub:someone/thing"):
        resolve("someone/thing")
    assert not any("someone" in url for _, url, _ in site.asked)


def test_names_of_timm_mean_the_files_of_google_that_they_were_made_of(caplog):
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(UserError, match="vit_models/sam/ViT-B_16"),
    ):
        resolve("timm/vit_base_patch16_224.sam_in1k", offline=True)
    assert "are Google's sam/ViT-B_16" in caplog.text
    assert len(hub._TIMM) == 50
    for name in hub._TIMM.values():
        assert hub.url_for(name).endswith(f"/{name.rpartition('/')[2]}.npz")


def test_the_command_line_uses_the_environment(site, tmp_path):
    environment = os.environ | {"HF_ENDPOINT": site.url, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "vit_jax", "info", "facebook/nothing"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)

    assert done.returncode == 2
    assert f"the repository facebook/nothing is not at {site.url}/facebook/nothing" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.reference
def test_every_file_of_google_that_timm_took_has_its_name_here():
    timm = pytest.importorskip("timm")
    urls = {
        f"{name}": timm.get_pretrained_cfg(name).url or "" for name in timm.list_pretrained("*.*")
    }
    theirs = {n: u.removesuffix(".npz") for n, u in urls.items() if u.startswith(hub.STORE)}

    assert {n: hub.url_for(o).removesuffix(".npz") for n, o in hub._TIMM.items()} == theirs
