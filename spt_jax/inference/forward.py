"""Pure functions that compute the logits of a batch under a soft prompt.

Each takes the model as an argument. Pass it through `jax.jit`, never in a closure inside it: an array in a closure
becomes a literal of the compiled program.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from spt_jax.data.batches import Rows
from spt_jax.errors import ConfigError
from spt_jax.models import memory
from spt_jax.models.attention import NEVER, Cache, Prefix, Stream
from spt_jax.models.decoder import of_row
from spt_jax.models.divergence import divergences
from spt_jax.models.model import Model, TargetScores, TeacherStates
from spt_jax.models.ring import splits, take_tokens
from spt_jax.prompts.instance import instance_rows
from spt_jax.prompts.virtual import ReplacedRows, VirtualPrompt
from spt_jax.runtime.sharding import ROWS, constrain


def embed_stream(
    model: Model,
    virtual: VirtualPrompt | None,
    ids: Int[Array, "B T"],
    stream: Stream,
) -> Float[Array, "B T D"]:
    """Returns the embeddings of a stream of real and virtual ids, in the base's dtype.

    Ids are masked before indexing: out of range, `jnp.take` returns NaN, and `[]` clamps silently.
    """
    vocab_size = model.layout.vocab_size
    is_virtual = ids >= vocab_size
    real = model.embed(jnp.where(is_virtual, 0, ids))
    if virtual is not None and virtual.replaced is not None:
        real = _replaced(real, virtual.replaced, ids, stream.prompt_index)
    if virtual is not None and virtual.shift is not None:
        reach = virtual.shift.shape[-2]
        shift = _rows(virtual.shift, jnp.minimum(stream.positions, reach - 1), stream.prompt_index)
        reached = stream.positions < reach
        if stream.decoder is not None:  # The shift is of the prompt, which the encoder reads.
            reached = jnp.asarray(reached).at[jnp.arange(len(ids))[:, None], stream.decoder].set(False, mode="drop")
        real = real + jnp.where(reached[..., None], shift, 0.0).astype(real.dtype)
    if virtual is None or virtual.tokens is None:
        return real
    if virtual.instance is not None:
        if ids.shape[1] < len(virtual.tokens):  # one token of a decode step, which `generate` checks
            return real
        rows = instance_rows(virtual.instance, virtual.tokens, ids, real, stream, vocab_size)
        return jnp.where(is_virtual[..., None], rows.astype(real.dtype), real)
    rows = _rows(virtual.tokens, jnp.where(is_virtual, ids - vocab_size, 0), stream.prompt_index)
    return jnp.where(is_virtual[..., None], rows.astype(real.dtype), real)


def _replaced(
    real: Float[Array, "B T D"], replaced: ReplacedRows, ids: Int[Array, "B T"], prompt_index: Int[Array, " B"] | None
) -> Float[Array, "B T D"]:
    """Replaces the embeddings of the ids that a prompt has other rows for."""
    own = of_row(prompt_index, replaced.ids).astype(jnp.int32)
    own = own[None, None] if prompt_index is None else own[:, None]
    matches = ids[..., None] == own
    rows = _rows(replaced.rows, jnp.argmax(matches, axis=-1), prompt_index)
    return jnp.where(matches.any(-1)[..., None], rows.astype(real.dtype), real)


def _rows(
    table: Float[Array, "*S P D"], numbers: Int[Array, "B T"], prompt_index: Int[Array, " B"] | None
) -> Float[Array, "B T D"]:
    """Looks up rows in the table of the prompt, or, with several prompts, in that of each row's prompt."""
    return jnp.take(table, numbers, axis=0) if prompt_index is None else table[prompt_index[:, None], numbers]


def pinned_ids(
    model: Model, virtual: VirtualPrompt | None, ids: Int[Array, "*B T"], prompt_index: Int[Array, "*B"] | None = None
) -> Bool[Array, "*B T"] | None:
    """Returns which ids a sliding window never hides: the virtual ones, if their prompt pins them; None for none.

    Args:
      model: the base.
      virtual: the soft prompt, or S stacked ones.
      ids: real and virtual ids.
      prompt_index: the prompt of each row, if there are several.
    """
    if virtual is None or virtual.pinned is False or not model.layout.windowed:
        return None
    pinned = ids >= model.layout.vocab_size
    if virtual.pinned is True:
        return pinned
    return pinned & jnp.asarray(virtual.pinned)[prompt_index, None]


