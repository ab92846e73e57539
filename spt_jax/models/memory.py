"""What layers keep of the tokens that they have seen, for later tokens: keys and values, or a recurrent state.

Code outside the models moves memory with `jax.tree.map` and the functions of this file. An operation along positions
leaves a recurrent state as it is, or replaces it by the later one, because a state has no positions.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from spt_jax.errors import ConfigError
from spt_jax.models.layout import Group, Layout, StateGroup


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeysValues:
    """Keys (after RoPE) and values of the layers of one group at P positions.

    The axes before P are the layers L, after them rows B if each row has its own, and before them S if there are S
    stacked prompts. In a cache, the axes are in the order of `to_cache`.

    Attributes:
      keys: keys of size H.
      values: values, whose size may differ.
    """

    keys: Float[Array, "*L P K H"]
    values: Float[Array, "*L P K Hv"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """The states of the recurrent layers of one group after the last token.

    Attributes:
      arrays: arrays whose leading axes are those before P in `KeysValues`.
    """

    arrays: PyTree[Float[Array, "..."]]


# By the name of the group.
Memory = Mapping[str, KeysValues | State]

# The axes of positions: of keys and values, and of each in a cache.
_POSITIONS, _CACHED_KEYS, _CACHED_VALUES = -3, -1, -2


def _along_positions(of_keys: Callable[..., Any], of_values: Callable[..., Any], *memories: Memory) -> Memory:
    """Applies functions to the keys and to the values of each group; the last of the states replaces the others."""

    def of_group(*own: KeysValues | State) -> KeysValues | State:
        pairs = [one for one in own if isinstance(one, KeysValues)]
        if pairs:
            return KeysValues(of_keys(*(pair.keys for pair in pairs)), of_values(*(pair.values for pair in pairs)))
        return jax.tree.map(lambda old, new: new.astype(old.dtype), own[0], own[-1])

    return {name: of_group(*(memory[name] for memory in memories)) for name in memories[-1]}


def length(memory: Memory) -> int:
    """Returns the number of positions of the keys and values; 0 if there are none."""
    return next((own.keys.shape[_POSITIONS] for own in keys_values(memory)), 0)


def keys_values(memory: Memory) -> list[KeysValues]:
    """Returns the keys and values of each group that has them."""
    return [own for own in memory.values() if isinstance(own, KeysValues)]


def states(memory: Memory) -> list[State]:
    """Returns the states of each group that has them."""
    return [own for own in memory.values() if isinstance(own, State)]


def by_layer(memory: Memory, layout: Layout) -> list[KeysValues]:
    """Returns the keys and values [P, K, H] of each layer that has them, in the order of the layers."""
    found = {
        layer: jax.tree.map(lambda array, place=place: array[place], memory[name])
        for name, group in layout.attention_groups.items()
        for place, layer in enumerate(group.layers)
    }
    return [found[layer] for layer in layout.attention_layers]


def spec(groups: Mapping[str, Group], positions: int) -> Memory:
    """Returns the shapes of the keys and values of one prompt, float32."""

    def of_group(group: Group) -> KeysValues:
        axes = len(group.layers), positions, group.kv_heads
        arrays: Any = (jax.ShapeDtypeStruct((*axes, size), jnp.float32) for size in (group.key_size, group.value_size))
        return KeysValues(*arrays)

    return {name: of_group(group) for name, group in groups.items()}


def state_spec(groups: Mapping[str, StateGroup]) -> Memory:
    """Returns the shapes of the states of one prompt, float32."""

    def of_group(group: StateGroup) -> State:
        axes, dtype = len(group.layers), jnp.float32
        return State({name: jax.ShapeDtypeStruct((axes, *shape), dtype) for name, shape in group.shapes})

    return {name: of_group(group) for name, group in groups.items()}


def empty_cache(
    layout: Layout, rows: int, capacity: int, dtype: DTypeLike, names: Sequence[str] | None = None
) -> Memory:
    """Returns zeros for the cache of a model; only for the groups with these names, if they are given."""

    def of_group(name: str) -> KeysValues | State:
        group = layout.groups[name]
        axes = len(group.layers), rows
        if isinstance(group, Group):
            heads = *axes, group.kv_heads
            keys = jnp.zeros((*heads, group.key_size, capacity), dtype)
            return KeysValues(keys, jnp.zeros((*heads, capacity, group.value_size), dtype))
        return State({key: jnp.zeros((*axes, *shape), dtype) for key, shape in group.shapes})

    return {name: of_group(name) for name in layout.groups if names is None or name in names}


def shardings(groups: Mapping[str, Group | StateGroup], mesh: Mesh, heads: PartitionSpec, states: PartitionSpec) -> Any:
    """Returns a prefix tree of a memory: the sharding `heads` for keys and values, `states` for recurrent states."""
    kinds = {name: heads if isinstance(group, Group) else states for name, group in groups.items()}
    return {name: NamedSharding(mesh, kind) for name, kind in kinds.items()}


def cast(memory: Memory, dtype: DTypeLike) -> Memory:
    """Returns the memory in another precision."""
    return jax.tree.map(lambda array: array.astype(dtype), memory)


def of_all_layers(memory: Memory, layout: Layout) -> Memory:
    """Adds to the memory of one prompt what it lacks: states of zeros, and keys and values at no positions."""
    states = {name: group for name, group in layout.state_groups.items() if name not in memory}
    pairs = {name: group for name, group in layout.attention_groups.items() if name not in memory}
    absent = {**state_spec(states), **spec(pairs, 0)}
    return {**memory, **jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), absent)}


def concatenate(first: Memory, second: Memory) -> Memory:
    """Returns the memory of both, one after the other."""

    def both(*arrays: Array) -> Array:
        return jnp.concatenate(arrays, axis=_POSITIONS)

    return _along_positions(both, both, first, second)


def pad(memory: Memory, count: int) -> Memory:
    """Appends `count` positions of zeros."""

    def padded(array: Array) -> Array:
        return jnp.pad(array, [(0, count if axis == array.ndim + _POSITIONS else 0) for axis in range(array.ndim)])

    return _along_positions(padded, padded, memory)


def without_position(memory: Memory, position: int) -> Memory:
    """Removes one position."""

    def shorter(array: Array) -> Array:
        return jnp.delete(array, position, axis=_POSITIONS)

    return _along_positions(shorter, shorter, memory)


def stack_rows(memories: Sequence[Memory]) -> Memory:
    """Stacks the memories of several rows, of one length, along a new axis B."""
    return jax.tree.map(lambda *arrays: jnp.stack(arrays, axis=1), *memories)


def stack_prompts(memories: Sequence[Memory | None]) -> Memory:
    """Stacks the memories of prompts along a new axis S, each padded with zeros to the most positions.

    Raises:
      ConfigError: there are none, or they are for bases with other layers.
    """
    return _stacked(memories, axis=1, at_end=True)


def stack_last_layers(memories: Sequence[Memory | None]) -> Memory:
    """Stacks the memories of prompts for the last layers along a new axis S, each padded with zeros to the most layers.

    Raises:
      ConfigError: there are none, or they are for bases with other layers, or have different lengths.
    """
    return _stacked(memories, axis=0, at_end=False)


def _stacked(memories: Sequence[Memory | None], axis: int, at_end: bool) -> Memory:
    like = {name: own for memory in memories if memory is not None for name, own in memory.items()}

    def of_group(name: str) -> KeysValues | State:
        leaves, structure = jax.tree.flatten(like[name])
        absent = [None] * len(leaves)
        by_prompt = [
            absent if memory is None or name not in memory else jax.tree.leaves(memory[name]) for memory in memories
        ]
        padded_axis = 0 if isinstance(like[name], State) else axis
        stacked = [stack_padded(own, padded_axis, at_end=at_end) for own in zip(*by_prompt, strict=True)]
        return jax.tree.unflatten(structure, stacked)

    return {name: of_group(name) for name in like}


def stack_padded(
    arrays: Sequence[Array | np.ndarray | None], axis: int, *, at_end: bool = True
) -> Float[Array, "S ..."] | None:
    """Stacks arrays of prompts along a new first axis.

    Args:
      arrays: one per prompt; an absent one becomes zeros.
      axis: an array shorter than the others along this axis is padded with zeros.
      at_end: whether the padding comes after the array; otherwise before it.

    Returns:
      The stacked arrays; None if all are absent.

    Raises:
      ConfigError: shapes differ along other axes.
    """
    like = next((array for array in arrays if array is not None), None)
    if like is None:
        return None
    longest = max(array.shape[axis] for array in arrays if array is not None)
    empty = np.zeros([0 if i == axis else n for i, n in enumerate(like.shape)], np.float32)

    def padded(array: Array | np.ndarray | None) -> Array:
        present = jnp.asarray(empty if array is None else array)
        missing = longest - present.shape[axis]
        pads = [((0, missing) if at_end else (missing, 0)) if i == axis else (0, 0) for i in range(present.ndim)]
        return jnp.pad(present, pads)

    try:
        return jnp.stack([padded(array) for array in arrays])
    except ValueError as error:
        shapes = sorted({array.shape for array in arrays if array is not None})
        raise ConfigError(f"these prompts are not compatible: their arrays have the shapes {shapes}") from error


def to_cache(memory: Memory) -> Memory:
    """Returns the memory of rows as a `Cache` holds it: keys [L, B, K, H, C] and values [L, B, K, C, H]."""

    def keys(array: Array) -> Array:
        return jnp.moveaxis(array, _POSITIONS, _CACHED_KEYS)

    def values(array: Array) -> Array:
        return jnp.swapaxes(array, _POSITIONS, _CACHED_VALUES)

    return _along_positions(keys, values, memory)


def from_cache(cached: KeysValues, positions: int) -> KeysValues:
    """The inverse of `to_cache` for keys and values, up to the first positions."""
    keys, values = cached.keys[..., :positions], cached.values[..., :positions, :]
    return KeysValues(jnp.moveaxis(keys, _CACHED_KEYS, _POSITIONS), jnp.swapaxes(values, _POSITIONS, _CACHED_VALUES))


def put(cache: Memory, new: Memory, place: Int[Array, ""]) -> Memory:
    """Writes the memory of one token of every row, in the axes of a cache, at the same place of all rows."""
    write = jax.lax.dynamic_update_slice_in_dim
    return _along_positions(
        lambda old, own: write(old, own, place, axis=_CACHED_KEYS),
        lambda old, own: write(old, own, place, axis=_CACHED_VALUES),
        cache,
        new,
    )


def put_each(cache: Memory, new: Memory, places: Int[Array, " B"]) -> Memory:
    """Writes the memory of one token of every row, as the model returns it, at each row's own place."""
    rows = jnp.arange(places.shape[0])

    def of_token(array: Float[Array, "L B 1 K H"]) -> Float[Array, "B L K H"]:
        return jnp.swapaxes(array[:, :, 0], 0, 1)

    return _along_positions(
        lambda old, own: old.at[:, rows, :, :, places].set(of_token(own)),
        lambda old, own: old.at[:, rows, :, places].set(of_token(own)),
        cache,
        new,
    )


