"""Paraphrases (MRPC) with RoBERTa large.

As in PEFT's examples of prompt tuning, P-tuning and prefix tuning of an encoder.

    spt-jax train mrpc_roberta_large --data.train train.jsonl --data.validation validation.jsonl

Records have the fields of glue, mrpc: `sentence1`, `sentence2` and `label`, 1 for a paraphrase. Virtual tokens come
before the first sentence, and a word is predicted at the mask, as in the paper of P-tuning; PEFT's example trains a
classifier, which reads a virtual token. For P-tuning, add --method.name p_tuning --method.length 20; for prefix tuning
with a classifier, --task.name classification --method.name deep_prompts --method.length 20 --data.prompt
"{sentence1}</s></s>{sentence2}". Expect a download of about 1.4 GB on the first run. No results have been measured yet.
"""

from spt_jax.config import BaseConfig, DataConfig, ExperimentConfig, OptimizerConfig, TrainConfig
from spt_jax.prompts import PromptTuning


def get_config() -> ExperimentConfig[PromptTuning]:
    """10 virtual tokens; 20 epochs of 3,668 pairs in batches of 32."""
    return ExperimentConfig(
        base=BaseConfig(path="FacebookAI/roberta-large"),
        data=DataConfig(
            train="",
            prompt="<soft>{sentence1}<mask>, {sentence2}",
            target="{label}",
            verbalizers={"0": " No", "1": " Yes"},
        ),
        method=PromptTuning(length=10),
        optimizer=OptimizerConfig(schedule="linear"),
        train=TrainConfig(steps=2300, batch_size=32),
    )
