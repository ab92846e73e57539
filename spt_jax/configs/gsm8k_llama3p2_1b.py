"""Grade-school mathematics (GSM8K) with Llama 3.2 1B.

Data and model are from the hub. You must accept the license of the model first.

    spt-jax train gsm8k_llama3p2_1b --base.remat full

Expect a download of about 2.5 GB on the first run. No results have been measured yet.
"""

from spt_jax.config import BaseConfig, DataConfig, EvaluationConfig, ExperimentConfig, TrainConfig
from spt_jax.prompts import PromptTuning
from spt_jax.prompts.initializers import text


def get_config() -> ExperimentConfig[PromptTuning]:
    """20 virtual tokens before the question; the answer is generated, and all its tokens are targets."""
    return ExperimentConfig(
        base=BaseConfig(path="meta-llama/Llama-3.2-1B"),
        data=DataConfig(
            train="openai/gsm8k:main",
            test="openai/gsm8k:main",
            prompt="<soft>Question: {question}\nAnswer:",
            target=" {answer}",
            hard_prompt=("Solve the problem step by step.\nQuestion: {question}\nAnswer:",),
        ),
        method=PromptTuning(length=20, init=text("Solve the problem step by step. End with the answer after ####.")),
        train=TrainConfig(steps=5000, batch_size=8, evaluate_every=500),
        evaluation=EvaluationConfig(max_new_tokens=256),
    )
