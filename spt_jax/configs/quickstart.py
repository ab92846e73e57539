"""Topics of requests, with the shipped model and data.

Sorts requests to an assistant by topic. No download needed.

spt-jax train quickstart
"""

from pathlib import Path

import spt_jax
from spt_jax.config import BaseConfig, DataConfig, ExperimentConfig, TrainConfig
from spt_jax.prompts import PromptTuning

REQUESTS = Path(spt_jax.__file__).parent / "assets" / "requests"
# Each topic's word is one token of the starter's vocabulary, so a request is scored in a single pass.
TOPICS = {
    "bank": "money",
    "calendar": "meeting",
    "movie": "film",
    "music": "music",
    "recipe": "cook",
    "weather": "weather",
}


def get_config() -> ExperimentConfig[PromptTuning]:
    """20 virtual tokens after the request, which they attend to; the class is the topic whose word is the likeliest."""
    return ExperimentConfig(
        base=BaseConfig(path="starter"),
        data=DataConfig(
            train=str(REQUESTS / "train.jsonl"),
            validation=str(REQUESTS / "validation.jsonl"),
            test=str(REQUESTS / "test.jsonl"),
            prompt="{text}\n<soft>",
            target=" {label}",
            verbalizers=TOPICS,
            hard_prompt=(
                "A request to an assistant: {text}\nIn one word, it is about the",
                f"Topics: {', '.join(TOPICS.values())}.\nRequest: {{text}}\nTopic:",
            ),
        ),
        method=PromptTuning(length=20),
        train=TrainConfig(steps=600, batch_size=32, evaluate_every=60),
    )
