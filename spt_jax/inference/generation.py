"""Batched text generation: prompts in, texts out.

This module is the part on the host: checks, buckets, batches, stop strings and detokenization. The compiled part is
`decoding`. Shapes are bucketed and the values in a `SamplingConfig` are traced, so few programs are compiled.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Int

from spt_jax.bases.base import FrozenBase
from spt_jax.data.batches import round_up, shared_length
from spt_jax.data.encoder import encoder_for
from spt_jax.data.templates import Template
from spt_jax.errors import ConfigError, DataError
from spt_jax.inference.answers import (
    Generated,
    answer,
    continuation_text,
    endings,
    is_opening,
    stop_end,
    until_end,
)
from spt_jax.inference.decoding import DecodeState, PromptRows, RowSampling, decode, encode_lead, prefill
from spt_jax.inference.two_sides import decoder_length, prefilled_indices
from spt_jax.models import memory
from spt_jax.models.attention import Cache, Prefix
from spt_jax.models.layout import Layout
from spt_jax.prompts.virtual import VirtualPrompt
from spt_jax.runtime.sharding import replicated, row_sharding, row_shards, to_host

# Lengths are rounded up to a multiple of this, so that there is one program per bucket.
BUCKET = 32
# With stop strings, the host checks the text every this many steps.
CHUNK = 16
# Padding that equals no token's id.
NO_ID = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen, and when generation ends.

    Attributes:
      max_new_tokens: the maximum number of new tokens per prompt.
      temperature: 0 takes the likeliest token (greedy); otherwise logits are divided by it before sampling.
      top_k: sample only from the k likeliest tokens; 0 for all.
      top_p: sample only from the smallest set of likeliest tokens whose probability, after top_k, reaches this share
        (nucleus sampling, Holtzman et al. 2020, arXiv 1904.09751); 1 for all.
      stop: strings that end a row as soon as its text contains one; may include names of control tokens.
      end_ids: ids that end a row in addition to those that the base declares, such as `Encoder.end_ids`.
      seed: the random seed. A prompt's random numbers depend only on the seed, the prompt's number and the step.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    end_ids: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}; it must be 0 (all tokens) or a positive number of tokens")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must be in (0, 1]")
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise ConfigError("top_k and top_p need temperature > 0; temperature 0 always takes the likeliest token")
        if not isinstance(self.stop, tuple) or not all(self.stop):
            raise ConfigError(f"stop is {self.stop!r}; it must be a tuple of non-empty strings")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed is {self.seed}; it must be in [0, 2**32)")


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled functions of `decoding`.

    `encode_leads` is `encode_lead` for several soft prompts. `decode` donates its state.
    """

    encode_lead: Callable[..., Prefix]
    encode_leads: Callable[..., Prefix]
    prefill: Callable[..., DecodeState]
    decode: Callable[..., DecodeState]


@functools.cache
def programs(mesh: Mesh, layout: Layout) -> Programs:
    """Returns the programs of a mesh. Shardings are explicit, since the compiler might otherwise change them."""
    rows: Any = row_sharding(mesh)
    everywhere: Any = replicated(mesh)
    state: Any = DecodeState(
        step=everywhere, ids=rows, log_probabilities=rows, ended=rows, cache=cache_sharding(mesh, layout)
    )

    def prefix(*axes: None) -> Any:
        heads = PartitionSpec(*axes, None, None, "tensor")
        return Prefix(memory.shardings(layout.groups, mesh, heads, PartitionSpec()), everywhere, everywhere)

    return Programs(
        encode_lead=jax.jit(encode_lead, out_shardings=prefix()),
        encode_leads=jax.jit(encode_lead, out_shardings=prefix(None)),
        prefill=jax.jit(prefill, static_argnames="capacity", out_shardings=state),
        decode=jax.jit(decode, donate_argnames="state", out_shardings=state),
    )


