"""Quotes or chat prompts, continued by BLOOMZ 560M.

As in Hugging Face's cookbook on prompt tuning.

    spt-jax train quotes_bloomz_560m --data.train quotes.jsonl
    spt-jax train quotes_bloomz_560m --data.train prompts.csv --data.target "{prompt}"

The files are those of Abirate/english_quotes and fka/awesome-chatgpt-prompts. Expect a download of about 1.1 GB on the
first run. No results have been measured yet.
"""

from spt_jax.config import BaseConfig, DataConfig, EvaluationConfig, ExperimentConfig, OptimizerConfig, TrainConfig
from spt_jax.prompts import PromptTuning


def get_config() -> ExperimentConfig[PromptTuning]:
    """4 virtual tokens before a text all of whose tokens are targets."""
    return ExperimentConfig(
        base=BaseConfig(path="bigscience/bloomz-560m"),
        data=DataConfig(train="", prompt="<soft>", target="{quote}", limit=50),
        method=PromptTuning(length=4),
        optimizer=OptimizerConfig(name="adamw", learning_rate=0.0035, schedule="linear"),
        train=TrainConfig(steps=42, batch_size=8),
        evaluation=EvaluationConfig(max_new_tokens=50),
    )
