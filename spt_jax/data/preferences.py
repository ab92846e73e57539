"""Records of a chosen and a rejected answer to one prompt, as text or as conversations."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int

from spt_jax.data.templates import MESSAGES
from spt_jax.data.values import is_list, text_of
from spt_jax.errors import DataError

PROMPT = "prompt"  # the column of a conversational prompt, as in TRL


@dataclasses.dataclass(frozen=True)
class PairScores:
    """The scores of chosen and rejected answers, in this order.

    Attributes:
      log_probabilities: the log-probability of each answer, in nats, under the soft prompt.
      lengths: the number of tokens of each answer.
      reference: the log-probabilities under the bare base; None if they are not known.
    """

    log_probabilities: Float[np.ndarray | Array, "*N 2"]
    lengths: Int[np.ndarray | Array, "*N 2"]
    reference: Float[np.ndarray | Array, "*N 2"] | None = None


@dataclasses.dataclass(frozen=True)
class ChatPair:
    """Two conversations that differ in their last turn, each a list of messages.

    Attributes:
      chosen: the conversation with the chosen answer.
      rejected: the conversation with the rejected answer.
    """

    chosen: Sequence[Mapping[str, Any]]
    rejected: Sequence[Mapping[str, Any]]


def chat_pair(record: Mapping[str, Any], chosen: str, rejected: str, index: int) -> ChatPair:
    """Returns the two conversations of a record, in any form of TRL's data sets.

    The prompt is the field `messages` or `prompt`, a list of messages; the answers are text, or lists of one assistant
    message. Without a prompt, it is implicit: both answers are whole conversations that differ in the last message.

    Args:
      record: the record.
      chosen: the name of the field of the chosen answer.
      rejected: the name of the field of the rejected answer.
      index: the record's number from 0, for messages.

    Raises:
      DataError: a field is missing or has another form, the implicit prompts differ, or an answer is not one assistant
        turn.
    """
    name = next((name for name in (MESSAGES, PROMPT) if record.get(name) is not None), None)
    if name is not None:
        context = _messages(record[name], f"record {index + 1}: the field {name!r}")
        return ChatPair(*([*context, _answer(record, field, index)] for field in (chosen, rejected)))
    sides = [_messages(record.get(field), f"record {index + 1}: the field {field!r}") for field in (chosen, rejected)]
    contexts = [[_content(message) for message in side[:-1]] for side in sides]
    if contexts[0] != contexts[1]:
        at = next((i for i, pair in enumerate(zip(*contexts, strict=False)) if pair[0] != pair[1]), len(min(contexts)))
        raise DataError(
            f"record {index + 1}: the conversations {chosen!r} and {rejected!r} have different prompts, from message"
            f" {at + 1} on; without a field {PROMPT!r} they may differ only in the last message"
        )
    if not contexts[0]:
        raise DataError(
            f"record {index + 1}: the conversations have no message before the answer; give the prompt in the field"
            f" {PROMPT!r} or at the beginning of both"
        )
    for field, side in zip((chosen, rejected), sides, strict=True):
        _check_answer(side[-1], field, index)
    return ChatPair(*sides)


def check_answers(chosen: str, rejected: str, index: int) -> None:
    """Checks the texts of two answers.

    Raises:
      DataError: one is empty, or they are equal.
    """
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise DataError(f"record {index + 1}: the {name} answer is empty; remove the record")
    if chosen == rejected:
        raise DataError(
            f"record {index + 1}: the chosen and the rejected answer are equal ({chosen!r:.60}), so there is nothing to"
            " prefer; remove the record"
        )


def _messages(value: object, what: str) -> Sequence[Mapping[str, Any]]:
    if not is_list(value) or len(value) == 0 or not all(isinstance(message, Mapping) for message in value):
        kind = "missing" if value is None else "no list of messages"
        raise DataError(
            f"{what} is {kind}; with {{{MESSAGES}}} in the prompt it must be a list with 'role' and 'content'"
        )
    return value


def _answer(record: Mapping[str, Any], field: str, index: int) -> Mapping[str, Any]:
    """Returns the assistant message of an answer, which is text or a list of one message."""
    value, what = record.get(field), f"record {index + 1}: the field {field!r}"
    if not is_list(value):
        return {"role": "assistant", "content": text_of(value, what)}
    messages = _messages(value, what)
    if len(messages) != 1:
        raise DataError(
            f"{what} has {len(messages)} messages beside the field {PROMPT!r}; an answer is one assistant message"
        )
    _check_answer(messages[0], field, index)
    return messages[0]


def _check_answer(message: Mapping[str, Any], field: str, index: int) -> None:
    if message.get("role") != "assistant":
        raise DataError(
            f"record {index + 1}: the last message of {field!r} has the role {message.get('role')!r}; an answer has the"
            " role 'assistant'"
        )


def _content(message: Mapping[str, Any]) -> tuple[Any, Any]:
    return message.get("role"), message.get("content")
