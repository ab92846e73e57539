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
    soft_capped,
    visible,
    within_window,
)
from spt_jax.models.config import DecoderConfig
from spt_jax.models.kernels import Kernel
from spt_jax.models.layers import Linear, Mlp, Norm, rotate, rotation
from spt_jax.models.layout import SELF
from spt_jax.models.memory import KeysValues, Memory, from_cache
from spt_jax.models.ring import ring_attend, splits
from spt_jax.runtime.sharding import ROWS, constrain, row_shards


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerInputs:
    """Inputs that differ between layers, scanned along L. A field that no layer needs is None.

    Attributes:
      last: True for the last layer if only its keys and values are needed.
      rotates: whether the layer uses RoPE.
      windowed: whether the layer uses the sliding window.
      prefix: keys and values of the prefix.
      cache: keys and values of the cache.
      gated: keys and values of the gated prefix, and the gate, which is 0 for layers without one.
    """

    last: Bool[Array, " L"] | None
    rotates: Bool[Array, " L"] | None
    windowed: Bool[Array, " L"] | None
    prefix: KeysValues | None
    cache: KeysValues | None
    gated: tuple[KeysValues, Float[Array, "*L"]] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SharedInputs:
    """Inputs that all layers share.

    Attributes:
      cos_sin: cosines and sines of RoPE; None for families without RoPE.
      stream: positions and segments of the tokens.
      prefix_positions: positions of the prefix, [P], or [B, P] if each row has its own prompt.
      masks: attention masks of the sources in the order prefix, cache, row; None if rows are split over devices.
      window_masks: the same with the sliding window, if any layer has one.
    """

    cos_sin: tuple[Array, Array] | None
    stream: Stream
    prefix_positions: Int[Array, "*B P"] | None
    masks: tuple[Array, ...] | None
    window_masks: tuple[Array, ...] | None


def of_row(prompt_index: Int[Array, " B"] | None, tree: Any) -> Any:
    """Selects the prompt of each row, [S, ...] to [B, ...]. Without `prompt_index`, returns the tree as it is."""
    return tree if prompt_index is None else jax.tree.map(lambda a: jnp.take(a, prompt_index, axis=0), tree)


def _choose(flag: Bool[Array, ""] | None, yes: Any, no: Any) -> Any:
    """Returns `yes` if the flag of this layer is set or there are no flags, else `no`."""
    return yes if flag is None else jax.tree.map(lambda a, b: jnp.where(flag, a, b), yes, no)


def _unless_last(module: nn.Module, layer: LayerInputs, function: Any, x: Array) -> Array:
    """Returns `function(module, x)`, of the shape of x; if `layer.last` is set, skips it and returns x."""
    return function(module, x) if layer.last is None else nn.cond(layer.last, lambda _, x: x, function, module, x)


# Variable collection for attention weights; they are stored only if the caller makes it mutable.
ATTENTION = "attention_weights"


class Attention(nn.Module):
    """Self-attention of one layer over prefix, cache and row. Also returns the keys and values of the row."""

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

        own = KeysValues(placed(x, "key", config.kv_heads), heads(x, "value", config.kv_heads))

        def attended(module: nn.Module, x: Array) -> Array:
            queries = placed(x, "query", config.heads)
            prefix, gated = of_row(shared.stream.prompt_index, (layer.prefix, layer.gated))
            prefix, cache = jax.tree.map(lambda a: a.astype(x.dtype), (prefix, layer.cache))
            if shared.masks is None:
                assert self.mesh is not None
                window = config.window if config.window_layers else 0
                places = shared.stream, prefix, shared.prefix_positions
                options = {"window": window, "windowed": layer.windowed, "scoring": scoring}
                out = ring_attend(self.mesh, queries, own, *places, **options)
            else:
                masks = shared.masks
                if cache is not None:
                    slots = masks[-2].shape[-1]  # The last mask is that of the row itself.
                    cache = from_cache(cache, slots)
                if shared.window_masks is not None:
                    masks = _choose(layer.windowed, shared.window_masks, masks)
                pairs = [pair for pair in (prefix, cache, own) if pair is not None]
                sources = [Source(pair.keys, pair.values, mask) for pair, mask in zip(pairs, masks, strict=True)]
                # A decoding step has few scores, so a fused kernel has no benefit.
                kernel = self.kernel if length > 1 else "xla"
                out = attend(queries, sources, scoring, kernel=kernel, mesh=self.mesh)
                if self.is_mutable_collection(ATTENTION):
                    self.sow(ATTENTION, "weights", attention_weights(queries, sources, scoring))
            if gated is not None:
                out = out + _gated_attention(queries, *gated)
            out = out.reshape(batch, length, config.heads * config.head_size)
            return Linear(config.width, config.output_bias, name="output")(out)

        return _unless_last(self, layer, attended, x), own


