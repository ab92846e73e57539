"""A causal decoder in Flax Linen: GPT-2 and the Llama family, layers stacked [L, ...] and scanned."""

import dataclasses
import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from spt_jax.models.attention import (
    Cache,
    GatedPrefix,
    Prefix,
    Scoring,
    Source,
    Stream,
    attend,
    attention_weights,
    from_cache,
    soft_capped,
    visible,
    within_window,
)
from spt_jax.models.config import DecoderConfig
from spt_jax.models.kernels import Kernel
from spt_jax.models.layers import Linear, Mlp, Norm, rotate, rotation
from spt_jax.models.ring import ring_attend, splits
from spt_jax.runtime.sharding import ROWS, constrain, row_shards

KeysValues = tuple[Float[Array, "*L B T K H"], Float[Array, "*L B T K H"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerInputs:
    """What differs from layer to layer, scanned along L. A field that no layer needs is None.

    last: set for the layer of which nothing but keys and values is wanted.
    """

    last: Bool[Array, " L"] | None
    rotates: Bool[Array, " L"] | None
    windowed: Bool[Array, " L"] | None
    prefix: tuple[Array, Array] | None
    cache: tuple[Array, Array] | None
    gated: GatedPrefix | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SharedInputs:
    """What all layers share.

    cos_sin: of rotations.
    stream: where tokens stand.
    prefix_positions: where the prefix's stand, [P] or [B, P] of each row's own prompt.
    masks: who sees whom, for each source in the order prefix, cache, row; None where rows are split over devices.
    window_masks: the same under the sliding window, if a layer has one.
    """

    cos_sin: tuple[Array, Array] | None
    stream: Stream
    prefix_positions: Int[Array, "*B P"] | None
    masks: tuple[Array, ...] | None
    window_masks: tuple[Array, ...] | None


def of_row(prompt_index: Int[Array, " B"] | None, tree: Any) -> Any:
    """[S, ...] to [B, ...]: each row's own prompt's part; as it is where all rows share one prompt."""
    return tree if prompt_index is None else jax.tree.map(lambda a: jnp.take(a, prompt_index, axis=0), tree)


def _choose(flag: Bool[Array, ""] | None, yes: Any, no: Any) -> Any:
    """`yes` where this layer's flag is set, or no layer has one."""
    return yes if flag is None else jax.tree.map(lambda a, b: jnp.where(flag, a, b), yes, no)


def _unless_last(module: nn.Module, layer: LayerInputs, function: Any, x: Array) -> Array:
    """`function(module, x)`, shaped like x; of a last layer, x itself in no time."""
    return function(module, x) if layer.last is None else nn.cond(layer.last, lambda _, x: x, function, module, x)


# The collection that attention weights are put into, where a caller asks for it.
ATTENTION = "attention_weights"


class Attention(nn.Module):
    """Self-attention of one layer over prefix, cache and the row itself. Returns the row's keys and values too."""

    config: DecoderConfig
    mesh: Mesh | None
    kernel: Kernel

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], layer: LayerInputs, shared: SharedInputs) -> tuple[Array, KeysValues]:
        config = self.config
        batch, length, _ = x.shape
        scoring = Scoring(config.score_scale or config.head_size**-0.5, config.score_cap)

        def heads(x: Array, name: str, count: int) -> Array:
            y = Linear(count * config.head_size, config.qkv_bias, name=name)(x)
            return y.reshape(batch, length, count, config.head_size)

        def placed(x: Array, name: str, count: int) -> Array:
            y = heads(x, name, count)
            y = Norm(config, name=f"{name}_norm")(y) if config.qk_norm else y
            return y if shared.cos_sin is None else _choose(layer.rotates, rotate(y, shared.cos_sin), y)

        keys, values = placed(x, "key", config.kv_heads), heads(x, "value", config.kv_heads)

        def attended(module: nn.Module, x: Array) -> Array:
            queries = placed(x, "query", config.heads)
            prefix, gated = of_row(shared.stream.prompt_index, (layer.prefix, layer.gated))
            prefix, cache = jax.tree.map(lambda a: a.astype(x.dtype), (prefix, layer.cache))
            if shared.masks is None:
                assert self.mesh is not None
                window = config.window if config.window_layers else 0
                places = shared.stream, prefix, shared.prefix_positions
                options = {"window": window, "windowed": layer.windowed, "scoring": scoring}
                out = ring_attend(self.mesh, queries, keys, values, *places, **options)
            else:
                masks = shared.masks
                if cache is not None:
                    held = masks[-2].shape[-1]  # the row's own mask is the last
                    cache = from_cache(cache[0][..., :held], cache[1][:, :, :held])
                if shared.window_masks is not None:
                    masks = _choose(layer.windowed, shared.window_masks, masks)
                pairs = [pair for pair in (prefix, cache, (keys, values)) if pair is not None]
                sources = [Source(k, v, mask) for (k, v), mask in zip(pairs, masks, strict=True)]
                # A step of decoding has few scores.
                kernel = self.kernel if length > 1 else "xla"
                out = attend(queries, sources, scoring, kernel=kernel, mesh=self.mesh)
                if self.is_mutable_collection(ATTENTION):
                    self.sow(ATTENTION, "weights", attention_weights(queries, sources, scoring))
            if gated is not None:
                out = out + _gated_attention(queries, gated)
            out = out.reshape(batch, length, config.heads * config.head_size)
            return Linear(config.width, config.output_bias, name="output")(out)

        return _unless_last(self, layer, attended, x), (keys, values)


