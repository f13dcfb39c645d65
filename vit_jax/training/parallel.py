"""Over which devices a run is spread."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from vit_jax.errors import UserError


def make_mesh(config: ConfigDict | None = None) -> Mesh:
    """A mesh of every device with one axis, "data", over which batches are split.

    Raises UserError if the configuration's batch sizes are not divisible by the number of devices.
    """
    devices = jax.device_count()
    if config is not None:
        slices = config.accum_steps
        for field, parts in (("batch", devices * slices), ("batch_eval", devices)):
            if config[field] % parts:
                over = f"{devices} devices" + (
                    f" x {slices} accum_steps" if parts > devices else ""
                )
                raise UserError(
                    f"config.{field} {config[field]} is not divisible by {over}: "
                    f"use a multiple of {parts}"
                )
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """The first axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))
