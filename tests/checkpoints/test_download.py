"""Downloads, against a real server on this machine that misbehaves as told."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vit_jax.checkpoints import download as downloads
from vit_jax.checkpoints.download import download
from vit_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
FETCH = """
import pathlib, sys
from vit_jax.checkpoints.download import download
download(sys.argv[1], pathlib.Path(sys.argv[2]))
"""


def left_over(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir() if p != path)


def test_a_name_that_is_the_folder_of_another_download_is_refused(site, tmp_path):
    (tmp_path / "a").mkdir()

    with pytest.raises(UserError, match="another download occupies that name"):
        download(site.url, tmp_path / "a")
    assert not site.requests


def test_a_file_comes_whole_and_nothing_else_is_left(site, tmp_path):
    path = tmp_path / "deep" / "er" / "x.npz"
    download(site.url, path)
    assert path.read_bytes() == site.content
    assert left_over(path) == []
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_a_file_that_is_there_is_not_asked_for(site, tmp_path):
    (tmp_path / "x.npz").write_bytes(b"mine")
    download(site.url, tmp_path / "x.npz")
    assert site.requests == []
    assert (tmp_path / "x.npz").read_bytes() == b"mine"


@pytest.mark.parametrize(
    "faults",
    [
        [503, 500, 429],
        ["drop before the answer"],
        ["cut"],
        ["cut", "cut", "cut", "cut", "cut", "cut", "cut", "cut"],
        ["cut", 503, "drop before the answer", "cut"],
        ["claim more"],
        ["flip a bit"],
        ["no length"],
    ],
    ids=str,
)
def test_what_goes_wrong_for_a_while_is_overcome(site, tmp_path, faults):
    site.faults = list(faults)
    download(site.url, tmp_path / "x.npz")
    assert (tmp_path / "x.npz").read_bytes() == site.content
    assert left_over(tmp_path / "x.npz") == []


def test_a_stalled_connection_is_given_up_and_resumed(site, tmp_path):
    site.faults = ["stall"]
    start = time.monotonic()
    download(site.url, tmp_path / "x.npz", timeout=0.3)
    assert time.monotonic() - start < 5
    assert (tmp_path / "x.npz").read_bytes() == site.content
    assert site.requests[1][1]["Range"] == f"bytes={len(site.content) // 2}-"


def test_a_cut_download_goes_on_where_it_stopped_also_in_another_call(site, tmp_path):
    site.faults = ["cut"]
    path = tmp_path / "x.npz"
    with pytest.raises(UserError, match=r"cut off after .* bytes are kept for another try"):
        download(site.url, path, attempts=1)
    assert not path.exists()
    half = (tmp_path / ".x.npz.part").stat().st_size
    assert half == len(site.content) // 2
    download(site.url, path)
    assert path.read_bytes() == site.content
    assert site.requests[-1][1]["Range"] == f"bytes={half}-"
    assert site.requests[-1][1]["If-Range"] == '"one"'


@pytest.mark.parametrize("etag", ['"two"', '"one"', None], ids=["new tag", "same tag", "no tag"])
def test_a_file_that_changed_meanwhile_is_not_spliced(site, tmp_path, etag):
    site.faults = ["cut"]
    with pytest.raises(UserError):
        download(site.url, tmp_path / "x.npz", attempts=1)
    site.content, site.etag = (
        site.other_content(),
        etag,
    )  # Of the same size, and perhaps the same tag.
    download(site.url, tmp_path / "x.npz")
    assert (tmp_path / "x.npz").read_bytes() == site.other_content()


def test_what_may_have_been_cut_off_is_said(site, tmp_path, caplog):
    site.hashes = ()
    site.faults = ["no length"]
    download(site.url, tmp_path / "x.txt")
    assert "x.txt: the server tells neither its size nor a checksum" in caplog.text


@pytest.mark.parametrize("size", ["9" * 5000, "-1", "1e3", "²"])
def test_a_size_that_is_no_number_is_none(site, tmp_path, size):
    site.headers = {"x-goog-stored-content-length": size.encode().decode("latin1")}
    download(site.url, tmp_path / "x.npz")
    assert (tmp_path / "x.npz").read_bytes() == site.content


def test_a_weak_tag_is_no_promise_of_equal_bytes(site, tmp_path):
    site.etag, site.hashes = 'W/"one"', ()
    site.faults = ["cut"]
    with pytest.raises(UserError):
        download(site.url, tmp_path / "x.npz", attempts=1)
    site.content = site.other_content()
    download(site.url, tmp_path / "x.npz")
    assert (tmp_path / "x.npz").read_bytes() == site.other_content()
    assert "Range" not in site.requests[-1][1]


@pytest.mark.parametrize("faults", [["no length"], ["no length", "no length"], []])
def test_no_more_comes_than_was_asked_for(site, tmp_path, faults):
    site.faults = list(faults)
    with pytest.raises(UserError, match=r"gives more than 0 MB, too much .* save it as .*x\.npz"):
        download(site.url, tmp_path / "x.npz", limit=10_000)
    assert list(tmp_path.iterdir()) == []
    assert len(site.requests) == 1


def test_without_a_length_the_disk_is_not_filled(site, tmp_path, monkeypatch):
    usage = downloads.shutil.disk_usage(tmp_path)._replace(free=downloads._LEFT_FREE + 50_000)
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: usage)
    site.faults = ["no length"]
    with pytest.raises(UserError, match="too much for such a file or this disk"):
        download(site.url, tmp_path / "x.npz")
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_ignores_if_range_is_found_out_by_the_generation(site, tmp_path):
    site.etag, site.hashes = None, ()
    site.headers = {"x-goog-generation": "1"}
    site.faults = ["cut"]
    with pytest.raises(UserError):
        download(site.url, tmp_path / "x.npz", attempts=1)
    site.content, site.headers = site.other_content(), {"x-goog-generation": "2"}
    download(site.url, tmp_path / "x.npz")
    assert (tmp_path / "x.npz").read_bytes() == site.other_content()


@pytest.mark.parametrize("marks", [{"ranges": False}, {"etag": None, "hashes": ()}], ids=str)
def test_without_ranges_or_marks_it_starts_again_and_gives_up_when_nothing_more_comes(
    site, tmp_path, marks
):
    for name, value in marks.items():
        setattr(site, name, value)
    site.faults = ["cut"]
    download(site.url, tmp_path / "x.npz")
    assert (tmp_path / "x.npz").read_bytes() == site.content

    site.faults = ["cut"] * 100
    with pytest.raises(UserError, match="cut off"):
        download(site.url, tmp_path / "y.npz")
    assert len(site.faults) > 90
    assert not (tmp_path / "y.npz").exists()


@pytest.mark.parametrize("kind", ["md5", "crc32c"])
def test_either_checksum_is_checked(site, tmp_path, kind):
    site.hashes = (kind,)
    site.faults = ["flip a bit"] * 3
    with pytest.raises(UserError, match=f"(?i){kind} is .* but the server gives"):
        download(site.url, tmp_path / "x.npz")
    assert list(tmp_path.iterdir()) == []
    download(site.url, tmp_path / "x.npz")
    assert (tmp_path / "x.npz").read_bytes() == site.content


def test_a_server_that_claims_too_little_gives_no_file(site, tmp_path):
    site.hashes = ()
    site.faults = ["claim less"] * 10
    with pytest.raises(UserError, match=r"no complete \.npz"):
        download(site.url, tmp_path / "x.npz")
    assert not (tmp_path / "x.npz").exists()


def test_the_stored_size_is_believed_over_a_shorter_answer(site, tmp_path):
    site.hashes = ()
    site.content = b"text " * 1000
    site.headers = {"x-goog-stored-content-length": str(len(site.content))}
    site.faults = ["claim less"]
    download(site.url, tmp_path / "x.txt")
    assert (tmp_path / "x.txt").read_bytes() == site.content


def test_a_web_page_in_place_of_weights_is_refused(site, tmp_path):
    site.content = b"<html>Please log in to this network</html>"
    with pytest.raises(UserError, match=r"no complete \.npz file \(42 bytes .* b'<html"):
        download(site.url, tmp_path / "x.npz")


def test_checksums_of_the_compressed_form_are_not_held_against_the_plain_one(site, tmp_path):
    site.headers = {
        "x-goog-stored-content-encoding": "gzip",
        "x-goog-stored-content-length": "7",
        "x-goog-hash": "md5=AAAAAAAAAAAAAAAAAAAAAA==",
    }
    site.hashes = ()
    download(site.url, tmp_path / "x.npz")
    assert (tmp_path / "x.npz").read_bytes() == site.content


def test_compressed_bytes_are_refused(site, tmp_path):
    site.headers = {"Content-Encoding": "gzip"}
    with pytest.raises(UserError, match=r"compressed \(gzip\)"):
        download(site.url, tmp_path / "x.npz")


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_missing_file_is_said_at_once_with_address_and_place(site, tmp_path, status):
    site.faults = [status] * 9
    with pytest.raises(UserError) as caught:
        download(site.url, tmp_path / "x.npz")
    message = str(caught.value)
    assert len(site.requests) == 1
    assert "\n" not in message
    for part in (str(status), site.url, str(tmp_path / "x.npz"), "by hand"):
        assert part in message
    assert list(tmp_path.iterdir()) == []


def test_errors_that_stay_end_after_a_few_attempts(site, tmp_path):
    site.faults = [503] * 100
    with pytest.raises(UserError, match=r"503 .*5 times in a row"):
        download(site.url, tmp_path / "x.npz")
    assert len(site.requests) == 5


def test_a_server_may_ask_for_patience(site, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(downloads.time, "sleep", waits.append)
    site.headers = {"Retry-After": "7"}
    site.faults = [503, 503]
    download(site.url, tmp_path / "x.npz")
    assert waits == [7, 7]
    site.headers = {"Retry-After": "86400"}
    site.faults = [503]
    download(site.url, tmp_path / "y.npz")
    assert waits[2] == downloads.LONGEST_WAIT


def test_redirects_are_followed_within_http_only(site, tmp_path):
    site.headers = {"Location": site.url}
    site.faults = ["redirect"]
    download(site.url, tmp_path / "x.npz")
    assert (tmp_path / "x.npz").read_bytes() == site.content
    for target in ("file:///etc/passwd", "ftp://127.0.0.1/x"):
        site.headers = {"Location": target}
        site.faults = ["redirect"]
        with pytest.raises(UserError):
            download(site.url, tmp_path / "y.npz")


def test_nobody_listening_is_said_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no connection .*by hand"):
        download("http://127.0.0.1:9/x.npz", tmp_path / "x.npz", attempts=1)


def test_a_full_disk_is_foreseen(site, tmp_path, monkeypatch):
    usage = downloads.shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="make room"):
        download(site.url, tmp_path / "x.npz")


def test_a_folder_that_cannot_be_made_is_said(site, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", Path("/proc/x")):
        with pytest.raises(UserError, match=r"can't write .* set VIT_JAX_CACHE to a folder"):
            download(site.url, folder / "x.npz")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_takes_no_more_is_said_and_what_came_is_kept(
    site, tmp_path, monkeypatch, number
):
    def full(_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=rf"x\.npz \({os.strerror(number)}\): make room"):
            download(site.url, tmp_path / "x.npz")
    download(site.url, tmp_path / "x.npz")
    assert (tmp_path / "x.npz").read_bytes() == site.content
    assert len(site.requests) == 1


def test_garbage_in_the_notes_of_a_part_only_costs_the_part(site, tmp_path):
    (tmp_path / ".x.npz.part").write_bytes(b"garbage")
    for notes in ('{"url": ', "[" * 100_000, f'{{"url": "{site.url}", "size": "x", "etag": 1}}'):
        (tmp_path / ".x.npz.part.json").write_text(notes)
        (tmp_path / "x.npz").unlink(missing_ok=True)
        download(site.url, tmp_path / "x.npz")
    assert (tmp_path / "x.npz").read_bytes() == site.content


def test_a_part_longer_than_the_file_is_thrown_away(site, tmp_path):
    site.faults = ["cut"]
    with pytest.raises(UserError):
        download(site.url, tmp_path / "x.npz", attempts=1)
    with open(tmp_path / ".x.npz.part", "ab") as file:
        file.write(site.content)
    download(site.url, tmp_path / "x.npz")
    assert (tmp_path / "x.npz").read_bytes() == site.content


def test_a_complete_part_needs_no_request(site, tmp_path):
    site.faults = ["cut"]
    with pytest.raises(UserError):
        download(site.url, tmp_path / "x.npz", attempts=1)
    (tmp_path / ".x.npz.part").write_bytes(site.content)
    download(site.url, tmp_path / "x.npz")
    assert len(site.requests) == 1
    assert (tmp_path / "x.npz").read_bytes() == site.content


def start(site, path: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, site.url, str(path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
    )


def test_two_processes_at_once_fetch_the_file_once(site, tmp_path):
    site.faults = ["slow"]
    processes = [start(site, tmp_path / "x.npz") for _ in range(2)]
    errors = [process.communicate()[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert (tmp_path / "x.npz").read_bytes() == site.content
    assert len(site.requests) == 1
    assert left_over(tmp_path / "x.npz") == []


def test_two_threads_at_once_fetch_the_file_once(site, tmp_path):
    threads = [
        threading.Thread(target=download, args=(site.url, tmp_path / "x.npz")) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "x.npz").read_bytes() == site.content
    assert len(site.requests) == 1


def test_after_a_kill_another_process_goes_on(site, tmp_path):
    site.faults = ["stall"]
    process = start(site, tmp_path / "x.npz")
    part = tmp_path / ".x.npz.part"
    deadline = time.monotonic() + 20
    # The whole first half may still be in the process's buffer: what counts is that it had begun.
    while not (tmp_path / ".x.npz.part.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert part.exists()
    assert not (tmp_path / "x.npz").exists()
    download(site.url, tmp_path / "x.npz")
    assert (tmp_path / "x.npz").read_bytes() == site.content
    assert left_over(tmp_path / "x.npz") == []


def test_on_a_terminal_a_bar_shows_how_far_it_is(site, tmp_path):
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", FETCH, site.url, str(tmp_path / "x.npz")],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"},
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 4096):
            shown += piece
    except OSError:  # How a terminal tells its end on Linux.
        pass
    os.close(ours)
    assert process.wait() == 0
    assert b"x.npz" in shown
    assert b"KiB" in shown
