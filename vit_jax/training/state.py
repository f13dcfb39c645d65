"""What changes while training."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from vit_jax.sharding import make_mesh, put_global, shardings

Guard = Mapping[str, Any]


def new_guard() -> Guard:
    """What a state remembers of good and bad steps, before the first.

    Float32 and int32 scalars: "grad_norm_ema", the mean of the gradient norms of the "good_steps"
    so far, the latest ones counting most; the number of "bad_steps", and of those
    "consecutive_bad" at the end.
    """
    counts = ("good_steps", "bad_steps", "consecutive_bad")
    return {"grad_norm_ema": np.float32(0)} | {name: np.int32(0) for name in counts}


class TrainState(flax.struct.PyTreeNode):
    """Everything a run needs to go on exactly where it stopped.

    Attributes:
      step: int32 scalar, the number of updates done.
      params: nested dict of float32 arrays.
      opt_state: what the optimizer remembers.
      seed: uint32 scalar; with `step` it gives the random numbers of the next update.
      guard: what is remembered of good and bad steps, see `new_guard`.
      ema: the moving average of params, which lies as they do; None if there is none.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    seed: jax.Array
    guard: Guard
    ema: Any = None

    @property
    def averaged(self) -> Any:
        """The weights that the run is for: those of the average, if there is one."""
        return self.params if self.ema is None else self.ema

    @classmethod
    def create(
        cls,
        *,
        params: Mapping[str, Any],
        tx: optax.GradientTransformation,
        seed: int = 0,
        mesh: Mesh | None = None,
        ema: bool = False,
    ) -> "TrainState":
        """The state before the first update, over the devices of a mesh (by default of all devices)
        as `shardings` says; no device holds more than its part at any time. With `ema` there is an
        average, which begins with these parameters.

        The parameters are copied: a step donates its state.
        """
        mesh = make_mesh() if mesh is None else mesh
        params = put_global(dict(params), shardings(dict(params), mesh))
        places = shardings(jax.eval_shape(tx.init, params), mesh)
        small = {"step": np.int32(0), "seed": np.uint32(seed), "guard": new_guard()}
        return cls(
            params=params,
            opt_state=jax.jit(tx.init, out_shardings=places)(params),
            ema=jax.tree.map(jnp.copy, params) if ema else None,
            **put_global(small, shardings(small, mesh)),
        )

    def with_counts(self, step: int, **guard: int) -> "TrainState":
        """These weights as those of another step, with other counts of bad steps."""
        counts = {name: np.int32(count) for name, count in guard.items() | {("step", step)}}
        counts = put_global(counts, dict.fromkeys(counts, self.step.sharding))
        return self.replace(step=counts.pop("step"), guard={**self.guard, **counts})

    def dropout_key(self) -> jax.Array:
        """The random key of the next update, a pure function of (seed, step)."""
        return jax.random.fold_in(jax.random.key(self.seed), self.step)
