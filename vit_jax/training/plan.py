"""What a run will need, from the shapes of its arrays and the compiled program alone."""

import bisect
import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vit_jax import data
from vit_jax.errors import UserError
from vit_jax.evaluation.metrics import make_eval_step
from vit_jax.models.blocks import REMAT
from vit_jax.models.cost import training_flops
from vit_jax.models.kernels import choose_kernels
from vit_jax.sharding import batch_sharding, divisible, make_mesh, shardings
from vit_jax.training.config import config_from_json, config_to_json, eval_spec
from vit_jax.training.inputs import RunData, open_data
from vit_jax.training.network import as_trained, make_network, named_model
from vit_jax.training.optimizer import make_optimizer
from vit_jax.training.state import TrainState, new_guard
from vit_jax.training.step import make_step_from_config

EVAL_BATCHES = 3  # That `evaluate` has on the device: two at work, one waiting.

# What saves memory beside accum_steps, from what costs least time to what costs most.
SAVINGS: tuple[dict[str, Any], ...] = (
    {},
    {"sharding": "fsdp"},
    {"scan_layers": True, "remat": "dots"},
    {"scan_layers": True, "remat": "full"},
    {"sharding": "fsdp", "scan_layers": True, "remat": "dots"},
    {"sharding": "fsdp", "scan_layers": True, "remat": "full"},
)
FEW = 8  # Images at once on a device; with fewer, it is hardly made use of.


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device while a step runs, or an evaluation.

    Attributes:
      parameters, optimizer: what lasts; the parameters twice if they are averaged.
      gradients: as large as the parameters; 0 in an evaluation.
      activations: all else that the program needs for the time it runs. Neither it nor the
        gradients are known (None) if the compiler doesn't tell what the program needs.
      batches: the batch at work, and those made ready ahead.
    """

    parameters: int
    optimizer: int
    gradients: int | None
    activations: int | None
    batches: int

    @property
    def total(self) -> int | None:
        """The sum; None if a part is not known."""
        parts = dataclasses.astuple(self)
        return None if None in parts else sum(parts)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
      image_shape: (h, w, channels) of what the network sees.
      flops_per_step: of the network's own operations, see `training_flops`.
      training, evaluation: memory of each device.
      accum_steps, batch_eval: of the configuration.
      changes: {field: value} with which it fits into the memory that was given: none if it does as
        it is; None if nothing that was tried does, no memory was given, or it is not known what
        the run needs.
    """

    parameters: int
    image_shape: tuple[int, int, int]
    classes: int
    devices: int
    batch: int
    total_steps: int
    flops_per_step: float
    training: Memory
    evaluation: Memory
    accum_steps: int
    batch_eval: int
    changes: Mapping[str, Any] | None = None

    def seconds_per_step(self, tflops: float, mfu: float) -> float:
        """Time of a step on devices that could do `tflops` TFLOP/s and do a share `mfu` of it."""
        return self.flops_per_step / (self.devices * tflops * 1e12 * mfu)


def plan(config: ConfigDict, *, classes: int | None = None, memory: float | None = None) -> Plan:
    """Plans a run on all devices of this process, of which only the number matters.

    Programs are compiled; nothing is run but, on a GPU, a trial of cuDNN's attention. Memory is
    counted as the compiler lays it out for the kind of the devices here.

    Args:
      config: see `default_config`.
      classes: number of classes; by default of the data set, which then has to be there.
      memory: bytes of each device, to say what fits.

    Raises UserError if the configuration makes no run, or the number of classes is not known.
    """
    make_mesh(config)  # Says whether the devices divide the batch.
    task = _task(config, classes)
    shape = task.image_shape
    if config.model.name:
        model: Any = named_model(config, len(task.labels))
    else:
        spec = eval_spec(config)
        model = make_network(config, image_shape=shape, labels=task.labels, preprocess=spec).model
    kernels, _ = choose_kernels(model, shape[:2], jax.devices(), config.attention)
    model = model.clone(kernels=kernels)
    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]

    @functools.cache
    def needs(phase: Callable[..., Memory], **fields: Any) -> Memory:
        changed = config.copy_and_resolve_references()
        changed.update(fields)
        return phase(dataclasses.replace(task, config=changed), model, params)

    batch_eval = divisible(config.batch_eval)
    found = Plan(
        parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
        image_shape=shape,
        classes=len(task.labels),
        devices=jax.device_count(),
        batch=config.batch,
        total_steps=config.total_steps,
        flops_per_step=config.batch * training_flops(model, shape[:2], channels=shape[2]),
        training=needs(_training, accum_steps=config.accum_steps),
        evaluation=needs(_evaluation, batch_eval=batch_eval),
        accum_steps=config.accum_steps,
        batch_eval=batch_eval,
    )
    if memory is None or None in (found.training.total, found.evaluation.total):
        return found
    return dataclasses.replace(found, changes=_changes(config, needs, memory))


