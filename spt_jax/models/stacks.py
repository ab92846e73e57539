"""Runs the layers of a sequence that repeats: a scan over its repeats, and in it one over each run of equal layers."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from spt_jax.models.block import Block
from spt_jax.models.config import Period, Stack
from spt_jax.models.memory import KeysValues, Memory, State
from spt_jax.models.self_attention import ATTENTION, LayerInputs, SharedInputs, of_row

# What the backward pass recomputes: nothing; everything except the results of linear maps; each layer completely.
Remat = Literal["none", "dots", "full"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Remembered:
    """What layers are given of earlier tokens, by group, with the layers of the group as the leading axis.

    Attributes:
      prefix: keys and values, or states, of the prefix.
      cache: keys and values, or states, of the cache.
      gated: keys and values of the gated prefix, and gates, which are 0 for layers without one.
      linear: the maps of a `LinearMemory`.
    """

    prefix: Memory | None
    cache: Memory | None
    gated: dict[str, tuple[KeysValues, Float[Array, "L ..."]]] | None
    linear: Mapping[str, Float[Array, "L ..."]] | None = None

    def of_layer(self, groups: Sequence[str], prompt_index: Int[Array, " B"] | None) -> dict[str, Any]:
        """Returns the fields of `LayerInputs` for a layer, from what that layer is given of its groups."""
        fields: dict[str, Any] = {}
        for group in groups:
            prefix, cache, gated, linear = (
                None if field is None else field.get(group)
                for field in (self.prefix, self.cache, self.gated, self.linear)
            )
            if isinstance(prefix, State) or isinstance(cache, State):
                fields["state"] = of_row(prompt_index, prefix) if cache is None else cache
            else:
                fields |= {
                    name: own
                    for name, own in (("prefix", prefix), ("cache", cache), ("gated", gated), ("linear", linear))
                    if own is not None
                }
        return fields


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outputs:
    """What the layers of a period return besides the hidden states; None for what was not requested.

    Attributes:
      memory: what the layers of each group remember of the tokens, with layers as the leading axis.
      read: the keys and values of the layers that others read, by layer.
      weights: the attention "weights" and "queries" of the layers of each stack, by its path, with layers as the
        leading axis.
    """

    memory: Memory | None
    read: dict[int, KeysValues]
    weights: dict[str, dict[str, Float[Array, "L B T ..."]]] | None


def init_period(
    key: Array,
    period: Period,
    blocks: Sequence[Block],
    x: Float[Array, "B T D"],
    inputs: Sequence[LayerInputs],
    shared: Sequence[SharedInputs],
) -> dict[str, Any]:
    """Returns new parameters of the layers of a period, as `run_period` takes them."""

    def of_stack(i: int, stack: Stack) -> Any:
        keys = jax.random.split(jax.random.fold_in(key, i), len(stack.layers))
        return jax.vmap(lambda key: blocks[i].init(key, x, _at(inputs[i], 0), shared[i])["params"])(keys)

    found = [of_stack(i, stack) for i, stack in enumerate(period.stacks)]
    return found[0] if len(found) == 1 else {_name(stack): own for stack, own in zip(period.stacks, found, strict=True)}


def run_period(
    period: Period,
    blocks: Sequence[Block],
    params: Mapping[str, Any],
    x: Float[Array, "B T D"],
    inputs: Sequence[LayerInputs],
    shared: Sequence[SharedInputs],
    remembered: Remembered,
    before: Mapping[str, int],
    *,
    sources: Sequence[int] = (),
    remat: Remat = "none",
    return_memory: bool = False,
    return_weights: bool = False,
) -> tuple[Float[Array, "B T D"], Outputs]:
    """Runs the layers of a period.

    Args:
      period: the layers.
      blocks: for each stack, the module of one layer.
      params: the parameters of the period, with the layers of a stack as the leading axis.
      x: the input of the first layer.
      inputs: for each stack, the inputs that differ between its layers, with the layers as the leading axis.
      shared: for each stack, the inputs that its layers share.
      remembered: what the layers of all periods are given of earlier tokens.
      before: for each group, the number of its layers in earlier periods.
      sources: the layers whose keys and values others read.
      remat: what the backward pass recomputes.
      return_memory: also return what the layers remember of the tokens.
      return_weights: also return attention weights.
    """
    stacks, counts = period.stacks, period.groups()
    of_stacks = [params if len(stacks) == 1 else params[_name(stack)] for stack in stacks]
    is_source = [bool(set(stack.layers) & set(sources)) for stack in stacks]

    def layer_of(i: int, repeat: Int[Array, ""]) -> Any:
        stack = stacks[i]

        def layer(x: Array, own: Any) -> tuple[Array, Any]:
            place, weights, layer_inputs, prefix, gated, linear = own
            # A scan over slices that an outer scan has made would copy each weight twice.
            weights = weights if stack.run == 1 else _at(of_stacks[i], repeat * stack.run + place)
            cache = remembered.cache and {
                name: _at(remembered.cache[name], before.get(name, 0) + repeat * counts[name] + first + place)
                for name, first in zip(stack.groups, stack.places, strict=True)
                if name in remembered.cache
            }
            given = Remembered(prefix, cache, gated, linear).of_layer(stack.groups, shared[i].stream.prompt_index)
            layer_inputs = dataclasses.replace(layer_inputs, **given)
            mutable = [ATTENTION] if return_weights else []
            (x, kept), sown = blocks[i].apply({"params": weights}, x, layer_inputs, shared[i], mutable=mutable)
            return x, (kept, sown)

        return jax.checkpoint(layer, prevent_cse=False, policy=POLICIES[remat])

    def of_repeat(x: Array, given: Any) -> tuple[Array, Any]:
        repeat, weights, own_inputs, prefix, gated, linear = given
        memory: dict[str, list[Any]] = {}
        read, attention = [], []
        for i, stack in enumerate(stacks):
            own = own_inputs[i], *(_of_run(stack, field) for field in (prefix, gated, linear))
            if stack.run == 1:
                x, outputs = layer_of(i, repeat)(x, (0, weights[i], *own))
                kept, sown = jax.tree.map(lambda a: a[None], outputs)
            else:
                x, (kept, sown) = jax.lax.scan(layer_of(i, repeat), x, (jnp.arange(stack.run), None, *own))
            for name, part in zip(stack.groups, kept, strict=True):
                memory.setdefault(name, []).append(part)
            read.append(kept[0] if is_source[i] else None)
            attention.append(sown)
        return x, (_joined(memory) if return_memory else None, read, attention)

    def by_repeat(tree: Any, size: int) -> Any:
        return jax.tree.map(lambda a: a.reshape(period.repeats, size, *a.shape[1:]), tree)

    def of_period(field: Mapping[str, Any] | None) -> Any:
        return field and {
            name: by_repeat(_from(field[name], before.get(name, 0), size * period.repeats), size)
            for name, size in counts.items()
            if name in field
        }

    # The scan must slice the weights itself: what is computed from a slice is stored again for the backward pass.
    xs = (
        jnp.arange(period.repeats),
        [own if stack.run == 1 else None for own, stack in zip(of_stacks, stacks, strict=True)],
        [own if stack.run == 1 else by_repeat(own, stack.run) for own, stack in zip(inputs, stacks, strict=True)],
        of_period(remembered.prefix),
        of_period(remembered.gated),
        of_period(remembered.linear),
    )
    x, (memory, read, attention) = jax.lax.scan(of_repeat, x, xs)
    memory, read, attention = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), (memory, read, attention))
    by_layer = {
        layer: _at(own, stack.layers.index(layer))
        for stack, own in zip(stacks, read, strict=True)
        for layer in set(stack.layers) & set(sources)
    }
    weights = {
        stack.path: {name: values[0] for name, values in sown[ATTENTION]["attention"].items()}
        for stack, sown in zip(stacks, attention, strict=True)
        if ATTENTION in sown
    }
    return x, Outputs(memory, by_layer, weights if return_weights else None)


def joined(parts: Sequence[Memory]) -> Memory:
    """Joins what layers remember along the layers of each group."""
    found: dict[str, list[Any]] = {}
    for part in parts:
        for name, own in part.items():
            found.setdefault(name, []).append(own)
    return _joined(found)


def _joined(parts: Mapping[str, Sequence[Any]]) -> Memory:
    return {
        name: own[0] if len(own) == 1 else jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *own)
        for name, own in parts.items()
    }


def _saves_all_but_slices(primitive: Any, *_: Any, **__: Any) -> bool:
    """With this policy, the weights of each layer are not stored again for the backward pass."""
    return primitive.name not in ("dynamic_slice", "squeeze")


POLICIES = {
    "none": _saves_all_but_slices,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": None,
}


def _name(stack: Stack) -> str:
    return stack.path.split("/")[-1]


def _at(tree: Any, index: int | Int[Array, ""]) -> Any:
    """Returns what is at an index of the leading axis."""
    if isinstance(index, int):
        return jax.tree.map(lambda a: a[index], tree)
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), tree)


def _from(tree: Any, start: int, size: int) -> Any:
    return jax.tree.map(lambda a: a if a.shape[0] == size else a[start : start + size], tree)


def _of_run(stack: Stack, field: Mapping[str, Any] | None) -> Any:
    """Returns what the layers of a run are given, or its only layer, from what all layers of a repeat are given."""
    return field and {
        name: _at(field[name], first) if stack.run == 1 else _from(field[name], first, stack.run)
        for name, first in zip(stack.groups, stack.places, strict=True)
        if name in field
    }