def run_stream(
    model: Model,
    virtual: VirtualPrompt | None,
    ids: Int[Array, "B T"],
    stream: Stream,
    prefix: Prefix | None = None,
    cache: Cache | None = None,
    *,
    return_memory: bool = False,
    return_hidden: bool = True,
) -> Any:
    """Runs the layers on a stream under a soft prompt.

    Args:
      model: the base.
      virtual: the soft prompt; its token rows, replaced embeddings, gated prefix, linear memory and edits
        are applied.
      ids: real and virtual ids.
      stream: positions and segments of the ids; virtual ids are pinned if the soft prompt says so.
      prefix: the memory of what precedes the stream, such as that from `encode_prefix`.
      cache: the memory of earlier ids.
      return_memory, return_hidden: what to return.

    Returns:
      The hidden states and the memory, as `Model.run` returns them.
    """
    x = embed_stream(model, virtual, ids, stream)
    stream = dataclasses.replace(stream, ids=ids, inputs=None)
    if stream.pinned is None:
        stream = dataclasses.replace(stream, pinned=pinned_ids(model, virtual, ids, stream.prompt_index))
    gated = None if virtual is None else virtual.gated
    options: dict[str, Any] = {"return_memory": return_memory, "return_hidden": return_hidden}
    if virtual is not None and virtual.linear is not None:
        options["linear"] = virtual.linear  # a model of a user may lack the argument
    if virtual is not None and virtual.edits is not None:
        options["edits"] = virtual.edits
    return model.run(x, stream, prefix, cache, gated, **options)


@jax.named_scope("prefix")
def encode_prefix(
    model: Model,
    virtual: VirtualPrompt | None,
    lead_ids: Int[Array, "*S P"],
    lead_length: Int[Array, "*S"] | None = None,
) -> Prefix | None:
    """Computes the memory of the prompt's prefix and of the leading ids after it, once for all rows.

    Args:
      model: the base.
      virtual: the soft prompt, or S stacked ones.
      lead_ids: the ids that all rows of a prompt begin with, padded on the right.
      lead_length: how many of them are real; None if all are.

    Returns:
      The prefix in float32; None if there is nothing to encode.
    """
    return run_lead(model, virtual, lead_ids, lead_length)[0]


def run_lead(
    model: Model,
    virtual: VirtualPrompt | None,
    lead_ids: Int[Array, "*S P"],
    lead_length: Int[Array, "*S"] | None = None,
    *,
    return_hidden: bool = False,
) -> tuple[Prefix | None, Float[Array, "*S P D"] | None]:
    """Returns the result of `encode_prefix` and, if asked, the hidden states of the leading ids after the final norm.

    Without leading ids, there are no hidden states.
    """
    if lead_ids.ndim == 1:
        return _run_lead(model, virtual, lead_ids, lead_length, None, return_hidden=return_hidden)
    pins = None
    if virtual is not None and isinstance(virtual.pinned, tuple):
        pins, virtual = jnp.asarray(virtual.pinned), dataclasses.replace(virtual, pinned=True)
    one_lead = functools.partial(_run_lead, model, return_hidden=return_hidden)
    return jax.vmap(one_lead)(virtual, lead_ids, lead_length, pins)


