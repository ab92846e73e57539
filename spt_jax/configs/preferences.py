"""Replies that name the right topic, by DPO.

spt-jax train preferences

Win rate on the test pairs: 0.83 to 0.85 with seeds 0, 1 and 2; 0.547 without a prompt (docs/preferences.md).
"""

from pathlib import Path

import spt_jax
from spt_jax.config import BaseConfig, DataConfig, ExperimentConfig, LossConfig, TaskConfig, TrainConfig
from spt_jax.prompts import PromptTuning
from spt_jax.training.objectives import Dpo

PREFERENCES = Path(spt_jax.__file__).parent / "assets" / "preferences"


def get_config() -> ExperimentConfig[PromptTuning]:
    """20 virtual tokens between a request and its reply; the reference model is the same base without them."""
    return ExperimentConfig(
        base=BaseConfig(path="starter"),
        data=DataConfig(
            train=str(PREFERENCES / "train.jsonl"),
            validation=str(PREFERENCES / "validation.jsonl"),
            test=str(PREFERENCES / "test.jsonl"),
            prompt="{prompt}\n<soft>",
            target=" {chosen}",
            rejected=" {rejected}",
        ),
        task=TaskConfig(name="preference"),
        loss=LossConfig.of(Dpo(beta=0.1)),
        method=PromptTuning(length=20),
        train=TrainConfig(steps=500, batch_size=16, evaluate_every=50),
    )