def put_runs(cache: Memory, new: Memory, places: Int[Array, "B T"]) -> Memory:
    """Writes the keys and values of T tokens of every row, as the model returns them, each at its own place.

    Args:
      cache: the memory of a cache without states.
      new: the memory of the tokens, [L, B, T, K, H].
      places: the place of each token in its row; a token whose place the cache does not have is left out.

    Returns:
      The new memory of the cache.
    """
    rows = jnp.arange(places.shape[0])[:, None]

    def of_tokens(array: Float[Array, "L B T K H"]) -> Float[Array, "B T L K H"]:
        return jnp.moveaxis(array, 0, 2)

    return _along_positions(
        lambda old, own: old.at[:, rows, :, :, places].set(of_tokens(own), mode="drop"),
        lambda old, own: old.at[:, rows, :, places].set(of_tokens(own), mode="drop"),
        cache,
        new,
    )


def put_places(cache: Memory, new: Memory, places: Int[Array, " P"]) -> Memory:
    """Writes the keys and values of one prompt to places of a memory in the axes of a cache without rows.

    Args:
      cache: keys [L, K, H, C] and values [L, K, C, H].
      new: keys and values [L, P, K, H].
      places: the place of each position; one that the cache does not have is left out.

    Returns:
      The new memory.
    """
    return _along_positions(
        lambda old, own: old.at[..., places].set(jnp.moveaxis(own, _POSITIONS, -1), mode="drop"),
        lambda old, own: old.at[:, :, places].set(jnp.swapaxes(own, 1, 2), mode="drop"),
        cache,
        new,
    )


