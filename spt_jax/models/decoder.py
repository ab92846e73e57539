"""A decoder or an encoder in Flax Linen: embeddings, scanned layers, and the output matrix."""

import collections
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from spt_jax.errors import ConfigError
from spt_jax.models.attention import (
    Cache,
    GatedPrefix,
    LinearMemory,
    Prefix,
    Stream,
    soft_capped,
    visible,
    within_window,
)
from spt_jax.models.block import Block
from spt_jax.models.config import DecoderConfig, Stack, group_names, kv_sources, layer_configs, periods
from spt_jax.models.disentangled import Distances, distances_of
from spt_jax.models.edits import HiddenEdits
from spt_jax.models.kernels import Kernel
from spt_jax.models.layers import ACTIVATIONS, Linear, Norm, scaled, table_param, table_rows, take_rows
from spt_jax.models.layout import Group, Layout, StateGroup
from spt_jax.models.memory import KeysValues, Memory, keys_values
from spt_jax.models.output_matrix import matrix_products
from spt_jax.models.per_layer import PerLayerEmbedding
from spt_jax.models.recurrence import TokenOrder, token_order
from spt_jax.models.ring import splits
from spt_jax.models.rope import rotation
from spt_jax.models.self_attention import ATTENTION, LayerInputs, SharedInputs, SourceLayer, of_row
from spt_jax.models.stacks import Remat, Remembered, init_period, joined, run_period


