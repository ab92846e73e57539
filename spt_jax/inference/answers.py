"""Ends of answers, and the text of generated ids."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from spt_jax.bases.base import FrozenBase
from spt_jax.bases.tokenizer import Tokenizer
from spt_jax.data.tokenization import control_tokens


@dataclasses.dataclass(frozen=True)
class Generated:
    """What was generated after one prompt.

    Attributes:
      text: the new text, without control tokens, cut before a stop string.
      ids: the new ids, including the one that ended the row (EOS, the end of a turn or of a stop string).
      log_probabilities: the log-probability of each id under the model's distribution, before any sampling options.
      finished: what ended the row: "eos" is EOS or the end of a turn, "stop" a stop string, "length" `max_new_tokens`.
      alternatives: the likeliest ids of each step and their log-probabilities, if a request to a server asks for them.
    """

    text: str
    ids: list[int]
    log_probabilities: list[float]
    finished: Literal["eos", "stop", "length"]
    alternatives: list[dict[int, float]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Endings:
    """What ends an answer.

    Attributes:
      ids: all ids that end it.
      stop_ids: those of the ids that were given as stop strings.
      texts: the other stop strings.
    """

    ids: frozenset[int]
    stop_ids: frozenset[int]
    texts: tuple[str, ...]


@functools.lru_cache
def endings(tokenizer: Tokenizer, end_ids: tuple[int, ...], stop: tuple[str, ...]) -> Endings:
    """Returns what ends an answer, given end ids and stop strings, some of which may name control tokens."""
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
    """Builds the result of one prompt.

    Args:
      text_of: decodes new ids.
      row: the new ids, up to and including the first that ended the answer.
      end: the number of ids up to the end of the first stop string; None without one.
      ends: what ends the answer.
      log_probabilities: the log-probability of each id.
    """
    row = row[:end]
    ended = end is None and row[-1] in ends.ids
    text, finished = text_of(row[:-1] if ended else row), "length"
    if end is not None:
        text, finished = text[: min(at for at in map(text.find, ends.texts) if at >= 0)], "stop"
    elif ended:
        finished = "stop" if row[-1] in ends.stop_ids else "eos"
    return Generated(text, row, list(log_probabilities[: len(row)]), finished)


def continuation_text(tokenizer: Tokenizer, ids: Sequence[int], *, opens: bool = False) -> str:
    """Decodes ids that continue another text, without control tokens. A leading space is preserved.

    Args:
      tokenizer: the base's tokenizer.
      ids: real token ids.
      opens: whether the ids start a sequence, so that the tokenizer's dummy space is removed.
    """
    # Decoding removes the dummy space from the first token, whatever it is, so other text is put first.
    front = [] if opens else tokenizer.encode("a", add_special_tokens=False)
    before, whole = (
        tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for part in (front, [*front, *ids])
    )
    return whole[len(before) :]


@functools.lru_cache(2**16)
def token_text(tokenizer: Tokenizer, id_: int) -> str:
    """Returns the text of one token after others, or its name in the vocabulary.

    Control tokens and parts of a character have no text, so their names are returned. Models may have more ids than the
    tokenizer; the names of these are <ID>.
    """
    text = continuation_text(tokenizer, [id_])
    return text if text.strip("\ufffd") else tokenizer.convert_ids_to_tokens(id_) or f"<{id_}>"


def is_opening(base: FrozenBase, prompt: np.ndarray) -> bool:
    """Whether the new text starts a sequence: after BOS only, and in the decoder of an encoder-decoder."""
    return base.layout.encodes or bool(np.all(prompt == base.tokenizer.bos_token_id))


def until_end(ids: list[int], end_ids: frozenset[int]) -> list[int]:
    """Returns the ids up to and including the first one that ends a row."""
    end = next((i + 1 for i, token in enumerate(ids) if token in end_ids), None)
    return ids[:end]


def stop_end(text_of: Callable[[list[int]], str], ids: list[int], checked: int, stop: Sequence[str]) -> int | None:
    """Returns the smallest number of ids whose text contains a stop string; None if there is none.

    Args:
      text_of: decodes ids.
      ids: the new ids.
      checked: how many of them are known to contain no stop string.
      stop: the stop strings.
    """

    def stops(count: int) -> bool:
        text = text_of(ids[:count])
        return any(part in text for part in stop)

    if not stop or not stops(len(ids)):
        return None
    return next(count for count in range(checked + 1, len(ids) + 1) if stops(count))
