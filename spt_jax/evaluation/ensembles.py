"""Evaluates several prompts in the same batches, on different records or, as an ensemble, on the same ones.

As in Lester et al. 2021, section 6, one call of the base serves all prompts of an ensemble.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

from spt_jax.bases.base import FrozenBase
from spt_jax.data.batches import multiples, plan_batches
from spt_jax.data.sequences import packing_saves
from spt_jax.data.task import task_of
from spt_jax.errors import ConfigError
from spt_jax.evaluation.evaluate import Evaluation, EvaluationSet, from_scores, score
from spt_jax.prompts import VirtualPrompt
from spt_jax.prompts.stacking import stack_prompts


def score_together(
    base: FrozenBase, sets: Sequence[EvaluationSet], prompts: Sequence[VirtualPrompt]
) -> list[Float[np.ndarray, "_ _"]]:
    """Computes `evaluate.score` of each prompt on its set, in batches that mix all prompts.

    Args:
      base: the frozen base.
      sets: one evaluation set per prompt.
      prompts: the prompts, of any methods and lengths.

    Returns:
      The scores of each prompt.

    Raises:
      ConfigError: there are not as many sets as prompts, a set has a tagging or span head, or the prompts cannot be
        stacked (see `stack_prompts`).
    """
    if len(sets) != len(prompts) or not sets:
        raise ConfigError(f"{len(sets)} sets for {len(prompts)} prompts; each prompt needs one")
    if any(task_of(data.encoder.template).reads_field for data in sets):
        raise ConfigError("heads that read a field, for tags or spans, are evaluated one prompt at a time")
    starts = list(itertools.accumulate((len(data.examples) for data in sets), initial=0))
    examples = [
        dataclasses.replace(example, prompt=s, index=starts[s] + n)
        for s, data in enumerate(sets)
        for n, example in enumerate(data.examples)
    ]
    plan = plan_batches(
        examples,
        lead=[data.plan.lead_ids.shape[-1] for data in sets],
        batch_size=sets[0].config.batch_size,
        packing=packing_saves(examples, base.layout),
        **multiples(base.mesh),
        max_length=base.layout.max_positions,
    )
    together = dataclasses.replace(sets[0], examples=examples, plan=plan)
    scores = score(base, together, stack_prompts(prompts))
    choices = [max(1, len(data.encoder.template.verbalizers)) for data in sets]
    return [scores[a:b, :count] for a, b, count in zip(starts, starts[1:], choices, strict=False)]


def evaluate_ensemble(
    base: FrozenBase,
    sets: Sequence[EvaluationSet],
    prompts: Sequence[VirtualPrompt],
    combine: Literal["mean", "vote"] = "mean",
) -> Evaluation:
    """Evaluates classification by an ensemble of prompts.

    Args:
      base: the frozen base.
      sets: one evaluation set per prompt, all with the same records and classes.
      prompts: the prompts.
      combine: "mean" predicts the class with the highest mean log-probability, normalized over the classes. "vote"
        predicts the class that most prompts choose; ties are decided by the higher mean.

    Returns:
      The metrics of the ensemble, and its prediction for each record.

    Raises:
      ConfigError: the task has no classes, or the sets have different numbers of records or different classes.
    """
    if not sets or not sets[0].encoder.template.verbalizers:
        raise ConfigError("an ensemble votes on classes, and this task has no verbalizers")
    if len({(len(data.examples), tuple(data.encoder.template.verbalizers)) for data in sets}) > 1:
        raise ConfigError("an ensemble needs one set per prompt, all with the same records and classes")
    scores = np.stack(score_together(base, sets, prompts)).astype(np.float64)
    scores -= np.logaddexp.reduce(scores, axis=-1, keepdims=True)
    combined = scores.mean(0)
    if combine == "vote":
        votes = np.zeros_like(combined)
        for choice in scores.argmax(-1):
            votes[np.arange(len(choice)), choice] += 1
        # A mean log-probability squashed into (0, 1) decides among equal votes and changes nothing else.
        combined = votes + 1 / (1 + np.exp(-combined)) / 2
    result = from_scores(sets[0], list(combined.astype(np.float32)))
    if combine == "mean":
        return result
    # Votes are not log-probabilities, so there is no loss.
    return dataclasses.replace(result, metrics={k: v for k, v in result.metrics.items() if k != "loss"})
