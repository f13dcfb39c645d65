"""What a run will need, from the shapes of its arrays and the compiled program alone."""

import concurrent.futures
import dataclasses
import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vit_jax import data
from vit_jax.errors import UserError
from vit_jax.evaluation.metrics import make_eval_step
from vit_jax.models.cost import training_flops
from vit_jax.parallel import divisible, make_mesh, shardings, split
from vit_jax.training.config import config_from_json, config_to_json
from vit_jax.training.guard import new_guard
from vit_jax.training.network import make_network, named_model
from vit_jax.training.optimizer import make_optimizer
from vit_jax.training.state import TrainState
from vit_jax.training.task import Task, eval_spec, open_task

EVAL_BATCHES = 3  # That `evaluate` has on the device: two at work, one waiting.


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device while a step runs, or an evaluation.

    Attributes:
      parameters, optimizer: what lasts.
      gradients: as large as the parameters; 0 in an evaluation.
      activations: all else that the program needs for the time it runs.
      batches: the batch at work, and those made ready ahead.
    """

    parameters: int
    optimizer: int
    gradients: int
    activations: int
    batches: int

    @property
    def total(self) -> int:
        """The sum."""
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
      picture_shape: (h, w, channels) of what the network sees.
      flops_per_step: of the network's own operations, see `training_flops`.
      training, evaluation: memory of each device.
      accum_steps, batch_eval: of the configuration.
      accum_steps_to_fit, batch_eval_to_fit: with which it fits into the memory that was given:
        those of the configuration if they do, None if nothing does or no memory was given.
    """

    parameters: int
    picture_shape: tuple[int, int, int]
    classes: int
    devices: int
    batch: int
    total_steps: int
    flops_per_step: float
    training: Memory
    evaluation: Memory
    accum_steps: int
    batch_eval: int
    accum_steps_to_fit: int | None = None
    batch_eval_to_fit: int | None = None

    def seconds_per_step(self, tflops: float, mfu: float) -> float:
        """Time of a step on devices that could do `tflops` TFLOP/s and do a share `mfu` of it."""
        return self.flops_per_step / (self.devices * tflops * 1e12 * mfu)


def plan(config: ConfigDict, *, classes: int | None = None, memory: float | None = None) -> Plan:
    """Plans a run on all devices of this process, of which only the number matters.

    Programs are compiled, nothing is run. Memory is counted as the compiler lays it out for the
    kind of the devices here.

    Args:
      config: see `default_config`.
      classes: number of classes; by default of the data set, which then has to be there.
      memory: bytes of each device, to say what fits.

    Raises UserError if the configuration makes no run, or the number of classes is not known.
    """
    make_mesh(config)  # Says whether the devices divide the batch.
    task = _task(config, classes)
    shape = task.picture_shape
    if config.model.name:
        model: Any = named_model(config, len(task.labels))
    else:
        spec = eval_spec(config)
        model = make_network(config, picture_shape=shape, labels=task.labels, preprocess=spec).model
    picture = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), picture)["params"]

    def training(accum_steps: int) -> Memory:
        return _training(task, model, params, accum_steps)

    def evaluation(batch_eval: int) -> Memory:
        return _evaluation(task, model, params, batch_eval)

    accum_steps, batch_eval = config.accum_steps, divisible(config.batch_eval)
    found = Plan(
        parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
        picture_shape=shape,
        classes=len(task.labels),
        devices=jax.device_count(),
        batch=config.batch,
        total_steps=config.total_steps,
        flops_per_step=config.batch * training_flops(model, shape[:2], channels=shape[2]),
        training=training(accum_steps),
        evaluation=evaluation(batch_eval),
        accum_steps=accum_steps,
        batch_eval=batch_eval,
    )
    if memory is None:
        return found
    a_device = config.batch // jax.device_count()
    slices = [n for n in range(accum_steps + 1, a_device + 1) if a_device % n == 0]
    smaller = [divisible(batch_eval >> n) for n in range(1, batch_eval.bit_length())]
    return dataclasses.replace(
        found,
        accum_steps_to_fit=_first(accum_steps, found.training, slices, training, memory),
        batch_eval_to_fit=_first(
            batch_eval, found.evaluation, list(dict.fromkeys(smaller)), evaluation, memory
        ),
    )


def plan_for(config: ConfigDict, devices: int, **options: Any) -> Plan:
    """Plans a run on so many CPU devices, simulated by another process; see `plan`.

    Whatever accelerator there is stays untouched.
    """
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        try:
            return pool.submit(_plan_on, devices, config_to_json(config), options).result()
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError(
                "the process that compiles the step was killed, likely for want of memory: plan "
                "with fewer --devices, or on a larger machine"
            ) from None


