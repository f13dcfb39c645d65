"""A real web server on this machine that misbehaves as told."""

import base64
import dataclasses
import hashlib
import http.server
import io
import threading
import time

import google_crc32c
import numpy as np
import pytest

from vit_jax.checkpoints import download as downloads


def npz(seed: int) -> bytes:
    """A small archive of weights; all seeds give the same size."""
    file = io.BytesIO()
    np.savez(file, a=np.random.default_rng(seed).normal(size=30_000))
    return file.getvalue()


@dataclasses.dataclass
class Site:
    """What the server has and how it behaves: `faults` holds one entry a request, then none."""

    content: bytes = dataclasses.field(default_factory=lambda: npz(0))
    etag: str | None = '"one"'
    hashes: tuple[str, ...] = ("crc32c", "md5")
    ranges: bool = True
    faults: list = dataclasses.field(default_factory=list)
    requests: list = dataclasses.field(default_factory=list)
    headers: dict = dataclasses.field(default_factory=dict)
    url: str = ""

    @staticmethod
    def other_content() -> bytes:
        """What the file may change into, of the same size."""
        return npz(1)


def google_hashes(content: bytes, kinds) -> list[str]:
    digests = {
        "md5": hashlib.md5(content).digest(),
        "crc32c": google_crc32c.Checksum(content).digest(),
    }
    return [f"{kind}={base64.b64encode(digests[kind]).decode()}" for kind in kinds]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"  # The connection ends with the answer.

    def do_GET(self):
        site: Site = self.server.site
        site.requests.append((self.path, dict(self.headers)))
        fault = site.faults.pop(0) if site.faults else None
        content, start = site.content, 0
        if isinstance(fault, int):
            self.send_response(fault)
            for name, value in site.headers.items():
                self.send_header(name, value)
            self.end_headers()
            return
        if fault == "drop before the answer":
            return
        if fault == "redirect":
            self.send_response(302)
            self.send_header("Location", site.headers["Location"])
            self.end_headers()
            return
        wanted = self.headers.get("Range")
        if wanted and site.ranges and self.headers.get("If-Range", site.etag) == site.etag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_response(416)
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        length = len(content) - start
        length = {"claim less": length - 1000, "claim more": length + 1000}.get(fault, length)
        if fault != "no length":
            self.send_header("Content-Length", str(length))
        if site.etag:
            self.send_header("ETag", site.etag)
        for text in google_hashes(content, site.hashes):
            self.send_header("x-goog-hash", text)
        for name, value in site.headers.items():
            self.send_header(name, value)
        self.end_headers()
        body = content[start:]
        if fault == "flip a bit":
            body = body[:500] + bytes([body[500] ^ 1]) + body[501:]
        if fault in ("cut", "stall", "slow"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if fault == "stall":
                self.server.over.wait(10)
            if fault == "slow":
                time.sleep(1.5)
                self.wfile.write(body[len(body) // 2 :])
            return
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setattr(downloads, "BACKOFF", 0.01)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.site = Site(url=f"http://127.0.0.1:{server.server_address[1]}/x.npz")
    server.over = threading.Event()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server.site
    server.over.set()
    server.shutdown()
    thread.join()
    server.server_close()
