"""What a run will need, from the shapes of its arrays and the compiled program alone."""

import bisect
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vit_jax import data
from vit_jax.errors import UserError
from vit_jax.evaluation.metrics import make_eval_step
from vit_jax.models.cost import flops_by_part, training_flops
from vit_jax.models.kernels import choose_kernels, platform_of
from vit_jax.models.stack import REMAT
from vit_jax.sharding import batch_sharding, divisible, make_mesh, shardings
from vit_jax.training.config import eval_spec
from vit_jax.training.inputs import RunData, open_data
from vit_jax.training.network import as_trained, make_network, named_model
from vit_jax.training.optimizer import make_optimizer
from vit_jax.training.state import TrainState, new_guard
from vit_jax.training.step import make_step_from_config

EVAL_BATCHES = 3  # That `evaluate` has on the device: two at work, one waiting.
FEW = 8  # Images at once on a device; with fewer, it is hardly made use of.
# What saves memory beside accum_steps, from what costs least time to what costs most.
SAVINGS: tuple[dict[str, Any], ...] = (
    {},
    {"sharding": "fsdp"},
    {"scan_layers": True, "remat": "dots"},
    {"scan_layers": True, "remat": "full"},
    {"sharding": "fsdp", "scan_layers": True, "remat": "dots"},
    {"sharding": "fsdp", "scan_layers": True, "remat": "full"},
)
SEARCH_S = 300  # After which no further program is compiled to find out what would fit.
# For CPUs, whose compiler lays out the memory before it spends most of its time on what is not
# looked at here: the instructions.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def plan(
    config: ConfigDict,
    *,
    classes: int | None = None,
    memory: float | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Plans a run on all devices of this process, of which only the number matters.

    Programs are compiled; nothing is run but, on a GPU, a trial of cuDNN's attention.

    Args:
      config: see `default_config`.
      classes: number of classes; by default of the data set, which then has to be there.
      memory: bytes of each device, to say what fits.
      say: is given a line before each program that is compiled.

    Returns:
      "parameters", "picture_shape" (h, w, channels), "classes", "devices", "batch", "accum_steps",
      "batch_eval" and "total_steps"; "flops_per_step", see `training_flops`, and "flops_by_part",
      the shares of the network's parts in it; "training" and
      "evaluation", see `_memory`; "memory" as given; "fits", None if that can't be known, and
      "changes", the {field: value} with which it would, None if nothing that was tried helps.

    Raises UserError if the configuration makes no run, or the number of classes is not known.
    """
    make_mesh(config)  # Says whether the devices divide the batch.
    if config.levels == "percentile":  # Found in images, which may not be here; any take as much.
        config = config.copy_and_resolve_references()
        config.levels = "0, 255"
    task = open_data(config, (_source(config, classes),) * 2)
    shape = task.image_shape
    if config.model.name:
        model: Any = named_model(config, len(task.labels))
    else:
        spec = eval_spec(config)
        model = make_network(config, image_shape=shape, labels=task.labels, preprocess=spec).model
    chosen = choose_kernels(model, shape[:2], jax.devices(), config.attention)
    model = model.clone(kernels=chosen.kernels)
    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]

    @functools.cache
    def needs(phase: str, **fields: Any) -> dict[str, int | None]:
        if time.monotonic() > deadline:
            raise TimeoutError
        say(f"compiling the {phase} with {', '.join(f'{k} {v}' for k, v in fields.items())}")
        changed = config.copy_and_resolve_references()
        changed.update(fields)
        return _memory(phase, dataclasses.replace(task, config=changed), model, params)

    parts = flops_by_part(model, shape[:2], channels=shape[2])
    deadline, batch_eval = math.inf, divisible(config.batch_eval)
    training = needs("training", accum_steps=config.accum_steps)
    evaluation = needs("evaluation", batch_eval=batch_eval)
    totals = [total for x in (training, evaluation) if (total := x["total"]) is not None]
    fits = max(totals) <= memory if memory is not None and len(totals) == 2 else None
    changes: dict[str, Any] | None = {} if fits else None
    deadline = time.monotonic() + SEARCH_S
    if memory is not None and fits is False:
        try:
            changes = _changes(config, needs, memory)
        except TimeoutError:
            say(f"after {SEARCH_S} s nothing more is tried")
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "picture_shape": shape,
        "classes": len(task.labels),
        "devices": jax.device_count(),
        **{name: config[name] for name in ("batch", "accum_steps", "total_steps")},
        "batch_eval": batch_eval,
        "flops_per_step": config.batch * training_flops(model, shape[:2], channels=shape[2]),
        "flops_by_part": {part: count / sum(parts.values()) for part, count in parts.items()},
        "training": training,
        "evaluation": evaluation,
        **dict(memory=memory, fits=fits, changes=changes),
    }


def _changes(
    config: ConfigDict, needs: Callable[..., dict], memory: float
) -> dict[str, Any] | None:
    """Fields with which a run fits; see `plan`. Some twenty programs are compiled at most: two for
    each of SAVINGS that does not do, and what halving finds in the first that does."""
    now = {**config, "batch_eval": divisible(config.batch_eval)}
    of_device = config.batch // jax.device_count()
    slices = [n for n in range(config.accum_steps, of_device + 1) if of_device % n == 0]
    halves = (now["batch_eval"] >> n for n in range(now["batch_eval"].bit_length()))
    smaller = list(dict.fromkeys(map(divisible, halves)))

    def first(phase: str, field: str, sizes: Sequence[int], saving: Mapping) -> int | None:
        """The first of sizes, which need less and less, that fits."""

        def fits(size: int) -> bool:
            total = needs(phase, **saving, **{field: size})["total"]
            return total is not None and total <= memory

        return sizes[bisect.bisect_left(sizes[:-1], True, key=fits)] if fits(sizes[-1]) else None

    savings = [new for saving in SAVINGS if (new := _new(config, saving)) is not None]
    if first("training", "accum_steps", slices[-1:], savings[-1]) is None:
        return None
    for least in (min(FEW, of_device // config.accum_steps), 1):
        for saving in savings:
            enough = [n for n in slices if of_device // n >= least]
            accum_steps = first("training", "accum_steps", enough, saving)
            batch_eval = accum_steps and first("evaluation", "batch_eval", smaller, saving)
            if batch_eval:
                changes = {**saving, "accum_steps": accum_steps, "batch_eval": batch_eval}
                return {field: value for field, value in changes.items() if now[field] != value}
    return None


def _new(config: ConfigDict, saving: Mapping[str, Any]) -> dict[str, Any] | None:
    """What of a saving a configuration has not yet; None if it has all of it, or can't have it."""
    shards = jax.device_count() > 1 and config.sharding == "replicate" and config.compile == "jit"
    remats = list(REMAT).index(saving.get("remat", "none")) >= list(REMAT).index(config.remat)
    if ("sharding" in saving and not shards) or ("remat" in saving and not remats):
        return None
    return {field: value for field, value in saving.items() if config[field] != value}


