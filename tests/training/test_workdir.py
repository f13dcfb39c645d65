"""metrics.jsonl: nothing written is lost, nothing is there twice, every digit comes back."""

import contextlib
import json
import math
import os
import signal
import struct
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vit_jax.errors import UserError
from vit_jax.training.workdir import MetricsWriter, is_workdir, read_config, read_metrics


def events(workdir):
    """All TensorBoard events of a folder, in TensorBoard's order, read from the record format."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(workdir.glob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            found.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 12 + length + 4
    return found


def write_steps(workdir, steps, resume_step=0):
    with contextlib.closing(MetricsWriter(workdir, resume_step)) as writer:
        for step in steps:
            writer.write(step, {"train/loss": 1 / step})


def steps_of(workdir):
    return [record["step"] for record in read_metrics(workdir / "metrics.jsonl")]


def test_a_line_is_a_json_object_with_step_first_and_keys_sorted(tmp_path):
    with contextlib.closing(MetricsWriter(tmp_path, 0)) as writer:
        writer.write(10, {"train/lr": 0.01, "time/images_per_s": 812.5, "train/loss": 2.25})
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 10, "time/images_per_s": 812.5, "train/loss": 2.25, "train/lr": 0.01}\n'
    )


def test_lines_can_be_forced_to_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_size))
    with contextlib.closing(MetricsWriter(tmp_path, 0)) as writer:
        writer.write(1, {"x": 1})
        writer.sync()
    assert synced[0] == len(b'{"step": 1, "x": 1.0}\n')


def test_equal_values_give_equal_files_whatever_their_order_and_type(tmp_path):
    for name, values in {
        "a": {"x": 0.5, "y": 1},
        "b": {"y": np.float32(1), "x": np.array(0.5, np.float32)},
    }.items():
        with contextlib.closing(MetricsWriter(tmp_path / name, 0)) as writer:
            writer.write(np.int64(3), values)
    a, b = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in "ab")
    assert a == b


def test_float32_values_come_back_bit_for_bit(tmp_path):
    bits = np.random.default_rng(0).integers(0, 2**32, 500, dtype=np.uint32)
    values = [x for x in bits.view(np.float32) if np.isfinite(x)]
    with contextlib.closing(MetricsWriter(tmp_path, 0)) as writer:
        writer.write(1, {f"v{i}": x for i, x in enumerate(values)})
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    back = np.array([record[f"v{i}"] for i in range(len(values))], np.float32)
    np.testing.assert_array_equal(back.view(np.uint32), np.array(values).view(np.uint32))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_finite_number_stays_valid_json_and_reads_as_nan(tmp_path, value):
    with contextlib.closing(MetricsWriter(tmp_path, 0)) as writer:
        writer.write(1, {"train/loss": value, "train/lr": 0.5})
    path = tmp_path / "metrics.jsonl"
    assert json.loads(path.read_text())["train/loss"] is None
    (record,) = read_metrics(path)
    assert math.isnan(record["train/loss"])
    assert record["train/lr"] == 0.5


def test_a_killed_run_loses_nothing_and_resuming_repeats_nothing(tmp_path):
    program = textwrap.dedent("""
        import os, pathlib, signal, sys
        from vit_jax.training.workdir import MetricsWriter
        writer = MetricsWriter(pathlib.Path(sys.argv[1]), 0)
        for step in range(1, 8):
            writer.write(step, {"train/loss": 1 / step})
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6, 7]
    write_steps(tmp_path, range(5, 10), resume_step=4)
    write_steps(tmp_path / "straight", range(1, 10))
    straight = (tmp_path / "straight" / "metrics.jsonl").read_bytes()
    assert (tmp_path / "metrics.jsonl").read_bytes() == straight


def test_a_torn_last_line_is_ignored_by_the_reader_and_removed_by_the_writer(tmp_path):
    write_steps(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    for cut in range(1, len(b'{"step": 3, "train/loss": 0.5}')):
        path.write_bytes(whole + b'{"step": 3, "train/loss": 0.5}'[:cut])
        assert steps_of(tmp_path) == [1, 2]
    write_steps(tmp_path, [3], resume_step=2)
    assert steps_of(tmp_path) == [1, 2, 3]


def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "x": 0.5}')
    write_steps(tmp_path, [2], resume_step=1)
    assert steps_of(tmp_path) == [1, 2]