def _gated_attention(queries: Float[Array, "B T N H"], gated: GatedPrefix) -> Float[Array, "B T N H"]:
    """What one layer's gated prefix adds to its attention."""
    shape = (*queries.shape[:2], gated.keys.shape[-3])
    source = Source(gated.keys.astype(queries.dtype), gated.values.astype(queries.dtype), jnp.ones(shape, bool))
    gates = gated.gates.reshape(-1, 1, 1, 1).astype(queries.dtype)
    return gates * attend(queries, [source])


class Block(nn.Module):
    """Pre-norm attention and MLP with residual connections: the body of the scan over layers."""

    config: DecoderConfig
    mesh: Mesh | None
    kernel: Kernel
    return_keys_values: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], layer: LayerInputs, shared: SharedInputs
    ) -> tuple[Array, KeysValues | None]:
        x = constrain(self.mesh, x, ROWS, "sequence")
        attended, keys_values = Attention(self.config, self.mesh, self.kernel, name="attention")(
            Norm(self.config, name="attention_norm")(x), layer, shared
        )
        x = x + self.behind("attention", attended)

        def mlp(module: nn.Module, x: Array) -> Array:
            return self.behind("mlp", Mlp(self.config, name="mlp")(Norm(self.config, name="mlp_norm")(x)))

        x = x + _unless_last(self, layer, mlp, x)
        return x, keys_values if self.return_keys_values else None

    def behind(self, half: str, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What a half of the layer gives to the residual stream."""
        return Norm(self.config, name=f"{half}_out_norm")(x) if self.config.norm == "rms_around" else x


def _take_by_chunks(mesh: Mesh | None, table: Float[Array, "V D"], ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """`jnp.take(table, ids, axis=0)` for a table whose V is split over fsdp, as are the rows of ids.

    Each device finds its part of the table for the tokens of all of fsdp's, and XLA adds the parts up where they
    belong. Chunk by chunk, what it holds meanwhile is no more than its own rows in the end.
    """
    (batch, length), width = ids.shape, table.shape[1]
    if mesh is None or mesh.shape["fsdp"] == 1 or batch % row_shards(mesh):
        return jnp.take(table, ids, axis=0)
    parts = math.gcd(length, mesh.shape["sequence"])
    count = math.gcd(length // parts, mesh.shape["fsdp"])
    chunks = jnp.moveaxis(ids.reshape(batch, parts, count, length // parts // count), 2, 0)
    found = jax.lax.map(lambda own: constrain(mesh, jnp.take(table, own, axis=0), ROWS, "sequence"), chunks)
    return constrain(mesh, jnp.moveaxis(found, 0, 2).reshape(batch, length, width), ROWS, "sequence")


# What the backward pass computes again: nothing; all but the results of linear maps; everything in a layer.
Remat = Literal["none", "dots", "full"]


class Decoder(nn.Module):
    """Embeddings, scanned layers, final norm and output matrix of a causal language model.

    Its parameters are a plain dict: `embedding` [V, D], `positions` [max_positions, D] where learned, `layers` with
    every leaf stacked [L, ...], `final_norm`, and `output` [D, V] where untied.
    """

    config: DecoderConfig
    remat: Remat = "dots"
    mesh: Mesh | None = None
    attention: Kernel = "xla"

    def setup(self) -> None:
        config = self.config
        init = nn.initializers.normal(0.02)
        self.embedding = self.param("embedding", init, (config.vocab_size, config.width))
        if config.rope is None:
            self.position_embedding = self.param("positions", init, (config.max_positions, config.width))
        if not config.tied:
            self.output = self.param("output", init, (config.width, config.vocab_size))
        self.final_norm = Norm(config)

    def embed(self, ids: Int[Array, "*B T"]) -> Float[Array, "*B T D"]:
        """Rows of the embedding table, scaled where the family does; ids must lie in [0, V)."""
        rows = (
            _take_by_chunks(self.mesh, self.embedding, ids) if ids.ndim == 2 else jnp.take(self.embedding, ids, axis=0)
        )
        scale = self.config.embedding_scale
        return rows if scale is None else rows * jnp.asarray(scale, rows.dtype)

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Next-token logits in float32 for states that `__call__` returned."""
        with jax.named_scope("logits"):
            kernel = self.embedding.T if self.config.tied else self.output
            logits = jnp.dot(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
            return soft_capped(logits, self.config.logit_cap)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        rows: Stream,
        prefix: Prefix | None = None,
        cache: Cache | None = None,
        gated: GatedPrefix | None = None,
        *,
        return_keys_values: bool = False,
        return_hidden: bool = True,
    ) -> tuple[Float[Array, "B T D"] | None, KeysValues | None]:
        """Runs the layers.

        Args:
          x: token embeddings, virtual or real, without positions.
          rows: where each token stands, and what it may see.
          prefix: keys and values shared by all rows.
          cache: keys and values of each row's earlier tokens.
          gated: keys and values with a softmax of their own, for the last layers.
          return_keys_values: also return every layer's keys (after RoPE) and values for the tokens of x.
          return_hidden: False saves what only hidden states need of the last layer: all but its keys and values.

        Returns:
          Normalised hidden states, ready for `logits`, and the keys and values [L, B, T, K, H]; None for either that is
          not wanted.
        """
        config = self.config

        def layers_first(tree: Any) -> Any:
            return tree if rows.prompt_index is None else jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), tree)

        if config.rope is None:
            x = x + jnp.take(self.position_embedding, rows.positions, axis=0, mode="clip").astype(x.dtype)
        layers = LayerInputs(
            last=None if return_hidden else jnp.arange(config.layers) == config.layers - 1,
            rotates=_flags(config, config.no_rope_layers, invert=True),
            windowed=_flags(config, config.window_layers),
            prefix=None if prefix is None else layers_first((prefix.keys, prefix.values)),
            cache=None if cache is None else (cache.keys, cache.values),
            gated=None if gated is None else _for_all_layers(layers_first(gated), config.layers),
        )
        shared = _shared_inputs(config, rows, prefix, cache, ring=cache is None and splits(self.mesh, rows))
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if self.remat == "dots" else None
        block: Any = Block if self.remat == "none" else nn.remat(Block, prevent_cse=False, policy=policy)
        in_axes: Any = (0, nn.broadcast)
        scan = nn.scan(
            block,
            variable_axes={"params": 0, ATTENTION: 0},
            split_rngs={"params": True},
            in_axes=in_axes,
            length=config.layers,
        )
        x, keys_values = scan(config, self.mesh, self.attention, return_keys_values, name="layers")(x, layers, shared)
        return self.final_norm(x) if return_hidden else None, keys_values


