"""Metrics of predictions, and their bootstrap intervals. No model is run here."""

import dataclasses
import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from spt_jax.errors import ConfigError, DataError, did_you_mean
from spt_jax.runtime.extras import install_line, installed, load_extra

BLOCK = 2_000_000  # indices drawn at once, which limits the memory needed for large test sets
SHARES = ("win_rate", "accuracy", "exact_match")  # measures between 0 and 1
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
References = Sequence[str | Sequence[str]]
Classes = Sequence[Hashable] | np.ndarray
Values = Sequence[Any] | np.ndarray
Number = float | int | np.number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
    """A score and the bounds of its bootstrap interval."""

    value: float
    low: float
    high: float

    @property
    def bounds(self) -> list[float]:
        """The bounds, rounded to 4 digits."""
        return [round(self.low, 4), round(self.high, 4)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RougeScores:
    """Mean F-measures, from 0 to 1."""

    rouge1: float
    rouge2: float
    rougeL: float  # noqa: N815


def accuracy(predictions: Classes, labels: Classes) -> float:
    """Returns the share of predictions that equal their label.

    Raises:
      DataError: there are no examples, or not as many predictions as labels.
    """
    _check_lengths(predictions, labels)
    return float(np.mean([prediction == label for prediction, label in zip(predictions, labels, strict=True)]))


def confusion_counts(predictions: Classes, labels: Classes, classes: Classes) -> Int[np.ndarray, "C C+1"]:
    """Counts how often each class (row) was predicted as each class (column).

    The last column counts predictions that are not a class.

    Raises:
      DataError: there are no examples, not as many predictions as labels, or a label is not a class. The message
        numbers examples from 1.
    """
    cells, size = _cells(predictions, labels, classes)
    return np.bincount(cells, minlength=size * (size + 1)).reshape(size, size + 1)


def macro_f1(predictions: Classes, labels: Classes, classes: Classes) -> float:
    """Returns the unweighted mean over classes of F1 = 2 TP / (2 TP + FP + FN), which is 0 for absent classes.

    Raises:
      DataError: see `confusion_counts`.
    """
    return float(_macro_f1(confusion_counts(predictions, labels, classes)))


def has_entities(tags: Sequence[str]) -> bool:
    """Whether the tags use the scheme B-X, I-X and O for the beginning, inside and outside of entities."""
    return any(tag.startswith("B-") for tag in tags) and all(tag == "O" or tag[:2] in ("B-", "I-") for tag in tags)


def entity_f1(predictions: Sequence[Sequence[str]], labels: Sequence[Sequence[str]]) -> float:
    """Returns F1 = 2 TP / (2 TP + FP + FN) over whole entities; 0 if there are none.

    An entity is correct only if its type and both ends are. As in the CoNLL shared tasks (conlleval), an I-X that does
    not follow a tag of type X begins an entity.

    Raises:
      DataError: there are not as many sequences of predictions as of labels, or their lengths differ.
    """
    _check_lengths(predictions, labels)
    for guessed, right in zip(predictions, labels, strict=True):
        _check_lengths(guessed, right)
    found, real = (
        {(number, *entity) for number, tags in enumerate(side) for entity in _entities(tags)}
        for side in (predictions, labels)
    )
    return 2 * len(found & real) / max(1, len(found) + len(real))


def _entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Returns the type and the first and last position of each entity."""
    entities: list[tuple[str, int, int]] = []
    before = "O"
    for place, tag in enumerate(tags):
        if tag[:2] == "I-" and before[2:] == tag[2:]:
            kind, first, _ = entities[-1]
            entities[-1] = (kind, first, place)
        elif tag != "O":
            entities.append((tag[2:], place, place))
        before = tag
    return entities


def macro_f1_interval(
    predictions: Classes,
    labels: Classes,
    classes: Classes,
    *,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> Interval:
    """Returns `macro_f1` with its bootstrap interval."""
    cells, size = _cells(predictions, labels, classes)

    def statistic(indices: Int[np.ndarray, "R N"]) -> Float[np.ndarray, " R"]:
        rows, area = len(indices), size * (size + 1)
        flat = (np.arange(rows)[:, None] * area + cells[indices]).ravel()
        return _macro_f1(np.bincount(flat, minlength=rows * area).reshape(rows, size, size + 1))

    return bootstrap_statistic(statistic, len(cells), seed=seed, resamples=resamples, confidence=confidence)


def bootstrap_interval(values: Values, *, seed: int = 0, resamples: int = 1000, confidence: float = 0.95) -> Interval:
    """Returns the mean of one value per example, [N], with its percentile bootstrap interval.

    Raises:
      ConfigError, DataError: see `bootstrap_statistic`.
    """
    array = np.asarray(values, np.float64)
    return bootstrap_statistic(
        lambda indices: array[indices].mean(1), len(array), seed=seed, resamples=resamples, confidence=confidence
    )


def bootstrap_statistic(
    statistic: Callable[[Int[np.ndarray, "R N"]], Float[np.ndarray, " R"]],
    examples: int,
    *,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> Interval:
    """Computes any statistic of a set of examples with its percentile bootstrap interval.

    The method is described in Efron & Tibshirani 1993, chapter 13.

    Args:
      statistic: maps R resamples, given as example numbers [R, N], to R values.
      examples: the number N of examples.
      seed: the random seed; equal seeds produce equal intervals.
      resamples: how many times N examples are drawn with replacement.
      confidence: the share of resamples inside the interval.

    Returns:
      The statistic of the examples 0, 1, ..., N - 1, with its interval.

    Raises:
      ConfigError: `resamples` is below 1, `confidence` is not between 0 and 1, or the statistic does not return one
        value per resample.
      DataError: there are no examples.
    """
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence is {confidence}; it must be between 0 and 1")
    drawn = _resampled(statistic, examples, seed, resamples)
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value=float(statistic(np.arange(examples)[None])[0]), low=float(low), high=float(high))


def _resampled(
    statistic: Callable[[Int[np.ndarray, "R N"]], Float[np.ndarray, " R"]], examples: int, seed: int, resamples: int
) -> Float[np.ndarray, " R"]:
    if resamples < 1:
        raise ConfigError(f"resamples is {resamples}; it must be at least 1")
    if examples < 1:
        raise DataError("no examples to score")
    rng = np.random.default_rng(seed)
    block = max(BLOCK // examples, 1)
    sizes = [min(block, resamples - start) for start in range(0, resamples, block)]
    drawn = np.concatenate([statistic(rng.integers(examples, size=(size, examples))) for size in sizes])
    if drawn.shape != (resamples,):
        raise ConfigError(
            f"the statistic returned shape {drawn.shape} for {resamples} resamples; it must return one value each"
        )
    return drawn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """The difference of two means over the same examples, and its significance.

    Attributes:
      interval: the difference with its paired bootstrap interval.
      p: twice the share of resamples in which the difference is zero or has the opposite sign, at most 1.
    """

    interval: Interval
    p: float


def paired_bootstrap(
    ours: Values, theirs: Values, *, seed: int = 0, resamples: int = 10_000, confidence: float = 0.95
) -> Difference:
    """Compares two systems by resampling their values per example, [N] each (Efron & Tibshirani 1993).

    Raises:
      DataError: there are no values, or not equally many.
    """
    _check_lengths(ours, theirs)
    values = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    options: Any = {"seed": seed, "resamples": resamples}
    interval = bootstrap_interval(values, confidence=confidence, **options)
    drawn = _resampled(lambda indices: values[indices].mean(1), len(values), **options)
    beyond = min((drawn <= 0).sum(), (drawn >= 0).sum())
    return Difference(interval=interval, p=min(1.0, 2 * (beyond + 1) / (resamples + 1)))


def mcnemar(ours: Values, theirs: Values) -> float:
    """Returns the two-sided p-value of McNemar's exact test (1947): whether two systems are correct equally often.

    Only examples on which exactly one system is correct count. Under the null hypothesis, either is equally likely.

    Args:
      ours, theirs: whether each example was correct, [N].

    Raises:
      DataError: there are no values, or not equally many.
    """
    from scipy.stats import binomtest

    _check_lengths(ours, theirs)
    right, other = np.asarray(ours, bool), np.asarray(theirs, bool)
    first, second = int((right & ~other).sum()), int((other & ~right).sum())
    return float(binomtest(first, first + second).pvalue) if first + second else 1.0


def normalize_answer(text: str) -> str:
    """Lowercases text and removes ASCII punctuation, English articles and extra spaces.

    This is the normalization of SQuAD (Rajpurkar et al. 2016).
    """
    plain = text.lower().translate(NO_PUNCTUATION)
    return " ".join(re.sub(r"\b(?:an?|the)\b", " ", plain).split())


def exact_match(predictions: Sequence[str], references: References) -> float:
    """Returns the share of predictions that equal one of their references after normalization.

    Raises:
      DataError: see `bleu`.
    """
    return float(np.mean(exact_match_values(predictions, references)))


def exact_match_values(predictions: Sequence[str], references: References) -> Float[np.ndarray, " N"]:
    """Returns 1 or 0 per example, for `bootstrap_interval`."""
    return _best_of(predictions, references, lambda prediction, reference: float(prediction == reference))


def token_f1(predictions: Sequence[str], references: References) -> float:
    """Returns the mean over examples of the best F1 between the words of the prediction and of a reference.

    Both are normalized. As in SQuAD 2.0, F1 is 1 if both texts have no words, and 0 if only one has none.

    Raises:
      DataError: see `bleu`.
    """
    return float(np.mean(token_f1_values(predictions, references)))


def token_f1_values(predictions: Sequence[str], references: References) -> Float[np.ndarray, " N"]:
    """Returns F1 per example, from 0 to 1, for `bootstrap_interval`."""
    return _best_of(predictions, references, _token_f1)


def bleu(predictions: Sequence[str], references: References) -> float:
    """Returns corpus BLEU by sacrebleu with its default settings (Post 2018), from 0 to 100.

    Args:
      predictions: N texts.
      references: for each prediction a text, or a sequence of one or more texts.

    Raises:
      ConfigError: sacrebleu is not installed.
      DataError: there are no examples, not as many predictions as references, or an example has no reference. The
        message numbers examples from 1.
    """
    sacrebleu = load_extra("sacrebleu", "BLEU")
    lists = _reference_lists(predictions, references)
    most = max(len(texts) for texts in lists)
    # sacrebleu takes one list per reference number i, with None for examples that have fewer references.
    streams: Any = [[texts[i] if i < len(texts) else None for texts in lists] for i in range(most)]
    return float(sacrebleu.corpus_bleu(list(predictions), streams).score)


def rouge(predictions: Sequence[str], references: References) -> RougeScores:
    """Returns the means of the ROUGE-1, -2 and -L F-measures by rouge-score, without stemming (Lin 2004).

    If there are several references, the one with the best F-measure counts, separately for each score.

    Raises:
      ConfigError: rouge-score is not installed.
      DataError: see `bleu`.
    """
    rouge_scorer = load_extra("rouge_score.rouge_scorer", "ROUGE")
    names = [field.name for field in dataclasses.fields(RougeScores)]
    scorer = rouge_scorer.RougeScorer(names)
    lists = _reference_lists(predictions, references)
    scores = [scorer.score_multi(texts, text) for texts, text in zip(lists, predictions, strict=True)]
    return RougeScores(**{name: float(np.mean([score[name].fmeasure for score in scores])) for name in names})


def missing_note() -> str | None:
    """Returns a note on the scores of generated text whose packages are not installed; None if all are."""
    missing = [name for name, module in (("BLEU", "sacrebleu"), ("ROUGE", "rouge_score")) if not installed(module)]
    if not missing:
        return None
    return f"note: {' and '.join(missing)} will be left out of the results; to have them: {install_line('sacrebleu')}"


def perplexity(log_probabilities: Values | Number, token_counts: Values | Number) -> float:
    """Returns exp of the mean negative log-probability of a token; infinity if that overflows.

    Args:
      log_probabilities: natural log-probabilities, summed over all tokens or over the tokens of each example.
      token_counts: the number of tokens in each sum.

    Raises:
      DataError: there are no tokens.
    """
    tokens = np.sum(np.asarray(token_counts, np.int64))
    if tokens < 1:
        raise DataError("no tokens to compute a perplexity of")
    with np.errstate(over="ignore"):
        return float(np.exp(-np.sum(np.asarray(log_probabilities, np.float64)) / tokens))


def _check_lengths(predictions: Values, others: Values) -> None:
    if len(predictions) != len(others):
        raise DataError(f"{len(predictions)} predictions for {len(others)} examples")
    if not len(others):
        raise DataError("no examples to score")


def _cells(predictions: Classes, labels: Classes, classes: Classes) -> tuple[Int[np.ndarray, " N"], int]:
    """Returns each example's index in the flattened [C, C + 1] confusion counts, and C."""
    _check_lengths(predictions, labels)
    index = {name: i for i, name in enumerate(classes)}
    if len(index) < len(classes):
        raise DataError(f"a class occurs twice: {list(classes)}")
    for number, label in enumerate(labels, 1):
        if label not in index:
            hint = did_you_mean(str(label), map(str, classes))
            raise DataError(f"the label {label!r} of example {number} is not one of the classes; {hint}")
    size = len(index)
    pairs = zip(labels, predictions, strict=True)
    return np.array([index[label] * (size + 1) + index.get(predicted, size) for label, predicted in pairs]), size


def _macro_f1(counts: Int[np.ndarray, "*R C C+1"]) -> Any:
    size = counts.shape[-2]
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    # Labels plus predictions of a class are 2 TP + FP + FN.
    total = counts.sum(-1) + counts[..., :size].sum(-2)
    return (2 * hits / np.maximum(total, 1)).mean(-1)


def _reference_lists(predictions: Sequence[str], references: References) -> list[list[str]]:
    _check_lengths(predictions, references)
    lists = [[texts] if isinstance(texts, str) else list(texts) for texts in references]
    for number, texts in enumerate(lists, 1):
        if not texts:
            raise DataError(f"example {number} has no reference")
    return lists


def _best_of(
    predictions: Sequence[str], references: References, score: Callable[[str, str], float]
) -> Float[np.ndarray, " N"]:
    lists = _reference_lists(predictions, references)
    normal = map(normalize_answer, predictions)
    return np.array(
        [max(score(p, normalize_answer(text)) for text in texts) for p, texts in zip(normal, lists, strict=True)]
    )


def _token_f1(prediction: str, reference: str) -> float:
    words, expected = prediction.split(), reference.split()
    if not words or not expected:
        return float(words == expected)
    return 2 * (Counter(words) & Counter(expected)).total() / (len(words) + len(expected))
