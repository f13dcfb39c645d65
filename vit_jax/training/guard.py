"""Steps that go wrong: how they are told from others, and what the state remembers of them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax.errors import UserError

LEARNING = 10  # Good steps before a gradient is called too large.
MEMORY = 0.02  # Weight of a step in the running mean, after its first 50.
LIMIT = 10  # Bad steps in a row, or since one checkpoint, that are enough.

# What has to be finite; in the order of what a person thinks of first.
JUDGED = ("loss", "grad_norm", "param_norm")

Guard = Mapping[str, Any]


def new_guard() -> Guard:
    """What a state remembers before the first step.

    Float32 and int32 scalars: "usual", the mean of the gradient norms of the "good" steps so far,
    the latest ones counting most; the number of "bad_steps", and of those "in_a_row" at the end.
    """
    return {"usual": np.float32(0)} | {k: np.int32(0) for k in ("good", "bad_steps", "in_a_row")}


def judge(
    guard: Guard, figures: Mapping[str, jax.Array], spike: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Whether a step is good, a boolean scalar, and what is remembered after it.

    A bad one has a figure of JUDGED that is not finite, or a "grad_norm" of more than `spike`
    times the usual one, if `spike` is not 0 and there were LEARNING good ones.
    """
    ok = jnp.stack([jnp.isfinite(figures[name]) for name in JUDGED]).all()
    grad_norm = figures["grad_norm"]
    if spike:
        ok &= (guard["good"] < LEARNING) | (grad_norm <= spike * guard["usual"])
    weight = jnp.maximum(1 / (guard["good"] + 1), MEMORY)
    usual = guard["usual"] + weight * (grad_norm - guard["usual"])
    return ok, {
        "usual": jnp.where(ok, usual, guard["usual"]),
        "good": guard["good"] + ok,
        "bad_steps": guard["bad_steps"] + ~ok,
        "in_a_row": jnp.where(ok, 0, guard["in_a_row"] + 1),
    }


def at_step(opt_state: optax.OptState, step: jax.Array) -> optax.OptState:
    """The optimizer's state with the learning rate of a step, however many updates were made."""
    return optax.tree.set(
        opt_state,
        lambda path, _: getattr(path[-1], "tuple_name", "") == "ScaleByScheduleState",
        count=step,
    )


@dataclasses.dataclass(frozen=True)
class BadStep:
    """A step that went wrong: its number, why, and the numbers of bad steps so far and in a row."""

    step: int
    reason: str
    bad: int
    in_a_row: int

    def error(self, how_often: str = "") -> UserError:
        """To stop there."""
        return UserError(
            f"at step {self.step} {self.reason}{how_often}; what was saved before is kept: try a "
            "lower config.base_lr, more config.warmup_steps or a smaller config.grad_norm_clip, in "
            "another workdir"
            + ("" if how_often else ", or go on in this one with --config.on_bad_step=skip")
        )


def heed(bad: BadStep, on_bad_step: str, say: Callable[[str], None]) -> bool:
    """What `config.on_bad_step` says of a bad step: raises UserError, tells of it, or gives True
    if the run has to go back."""
    if on_bad_step == "stop":
        raise bad.error()
    if bad.in_a_row >= LIMIT:
        raise bad.error(f", the last of {LIMIT} bad steps in a row")
    if on_bad_step == "rollback":
        return True
    say(f"step {bad.step}: {bad.reason}: skipped, as {bad.bad} in all")
    return False


def bad_step(step: int, figures: Mapping[str, float]) -> BadStep | None:
    """What was wrong with a step, by its figures; None for nothing."""
    if not figures["in_a_row"]:
        return None
    not_finite = [name for name in JUDGED if not np.isfinite(figures[name])]
    if not_finite:
        reason = f"the {not_finite[0]} became {figures[not_finite[0]]}"
    else:
        usual = figures["usual"]
        reason = f"the grad_norm {figures['grad_norm']:.3g} was {figures['grad_norm'] / usual:.3g}"
        reason += f" times the usual {usual:.3g}"
    return BadStep(step, reason, int(figures["bad_steps"]), int(figures["in_a_row"]))
