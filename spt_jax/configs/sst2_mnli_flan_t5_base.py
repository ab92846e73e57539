"""Two tasks in one prompt with Flan-T5 base.

As in PEFT's example of multitask prompt tuning.

    spt-jax train sst2_mnli_flan_t5_base --data.train train.jsonl --data.validation validation.jsonl

Records have the fields `task` (sst2 or mnli), `input` (the sentence, or premise and hypothesis) and `output`
(positive or negative; entailment, neutral or contradiction). Writes a prompt for each task, and the rows that they
share. Expect a download of about 1 GB on the first run. No results have been measured yet.
"""

from spt_jax.config import BaseConfig, DataConfig, ExperimentConfig, TrainConfig
from spt_jax.prompts import MultitaskPromptTuning
from spt_jax.prompts.initializers import text

WORDS = "classify the following into either positive or negative, or entailment, neutral or contradiction:"


def get_config() -> ExperimentConfig[MultitaskPromptTuning]:
    """50 virtual tokens that start as an instruction; batches of 8."""
    return ExperimentConfig(
        base=BaseConfig(path="google/flan-t5-base"),
        data=DataConfig(train="", prompt="<soft> {input}", target="{output}", task="task"),
        method=MultitaskPromptTuning(length=50, init=text(WORDS)),
        train=TrainConfig(steps=10_000, batch_size=8),
    )
