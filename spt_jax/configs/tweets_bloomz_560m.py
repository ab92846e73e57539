"""Complaints in tweets (RAFT) with BLOOMZ 560M.

As in PEFT's example of prompt tuning.

    spt-jax train tweets_bloomz_560m --data.train train.csv --data.test test.csv

The files are those of ought/raft, twitter_complaints, with their columns `Tweet text` and `Label` renamed to `text` and
`label`; 1 is a complaint and 2 is not. Expect a download of about 1.1 GB on the first run. No results have been
measured yet.
"""

from spt_jax.config import BaseConfig, DataConfig, ExperimentConfig, LossConfig, OptimizerConfig, TrainConfig
from spt_jax.prompts import PromptTuning
from spt_jax.prompts.initializers import text


def get_config() -> ExperimentConfig[PromptTuning]:
    """8 virtual tokens that start as an instruction; 50 epochs of 50 tweets; the tokens of the label are targets."""
    return ExperimentConfig(
        base=BaseConfig(path="bigscience/bloomz-560m"),
        data=DataConfig(
            train="",
            prompt="<soft>Tweet text : {text} Label : ",
            target="{label}",
            verbalizers={"1": "complaint", "2": "no complaint"},
            hard_prompt=("Classify if the tweet is a complaint or not:\nTweet text : {text} Label : ",),
        ),
        method=PromptTuning(length=8, init=text("Classify if the tweet is a complaint or not:")),
        optimizer=OptimizerConfig(name="adamw", learning_rate=0.03, schedule="linear"),
        loss=LossConfig(over="vocabulary"),
        train=TrainConfig(steps=350, batch_size=8),
    )
