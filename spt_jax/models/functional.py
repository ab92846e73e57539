"""A causal language model given as three functions of its parameters, as the rest of the library uses it.

Such a model has no cache. What it remembers of earlier tokens are their input embeddings, and it runs its layers on all
of them again whenever later tokens follow: slower than with keys and values, with the same results.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from spt_jax.errors import ConfigError
from spt_jax.models.attention import NEVER, Cache, GatedPrefix, LinearMemory, Prefix, Stream, visible
from spt_jax.models.edits import HiddenEdits
from spt_jax.models.layout import Group, Layout
from spt_jax.models.memory import KeysValues, Memory, from_cache
from spt_jax.models.model import TargetScores
from spt_jax.models.self_attention import of_row
from spt_jax.models.vocabulary import CHUNK_LOGITS

INPUTS = "inputs"
# How many rows of the embedding table are computed at a time.
TABLE_ROWS = 8192


@dataclasses.dataclass(frozen=True)
class Functions:
    """The functions of a model. Each takes the parameters first, and none holds arrays of its own.

    Attributes:
      embed: (params, ids [B, T]) to token embeddings [B, T, D], without position embeddings.
      hidden: (params, x [B, T, D], positions [B, T], mask [B, T, T]) to normalized hidden states [B, T, D] for
        `logits`. The mask is True where the query, its second axis, attends to the key, its third.
      logits: (params, hidden [B, T, D]) to next-token logits [B, T, V].
      masked: whether `hidden` takes positions and a mask. Otherwise it takes (params, x), is causal, and the position
        of a token is its index.
    """

    embed: Callable[..., Float[Array, "B T D"]]
    hidden: Callable[..., Float[Array, "B T D"]]
    logits: Callable[..., Float[Array, "B T V"]]
    masked: bool = True


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Tokens:
    """All tokens that the queries of a batch may see: of the prefix, of the cache, and of the rows, in this order."""

    x: Float[Array, "B S D"]
    positions: Int[Array, "B S"]
    segments: Int[Array, "B S"]
    shared: Bool[Array, "B S"]


def functional_layout(vocab_size: int, width: int, max_positions: int, *, packs: bool = True) -> Layout:
    """Returns the layout of a model that remembers input embeddings.

    Args:
      vocab_size: the number V of token ids.
      width: the size D of an embedding.
      max_positions: the longest sequence.
      packs: as in `Layout`.
    """
    inputs = Group(layers=(0,), kv_heads=1, key_size=width, value_size=0, site="inputs")
    return Layout(vocab_size, width, max_positions, {INPUTS: inputs}, packs=packs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FunctionalModel:
    """Implements `Model`.

    Attributes:
      params: the parameters, any pytree of arrays.
      functions: the model's functions of them.
      layout: its sizes, from `functional_layout`.
      dtype: the dtype of its embeddings.
      mesh: the mesh that the rows are split over.
    """

    params: Any
    functions: Functions = dataclasses.field(metadata={"static": True})
    layout: Layout = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    mesh: Mesh | None = dataclasses.field(default=None, metadata={"static": True})

    def embed(self, ids: Int[Array, "*B T"]) -> Float[Array, "*B T D"]:
        flat = ids.reshape(-1, ids.shape[-1])
        return self.functions.embed(self.params, flat).reshape(*ids.shape, self.layout.width)

    def run(
        self,
        x: Float[Array, "B T D"],
        stream: Stream,
        prefix: Prefix | None = None,
        cache: Cache | None = None,
        gated: GatedPrefix | None = None,
        linear: LinearMemory | None = None,
        edits: HiddenEdits | None = None,
        *,
        return_memory: bool = False,
        return_hidden: bool = True,
    ) -> tuple[Float[Array, "B T D"] | None, Memory | None]:
        if gated is not None:
            raise ConfigError("this model takes input embeddings only, no gated keys and values")
        if linear is not None:
            raise ConfigError("this model takes input embeddings only, no linear memory")
        if edits is not None:
            raise ConfigError("this model takes input embeddings only, no edits of hidden states")
        memory = None
        if return_memory:
            keys = x[None, :, :, None]
            memory = {INPUTS: KeysValues(keys, keys[..., :0])}
        if not return_hidden:
            return None, memory
        tokens = _joined(x, stream, prefix, cache)
        run = self._masked if self.functions.masked else self._by_segment
        return run(tokens, stream), memory

    def _masked(self, tokens: _Tokens, stream: Stream) -> Float[Array, "B T D"]:
        """Runs the layers once on all tokens, with a mask that hides each sequence from the others."""
        count, own = tokens.x.shape[1], stream.positions.shape[1]
        parents = jnp.pad(stream.parents, [(0, 0), (count - own, 0)])
        queries = Stream(tokens.positions, tokens.segments, parents)
        real = (tokens.segments > 0) | tokens.shared
        seen = visible(queries, tokens.positions, tokens.segments)
        seen |= visible(queries, tokens.positions, None) & tokens.shared[:, None, :]
        # Padding sees itself, because a softmax over no keys is not a number.
        mask = (seen & real[:, None, :]) | jnp.eye(count, dtype=bool)[None]
        hidden = self.functions.hidden(self.params, tokens.x, tokens.positions, mask)
        return hidden[:, count - own :]

    def _by_segment(self, tokens: _Tokens, stream: Stream) -> Float[Array, "B T D"]:
        """Runs the layers once per segment of the fullest row, on its tokens in the order of their positions."""
        longest = min(tokens.x.shape[1], self.layout.max_positions)
        rows = jnp.arange(len(tokens.x))[:, None]

        def one(segment: Array, x: Float[Array, "B S D"], params: Any, tokens: _Tokens, stream: Stream) -> Array:
            """Returns the hidden states [B, T, D] of the tokens of one segment, and zeros for all others."""
            is_own = stream.segments == segment
            parent = jnp.max(jnp.where(is_own, stream.parents, 0), axis=1, keepdims=True)
            related = (tokens.segments == segment) | ((tokens.segments == parent) & (parent > 0)) | tokens.shared
            places = jnp.where(related, tokens.positions, longest)
            filled = jnp.zeros((len(x), longest), bool).at[rows, places].set(True, mode="drop")
            row = jnp.zeros((len(x), longest, x.shape[2]), x.dtype).at[rows, places].set(x, mode="drop")
            # Any finite embedding serves after the end, where no earlier token sees it.
            row = jnp.where(filled[..., None], row, row[:, :1])
            hidden = self.functions.hidden(params, row)
            found = hidden[rows, jnp.minimum(stream.positions, longest - 1)]
            return jnp.where(is_own[..., None], found, 0)

        return _over_segments(one, jnp.max(stream.segments), tokens.x, self.params, tokens, stream)

    def attention_weights(
        self, x: Float[Array, "B T D"], stream: Stream, prefix: Prefix | None
    ) -> Float[Array, "L B T S"]:
        raise ConfigError("the attention weights of a model from `from_flax` are not known")

    def embedding_table(self) -> Float[np.ndarray, "V D"]:
        embed, size = _compiled_embed(self.functions), self.layout.vocab_size
        starts = range(0, size, TABLE_ROWS)
        parts = [embed(self.params, jnp.arange(i, min(i + TABLE_ROWS, size))[None])[0] for i in starts]
        return np.concatenate([np.asarray(part, np.float32) for part in parts])

    def gated_memory(self, rows: Float[Array, "G P D"]) -> Memory:
        raise ConfigError("a model from `from_flax` takes input embeddings only, no gated keys and values")

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        rows = hidden if hidden.ndim == 3 else hidden.reshape(1, -1, hidden.shape[-1])
        found = self.functions.logits(self.params, rows).astype(jnp.float32)
        return found.reshape(*hidden.shape[:-1], found.shape[-1])

    @jax.named_scope("logits")
    def scores(self, states: Float[Array, "B Q D"], at: Int[Array, "B M"], ids: Int[Array, "B M K"]) -> TargetScores:
        rows, outputs, width = states.shape
        size = min(outputs, max(1, CHUNK_LOGITS // (rows * self.layout.vocab_size)))
        count = -(-outputs // size)
        padded = jnp.pad(states, [(0, 0), (0, count * size - outputs), (0, 0)])
        chunks = padded.reshape(rows, count, size, width).swapaxes(0, 1)

        @jax.checkpoint
        def of_chunk(states: Float[Array, "B C D"], start: Array) -> tuple[Array, Array, Array]:
            logits = self.logits(states)
            inside = (at >= start) & (at < start + size)
            places = jnp.where(inside, at - start, 0)
            chosen = logits[jnp.arange(rows)[:, None, None], places[:, :, None], ids]
            return jax.nn.logsumexp(logits, axis=-1), logits.mean(axis=-1), jnp.where(inside[..., None], chosen, 0.0)

        found = jax.lax.map(lambda part: of_chunk(*part), (chunks, size * jnp.arange(count)))
        log_sums, means = (jnp.swapaxes(part, 0, 1).reshape(rows, -1) for part in found[:2])
        at_targets = functools.partial(jnp.take_along_axis, indices=at, axis=1)
        log_sums, means = at_targets(log_sums), at_targets(means)
        return TargetScores(found[2].sum(axis=0) - log_sums[:, :, None], means - log_sums)


def _joined(x: Float[Array, "B T D"], stream: Stream, prefix: Prefix | None, cache: Cache | None) -> _Tokens:
    """Returns the tokens of the prefix, the cache and the rows; those that are padding have finite embeddings."""
    batch = len(x)
    parts = []
    if prefix is not None:
        keys, places = of_row(stream.prompt_index, (prefix.memory[INPUTS], prefix.positions))
        if stream.prompt_index is None:
            # Broadcast in float32, so that the cotangents of all rows are summed in float32.
            keys, places = (
                jax.tree.map(lambda a: jnp.broadcast_to(a[None], (batch, *a.shape)), own) for own in (keys, places)
            )
        embeddings, real = keys.keys[:, 0, :, 0], places != NEVER
        zeros = jnp.zeros_like(places)
        parts.append((embeddings.astype(x.dtype), jnp.where(real, places, 0), zeros, real))
    if cache is not None:
        count = cache.positions.shape[1]
        cached: Any = cache.memory[INPUTS]
        keys = from_cache(cached, count).keys[0, :, :, 0]
        parts.append((keys.astype(x.dtype), cache.positions, cache.segments, jnp.zeros_like(cache.segments, bool)))
    parts.append((x, stream.positions, stream.segments, jnp.zeros_like(stream.segments, bool)))
    embeddings, positions, segments, shared = (jnp.concatenate(own, axis=1) for own in zip(*parts, strict=True))
    real = (segments > 0) | shared
    return _Tokens(jnp.where(real[..., None], embeddings, x[:, :1]), jnp.where(real, positions, 0), segments, shared)


def _over_segments(
    one: Callable[..., Float[Array, "B T D"]],
    count: Int[Array, ""],
    x: Float[Array, "B S D"],
    params: Any,
    tokens: _Tokens,
    stream: Stream,
) -> Float[Array, "B T D"]:
    """Returns the sum of `one(segment, x, params, tokens, stream)` over segments 1 to `count`, differentiable for x.

    Only as many segments are run as there are, which a loop with JAX's own derivative cannot do.
    """

    def loop(count: Array, start: Array, term: Callable[[Array], Array]) -> Array:
        def advance(carry: Any) -> Any:
            segment, total = carry
            return segment + 1, total + term(segment)

        first = jnp.ones((), count.dtype), start
        return jax.lax.while_loop(lambda carry: carry[0] <= count, advance, first)[1]

    def forward(count: Array, x: Array, *rest: Any) -> Array:
        shape = (*rest[-1].positions.shape, x.shape[2])
        return loop(count, jnp.zeros(shape, x.dtype), lambda segment: one(segment, x, *rest))

    def backward(kept: Any, cotangent: Array) -> tuple[Any, ...]:
        count, x, *rest = kept

        def pulled(segment: Array) -> Array:
            return jax.vjp(lambda x: one(segment, x, *rest), x)[1](cotangent)[0]

        return None, loop(count, jnp.zeros_like(x), pulled), *(None for _ in rest)

    summed = jax.custom_vjp(forward)
    summed.defvjp(lambda *args: (forward(*args), args), backward)
    return summed(count, x, params, tokens, stream)


@functools.lru_cache(maxsize=16)
def _compiled_embed(functions: Functions) -> Callable[[Any, Int[Array, "1 T"]], Float[Array, "1 T D"]]:
    return jax.jit(functions.embed)