def cache_sharding(mesh: Mesh, layout: Layout) -> Any:
    """Returns the shardings of a cache: rows over data and fsdp, heads over tensor."""
    rows: Any = row_sharding(mesh)
    by_row = PartitionSpec(None, *rows.spec)
    heads = PartitionSpec(*by_row, "tensor")
    return Cache(memory.shardings(layout.cached_groups, mesh, heads, by_row), rows, rows, rows)


def generate(
    base: FrozenBase,
    prompts: Sequence[np.ndarray] | Sequence[str],
    virtual: VirtualPrompt | None = None,
    sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
    *,
    prompt_index: Sequence[int] | None = None,
    lead: int | None = None,
    batch_size: int = 32,
) -> list[Generated]:
    """Generates text after prompts, in batches of rows of similar length.

    Programs are compiled once per base, number of rows (`batch_size`, or the next power of two for fewer prompts) and
    lengths rounded up to multiples of 32. In `sampling`, only `max_new_tokens` can cause a new compilation.

    Args:
      base: the frozen base.
      prompts: texts; or ids, which may include virtual ones (`vocab_size + i`), such as those from
        `Encoder.prompt_ids`. A text begins a sequence, after BOS if the tokenizer adds one.
      virtual: the soft prompt, or several from `stack_prompts`.
      sampling: one config for all prompts, or one for each; default `SamplingConfig()`, which is greedy.
      prompt_index: the index of each prompt's soft prompt, if `virtual` holds several.
      lead: the number of leading ids to encode once for all prompts with the same soft prompt; None for as many as they
        share.
      batch_size: rows at a time. Apart from rounding, results do not depend on it.

    Returns:
      What was generated after each prompt, in the order of the prompts.

    Raises:
      ConfigError: the base is an encoder, a prompt needs more positions than the model has, the prompts do not share
        `lead` ids, there are virtual ids without a soft prompt, the soft prompt has a task head, `batch_size` is below
        1, the number of `sampling` configs is wrong, or there are texts for a soft prompt with virtual tokens.
      DataError: a prompt is empty, or has an id that neither the base nor the soft prompt has.
    """
    sampling = sampling or SamplingConfig()
    samplings = [sampling] * len(prompts) if isinstance(sampling, SamplingConfig) else list(sampling)
    if len(samplings) != len(prompts):
        raise ConfigError(f"{len(samplings)} samplings for {len(prompts)} prompts; give one for all or one for each")
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
    if not base.layout.generates:
        raise ConfigError(f"{base.name} is an encoder, which generates no text")
    if not len(prompts):
        return []
    prompts = _prompt_ids(base, prompts, virtual)
    if virtual is not None and virtual.head is not None:
        raise ConfigError("this soft prompt has a task head in place of the output matrix and cannot generate text")
    index = _checked_index(prompt_index, len(prompts), virtual)
    first = 0 if virtual is None else virtual.first_position
    firsts = [first if isinstance(first, int) else int(first[prompt]) for prompt in index]
    rows = None if virtual is None else 0 if virtual.tokens is None else virtual.tokens.shape[-2]
    for number, prompt in enumerate(prompts):
        check_prompt(base, prompt, number, rows, firsts[number], samplings[number])
    per_input = virtual is not None and virtual.instance is not None
    shares = base.layout.causal and not per_input
    leads = _shared_leads(prompts, index, lead) if shares else _no_leads(base, prompts, lead)
    last = next((number for number, prompt in enumerate(prompts) if prompt[-1] >= base.layout.vocab_size), None)
    if per_input and last is not None:
        raise ConfigError(f"prompt {last} ends with a virtual token that depends on the input; put text after <soft>")
    numbers = range(len(prompts))
    requests = [_Request(*one) for one in zip(prompts, numbers, samplings, index, leads, firsts, strict=True)]
    if virtual is not None:
        virtual = jax.device_put(virtual, replicated(base.mesh))
    prefix = _encoded_leads(base, requests, virtual, mixed=prompt_index is not None)
    size = round_up(min(batch_size, 2 ** (len(prompts) - 1).bit_length()), row_shards(base.mesh))
    # Rows of similar length are batched together, so that there is little padding.
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    results: dict[int, Generated] = {}
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        rows = [requests[number] for number in batch]
        answers = _generate_batch(base, rows, size, virtual, prefix, prompt_index is not None)
        results |= zip(batch, answers, strict=True)
    return [results[number] for number in range(len(prompts))]


