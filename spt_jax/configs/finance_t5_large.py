"""Sentiment of financial news with T5 large.

As in PEFT's example of prompt tuning of an encoder-decoder.

    spt-jax train finance_t5_large --data.train train.csv --data.validation validation.csv

The files are those of financial_phrasebank, sentences_allagree, as CSV with the columns `sentence` and `label`, which
is negative, neutral or positive. For PEFT's example of prefix tuning, add --method.name prefix_tuning --method.length
20 --data.prompt "{sentence}" --optimizer.learning-rate 0.01. Expect a download of about 3 GB on the first run. No
results have been measured yet.
"""

from spt_jax.config import BaseConfig, DataConfig, ExperimentConfig, LossConfig, OptimizerConfig, TrainConfig
from spt_jax.prompts import PromptTuning
from spt_jax.prompts.initializers import text

QUESTION = "What is the sentiment of this article?\n"


def get_config() -> ExperimentConfig[PromptTuning]:
    """20 virtual tokens that start as a question; 5 epochs of 2,037 sentences; the tokens of the label are targets."""
    return ExperimentConfig(
        base=BaseConfig(path="google-t5/t5-large"),
        data=DataConfig(
            train="",
            prompt="<soft> {sentence}",
            target="{label}",
            verbalizers={"negative": "negative", "neutral": "neutral", "positive": "positive"},
            hard_prompt=(QUESTION + "{sentence}",),
        ),
        method=PromptTuning(length=20, init=text(QUESTION)),
        optimizer=OptimizerConfig(name="adamw", learning_rate=1.0, schedule="linear"),
        loss=LossConfig(over="vocabulary"),
        train=TrainConfig(steps=1275, batch_size=8),
    )
