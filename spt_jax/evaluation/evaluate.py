"""How good a prompt is: verbalizer scoring, perplexity, and generated answers against references.

The same functions run with a soft prompt, with a hand-written prompt and with none: that comparison is the point.
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
from spt_jax.bases.checkpoint import Params
from spt_jax.data.batches import Batch, BatchPlan, Rows, evaluation_batches, multiples, place_batch, plan_batches
from spt_jax.data.encoder import SEPARATOR, Encoder
from spt_jax.data.examples import Example
from spt_jax.data.reading import END, START
from spt_jax.errors import ConfigError, DataError
from spt_jax.evaluation import metrics
from spt_jax.inference.forward import encode_prefix, group_scores, target_scores
from spt_jax.inference.generation import SamplingConfig, generate
from spt_jax.models.attention import Prefix
from spt_jax.models.decoder import Decoder
from spt_jax.prompts import VirtualPrompt
from spt_jax.runtime.sharding import to_host


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How validation and test are run.

    Attributes:
      batch_size: examples per batch.
      max_new_tokens: of generated answers.
      generate: how many test records to generate answers for; loss and perplexity always use all.
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
    """Records as one template reads them, ready to be scored again and again.

    prompts: ids to generate answers from, for the first records of a task whose answers are text.
    """

    encoder: Encoder
    records: Sequence[Mapping[str, Any]]
    examples: Sequence[Example]
    plan: BatchPlan
    config: EvaluationConfig
    prompts: Sequence[np.ndarray] = ()


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Metrics as plain JSON values, and what was predicted for every record, in the records' order."""

    metrics: dict[str, Any]
    predictions: list[dict[str, Any]]


def make_evaluation_set(
    base: FrozenBase,
    encoder: Encoder,
    records: Sequence[Mapping[str, Any]],
    config: EvaluationConfig | None = None,
    *,
    packing: bool = True,
    taken: int = 0,
) -> EvaluationSet:
    """Encodes records, and what asks for their answers, and plans their batches.

    Args:
      base: the frozen base.
      encoder: how records are read.
      records: the records.
      config: how they are asked.
      packing: several examples share a row.
      taken: positions of the keys and values that the soft prompt puts before every record.

    Raises:
      DataError: a record lacks a field, has an unknown label or cannot fit.
    """
    config = config or EvaluationConfig()
    examples = encoder.encode_all(records)
    plan = plan_batches(
        examples,
        lead=encoder.leads(examples),
        batch_size=config.batch_size,
        packing=packing,
        **multiples(base.mesh),
        max_length=base.config.max_positions,
    )
    says_text = not encoder.template.verbalizers and encoder.template.head == "language_model"
    asked = zip(records[: config.generate] if says_text else [], examples, strict=False)
    beyond = base.config.max_positions - taken - encoder.max_length
    prompts = [_prompt(encoder, *pair, room=config.max_new_tokens - beyond) for pair in asked]
    return EvaluationSet(encoder, records, examples, plan, config, prompts)