def _run_lead(
    model: Model,
    virtual: VirtualPrompt | None,
    lead_ids: Int[Array, " P"],
    lead_length: Int[Array, ""] | None,
    pins: Bool[Array, ""] | None,
    *,
    return_hidden: bool,
) -> tuple[Prefix | None, Float[Array, "P D"] | None]:
    """`run_lead` of one prompt; `pins` is whether a prompt with `pinned` is one of those that are."""
    length = lead_ids.shape[0]
    prefix, start = None, 0
    pinned = pinned_ids(model, virtual, lead_ids)
    pinned = pinned if pinned is None or pins is None else pinned & pins
    if virtual is not None and virtual.prefix is not None:
        start = virtual.first_position
        places = jnp.arange(virtual.prefix_length, dtype=jnp.int32)
        whole = memory.of_all_layers(virtual.prefix.memory, model.layout)
        of_prefix = None if pinned is None else jnp.full(places.shape, True if pins is None else pins)
        prefix = Prefix(whole, jnp.where(places < start, places, NEVER), of_prefix)
    if length == 0:
        return prefix, None
    if virtual is not None and virtual.instance is not None:
        raise ConfigError("the virtual tokens of this prompt depend on each input, so no leading ids can be shared")
    positions = start + jnp.arange(length, dtype=jnp.int32)
    real = jnp.ones(length, bool) if lead_length is None else jnp.arange(length) < lead_length
    segments = real.astype(jnp.int32)[None]
    stream = Stream(positions[None], segments, jnp.zeros_like(segments))
    if pinned is not None:
        stream = dataclasses.replace(stream, pinned=pinned[None])
    hidden, found = run_stream(
        model, virtual, lead_ids[None], stream, prefix, return_memory=True, return_hidden=return_hidden
    )
    hidden = hidden[0] if return_hidden else None
    lead = jax.tree.map(lambda a: a[:, 0].astype(jnp.float32), found)
    if lead_length is not None:
        positions = jnp.where(real, positions, NEVER)
    if prefix is None:
        return Prefix(lead, positions, pinned), hidden
    places, pinned = jax.tree.map(
        lambda *own: jnp.concatenate(own), (prefix.positions, prefix.pinned), (positions, pinned)
    )
    return Prefix(memory.concatenate(prefix.memory, lead), places, pinned), hidden


@jax.named_scope("rows")
def output_states(
    model: Model, virtual: VirtualPrompt | None, prefix: Prefix | None, rows: Rows
) -> Float[Array, "B Q D"]:
    """Returns the hidden states at the output positions, after the final norm.

    Raises:
      ConfigError: the base is an encoder-decoder, and the rows have no tokens for its decoder.
    """
    stream = rows.stream
    if model.layout.encodes and stream.decoder is None:
        raise ConfigError(
            "these rows have no tokens for the decoder of this encoder-decoder; encode the records with its `Encoder`,"
            " or set Example.starts"
        )
    if virtual is not None and virtual.instance is not None and stream.inputs is None:
        raise ConfigError(
            "these rows do not say what the input is that the virtual tokens depend on; encode the records with a"
            " template with per_input=True, or set Example.input_end"
        )
    if virtual is not None:
        start = virtual.first_position
        if not isinstance(start, int):
            start = of_row(stream.prompt_index, start).reshape(-1, 1)
        stream = dataclasses.replace(stream, positions=stream.positions + start)
    hidden, _ = run_stream(model, virtual, rows.ids, stream, prefix)
    if model.layout.pooling == "mean":
        return _states_or_means(hidden, stream, rows.ids < model.layout.vocab_size, rows.outputs)
    if model.mesh is not None and splits(model.mesh, stream):
        states = take_tokens(model.mesh, hidden, rows.outputs)
    else:
        states = jnp.take_along_axis(hidden, rows.outputs[:, :, None], axis=1)
    # First gathered on the devices that hold the rows, then replicated over fsdp, which splits the output matrix.
    return constrain(model.mesh, constrain(model.mesh, states, ROWS, "sequence"), "data", "sequence")


def _states_or_means(
    hidden: Float[Array, "B T D"], stream: Stream, real: Bool[Array, "B T"], outputs: Int[Array, "B Q"]
) -> Float[Array, "B Q D"]:
    """Returns the hidden states at outputs below T, and the means over real tokens of a segment at the others."""
    length = hidden.shape[1]
    at = outputs % length
    own = jnp.take_along_axis(stream.segments, at, axis=1)[:, :, None] == stream.segments[:, None, :]
    members = (own & real[:, None, :]).astype(jnp.float32)
    weights = members / jnp.maximum(members.sum(-1, keepdims=True), 1.0)
    means = jnp.einsum("bqt,btd->bqd", weights, hidden.astype(jnp.float32)).astype(hidden.dtype)
    states = jnp.take_along_axis(hidden, at[:, :, None], axis=1)
    return jnp.where((outputs >= length)[:, :, None], means, states)


