"""Batched text generation: prompts in, texts out.

The host's half: checks, buckets, batches, stop strings and text. The compiled half is `decoding`. Shapes come from
buckets and everything in a `SamplingConfig` is traced, so that few programs are ever compiled.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spt_jax.bases.base import FrozenBase
from spt_jax.data.batches import round_up
from spt_jax.data.tokenization import control_tokens
from spt_jax.errors import ConfigError, DataError
from spt_jax.inference.decoding import DecodeState, PromptRows, RowSampling, decode, encode_lead, prefill
from spt_jax.models.attention import Cache, Prefix
from spt_jax.prompts.virtual import VirtualPrompt
from spt_jax.runtime.sharding import replicated, row_sharding, row_shards, to_host

# Lengths are rounded up to a multiple of this: one program per bucket.
BUCKET = 32
# Steps between two looks of the host at the text, where there are stop strings.
CHUNK = 16
# What no token's id is.
NO_ID = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How next tokens are chosen, and when to end.

    max_new_tokens: at most so many per prompt.
    temperature: 0 takes the likeliest token (greedy); above, logits are divided by it and sampled from.
    top_k: sample among the k likeliest tokens alone; 0 for all.
    top_p: sample among the fewest likeliest tokens that hold this share of the probability left by top_k (nucleus
      sampling, Holtzman et al. 2020, arXiv 1904.09751); 1 for all.
    stop: texts that end a row as soon as it contains one. The tokenizer's control tokens may be named too.
    end_ids: ids that end a row besides those that the base declares, as `Encoder.end_ids`.
    seed: of the random numbers. Those of a prompt depend on the seed, the prompt's number and the step alone.
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
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}; generate at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature is {self.temperature}; it is 0 (greedy) or a number above")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}; it is 0 (all tokens) or the number of tokens to choose from")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it lies in (0, 1]")
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise ConfigError("top_k and top_p need temperature > 0; temperature 0 always takes the likeliest token")
        if not isinstance(self.stop, tuple) or not all(self.stop):
            raise ConfigError(f"stop is {self.stop!r}; it is a tuple of texts, none of them empty")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed is {self.seed}; it lies in [0, 2**32)")


@dataclasses.dataclass(frozen=True)
class Generated:
    """What was generated after one prompt.

    text: the new text, without control tokens, cut before a stop string.
    ids: every new token, the one that ended the row (EOS, the end of a turn or of a stop string) included.
    log_probabilities: of each of them under the model's own distribution, whatever the sampling.
    finished: what ended the row: EOS or the end of a turn, a stop string, or `max_new_tokens`.
    alternatives: the likeliest ids of each step and their log-probabilities, where a server's request asks for them.
    """

    text: str
    ids: list[int]
    log_probabilities: list[float]
    finished: Literal["eos", "stop", "length"]
    alternatives: list[dict[int, float]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled functions of `decoding`: `encode_leads` for several prompts; `decode` takes its state."""

    encode_lead: Callable[..., Prefix]
    encode_leads: Callable[..., Prefix]
    prefill: Callable[..., DecodeState]
    decode: Callable[..., DecodeState]


@functools.cache
def programs(mesh: Mesh) -> Programs:
    """One set per mesh. Where a state lies is said, for a compiler left to itself may move it from call to call."""
    rows: Any = row_sharding(mesh)
    everywhere: Any = replicated(mesh)
    row_heads: Any = NamedSharding(mesh, PartitionSpec(None, *rows.spec, "tensor"))
    prefix_heads: Any = NamedSharding(mesh, PartitionSpec(None, None, "tensor"))
    cache: Any = Cache(row_heads, row_heads, rows, rows)
    state: Any = DecodeState(step=everywhere, ids=rows, log_probabilities=rows, ended=rows, cache=cache)
    prefix: Any = Prefix(prefix_heads, prefix_heads, everywhere)
    stacked_heads: Any = NamedSharding(mesh, PartitionSpec(None, None, None, "tensor"))
    prefixes: Any = Prefix(stacked_heads, stacked_heads, everywhere)
    return Programs(
        encode_lead=jax.jit(encode_lead, static_argnums=0, out_shardings=prefix),
        encode_leads=jax.jit(encode_lead, static_argnums=0, out_shardings=prefixes),
        prefill=jax.jit(prefill, static_argnums=(0, 1), out_shardings=state),
        decode=jax.jit(decode, static_argnums=0, donate_argnums=10, out_shardings=state),
    )


