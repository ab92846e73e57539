"""Evaluates a prompt by the rewards of answers that it samples."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spt_jax.bases.base import FrozenBase
from spt_jax.data.task import Evaluation
from spt_jax.evaluation import metrics
from spt_jax.evaluation.rewards import Judge
from spt_jax.inference.generation import SamplingConfig, generate
from spt_jax.prompts import VirtualPrompt

SEED = 0  # of the samples, so that all prompts are compared on the same random numbers


def evaluate_rewards(
    base: FrozenBase,
    prompts: Sequence[np.ndarray],
    records: Sequence[Mapping[str, Any]],
    judge: Judge,
    virtual: VirtualPrompt | None,
    *,
    end_ids: tuple[int, ...] = (),
    prompt_index: Sequence[int] | None = None,
    batch_size: int = 64,
) -> Evaluation:
    """Samples one answer to each prompt, at the temperature of training, and judges it.

    reward: the mean reward, with its 95 % bootstrap interval; reward/NAME: the mean of each of several functions.
    completion_length: the mean number of tokens of an answer. loss: minus the mean reward.
    An answer that a function failed for is left out of the means, and its prediction has no reward.

    Args:
      base: the frozen base.
      prompts: the ids of the prompts.
      records: the record of each prompt.
      judge: the reward functions.
      virtual: the soft prompt; None for none.
      end_ids: ids that end an answer, in addition to those of the base.
      prompt_index: the index of each prompt's soft prompt, if `virtual` holds several.
      batch_size: answers that are generated together.

    Raises:
      RewardError: the functions failed for too many answers.
    """
    sampling = SamplingConfig(
        max_new_tokens=judge.max_new_tokens, temperature=judge.temperature, end_ids=end_ids, seed=SEED
    )
    answers = generate(base, prompts, virtual, sampling, prompt_index=prompt_index, batch_size=batch_size)
    texts = [prompt_text(base, ids) for ids in prompts]
    judged = judge.judge(texts, [answer.text for answer in answers], records)
    known = judged.rewards[np.isfinite(judged.rewards)]
    mean = metrics.bootstrap_interval(known)
    result: dict[str, Any] = {"reward": mean.value, "reward_interval": mean.bounds}
    if len(judged.by_name) > 1:
        result |= {f"reward/{name}": float(np.nanmean(values)) for name, values in judged.by_name.items()}
    result["completion_length"] = float(np.mean([len(answer.ids) for answer in answers]))
    predictions = [
        {"prediction": answer.text, "reward": None if np.isnan(reward) else float(reward)}
        for answer, reward in zip(answers, judged.rewards, strict=True)
    ]
    return Evaluation({**result, "loss": -mean.value, "examples": len(known)}, predictions)


def prompt_text(base: FrozenBase, ids: np.ndarray) -> str:
    """Returns the text of a prompt, without its virtual tokens, as reward functions get it.

    Args:
      base: the frozen base.
      ids: the ids of the prompt.
    """
    real = [int(token) for token in ids if token < base.layout.vocab_size]
    return base.tokenizer.decode(real, skip_special_tokens=True, clean_up_tokenization_spaces=False)
