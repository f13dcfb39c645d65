"""Finding the other processes of a run where something else has started them: Slurm, Cloud TPU."""

import importlib.util
import os
import re
import urllib.request

PORT = 12355  # On which process 0 listens, on machines of our own.
Place = tuple[str, int, int]  # "host:port" of process 0, number of processes, number of this one.


def find() -> Place | None:
    """Where this process stands among several that belong together; None if it is alone.

    Only what is set on the machine is read; nobody is spoken to but the metadata server of a
    Cloud TPU. Sources: slurm.schedmd.com/srun.html (output environment variables),
    cloud.google.com/kubernetes-engine/docs/concepts/tpus, and for the metadata JAX's own search.
    """
    place = _slurm() or _tpu()
    return place if place and place[1] > 1 else None


def _slurm() -> Place | None:
    """What `srun` tells each of its tasks. In the batch script itself there is no step."""
    env = os.environ
    if "SLURM_STEP_NUM_TASKS" not in env or "SLURM_PROCID" not in env:
        return None
    # "node7", "node7,node9" or "node[007-015,21],other": the first host of them.
    prefix, number = re.match(r"([^,[]*)(?:\[(\w+))?", env["SLURM_STEP_NODELIST"]).groups("")  # type: ignore[union-attr]
    # Jobs that share a host must not share a port; these lie above those that Linux hands out.
    port = 2**16 - 2**12 + int(env["SLURM_JOB_ID"]) % 2**12
    return f"{prefix}{number}:{port}", int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_PROCID"])


def _tpu() -> Place | None:
    """The hosts of a TPU slice: from the environment on GKE, from the metadata server elsewhere."""
    names, worker = os.environ.get("TPU_WORKER_HOSTNAMES"), os.environ.get("TPU_WORKER_ID")
    if not names or not worker:
        # JAX sets the variable where it sees no TPU.
        if "TPU_SKIP_MDS_QUERY" in os.environ or importlib.util.find_spec("libtpu") is None:
            return None
        try:
            names, worker = _metadata("worker-network-endpoints"), _metadata("agent-worker-number")
        except OSError:
            return None  # Neither GKE nor a TPU VM, e.g. a notebook service.
    hosts = names.split(",")
    name, *rest = hosts[0].split(":")  # A name, with or without a port, or "name:number:address".
    return f"{rest[1] if len(rest) == 2 else name}:{PORT}", len(hosts), int(worker)


def _metadata(key: str) -> str:
    host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/attributes/{key}",
        headers={"Metadata-Flavor": "Google"},
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=10) as answer:
        return answer.read().decode().strip()
