"""Names in a text (CoNLL-2003) with RoBERTa large.

Tags names of persons, places, organizations and others, with deep prompts and a tagging head as in P-tuning v2 (Liu et
al. 2022, arXiv 2110.07602).

    spt-jax train conll2003_roberta_large --data.train train.jsonl --data.validation validation.jsonl

Records have the words of a sentence in `tokens` and their tags in `tags`: lists, or text with spaces between. The tags
are those of the training data, such as B-PER, I-PER and O. Reports accuracy and the F1 of whole names. Expect a
download of about 1.4 GB on the first run. No results have been measured yet.
"""

from spt_jax.config import BaseConfig, DataConfig, ExperimentConfig, TrainConfig
from spt_jax.prompts import DeepPrompts


def get_config() -> ExperimentConfig[DeepPrompts]:
    """Keys and values of 16 positions in each layer; 10 epochs of 14,041 sentences in batches of 32."""
    return ExperimentConfig(
        base=BaseConfig(path="FacebookAI/roberta-large"),
        data=DataConfig(train="", prompt="{tokens}", target="{tags}", reads="tokens"),
        method=DeepPrompts(length=16, head="tagging"),
        train=TrainConfig(steps=4400, batch_size=32),
    )
