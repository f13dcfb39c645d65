"""A process finds its place among the others of Slurm or a TPU slice, as JAX itself does."""

import http.server
import threading

import pytest
from jax._src.clusters import cloud_tpu_cluster
from jax._src.clusters.slurm_cluster import SlurmCluster

from vit_jax.training import clusters


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch):
    for name in ("SLURM_STEP_NUM_TASKS", "TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")


def as_task(monkeypatch, nodes, tasks=4, task=3):
    """The environment that srun gives a task."""
    variables = dict(JOB_ID=70123, NTASKS=tasks, STEP_NUM_TASKS=tasks, PROCID=task, LOCALID=1)
    for name, value in dict(variables, STEP_NODELIST=nodes).items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node7", "node7"),
        ("gpu-a,gpu-b", "gpu-a"),
        ("node[007-015,21],other", "node007"),
        ("rack[1,3-4]", "rack1"),
        ("10.0.0.7", "10.0.0.7"),
    ],
)
def test_tasks_of_slurm_meet_at_the_first_of_its_nodes(nodes, host, monkeypatch):
    as_task(monkeypatch, nodes)
    address, count, number = clusters.find()
    assert (address.rpartition(":")[0], count, number) == (host, 4, 3)
    assert address == SlurmCluster.get_coordinator_address(None, None)


def test_one_task_is_alone_and_so_is_a_batch_script(monkeypatch):
    as_task(monkeypatch, "node7", tasks=1, task=0)
    assert clusters.find() is None
    as_task(monkeypatch, "node7")
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    assert clusters.find() is None


def test_hosts_of_a_slice_on_kubernetes_are_named_in_the_environment(monkeypatch):
    monkeypatch.setenv("TPU_WORKER_ID", "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "vit-0.vit,vit-1.vit")
    assert clusters.find() == ("vit-0.vit:12355", 2, 1)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    assert clusters.find() is None


@pytest.fixture
def metadata(monkeypatch):
    """The metadata server of a TPU VM; its attributes."""
    attributes = {"tpu-env": ""}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            known = self.headers["Metadata-Flavor"] == "Google"
            text = attributes.get(self.path.rpartition("attributes/")[2]) if known else None
            self.send_response(404 if text is None else 200)
            self.end_headers()
            self.wfile.write((text or "").encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        monkeypatch.delenv("TPU_SKIP_MDS_QUERY")
        monkeypatch.setattr(clusters.importlib.util, "find_spec", lambda name: name == "libtpu")
        yield attributes
        server.shutdown()


@pytest.mark.parametrize("workers", ["a:7:127.0.0.1,b:8:127.0.0.2", "localhost,other"])
def test_hosts_of_a_slice_of_tpu_vms_are_in_their_metadata(workers, metadata, monkeypatch):
    metadata.update({"worker-network-endpoints": workers, "agent-worker-number": "1"})
    address, count, number = clusters.find()

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    known = cloud_tpu_cluster.GceTpuCluster
    assert known.is_env_present()
    assert (count, number) == (known.get_process_count(), known.get_process_id()) == (2, 1)
    assert address == known.get_coordinator_address(5, str(clusters.PORT))


def test_a_tpu_of_one_host_and_one_without_metadata_are_alone(metadata):
    assert clusters.find() is None
    metadata.update({"worker-network-endpoints": "a:7:127.0.0.1", "agent-worker-number": "0"})
    assert clusters.find() is None