def _gated_attention(
    queries: Float[Array, "B T N H"], gated: KeysValues, gates: Float[Array, "*B"]
) -> Float[Array, "B T N H"]:
    """Returns the term that the gated prefix of one layer adds to its attention output."""
    shape = (*queries.shape[:2], gated.keys.shape[-3])
    source = Source(gated.keys.astype(queries.dtype), gated.values.astype(queries.dtype), jnp.ones(shape, bool))
    return gates.reshape(-1, 1, 1, 1).astype(queries.dtype) * attend(queries, [source])


class Block(nn.Module):
    """Pre-norm attention and MLP with residual connections: the body of the scan over layers."""

    config: DecoderConfig
    mesh: Mesh | None
    kernel: Kernel
    return_memory: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], layer: LayerInputs, shared: SharedInputs
    ) -> tuple[Array, KeysValues | None]:
        x = constrain(self.mesh, x, ROWS, "sequence")
        attended, keys_values = Attention(self.config, self.mesh, self.kernel, name="attention")(
            Norm(self.config, name="attention_norm")(x), layer, shared
        )
        x = x + self.output_norm("attention", attended)

        def mlp(module: nn.Module, x: Array) -> Array:
            return self.output_norm("mlp", Mlp(self.config, name="mlp")(Norm(self.config, name="mlp_norm")(x)))

        x = x + _unless_last(self, layer, mlp, x)
        return x, keys_values if self.return_memory else None

    def output_norm(self, part: str, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Normalizes the output of attention or MLP before the residual addition, in families that do."""
        return Norm(self.config, name=f"{part}_out_norm")(x) if self.config.norm == "rms_around" else x


def _take_by_chunks(mesh: Mesh | None, table: Float[Array, "V D"], ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Computes `jnp.take(table, ids, axis=0)` for a table with V, and ids with rows, split over fsdp.

    Each device looks up the tokens of all fsdp devices in its shard of the table, and XLA sums the parts on the devices
    of the rows. In chunks, the temporary memory of a device does not exceed that of its rows of the result.
    """
    (batch, length), width = ids.shape, table.shape[1]
    if mesh is None or mesh.shape["fsdp"] == 1 or batch % row_shards(mesh):
        return jnp.take(table, ids, axis=0)
    parts = math.gcd(length, mesh.shape["sequence"])
    count = math.gcd(length // parts, mesh.shape["fsdp"])
    chunks = jnp.moveaxis(ids.reshape(batch, parts, count, length // parts // count), 2, 0)
    taken = jax.lax.map(lambda chunk: constrain(mesh, jnp.take(table, chunk, axis=0), ROWS, "sequence"), chunks)
    return constrain(mesh, jnp.moveaxis(taken, 0, 2).reshape(batch, length, width), ROWS, "sequence")


# What the backward pass recomputes: nothing; everything except the results of linear maps; each layer completely.
Remat = Literal["none", "dots", "full"]


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
        self.embedding = self.param("embedding", init, (config.vocab_size, config.width))
        if config.rope is None:
            self.position_embedding = self.param("positions", init, (config.max_positions, config.width))
        if not config.tied:
            self.output = self.param("output", init, (config.width, config.vocab_size))
        self.final_norm = Norm(config)

    def embed(self, ids: Int[Array, "*B T"]) -> Float[Array, "*B T D"]:
        """Returns rows of the embedding table, scaled in families that do; ids must be in [0, V)."""
        rows = (
            _take_by_chunks(self.mesh, self.embedding, ids) if ids.ndim == 2 else jnp.take(self.embedding, ids, axis=0)
        )
        scale = self.config.embedding_scale
        return rows if scale is None else rows * jnp.asarray(scale, rows.dtype)

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Returns next-token logits in float32 for hidden states returned by `__call__`."""
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
        return_memory: bool = False,
        return_hidden: bool = True,
    ) -> tuple[Float[Array, "B T D"] | None, Memory | None]:
        """Runs the layers; arguments and results are those of `Model.run`."""
        config = self.config

        def layers_first(tree: Any) -> Any:
            return tree if rows.prompt_index is None else jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), tree)

        if config.rope is None:
            x = x + jnp.take(self.position_embedding, rows.positions, axis=0, mode="clip").astype(x.dtype)
        layers = LayerInputs(
            last=None if return_hidden else jnp.arange(config.layers) == config.layers - 1,
            rotates=_flags(config, config.no_rope_layers, invert=True),
            windowed=_flags(config, config.window_layers),
            prefix=None if prefix is None else layers_first(_keys_values(prefix.memory)),
            cache=None if cache is None else _keys_values(cache.memory),
            gated=None
            if gated is None
            else _for_all_layers(layers_first((_keys_values(gated.memory), gated.gates)), config.layers),
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
        x, own = scan(config, self.mesh, self.attention, return_memory, name="layers")(x, layers, shared)
        return self.final_norm(x) if return_hidden else None, {SELF: own} if return_memory else None


def _keys_values(memory: Memory) -> KeysValues:
    """Returns the keys and values of the only group."""
    own = memory[SELF]
    assert isinstance(own, KeysValues)
    return own


def _flags(config: DecoderConfig, layers: tuple[int, ...], invert: bool = False) -> Bool[Array, " L"] | None:
    if not layers:
        return None
    chosen = [i in layers for i in range(config.layers)]
    return jnp.asarray([not c for c in chosen] if invert else chosen)


def _for_all_layers(
    gated: tuple[KeysValues, Float[Array, "G ..."]], layers: int
) -> tuple[KeysValues, Float[Array, "L ..."]]:
    """Pads the keys, values and gates of the last G layers to all layers, with gates of 0."""
    missing = layers - gated[1].shape[0]
    return jax.tree.map(lambda a: jnp.pad(a, [(missing, 0)] + [(0, 0)] * (a.ndim - 1)), gated)


def _shared_inputs(
    config: DecoderConfig, rows: Stream, prefix: Prefix | None, cache: Cache | None, ring: bool
) -> SharedInputs:
    """Returns the inputs that layers share. With ring attention there are no masks, as each device computes its own."""
    cos_sin = rotation(config, rows.positions)
    prefix_positions = None if prefix is None else of_row(rows.prompt_index, prefix.positions)
    if ring:
        return SharedInputs(cos_sin, rows, prefix_positions, None, None)
    sources: list[tuple[Array, Array | None]] = [(rows.positions, rows.segments)]
    if cache is not None:
        sources.insert(0, (cache.positions, cache.segments))
    if prefix_positions is not None:
        shape = (rows.positions.shape[0], prefix_positions.shape[-1])
        sources.insert(0, (jnp.broadcast_to(prefix_positions, shape), None))
    masks = tuple(visible(rows, positions, segments) for positions, segments in sources)
    if not config.window_layers:
        return SharedInputs(cos_sin, rows, prefix_positions, masks, None)
    windows = [within_window(rows, positions, config.window) for positions, _ in sources]
    window_masks = tuple(mask & window for mask, window in zip(masks, windows, strict=True))
    return SharedInputs(cos_sin, rows, prefix_positions, masks, window_masks)
