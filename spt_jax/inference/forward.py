"""The pure functions between a soft prompt and the logits of a batch.

Each takes the frozen parameters as an argument. Bind them outside `jax.jit`, never by a closure inside it: an array
that is closed over becomes a literal of the compiled program.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from spt_jax.bases.base import embed, logits, output_matrix, output_rows, run_layers
from spt_jax.bases.checkpoint import Params
from spt_jax.data.batches import Rows
from spt_jax.models.attention import NEVER, Cache, Prefix, Stream, soft_capped
from spt_jax.models.decoder import Decoder, of_row
from spt_jax.models.ring import splits, take_tokens
from spt_jax.models.vocabulary import log_sum_exp
from spt_jax.prompts.virtual import VirtualPrompt
from spt_jax.runtime.sharding import ROWS, constrain


def embed_stream(
    module: Decoder,
    frozen: Params,
    virtual: VirtualPrompt | None,
    ids: Int[Array, "B T"],
    stream: Stream,
) -> Float[Array, "B T D"]:
    """Embeddings of a stream of real and virtual ids, in the base's dtype.

    Ids are masked before they index: out of range, `jnp.take` gives NaN and `[]` clamps in silence.
    """
    vocab_size = module.config.vocab_size
    is_virtual = ids >= vocab_size
    real = embed(module, frozen, jnp.where(is_virtual, 0, ids))
    if virtual is not None and virtual.shift is not None:
        reach = virtual.shift.shape[-2]
        shift = _rows(virtual.shift, jnp.minimum(stream.positions, reach - 1), stream.prompt_index)
        real = real + jnp.where((stream.positions < reach)[..., None], shift, 0.0).astype(real.dtype)
    if virtual is None or virtual.tokens is None:
        return real
    rows = _rows(virtual.tokens, jnp.where(is_virtual, ids - vocab_size, 0), stream.prompt_index)
    return jnp.where(is_virtual[..., None], rows.astype(real.dtype), real)


def _rows(
    table: Float[Array, "*S P D"], numbers: Int[Array, "B T"], prompt_index: Int[Array, " B"] | None
) -> Float[Array, "B T D"]:
    """Rows of a prompt's table, or of that of each row's own prompt."""
    return jnp.take(table, numbers, axis=0) if prompt_index is None else table[prompt_index[:, None], numbers]


def run_stream(
    module: Decoder,
    frozen: Params,
    virtual: VirtualPrompt | None,
    ids: Int[Array, "B T"],
    stream: Stream,
    prefix: Prefix | None = None,
    cache: Cache | None = None,
    *,
    return_keys_values: bool = False,
    return_hidden: bool = True,
) -> Any:
    """Hidden states of a stream under a soft prompt: its token rows, its gated prefix, and `prefix` as encoded."""
    x = embed_stream(module, frozen, virtual, ids, stream)
    gated = None if virtual is None else virtual.gated
    return run_layers(
        module,
        frozen,
        x,
        stream,
        prefix,
        cache,
        gated,
        return_keys_values=return_keys_values,
        return_hidden=return_hidden,
    )


@jax.named_scope("prefix")
def encode_prefix(
    module: Decoder,
    frozen: Params,
    virtual: VirtualPrompt | None,
    lead_ids: Int[Array, "*S P"],
    lead_length: Int[Array, "*S"] | None = None,
) -> Prefix | None:
    """Keys and values of the prompt's own prefix and of the leading ids behind it, computed once for all rows.

    Args:
      module, frozen: the base.
      virtual: the soft prompt, or S of them.
      lead_ids: the ids that all rows of a prompt begin with; what lies beyond `lead_length` is padding.
      lead_length: how many of them are real; None for all.

    Returns:
      The prefix, float32; None where there is nothing to encode.
    """
    if lead_ids.ndim == 2:
        return jax.vmap(lambda *one: encode_prefix(module, frozen, *one))(virtual, lead_ids, lead_length)
    length = lead_ids.shape[0]
    prefix, start = None, 0
    if virtual is not None and virtual.prefix is not None:
        start = virtual.first_position
        places = jnp.arange(virtual.prefix.keys.shape[1], dtype=jnp.int32)
        prefix = Prefix(virtual.prefix.keys, virtual.prefix.values, jnp.where(places < start, places, NEVER))
    if length == 0:
        return prefix
    positions = start + jnp.arange(length, dtype=jnp.int32)
    own = jnp.ones_like(positions)[None]
    stream = Stream(positions[None], own, jnp.zeros_like(own))
    _, keys_values = run_stream(
        module, frozen, virtual, lead_ids[None], stream, prefix, return_keys_values=True, return_hidden=False
    )
    keys, values = (a[:, 0].astype(jnp.float32) for a in keys_values)
    if lead_length is not None:
        positions = jnp.where(jnp.arange(length) < lead_length, positions, NEVER)
    lead = Prefix(keys, values, positions)
    if prefix is None:
        return lead
    return Prefix(
        jnp.concatenate([prefix.keys, lead.keys], axis=1),
        jnp.concatenate([prefix.values, lead.values], axis=1),
        jnp.concatenate([prefix.positions, lead.positions]),
    )


@jax.named_scope("lead")
def lead_logits(
    module: Decoder, frozen: Params, virtual: VirtualPrompt, lead_ids: Int[Array, " P"]
) -> Float[Array, "P V"]:
    """Logits, float32, of the token behind each leading id, for a prompt without a prefix of its own."""
    positions = jnp.arange(lead_ids.shape[0], dtype=jnp.int32)[None]
    stream = Stream(positions, jnp.ones_like(positions), jnp.zeros_like(positions))
    hidden, _ = run_stream(module, frozen, virtual, lead_ids[None], stream)
    return logits(module, frozen, hidden)[0]


@jax.named_scope("rows")
def output_states(
    module: Decoder, frozen: Params, virtual: VirtualPrompt | None, prefix: Prefix | None, rows: Rows
) -> Float[Array, "B Q D"]:
    """Normalised hidden states at the output positions alone."""
    stream = rows.stream
    if virtual is not None:
        start = virtual.first_position
        if not isinstance(start, int):
            start = of_row(stream.prompt_index, start).reshape(-1, 1)
        stream = dataclasses.replace(stream, positions=stream.positions + start)
    hidden, _ = run_stream(module, frozen, virtual, rows.ids, stream, prefix)
    if module.mesh is not None and splits(module.mesh, stream):
        states = take_tokens(module.mesh, hidden, rows.outputs)
    else:
        states = jnp.take_along_axis(hidden, rows.outputs[:, :, None], axis=1)
    # Taken where they are; then fsdp, which splits the vocabulary that they meet, has them all.
    return constrain(module.mesh, constrain(module.mesh, states, ROWS, "sequence"), "data", "sequence")


def output_logits(
    module: Decoder, frozen: Params, virtual: VirtualPrompt | None, prefix: Prefix | None, rows: Rows
) -> Float[Array, "B Q V"]:
    """Logits, float32, at the output positions alone: of the next token, or of the prompt's head over its C classes."""
    states = output_states(module, frozen, virtual, prefix, rows)
    if virtual is None or virtual.head is None:
        return logits(module, frozen, states)
    head = of_row(rows.stream.prompt_index, virtual.head)
    return jnp.matmul(states.astype(jnp.float32), head.kernel) + head.bias.reshape(-1, 1, head.bias.shape[-1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TargetScores:
    """What losses and scores read of the logits, float32.

    log_probabilities: of every target.
    means: the mean log-probability of all V tokens, or C classes, where each target is predicted; None where logits
      are capped.
    logits: of a head's classes at every target; None of a vocabulary's tokens.
    """

    log_probabilities: Float[Array, "B M"]
    means: Float[Array, "B M"] | None
    logits: Float[Array, "B M C"] | None = None


def scores_of_logits(all_logits: Float[Array, "B Q V"], rows: Rows) -> TargetScores:
    """TargetScores of logits that are there as a whole."""
    at_targets = jnp.take_along_axis(all_logits, rows.target_outputs[:, :, None], axis=1)
    log_sums = jax.nn.logsumexp(at_targets, axis=-1)
    chosen = jnp.take_along_axis(at_targets, rows.target_ids[:, :, None], axis=2)[..., 0]
    return TargetScores(chosen - log_sums, jnp.mean(at_targets, axis=-1) - log_sums, at_targets)


def target_scores(
    module: Decoder, frozen: Params, virtual: VirtualPrompt | None, prefix: Prefix | None, rows: Rows
) -> TargetScores:
    """TargetScores at the output positions. The logits of a large vocabulary are never there as a whole."""
    if virtual is not None and virtual.head is not None:
        return scores_of_logits(output_logits(module, frozen, virtual, prefix, rows), rows)
    states = output_states(module, frozen, virtual, prefix, rows)
    with jax.named_scope("logits"):
        matrix = jax.lax.stop_gradient(output_matrix(module, frozen)).astype(states.dtype)
        targets = jax.lax.stop_gradient(output_rows(module, frozen, rows.target_ids)).astype(states.dtype)
        at_targets = partial(jnp.take_along_axis, indices=rows.target_outputs, axis=1)
        cap = module.config.logit_cap
        log_sums = at_targets(log_sum_exp(states, matrix, cap))
        own = jnp.take_along_axis(states, rows.target_outputs[:, :, None], axis=1)
        chosen = jnp.einsum("bmd,bmd->bm", own, targets, preferred_element_type=jnp.float32)
        chosen = soft_capped(chosen, cap)
        if cap is not None:
            return TargetScores(chosen - log_sums, None)
        means = at_targets(jnp.dot(states, matrix.mean(axis=0), preferred_element_type=jnp.float32))
    return TargetScores(chosen - log_sums, means - log_sums)


def group_scores(scores: TargetScores, rows: Rows, choices: int) -> Float[Array, "B E C"]:
    """Summed log-probability of every scored sequence: C = `choices` of each example, 1 for a plain target."""
    examples = rows.labels.shape[1]

    def of_row(values: Float[Array, " M"], groups: Int[Array, " M"]) -> Float[Array, " G"]:
        return jax.ops.segment_sum(values, groups, num_segments=examples * choices)

    log_probabilities = jnp.where(rows.target_weights > 0, scores.log_probabilities, 0.0)
    return jax.vmap(of_row)(log_probabilities, rows.target_groups).reshape(-1, examples, choices)