def _plan_on(devices: int, config: str, options: dict[str, Any]) -> Plan:
    flags = os.environ.get("XLA_FLAGS", "").split()
    count = "--xla_force_host_platform_device_count"
    flags = [flag for flag in flags if not flag.startswith(count)]
    # JAX is imported, but looks at the flags only when it is first asked for devices.
    os.environ["XLA_FLAGS"] = " ".join([*flags, f"{count}={devices}"])
    jax.config.update("jax_platforms", "cpu")
    return plan(config_from_json(config), **options)


def _task(config: ConfigDict, classes: int | None) -> Task:
    """The task with the data set if that is at hand, else with a stand-in of RGB pictures."""
    name = config.dataset
    if data.is_known(name) or os.path.exists(os.path.expanduser(name)):
        source = data.open_source(name, config.splits.train, seed=config.seed)
    elif classes is None:
        raise UserError(
            f"the number of classes of {name!r} is not known, because it is not on this machine: "
            "give --classes"
        )
    else:

        def no_picture(_: Any) -> Any:
            raise UserError(
                f"the size of the pictures of {name!r} is not known: give config.pp.train and "
                "config.pp.eval an operation that sets it, such as resize(224)"
            )

        source = data.Source(name, (), 3, range(1), np.zeros(1, np.int32), no_picture, str)
    if classes is not None:
        source = dataclasses.replace(source, labels=tuple(map(str, range(classes))))
    return open_task(config, (source, source))


def _batch(task: Task, ops: data.Preprocess, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    blank = np.zeros((8, 8, task.train.channels), np.uint8)
    dtype = ops(blank, np.random.default_rng(0)).dtype
    label: Any = ((size,), jnp.int32)
    if task.train.multi_label:
        label = ((size, len(task.labels)), jnp.float32)
    return {
        "image": jax.ShapeDtypeStruct((size, *task.picture_shape), dtype),
        "label": jax.ShapeDtypeStruct(*label),
    }


def _state(config: ConfigDict, params: Any) -> tuple[Any, TrainState]:
    """The optimizer, and the shapes of the state before the first update with their places."""
    tx = make_optimizer(config, config.total_steps)
    state = TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32),  # type: ignore[arg-type]
        params=params,
        opt_state=jax.eval_shape(tx.init, params),
        seed=jax.ShapeDtypeStruct((), jnp.uint32),  # type: ignore[arg-type]
        guard=new_guard(),
    )
    places = shardings(state, make_mesh(config))
    return tx, jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, places
    )


def _training(task: Task, model: Any, params: Any, accum_steps: int) -> Memory:
    from vit_jax.training.trainer import step_of

    config = task.config.copy_and_resolve_references()
    config.accum_steps = accum_steps
    mesh = make_mesh(config)
    tx, state = _state(config, params)
    batch = _batch(task, task.train_ops, config.batch)
    step: Any = step_of(dataclasses.replace(task, config=config), model, tx, mesh)
    needed = step.lower(state, batch).compile().memory_analysis()
    kept, weights = _bytes(state), _bytes(state.params)
    # What comes out takes the place of the state that goes in, but for the figures.
    temporary = needed.temp_size_in_bytes + needed.output_size_in_bytes - needed.alias_size_in_bytes
    return Memory(
        parameters=weights,
        optimizer=kept - weights,
        gradients=min(weights, temporary),
        activations=max(temporary - weights, 0),
        # One that is at work, one for the next step, and those that wait: see `Feed`.
        batches=_bytes(batch, mesh) * (2 + config.prefetch),
    )


def _evaluation(task: Task, model: Any, params: Any, batch_eval: int) -> Memory:
    """While an evaluation goes on, the optimizer and the next training batches stay where they
    are."""
    mesh = make_mesh(task.config)
    _, state = _state(task.config, params)
    batch = _batch(task, task.eval_ops, batch_eval)
    step: Any = make_eval_step(model, mesh=mesh, loss=task.config.loss)
    needed = step.lower(state.params, batch).compile().memory_analysis()
    ahead = _bytes(_batch(task, task.train_ops, task.config.batch), mesh) * task.config.prefetch
    weights = _bytes(state.params)
    return Memory(
        parameters=weights,
        optimizer=_bytes(state) - weights,
        gradients=0,
        activations=needed.temp_size_in_bytes + needed.output_size_in_bytes,
        batches=_bytes(batch, mesh) * EVAL_BATCHES + ahead,
    )


def _bytes(tree: Any, mesh: Any = None) -> int:
    """Of arrays, what lies on each device: as they are placed, or split over a mesh."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        place = leaf.sharding if mesh is None else split(mesh)
        total += int(np.prod(place.shard_shape(leaf.shape))) * leaf.dtype.itemsize
    return total


def _first(
    size: int, known: Memory, others: list[int], needs: Callable[[int], Memory], memory: float
) -> int | None:
    """`size`, or the first of `others`, which need less and less, that fits; None if none does."""
    if known.total <= memory:
        return size
    low, high = 0, len(others)
    while low < high:
        middle = (low + high) // 2
        if needs(others[middle]).total <= memory:
            high = middle
        else:
            low = middle + 1
    return others[low] if low < len(others) else None