def _prompt(encoder: Encoder, record: Mapping[str, Any], example: Example, room: int) -> np.ndarray:
    """The ids that ask for a record's answer: those before the target of its example.

    Only a prompt that was shortened to fit in with its target is shortened otherwise: to leave room for new tokens, of
    which there may be half as many as the encoder's longest example has.
    """
    record = encoder.up_to_answer(record)
    prompt = encoder.prompt_ids(record)
    trained = example.ids[: len(prompt)]
    # Earlier answers of a chat are targets in training, and merge with the text before them when they are only read.
    if np.array_equal(prompt, trained) or encoder.answers(record) > 1:
        return prompt
    if encoder.template.truncate is None:
        at = int(np.argmin(prompt[: len(trained)] == trained))
        raise DataError(
            f"record {example.index + 1}: the prompt to ask with and the one to train with part at token {at + 1}"
        )
    return encoder.prompt_ids(record, room=min(max(room, 1), encoder.max_length // 2))


@functools.partial(jax.jit, static_argnames=("module", "choices"))
def _batch_scores(
    module: Decoder, choices: int, frozen: Params, virtual: VirtualPrompt | None, batch: Batch
) -> Float[Array, "B E C"] | Float[Array, "B M C"]:
    """Log-probabilities of every example's choices; with a head, its logits at every place that it reads."""
    prefix = encode_prefix(module, frozen, virtual, batch.lead_ids, batch.lead_length)
    return row_scores(module, choices, frozen, virtual, prefix, batch.rows)


def row_scores(
    module: Decoder, choices: int, frozen: Params, virtual: VirtualPrompt | None, prefix: Prefix | None, rows: Rows
) -> Float[Array, "B E C"] | Float[Array, "B M C"]:
    """`_batch_scores` behind a prefix that is there already."""
    scores = target_scores(module, frozen, virtual, prefix, rows)
    return group_scores(scores, rows, choices) if scores.logits is None else scores.logits


def score(base: FrozenBase, data: EvaluationSet, virtual: VirtualPrompt | None) -> Float[np.ndarray, "N C"]:
    """Summed log-probability of every choice of every example, or of its target (C = 1), in the examples' order.

    With a classification head, the log-probability of every class.
    """
    if virtual is not None and virtual.head is not None:
        return log_softmax(np.concatenate(head_logits(base, data, virtual)))
    scores = np.zeros((len(data.examples), data.plan.choices), np.float32)
    for rows, values in _scored(base, data, virtual):
        real = rows.examples >= 0
        scores[rows.examples[real]] = values[real]
    return scores


def head_logits(base: FrozenBase, data: EvaluationSet, virtual: VirtualPrompt) -> list[Float[np.ndarray, "_ C"]]:
    """The head's logits at the R places that it reads of every example, in the examples' order."""
    found = {}
    for rows, values in _scored(base, data, virtual):
        for row, slot in zip(*np.nonzero(rows.examples >= 0), strict=True):
            own = (rows.target_groups[row] == slot) & (rows.target_weights[row] > 0)
            found[int(rows.examples[row, slot])] = values[row, own]
    return [found[number] for number in range(len(data.examples))]


def _scored(
    base: FrozenBase, data: EvaluationSet, virtual: VirtualPrompt | None
) -> Iterator[tuple[Rows, Float[np.ndarray, "B _ C"]]]:
    """Every batch's rows and `_batch_scores`, all started before the first is waited for."""
    pending = [
        (batch.rows, _batch_scores(base.module, data.plan.choices, base.params, virtual, place_batch(batch, base.mesh)))
        for batch in evaluation_batches(data.examples, data.plan, data.config.batch_size)
    ]
    return ((rows, to_host(values)) for rows, values in pending)


def log_softmax(logits: Float[np.ndarray, "N C"]) -> Float[np.ndarray, "N C"]:
    """On the host, along the classes."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def evaluate(
    base: FrozenBase, data: EvaluationSet, virtual: VirtualPrompt | None, *, generated: bool = True
) -> Evaluation:
    """Scores a set with a soft prompt, or without one.

    Classification gives accuracy and macro-F1 with 95 % bootstrap intervals, accuracy by mean log-probability per
    token, and the cross-entropy among the verbalizers. Other tasks give loss per token and perplexity over the targets
    and, unless `generated` is False, exact match, token F1, BLEU and ROUGE of greedy answers. A tagging head gives
    accuracy and macro-F1 over words and, for tags as B-X, I-X and O, F1 of whole entities; a span head exact match and
    token F1 of the text between the likeliest start and end.
    """
    if virtual is not None and data.encoder.template.head == "tagging":
        return _by_task(data, _tagging(data, head_logits(base, data, virtual)))
    if virtual is not None and data.encoder.template.head == "span":
        return _by_task(data, _spans(data, head_logits(base, data, virtual)))
    result = from_scores(data, score(base, data, virtual))
    generated = generated and not data.encoder.template.verbalizers
    return _by_task(data, _with_answers(base, data, virtual, result) if generated else result)


def from_scores(data: EvaluationSet, scores: Float[np.ndarray, "N C"]) -> Evaluation:
    """What follows from `score`: of classification its metrics, else loss and perplexity."""
    return classification(data, scores) if data.encoder.template.verbalizers else _likelihood(data, scores[:, 0])


def _by_task(data: EvaluationSet, result: Evaluation) -> Evaluation:
    """With the accuracy, or the perplexity, of every task beside the metrics of all."""
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
    """What is better on validation: higher accuracy, ties by lower loss; lower loss where there are no classes.

    A loss that is not finite is worse than anything.
    """
    if not math.isfinite(result["loss"]):
        return -math.inf
    if "accuracy" not in result:
        return -result["loss"]
    tie_break = 1 / (1 + result["loss"]) / (2 * result["examples"])  # less than half an example
    return result["accuracy"] + tie_break


def _interval(interval: metrics.Interval) -> list[float]:
    return [round(interval.low, 4), round(interval.high, 4)]


def classification(data: EvaluationSet, scores: Float[np.ndarray, "N C"]) -> Evaluation:
    """Metrics and predictions from a score of every class for every example."""
    classes = list(data.encoder.template.verbalizers)
    labels = np.asarray([example.label for example in data.examples])
    tokens = np.asarray([len(choice) for choice in data.examples[0].choices]) if data.examples[0].choices else 1
    predicted = scores.argmax(axis=1)
    normalized = (scores / tokens).argmax(axis=1)
    highest = scores.max(axis=1, keepdims=True)
    log_sum = highest[:, 0] + np.log(np.exp(scores - highest).sum(axis=1))
    losses = log_sum - scores[np.arange(len(labels)), labels]
    accuracy = metrics.bootstrap_interval((predicted == labels).astype(np.float64))
    f1 = metrics.macro_f1_interval(predicted.tolist(), labels.tolist(), list(range(len(classes))))
    result = {
        "accuracy": accuracy.value,
        "accuracy_interval": _interval(accuracy),
        "accuracy_normalized": float((normalized == labels).mean()),
        "macro_f1": f1.value,
        "macro_f1_interval": _interval(f1),
        "loss": float(losses.mean()),
        "examples": len(labels),
    }
    predictions = [
        {"label": classes[right], "prediction": classes[guess], "log_probabilities": [round(float(s), 5) for s in row]}
        for right, guess, row in zip(labels, predicted, scores, strict=True)
    ]
    return Evaluation(result, predictions)


def _tagging(data: EvaluationSet, logits: Sequence[Float[np.ndarray, "_ C"]]) -> Evaluation:
    """Metrics over all words."""
    names = list(data.encoder.template.verbalizers)
    labels = [np.asarray(example.classes) for example in data.examples]
    guesses = [own.argmax(axis=-1) for own in logits]
    flat_labels, flat_guesses = np.concatenate(labels), np.concatenate(guesses)
    losses = -log_softmax(np.concatenate(logits))[np.arange(len(flat_labels)), flat_labels]
    accuracy = metrics.bootstrap_interval((flat_labels == flat_guesses).astype(np.float64))
    tags = [[[names[c] for c in own] for own in side] for side in (guesses, labels)]
    result: dict[str, Any] = {
        "accuracy": accuracy.value,
        "accuracy_interval": _interval(accuracy),
        "macro_f1": metrics.macro_f1(flat_guesses.tolist(), flat_labels.tolist(), list(range(len(names)))),
        **({"entity_f1": metrics.entity_f1(*tags)} if metrics.has_entities(names) else {}),
        "loss": float(losses.mean()),
        "examples": len(labels),
        "words": len(flat_labels),
    }
    return Evaluation(result, [{"label": right, "prediction": guess} for guess, right in zip(*tags, strict=True)])


def _spans(data: EvaluationSet, logits: Sequence[Float[np.ndarray, "_ 2"]]) -> Evaluation:
    """The likeliest span of every example, at most `max_new_tokens` long, against the answer."""
    losses, predictions = [], []
    for own, example, record in zip(logits, data.examples, data.records, strict=True):
        start, end = log_softmax(own.T)
        classes = np.asarray(example.classes)
        losses.append(-(start[(classes & START) > 0][0] + end[(classes & END) > 0][0]) / 2)
        places = np.arange(len(start))
        length = places[None, :] - places[:, None] + 1
        together = np.where(
            (length > 0) & (length <= data.config.max_new_tokens), start[:, None] + end[None, :], -np.inf
        )
        first, last = np.unravel_index(together.argmax(), together.shape)
        predictions.append(
            {
                "prediction": data.encoder.read_text(record, int(first), int(last)),
                "reference": data.encoder.reference(record),
                "log_probability": round(float(together.max()), 5),
            }
        )
    texts, references = [p["prediction"] for p in predictions], [p["reference"] for p in predictions]
    matches = metrics.bootstrap_interval(metrics.exact_match_values(texts, references))
    result = {
        "exact_match": matches.value,
        "exact_match_interval": _interval(matches),
        "token_f1": metrics.token_f1(texts, references),
        "loss": float(np.mean(losses)),
        "examples": len(texts),
    }
    return Evaluation(result, predictions)


def _likelihood(data: EvaluationSet, scores: Float[np.ndarray, " N"]) -> Evaluation:
    tokens: Int[np.ndarray, " N"] = np.asarray([int(example.predicted.sum()) for example in data.examples])
    result = {
        "loss": float(-scores.sum() / tokens.sum()),
        "perplexity": metrics.perplexity(scores.astype(np.float64), tokens),
        "examples": len(tokens),
    }
    predictions = [
        {"log_probability": round(float(s), 5), "tokens": int(n)} for s, n in zip(scores, tokens, strict=True)
    ]
    return Evaluation(result, predictions)


def _with_answers(
    base: FrozenBase, data: EvaluationSet, virtual: VirtualPrompt | None, result: Evaluation
) -> Evaluation:
    prompts, encoder = data.prompts, data.encoder
    references = [encoder.reference(record) for record in data.records[: len(prompts)]]
    positions = base.config.max_positions - (0 if virtual is None else virtual.prefix_length)
    stop = (SEPARATOR,) if encoder.shots and not encoder.template.chat else ()
    sampling = [
        SamplingConfig(
            max_new_tokens=max(1, min(data.config.max_new_tokens, positions - len(prompt))),
            stop=stop,
            end_ids=encoder.end_ids,
        )
        for prompt in prompts
    ]
    index = [example.prompt for example in data.examples[: len(prompts)]] if encoder.template.tasks else None
    answers = generate(base, prompts, virtual, sampling, prompt_index=index, batch_size=data.config.batch_size)
    texts = [answer.text.strip() for answer in answers]
    matches = metrics.bootstrap_interval(metrics.exact_match_values(texts, references))
    rouge = metrics.rouge(texts, references)
    more = {
        "exact_match": matches.value,
        "exact_match_interval": _interval(matches),
        "token_f1": metrics.token_f1(texts, references),
        "bleu": metrics.bleu(texts, references),
        "rouge1": rouge.rouge1,
        "rouge2": rouge.rouge2,
        "rougeL": rouge.rougeL,
        "generated": len(texts),
    }
    answered = [
        {**p, "prediction": t, "reference": r} for p, t, r in zip(result.predictions, texts, references, strict=False)
    ]
    return Evaluation({**result.metrics, **more}, answered + result.predictions[len(texts) :])
