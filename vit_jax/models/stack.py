"""How a network goes through its equal blocks: one after the other or in a loop, which weights they
keep where, and what is kept for the way back."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.models.family import FAMILIES

# What of a block is computed again on the way back, in place of being kept from the way forwards:
# nothing, all but the products of tokens and weights, or all but what goes into the block.
REMAT: dict[str, Callable[..., bool] | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class BlockLoop:
    """How blocks are computed. What is computed stays the same, but for rounding and, with `scan`,
    the draws of dropout.

    Attributes:
      scan: the compiler sees one block and a loop (`jax.lax.scan`). The weights are those of
        `stack_blocks`.
      remat: one of REMAT.
      param_transform: what is done to each weight of a block where the block uses it, e.g. to one
        that is sharded; None for nothing.
    """

    scan: bool = False
    remat: str = "none"
    param_transform: Callable[[jax.Array], jax.Array] | None = None


def run_blocks(
    block: type[nn.Module],
    fields: Mapping[str, Any],
    x: jax.Array,
    *,
    name: str,
    depth: int,
    drop_path_rate: float,
    drop_path_mode: str = "linear",
    own: Mapping[str, Sequence[Any]] | None = None,
    loop: BlockLoop,
    deterministic: bool,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Applies `depth` blocks, one after the other, as parts of the module that calls it.

    Args:
      block, fields: their class and its fields. Called with x and the keywords deterministic and
        drop_path_rate, see `layers.DropPath`.
      drop_path_rate, drop_path_mode: "linear", the rate grows with depth, from 0 up to this one in
        the last block; "constant", all blocks have this one.
      own: further keywords that each block has its own value of, or other rates; in a loop the
        values are traced.
      x: goes into the first; all blocks keep its shape and type.
      name: one of the family's `ImageModel.blocks`.

    Returns:
      what comes out of the last, and out of each: {"NAME_0": ..., "NAME_1": ...}.
    """
    rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
    if drop_path_mode == "constant":
        rates = [drop_path_rate] * depth
    own = {"drop_path_rate": rates, **(own or {})}
    if loop.param_transform is not None:
        transform = functools.partial(jax.tree.map, loop.param_transform)
        block = nn.map_variables(block, "params", trans_in_fn=transform)

    def run(module: Any, x: jax.Array, values: Mapping[str, Any]) -> jax.Array:
        def apply(module: Any, x: jax.Array) -> jax.Array:
            return module(x, deterministic=deterministic, **values)

        if loop.remat != "none":  # In a loop the compiler can't merge what is computed twice.
            apply = nn.remat(apply, policy=REMAT[loop.remat], prevent_cse=not loop.scan)
        return apply(module, x)

    features = {}
    if not loop.scan:
        for i in range(depth):
            values = {key: row[i] for key, row in own.items()}
            x = features[f"{name}_{i}"] = run(block(**fields, name=f"{name}_{i}"), x, values)
        return x, features

    def step(module: Any, x: jax.Array, values: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        x = run(module, x, values | ({} if drop_path_rate else {"drop_path_rate": 0.0}))
        return x, x

    scan = nn.scan(
        step,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        length=depth,
    )
    values = {key: jnp.asarray(row, jnp.float32) for key, row in own.items()}
    x, outputs = scan(block(**fields, name=name), x, values)
    return x, {f"{name}_{i}": outputs[i] for i in range(depth)}


def stack_blocks(params: Any) -> Any:
    """A network's weights with those of all blocks in one tree, as `BlockLoop.scan` has them.

    Each "NAME_0/a", "NAME_1/a", ... becomes one array "NAME/a" with an axis of blocks first, of
    NumPy unless they are JAX's.
    """
    flat: dict[tuple[str, ...], Any] = {}
    blocks: dict[tuple[str, ...], dict[int, Any]] = {}
    for path, array in flatten_dict(params).items():
        for at, key in enumerate(path):
            if (index := _block_index(key)) is not None:
                stacked = (*path[:at], key.rpartition("_")[0], *path[at + 1 :])
                blocks.setdefault(stacked, {})[index] = array
                break
        else:
            flat[path] = array
    for path, arrays in blocks.items():
        stack: Any = jnp.stack if isinstance(arrays[0], jax.Array) else np.stack
        flat[path] = stack([arrays[i] for i in range(len(arrays))])
    return unflatten_dict(flat)


def unstack_blocks(params: Any) -> Any:
    """Undoes `stack_blocks`; leaves weights alone that are not stacked."""
    flat = {}
    for path, array in flatten_dict(params).items():
        at = next((at for at, key in enumerate(path) if key in _stacks()), None)
        if at is None:
            flat[path] = array
            continue
        for i, row in enumerate(array):
            flat[(*path[:at], f"{path[at]}_{i}", *path[at + 1 :])] = row
    return unflatten_dict(flat)


def in_stack(path: tuple[Any, ...]) -> bool:
    """Whether a key path of `jax.tree_util` leads to an array of `stack_blocks`."""
    return any(getattr(key, "key", None) in _stacks() for key in path)


def in_block(path: tuple[Any, ...]) -> bool:
    """Whether a key path of `jax.tree_util` leads to a weight of a block, stacked or not."""
    keys = [str(getattr(key, "key", "")) for key in path]
    return in_stack(path) or any(_block_index(key) is not None for key in keys)


def _stacks() -> set[str]:
    """The names of all blocks in one tree, of every family."""
    return {name for family in FAMILIES for name in family.blocks}


def _block_index(key: str) -> int | None:
    """The number of a block by its key in the tree, "encoderblock_7"; None if it is no block."""
    name, _, number = key.rpartition("_")
    return int(number) if name in _stacks() and number.isdecimal() else None
