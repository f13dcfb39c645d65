"""What changes while training."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from vit_jax.parallel import make_mesh, replicated


class TrainState(flax.struct.PyTreeNode):
    """Everything a run needs to go on exactly where it stopped.

    Attributes:
      step: int32 scalar, the number of updates done.
      params: nested dict of float32 arrays.
      opt_state: what the optimizer remembers.
      seed: uint32 scalar; with `step` it gives the random numbers of the next update.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    seed: jax.Array

    @classmethod
    def create(
        cls,
        *,
        params: Mapping[str, Any],
        tx: optax.GradientTransformation,
        seed: int = 0,
        mesh: Mesh | None = None,
    ) -> "TrainState":
        """The state before the first update, on every device of a mesh (by default of all devices).

        The parameters are copied: a step donates its state.
        """
        params = jax.tree.map(lambda x: jnp.array(x, copy=True), dict(params))
        state = cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=tx.init(params),
            seed=jnp.asarray(seed, jnp.uint32),
        )
        # Where the step leaves it: a state from elsewhere would have the step compiled twice.
        return jax.device_put(state, replicated(make_mesh() if mesh is None else mesh))

    def dropout_key(self) -> jax.Array:
        """The random key of the next update, a pure function of (seed, step)."""
        return jax.random.fold_in(jax.random.key(self.seed), self.step)
