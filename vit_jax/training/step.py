"""One training step: from a batch to changed weights, in one compiled function."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from vit_jax.errors import UserError
from vit_jax.evaluation.metrics import example_losses
from vit_jax.parallel import make_mesh, replicated, shardings, split
from vit_jax.training.guard import at_step, judge
from vit_jax.training.mixing import mix
from vit_jax.training.state import TrainState

Batch = Mapping[str, jax.Array]
Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(
    model: nn.Module,
    tx: optax.GradientTransformation,
    *,
    mesh: Mesh | None = None,
    accum_steps: int = 1,
    loss: str = "softmax",
    label_smoothing: float = 0.0,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    value_range: tuple[float, float] = (-1.0, 1.0),
    skip_bad: bool = False,
    spike: float = 0.0,
) -> Step:
    """Compiles one update of the weights over all devices of a mesh.

    Args:
      model: a network that maps (n, h, w, c) pictures to (n, classes) logits.
      tx: see `make_optimizer`.
      mesh: see `make_mesh`, by default of all devices. The batch is split over it, the state
        lies where `shardings` says. Each weight that is split is gathered where it is used, once
        forwards and once backwards, and its gradient is at once split again.
      accum_steps: the batch is computed in this many slices one after the other, which saves
        memory. It has to divide the number of pictures a device.
      loss: "softmax" or "sigmoid" cross-entropy.
      label_smoothing: share of a label that is spread evenly over all classes.
      mixup, cutmix: see `mix`; 0 for none.
      value_range: what 0 and 255 of uint8 pictures become.
      skip_bad: whether a step that `judge` calls bad leaves weights and optimizer as they are.
      spike: see `judge`.

    Returns:
      step(state, batch) -> (state, metrics). The batch holds "image", (n, h, w, c) of float32 or,
      not yet normalised, of uint8, and "label", either int32 (n,) or float32 (n, classes). The
      state passed in is donated: it can't be used again. Metrics are float32 scalars on the device:
      "loss", the mean over the batch, and the global norms of its gradient before clipping,
      "grad_norm", of what the optimizer made of it, "update_norm", and of the new weights,
      "param_norm"; and what `judge` remembers, see `new_guard`.
    """
    mesh = make_mesh() if mesh is None else mesh
    parts = mesh.size * accum_steps

    def logits_of(params: Any, images: jax.Array) -> Any:
        return model.apply({"params": params}, images)

    low, high = value_range

    def loss_fn(
        params: Any, images: jax.Array, labels: jax.Array, key: jax.Array, *, levels: bool
    ) -> jax.Array:
        params = jax.tree.map(functools.partial(_gathered, mesh=mesh), params)
        if levels:  # As the operation value_range does; mixed ones are no integers any more.
            images = (images.astype(jnp.float32) - 127.5) / 127.5
            images = images * ((high - low) / 2) + (high + low) / 2
        logits: Any = model.apply({"params": params}, images, train=True, rngs={"dropout": key})
        return example_losses(logits, labels, loss, label_smoothing).mean()

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        if len(batch["image"]) % parts:
            raise UserError(
                f"the batch holds {len(batch['image'])} pictures, expected a multiple of {parts}: "
                f"{mesh.size} devices x {accum_steps} accum_steps"
            )
        key = state.dropout_key()
        levels = batch["image"].dtype == jnp.uint8
        if mixup or cutmix:
            classes = jax.eval_shape(logits_of, state.params, batch["image"]).shape[-1]
            batch = mix(batch, key, classes, mixup=mixup, cutmix=cutmix)
        forward: Callable = functools.partial(loss_fn, levels=levels)
        if mesh.shape["part"] > 1:  # Gathered weights are not kept until they are used backwards.
            forward = jax.checkpoint(forward, policy=_all_but_gathered)
        value_and_grad = jax.value_and_grad(forward)
        value, grads = _accumulate(value_and_grad, accum_steps, mesh, state.params, batch, key)
        before = at_step(state.opt_state, state.step) if skip_bad else state.opt_state
        updates, opt_state = tx.update(grads, before, state.params)
        params = optax.apply_updates(state.params, updates)
        norms = {"grad_norm": grads, "update_norm": updates, "param_norm": params}
        metrics = {"loss": value} | {name: optax.tree.norm(x) for name, x in norms.items()}
        ok, guard = judge(state.guard, metrics, spike)
        if skip_bad:
            new, old = (params, opt_state), (state.params, state.opt_state)
            params, opt_state = jax.tree.map(functools.partial(jnp.where, ok), new, old)
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state, guard=guard)
        return jax.lax.with_sharding_constraint(state, shardings(state, mesh)), metrics | guard

    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(None, split(mesh)),
        out_shardings=(None, replicated(mesh)),
    )


def _gathered(x: jax.Array, *, mesh: Mesh) -> jax.Array:
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
    value_and_grad: Callable, slices: int, mesh: Mesh, params: Any, batch: Batch, key: jax.Array
) -> tuple[jax.Array, Any]:
    """Mean loss and gradient over the slices of a batch; each slice has its own dropout."""
    if slices == 1:
        return value_and_grad(params, batch["image"], batch["label"], key)

    def cut(x: jax.Array) -> jax.Array:
        # (n, ...) -> (slices, n / slices, ...): every so many pictures belong to one slice, so that
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