def generate(
    base: FrozenBase,
    prompts: Sequence[np.ndarray],
    virtual: VirtualPrompt | None = None,
    sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
    *,
    prompt_index: Sequence[int] | None = None,
    lead: int | None = None,
    batch_size: int = 32,
) -> list[Generated]:
    """Continues prompts, in batches of rows of about equal length.

    Programs are compiled once per base, number of rows (`batch_size`, or the next power of two for fewer prompts) and
    lengths rounded up to multiples of 32; nothing else in `sampling` than `max_new_tokens` can make a new one.

    Args:
      base: the frozen base.
      prompts: ids, virtual ones (`vocab_size + i`) among them, as from `Encoder.prompt_ids`.
      virtual: the soft prompt that those stand for.
      sampling: how tokens are chosen, and when to end, for all prompts or for each; default `SamplingConfig()`, greedy.
      prompt_index: which soft prompt each has, where `virtual` is several (`stack_prompts`).
      lead: how many leading ids are encoded once for all prompts of one soft prompt; None takes all that they share.
      batch_size: rows at a time. Results do not depend on it, beyond rounding.

    Returns:
      What was generated after each prompt, in their order.

    Raises:
      ConfigError: more tokens than the model has positions, a `lead` that is not shared, virtual ids without a soft
        prompt, `batch_size` below 1, or not one `sampling` for each prompt.
      DataError: an empty prompt, or an id that the base and the soft prompt do not have.
    """
    sampling = sampling or SamplingConfig()
    samplings = [sampling] * len(prompts) if isinstance(sampling, SamplingConfig) else list(sampling)
    if len(samplings) != len(prompts):
        raise ConfigError(f"{len(samplings)} samplings for {len(prompts)} prompts; give one for all or one for each")
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; it is at least 1")
    if not len(prompts):
        return []
    prompts = [np.asarray(prompt, np.int32) for prompt in prompts]
    if virtual is not None and virtual.head is not None:
        raise ConfigError("this soft prompt has a task head in the place of the output matrix, and says no text")
    index = _checked_index(prompt_index, len(prompts), virtual)
    first = 0 if virtual is None else virtual.first_position
    firsts = [first if isinstance(first, int) else int(first[own]) for own in index]
    rows = None if virtual is None else 0 if virtual.tokens is None else virtual.tokens.shape[-2]
    for number, prompt in enumerate(prompts):
        check_prompt(base, prompt, number, rows, firsts[number], samplings[number])
    leads = _shared_leads(prompts, index, lead)
    numbers = range(len(prompts))
    requests = [_Request(*one) for one in zip(prompts, numbers, samplings, index, leads, firsts, strict=True)]
    if virtual is not None:
        virtual = jax.device_put(virtual, replicated(base.mesh))
    prefix = _encoded_leads(base, requests, virtual, mixed=prompt_index is not None)
    size = round_up(min(batch_size, 2 ** (len(prompts) - 1).bit_length()), row_shards(base.mesh))
    # Rows of like length go together, so that little of a batch is padding.
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    results: dict[int, Generated] = {}
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        rows = [requests[number] for number in batch]
        answers = _generate_batch(base, rows, size, virtual, prefix, prompt_index is not None)
        results |= zip(batch, answers, strict=True)
    return [results[number] for number in range(len(prompts))]


@dataclasses.dataclass(frozen=True)
class _Request:
    """One prompt: its ids and number, its sampling and soft prompt, how many leading ids the prefix holds.

    first_position: of the first id, behind the soft prompt's own prefix.
    """

    ids: np.ndarray
    number: int
    sampling: SamplingConfig
    prompt: int
    lead: int
    first_position: int


def _checked_index(prompt_index: Sequence[int] | None, count: int, virtual: VirtualPrompt | None) -> list[int]:
    """Each prompt's soft prompt; 0 where all have the same."""
    if prompt_index is None:
        return [0] * count
    if virtual is None or len(prompt_index) != count:
        raise ConfigError(f"prompt_index has {len(prompt_index)} entries for {count} prompts, and needs soft prompts")
    stacked = len(jax.tree.leaves(virtual)[0])
    if not all(0 <= prompt < stacked for prompt in prompt_index):
        raise ConfigError(f"prompt_index {list(prompt_index)} names soft prompts outside 0 to {stacked - 1}")
    return list(prompt_index)


def _shared_leads(prompts: list[np.ndarray], index: list[int], lead: int | None) -> list[int]:
    """Of every prompt, how many leading ids are encoded once for all prompts with its soft prompt."""
    alike = {own: [ids for ids, other in zip(prompts, index, strict=True) if other == own] for own in set(index)}
    shared = {own: _shared_lead(group, lead) for own, group in alike.items()}
    return [shared[own] for own in index]


