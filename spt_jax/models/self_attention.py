"""Self-attention of one layer of a decoder, and what a layer is given."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from spt_jax.models.attention import Scoring, Source, Stream, alibi_slopes, attend, attention_weights, linear_term
from spt_jax.models.config import DecoderConfig
from spt_jax.models.disentangled import Distances, distance_terms
from spt_jax.models.edits import HiddenEdits
from spt_jax.models.kernels import Kernel
from spt_jax.models.layers import Linear, Norm, linear, scaled
from spt_jax.models.memory import KeysValues, State, from_cache
from spt_jax.models.recurrence import TokenOrder
from spt_jax.models.ring import ring_attend
from spt_jax.models.rope import query_scale, rotate

# Variable collection for attention weights; they are stored only if the caller makes it mutable.
ATTENTION = "attention_weights"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerInputs:
    """Inputs that differ between layers. A field that no layer needs is None; flags are scanned along layers.

    Attributes:
      last: True for the last layer if only its keys and values are needed.
      rotates: whether the layer uses RoPE; None for always.
      windowed: whether the layer uses the sliding window; None if all layers of the stack do, or none.
      prefix: keys and values of the prefix.
      cache: keys and values of the cache.
      state: the state of a recurrent part before the rows: that after the cache, or that after the prefix; None for
        zeros.
      gated: keys and values of the gated prefix, and the gate, which is 0 for layers without one.
      linear: the map of a `LinearMemory`.
      by_layer: the layer's embeddings of the tokens.
      edits: the edit of the layer's output.
    """

    last: Bool[Array, "*L"] | None
    rotates: Bool[Array, "*L"] | None
    windowed: Bool[Array, "*L"] | None
    prefix: KeysValues | None = None
    cache: KeysValues | None = None
    state: State | None = None
    gated: tuple[KeysValues, Float[Array, "*L"]] | None = None
    linear: Float[Array, "*L K H Hv"] | None = None
    by_layer: Float[Array, "*L B T d"] | None = None
    edits: HiddenEdits | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SourceLayer:
    """What layers without keys and values of their own read of an earlier layer.

    Attributes:
      own: its keys and values of the row.
      prefix: its keys and values of the prefix.
      cache: its keys and values of the cache.
    """

    own: KeysValues
    prefix: KeysValues | None
    cache: KeysValues | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SharedInputs:
    """Inputs that all layers of a stack share.

    Attributes:
      cos_sin: cosines and sines of RoPE; None for layers without RoPE.
      local_cos_sin: those of layers with a sliding window, if they differ.
      stream: positions and segments of the tokens.
      order: the order of the tokens, for recurrent layers.
      prefix_positions: positions of the prefix, [P], or [B, P] if each row has its own prompt.
      prefix_pinned: the positions of the prefix that a window never hides, likewise; None for none.
      prefix_segments: the segments of the prefix, if it has some: its axes are then those of a cache.
      key_positions: positions of the keys of each source, [B, S], for ALiBi.
      masks: attention masks of the sources in the order prefix, cache, row; None if rows are split over devices.
      window_masks: the same with the sliding window, if some layers of the stack have it and some do not.
      source: the layer whose keys and values the layers of the stack read in place of their own.
      distances: between the tokens of the rows, for disentangled attention.
    """

    cos_sin: tuple[Array, Array] | None
    local_cos_sin: tuple[Array, Array] | None
    stream: Stream
    order: TokenOrder | None
    prefix_positions: Int[Array, "*B P"] | None
    prefix_pinned: Bool[Array, "*B P"] | None
    prefix_segments: Int[Array, " P"] | None
    key_positions: tuple[Array, ...]
    masks: tuple[Array, ...] | None
    window_masks: tuple[Array, ...] | None
    source: SourceLayer | None = None
    distances: Distances | None = None


def of_row(prompt_index: Int[Array, " B"] | None, tree: Any) -> Any:
    """Selects the prompt of each row, [S, ...] to [B, ...]. Without `prompt_index`, returns the tree as it is."""
    return tree if prompt_index is None else jax.tree.map(lambda a: jnp.take(a, prompt_index, axis=0), tree)


def _choose(flag: Bool[Array, ""] | None, yes: Any, no: Any) -> Any:
    """Returns `yes` if the flag of this layer is set or there are no flags, else `no`."""
    return yes if flag is None else jax.tree.map(lambda a, b: jnp.where(flag, a, b), yes, no)


def unless_last(module: nn.Module, layer: LayerInputs, function: Any, x: Array) -> Array:
    """Returns `function(module, x)`, of the shape of x; if `layer.last` is set, skips it and returns x."""
    return function(module, x) if layer.last is None else nn.cond(layer.last, lambda _, x: x, function, module, x)


class Attention(nn.Module):
    """Self-attention of one layer over prefix, cache and row. Also returns the keys and values of the row.

    A layer with a `kv_source` has no keys and values of its own, and returns those that it reads.
    """

    config: DecoderConfig
    mesh: Mesh | None
    kernel: Kernel

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], layer: LayerInputs, shared: SharedInputs) -> tuple[Array, KeysValues]:
        config = self.config
        x = scaled(x, config.attention_input_scale)
        if shared.source is None:
            keys, values = self.keys_values(x)
            own = KeysValues(self.placed_keys(keys, layer, shared), values)
        else:
            own = shared.source.own
            layer = dataclasses.replace(layer, prefix=shared.source.prefix, cache=shared.source.cache)

        def attended(module: nn.Module, x: Array) -> Array:
            queries = self.queries(x, layer, shared)
            scale = None if config.rope is None else query_scale(config.rope, shared.stream.positions)
            if scale is not None:
                queries = (queries * scale).astype(queries.dtype)
            return self.output(self.attend(queries, own, layer, shared), x)

        return unless_last(self, layer, attended, x), own

    def placed_keys(
        self, keys: Float[Array, "B T K H"], layer: LayerInputs, shared: SharedInputs
    ) -> Float[Array, "B T K H"]:
        """Returns keys as the layer remembers them."""
        return self.placed(keys, "key", layer, shared)

    def queries(self, x: Float[Array, "B T D"], layer: LayerInputs, shared: SharedInputs) -> Float[Array, "B T N H"]:
        """Returns the queries of x."""
        return self.placed(self.project(x, "query", self.config.heads), "query", layer, shared)

    def output(self, out: Float[Array, "B T N Hv"], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns the layer's output for the weighted sums of values."""
        config = self.config
        if config.attention_gate:
            out = out * jax.nn.sigmoid(self.project(x, "gate", config.heads))
        out = out.reshape(*out.shape[:2], config.heads * config.head_size)
        return scaled(Linear(config.width, config.output_bias, name="output")(out), config.attention_output_scale)

    @nn.compact
    def remembered(self, x: Float[Array, "B T D"]) -> KeysValues:
        """Returns the keys and values of x without RoPE."""
        keys, values = self.keys_values(scaled(x, self.config.attention_input_scale))
        return KeysValues(self.norm("key")(keys) if self.config.qk_norm in ("head", "heads") else keys, values)

    def keys_values(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K Hv"]]:
        """Returns keys before their norm by head, and values."""
        config = self.config
        keys = self.project(x, "key", config.kv_heads)
        values = keys if config.value_is_key else self.project(x, "value", config.kv_heads)
        if config.value_norm:
            values = Norm(config, use_scale=False, use_bias=False)(values)
        return scaled(keys, config.key_scale), values

    def project(self, x: Float[Array, "B T D"], name: str, heads: int) -> Float[Array, "B T N H"]:
        """Returns a linear map of x by heads."""
        config = self.config
        y = Linear(heads * config.head_size, config.qkv_bias, name=name)(x)
        if config.qk_norm == "whole" and name in ("query", "key"):
            y = self.norm(name)(y)
        if config.clip_qkv is not None:
            y = jnp.clip(y, -config.clip_qkv, config.clip_qkv)
        return y.reshape(*x.shape[:2], heads, config.head_size)

    def norm(self, name: str) -> Norm:
        """The norm of queries or keys."""
        heads = self.config.heads if name == "query" else self.config.kv_heads
        shape = (heads, self.config.head_size) if self.config.qk_norm == "heads" else None
        return Norm(self.config, shape, use_bias=False, name=f"{name}_norm")

    def placed(
        self, y: Float[Array, "B T N H"], name: str, layer: LayerInputs, shared: SharedInputs
    ) -> Float[Array, "B T N H"]:
        """Normalizes queries or keys by head and rotates them, where the config says so."""
        config = self.config
        by_head = config.qk_norm in ("head", "heads")
        if by_head and not config.qk_norm_after_rope:
            y = self.norm(name)(y)
        if shared.cos_sin is not None:
            assert config.rope is not None
            cos_sin = shared.cos_sin
            if shared.local_cos_sin is not None:
                cos_sin = _choose(layer.windowed, shared.local_cos_sin, cos_sin)
            y = _choose(layer.rotates, rotate(y, cos_sin, interleaved=config.rope.interleaved), y)
        return self.norm(name)(y) if by_head and config.qk_norm_after_rope else y

    def attend(
        self, queries: Float[Array, "B T N H"], own: KeysValues, layer: LayerInputs, shared: SharedInputs
    ) -> Float[Array, "B T N Hv"]:
        """Attends to prefix, cache and row, and adds what the gated prefix and the linear memory contribute."""
        config, stream = self.config, shared.stream
        scoring = Scoring(config.score_scale or config.head_size**-0.5, config.score_cap)
        prefix, gated, linear = of_row(stream.prompt_index, (layer.prefix, layer.gated, layer.linear))
        prefix, cache = jax.tree.map(lambda a: a.astype(queries.dtype), (prefix, layer.cache))
        if shared.masks is None:
            assert self.mesh is not None
            window = config.window if config.window_layers else 0
            places = stream, prefix, shared.prefix_positions, shared.prefix_pinned
            options = {"window": window, "windowed": layer.windowed, "scoring": scoring}
            out = ring_attend(self.mesh, queries, own, *places, **options)
        else:
            masks = shared.masks
            if prefix is not None and shared.prefix_segments is not None:
                prefix = from_cache(prefix, masks[0].shape[-1])
            if cache is not None:
                slots = masks[-2].shape[-1]  # The last mask is that of the row itself.
                cache = from_cache(cache, slots)
            if shared.window_masks is not None:
                masks = _choose(layer.windowed, shared.window_masks, masks)
            pairs = [pair for pair in (prefix, cache, own) if pair is not None]
            biases: list[Array | None] = [self.bias(positions) for positions in shared.key_positions]
            if shared.distances is not None:
                # Keys of a prefix are at no distance from a token: their scores have no terms of distances.
                terms = self.distance_terms(queries, own.keys, shared.distances, scoring.scale)
                biases = [None] * (len(pairs) - 1) + [terms]
            sources = [
                Source(pair.keys, pair.values, mask, bias)
                for pair, mask, bias in zip(pairs, masks, biases or [None] * len(pairs), strict=True)
            ]
            sinks = self.param("sinks", nn.initializers.zeros, (config.heads,)) if config.sinks else None
            # A decoding step has few scores: a fused kernel has no benefit. It would copy shared prompts to each row.
            kernel = self.kernel if queries.shape[1] > 1 and shared.prefix_segments is None else "xla"
            out = attend(queries, sources, scoring, sinks=sinks, kernel=kernel, mesh=self.mesh)
            if self.is_mutable_collection(ATTENTION):
                self.sow(ATTENTION, "weights", attention_weights(queries, sources, scoring, sinks))
                self.sow(ATTENTION, "queries", queries.astype(jnp.float32))
        out = out if gated is None else out + _gated_attention(queries, *gated)
        return out if linear is None else out + linear_term(queries, linear)

    def bias(self, key_positions: Int[Array, "B S"]) -> Float[Array, "B N 1 S"]:
        """Returns the ALiBi bias. A softmax does not change if all scores of a query do, so the keys are enough."""
        rounded = _to_bfloat16 if self.config.alibi_rounded else lambda x: x
        slopes = rounded(jnp.asarray(alibi_slopes(self.config.heads)))[None, :, None, None]
        positions = rounded(key_positions.astype(jnp.float32))[:, None, None, :]
        return rounded(slopes * positions) * self.config.alibi_scale

    def distance_terms(
        self, queries: Float[Array, "B T N H"], keys: Float[Array, "B T N H"], distances: Distances, scale: float
    ) -> Float[Array, "B N T T"]:
        """Returns the terms of the scores between the tokens of a row that depend on their distances."""
        config, own = self.config, self.config.disentangled
        assert own is not None

        def of_distances(name: str) -> Float[Array, "R N H"]:
            if own.shared:
                params = self.get_variable("params", name)
                y = linear(distances.embeddings, params["kernel"], params.get("bias"))
            else:
                size = config.heads * config.head_size
                y = Linear(size, config.qkv_bias, name=f"distance_{name}")(distances.embeddings)
            return y.reshape(-1, config.heads, config.head_size)

        return distance_terms(
            queries,
            keys,
            distances.rows,
            key=of_distances("key") if own.content_to_position else None,
            query=of_distances("query") if own.position_to_content else None,
            scale=scale,
        )


def _to_bfloat16(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Rounds x to bfloat16, in float32: XLA may leave out a cast to bfloat16 and back."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def _gated_attention(
    queries: Float[Array, "B T N H"], gated: KeysValues, gates: Float[Array, "*B"]
) -> Float[Array, "B T N Hv"]:
    """Returns the term that the gated prefix of one layer adds to its attention output."""
    shape = (*queries.shape[:2], gated.keys.shape[-3])
    source = Source(gated.keys.astype(queries.dtype), gated.values.astype(queries.dtype), jnp.ones(shape, bool))
    return gates.reshape(-1, 1, 1, 1).astype(queries.dtype) * attend(queries, [source])
