"""A causal decoder in Flax Linen: embeddings, scanned layers, and the output matrix."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from spt_jax.models.attention import Cache, GatedPrefix, Prefix, Stream, soft_capped, visible, within_window
from spt_jax.models.block import Block
from spt_jax.models.config import DecoderConfig, Period, Stack, group_names, kv_sources, layer_configs, periods
from spt_jax.models.kernels import Kernel
from spt_jax.models.layers import Linear, Norm, scaled, take_rows
from spt_jax.models.layout import Group, Layout, StateGroup
from spt_jax.models.memory import KeysValues, Memory, State, keys_values
from spt_jax.models.per_layer import PerLayerEmbedding
from spt_jax.models.recurrence import TokenOrder, token_order
from spt_jax.models.ring import splits
from spt_jax.models.rope import rotation
from spt_jax.models.self_attention import ATTENTION, LayerInputs, SharedInputs, SourceLayer, of_row

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
    """

    prefix: Memory | None
    cache: Memory | None
    gated: dict[str, tuple[KeysValues, Float[Array, "L ..."]]] | None

    def of_layer(self, stack: Stack, prompt_index: Int[Array, " B"] | None) -> dict[str, Any]:
        """Returns the fields of `LayerInputs` for the layer of a stack, if the axis is that of its group's stacks."""
        fields: dict[str, Any] = {}
        for group, place in zip(stack.groups, stack.places, strict=True):
            prefix, cache, gated = (
                None if field is None else jax.tree.map(lambda a, place=place: a[place], field.get(group))
                for field in (self.prefix, self.cache, self.gated)
            )
            if isinstance(prefix, State) or isinstance(cache, State):
                fields["state"] = of_row(prompt_index, prefix) if cache is None else cache
            else:
                fields |= {
                    name: own
                    for name, own in (("prefix", prefix), ("cache", cache), ("gated", gated))
                    if own is not None
                }
        return fields


class PeriodOfLayers(nn.Module):
    """The layers of one period in order: the body of the scan over its repeats.

    Besides the hidden states and the memory, it returns the keys and values of the stacks whose layers others read.
    """

    period: Period
    sources: tuple[int, ...]
    mesh: Mesh | None
    kernel: Kernel
    remat: Remat
    return_memory: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        inputs: tuple[LayerInputs, ...],
        remembered: Remembered,
        shared: tuple[SharedInputs, ...],
    ) -> tuple[Float[Array, "B T D"], tuple[Memory | None, tuple[KeysValues, ...]]]:
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if self.remat == "dots" else None
        kind: Any = Block if self.remat == "none" else nn.remat(Block, prevent_cse=False, policy=policy)
        own: dict[str, list[KeysValues | State]] = {}
        read: list[KeysValues] = []
        for i, stack in enumerate(self.period.stacks):
            block = kind(stack.config, self.mesh, self.kernel, name=str(i))
            if len(self.period.stacks) == 1:
                nn.share_scope(self, block)
            given = remembered.of_layer(stack, shared[i].stream.prompt_index)
            x, kept = block(x, dataclasses.replace(inputs[i], **given), shared[i])
            for group, part in zip(stack.groups, kept, strict=True):
                own.setdefault(group, []).append(part)
            if set(stack.layers) & set(self.sources):
                read.append(kept[0])
        memory = {name: _stack(parts) for name, parts in own.items()} if self.return_memory else None
        return x, (memory, tuple(read))


def _stack(parts: list[KeysValues | State]) -> KeysValues | State:
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *parts)