def _encoded_leads(
    base: FrozenBase, requests: list[_Request], virtual: VirtualPrompt | None, *, mixed: bool
) -> Prefix | None:
    """Keys and values of every soft prompt's own prefix and of the leading ids behind it; None if there are none."""
    firsts = {request.prompt: request for request in reversed(requests)}
    longest = round_up(max(request.lead for request in firsts.values()), BUCKET)
    if not longest and (virtual is None or virtual.prefix is None):
        return None
    count = len(jax.tree.leaves(virtual)[0]) if mixed else 1
    ids, lengths = np.zeros((count, longest), np.int32), np.zeros(count, np.int32)
    for prompt, request in firsts.items():
        ids[prompt, : request.lead] = request.ids[: request.lead]
        lengths[prompt] = request.lead
    encode = programs(base.mesh)
    if mixed:
        return encode.encode_leads(base.module, base.params, virtual, ids, lengths)
    return encode.encode_lead(base.module, base.params, virtual, ids[0], lengths[0])


def _generate_batch(
    base: FrozenBase,
    requests: list[_Request],
    size: int,
    virtual: VirtualPrompt | None,
    prefix: Prefix | None,
    mixed: bool,
) -> list[Generated]:
    """At most `size` prompts, in rows of their own; the rows left over have ended from the start."""
    place = functools.partial(jax.device_put, device=row_sharding(base.mesh))
    prompts = [request.ids for request in requests]
    cached = [request.ids[request.lead : -1] for request in requests]
    length = round_up(max(1, *map(len, cached)), BUCKET)
    rows = PromptRows(
        ids=place(np.stack([_padded(row, length) for row in cached + [np.zeros(0)] * (size - len(cached))])),
        lengths=place(_padded([len(row) for row in cached], size)),
        last=place(_padded([int(prompt[-1]) for prompt in prompts], size)),
        starts=place(_padded([request.first_position + request.lead for request in requests], size)),
        prompt_index=place(_padded([request.prompt for request in requests], size)) if mixed else None,
    )
    how = [request.sampling for request in requests]
    filler = [SamplingConfig()] * (size - len(how))
    traced = RowSampling(
        temperature=place(np.asarray([own.temperature for own in how + filler], np.float32)),
        top_k=place(np.asarray([min(own.top_k, base.config.vocab_size) for own in how + filler], np.int32)),
        top_p=place(np.asarray([own.top_p for own in how + filler], np.float32)),
        seed=place(np.asarray([own.seed for own in how + filler], np.uint32)),
        numbers=place(_padded([request.number for request in requests], size)),
    )
    ends = [endings(base.tokenizer, base.end_ids + own.end_ids, own.stop) for own in how]
    width = round_up(max(len(own.ids) for own in ends), 8)
    end_ids = np.full((size, width), NO_ID, np.int32)
    for row, own in zip(end_ids, ends, strict=False):
        row[: len(own.ids)] = sorted(own.ids)
    limits = [own.max_new_tokens for own in how]
    limit = max(limits)
    places = place(end_ids), place(_padded(limits, size)), rows.prompt_index
    state = programs(base.mesh).prefill(base.module, round_up(limit, BUCKET), base.params, virtual, prefix, rows)

    texts_of = [functools.partial(continuation_text, base.tokenizer, opens=is_opening(base, p)) for p in prompts]
    chunk = CHUNK if any(own.texts for own in ends) else limit
    stopped = np.arange(size) >= len(prompts)
    stops: list[int | None] = [None] * len(prompts)
    chosen: list[list[int]] = []
    for until in [*range(chunk, limit, chunk), limit]:
        inputs = virtual, prefix, jnp.int32(until), place(stopped.copy()), traced, *places
        state = programs(base.mesh).decode(base.module, base.params, *inputs, state)
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


@dataclasses.dataclass(frozen=True)
class Endings:
    """What ends an answer: ids, of which `stop_ids` are control tokens that were named as stop strings, and texts."""

    ids: frozenset[int]
    stop_ids: frozenset[int]
    texts: tuple[str, ...]


@functools.lru_cache
def endings(tokenizer: Any, end_ids: tuple[int, ...], stop: tuple[str, ...]) -> Endings:
    """What ends an answer with these ids and stop strings, of which some may be control tokens."""
    control = control_tokens(tokenizer)
    named = frozenset(control[text] for text in stop if text in control)
    texts = tuple(text for text in stop if text not in control)
    return Endings(named | set(end_ids), named - set(end_ids), texts)