def _flags(config: DecoderConfig, layers: tuple[int, ...], invert: bool = False) -> Bool[Array, " L"] | None:
    if not layers:
        return None
    chosen = [i in layers for i in range(config.layers)]
    return jnp.asarray([not c for c in chosen] if invert else chosen)


def _for_all_layers(gated: GatedPrefix, layers: int) -> GatedPrefix:
    """Layers below the last G get a gate of 0."""
    gated = dataclasses.replace(gated, rows=None)
    below = layers - gated.gates.shape[0]
    return jax.tree.map(lambda a: jnp.pad(a, [(below, 0)] + [(0, 0)] * (a.ndim - 1)), gated)


def _shared_inputs(
    config: DecoderConfig, rows: Stream, prefix: Prefix | None, cache: Cache | None, ring: bool
) -> SharedInputs:
    """Masks too, unless tokens go round a ring of devices, each of which makes its own."""
    cos_sin = rotation(config, rows.positions)
    ahead = None if prefix is None else of_row(rows.prompt_index, prefix.positions)
    if ring:
        return SharedInputs(cos_sin, rows, ahead, None, None)
    placed: list[tuple[Array, Array | None]] = [(rows.positions, rows.segments)]
    if cache is not None:
        placed.insert(0, (cache.positions, cache.segments))
    if ahead is not None:
        placed.insert(0, (jnp.broadcast_to(ahead, (rows.positions.shape[0], ahead.shape[-1])), None))
    masks = tuple(visible(rows, positions, segments) for positions, segments in placed)
    if not config.window_layers:
        return SharedInputs(cos_sin, rows, ahead, masks, None)
    windows = [within_window(rows, positions, config.window) for positions, _ in placed]
    within = tuple(mask & window for mask, window in zip(masks, windows, strict=True))
    return SharedInputs(cos_sin, rows, ahead, masks, within)