def output_logits(
    model: Model, virtual: VirtualPrompt | None, prefix: Prefix | None, rows: Rows
) -> Float[Array, "B Q V"]:
    """Returns the float32 logits at the output positions: of the next token, or of the C classes of the task head.

    Args:
      model: that of the base.
      virtual: the soft prompt; None for none.
      prefix: the result of `encode_prefix`.
      rows: the rows, without the leading ids that the prefix stands for.

    Returns:
      The logits at the Q output positions of each row.
    """
    states = output_states(model, virtual, prefix, rows)
    if virtual is None or virtual.head is None:
        return model.logits(states)
    head = of_row(rows.stream.prompt_index, virtual.head)
    return jnp.matmul(states.astype(jnp.float32), head.kernel) + head.bias.reshape(-1, 1, head.bias.shape[-1])


def scores_of_logits(
    all_logits: Float[Array, "B Q V"], rows: Rows, ids: Int[Array, "B M K"] | None = None
) -> TargetScores:
    """Returns the TargetScores of fully materialized logits, by default of the targets."""
    ids = rows.target_ids[:, :, None] if ids is None else ids
    at_targets = jnp.take_along_axis(all_logits, rows.target_outputs[:, :, None], axis=1)
    log_sums = jax.nn.logsumexp(at_targets, axis=-1)
    chosen = jnp.take_along_axis(at_targets, ids, axis=2)
    return TargetScores(chosen - log_sums[:, :, None], jnp.mean(at_targets, axis=-1) - log_sums, at_targets)


def target_scores(
    model: Model,
    virtual: VirtualPrompt | None,
    prefix: Prefix | None,
    rows: Rows,
    ids: Int[Array, "B M K"] | None = None,
    teacher: TeacherStates | None = None,
) -> TargetScores:
    """Returns the TargetScores at the output positions, by a chunked log-sum-exp over a large vocabulary.

    Args:
      model: the base.
      virtual: the soft prompt.
      prefix: keys and values before the rows, from `encode_prefix`.
      rows: the rows.
      ids: the ids to score at each target; by default the target.
      teacher: hidden states of a teacher at each target, for `TargetScores.divergences`.

    Raises:
      ConfigError: the soft prompt has a task head, and there is a teacher.
    """
    ids = rows.target_ids[:, :, None] if ids is None else ids
    if virtual is not None and virtual.head is not None and teacher is not None:
        raise ConfigError("a task head has no distribution over the vocabulary that a teacher could be compared with")
    if virtual is not None and virtual.head is not None:
        return scores_of_logits(output_logits(model, virtual, prefix, rows), rows, ids)
    states = output_states(model, virtual, prefix, rows)
    with jax.named_scope("logits"):
        scores = model.scores(states, rows.target_outputs, ids)
        if teacher is None:
            return scores
        own = jnp.take_along_axis(states, rows.target_outputs[:, :, None], axis=1)
        found = divergences(model, own, teacher.states.astype(own.dtype), teacher.temperature)
        return dataclasses.replace(scores, divergences=found)


def group_scores(scores: TargetScores, rows: Rows, choices: int) -> Float[Array, "B E C"]:
    """Sums the log-probabilities of each scored sequence: C = `choices` per example, or 1 for a plain target."""
    examples = rows.labels.shape[1]

    def of_row(values: Float[Array, " M"], groups: Int[Array, " M"]) -> Float[Array, " G"]:
        return jax.ops.segment_sum(values, groups, num_segments=examples * choices)

    log_probabilities = jnp.where(rows.target_weights > 0, scores.log_probabilities[:, :, 0], 0.0)
    return jax.vmap(of_row)(log_probabilities, rows.target_groups).reshape(-1, examples, choices)