def test_a_file_with_nothing_to_drop_is_not_rewritten(tmp_path):
    write_steps(tmp_path, [1, 2])
    before = (tmp_path / "metrics.jsonl").stat().st_ino
    write_steps(tmp_path, [3], resume_step=2)
    assert (tmp_path / "metrics.jsonl").stat().st_ino == before


def test_a_failure_while_dropping_leaves_the_old_file(tmp_path, monkeypatch):
    write_steps(tmp_path, [1, 2, 3])
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def refuse(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match="no space"):
        MetricsWriter(tmp_path, 1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_tensorboard_gets_the_same_scalars_and_hides_what_is_done_again(tmp_path):
    write_steps(tmp_path, [1, 2, 3])
    write_steps(tmp_path, [2, 4], resume_step=1)  # in the same second as the first
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 2
    shown = {}
    for event in events(tmp_path):
        if event.HasField("session_log"):  # a start: TensorBoard forgets this step and later ones
            shown = {step: value for step, value in shown.items() if step < event.step}
        for value in event.summary.value:
            assert value.tag == "train/loss"
            shown[event.step] = value.simple_value
    expected = {
        r["step"]: np.float32(r["train/loss"]) for r in read_metrics(next(tmp_path.glob("*.jsonl")))
    }
    assert shown == expected
    assert sorted(shown) == [1, 2, 4]


@pytest.mark.parametrize(
    "line",
    ["", "garbage", "[1, 2]", '{"loss": 1}', '{"step": "1"}', '{"step": 1.5}', '{"step": true}',
     '{"step": 1, "x": [1]}', '{"step": 1, "x": "high"}', '{"step": 1, "x": {}}', "\x00\x00"],
)  # fmt: skip
def test_a_damaged_line_is_named_and_nothing_is_changed(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "x": 1.0}\n' + line + '\n{"step": 3, "x": 1.0}\n')
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2 .*expected a JSON object") as error:
        read_metrics(path)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError):
        MetricsWriter(tmp_path, 0)
    assert path.read_bytes() == before


def test_a_missing_file_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match=r"No such file.*give a folder"):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "null", "{", "[" * 100_000, '{"batch": Infinity}', '{"batch": 1e999}', b"\xff"),
        *('{"model": []}', '{"batc": 3}', '{"dataset": null}', None),
    ],
)
def test_a_config_that_is_none_is_the_users_mistake(tmp_path, content):
    file = tmp_path / "config.json"
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(
        UserError, match=r"config\.json (is damaged|can't be read) \(.*: choose another workdir"
    ):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "alone", "beside_weights"),
    [
        ('{"dataset": "digits"}', True, True),
        ('{"model_type": "vit"}', False, False),
        ('{"architecture": "vit_base_patch16_224"}', False, False),
        ('{"architectures": ["ViTModel"]}', False, False),
        ("[", True, False),  # Whose it was the weights tell.
    ],
)
def test_whose_a_folder_is_its_config_says(tmp_path, content, alone, beside_weights):
    assert not is_workdir(tmp_path)
    (tmp_path / "config.json").write_text(content)
    assert is_workdir(tmp_path) == alone
    (tmp_path / "model.safetensors").write_text("")
    assert is_workdir(tmp_path) == beside_weights
    if content.startswith("{") and not alone:
        with pytest.raises(UserError, match="is a folder of timm or transformers: choose another"):
            read_config(tmp_path)


def records_or_error(path):
    """What the reader gives, or the message of its refusal."""
    try:
        return read_metrics(path), ""
    except UserError as error:
        return [], str(error)


@given(st.binary(max_size=200))
def test_any_bytes_give_records_or_a_one_line_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "metrics.jsonl"
    path.write_bytes(data)
    records, error = records_or_error(path)
    assert all(isinstance(record["step"], int) for record in records)
    assert "\n" not in error


json_values = (
    st.sampled_from([None, True, [], {}, "1", "high", 10**400]) | st.integers() | st.floats()
)


@given(st.lists(st.dictionaries(st.sampled_from(["step", "a", "b"]), json_values), max_size=4))
def test_any_json_lines_give_float_values_or_a_one_line_error(tmp_path_factory, objects):
    path = tmp_path_factory.mktemp("fuzz") / "metrics.jsonl"
    path.write_text("".join(json.dumps(o) + "\n" for o in objects))
    records, error = records_or_error(path)
    assert "\n" not in error
    assert error or len(records) == len(objects)
    assert all(type(x) is float for r in records for k, x in r.items() if k != "step")
