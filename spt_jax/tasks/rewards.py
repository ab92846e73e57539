"""Answers that reward functions judge."""

import dataclasses
from typing import ClassVar

import numpy as np

from spt_jax.data.examples import Example
from spt_jax.data.task import EncodedRecords, Evaluation, Record, RecordEncoder, Scores, Task
from spt_jax.data.templates import Template
from spt_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Rewards(Task):
    """Questions without answers: the soft prompt samples them, and reward functions judge them.

    Such a soft prompt generates text, like one of the task `Text`.
    """

    name: ClassVar[str] = "rewards"
    loss: ClassVar[str] = "grpo"
    generates: ClassVar[bool] = True
    judged: ClassVar[bool] = True

    def check(self, template: Template) -> None:
        """Checks that there is a prompt alone.

        Raises:
          ConfigError: the template has a target, verbalizers, {messages} or the field of a head.
        """
        super().check(template)
        if template.verbalizers:
            raise ConfigError("data.verbalizers are classes; task.name=rewards judges answers of any text")
        if template.target:
            raise ConfigError(
                f"data.target is {template.target!r}, but with task.name=rewards the answers are sampled; leave it out"
            )
        if template.is_conversation:
            raise ConfigError("task.name=rewards has no {messages}; use data.chat with a prompt that is one user turn")

    def encode(self, encoder: RecordEncoder, record: Record, index: int) -> Example:
        """Encodes the prompt. Its only choice is a placeholder of one token for the answers to be sampled."""
        prompt = encoder.encode_prompt(record, index)
        placeholder = (np.zeros(1, np.int32),)
        return Example(np.asarray(prompt, np.int32), np.zeros(len(prompt), bool), placeholder, 0, index)

    def evaluate(self, scores: Scores, data: EncodedRecords) -> Evaluation:
        """Refuses: answers are generated and judged by `spt_jax.evaluation.rewarded.evaluate_rewards`.

        Raises:
          ConfigError: always.
        """
        raise ConfigError("a prompt of the task rewards is evaluated by reward functions, and none are given")