class Decoder(nn.Module):
    """Embeddings, scanned layers, final norm and output matrix of a causal language model, or of an encoder.

    Its parameters are a plain dict: `embedding` [V, D], `positions` [max_positions, D] if learned, `layers` with all
    leaves stacked [L, ...], `final_norm`, and `output` [D, V] if untied. Of a quantized base, `embedding` and `output`
    are `TableArray`s [V, D].
    """

    config: DecoderConfig
    remat: Remat = "dots"
    mesh: Mesh | None = None
    attention: Kernel = "xla"

    def setup(self) -> None:
        config = self.config
        self.embedding = table_param(self, "embedding", (config.vocab_size, config.input_width))
        if config.learned_positions:
            self.position_embedding = self.param(
                "positions", nn.initializers.normal(0.02), (config.max_positions, self.entry_width)
            )
        if not config.tied and config.output_head != "none":
            self.output = table_param(self, "output", (config.input_width, config.vocab_size))
        if config.logit_bias:
            self.logit_bias = self.param("logit_bias", nn.initializers.zeros, (config.vocab_size,))
        if config.embedding_width is not None:
            self.input_map = Linear(config.width, config.input_map_bias)
            if config.output_head == "matrix":
                self.output_map = Linear(config.embedding_width)
        if config.embedding_norm:
            self.embedding_norm = Norm(config)
        if config.final_norm:
            self.final_norm = Norm(config)
        if config.per_layer is not None:
            self.per_layer = PerLayerEmbedding(config, self.mesh)
        if config.token_types:
            self.token_types = self.param(
                "token_types", nn.initializers.normal(0.02), (config.token_types, self.entry_width)
            )
        if config.disentangled is not None:
            self.distance_embedding = self.param(
                "distances", nn.initializers.normal(0.02), (2 * config.disentangled.span, config.width)
            )
            if config.disentangled.normed:
                self.distance_norm = Norm(config)
        if config.output_head == "masked":
            self.head_map = Linear(config.input_width, config.mlp_bias)
            self.head_norm = Norm(config)

    @property
    def entry_width(self) -> int:
        """The width of the inputs to which position embeddings are added."""
        return self.config.input_width if self.config.embedding_norm else self.config.width

    def embed(self, ids: Int[Array, "*B T"]) -> Float[Array, "*B T D"]:
        """Returns rows of the embedding table, scaled in families that do; ids must be in [0, V)."""
        table = self.embedding
        rows = take_rows(self.mesh, table, ids) if ids.ndim == 2 else table_rows(table, ids)
        return scaled(rows, self.config.embedding_scale)

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Returns the logits of the next token, or of a masked one, in float32 for hidden states from `__call__`.

        Raises:
          ConfigError: the model has no output matrix.
        """
        config = self.config
        with jax.named_scope("logits"):
            hidden = self.before_output(hidden)
            matrix = self.embedding if config.tied else self.output
            logits = matrix_products(hidden, matrix, by_token=config.tied)
            logits = logits if config.logit_scale is None else logits * config.logit_scale
            if config.logit_bias:
                bias = self.logit_bias.astype(jnp.float32)
                logits = logits + bias.reshape((1,) * (logits.ndim - 1) + (-1,))
            return soft_capped(logits, config.logit_cap)

    def before_output(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B _"]:
        """Returns what the output matrix multiplies, given hidden states from `__call__`.

        Raises:
          ConfigError: the model has no output matrix.
        """
        config = self.config
        if config.output_head == "none":
            raise ConfigError(f"this {config.family} base has no output matrix; train a task head (task.name)")
        if config.output_head == "matrix":
            return hidden
        return self.head_norm(ACTIVATIONS[config.activation](self.head_map(hidden)))

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        rows: Stream,
        prefix: Prefix | None = None,
        cache: Cache | None = None,
        gated: GatedPrefix | None = None,
        linear: LinearMemory | None = None,
        edits: HiddenEdits | None = None,
        *,
        return_memory: bool = False,
        return_hidden: bool = True,
    ) -> tuple[Float[Array, "B T _"] | None, Memory | None]:
        """Runs the layers; arguments and results are those of `Model.run`."""
        config = self.config
        remembered = _remembered(config, rows, prefix, cache, gated, linear)
        ring = cache is None and splits(self.mesh, rows)
        by_layer = self.by_layer(x, rows)
        if edits is not None and rows.prompt_index is not None:
            edits = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), edits)
        rows = dataclasses.replace(rows, ids=None)  # No layer reads them.
        x, own = self.enter(x, rows), []
        orders, distances = _orders(config, rows), self.distances(x, rows)
        sources: dict[int, KeysValues] = {}
        before: collections.Counter[str] = collections.Counter()  # Layers of each group in earlier periods.
        for period in periods(config):
            if not (return_hidden or period.groups()):
                continue
            inputs = tuple(_layer_inputs(config, stack, return_hidden, by_layer, edits) for stack in period.stacks)
            shared = tuple(
                dataclasses.replace(
                    _shared_inputs(stack, rows, prefix, cache, orders, ring=ring),
                    source=_source_layer(config, stack, sources, remembered),
                    distances=distances,
                )
                for stack in period.stacks
            )
            blocks = [Block(stack.config, self.mesh, self.attention, parent=None) for stack in period.stacks]
            if self.has_variable("params", period.name):
                params = self.get_variable("params", period.name)
            else:
                params = self.param(period.name, init_period, period, blocks, x, inputs, shared)
            x, outputs = run_period(
                period,
                blocks,
                params,
                x,
                inputs,
                shared,
                remembered,
                before,
                sources=kv_sources(config),
                remat=self.remat,
                return_memory=return_memory,
                return_weights=self.is_mutable_collection(ATTENTION),
            )
            for path, weights in (outputs.weights or {}).items():
                self.put_variable(ATTENTION, path, weights)
            before.update({name: period.repeats * count for name, count in period.groups().items()})
            sources |= outputs.read
            own.append(outputs.memory or {})
        return self.leave(x) if return_hidden else None, joined(own) if return_memory else None

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
        mapped = config.embedding_width is not None
        if mapped and not config.embedding_norm:
            x = self.input_map(x)
        x = scaled(x, config.input_scale)
        if config.learned_positions:
            x = x + jnp.take(self.position_embedding, rows.positions, axis=0, mode="clip").astype(x.dtype)
        if config.token_types:
            table = self.token_types.astype(x.dtype)
            types = None if config.token_types == 1 else rows.types
            x = x + (table[0].reshape(1, 1, -1) if types is None else jnp.take(table, types, axis=0))
        if not config.embedding_norm:
            return x
        x = self.embedding_norm(x)
        return self.input_map(x) if mapped else x

    def distances(self, x: Float[Array, "B T D"], rows: Stream) -> Distances | None:
        """Returns the distances between the tokens of a row, in the dtype of x, in families that embed them."""
        config = self.config
        if config.disentangled is None:
            return None
        embeddings = self.distance_embedding.astype(x.dtype)
        embeddings = self.distance_norm(embeddings) if config.disentangled.normed else embeddings
        return distances_of(config.disentangled, embeddings, rows.positions)

    def leave(self, x: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
        """Returns hidden states for `logits`."""
        x = self.final_norm(x) if self.config.final_norm else x
        mapped = self.config.embedding_width is not None and self.config.output_head == "matrix"
        return self.output_map(x) if mapped else x


def _remembered(
    config: DecoderConfig,
    rows: Stream,
    prefix: Prefix | None,
    cache: Cache | None,
    gated: GatedPrefix | None,
    linear: LinearMemory | None,
) -> Remembered:
    def layers_first(tree: Any) -> Any:
        return tree if rows.prompt_index is None else jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), tree)

    return Remembered(
        prefix=None if prefix is None else layers_first(prefix.memory),
        cache=None if cache is None else cache.memory,
        gated=None if gated is None else _for_all_layers(config, layers_first((gated.memory, gated.gates))),
        linear=None if linear is None else layers_first(linear.maps),
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
    config: DecoderConfig,
    stack: Stack,
    return_hidden: bool,
    by_layer: Float[Array, "L B T d"] | None,
    edits: HiddenEdits | None,
) -> LayerInputs:
    last = max(layer for layer, name in enumerate(group_names(config)) if name)
    return LayerInputs(
        last=None if return_hidden else _flags((last,), stack),
        rotates=_flags(config.no_rope_layers, stack, invert=True),
        windowed=None if _all_windowed(stack) else _flags(stack.config.window_layers, stack),
        by_layer=None if by_layer is None else _of_stack(stack, by_layer),
        edits=jax.tree.map(functools.partial(_of_stack, stack), edits),
    )


def _of_stack(stack: Stack, array: Float[Array, "N ..."]) -> Float[Array, "L ..."]:
    """Returns the part of the layers of a stack, as slices: their gradient is not that of a gather."""
    runs = np.reshape(stack.layers, (-1, stack.run))
    apart = runs[1, 0] - runs[0, 0] if len(runs) > 1 else 1
    parts = [array[own[0] : own[-1] + 1 : apart] for own in runs.T]
    return parts[0] if len(parts) == 1 else jnp.stack(parts, axis=1).reshape(-1, *array.shape[1:])


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
    of_prefix: tuple[Array | None, Array | None, Array | None] = (None, None, None)
    if prefix is not None:
        of_prefix = *of_row(rows.prompt_index, (prefix.positions, prefix.pinned)), prefix.segments
    inputs = functools.partial(SharedInputs, cos_sin, local, rows, order, *of_prefix)
    if ring:
        return inputs((), None, None)
    sources: list[tuple[Array, Array | None, Array | None]] = [(rows.positions, rows.segments, rows.pinned)]
    if cache is not None:
        sources.insert(0, (cache.positions, cache.segments, cache.pinned))
    if of_prefix[0] is not None:
        shape = (rows.positions.shape[0], of_prefix[0].shape[-1])
        positions, pinned, segments = jax.tree.map(lambda a: jnp.broadcast_to(a, shape), of_prefix)
        sources.insert(0, (positions, segments, pinned))
    key_positions = tuple(positions for positions, *_ in sources) if config.biased else ()
    causal = config.causal
    masks = tuple(visible(rows, positions, segments, causal=causal) for positions, segments, _ in sources)
    if not config.window_layers:
        return inputs(key_positions, masks, None)
    windows = [within_window(rows, positions, config.window, pinned, causal=causal) for positions, _, pinned in sources]
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
    return Layout(
        config.vocab_size,
        config.input_width,
        config.max_positions,
        groups,
        windowed=bool(config.window_layers),
        causal=config.causal,
        pooling=config.pooling,
        predicts_tokens=config.output_head != "none",
        hidden_width=None if config.output_head == "matrix" else config.width,
        layer_count=config.layers,
        layer_width=config.width,
    )
