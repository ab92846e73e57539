"""Answers in a text (SQuAD 1.1) with ModernBERT base.

Data and model are from the hub. Trains deep prompts and a span head, as in P-tuning v2 (Liu et al. 2022, arXiv
2110.07602).

    spt-jax train squad_modernbert_base

ModernBERT has 8,192 positions, so no text has to be split. Reports exact match and token F1. Expect a download of about
0.7 GB on the first run. No results have been measured yet.
"""

from spt_jax.config import BaseConfig, DataConfig, EvaluationConfig, ExperimentConfig, TrainConfig
from spt_jax.prompts import DeepPrompts


def get_config() -> ExperimentConfig[DeepPrompts]:
    """Keys and values of 16 positions in each layer; 2 epochs of 87,599 questions; answers of at most 30 tokens."""
    return ExperimentConfig(
        base=BaseConfig(path="answerdotai/ModernBERT-base"),
        data=DataConfig(
            train="rajpurkar/squad",
            validation="rajpurkar/squad",
            prompt="{question}\n{context}",
            target="{answers}",
            reads="context",
        ),
        method=DeepPrompts(length=16, head="span"),
        train=TrainConfig(steps=5500, batch_size=32),
        evaluation=EvaluationConfig(max_new_tokens=30),
    )