def _changes(
    config: ConfigDict, needs: Callable[..., Memory], memory: float
) -> dict[str, Any] | None:
    """Fields with which a run fits; see `Plan`."""
    batch_eval = divisible(config.batch_eval)
    a_device = config.batch // jax.device_count()
    slices = [n for n in range(config.accum_steps, a_device + 1) if a_device % n == 0]
    smaller = [divisible(batch_eval >> n) for n in range(batch_eval.bit_length())]

    def first(phase: Callable, field: str, sizes: Sequence[int], saving: Mapping) -> int | None:
        """The first of sizes, which need less and less, that fits."""
        sizes = list(dict.fromkeys(sizes))

        def fits(at: int) -> bool:
            total = needs(phase, **saving, **{field: sizes[at]}).total
            return total is not None and total <= memory

        if not fits(-1):
            return None
        return sizes[bisect.bisect_left(range(len(sizes) - 1), True, key=fits)]

    savings = [new for new in (_new(config, saving) for saving in SAVINGS) if new is not None]
    if first(_training, "accum_steps", slices[-1:], savings[-1]) is None:
        return None
    few = min(FEW, a_device // config.accum_steps)
    for least in (few, 1):
        for saving in savings:
            enough = [n for n in slices if a_device // n >= least]
            accum_steps = first(_training, "accum_steps", enough, saving)
            at_once = accum_steps and first(_evaluation, "batch_eval", smaller, saving)
            if accum_steps and at_once:
                changes = {**saving, "accum_steps": accum_steps, "batch_eval": at_once}
                now = {**config, "batch_eval": batch_eval}
                return {field: value for field, value in changes.items() if now[field] != value}
    return None


def _new(config: ConfigDict, saving: Mapping[str, Any]) -> dict[str, Any] | None:
    """What of a saving a configuration has not yet; None if it has all of it, or can't have it."""
    shards = jax.device_count() > 1 and config.sharding == "replicate" and config.compile == "jit"
    remats = list(REMAT).index(saving.get("remat", "none")) >= list(REMAT).index(config.remat)
    if ("sharding" in saving and not shards) or ("remat" in saving and not remats):
        return None
    return {field: value for field, value in saving.items() if config[field] != value}


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


def _task(config: ConfigDict, classes: int | None) -> RunData:
    """The task with the data set if that is at hand, else with a stand-in of RGB images."""
    name = config.dataset
    if data.is_known(name) or os.path.exists(os.path.expanduser(name)):
        source = data.open_source(name, config.splits.train, seed=config.seed)
    elif classes is None:
        raise UserError(
            f"the number of classes of {name!r} is not known, because it is not on this machine: "
            "give --classes"
        )
    else:

        def no_image(_: Any) -> Any:
            raise UserError(
                f"the size of the images of {name!r} is not known: give config.pp.train and "
                "config.pp.eval an operation that sets it, such as resize(224)"
            )

        source = data.Source(name, (), 3, range(1), np.zeros(1, np.int32), no_image, str)
    if classes is not None:
        source = dataclasses.replace(source, labels=tuple(map(str, range(classes))))
    return open_data(config, (source, source))


def _batch(task: RunData, ops: data.Preprocess, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    blank = np.zeros((8, 8, task.train.channels), np.uint8)
    dtype = ops(blank, np.random.default_rng(0)).dtype
    label: Any = ((size,), jnp.int32)
    if task.train.multi_label:
        label = ((size, len(task.labels)), jnp.float32)
    return {
        "image": jax.ShapeDtypeStruct((size, *task.image_shape), dtype),
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
        ema=params if config.ema_decay else None,
    )
    places = shardings(state, make_mesh(config))
    return tx, jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, places
    )


def _as_trained(config: ConfigDict, model: Any, params: Any) -> tuple[Any, Any]:
    """See `as_trained`; of shapes."""
    stacked = jax.eval_shape(lambda params: as_trained(config, model, params)[1], params)
    return as_trained(config, model, {})[0], stacked


def _training(task: RunData, model: Any, params: Any) -> Memory:
    config = task.config.copy_and_resolve_references()
    config.compile = "jit"  # The same program, and one that can be looked at.
    mesh = make_mesh(config)
    model, params = _as_trained(config, model, params)
    tx, state = _state(config, params)
    batch = _batch(task, task.train_ops, config.batch)
    step: Any = make_step_from_config(config, model, tx, mesh, task.value_range)
    # What comes out takes the place of the state that goes in, but for the figures.
    temporary = _temporary(step.lower(state, batch).compile())
    weights = _bytes(state.params)
    return Memory(
        **_lasting(state),
        gradients=None if temporary is None else min(weights, temporary),
        activations=None if temporary is None else max(temporary - weights, 0),
        # The one at work, and those that are there before they are needed: see `DevicePrefetcher`.
        batches=_bytes(batch, mesh) * (1 + config.prefetch),
    )


def _evaluation(task: RunData, model: Any, params: Any) -> Memory:
    """While an evaluation goes on, the optimizer and the next training batches stay where they
    are."""
    config = task.config
    mesh = make_mesh(config)
    model, params = _as_trained(config, model, params)
    _, state = _state(config, params)
    batch = _batch(task, task.eval_ops, config.batch_eval)
    step: Any = make_eval_step(model, mesh=mesh, loss=config.loss)
    ahead = _bytes(_batch(task, task.train_ops, config.batch), mesh) * (1 + config.prefetch)
    return Memory(
        **_lasting(state),
        gradients=0,
        activations=_temporary(step.lower(state.params, batch).compile()),
        batches=_bytes(batch, mesh) * EVAL_BATCHES + ahead,
    )


def _temporary(program: Any) -> int | None:
    """Bytes of a compiled program beside what goes in; None if its platform doesn't tell."""
    try:
        told = program.memory_analysis()
        needed = told.temp_size_in_bytes + told.output_size_in_bytes - told.alias_size_in_bytes
    except (AttributeError, RuntimeError):  # None, or a figure is not there; not implemented.
        return None
    return needed if needed > 0 else None  # TPUs have told zeros and -1.


def _lasting(state: TrainState) -> dict[str, int]:
    parameters = _bytes((state.params, state.ema))
    return {"parameters": parameters, "optimizer": _bytes(state) - parameters}


def _bytes(tree: Any, mesh: Any = None) -> int:
    """Of arrays, what lies on each device: as they are placed, or split over a mesh."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        place = leaf.sharding if mesh is None else batch_sharding(mesh)
        total += int(np.prod(place.shard_shape(leaf.shape))) * leaf.dtype.itemsize
    return total
