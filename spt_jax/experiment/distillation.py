"""What a distillation adds to an experiment: answers of the base after the text, and what the soft prompt saves."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from spt_jax.bases.base import FrozenBase
from spt_jax.data.chats import turns_of
from spt_jax.data.encoder import Encoder
from spt_jax.data.task import prompt_index
from spt_jax.data.templates import MESSAGES, Template
from spt_jax.errors import ConfigError
from spt_jax.evaluation.after_text import ids_after_text
from spt_jax.evaluation.first_token import Request, first_token_seconds
from spt_jax.inference.generation import SamplingConfig, generate
from spt_jax.models import memory
from spt_jax.models.layout import Layout
from spt_jax.prompts import VirtualPrompt
from spt_jax.training.objectives import Distillation

Records = Sequence[Mapping[str, Any]]


def check_answers(template: Template) -> None:
    """Checks that the base's answers have a place: an assistant turn, or the field of the target.

    Args:
      template: the template.

    Raises:
      ConfigError: the target is not one field of text that the base can generate.
    """
    if template.is_conversation:
        return
    if template.verbalizers or template.label_field is None:
        raise ConfigError(
            f"loss.answer_tokens needs a data.target with exactly one field, such as ' {{answer}}', and no"
            f" data.verbalizers; the target is {template.target!r}"
        )


def answered(template: Template, record: Mapping[str, Any], answer: str) -> dict[str, Any]:
    """Returns a record with an answer: an assistant turn, or the field of the target."""
    if template.is_conversation:
        return {**record, MESSAGES: [*record[MESSAGES], {"role": "assistant", "content": answer}]}
    assert template.label_field is not None
    return {**record, template.label_field: answer}


def _lacks_answer(template: Template, record: Mapping[str, Any], number: int) -> bool:
    """Whether a record has no target. A chat has one if its last turn is the assistant's.

    Raises:
      DataError: the record's chat is not a list of turns.
    """
    if not template.is_conversation:
        return template.label_field is None or record.get(template.label_field) is None
    return not turns_of(record, number)[-1].is_answer


def with_answers(
    base: FrozenBase,
    encoder: Encoder,
    objective: Distillation,
    text: Int[np.ndarray, " P"],
    records: Records,
    batch_size: int,
) -> Records:
    """Returns records in which those without a target have what the base generates after the text.

    Args:
      base: the frozen base.
      encoder: that of the template.
      objective: how answers are generated.
      text: the ids of the text.
      records: the records.
      batch_size: answers that are generated together.

    Raises:
      ConfigError: as in `check_answers`.
      DataError: the text and a prompt leave no position for an answer, or a chat is not a list of turns.
    """
    template = encoder.template
    check_answers(template)
    missing = [number for number, record in enumerate(records) if _lacks_answer(template, record, number)]
    asked = [records[number] for number in missing]
    answers = answers_after_text(base, encoder, objective, text, asked, batch_size, missing)
    found = list(records)
    for number, answer in zip(missing, answers, strict=True):
        found[number] = answered(template, records[number], answer)
    return found


def answers_after_text(
    base: FrozenBase,
    encoder: Encoder,
    objective: Distillation,
    text: Int[np.ndarray, " P"],
    records: Records,
    batch_size: int,
    seeds: Sequence[int] | None = None,
) -> list[str]:
    """Returns what the base generates after the text and the prompt of each record.

    Args:
      base: the frozen base.
      encoder: that of the template.
      objective: how answers are generated.
      text: the ids of the text.
      records: the records.
      batch_size: answers that are generated together.
      seeds: the random seed of each answer; None for the numbers of the records.

    Raises:
      ConfigError: the text and a prompt leave no position for an answer.
    """
    prompts = [ids_after_text(base, text, encoder.prompt_ids(record)) for record in records]
    sampling = [
        SamplingConfig(
            max_new_tokens=objective.answer_tokens,
            temperature=objective.answer_temperature,
            end_ids=encoder.end_ids,
            seed=number,
        )
        for number in (range(len(records)) if seeds is None else seeds)
    ]
    answers = generate(base, prompts, None, sampling, batch_size=batch_size) if prompts else []
    return [answer.text.strip() for answer in answers]


def distillation_facts(
    base: FrozenBase, encoder: Encoder, text: Int[np.ndarray, " P"], virtual: VirtualPrompt, records: Records
) -> dict[str, Any]:
    """Returns the facts of `savings`, and the times to the first token for a record of middle length.

    Args:
      base: the frozen base.
      encoder: that of the template.
      text: the ids of the text.
      virtual: the soft prompt; with tasks, those of all of them, of which the record's is timed.
      records: the records that one is chosen from.

    Returns:
      "text_tokens", "prompt_tokens", "text_bytes" and "prompt_bytes"; and "first_token_seconds" by the way of asking,
      "with_text", "soft_prompt" and "no_prompt".
    """
    tokens = 0 if virtual.tokens is None else virtual.tokens.shape[-2]
    asked = [(encoder.prompt_ids(record), record) for record in records]
    ids, record = sorted(asked, key=lambda one: len(one[0]))[len(records) // 2]
    if encoder.template.tasks:
        number = prompt_index(encoder.template, record, 0)
        virtual = jax.tree.map(lambda array: array[number], virtual)
    bare = ids[ids < base.layout.vocab_size]
    requests = {
        "with_text": Request(ids_after_text(base, text, ids)),
        "soft_prompt": Request(ids, virtual, len(encoder.fixed_lead())),
        "no_prompt": Request(bare),
    }
    seconds = {name: round(value, 6) for name, value in first_token_seconds(base, requests).items()}
    sizes = savings(base.layout, text, tokens + virtual.prefix_length)
    return {**sizes, "first_token_seconds": seconds}


def savings(layout: Layout, text: Int[np.ndarray, " P"], positions: int) -> dict[str, int]:
    """Returns the positions that the text and the soft prompt take in a context, and the bytes of their memory.

    Args:
      layout: that of the base.
      text: the ids of the text.
      positions: the virtual tokens and the positions of the soft prompt's prefix.

    Returns:
      "text_tokens" and "prompt_tokens"; "text_bytes" and "prompt_bytes", those of keys and values in float32.
    """

    def size(count: int) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(_keys_values(layout, count)))

    return {
        "text_tokens": len(text),
        "prompt_tokens": positions,
        "text_bytes": size(len(text)),
        "prompt_bytes": size(positions),
    }


def _keys_values(layout: Layout, count: int) -> memory.Memory:
    return memory.spec(layout.attention_groups, count)
