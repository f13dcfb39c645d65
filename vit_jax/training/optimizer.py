"""Learning-rate schedules and optimizers."""

from collections.abc import Collection

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from vit_jax.models.family import path_name

LINEAR_END = 1e-5  # Learning rate at the end of the linear decay, as in the original.


def make_schedule(
    total_steps: int,
    base_lr: float,
    decay_type: str,
    warmup_steps: int,
    linear_end: float = LINEAR_END,
) -> optax.Schedule:
    """Learning rate as a function of the number of updates done so far.

    With p the share of the steps after warm-up that are done: "cosine" base/2 (1 + cos(pi p)),
    "linear" from base to `linear_end`, "constant" base, "rsqrt" base / sqrt(1 + updates since
    warm-up / warm-up) (arXiv:2106.04560, section 3.5, with the warm-up as its time scale). During
    the first `warmup_steps` all of them rise in a straight line from 0; the first update then has
    learning rate 0.

    Returns:
      a function of an integer step, to a float32 scalar.
    """

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
        progress = jnp.clip(progress, 0.0, 1.0)
        if decay_type == "cosine":
            lr = base_lr * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        elif decay_type == "linear":
            lr = linear_end + (base_lr - linear_end) * (1.0 - progress)
        elif decay_type == "rsqrt":
            timescale = max(warmup_steps, 1)
            lr = base_lr / jnp.sqrt(1.0 + jnp.maximum(step - warmup_steps, 0.0) / timescale)
        else:
            lr = jnp.float32(base_lr)
        if warmup_steps:
            lr = lr * jnp.minimum(1.0, step / warmup_steps)
        return jnp.asarray(lr, jnp.float32)

    return schedule


def schedule_of(config: ConfigDict, total_steps: int) -> optax.Schedule:
    """The schedule that a configuration asks for."""
    return make_schedule(total_steps, config.base_lr, config.decay_type, config.warmup_steps)


def make_optimizer(
    config: ConfigDict, total_steps: int, frozen: Collection[str] = ()
) -> optax.GradientTransformation:
    """The optimizer that a configuration asks for. Weights of the names in `frozen` stay as they
    are, and nothing is remembered for them, see `ImageModel.frozen`.

    Gradients are clipped to the global norm `grad_norm_clip`; then SGD with momentum (`momentum`,
    kept in `optim_dtype`) or Adam (`b1`, `b2`, first moment kept in `optim_dtype`); then decoupled
    weight decay of the kernels (arXiv:1711.05101), and the learning rate of `schedule_of`.

    With bfloat16 the decay constant of the momentum is rounded too (0.9 becomes 0.8984375), as in
    the original. Choose optim_dtype="float32" for exact arithmetic.
    """
    moment_dtype = jnp.dtype(config.optim_dtype)
    steps = []
    if config.grad_norm_clip > 0:
        steps.append(_clip_by_global_norm(config.grad_norm_clip))
    if config.optim == "sgd":
        steps.append(optax.trace(decay=config.momentum, accumulator_dtype=moment_dtype))
    else:
        steps.append(optax.scale_by_adam(b1=config.b1, b2=config.b2, mu_dtype=moment_dtype))
    if config.weight_decay > 0:
        steps.append(optax.add_decayed_weights(config.weight_decay, mask=_kernels))
    steps.append(optax.scale_by_learning_rate(schedule_of(config, total_steps)))
    tx = optax.chain(*steps)
    if not frozen:
        return tx

    def kinds(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "frozen" if path_name(path) in frozen else "trained", params
        )

    return optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, kinds)


def _clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """As Optax's, by one factor: a division of every gradient is one more pass over memory."""

    def clip(grads, _):
        factor = jnp.minimum(1.0, max_norm / optax.tree.norm(grads))
        return jax.tree.map(lambda x: x * factor.astype(x.dtype), grads)

    return optax.stateless(clip)


def _kernels(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