def _prompt_ids(
    base: FrozenBase, prompts: Sequence[np.ndarray] | Sequence[str], virtual: VirtualPrompt | None
) -> list[np.ndarray]:
    """Returns the ids of prompts, some or all of which may be texts."""
    if isinstance(prompts, str):
        raise ConfigError(f"prompts is one text ({prompts!r:.60}); give a list of texts")
    if not any(isinstance(prompt, str) for prompt in prompts):
        return [np.asarray(prompt, np.int32) for prompt in prompts]
    if virtual is not None and virtual.tokens is not None:
        raise ConfigError(
            "texts do not say where the virtual tokens go: use the prompt's own `generate`, or ids from"
            " `Encoder.prompt_ids`"
        )
    template = Template(prompt="{text}", target="{target}")
    encoder = encoder_for(base, template, taken=0 if virtual is None else virtual.prefix_length)
    return [
        encoder.prompt_ids({"text": prompt}) if isinstance(prompt, str) else np.asarray(prompt, np.int32)
        for prompt in prompts
    ]


@dataclasses.dataclass(frozen=True)
class _Request:
    """One prompt to continue.

    Attributes:
      ids: its ids.
      number: its number among all prompts.
      sampling: its sampling config.
      prompt: the index of its soft prompt.
      lead: how many of its leading ids are in the prefix.
      first_position: the position of its first id, after the soft prompt's prefix.
    """

    ids: np.ndarray
    number: int
    sampling: SamplingConfig
    prompt: int
    lead: int
    first_position: int


def _checked_index(prompt_index: Sequence[int] | None, count: int, virtual: VirtualPrompt | None) -> list[int]:
    """Returns the index of each prompt's soft prompt; 0 if all have the same.

    Raises:
      ConfigError: `prompt_index` has the wrong length or an entry out of range, or there is no soft prompt.
    """
    if prompt_index is None:
        return [0] * count
    if virtual is None or len(prompt_index) != count:
        raise ConfigError(
            f"prompt_index has {len(prompt_index)} entries for {count} prompts; it needs one per prompt, and soft"
            " prompts to choose from"
        )
    stacked = len(jax.tree.leaves(virtual)[0])
    if not all(0 <= prompt < stacked for prompt in prompt_index):
        raise ConfigError(f"prompt_index {list(prompt_index)} names soft prompts outside 0 to {stacked - 1}")
    return list(prompt_index)


def _shared_leads(prompts: list[np.ndarray], index: list[int], lead: int | None) -> list[int]:
    """Returns for each prompt how many leading ids are encoded once for all prompts with its soft prompt."""
    groups = {own: [ids for ids, other in zip(prompts, index, strict=True) if other == own] for own in set(index)}
    shared = {own: _shared_lead(group, lead) for own, group in groups.items()}
    return [shared[own] for own in index]


def _no_leads(base: FrozenBase, prompts: list[np.ndarray], lead: int | None) -> list[int]:
    """Returns 0 for each prompt, if the base or the soft prompt reads each as a whole.

    Raises:
      ConfigError: leading ids were to be shared.
    """
    if lead:
        raise ConfigError(
            f"lead is {lead}; this soft prompt or {base.name} reads each prompt as a whole, so leave it out"
        )
    return [0] * len(prompts)


