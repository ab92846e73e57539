"""Solved examples, distilled into 16 virtual tokens.

spt-jax train distillation
"""

from pathlib import Path

import spt_jax
from spt_jax.config import BaseConfig, DataConfig, ExperimentConfig, LossConfig, TrainConfig
from spt_jax.configs.quickstart import REQUESTS, TOPICS
from spt_jax.prompts import PromptTuning
from spt_jax.training.objectives import Distillation

TEXT = Path(spt_jax.__file__).parent / "assets" / "distillation" / "examples.txt"


def get_config() -> ExperimentConfig[PromptTuning]:
    """The virtual tokens learn to stand for the text: the base after the text is the teacher."""
    return ExperimentConfig(
        base=BaseConfig(path="starter"),
        data=DataConfig(
            train=str(REQUESTS / "train.jsonl"),
            validation=str(REQUESTS / "validation.jsonl"),
            test=str(REQUESTS / "test.jsonl"),
            prompt="<soft>{text}\nThis is about",
            target=" {label}",
            verbalizers=TOPICS,
        ),
        loss=LossConfig.of(Distillation(text=str(TEXT), top_k=64)),
        method=PromptTuning(length=16),
        train=TrainConfig(steps=600, batch_size=32, evaluate_every=100),
    )