class Decoder(nn.Module):
    """Embeddings, scanned layers, final norm and output matrix of a causal language model.

    Its parameters are a plain dict: `embedding` [V, D], `positions` [max_positions, D] if learned, `layers` with all
    leaves stacked [L, ...], `final_norm`, and `output` [D, V] if untied.
    """

    config: DecoderConfig
    remat: Remat = "dots"
    mesh: Mesh | None = None
    attention: Kernel = "xla"

    def setup(self) -> None:
        config = self.config
        init = nn.initializers.normal(0.02)
        self.embedding = self.param("embedding", init, (config.vocab_size, config.input_width))
        if config.learned_positions:
            self.position_embedding = self.param("positions", init, (config.max_positions, config.width))
        if not config.tied:
            self.output = self.param("output", init, (config.input_width, config.vocab_size))
        if config.logit_bias:
            self.logit_bias = self.param("logit_bias", nn.initializers.zeros, (config.vocab_size,))
        if config.embedding_width is not None:
            self.input_map = Linear(config.width)
            self.output_map = Linear(config.embedding_width)
        if config.embedding_norm:
            self.embedding_norm = Norm(config)
        if config.final_norm:
            self.final_norm = Norm(config)
        if config.per_layer is not None:
            self.per_layer = PerLayerEmbedding(config, self.mesh)

    def embed(self, ids: Int[Array, "*B T"]) -> Float[Array, "*B T D"]:
        """Returns rows of the embedding table, scaled in families that do; ids must be in [0, V)."""
        rows = take_rows(self.mesh, self.embedding, ids) if ids.ndim == 2 else jnp.take(self.embedding, ids, axis=0)
        return scaled(rows, self.config.embedding_scale)

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Returns next-token logits in float32 for hidden states returned by `__call__`."""
        config = self.config
        with jax.named_scope("logits"):
            kernel = self.embedding.T if config.tied else self.output
            logits = jnp.dot(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
            logits = logits if config.logit_scale is None else logits * config.logit_scale
            if config.logit_bias:
                bias = self.logit_bias.astype(jnp.float32)
                logits = logits + bias.reshape((1,) * (logits.ndim - 1) + (-1,))
            return soft_capped(logits, config.logit_cap)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        rows: Stream,
        prefix: Prefix | None = None,
        cache: Cache | None = None,
        gated: GatedPrefix | None = None,
        *,
        return_memory: bool = False,
        return_hidden: bool = True,
    ) -> tuple[Float[Array, "B T D"] | None, Memory | None]:
        """Runs the layers; arguments and results are those of `Model.run`."""
        config = self.config
        remembered = _remembered(config, rows, prefix, cache, gated)
        ring = cache is None and splits(self.mesh, rows)
        by_layer = self.by_layer(x, rows)
        rows = dataclasses.replace(rows, ids=None)  # No layer reads them.
        x, own = self.enter(x, rows), []
        orders = _orders(config, rows)
        sources: dict[int, KeysValues] = {}
        for period in periods(config):
            if not (return_hidden or period.groups()):
                continue
            inputs = tuple(_layer_inputs(config, stack, return_hidden, by_layer) for stack in period.stacks)
            shared = tuple(
                dataclasses.replace(
                    _shared_inputs(stack, rows, prefix, cache, orders, ring=ring),
                    source=_source_layer(config, stack, sources, remembered),
                )
                for stack in period.stacks
            )
            in_axes: Any = (0, 0, nn.broadcast)
            scan = nn.scan(
                PeriodOfLayers,
                variable_axes={"params": 0, ATTENTION: 0},
                split_rngs={"params": True},
                in_axes=in_axes,
                length=period.repeats,
            )
            options = self.mesh, self.attention, self.remat, return_memory
            module = scan(period, kv_sources(config), *options, name=period.name)
            x, (found, read) = module(x, inputs, _of_period(remembered, config, period), shared)
            own.append(found)
            sources |= _read_layers(config, period, read)
        return self.leave(x) if return_hidden else None, _joined(own) if return_memory else None

    def by_layer(self, x: Float[Array, "B T E"], rows: Stream) -> Float[Array, "L B T d"] | None:
        """Returns the tokens' embeddings for each layer, in families that have some.

        Raises:
          ValueError: the stream has no ids.
        """
        if self.config.per_layer is None:
            return None
        if rows.ids is None:
            raise ValueError("this base has embeddings by layer, so that Stream.ids must hold the ids of the tokens")
        return self.per_layer(x, rows.ids)

    def enter(self, x: Float[Array, "B T E"], rows: Stream) -> Float[Array, "B T D"]:
        """Returns the input of the first layer for embeddings of real or virtual tokens."""
        config = self.config
        if config.embedding_width is not None:
            x = self.input_map(x)
        x = scaled(x, config.input_scale)
        if config.learned_positions:
            x = x + jnp.take(self.position_embedding, rows.positions, axis=0, mode="clip").astype(x.dtype)
        return self.embedding_norm(x) if config.embedding_norm else x

    def leave(self, x: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
        """Returns hidden states for `logits`."""
        x = self.final_norm(x) if self.config.final_norm else x
        return x if self.config.embedding_width is None else self.output_map(x)


def _remembered(
    config: DecoderConfig, rows: Stream, prefix: Prefix | None, cache: Cache | None, gated: GatedPrefix | None
) -> Remembered:
    def layers_first(tree: Any) -> Any:
        return tree if rows.prompt_index is None else jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), tree)

    return Remembered(
        prefix=None if prefix is None else layers_first(prefix.memory),
        cache=None if cache is None else cache.memory,
        gated=None if gated is None else _for_all_layers(config, layers_first((gated.memory, gated.gates))),
    )


def _for_all_layers(
    config: DecoderConfig, gated: tuple[Memory, Float[Array, "G ..."]]
) -> dict[str, tuple[KeysValues, Float[Array, "L ..."]]]:
    """Pads the keys, values and gates of the last G layers with attention to all layers, with gates of 0."""
    memory, gates = gated

    def padded(array: Array, count: int) -> Array:
        return jnp.pad(array, [(count - array.shape[0], 0)] + [(0, 0)] * (array.ndim - 1))

    def of_group(name: str, group: Group) -> tuple[KeysValues, Array]:
        places = [layout.attention_layers.index(layer) for layer in group.layers]
        own = memory.get(name) or KeysValues(*(jnp.zeros((0, *lead, group.kv_heads, n)) for n in _sizes(group)))
        pairs = jax.tree.map(lambda array: padded(array, len(places)), own)
        return pairs, all_gates if len(places) == len(all_gates) else all_gates[np.asarray(places)]

    layout = decoder_layout(config)
    all_gates = padded(gates, len(layout.attention_layers))
    lead = next(iter(keys_values(memory))).keys.shape[1:-2]
    return {name: of_group(name, group) for name, group in layout.attention_groups.items()}


def _sizes(group: Group) -> tuple[int, int]:
    return group.key_size, group.value_size


def _of_period(remembered: Remembered, config: DecoderConfig, period: Period) -> Remembered:
    """Returns the part of the layers of a period, by repeat and stack."""
    names = group_names(config)
    first = period.stacks[0].layers[0]

    def of_group(name: str, tree: Any) -> Any:
        before, stacks = sum(name in own for own in names[:first]), period.groups()[name]
        count = stacks * period.repeats

        def by_repeat(array: Array) -> Array:
            part = array if array.shape[0] == count else array[before : before + count]
            return part.reshape(period.repeats, stacks, *array.shape[1:])

        return jax.tree.map(by_repeat, tree)

    def of_field(field: Any) -> Any:
        return None if field is None else {name: of_group(name, field.get(name)) for name in period.groups()}

    return Remembered(of_field(remembered.prefix), of_field(remembered.cache), of_field(remembered.gated))


def _joined(parts: list[Memory]) -> Memory:
    """Returns what the layers of all periods remember, with the layers of each group as the leading axis."""

    def flat(array: Array) -> Array:
        return array.reshape(-1, *array.shape[2:])

    found: dict[str, list[Any]] = {}
    for part in parts:
        for name, own in part.items():
            found.setdefault(name, []).append(jax.tree.map(flat, own))
    return {
        name: own[0] if len(own) == 1 else jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *own)
        for name, own in found.items()
    }


def _read_layers(config: DecoderConfig, period: Period, read: tuple[KeysValues, ...]) -> dict[int, KeysValues]:
    """Returns the keys and values of the layers of a period that others read, by layer, from those of all repeats."""
    sources = set(kv_sources(config))
    stacks = [stack for stack in period.stacks if set(stack.layers) & sources]
    return {
        layer: jax.tree.map(lambda array, at=at: array[at], own)
        for stack, own in zip(stacks, read, strict=True)
        for at, layer in enumerate(stack.layers)
        if layer in sources
    }


def _source_layer(
    config: DecoderConfig, stack: Stack, sources: dict[int, KeysValues], remembered: Remembered
) -> SourceLayer | None:
    """Returns what the layers of a stack read of another layer; None if they have their own keys and values."""
    source = stack.config.kv_source
    if source is None:
        return None
    names = group_names(config)
    (name,) = names[source]
    at = sum(name in own for own in names[:source])

    def of_layer(memory: Memory | None) -> Any:
        return None if memory is None else jax.tree.map(lambda array: array[at], memory.get(name))

    return SourceLayer(sources[source], of_layer(remembered.prefix), of_layer(remembered.cache))


def _layer_inputs(
    config: DecoderConfig, stack: Stack, return_hidden: bool, by_layer: Float[Array, "L B T d"] | None
) -> LayerInputs:
    last = max(layer for layer, name in enumerate(group_names(config)) if name)
    return LayerInputs(
        last=None if return_hidden else _flags((last,), stack),
        rotates=_flags(config.no_rope_layers, stack, invert=True),
        windowed=None if _all_windowed(stack) else _flags(stack.config.window_layers, stack),
        by_layer=None if by_layer is None else by_layer[_slice(stack.layers)],
    )


def _slice(layers: tuple[int, ...]) -> slice:
    """Returns the slice of the layers of a stack, which are equally far apart."""
    return slice(layers[0], layers[-1] + 1, layers[1] - layers[0] if len(layers) > 1 else 1)


def _flags(layers: tuple[int, ...], stack: Stack, invert: bool = False) -> Bool[Array, " L"] | None:
    """Returns which layers of a stack are listed; None if none is."""
    chosen = [i in layers for i in stack.layers]
    return jnp.asarray([c != invert for c in chosen]) if any(chosen) else None


def _all_windowed(stack: Stack) -> bool:
    return set(stack.layers) <= set(stack.config.window_layers)


def _orders(config: DecoderConfig, rows: Stream) -> dict[int, TokenOrder]:
    """Returns the order of the tokens for recurrent layers, by the number of tokens that their states remember."""
    recurrent = {stack.config.recurrent for period in periods(config) for stack in period.stacks}
    widths = {one.convolution_width for one in recurrent if one is not None}
    return {width - 1: token_order(rows, width - 1) for width in sorted(widths)}


def _shared_inputs(
    stack: Stack,
    rows: Stream,
    prefix: Prefix | None,
    cache: Cache | None,
    orders: Mapping[int, TokenOrder],
    *,
    ring: bool,
) -> SharedInputs:
    """Returns the inputs that layers share. With ring attention there are no masks, as each device computes its own."""
    config = stack.config
    order = None if config.recurrent is None else orders[config.recurrent.convolution_width - 1]
    cos_sin, local = (
        None if rope is None else rotation(rope, config.head_size, rows.positions)
        for rope in (config.rope, config.local_rope)
    )
    of_prefix: tuple[Array | None, Array | None] = (None, None)
    if prefix is not None:
        of_prefix = of_row(rows.prompt_index, (prefix.positions, prefix.pinned))
    inputs = functools.partial(SharedInputs, cos_sin, local, rows, order, *of_prefix)
    if ring:
        return inputs((), None, None)
    sources: list[tuple[Array, Array | None, Array | None]] = [(rows.positions, rows.segments, rows.pinned)]
    if cache is not None:
        sources.insert(0, (cache.positions, cache.segments, cache.pinned))
    if of_prefix[0] is not None:
        shape = (rows.positions.shape[0], of_prefix[0].shape[-1])
        positions, pinned = jax.tree.map(lambda a: jnp.broadcast_to(a, shape), of_prefix)
        sources.insert(0, (positions, None, pinned))
    key_positions = tuple(positions for positions, *_ in sources) if config.biased else ()
    masks = tuple(visible(rows, positions, segments) for positions, segments, _ in sources)
    if not config.window_layers:
        return inputs(key_positions, masks, None)
    windows = [within_window(rows, positions, config.window, pinned) for positions, _, pinned in sources]
    window_masks = tuple(mask & window for mask, window in zip(masks, windows, strict=True))
    if _all_windowed(stack):
        return inputs(key_positions, window_masks, None)
    return inputs(key_positions, masks, window_masks)


@functools.lru_cache(maxsize=64)
def decoder_layout(config: DecoderConfig) -> Layout:
    """Returns the layout of a decoder."""
    shapes: dict[str, Group | StateGroup] = {}
    layers: dict[str, list[int]] = {}
    for i, (names, own) in enumerate(zip(group_names(config), layer_configs(config), strict=True)):
        for name in names:
            layers.setdefault(name, []).append(i)
        if not shapes.keys() >= set(names):
            shapes |= zip(names, own.remembers, strict=True)
    groups = {name: dataclasses.replace(shapes[name], layers=tuple(own)) for name, own in layers.items()}
    return Layout(config.vocab_size, config.input_width, config.max_positions, groups, bool(config.window_layers))