def answer(
    text_of: Callable[[list[int]], str],
    row: list[int],
    end: int | None,
    ends: Endings,
    log_probabilities: Sequence[float],
) -> Generated:
    """What was generated, from ids up to the first that ended it, or up to `end`, where a stop string stands."""
    row = row[:end]
    ended = end is None and row[-1] in ends.ids
    text, finished = text_of(row[:-1] if ended else row), "length"
    if end is not None:
        text, finished = text[: min(at for at in map(text.find, ends.texts) if at >= 0)], "stop"
    elif ended:
        finished = "stop" if row[-1] in ends.stop_ids else "eos"
    return Generated(text, row, list(log_probabilities[: len(row)]), finished)


def continuation_text(tokenizer: Any, ids: Sequence[int], *, opens: bool = False) -> str:
    """The text of ids that continue another text, without control tokens. A space in front is part of it.

    Args:
      tokenizer: the base's.
      ids: real token ids.
      opens: the ids open a sequence, so that a tokenizer's dummy space in front is none of the text's.
    """
    # A tokenizer takes the dummy space off the first token, whatever it is: here that one is of another text.
    front = [] if opens else tokenizer.encode("a", add_special_tokens=False)
    before, whole = (
        tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for part in (front, [*front, *ids])
    )
    return whole[len(before) :]


@functools.lru_cache(2**16)
def token_text(tokenizer: Any, id_: int) -> str:
    """The text of one token behind others; of a control token or a part of a character, its name in the vocabulary.

    Models may have more ids than the tokenizer: these are called <ID>.
    """
    text = continuation_text(tokenizer, [id_])
    return text if text.strip("\ufffd") else tokenizer.convert_ids_to_tokens(id_) or f"<{id_}>"


def is_opening(base: FrozenBase, prompt: np.ndarray) -> bool:
    """Nothing but BOS stands before the new text."""
    return bool(np.all(prompt == base.tokenizer.bos_token_id))


def until_end(ids: list[int], end_ids: frozenset[int]) -> list[int]:
    """The ids up to the first that ends a row, that one included."""
    end = next((i + 1 for i, token in enumerate(ids) if token in end_ids), None)
    return ids[:end]


def stop_end(text_of: Callable[[list[int]], str], ids: list[int], checked: int, stop: Sequence[str]) -> int | None:
    """The least number of ids whose text contains a stop string, where the first `checked` ids' does not."""

    def stops(count: int) -> bool:
        text = text_of(ids[:count])
        return any(part in text for part in stop)

    if not stop or not stops(len(ids)):
        return None
    return next(count for count in range(checked + 1, len(ids) + 1) if stops(count))


def check_prompt(
    base: FrozenBase,
    prompt: np.ndarray,
    number: int,
    rows: int | None,
    prefix: int,
    sampling: SamplingConfig,
) -> None:
    """Whether the base can continue a prompt, with so many rows for virtual ids, None without a soft prompt.

    Raises:
      ConfigError, DataError: as `generate`.
    """
    if not len(prompt):
        raise DataError(f"prompt {number} is empty, and nothing can predict its first token; begin it with BOS or text")
    vocab_size, highest, length = base.config.vocab_size, int(prompt.max()), len(prompt)
    if rows is None and highest >= vocab_size:
        raise ConfigError(f"prompt {number} has virtual token {highest - vocab_size}, but no soft prompt was given")
    count = rows or 0
    if int(prompt.min()) < 0 or highest >= vocab_size + count:
        wrong = int(prompt.min()) if int(prompt.min()) < 0 else highest
        raise DataError(f"prompt {number} has id {wrong}; the base has {vocab_size} tokens, the soft prompt {count}")
    total = prefix + length + sampling.max_new_tokens
    if total > base.config.max_positions:
        before = f"{prefix} positions of the soft prompt, " if prefix else ""
        raise ConfigError(
            f"prompt {number}: {before}{length} tokens and max_new_tokens={sampling.max_new_tokens} make {total}, but"
            f" {base.name} has {base.config.max_positions} positions"
        )


def _shared_lead(prompts: list[np.ndarray], lead: int | None) -> int:
    """How many leading ids to encode once: all that are shared, or as many as asked for. Rows keep their last id."""
    if lead is None and len(prompts) == 1:
        return 0  # nothing to share: one pass is enough
    most = min(map(len, prompts)) - 1
    first = prompts[0][:most]
    differs = np.any([prompt[:most] != first for prompt in prompts], axis=0)
    shared = int(np.argmax(differs)) if differs.any() else most
    if lead is None:
        return shared
    if not 0 <= lead <= shared:
        raise ConfigError(f"lead is {lead}; these prompts share {shared} leading ids, a prompt's last not counted")
    return lead


def _padded(values: Sequence[int] | np.ndarray, length: int, fill: int = 0) -> np.ndarray:
    return np.pad(np.asarray(values, np.int32), (0, length - len(values)), constant_values=fill)
