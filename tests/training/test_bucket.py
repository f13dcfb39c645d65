"""A run whose workdir is in a bucket is the run that it would be in a folder."""

from vit_jax.files import as_path
from vit_jax.training import run
from vit_jax.training.workdir import read_metrics

OUTPUTS = {"config.json", "data.json", "metrics.jsonl", "checkpoints", "events"}
OUTPUTS |= {"weights.npz", "weights.json", "report.html", "report.png"}


def without_times(path) -> list[dict]:
    lines = read_metrics(path / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def test_a_run_in_a_bucket_leaves_what_it_leaves_in_a_folder(bucket, tiny, whole):
    result = run(tiny(), bucket)
    assert (result.finished, result.step) == (True, 40)
    assert {path.name for path in bucket.iterdir()} == OUTPUTS
    for name in ("weights.npz", "weights.json", "config.json", "data.json"):
        assert (bucket / name).read_bytes() == (as_path(whole) / name).read_bytes()
    assert without_times(bucket) == without_times(whole)
    assert "nothing to do" in run(tiny(), bucket).summary
