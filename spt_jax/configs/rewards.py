"""Answers that are questions, by GRPO.

spt-jax train rewards

Mean reward on the test requests: 0.96 to 0.97 with seeds 0, 1 and 2; 0.037 without a prompt (docs/rewards.md).
"""

from collections.abc import Sequence
from pathlib import Path

import spt_jax
from spt_jax.config import BaseConfig, DataConfig, ExperimentConfig, LossConfig, TaskConfig, TrainConfig
from spt_jax.prompts import PromptTuning
from spt_jax.training.objectives import Grpo

REQUESTS = Path(spt_jax.__file__).parent / "assets" / "requests"


def asks(completions: Sequence[str], **_: object) -> list[float]:
    """Returns 1 for each answer whose first line ends in a question mark, and else 0."""
    return [float(answer.strip().partition("\n")[0].endswith("?")) for answer in completions]


def get_config() -> ExperimentConfig[PromptTuning]:
    """20 virtual tokens after a request; the reward is 1 if the first line of the answer ends in a question mark."""
    return ExperimentConfig(
        base=BaseConfig(path="starter"),
        data=DataConfig(
            train=str(REQUESTS / "train.jsonl"),
            validation=str(REQUESTS / "validation.jsonl"),
            test=str(REQUESTS / "test.jsonl"),
            prompt="{text}\n<soft>",
        ),
        task=TaskConfig(name="rewards", reward=("spt_jax.configs.rewards:asks",)),
        loss=LossConfig.of(Grpo(max_new_tokens=16)),
        method=PromptTuning(length=20),
        train=TrainConfig(steps=60, batch_size=8, evaluate_every=20),
    )
