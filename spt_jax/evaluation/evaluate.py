"""Evaluates prompts by verbalizer scoring, perplexity, and comparison of generated answers with references.

The same functions evaluate a soft prompt, a hand-written prompt, and no prompt, so the results are comparable.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from spt_jax.bases.base import FrozenBase
from spt_jax.data.batches import Batch, BatchPlan, Rows, multiples, place_batch, plan_batches
from spt_jax.data.encoded import encode_records
from spt_jax.data.encoder import Encoder
from spt_jax.data.examples import Example
from spt_jax.data.sequences import packing_saves
from spt_jax.data.shots import SEPARATOR
from spt_jax.data.streams import evaluation_batches, evaluation_plans
from spt_jax.data.task import Evaluation, PairCriterion, task_of
from spt_jax.errors import ConfigError, DataError
from spt_jax.evaluation import metrics
from spt_jax.evaluation.after_text import agreement_with_text, examples_after_text, ids_after_text, plan_after_text
from spt_jax.evaluation.bare import bare_examples, bare_plan, divergence
from spt_jax.evaluation.classes import class_agreement
from spt_jax.evaluation.rewarded import evaluate_rewards
from spt_jax.evaluation.rewards import Judge
from spt_jax.inference.forward import encode_prefix, group_scores, target_scores
from spt_jax.inference.generation import SamplingConfig, generate
from spt_jax.models.attention import Prefix
from spt_jax.models.model import Model
from spt_jax.prompts import VirtualPrompt
from spt_jax.runtime.extras import installed
from spt_jax.runtime.sharding import to_host


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How validation and test are run.

    Attributes:
      batch_size: examples per batch.
      max_new_tokens: the maximum length of generated answers, and of the answers that a span head predicts.
      generate: the number of records to generate answers for; loss and perplexity always use all records.
    """

    batch_size: int = 64
    max_new_tokens: int = 64
    generate: int = 200

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_new_tokens", "generate"):
            if getattr(self, name) < 1:
                raise ConfigError(f"evaluation.{name} is {getattr(self, name)}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
    """Records encoded with one template, ready to be scored repeatedly.

    Attributes:
      encoder: how records are encoded.
      records: the records.
      examples: the encoded records.
      plan: the shapes of batches.
      config: how the evaluation is run.
      prompts: the ids to generate answers from, for the first records of a task with free-text answers.
      reference: for pairs, the log-probabilities of both answers under the bare base; None if they are not known.
      criterion: for pairs, the rewards and losses of the objective; None for those of `reference`.
      text: the ids of a text, whose predictions those of the set are compared with; None for none.
      judge: the reward functions of the task `Rewards`; None for another task.
      text_scores: the log-probability of each choice after the text, to compare classes with; None for none.
      text_examples: the encoded records as they follow the text, where they begin otherwise without it; None for
        `examples`.
    """

    encoder: Encoder
    records: Sequence[Mapping[str, Any]]
    examples: Sequence[Example]
    plan: BatchPlan
    config: EvaluationConfig
    prompts: Sequence[np.ndarray] = ()
    reference: Float[np.ndarray, "N 2"] | None = None
    criterion: PairCriterion | None = None
    text: Int[np.ndarray, " P"] | None = None
    judge: Judge | None = None
    text_scores: Float[np.ndarray, "N C"] | None = None
    text_examples: Sequence[Example] | None = None

    @property
    def max_new_tokens(self) -> int:
        """The maximum number of tokens of an answer."""
        return self.config.max_new_tokens


def make_evaluation_set(
    base: FrozenBase,
    encoder: Encoder,
    records: Sequence[Mapping[str, Any]],
    config: EvaluationConfig | None = None,
    *,
    packing: bool = True,
    taken: int = 0,
    reference: bool = True,
    criterion: PairCriterion | None = None,
    text: Int[np.ndarray, " P"] | None = None,
    judge: Judge | None = None,
) -> EvaluationSet:
    """Encodes records and the prompts to generate their answers from, and plans batches.

    Args:
      base: the frozen base.
      encoder: how records are encoded.
      records: the records.
      config: how the evaluation is run.
      packing: whether examples share rows where that saves time.
      taken: the number of positions that the soft prompt's keys and values take before each record.
      reference: for pairs, whether a soft prompt will be compared with the bare base, whose scores are computed here.
      criterion: for pairs, the objective whose rewards and losses are reported; None for the log-probabilities relative
        to the bare base.
      text: the ids of a text, whose predictions those of the set will be compared with; None for none.
      judge: the reward functions of the task `Rewards`.

    Returns:
      The encoded records in batches of equal shapes.

    Raises:
      DataError: a record lacks a field, has an unknown label or is too long.
    """
    config = config or EvaluationConfig()
    examples = encode_records(encoder, records)
    plan = plan_batches(
        examples,
        lead=encoder.leads(examples),
        batch_size=config.batch_size,
        packing=packing and packing_saves(examples, base.layout),
        **multiples(base.mesh),
        max_length=base.layout.max_positions,
    )
    (plan,) = evaluation_plans([examples], [plan], config.batch_size)
    task = task_of(encoder.template)
    asked = len(records) if task.judged else config.generate if task.generates and not task.pairs else 0
    answered = zip(records[:asked], examples, strict=False)
    unused = base.layout.max_positions - taken - encoder.max_length
    new_tokens = config.max_new_tokens if judge is None else judge.max_new_tokens
    prompts = [_prompt(encoder, *pair, room=new_tokens - unused) for pair in answered]
    known = reference_scores(base, examples, config.batch_size, packing=packing) if task.pairs and reference else None
    return EvaluationSet(
        encoder, records, examples, plan, config, prompts, known, criterion if task.pairs else None, text, judge
    )


def set_after_text(base: FrozenBase, data: EvaluationSet) -> EvaluationSet:
    """Returns the set with its text before each record, and without virtual tokens, for the base without a prompt.

    Args:
      base: the frozen base.
      data: a set with a text.

    Raises:
      DataError: the text and a record are longer than the context of the base.
    """
    assert data.text is not None
    examples = examples_after_text(base, data.text, data.examples)
    plan = plan_after_text(base, examples, data.config.batch_size, packing=data.plan.examples > 1)
    prompts = [ids_after_text(base, data.text, ids) for ids in data.prompts]
    return dataclasses.replace(data, examples=examples, plan=plan, prompts=prompts, text=None, text_scores=None)


def _prompt(encoder: Encoder, record: Mapping[str, Any], example: Example, room: int) -> np.ndarray:
    """Returns the ids to generate a record's answer from: those before the target of its example.

    If the example was shortened to fit with its target, the prompt is instead shortened to leave room for new tokens,
    at most half of the encoder's maximum length.
    """
    record = encoder.up_to_answer(record)
    prompt = encoder.prompt_ids(record)
    trained = example.ids[: len(prompt)]
    # In training, earlier answers of a chat are targets. In a prompt, they may merge with the text before them.
    if np.array_equal(prompt, trained) or encoder.answers(record) > 1:
        return prompt
    if encoder.template.truncate is None:
        at = int(np.argmin(prompt[: len(trained)] == trained))
        raise DataError(
            f"record {example.index + 1}: the prompts for generation and for training differ from token {at + 1} on"
        )
    return encoder.prompt_ids(record, room=min(max(room, 1), encoder.max_length // 2))


@functools.partial(jax.jit, static_argnames="choices")
def _batch_scores(
    model: Model, choices: int, virtual: VirtualPrompt | None, batch: Batch
) -> Float[Array, "B E C"] | Float[Array, "B M C"]:
    """Returns the log-probabilities of each example's choices; with a task head, its logits where it reads."""
    prefix = encode_prefix(model, virtual, batch.lead_ids, batch.lead_length)
    return row_scores(model, choices, virtual, prefix, batch.rows)


def row_scores(
    model: Model, choices: int, virtual: VirtualPrompt | None, prefix: Prefix | None, rows: Rows
) -> Float[Array, "B E C"] | Float[Array, "B M C"]:
    """`_batch_scores` with a prefix that was encoded before."""
    scores = target_scores(model, virtual, prefix, rows)
    return group_scores(scores, rows, choices) if scores.logits is None else scores.logits


def score(base: FrozenBase, data: EvaluationSet, virtual: VirtualPrompt | None) -> Float[np.ndarray, "N C"]:
    """Returns the summed log-probability of each choice of each example, or of its target (C = 1), in order.

    With a classification head, it is the log-probability of each class.
    """
    if virtual is not None and virtual.head is not None:
        return log_softmax(np.concatenate(head_logits(base, data, virtual)))
    return _choice_scores(base, data.examples, data.plan, data.config.batch_size, virtual)


def scores_after_text(
    base: FrozenBase, text: Int[np.ndarray, " P"], examples: Sequence[Example], batch_size: int = 64
) -> Float[np.ndarray, "N C"]:
    """Returns the summed log-probability of each choice of each example under the bare base after a text.

    Args:
      base: the frozen base.
      text: the ids of the text.
      examples: examples with choices.
      batch_size: examples per batch.

    Raises:
      DataError: the text and an example are longer than the context of the base.
    """
    longer = examples_after_text(base, text, examples)
    return _choice_scores(base, longer, plan_after_text(base, longer, batch_size, packing=True), batch_size, None)


def reference_scores(
    base: FrozenBase, examples: Sequence[Example], batch_size: int = 64, *, packing: bool = True
) -> Float[np.ndarray, "N C"]:
    """Returns the summed log-probability of each choice of each example under the bare base.

    The context is that of the example without its virtual tokens: all other ids stay the same.

    Args:
      base: the frozen base.
      examples: examples with choices.
      batch_size: examples per batch.
      packing: whether examples share rows.

    Raises:
      DataError: without virtual tokens, an example has no token before its choices.
    """
    bare = bare_examples(base, examples)
    plan = bare_plan(base, bare, batch_size, packing=packing and packing_saves(bare, base.layout))
    return _choice_scores(base, bare, plan, batch_size, None)


def _choice_scores(
    base: FrozenBase, examples: Sequence[Example], plan: BatchPlan, batch_size: int, virtual: VirtualPrompt | None
) -> Float[np.ndarray, "N C"]:
    scores = np.zeros((len(examples), plan.choices), np.float32)
    for rows, values in _scored(base, examples, plan, batch_size, virtual):
        real = rows.examples >= 0
        scores[rows.examples[real]] = values[real]
    return scores


def head_logits(base: FrozenBase, data: EvaluationSet, virtual: VirtualPrompt) -> list[Float[np.ndarray, "_ C"]]:
    """Returns for each example the task head's logits at the positions that it reads."""
    found = {}
    for rows, values in _scored(base, data.examples, data.plan, data.config.batch_size, virtual):
        for row, slot in zip(*np.nonzero(rows.examples >= 0), strict=True):
            mask = (rows.target_groups[row] == slot) & (rows.target_weights[row] > 0)
            found[int(rows.examples[row, slot])] = values[row, mask]
    return [found[number] for number in range(len(data.examples))]


def _scored(
    base: FrozenBase, examples: Sequence[Example], plan: BatchPlan, batch_size: int, virtual: VirtualPrompt | None
) -> Iterator[tuple[Rows, Float[np.ndarray, "B _ C"]]]:
    """Yields the rows and `_batch_scores` of each batch. All batches are dispatched before the first is waited for."""
    pending = [
        (batch.rows, _batch_scores(base.model, plan.choices, virtual, place_batch(batch, base.mesh)))
        for batch in evaluation_batches(examples, plan, batch_size)
    ]
    return ((rows, to_host(values)) for rows, values in pending)


def log_softmax(logits: Float[np.ndarray, "N C"]) -> Float[np.ndarray, "N C"]:
    """Computes the log-softmax over the classes, on the host."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def evaluate(
    base: FrozenBase, data: EvaluationSet, virtual: VirtualPrompt | None, *, generated: bool = True
) -> Evaluation:
    """Evaluates a soft prompt, or the base without one, on a set.

    The metrics depend on the task (`spt_jax.tasks`):
      Classification: accuracy and macro-F1 with 95 % bootstrap intervals, accuracy by mean log-probability per token,
        and the cross-entropy among the verbalizers.
      Tagging head: accuracy and macro-F1 over words and, for tags such as B-X, I-X and O, F1 over whole entities.
      Span head: exact match and token F1 of the text between the likeliest start and end.
      Pairs of answers: the share whose chosen answer has the higher log-probability and the higher reward, the mean
        difference of the rewards and, for a soft prompt, the log-ratio and the KL divergence to the bare base per token
        of the chosen answers (`spt_jax.tasks.Preference.evaluate`, `spt_jax.evaluation.bare.divergence`).
      With a text, also the agreement with the base after it and the KL divergence from it, per target token of the
        correct answers (`spt_jax.evaluation.after_text.Agreement`).
      Rewards: the mean reward of sampled answers (`spt_jax.evaluation.rewarded.evaluate_rewards`), also if not
        `generated`.
      Text: loss per token and perplexity over the targets and, if `generated`, exact match, token F1, BLEU and ROUGE of
        greedily generated answers. BLEU and ROUGE are left out without the extra `metrics`.

    Args:
      base: the frozen base.
      data: the set.
      virtual: the soft prompt; None for none.
      generated: whether to generate answers.

    Returns:
      The metrics, and a prediction for each record.

    Raises:
      ConfigError: the task has a head, and there is no soft prompt.
    """
    task = task_of(data.encoder.template)
    if virtual is None:
        data = dataclasses.replace(data, reference=None, criterion=None)
    if data.judge is not None:
        count = len(data.prompts)
        return evaluate_rewards(
            base,
            data.prompts,
            data.records[:count],
            data.judge,
            virtual,
            end_ids=data.encoder.end_ids,
            prompt_index=[example.prompt for example in data.examples[:count]] if data.encoder.template.tasks else None,
            batch_size=data.config.batch_size,
        )
    if task.reads_field:
        if virtual is None:
            raise ConfigError(f"without a soft prompt, the base has no {task.name} head")
        return _by_task(data, from_scores(data, head_logits(base, data, virtual)))
    scores = score(base, data, virtual)
    result = from_scores(data, list(scores))
    if data.reference is not None and virtual is not None:
        lead = data.encoder.leads(data.examples)
        distance = divergence(base, data.examples, lead, virtual, data.config.batch_size)
        result = dataclasses.replace(result, metrics={**result.metrics, "kl_to_base": distance})
    if data.text is not None:
        lead, size = data.encoder.leads(data.examples), data.config.batch_size
        found = agreement_with_text(base, data.text, data.examples, lead, virtual, size, data.text_examples)
        more = {"agreement": found.agreement, "kl_to_text": found.divergence}
        if data.text_scores is not None:
            more |= class_agreement(scores, data.text_scores)
        result = dataclasses.replace(result, metrics={**result.metrics, **more})
    generated = generated and task.generates and not task.pairs
    return _by_task(data, _with_answers(base, data, virtual, result) if generated else result)


def from_scores(data: EvaluationSet, scores: Sequence[Float[np.ndarray, "..."]]) -> Evaluation:
    """Computes the metrics of the task.

    Args:
      data: the set.
      scores: for each example, its row of `score`, or its `head_logits` if the head reads a field.
    """
    return task_of(data.encoder.template).evaluate(scores, data)


def _by_task(data: EvaluationSet, result: Evaluation) -> Evaluation:
    """Adds the accuracy or the perplexity of each task to the metrics over all."""
    tasks: dict[str, Any] = {}
    for number, name in enumerate(data.encoder.template.tasks):
        own = [p for p, e in zip(result.predictions, data.examples, strict=True) if e.prompt == number]
        if own and "label" in own[0]:
            tasks[name] = {"accuracy": float(np.mean([p["label"] == p["prediction"] for p in own]))}
        elif own:
            loss = -sum(p["log_probability"] for p in own) / sum(p["tokens"] for p in own)
            tasks[name] = {"perplexity": float(np.exp(loss))}
        tasks.setdefault(name, {})["examples"] = len(own)
    return dataclasses.replace(result, metrics={**result.metrics, "tasks": tasks}) if tasks else result


def selection_score(result: Mapping[str, Any]) -> float:
    """Returns the score that validation maximizes: accuracy, with ties broken by lower loss; otherwise minus the loss.

    With reward functions, it is the mean reward. With a text to agree with, it is minus the KL divergence from it. A
    loss that is not finite scores -inf; the divergence of the classes counts where they are compared.
    """
    if not math.isfinite(result["loss"]):
        return -math.inf
    if "reward" in result:
        return result["reward"]
    if "kl_to_text" in result:
        return -result.get("class_kl", result["kl_to_text"])
    if "accuracy" not in result:
        return -result["loss"]
    tie_break = 1 / (1 + result["loss"]) / (2 * result["examples"])  # less than half an example
    return result["accuracy"] + tie_break


def _with_answers(
    base: FrozenBase, data: EvaluationSet, virtual: VirtualPrompt | None, result: Evaluation
) -> Evaluation:
    prompts, encoder = data.prompts, data.encoder
    references = [encoder.reference(record) for record in data.records[: len(prompts)]]
    positions = base.layout.max_positions - (0 if virtual is None else virtual.prefix_length)
    stop = (SEPARATOR,) if encoder.shots and not encoder.template.chat else ()
    sampling = [
        SamplingConfig(
            max_new_tokens=max(1, min(data.config.max_new_tokens, positions - len(prompt))),
            stop=stop,
            end_ids=encoder.end_ids,
        )
        for prompt in prompts
    ]
    several = virtual is not None and encoder.template.tasks
    index = [example.prompt for example in data.examples[: len(prompts)]] if several else None
    answers = generate(base, prompts, virtual, sampling, prompt_index=index, batch_size=data.config.batch_size)
    texts = [answer.text.strip() for answer in answers]
    matches = metrics.bootstrap_interval(metrics.exact_match_values(texts, references))
    more: dict[str, Any] = {
        "exact_match": matches.value,
        "exact_match_interval": matches.bounds,
        "token_f1": metrics.token_f1(texts, references),
    }
    if installed("sacrebleu"):
        more["bleu"] = metrics.bleu(texts, references)
    if installed("rouge_score"):
        more |= dataclasses.asdict(metrics.rouge(texts, references))
    more["generated"] = len(texts)
    answered = [
        {**p, "prediction": t, "reference": r} for p, t, r in zip(result.predictions, texts, references, strict=False)
    ]
    return Evaluation({**result.metrics, **more}, answered + result.predictions[len(texts) :])
