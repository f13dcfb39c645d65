"""One training step: from a batch to changed weights, in one compiled function."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax.errors import UserError
from vit_jax.evaluation.metrics import example_losses
from vit_jax.models.family import ImageModel, path_name
from vit_jax.models.stack import in_block
from vit_jax.sharding import batch_sharding, make_mesh, replicated, shardings
from vit_jax.training.config import mixup as mixup_of
from vit_jax.training.mixing import mix
from vit_jax.training.optimizer import schedule_of
from vit_jax.training.state import Guard, TrainState

if TYPE_CHECKING:
    from vit_jax.data import Normalize

Batch = Mapping[str, jax.Array]
Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]

MUST_BE_FINITE = ("loss", "grad_norm", "param_norm")  # What a person thinks of first stands first.
SPIKE_WARMUP = 10  # Good steps before a gradient is called too large.
EMA_WEIGHT = 0.02  # Of a step in the mean of the gradient's norm, after its first 50.


def make_train_step(
    model: nn.Module,
    tx: optax.GradientTransformation,
    *,
    mesh: Mesh | None = None,
    compile: str = "jit",
    accum_steps: int = 1,
    loss: str = "softmax",
    label_smoothing: float = 0.0,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    normalize: "Normalize | None" = None,
    skip_bad: bool = False,
    spike: float = 0.0,
    ema_decay: float = 0.0,
    update_norm_at: Callable[[jax.Array], jax.Array] | None = None,
    learning_rate: optax.Schedule | None = None,
) -> Step:
    """Compiles one update of the weights over all devices of a mesh.

    Args:
      model: a network that maps (n, h, w, c) images to (n, classes) logits.
      tx: see `make_optimizer`.
      mesh: see `make_mesh`, by default of all devices. The batch is split over it, the state
        lies where `shardings` says. Each weight that is split is gathered where it is used, once
        forwards and once backwards, and its gradient is at once split again.
      compile: "jit", or "pmap" for `jax.pmap` over the devices of the only process, each of which
        has the whole state. If there are several, each draws its own dropout and mixes the
        images of its own part of the batch.
      accum_steps: the batch is computed in this many slices one after the other, which saves
        memory. It has to divide the number of images a device.
      loss: "softmax" or "sigmoid" cross-entropy.
      label_smoothing: share of a label that is spread evenly over all classes.
      mixup, cutmix: see `mix`; 0 for none.
      normalize: what is done to the images first. None: floats are normalised already, and uint8
        is mapped to [-1, 1].
      skip_bad: whether a bad step leaves weights and optimizer as they are, see `update_guard`.
      spike: see `update_guard`.
      ema_decay: of the average of the weights, if the state has one.
      update_norm_at: whether "update_norm" is wanted after the step of a number; it is NaN after
        the others. On CPUs it costs 1 to 2 % of a step with SGD. None: after each.
      learning_rate: that of `tx`, to be among the metrics.

    Returns:
      step(state, batch) -> (state, metrics). The batch holds "image", (n, h, w, c) of float32 or
      uint8, see `normalize`, and "label", either int32 (n,) or float32 (n, classes). The
      state passed in is donated: it can't be used again. Metrics are float32 scalars on the device:
      "loss", the mean over the batch, and the global norms of its gradient before clipping,
      "grad_norm", of what the optimizer made of it, "update_norm", and of the new weights,
      "param_norm"; "lr", if `learning_rate` is given; and those of `new_guard`.
    """
    mesh = make_mesh() if mesh is None else mesh
    pieces, in_parts = mesh.size * accum_steps, mesh.shape["fsdp"] > 1
    if compile == "pmap" and (in_parts or jax.process_count() > 1):
        raise UserError(
            "config.compile pmap is for one process with the weights whole on every device: use "
            "config.compile=jit"
        )
    # Of another network than ours no blocks are known.
    loop, frozen = (model.loop, model.frozen) if isinstance(model, ImageModel) else (None, ())
    gather = functools.partial(_gather, mesh=mesh)
    if in_parts and loop:  # Inside of them, so that each is gathered when its turn comes.
        model = model.clone(loop=dataclasses.replace(loop, param_transform=gather))

    def gather_outside_blocks(path: Any, x: jax.Array) -> jax.Array:
        return x if loop and in_block(path) else gather(x)

    def stop_if_frozen(path: Any, x: jax.Array) -> jax.Array:
        return jax.lax.stop_gradient(x) if path_name(path) in frozen else x

    def averaged(path: Any, new: jax.Array, old: jax.Array) -> Any:  # Rounding would move it.
        return (
            old if path_name(path) in frozen else optax.incremental_update(new, old, 1 - ema_decay)
        )

    def logits_of(params: Any, images: jax.Array) -> Any:
        return model.apply({"params": params}, images)

    mixes = mixup or cutmix

    def normalized(images: jax.Array) -> jax.Array:
        if normalize is None and images.dtype != jnp.uint8:
            return images
        from vit_jax.data import parse  # Loads OpenCV.

        operation = normalize or parse("value_range(-1, 1)").normalize
        assert operation is not None
        return operation(images)

    def loss_fn(params: Any, images: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
        params = jax.tree_util.tree_map_with_path(stop_if_frozen, params)
        if in_parts:
            params = jax.tree_util.tree_map_with_path(gather_outside_blocks, params)
        if not mixes:  # A slice at a time.
            images = normalized(images)
        logits: Any = model.apply({"params": params}, images, train=True, rngs={"dropout": key})
        return example_losses(logits, labels, loss, label_smoothing).mean()

    def update(
        state: TrainState, batch: Batch, axis: str | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """With an axis of `pmap`, of the part of the batch that is on this device."""
        key = state.dropout_key()
        if mixes:  # Mixed images are floats, so they are normalised before.
            batch = dict(batch, image=normalized(batch["image"]))
            classes = jax.eval_shape(logits_of, state.params, batch["image"]).shape[-1]
            batch = mix(batch, key, classes, mixup=mixup, cutmix=cutmix)
        forward: Callable = loss_fn
        # Gathered weights are not kept until they are used backwards. (Blocks that are computed
        # again do that for themselves; this would keep what they don't.)
        if in_parts and (loop is None or loop.remat == "none"):
            forward = jax.checkpoint(forward, policy=_all_but_gathered)
        if axis and mesh.size > 1:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        value_and_grad = jax.value_and_grad(forward)
        value, grads = _accumulate(value_and_grad, accum_steps, state.params, batch, key)
        if axis:
            value, grads = jax.lax.pmean((value, grads), axis)
        old_opt = _with_count(state.opt_state, state.step) if skip_bad else state.opt_state
        updates, opt_state = tx.update(grads, old_opt, state.params)
        params = optax.apply_updates(state.params, updates)
        norms = {"grad_norm": grads, "param_norm": params}
        metrics = {"loss": value} | {name: optax.tree.norm(x) for name, x in norms.items()}
        ok, guard = update_guard(state.guard, metrics, spike)
        if learning_rate is not None:
            metrics["lr"] = learning_rate(state.step)
        if update_norm_at is None:
            metrics["update_norm"] = optax.tree.norm(updates)
        else:  # Of updates that are made again for it, so that the others aren't written to memory.
            metrics["update_norm"] = jax.lax.cond(
                update_norm_at(state.step + 1),
                lambda: optax.tree.norm(tx.update(grads, old_opt, state.params)[0]),
                lambda: jnp.full_like(metrics["param_norm"], jnp.nan),
            )
        new = {"params": params, "opt_state": opt_state}
        if state.ema is not None:
            new["ema"] = jax.tree_util.tree_map_with_path(averaged, params, state.ema)
        if skip_bad:
            old = {name: getattr(state, name) for name in new}
            new = jax.tree.map(functools.partial(jnp.where, ok), new, old)
        state = state.replace(step=state.step + 1, guard=guard, **new)
        if not axis:
            state = jax.lax.with_sharding_constraint(state, shardings(state, mesh))
        return state, metrics | guard

    on_each: Callable = update

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        if len(batch["image"]) % pieces:
            raise UserError(
                f"the batch holds {len(batch['image'])} images, expected a multiple of {pieces}: "
                f"{mesh.size} devices x {accum_steps} accum_steps"
            )
        if compile == "pmap":
            batch = jax.tree.map(lambda x: x.reshape(mesh.size, -1, *x.shape[1:]), dict(batch))
        return on_each(state, batch)

    if compile == "jit":
        return jax.jit(
            step,
            donate_argnums=0,
            in_shardings=(None, batch_sharding(mesh)),
            out_shardings=(None, replicated(mesh)),
        )
    on_each = jax.pmap(
        functools.partial(update, axis="devices"),
        "devices",
        in_axes=(None, 0),
        out_axes=None,
        donate_argnums=0,
        devices=[*mesh.devices.flat],
    )
    return step


def make_step_from_config(
    config: ConfigDict,
    model: nn.Module,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    normalize: "Normalize | None",
) -> Step:
    """The compiled step of a run, as its configuration says; see `make_train_step`."""
    on_cpus = mesh.devices.flat[0].platform == "cpu"

    def is_reported(step: jax.Array) -> jax.Array:
        return (step % config.progress_every == 0) | (step == config.total_steps)

    as_they_are = ("compile", "accum_steps", "loss", "label_smoothing", "cutmix", "spike")
    return make_train_step(
        model,
        tx,
        mesh=mesh,
        **{name: config[name] for name in (*as_they_are, "ema_decay")},
        mixup=mixup_of(config),
        normalize=normalize,
        skip_bad=config.on_bad_step != "stop",
        # On CPUs it pays to leave it out of the other steps (with Adam it would have to be computed
        # anew); a GPU would wait for the decision.
        update_norm_at=is_reported if on_cpus and config.optim == "sgd" else None,
        learning_rate=schedule_of(config, config.total_steps),
    )


def update_guard(
    guard: Guard, metrics: Mapping[str, jax.Array], spike: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Whether a step is good, a boolean scalar, and what is remembered after it (`new_guard`).

    A bad one has a metric of MUST_BE_FINITE that isn't, or a "grad_norm" of more than `spike` times
    the mean of good ones, if `spike` is not 0 and there were SPIKE_WARMUP good ones.
    """
    ok = jnp.stack([jnp.isfinite(metrics[name]) for name in MUST_BE_FINITE]).all()
    grad_norm, mean, good = metrics["grad_norm"], guard["grad_norm_ema"], guard["good_steps"]
    if spike:
        ok &= (good < SPIKE_WARMUP) | (grad_norm <= spike * mean)
    weight = jnp.maximum(1 / (good + 1), EMA_WEIGHT)
    return ok, {
        "grad_norm_ema": jnp.where(ok, mean + weight * (grad_norm - mean), mean),
        "good_steps": good + ok,
        "bad_steps": guard["bad_steps"] + ~ok,
        "consecutive_bad": jnp.where(ok, 0, guard["consecutive_bad"] + 1),
    }


