"""A bucket of Google Cloud Storage on this machine: gcp-storage-emulator in a process of its own.

The emulator knows no preconditions, no ends of a listing and no moves, and answers one request at a
time with a queue of five: what libraries rely on is added here.
"""

import contextlib
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

NAME = "bucket"
CLOSED = "closed"  # A bucket that nobody may read or write.


@contextlib.contextmanager
def emulator() -> Iterator[dict[str, str]]:
    """Runs an emulator with a bucket; the environment in which libraries use it."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with subprocess.Popen([sys.executable, __file__, str(port)]) as process:
        try:
            deadline = time.monotonic() + 60
            while True:
                with contextlib.suppress(OSError), urllib.request.urlopen(address):
                    break
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            yield {
                "STORAGE_EMULATOR_HOST": address,  # Google's client and gcsfs.
                "NO_GCE_CHECK": "true",  # gcsfs looks for credentials nowhere else.
                "TENSORSTORE_GCS_HTTP_URL": address,
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any",  # TensorStore, likewise.
            }
        finally:
            process.kill()


def _serve(port: int) -> None:
    import json
    import logging
    import threading
    from functools import partial
    from http import HTTPStatus, server

    from gcp_storage_emulator import server as emulator
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers import buckets, objects
    from gcp_storage_emulator.storage import Storage

    def refuse(response, status):
        response.status = status
        response.json({"error": {"code": status, "message": status.phrase}})

    def on_condition(handler):
        """With `ifGenerationMatch`; of a resumable upload it is checked at its beginning."""

        def handle(request, response, storage, *args, **kwargs):
            wanted = request.query.get("ifGenerationMatch")
            if wanted and "upload_id" not in request.query:
                name = request.params.get("object_id") or request.query.get("name", [None])[0]
                name = name or (request.data.get("meta") or request.data)["name"]
                try:
                    found = storage.get_file_obj(request.params["bucket_name"], name)["generation"]
                except NotFound:
                    found = "0"
                if found != wanted[0]:
                    return refuse(response, HTTPStatus.PRECONDITION_FAILED)
            return handler(request, response, storage, *args, **kwargs)

        return handle

    def list_objects(request, response, storage):
        objects.ls(request, response, storage)
        start, end = (request.query.get(k, [""])[0] for k in ("startOffset", "endOffset"))
        if start or end:
            found = json.loads(response._content)
            between = [
                x for x in found["items"] if start <= x["name"] and not x["name"] >= end > ""
            ]
            response.json(found | {"items": between})

    def move(request, response, storage):
        bucket = request.params["dest_bucket_name"] = request.params["bucket_name"]
        objects.rewrite(request, response, storage)
        if response.status == HTTPStatus.OK:
            storage.delete_file(bucket, request.params["object_id"])
            response.json(json.loads(response._content)["resource"])

    mended = {h: on_condition(h) for h in (objects.insert, objects.delete)}
    mended[objects.ls] = list_objects
    moves = r"^/storage/v1/b/(?P<bucket_name>[-.\w]+)/o/(?P<object_id>.*[^/]+)/moveTo/o/"
    emulator.HANDLERS = (
        (moves + "(?P<dest_object_id>.*[^/]+)$", {"POST": move}),
        *(
            (pattern, {method: mended.get(h, h) for method, h in handlers.items()})
            for pattern, handlers in emulator.HANDLERS
        ),
    )

    class Handler(emulator.RequestHandler):
        disable_nagle_algorithm = True

    handle, lock = emulator.Router.handle, threading.Lock()

    def handle_alone(self, method):
        with lock:
            if f"/b/{CLOSED}/" in self._request_handler.path:
                response = emulator.Response(self._request_handler)
                refuse(response, HTTPStatus.FORBIDDEN)
                return response.close()
            return handle(self, method)

    emulator.Router.handle = handle_alone
    logging.disable()  # It tells of each thing that is not there.

    class Server(server.ThreadingHTTPServer):
        request_queue_size = 128

        def handle_error(self, request, client_address):
            """Clients that are killed are no errors."""

    storage = Storage(use_memory_fs=True, data_dir="/")
    storage._write_config_to_file = lambda: None  # Written even if all is in memory.
    buckets.create_bucket(NAME, storage)
    Server(("127.0.0.1", port), partial(Handler, storage)).serve_forever()


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
