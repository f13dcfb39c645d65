"""Weights in a bucket."""

import json
from pathlib import Path

import google.auth.exceptions
import jax
import numpy as np
import pytest
from flax.serialization import msgpack_serialize, to_state_dict
from safetensors.numpy import load_file

from tests.checkpoints.test_torch import written
from vit_jax import files, load
from vit_jax.cli import main
from vit_jax.errors import UserError
from vit_jax.training.workdir import is_workdir


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_weights_are_written_to_a_bucket_and_read_from_there_with_their_notes(bucket, saved, kind):
    vit = load(saved("Mixer"))
    address = f"{bucket}/weights.{kind}"
    vit.save(address)
    found = load(address)
    assert (found.labels, found.preprocess) == (vit.labels, vit.preprocess)
    jax.tree.map(np.testing.assert_array_equal, found.params, vit.params)


def test_an_orbax_folder_is_read_from_a_bucket(bucket, saved, tmp_path):
    vit = load(saved("Mixer"))
    vit.save(tmp_path / "w.orbax")
    for file in (tmp_path / "w.orbax").rglob("*"):
        if file.is_file():
            (bucket / file.relative_to(tmp_path)).write_bytes(file.read_bytes())
    found = load(f"{bucket}/w.orbax")
    jax.tree.map(np.testing.assert_array_equal, found.params, vit.params)


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_of_other_libraries_are_read_with_what_lies_beside_them(bucket, tmp_path, sharded):
    path = written("hf-vit", tmp_path)
    if sharded:
        path = path.rename(tmp_path / "model-00001-of-00001.safetensors")
        index = {"weight_map": dict.fromkeys(load_file(path), path.name)}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for file in filter(Path.is_file, tmp_path.iterdir()):
        (bucket / "theirs" / file.name).write_bytes(file.read_bytes())
    for address in [f"{bucket}/theirs", *([f"{bucket}/theirs/{path.name}"] * (not sharded))]:
        assert load(address).spec.num_heads == 3
    assert not is_workdir(f"{bucket}/theirs")
    (bucket / "theirs" / "config.json").write_text('{"dataset": "digits"}')
    assert is_workdir(f"{bucket}/theirs")


def test_of_a_folder_of_the_originals_training_the_last_checkpoint_is_read(bucket, saved):
    vit = load(saved("Mixer"))
    state = to_state_dict((vit.params, {}, 7))
    (bucket / "run" / "checkpoint_9").write_bytes(b"")
    (bucket / "run" / "checkpoint_10").write_bytes(msgpack_serialize(state))
    found = load(f"{bucket}/run")
    jax.tree.map(np.testing.assert_array_equal, found.params, vit.params)


def test_what_holds_no_weights_is_told(bucket, capsys):
    assert main(["info", f"{bucket}/none.npz"]) == 2
    assert "there is no such file or folder in the bucket" in capsys.readouterr().err
    (bucket / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"is no workdir of a training run: it holds no weights"):
        load(f"{bucket}/run")
    (bucket / "run" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has not finished: start it again, and it goes on"):
        load(f"{bucket}/run")


def test_without_credentials_that_is_told(bucket, monkeypatch):
    def client():
        raise google.auth.exceptions.DefaultCredentialsError

    monkeypatch.setattr(files, "_bucket_client", client)
    with pytest.raises(UserError, match="has no credentials for Google Cloud: run gcloud auth"):
        files.upload(bucket / "file", open(files.os.devnull, "rb"))  # noqa: SIM115


def test_published_weights_need_no_credentials(bucket, monkeypatch):
    from vit_jax.checkpoints import hub

    assert hub.needs_credentials(str(bucket))
    assert not hub.needs_credentials("gs://vit_models/augreg/Ti_16.npz")
    monkeypatch.setenv("VIT_JAX_OFFLINE", "1")
    assert not hub.needs_credentials(str(bucket))