def _encoded_leads(
    base: FrozenBase, requests: list[_Request], virtual: VirtualPrompt | None, *, mixed: bool
) -> Prefix | None:
    """Computes the memory of each soft prompt's prefix and the leading ids after it; None if there are none."""
    firsts = {request.prompt: request for request in reversed(requests)}
    longest = round_up(max(request.lead for request in firsts.values()), BUCKET)
    if not longest and (virtual is None or virtual.prefix is None):
        return None
    count = len(jax.tree.leaves(virtual)[0]) if mixed else 1
    ids, lengths = np.zeros((count, longest), np.int32), np.zeros(count, np.int32)
    for prompt, request in firsts.items():
        ids[prompt, : request.lead] = request.ids[: request.lead]
        lengths[prompt] = request.lead
    encode = programs(base.mesh, base.layout)
    if mixed:
        return encode.encode_leads(base.model, virtual, ids, lengths)
    return encode.encode_lead(base.model, virtual, ids[0], lengths[0])


def _generate_batch(
    base: FrozenBase,
    requests: list[_Request],
    size: int,
    virtual: VirtualPrompt | None,
    prefix: Prefix | None,
    mixed: bool,
) -> list[Generated]:
    """Generates after at most `size` prompts, one per row; rows beyond these are padding that is stopped at once."""
    place = functools.partial(jax.device_put, device=row_sharding(base.mesh))
    prompts = [request.ids for request in requests]
    cached = [request.ids[request.lead : -1] for request in requests]
    length = round_up(max(1, *map(len, cached)), BUCKET)
    decoder = prefilled_indices(prompts, base.layout.start_id, size, length)
    rows = PromptRows(
        ids=place(np.stack([_padded(row, length) for row in cached + [np.zeros(0)] * (size - len(cached))])),
        lengths=place(_padded([len(row) for row in cached], size)),
        last=place(_padded([int(prompt[-1]) for prompt in prompts], size)),
        starts=place(_padded([request.first_position + request.lead for request in requests], size)),
        prompt_index=place(_padded([request.prompt for request in requests], size)) if mixed else None,
        decoder=None if decoder is None else place(decoder),
    )
    samplings = [request.sampling for request in requests]
    filler = [SamplingConfig()] * (size - len(samplings))
    traced = RowSampling(
        temperature=place(np.asarray([row.temperature for row in samplings + filler], np.float32)),
        top_k=place(np.asarray([min(row.top_k, base.layout.vocab_size) for row in samplings + filler], np.int32)),
        top_p=place(np.asarray([row.top_p for row in samplings + filler], np.float32)),
        seed=place(np.asarray([row.seed for row in samplings + filler], np.uint32)),
        numbers=place(_padded([request.number for request in requests], size)),
    )
    ends = [endings(base.tokenizer, base.end_ids + row.end_ids, row.stop) for row in samplings]
    width = round_up(max(len(own.ids) for own in ends), 8)
    end_ids = np.full((size, width), NO_ID, np.int32)
    for row, own in zip(end_ids, ends, strict=False):
        row[: len(own.ids)] = sorted(own.ids)
    limits = [row.max_new_tokens for row in samplings]
    limit = max(limits)
    places = place(end_ids), place(_padded(limits, size)), rows.prompt_index
    state = programs(base.mesh, base.layout).prefill(base.model, round_up(limit, BUCKET), virtual, prefix, rows)

    texts_of = [functools.partial(continuation_text, base.tokenizer, opens=is_opening(base, p)) for p in prompts]
    chunk = CHUNK if any(own.texts for own in ends) else limit
    stopped = np.arange(size) >= len(prompts)
    stops: list[int | None] = [None] * len(prompts)
    chosen: list[list[int]] = []
    for until in [*range(chunk, limit, chunk), limit]:
        inputs = virtual, prefix, jnp.int32(until), place(stopped.copy()), traced, *places
        state = programs(base.mesh, base.layout).decode(base.model, *inputs, state)
        step, ended = int(state.step), to_host(state.ended)
        new_ids = to_host(state.ids)[: len(prompts), 1 : step + 1].tolist()
        chosen = [until_end(row[:most], own.ids) for row, most, own in zip(new_ids, limits, ends, strict=True)]
        for i, row in enumerate(chosen):
            if stops[i] is None:
                stops[i] = stop_end(texts_of[i], row, max(0, until - chunk), ends[i].texts)
                stopped[i] = stops[i] is not None
        if np.all(ended | stopped):
            break

    all_log_probabilities = to_host(state.log_probabilities)[: len(prompts)].tolist()
    return [answer(*one) for one in zip(texts_of, chosen, stops, ends, all_log_probabilities, strict=True)]


