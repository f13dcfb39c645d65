"""How a network goes through its equal blocks: which weights they keep where, and what is kept for
the way back."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

# What of a block is computed again on the way back, in place of being kept from the way forwards:
# nothing, all but the products of tokens and weights, or all but what goes into the block.
REMAT: dict[str, Callable[..., bool] | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}

# The blocks of each network by their official names, and all of them in one tree.
_BLOCK = re.compile(r"(encoderblock|MixerBlock)_([0-9]+)")
STACKS = ("encoderblock", "MixerBlock")


@dataclasses.dataclass(frozen=True)
class BlockLoop:
    """How blocks are computed. What is computed stays the same, but for rounding and, with `scan`,
    the draws of dropout.

    Attributes:
      scan: the compiler sees one block and a loop (`jax.lax.scan`). The weights are those of
        `stack_blocks`.
      remat: one of REMAT.
      gather: what is done to each weight of a block where the block uses it, e.g. to one that lies
        in parts; None for nothing.
    """

    scan: bool = False
    remat: str = "none"
    gather: Callable[[jax.Array], jax.Array] | None = None


class DropPath(nn.Module):
    """Stochastic depth (arXiv:1603.09382): leaves a branch out for an image with probability
    `rate`, which may be traced, and divides by 1 - rate if not. (n, t, d) -> (n, t, d)."""

    @nn.compact
    def __call__(
        self, branch: jax.Array, rate: float | jax.Array, *, deterministic: bool
    ) -> jax.Array:
        if deterministic or (isinstance(rate, float) and rate == 0):
            return branch
        keep = 1.0 - rate
        kept = jax.random.bernoulli(self.make_rng("dropout"), keep, (len(branch), 1, 1))
        return jnp.where(kept, branch / jnp.asarray(keep, branch.dtype), jnp.zeros_like(branch))


def run_blocks(
    block: type[nn.Module],
    fields: Mapping[str, Any],
    x: jax.Array,
    *,
    name: str,
    depth: int,
    drop_path_rate: float,
    loop: BlockLoop,
    deterministic: bool,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Applies `depth` blocks, one after the other, as parts of the module that calls it.

    Args:
      block, fields: their class and its fields. Called with x and the keywords deterministic and
        drop_path_rate, see `DropPath`, which grows linearly with depth, from 0 up to
        `drop_path_rate` in the last block.
      x: goes into the first; all blocks keep its shape and type.
      name: of STACKS.

    Returns:
      what comes out of the last, and out of each: {"NAME_0": ..., "NAME_1": ...}.
    """
    rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
    if loop.gather is not None:
        gather = functools.partial(jax.tree.map, loop.gather)
        block = nn.map_variables(block, "params", trans_in_fn=gather)

    def one(module: Any, x: jax.Array, rate: Any) -> jax.Array:
        def apply(module: Any, x: jax.Array) -> jax.Array:
            return module(x, deterministic=deterministic, drop_path_rate=rate)

        if loop.remat != "none":  # In a loop the compiler can't merge what is computed twice.
            apply = nn.remat(apply, policy=REMAT[loop.remat], prevent_cse=not loop.scan)
        return apply(module, x)

    features = {}
    if not loop.scan:
        for i, rate in enumerate(rates):
            x = features[f"{name}_{i}"] = one(block(**fields, name=f"{name}_{i}"), x, rate)
        return x, features

    def step(module: Any, x: jax.Array, rate: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = one(module, x, rate if drop_path_rate else 0.0)
        return x, x

    scan = nn.scan(
        step,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        length=depth,
    )
    x, each = scan(block(**fields, name=name), x, jnp.asarray(rates, jnp.float32))
    return x, {f"{name}_{i}": each[i] for i in range(depth)}


def stack_blocks(params: Any) -> Any:
    """A network's weights with those of all blocks in one tree, as `BlockLoop.scan` has them.

    Each "NAME_0/a", "NAME_1/a", ... becomes one array "NAME/a" with an axis of blocks first, of
    NumPy unless they are JAX's.
    """
    flat: dict[tuple[str, ...], Any] = {}
    blocks: dict[tuple[str, ...], dict[int, Any]] = {}
    for path, array in flatten_dict(params).items():
        for at, key in enumerate(path):
            if found := _BLOCK.fullmatch(key):
                whole = (*path[:at], found[1], *path[at + 1 :])
                blocks.setdefault(whole, {})[int(found[2])] = array
                break
        else:
            flat[path] = array
    for path, of in blocks.items():
        stack: Any = jnp.stack if isinstance(of[0], jax.Array) else np.stack
        flat[path] = stack([of[i] for i in range(len(of))])
    return unflatten_dict(flat)


def unstack_blocks(params: Any) -> Any:
    """Undoes `stack_blocks`; leaves weights alone that are not stacked."""
    flat = {}
    for path, array in flatten_dict(params).items():
        at = next((i for i, key in enumerate(path) if key in STACKS), None)
        if at is None:
            flat[path] = array
            continue
        for i, row in enumerate(array):
            flat[(*path[:at], f"{path[at]}_{i}", *path[at + 1 :])] = row
    return unflatten_dict(flat)


def in_stack(path: tuple[Any, ...]) -> bool:
    """Whether a key path of `jax.tree_util` leads to an array of `stack_blocks`."""
    return any(getattr(key, "key", None) in STACKS for key in path)


def in_block(path: tuple[Any, ...]) -> bool:
    """Whether a key path of `jax.tree_util` leads to a weight of a block, stacked or not."""
    keys = [str(getattr(key, "key", "")) for key in path]
    return in_stack(path) or any(map(_BLOCK.fullmatch, keys))
