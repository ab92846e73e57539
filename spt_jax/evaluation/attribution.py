"""Attributes the effect of a soft prompt to its positions: the loss without each one, and the attention to each."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from spt_jax.bases.base import FrozenBase
from spt_jax.data.batches import multiples, plan_batches
from spt_jax.data.examples import Example, moved_places
from spt_jax.errors import ConfigError
from spt_jax.evaluation.evaluate import EvaluationSet, evaluate
from spt_jax.evaluation.metrics import Difference, paired_bootstrap
from spt_jax.evaluation.predictions import measures, record_values
from spt_jax.inference.forward import embed_stream, encode_prefix, pinned_ids
from spt_jax.models import memory
from spt_jax.models.attention import Stream
from spt_jax.models.model import Model
from spt_jax.prompts.virtual import VirtualPrompt


def position_count(virtual: VirtualPrompt) -> int:
    """Returns the number of positions of a prompt: of its keys and values if it has them, otherwise of virtual tokens.

    Raises:
      ConfigError: the prompt has neither.
    """
    if virtual.prefix_length:
        return virtual.prefix_length
    if virtual.gated is not None:
        return memory.length(virtual.gated.memory)
    if virtual.tokens is None:
        raise ConfigError("this prompt has no positions to remove")
    return virtual.tokens.shape[0]


def ablate(base: FrozenBase, data: EvaluationSet, virtual: VirtualPrompt) -> tuple[str, list[Difference]]:
    """Measures how much worse the prompt is without each of its positions.

    Without a virtual token, everything after it moves up by one position. Without a key and value, the other keys keep
    their rotation, and the tokens after the prefix move up by one position.

    Returns:
      The name of the measure (`predictions.measures`), and for each position how much higher it is with that position
      than without.

    Raises:
      ConfigError: the prompt has no positions or only one; its virtual tokens depend on the input; or it shifts
        embeddings by position (DePT), and its virtual tokens are not at fixed positions.
    """
    if virtual.instance is not None:
        raise ConfigError("the networks of this prompt need all of its virtual tokens, so none can be removed")
    count = position_count(virtual)
    if count == 1:
        raise ConfigError("this prompt has only one position, so it cannot be evaluated without it")

    def values(data: EvaluationSet, virtual: VirtualPrompt) -> tuple[str, np.ndarray]:
        predictions = evaluate(base, data, virtual, generated=False).predictions
        measure = measures(predictions)[0]
        return measure, record_values(predictions, measure)

    measure, full = values(data, virtual)
    lost = []
    for number in range(count):
        _, ablated = values(*_without(base, data, virtual, number))
        lost.append(paired_bootstrap(full, ablated, resamples=1000))
    return measure, lost


def _without(
    base: FrozenBase, data: EvaluationSet, virtual: VirtualPrompt, number: int
) -> tuple[EvaluationSet, VirtualPrompt]:
    for part in ("prefix", "gated"):
        own = getattr(virtual, part)
        if own is not None:
            shorter = dataclasses.replace(own, memory=memory.without_position(own.memory, number))
            return data, dataclasses.replace(virtual, **{part: shorter})
    absent = base.layout.vocab_size + number
    if virtual.shift is not None:
        places = {int(np.flatnonzero(example.ids == absent)[0]) for example in data.examples}
        if len(places) > 1:
            raise ConfigError("without a token, this prompt's shifts reach other tokens; put <soft> before any field")
        shift = jnp.delete(virtual.shift, min(places), axis=0) if min(places) < len(virtual.shift) else virtual.shift
        virtual = dataclasses.replace(virtual, shift=shift)
    examples = [_without_id(example, absent) for example in data.examples]
    shared = int((data.plan.lead_ids != absent).sum())
    plan = plan_batches(
        examples,
        lead=max(0, min(shared, min(example.first_target for example in examples) - 1)),
        batch_size=data.config.batch_size,
        **multiples(base.mesh),
        max_length=base.layout.max_positions,
    )
    return dataclasses.replace(data, examples=examples, plan=plan), virtual


def _without_id(example: Example, absent: int) -> Example:
    kept = example.ids != absent
    reads = None if example.reads is None else np.cumsum(kept)[example.reads].astype(np.int32) - 1
    moved = {"ids": example.ids[kept], "predicted": example.predicted[kept], **moved_places(example, kept)}
    return dataclasses.replace(example, **moved, reads=reads)


@dataclasses.dataclass(frozen=True)
class Received:
    """Attention to the positions of a prompt, averaged over heads and records.

    Attributes:
      by_position: for each layer, the attention of the last token of a request, which predicts the answer, to each
        position.
      even: the prompt's share of the positions that the last token sees: its total attention if that were uniform.
    """

    by_position: Float[np.ndarray, "L P"]
    even: float


def attention_received(
    base: FrozenBase, examples: Sequence[Example], virtual: VirtualPrompt, *, batch_size: int = 8
) -> Received:
    """Measures how the last token of each example attends to a prompt of token rows or of keys and values.

    Raises:
      ConfigError: the prompt has neither. Gated keys and values do not count, since they have a separate softmax.
    """
    if not virtual.prefix_length and virtual.tokens is None:
        raise ConfigError("this prompt has no positions in the base's own attention")
    # A request ends where its answer begins.
    requests = [e.ids if e.reads is not None else e.ids[: e.first_target] for e in examples]
    length = max(map(len, requests))
    model = base.decoder.with_options(attention="xla", remat="none", mesh=None)
    sums, shares = [], []
    for start in range(0, len(requests), batch_size):
        own = requests[start : start + batch_size]
        ids, last = np.zeros((batch_size, length), np.int32), np.zeros(batch_size, np.int32)
        types = np.zeros_like(ids) if any(e.second_at is not None for e in examples) else None
        for row, (request, example) in enumerate(zip(own, examples[start : start + batch_size], strict=True)):
            ids[row, : len(request)], last[row] = request, len(request) - 1
            if types is not None and example.second_at is not None:
                types[row, example.second_at :] = 1
        found = np.asarray(_received(model, virtual, ids, last, types), np.float64)
        sums.append(found[:, : len(own)].sum(axis=1))
        taken = found.shape[-1] if virtual.prefix is not None else 0
        shares += [found.shape[-1] / (taken + len(request)) for request in own]
    return Received(sum(sums[1:], sums[0]) / len(requests), float(np.mean(shares)))


@jax.jit
def _received(
    model: Model,
    virtual: VirtualPrompt,
    ids: Int[Array, "B T"],
    last: Int[Array, " B"],
    types: Int[Array, "B T"] | None,
) -> Float[Array, "L B P"]:
    prefix = encode_prefix(model, virtual, jnp.zeros(0, jnp.int32))
    places = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    real = (places <= last[:, None]).astype(jnp.int32)
    stream = Stream(places + virtual.first_position, real, jnp.zeros_like(real), ids=ids, types=types)
    read = places < last[:, None] + (not model.layout.causal)
    stream = dataclasses.replace(stream, pinned=pinned_ids(model, virtual, ids), inputs=read)
    weights = model.attention_weights(embed_stream(model, virtual, ids, stream), stream, prefix)
    at_last = jnp.take_along_axis(weights, last[None, :, None, None], axis=2)[:, :, 0]  # [L, B, keys]
    if prefix is not None:
        return at_last[..., : prefix.positions.shape[0]]
    assert virtual.tokens is not None
    numbers = model.layout.vocab_size + jnp.arange(virtual.tokens.shape[0])[None, None]
    return jnp.einsum("lbt,btp->lbp", at_last, (ids[..., None] == numbers).astype(at_last.dtype))