def check_prompt(
    base: FrozenBase,
    prompt: np.ndarray,
    number: int,
    rows: int | None,
    prefix: int,
    sampling: SamplingConfig,
) -> None:
    """Checks that the base can continue a prompt.

    Args:
      base: the frozen base.
      prompt: the ids.
      number: the prompt's number, for error messages.
      rows: the number of virtual tokens of the soft prompt; None without a soft prompt.
      prefix: the number of positions of the soft prompt's prefix.
      sampling: the sampling config.

    Raises:
      ConfigError, DataError: see `generate`.
    """
    if not len(prompt):
        raise DataError(f"prompt {number} is empty, so nothing predicts the first new token; begin it with BOS or text")
    check_ids(base, prompt, rows, f"prompt {number}")
    start = base.layout.start_id
    own = len(prompt) if start is None else decoder_length(prompt, start)
    if start is not None and not 0 < own < len(prompt):
        lacks = "nothing precedes" if own else "it lacks"
        raise ConfigError(
            f"prompt {number}: {lacks} id {start}, with which the decoder of {base.name} starts after the ids of the"
            " encoder; use ids from `Encoder.prompt_ids`, or texts"
        )
    length = len(prompt)
    total = prefix + length + sampling.max_new_tokens
    if total > base.layout.max_positions:
        before = f"{prefix} positions of the soft prompt, " if prefix else ""
        raise ConfigError(
            f"prompt {number}: {before}{length} tokens and max_new_tokens={sampling.max_new_tokens} make {total}, but"
            f" {base.name} has {base.layout.max_positions} positions"
        )


def check_ids(base: FrozenBase, ids: Int[np.ndarray, " T"], rows: int | None, name: str) -> None:
    """Checks that a base and a soft prompt have all ids.

    Args:
      base: the frozen base.
      ids: at least one id.
      rows: the number of virtual tokens of the soft prompt; None without a soft prompt.
      name: what the ids are, for error messages.

    Raises:
      ConfigError: there is a virtual id without a soft prompt.
      DataError: an id is negative, or above the last virtual one.
    """
    vocab_size, lowest, highest = base.layout.vocab_size, int(ids.min()), int(ids.max())
    if rows is None and highest >= vocab_size:
        raise ConfigError(f"{name} has virtual token {highest - vocab_size}, but no soft prompt was given")
    count = rows or 0
    if lowest < 0 or highest >= vocab_size + count:
        wrong = lowest if lowest < 0 else highest
        raise DataError(f"{name} has id {wrong}; the base has {vocab_size} tokens, the soft prompt {count}")


def _shared_lead(prompts: list[np.ndarray], lead: int | None) -> int:
    """Returns how many leading ids to encode once: `lead`, or all that are shared except a prompt's last id."""
    if lead is None and len(prompts) == 1:
        return 0  # nothing is shared, and one pass is enough
    shared = shared_length(prompts, min(map(len, prompts)) - 1)
    if lead is None:
        return shared
    if not 0 <= lead <= shared:
        raise ConfigError(f"lead is {lead}; these prompts share {shared} leading ids, not counting a prompt's last id")
    return lead


def _padded(values: Sequence[int] | np.ndarray, length: int, fill: int = 0) -> np.ndarray:
    return np.pad(np.asarray(values, np.int32), (0, length - len(values)), constant_values=fill)
