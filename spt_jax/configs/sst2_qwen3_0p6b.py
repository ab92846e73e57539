"""Sentiment of film reviews (SST-2) with Qwen3 0.6B.

Data and model are from the hub.

    spt-jax train sst2_qwen3_0p6b

Expect a download of about 1.5 GB on the first run. Add --mesh.data N to use N GPUs or TPUs. No results have been
measured yet.
"""

from spt_jax.config import BaseConfig, DataConfig, ExperimentConfig, TrainConfig
from spt_jax.prompts import PromptTuning


def get_config() -> ExperimentConfig[PromptTuning]:
    """20 virtual tokens; the hub's labels are 0 and 1."""
    return ExperimentConfig(
        base=BaseConfig(path="Qwen/Qwen3-0.6B-Base"),
        data=DataConfig(
            train="stanfordnlp/sst2",
            validation="stanfordnlp/sst2",
            prompt="<soft>{sentence}\nSentiment:",
            target="{label}",
            verbalizers={"0": " negative", "1": " positive"},
            hard_prompt=(
                "Review: {sentence}\nSentiment:",
                "Is this film review positive or negative? {sentence}\nAnswer:",
            ),
        ),
        method=PromptTuning(length=20),
        train=TrainConfig(steps=2000, batch_size=32, evaluate_every=200),
    )