def put_rows(cache: Memory, new: Memory, rows: Int[Array, " N"], places: slice) -> Memory:
    """Writes the memory of some rows, in the axes of a cache, at the same places of these rows."""

    def of_group(old: KeysValues | State, own: KeysValues | State) -> KeysValues | State:
        if isinstance(old, KeysValues) and isinstance(own, KeysValues):
            keys = old.keys.at[:, rows, ..., places].set(own.keys)
            return KeysValues(keys, old.values.at[:, rows, :, places].set(own.values))
        return jax.tree.map(lambda array, part: array.at[:, rows].set(part), old, own)

    return {name: of_group(cache[name], new[name]) for name in cache}


def take_row(cache: Memory, row: Int[Array, ""], positions: int) -> Memory:
    """Returns the memory of one row of a cache, in its axes, up to the first positions."""

    def own(array: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(array, row, 1, axis=1)

    rows = jax.tree.map(own, cache)
    return _along_positions(lambda keys: keys[..., :positions], lambda values: values[..., :positions, :], rows)


def put_row(cache: Memory, new: Memory, row: Int[Array, ""], place: Int[Array, ""]) -> Memory:
    """Writes the memory of one row, in the axes of a cache, from a place on."""

    def written(old: Array, own: Array, axis: int | None) -> Array:
        starts = [jnp.zeros_like(row)] * old.ndim
        starts[1] = row
        if axis is not None:
            starts[axis] = place
        return jax.lax.dynamic_update_slice(old, own.astype(old.dtype), starts)

    def of_group(old: KeysValues | State, own: KeysValues | State) -> KeysValues | State:
        if isinstance(old, KeysValues) and isinstance(own, KeysValues):
            keys = written(old.keys, own.keys, _CACHED_KEYS)
            return KeysValues(keys, written(old.values, own.values, _CACHED_VALUES))
        return jax.tree.map(lambda array, part: written(array, part, None), old, own)

    return {name: of_group(cache[name], new[name]) for name in cache}


def finite(memory: Memory) -> Memory:
    """Replaces values that are not finite by 0: a masked value has the weight 0, and 0 times inf is NaN."""

    def own(values: Array) -> Array:
        return jnp.where(jnp.isfinite(values), values, 0)

    return _along_positions(lambda keys: keys, own, memory)
