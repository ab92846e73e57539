"""Preference for one of two answers to a prompt."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from spt_jax.data.chats import turns_of
from spt_jax.data.examples import Example
from spt_jax.data.preferences import PairScores, chat_pair, check_answers
from spt_jax.data.task import EncodedRecords, Evaluation, Record, RecordEncoder, Scores, Task
from spt_jax.data.templates import MESSAGES, Field, Plain, Template, parse
from spt_jax.data.values import field_of, is_list
from spt_jax.errors import ConfigError, DataError
from spt_jax.evaluation import metrics
from spt_jax.evaluation.evaluate import log_softmax


@dataclasses.dataclass(frozen=True)
class Preference(Task):
    """Pairs of a chosen and a rejected answer to one prompt, both continuations of it in one row.

    The chosen answer is the template's target. Such a soft prompt generates text, like one of the task `Text`.
    """

    name: ClassVar[str] = "preference"
    loss: ClassVar[str] = "dpo"
    generates: ClassVar[bool] = True
    pairs: ClassVar[bool] = True
    targets: ClassVar[tuple[str, str]] = ("{chosen}", "{rejected}")

    def check(self, template: Template) -> None:
        """Checks that there are templates of two answers, and no classes.

        Raises:
          ConfigError: the template has verbalizers or the field of a head, an answer is missing or equal to the other,
            or the answers to a chat are not one field each.
        """
        super().check(template)
        if template.verbalizers:
            raise ConfigError("data.verbalizers are classes; task.name=preference compares two answers of each record")
        if not template.target or not template.rejected:
            raise ConfigError(
                "task.name=preference needs data.target and data.rejected, such as '{chosen}' and '{rejected}'"
            )
        if template.target == template.rejected:
            raise ConfigError(f"data.target and data.rejected are both {template.target!r}, so all answers are equal")
        if template.is_conversation:
            _answer_fields(template)

    def required_fields(self, template: Template) -> Sequence[str]:
        """Returns the fields that every record must have; the prompt of a chat may be part of the answers."""
        return _answer_fields(template) if template.is_conversation else template.fields

    def encode(self, encoder: RecordEncoder, record: Record, index: int) -> Example:
        """Encodes the prompt, and the chosen and the rejected answer as its choices."""
        template = encoder.template
        for name in template.fields:
            if _is_chat(field_of(record, name, index)):
                raise DataError(
                    f"record {index + 1}: the field {name!r} is a list of messages; use {{{MESSAGES}}} in data.prompt"
                )
        self._check_texts(template, record, index)
        prompt = encoder.encode_prompt(record, index)
        answers = [encoder.encode_target(record, index, target) for target in (template.target, template.rejected)]
        return _example(prompt, answers, index)

    def encode_chat(self, encoder: RecordEncoder, record: Record, index: int) -> Example:
        """Encodes the chat before the answers, and the chosen and the rejected last turn as its choices."""
        pair = chat_pair(record, *_answer_fields(encoder.template), index)
        sides = [{MESSAGES: list(side)} for side in (pair.chosen, pair.rejected)]
        texts = [
            "".join(piece.text for piece in turns_of(side, index)[-1].content if isinstance(piece, Plain))
            for side in sides
        ]
        check_answers(texts[0], texts[1], index)
        prompts, answers = zip(*(_last_answer(encoder.encode_conversation(side, index)) for side in sides), strict=True)
        if not np.array_equal(prompts[0], prompts[1]):
            raise DataError(
                f"record {index + 1}: the chat template writes other text before the chosen than before the rejected"
                " answer, so they have no prompt in common"
            )
        return _example(prompts[0], answers, index)

    def evaluate(self, scores: Scores, data: EncodedRecords) -> Evaluation:
        """Computes the win rate of the chosen answers and, with reference scores, their rewards.

        win_rate: the share of pairs whose chosen answer has the higher log-probability; win_rate_normalized: the higher
          log-probability per token. Ties count one half.
        accuracy: the share of pairs whose chosen answer has the higher reward of the objective; without one, the higher
          log-probability.
        reward_margin: the mean of the reward of the chosen answer minus that of the rejected one.
        chosen_log_ratio: the mean over the tokens of the chosen answers of log p(token) - log p_base(token), in nats.
          It estimates the KL divergence to the base if the tuned model generates answers like the chosen ones.
        """
        values = np.stack(scores).astype(np.float64)
        lengths = np.asarray([[len(choice) for choice in example.choices] for example in data.examples])
        pairs = PairScores(values, lengths, data.reference)
        if data.criterion is not None:
            rewards, losses = np.asarray(data.criterion.rewards(pairs)), np.asarray(data.criterion.losses(pairs))
        else:
            rewards = values if data.reference is None else values - data.reference
            losses = -log_softmax(rewards)[:, 0]
        wins = metrics.bootstrap_interval(_wins(values))
        result: dict[str, Any] = {
            "win_rate": wins.value,
            "win_rate_interval": wins.bounds,
            "win_rate_normalized": float(_wins(values / lengths).mean()),
            "accuracy": float(_wins(rewards).mean()),
        }
        if data.reference is not None or data.criterion is not None:
            result["reward_margin"] = float((rewards[:, 0] - rewards[:, 1]).mean())
        if data.reference is not None:
            result["chosen_log_ratio"] = float((values - data.reference)[:, 0].sum() / lengths[:, 0].sum())
        predictions = [
            {
                "label": "chosen",
                "prediction": "chosen" if own[0] > own[1] else "rejected",
                "log_probabilities": [round(float(s), 5) for s in own],
                "rewards": [round(float(s), 5) for s in reward],
            }
            for own, reward in zip(values, rewards, strict=True)
        ]
        return Evaluation({**result, "loss": float(losses.mean()), "examples": len(values)}, predictions)

    def _check_texts(self, template: Template, record: Record, index: int) -> None:
        """Checks the texts of both answers; an answer whose fields are all empty is empty."""
        texts = []
        for target in (template.target, template.rejected):
            pieces = parse(target)
            fields = {p.name: self.field(template, record, p.name, index) for p in pieces if isinstance(p, Field)}
            parts = [fields[p.name] if isinstance(p, Field) else getattr(p, "text", "") for p in pieces]
            texts.append("".join(parts) if not fields or "".join(fields.values()).strip() else "")
        check_answers(texts[0], texts[1], index)


def _wins(values: np.ndarray) -> np.ndarray:
    """Returns 1 for each pair whose first value is higher, and one half for ties."""
    return (1 + np.sign(values[:, 0] - values[:, 1])) / 2


def _is_chat(value: Any) -> bool:
    return is_list(value) and len(value) > 0 and all(isinstance(part, dict) and "role" in part for part in value)


def _answer_fields(template: Template) -> tuple[str, str]:
    """Returns the only field of each answer to a chat.

    Raises:
      ConfigError: an answer has other pieces.
    """
    chosen, rejected = parse(template.target), parse(template.rejected)
    if len(chosen) == 1 and len(rejected) == 1:
        one, other = chosen[0], rejected[0]
        if isinstance(one, Field) and isinstance(other, Field):
            return one.name, other.name
    raise ConfigError(
        f"with {{{MESSAGES}}}, data.target and data.rejected are one field each, such as '{{chosen}}' and"
        " '{rejected}'"
    )


def _last_answer(example: Example) -> tuple[np.ndarray, np.ndarray]:
    """Splits an encoded chat into what precedes its last predicted part, and that part."""
    end = int(np.flatnonzero(example.predicted)[-1]) + 1
    start = int(np.flatnonzero(~example.predicted[:end])[-1]) + 1
    return example.ids[:start], example.ids[start:end]


def _example(prompt: Any, answers: Sequence[Any], index: int) -> Example:
    choices = tuple(np.asarray(answer, np.int32) for answer in answers)
    if np.array_equal(choices[0], choices[1]):
        raise DataError(
            f"record {index + 1}: the chosen and the rejected answer have the same tokens; remove the record"
        )
    return Example(np.asarray(prompt, np.int32), np.zeros(len(prompt), bool), choices, 0, index)
