"""Over which devices the work is spread."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from vit_jax.errors import UserError


def make_mesh(config: ConfigDict | None = None) -> Mesh:
    """A mesh of every device with one axis, "data", over which batches are split.

    Raises UserError if the configuration's batch is not divisible by the number of devices.
    """
    devices = jax.device_count()
    if config is not None and config.batch % (parts := devices * config.accum_steps):
        slices = f" x {config.accum_steps} accum_steps" if config.accum_steps > 1 else ""
        raise UserError(
            f"config.batch {config.batch} is not divisible by {devices} devices{slices}: "
            f"use a multiple of {parts}"
        )
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))


def divisible(batch_size: int) -> int:
    """A batch size, at least 1, rounded up to what can be split over all devices."""
    devices = jax.device_count()
    return -(-max(batch_size, 1) // devices) * devices


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """The first axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))
