"""Files in a bucket: whole or absent, held by one process, copied once."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from vit_jax import buckets
from vit_jax.errors import UserError
from vit_jax.files import as_path, atomic_write, blob_of


def test_a_file_in_a_bucket_is_whole_or_absent(bucket):
    with atomic_write(bucket / "a" / "file") as out:
        out.write(b"first")
        assert not (bucket / "a").exists()
    assert (bucket / "a" / "file").read_bytes() == b"first"
    with contextlib.suppress(KeyError), atomic_write(bucket / "a" / "file") as out:
        out.write(b"half")
        raise KeyError
    assert (bucket / "a" / "file").read_bytes() == b"first"
    assert list(bucket.iterdir()) == [bucket / "a"]


def test_what_others_write_is_seen_at_once(bucket):
    (bucket / "own").write_text("")
    assert len(list(bucket.iterdir())) == 1
    blob_of(bucket / "other").upload_from_string("")
    assert len(list(bucket.iterdir())) == 2
    blob_of(bucket / "other").delete()
    assert not (bucket / "other").exists()


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("gs://nowhere/file", "gs://nowhere/file: there is no such bucket or object: correct the"),
        ("gs://closed/file", "gs://closed/file: these credentials may not do that: give their"),
    ],
)
def test_a_bucket_that_cannot_be_used_is_one_line(bucket, path, problem):
    for use in (lambda: atomic_write(path), lambda: buckets.Claim(path)):
        with pytest.raises(UserError, match=problem), use():
            pass
    if "closed" in path:
        with pytest.raises(UserError, match=problem):
            buckets.local_copy(path)


@pytest.mark.parametrize("path", ["gs://", "gs:///folder", "gs:/bucket/x", "s3://bucket/x"])
def test_other_addresses_are_refused(path):
    with pytest.raises(UserError, match=r"expected (a folder or )?gs://BUCKET/FOLDER"):
        as_path(path)


def test_without_the_extra_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.setitem(sys.modules, "gcsfs.retry", None)
    with pytest.raises(UserError, match=r"isn't installed: run pip install 'vit_jax\[gcs\]'"):
        as_path("gs://bucket/run")


def test_growing_files_begin_as_they_were_and_are_uploaded_when_they_have_changed(bucket):
    (bucket / "log").write_text("1\n")
    (bucket / "other").write_text("x")
    files = buckets.GrowingFiles(bucket, ["log", "new"])
    assert os.listdir(files.folder) == ["log"]
    with (files.folder / "log").open("a") as log:
        log.write("2\n")
    (files.folder / "events").mkdir()
    (files.folder / "events" / "a").write_text("e")
    assert (bucket / "log").read_text() == "1\n"
    files.sync()
    assert (bucket / "log").read_text() == "1\n2\n"
    assert (bucket / "events" / "a").read_text() == "e"
    generation = blob_of(bucket / "log").bucket.get_blob
    before = generation(blob_of(bucket / "log").name).generation
    files.sync()
    assert generation(blob_of(bucket / "log").name).generation == before
    files.close()
    assert not files.folder.exists()


def test_a_claim_is_held_by_one_and_given_back(bucket):
    path = bucket / "lock"
    for _ in range(2):
        with buckets.Claim(path) as claim:
            assert path.read_text().startswith(f"{os.getpid()} on ")
            claim.check()
        assert not path.exists()


def test_a_living_holder_is_named_after_it_renewed(bucket, caplog):
    path = bucket / "lock"
    refused = rf"process {os.getpid()} on .* is training in {bucket}: wait for it, stop it, or"
    claims = buckets.Claim(path, renew_s=0.2), buckets.Claim(path, stale_s=20)
    with claims[0], pytest.raises(UserError, match=refused), claims[1]:
        pass
    assert "waiting up to 20 s to see whether it is alive" in caplog.text


def test_one_of_many_gets_it(bucket):
    got, refused, ready = [], [], threading.Barrier(6)

    def attempt():
        ready.wait()
        try:
            with buckets.Claim(bucket / "lock", renew_s=0.1, stale_s=10):
                got.append(1)
                time.sleep(1)
        except UserError:
            refused.append(1)

    threads = [threading.Thread(target=attempt) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 5)


HOLD = """
import sys, time
from vit_jax.buckets import Claim
with Claim(sys.argv[1]):
    print(flush=True)
    time.sleep(100)
"""


def test_a_claim_of_a_killed_process_is_taken_over_at_once(bucket, caplog):
    path = bucket / "lock"
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.kill()
    assert path.read_text().startswith(f"{process.pid} on ")
    with buckets.Claim(path):
        assert path.read_text().startswith(f"{os.getpid()} on ")
    assert not [r for r in caplog.records if r.name.startswith("vit_jax")]


def test_a_claim_of_a_dead_machine_is_taken_over_when_nothing_renews_it(bucket, caplog):
    path = bucket / "lock"
    path.write_text("1 on elsewhere\nanother\nx\n")
    with buckets.Claim(path, stale_s=1):
        assert path.read_text().startswith(f"{os.getpid()} on ")
    assert "process 1 on elsewhere holds" in caplog.text


def test_a_claim_that_is_given_back_meanwhile_is_free(bucket):
    path = bucket / "lock"
    path.write_text("1 on elsewhere\nanother\nx\n")
    threading.Timer(0.3, path.unlink).start()
    with buckets.Claim(path, stale_s=20) as claim:
        claim.check()


def test_who_has_lost_a_claim_is_told_and_leaves_it_alone(bucket):
    path = bucket / "lock"
    with buckets.Claim(path, renew_s=100) as claim:
        path.write_text("1 on elsewhere\nanother\nx\n")
        with pytest.raises(UserError, match="process 1 on elsewhere has taken it over: this"):
            claim.check()
    assert path.read_text().startswith("1 on elsewhere")


def test_copies_are_made_once_for_each_version(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path))
    (bucket / "w.npz").write_text("w")
    (bucket / "w.json").write_text("j")
    (bucket / "data" / "a" / "b").write_text("b")
    (bucket / "data" / "c").write_text("c")
    first = buckets.local_copy(bucket / "w.npz", beside=[".json", ".txt"])
    assert first.read_text() == "w"
    assert sorted(os.listdir(first.parent)) == ["w.json", "w.npz"]
    first.write_text("kept")
    again = buckets.local_copy(bucket / "w.npz", beside=[".json", ".txt"])
    assert (again, again.read_text()) == (first, "kept")
    (bucket / "w.npz").write_text("new")
    assert buckets.local_copy(bucket / "w.npz").read_text() == "new"
    folder = buckets.local_copy(f"{bucket}/data/")
    assert (folder / "a" / "b").read_text() + (folder / "c").read_text() == "bc"
    with pytest.raises(UserError, match="there is no such file or folder in the bucket"):
        buckets.local_copy(bucket / "none")


def test_names_that_lead_out_of_the_cache_are_refused(monkeypatch):
    objects = [SimpleNamespace(name="run/../../../bashrc", generation=1, size=1)]
    store = SimpleNamespace(name="theirs", list_blobs=lambda prefix: objects)
    blob = SimpleNamespace(bucket=store, name="run", exists=lambda: False)
    monkeypatch.setattr(buckets, "blob_of", lambda path: blob)
    with pytest.raises(UserError, match=r"an object is named 'run/\.\./\.\./.*no path here"):
        buckets.local_copy("gs://theirs/run")


def test_a_folder_whose_name_would_mean_a_bucket_is_refused():
    with pytest.raises(UserError, match="/gs stands for a bucket"):
        as_path("/gs/runs/a")