def _with_count(opt_state: optax.OptState, step: jax.Array) -> optax.OptState:
    """The optimizer's state with the learning rate of a step, however many updates were made."""
    return optax.tree.set(
        opt_state,
        lambda path, _: getattr(path[-1], "tuple_name", "") == "ScaleByScheduleState",
        count=step,
    )


def _gather(x: jax.Array, *, mesh: Mesh) -> jax.Array:
    """A weight that lies in parts, whole; its gradient is summed in the same parts."""
    place = shardings(x, mesh)
    if place.is_fully_replicated:
        return x

    @jax.custom_vjp
    def gather(x):
        return jax.lax.with_sharding_constraint(x, replicated(mesh))

    gather.defvjp(
        lambda x: (gather(x), None),
        lambda _, grad: (jax.lax.with_sharding_constraint(grad, place),),
    )
    return gather(x)


def _all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """What is kept on the way forwards for the way back."""
    return primitive.name != "sharding_constraint"


def _accumulate(
    value_and_grad: Callable, slices: int, params: Any, batch: Batch, key: jax.Array
) -> tuple[jax.Array, Any]:
    """Mean loss and gradient over the slices of a batch; each slice has its own dropout."""
    if slices == 1:
        return value_and_grad(params, batch["image"], batch["label"], key)

    def cut(x: jax.Array) -> jax.Array:
        # (n, ...) -> (slices, n / slices, ...): every so many images belong to one slice, so that
        # none changes its device, and the slices are the same on any number of devices.
        return x.reshape(-1, slices, *x.shape[1:]).swapaxes(0, 1)

    def body(total, slice_):
        images, labels, index = slice_
        one = value_and_grad(params, images, labels, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, one), None

    zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
    slices_ = (cut(batch["image"]), cut(batch["label"]), jnp.arange(slices))
    total, _ = jax.lax.scan(body, zeros, slices_)
    return jax.tree.map(lambda x: x / slices, total)
