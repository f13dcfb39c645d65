"""Over which devices, of how many processes, the work and the weights are spread."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from vit_jax.errors import UserError
from vit_jax.models.stack import in_stack

SHARDINGS = ("replicate", "fsdp", "hybrid")
# Arrays with fewer elements stay whole: moving them costs more than keeping them.
LEAST_SPLIT = 2**14


def make_mesh(config: ConfigDict | None = None) -> Mesh:
    """A mesh of every device of every process, with the axes "replica" and "fsdp".

    Batches are split over both. The state is the same along "replica" and split along "fsdp":
    `config.sharding` "replicate" has one part (so has no configuration), "fsdp" as many as there
    are devices, "hybrid" as many as one process has.

    Raises UserError if the processes have different numbers of devices, or the configuration's
    batch is not divisible by the number of devices.
    """
    # In the order of the processes, so that each holds the rows of a batch that it has read.
    devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    count, local = len(devices), len(devices) // jax.process_count()
    if any(d.process_index != i // local for i, d in enumerate(devices)):
        raise UserError(
            f"{count} devices are not spread evenly over {jax.process_count()} processes: start "
            "each with the same number of devices"
        )
    parts = 1
    if config is not None:
        if config.batch % (pieces := count * config.accum_steps):
            slices = f" x {config.accum_steps} accum_steps" if config.accum_steps > 1 else ""
            raise UserError(
                f"config.batch {config.batch} is not divisible by {count} devices{slices}: "
                f"use a multiple of {pieces}"
            )
        parts = {"replicate": 1, "fsdp": count, "hybrid": local}[config.sharding]
    grid = np.array(devices).reshape(-1, parts)
    return Mesh(grid, ("replica", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def device_kinds() -> str:
    """All devices of all processes, e.g. "8 x NVIDIA H100 80GB HBM3"."""
    kinds = [device.device_kind for device in jax.devices()]
    return ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))


def divisible(batch_size: int) -> int:
    """A batch size, at least 1, rounded up to what can be split over all devices."""
    return -(-max(batch_size, 1) // jax.device_count()) * jax.device_count()


def process_slice() -> tuple[int, int]:
    """Which part of each batch this process reads: (its number, number of processes)."""
    return jax.process_index(), jax.process_count()


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The first axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec(("replica", "fsdp")))


def shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Where the arrays of a state lie: each split along its largest axis that the parts of the mesh
    divide, the last one of equals; whole if there is none, or it is small. Of stacked blocks
    (`models.stack.stack_blocks`) each is split as it would be alone.

    Args:
      tree: arrays, or their shapes (`jax.eval_shape`).

    Returns:
      the same tree with a NamedSharding for each array.
    """
    parts = mesh.shape["fsdp"]

    def sharding(path: Any, x: Any) -> NamedSharding:
        first = int(in_stack(path))
        fitting = [(n, axis) for axis, n in enumerate(x.shape) if axis >= first and n % parts == 0]
        if parts == 1 or not fitting or np.prod(x.shape[first:]) < LEAST_SPLIT:
            return replicated(mesh)
        return NamedSharding(mesh, PartitionSpec(*[None] * max(fitting)[1], "fsdp"))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def put_global(tree: Any, places: Any) -> Any:
    """Copies NumPy or JAX arrays that every process has to the devices, by a tree of shardings;
    each device gets its part only."""

    def put(x: Any, place: NamedSharding) -> jax.Array:
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, place, lambda at: np.array(host[at]))

    return jax.tree.map(put, tree, places)


def make_global_batch(batch: Any, place: NamedSharding) -> Any:
    """The batch over all devices, of the rows that each process has read (see `process_slice`)."""
    return jax.make_array_from_process_local_data(place, batch)


def to_host(tree: Any) -> Any:
    """The whole of arrays that lie in parts, as NumPy arrays on every process. All processes have
    to call it together."""

    def whole(x: jax.Array) -> np.ndarray:
        if x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(whole, tree)
