"""Compares the soft prompt with hand-written prompts and no prompt at the end of a run."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from spt_jax.bases.base import FrozenBase
from spt_jax.data.streams import evaluation_plans
from spt_jax.data.task import Evaluation, works_bare
from spt_jax.evaluation.evaluate import EvaluationSet, evaluate, selection_score, set_after_text
from spt_jax.evaluation.kept import evaluate_without_prompt
from spt_jax.experiment.run import Experiment, Records
from spt_jax.prompts import VirtualPrompt
from spt_jax.runtime.progress import Progress


@dataclasses.dataclass(frozen=True)
class EvaluationSets:
    """One split, encoded for each side of the comparison.

    Attributes:
      soft: for the soft prompt.
      hard: for each hand-written prompt, by its text.
      bare: without a prompt; None if the base cannot do the task.
      text: after the text of a distillation; None for another objective.
    """

    soft: EvaluationSet
    hard: Mapping[str, EvaluationSet]
    bare: EvaluationSet | None
    text: EvaluationSet | None = None


def evaluation_sets(experiment: Experiment) -> dict[str, EvaluationSets]:
    """Encodes the data for `compare`. Called before training, so that invalid records are found before it starts."""
    template = experiment.template
    splits = {"validation": experiment.validation, "test": experiment.test}

    def encoded(records: Records) -> EvaluationSets:
        soft = experiment.evaluation_set(records, template)
        return EvaluationSets(
            soft=soft,
            hard={text: experiment.evaluation_set(records, template.bare(text)) for text in experiment.hard_prompts},
            bare=experiment.evaluation_set(records, template.bare()) if works_bare(template, experiment.base) else None,
            text=None if soft.text is None else set_after_text(experiment.base, soft),
        )

    return _with_common_shapes({split: encoded(own) for split, own in splits.items() if own is not None})


def _with_common_shapes(by_split: Mapping[str, EvaluationSets]) -> dict[str, EvaluationSets]:
    """Gives the sets of one template the same shapes in all splits, so that they are evaluated by one program."""

    def alike(sets: Sequence[EvaluationSet]) -> list[EvaluationSet]:
        plans = evaluation_plans([s.examples for s in sets], [s.plan for s in sets], sets[0].config.batch_size)
        return [dataclasses.replace(own, plan=plan) for own, plan in zip(sets, plans, strict=True)]

    found = list(by_split.values())
    if not found:
        return {}
    soft = alike([own.soft for own in found])
    bare = (
        alike([own.bare for own in found if own.bare is not None]) if found[0].bare is not None else [None] * len(found)
    )
    hard = {text: alike([own.hard[text] for own in found]) for text in found[0].hard}
    return {
        split: dataclasses.replace(
            own, soft=soft[i], bare=bare[i], hard={text: of_text[i] for text, of_text in hard.items()}
        )
        for i, (split, own) in enumerate(by_split.items())
    }


def compare(
    base: FrozenBase,
    sets: Mapping[str, EvaluationSets],
    virtual: VirtualPrompt,
    validated: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, Evaluation | None]]:
    """Evaluates the soft prompt, the best hand-written prompt and no prompt on the same records, and a text if any.

    The best hand-written prompt is the one with the best validation score, or the first one without validation data;
    its metrics include its text. Answers are generated only for the test split. What is asked without a soft prompt is
    kept on disk (`spt_jax.evaluation.kept`).

    Args:
      base: the frozen base.
      sets: the encoded records of each split.
      virtual: the soft prompt.
      validated: the metrics of the soft prompt on "validation", if they are known from training.

    Returns:
      For each split, the evaluation of each way of asking; that of a validated soft prompt has no predictions.
    """

    def ask(data: EvaluationSet, virtual: VirtualPrompt | None, split: str, **more: str) -> Evaluation:
        if virtual is not None:
            name = "soft prompt"
        elif data is sets[split].text:
            name = "the text itself"
        else:
            name = "hand-written prompt" if more else "no soft prompt"
        progress.begin(f"{name} on {split} data")
        if virtual is None:
            result = evaluate_without_prompt(base, data, generated=split == "test")
        elif split == "validation" and validated is not None:
            result = Evaluation(dict(validated), [])
        else:
            result = evaluate(base, data, virtual, generated=split == "test")
        progress.advance()
        return dataclasses.replace(result, metrics={**result.metrics, **more})

    # All hand-written prompts are evaluated on the first split, and then only the chosen one.
    written = [len(own.hard) if number == 0 else min(len(own.hard), 1) for number, own in enumerate(sets.values())]
    parts = sum(written) + sum(1 + (own.bare is not None) + (own.text is not None) for own in sets.values())
    chosen: str | None = None
    results: dict[str, dict[str, Evaluation | None]] = {}
    with Progress("comparing", parts) as progress:
        for split, encoded in sets.items():
            hard = {
                text: ask(data, None, split, text=text) for text, data in encoded.hard.items() if chosen in (None, text)
            }
            if chosen is None and hard:
                chosen = max(hard, key=lambda text: selection_score(hard[text].metrics))
            results[split] = {
                "soft_prompt": ask(encoded.soft, virtual, split),
                "hard_prompt": None if chosen is None else hard[chosen],
                "no_prompt": None if encoded.bare is None else ask(encoded.bare, None, split),
            }
            if encoded.text is not None:
                results[split]["with_text"] = ask(encoded.text, None, split)
    return results