def _source(config: ConfigDict, classes: int | None) -> data.Source:
    """The images to train on if they are at hand, else a stand-in of RGB images."""
    name, labels = config.dataset, None if classes is None else tuple(map(str, range(classes)))
    if data.is_known(name) or os.path.exists(os.path.expanduser(name)):
        source = data.open_source(name, config.splits.train, seed=config.seed)
        return source if labels is None else dataclasses.replace(source, labels=labels)
    if labels is None:
        raise UserError(
            f"the number of classes of {name!r} is not known, because it is not on this machine: "
            "give --classes"
        )

    def no_image(_: Any) -> Any:
        raise UserError(
            f"the size of the images of {name!r} is not known: give config.pp.train and "
            "config.pp.eval an operation that sets it, such as resize(224)"
        )

    return data.Source(name, labels, 3, range(1), np.zeros(1, np.int32), no_image, str)


def _memory(phase: str, task: RunData, model: Any, params: Any) -> dict[str, int | None]:
    """Bytes on each device in the "training" or in an "evaluation", during which the optimizer and
    the next training batches stay where they are.

    Returns:
      "parameters" (twice if they are averaged) and "optimizer", what lasts; "gradients", as large
      as the parameters; "activations", all else that the compiled program needs; "batches", the one
      at work and those made ready ahead; "total". None for what the compiler doesn't tell.
    """
    config = task.config.copy_and_resolve_references()
    config.compile = "jit"  # The same program as of pmap, and one that can be looked at.
    mesh, tx = make_mesh(config), make_optimizer(config, config.total_steps, model.frozen)
    trained, _ = as_trained(config, model, {})

    def first_state(params: Any) -> TrainState:
        _, params = as_trained(config, model, params)
        ema = params if config.ema_decay else None
        return TrainState(jnp.int32(0), params, tx.init(params), jnp.uint32(0), new_guard(), ema)

    def batch(ops: data.Preprocess, size: int) -> dict[str, jax.ShapeDtypeStruct]:
        blank = np.zeros((8, 8, task.train.channels), np.float32 if ops.levels else np.uint8)
        image = ((size, *task.image_shape), ops(blank, np.random.default_rng(0)).dtype)
        several = ((size, len(task.labels)), jnp.float32)
        label = several if task.train.multi_label else ((size,), jnp.int32)
        place = batch_sharding(mesh)
        rows = {"image": image, "label": label}
        return {k: jax.ShapeDtypeStruct(*v, sharding=place) for k, v in rows.items()}

    state: Any = jax.eval_shape(first_state, params)
    state = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        *(state, shardings(state, mesh)),
    )
    rows = batch(task.train_split[0], config.batch)
    batches = _bytes(rows) * (1 + config.prefetch)
    if phase == "training":
        step: Any = make_step_from_config(config, trained, tx, mesh, task.train_split[1])
        # What comes out takes the place of the state that goes in, but for the metrics.
        temporary = _temporary(step.lower(state, rows))
        gradients = None if temporary is None else min(_bytes(state.params), temporary)
    else:
        rows = batch(task.eval_split[0], config.batch_eval)
        batches += _bytes(rows) * EVAL_BATCHES
        step = make_eval_step(trained, mesh=mesh, loss=config.loss, normalize=task.eval_split[1])
        temporary, gradients = _temporary(step.lower(state.params, rows)), 0
    parameters = _bytes((state.params, state.ema))
    needed = {
        "parameters": parameters,
        "optimizer": _bytes(state) - parameters,
        "gradients": gradients,
        "activations": None if temporary is None else temporary - (gradients or 0),
        "batches": batches,
    }
    return needed | {"total": None if temporary is None else sum(filter(None, needed.values()))}


def _temporary(program: Any) -> int | None:
    """Bytes of a program beside what goes in; None if its platform doesn't tell."""
    quickly = QUICKLY if platform_of(jax.devices()) == "cpu" else None
    compiled = program.compile(compiler_options=quickly)
    try:
        told = compiled.memory_analysis()
        needed = told.temp_size_in_bytes + told.output_size_in_bytes - told.alias_size_in_bytes
    except (AttributeError, RuntimeError):  # None, or a figure is not there; not implemented.
        return None
    return needed if needed > 0 else None  # TPUs have told zeros and -1.


def _bytes(tree: Any) -> int:
    """Of arrays, what lies on each device."""
    shards = ((leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(tree))
    return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in shards)
