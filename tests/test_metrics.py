"""Scores against hand computation, closed forms and the libraries that define them."""

import math
import random

import numpy as np
import pytest
import sacrebleu
from rouge_score import rouge_scorer

from spt_jax.errors import ConfigError, DataError
from spt_jax.evaluation import metrics

GOLD = ["a", "a", "a", "b", "b", "c"]
PREDICTED = ["a", "a", "b", "b", "?", "a"]


def test_accuracy_and_confusion_by_hand():
    assert metrics.accuracy(PREDICTED, GOLD) == 0.5
    counts = metrics.confusion_counts(PREDICTED, GOLD, ["a", "b", "c"])
    np.testing.assert_array_equal(counts, [[2, 1, 0, 0], [0, 1, 0, 1], [1, 0, 0, 0]])


def test_macro_f1_by_hand():
    # a: precision 2/3, recall 2/3. b: precision 1/2, recall 1/2. c: never predicted. d: never there.
    assert metrics.macro_f1(PREDICTED, GOLD, ["a", "b", "c"]) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert metrics.macro_f1(PREDICTED, GOLD, ["d", "a", "b", "c"]) == pytest.approx((2 / 3 + 1 / 2) / 4)


def test_entity_f1_by_hand():
    gold = [["B-a", "I-a", "O", "B-b"], ["O", "B-a", "B-a", "I-a"]]
    # Right: a at 0-1, a at 2-3 of the second. Cut short: none. Another type: b at 3. An I- without its B- begins one.
    guessed = [["B-a", "I-a", "O", "B-a"], ["I-a", "O", "I-a", "I-a"]]
    assert metrics.entity_f1(guessed, gold) == pytest.approx(2 * 2 / (4 + 4))
    assert metrics.entity_f1(gold, gold) == 1
    assert metrics.entity_f1([["O", "O"]], [["B-a", "I-a"]]) == 0
    assert metrics.entity_f1([["B-a", "B-a"]], [["B-a", "I-a"]]) == 0
    assert metrics.has_entities(["O", "B-a"]) and not metrics.has_entities(["O", "a"])
    with pytest.raises(DataError):
        metrics.entity_f1([["O"]], [["O", "O"]])


def macro_f1_from_precision_and_recall(predicted, gold, classes):
    scores = []
    for name in classes:
        hits = sum(p == g == name for p, g in zip(predicted, gold, strict=True))
        precision = hits / max(sum(p == name for p in predicted), 1)
        recall = hits / max(sum(g == name for g in gold), 1)
        scores.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    return sum(scores) / len(scores)


def test_macro_f1_and_its_interval_against_the_textbook_formula():
    rng = np.random.default_rng(0)
    gold = rng.integers(4, size=200)
    predicted = np.where(rng.random(200) < 0.6, gold, rng.integers(5, size=200))
    expected = macro_f1_from_precision_and_recall(predicted, gold, range(4))
    assert metrics.macro_f1(predicted, gold, range(4)) == pytest.approx(expected, abs=1e-12)

    resamples = np.random.default_rng(3).integers(200, size=(100, 200))
    drawn = [macro_f1_from_precision_and_recall(predicted[rows], gold[rows], range(4)) for rows in resamples]
    interval = metrics.macro_f1_interval(predicted, gold, range(4), seed=3, resamples=100)
    np.testing.assert_allclose((interval.low, interval.high), np.quantile(drawn, [0.025, 0.975]), atol=1e-12)
    assert interval.value == pytest.approx(expected, abs=1e-12)


def test_wrong_labels_and_lengths():
    with pytest.raises(DataError, match="label 'cat' of example 2 is not one of the classes; did you mean 'cats'"):
        metrics.macro_f1(["cats", "dogs"], ["dogs", "cat"], ["cats", "dogs"])
    with pytest.raises(DataError, match="occurs twice"):
        metrics.confusion_counts(["a"], ["a"], ["a", "a"])
    for score in (metrics.accuracy, metrics.exact_match, metrics.token_f1, metrics.bleu, metrics.rouge):
        with pytest.raises(DataError, match="1 predictions for 2 examples"):
            score(["a"], ["a", "b"])
        with pytest.raises(DataError, match="no examples"):
            score([], [])
    with pytest.raises(DataError, match="example 2 has no reference"):
        metrics.rouge(["a", "b"], [["a"], []])


@pytest.mark.parametrize(("share", "examples"), [(0.5, 400), (0.8, 1000), (0.97, 2000)])
def test_bootstrap_of_a_share_is_the_binomial_interval(share, examples):
    values = np.arange(examples) < share * examples
    interval = metrics.bootstrap_interval(values, resamples=4000)
    half = 1.959964 * math.sqrt(share * (1 - share) / examples)
    assert interval.value == pytest.approx(share)
    assert interval.low == pytest.approx(share - half, abs=0.12 * half)
    assert interval.high == pytest.approx(share + half, abs=0.12 * half)
    narrow = metrics.bootstrap_interval(values, resamples=4000, confidence=0.5)
    assert narrow.high - narrow.low == pytest.approx(2 * 0.67449 * half / 1.959964, rel=0.12)


def test_bootstrap_is_seeded_and_drawn_in_blocks(monkeypatch):
    values = np.random.default_rng(0).normal(size=50)
    whole = metrics.bootstrap_interval(values, seed=1)
    assert whole == metrics.bootstrap_interval(values, seed=1)
    assert whole != metrics.bootstrap_interval(values, seed=2)
    monkeypatch.setattr(metrics, "BLOCK", 50 * 7)
    assert metrics.bootstrap_interval(values, seed=1) == whole
    assert metrics.bootstrap_interval([3.0]) == metrics.Interval(value=3.0, low=3.0, high=3.0)


def test_bootstrap_of_a_statistic():
    values = np.random.default_rng(0).normal(size=2001)
    interval = metrics.bootstrap_statistic(lambda indices: np.median(values[indices], axis=1), 2001)
    half = 1.96 * math.sqrt(math.pi / 2 / 2001)  # the median of a normal sample
    assert interval.value == np.median(values)
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.15)


def test_bad_bootstraps():
    with pytest.raises(DataError, match="no examples"):
        metrics.bootstrap_interval([])
    for wrong in ({"resamples": 0}, {"confidence": 1.0}, {"confidence": 95.0}):
        with pytest.raises(ConfigError, match=r"resamples is 0|it must be between"):
            metrics.bootstrap_interval([1.0, 2.0], **wrong)
    with pytest.raises(ConfigError, match="must return one value each"):
        metrics.bootstrap_interval(np.ones((3, 2)))


def test_squad_scores_by_hand():
    predictions = ["The Eiffel Tower!", "in the Eiffel Tower, Paris", "blue", "", "the", "a b b c"]
    references = ["eiffel tower", ["London", "Eiffel tower"], ["red", "green"], "x", "a", "b b b d"]
    assert metrics.exact_match_values(predictions, references).tolist() == [1, 0, 0, 0, 1, 0]
    # "a" is an article: {b, b, c} against {b, b, b, d} share 2 words: precision 2/3, recall 2/4.
    np.testing.assert_allclose(metrics.token_f1_values(predictions, references), [1, 2 / 3, 0, 0, 1, 4 / 7])
    assert metrics.exact_match(predictions, references) == pytest.approx(2 / 6)
    assert metrics.token_f1(predictions, references) == pytest.approx((1 + 2 / 3 + 1 + 4 / 7) / 6)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  The\tcat,  AN ape and a dog. ", "cat ape and dog"),
        ("U.S. dog's 5%", "us dogs 5"),
        ("theme banana another", "theme banana another"),
        # Punctuation goes before the articles are looked for; only ASCII punctuation goes.
        ("a-b t.h.e", "ab"),
        ("the\u2014end \u00c9", "\u2014end \u00e9"),
    ],
)
def test_normalize_answer(text, expected):
    assert metrics.normalize_answer(text) == expected


def test_token_f1_against_precision_and_recall():
    rng = random.Random(0)
    for _ in range(300):
        words, expected = (rng.choices("wxyz", k=rng.randrange(1, 6)) for _ in range(2))
        left = list(expected)
        shared = sum(1 for word in words if word in left and not left.remove(word))
        precision, recall = shared / len(words), shared / len(expected)
        f1 = 2 * precision * recall / (precision + recall) if shared else 0.0
        assert metrics.token_f1([" ".join(words)], [" ".join(expected)]) == pytest.approx(f1)


def test_bleu():
    # 4/5 words, 3/4 pairs, 2/3 triples and 1/2 of the fours match; no brevity penalty.
    assert metrics.bleu(["a b c d e"], ["a b c d f"]) == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    # All match, but 5 words stand for 6.
    assert metrics.bleu(["a b c d e"], ["a b c d e f"]) == pytest.approx(100 * math.exp(1 - 6 / 5))
    predictions = ["the cat sat on the mat", "a quick brown fox jumps", "hello to the wide world"]
    references = [
        ["a cat sat on the mat", "the cat is on the mat"],
        "the quick brown fox jumps",
        ["hello to all", "x", "y z"],
    ]
    streams = [
        ["a cat sat on the mat", "the quick brown fox jumps", "hello to all"],
        ["the cat is on the mat", None, "x"],
        [None, None, "y z"],
    ]
    assert metrics.bleu(predictions, references) == sacrebleu.corpus_bleu(predictions, streams).score
    assert metrics.bleu(predictions, predictions) == pytest.approx(100)
    first = [texts if isinstance(texts, str) else texts[0] for texts in references]
    assert metrics.bleu(predictions, first) < metrics.bleu(predictions, references)


def test_rouge():
    # Words 3 of 4 and 3 of 5, pairs 1 of 3 and 1 of 4, longest common subsequence 3.
    scores = metrics.rouge(["a b x d"], ["a b c d e"])
    assert (scores.rouge1, scores.rouge2, scores.rougeL) == pytest.approx((6 / 9, 2 / 7, 6 / 9))
    predictions = ["the cats sat on the mat", "police killed the gunman"]
    references = [["a cat sat on a mat", "on the mat the cats sat"], "the gunman killed police"]
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    first = [scorer.score(text, predictions[0]) for text in references[0]]
    second = scorer.score(references[1], predictions[1])
    scores = metrics.rouge(predictions, references)
    for name in ("rouge1", "rouge2", "rougeL"):
        expected = (max(score[name].fmeasure for score in first) + second[name].fmeasure) / 2
        assert getattr(scores, name) == pytest.approx(expected)


def test_perplexity():
    assert metrics.perplexity(-7 * math.log(50), 7) == pytest.approx(50)
    # Weighted by tokens, not by examples.
    assert metrics.perplexity([-3 * math.log(2), -1 * math.log(32)], [3, 1]) == pytest.approx(2**2)
    assert metrics.perplexity(-1e6, 1) == math.inf
    with pytest.raises(DataError, match="no tokens"):
        metrics.perplexity([0.0], [0])


def test_mcnemar_is_the_exact_binomial_test():
    """Of 9 examples that one system alone has right, 8 are ours: 2 (1 + 9) / 2^9."""
    ours = [1] * 8 + [0] + [1] * 20 + [0] * 5
    theirs = [0] * 8 + [1] + [1] * 20 + [0] * 5
    assert metrics.mcnemar(ours, theirs) == pytest.approx(2 * (1 + 9) / 2**9)
    assert metrics.mcnemar(theirs, ours) == metrics.mcnemar(ours, theirs)
    assert metrics.mcnemar([1, 0], [1, 0]) == 1.0
    with pytest.raises(DataError, match="2 predictions for 1"):
        metrics.mcnemar([1, 0], [1])


def test_paired_bootstrap_has_the_level_that_it_says():
    """Equal systems differ at p < 0.1 in about a tenth of experiments; unequal ones nearly always."""
    rng = np.random.default_rng(0)
    found = [metrics.paired_bootstrap(*rng.normal(size=(2, 80)), resamples=500).p < 0.1 for _ in range(300)]
    assert 0.05 < np.mean(found) < 0.16
    ours, theirs = rng.normal(size=(2, 80)) + np.asarray([[1.0], [0.0]])
    difference = metrics.paired_bootstrap(ours, theirs)
    assert difference.p < 0.001 and difference.interval.value == pytest.approx((ours - theirs).mean())
    error = (ours - theirs).std() / math.sqrt(80)
    assert difference.interval.low == pytest.approx((ours - theirs).mean() - 1.96 * error, abs=0.03)
    assert metrics.paired_bootstrap(theirs, ours).p == difference.p
    assert metrics.paired_bootstrap([1.0, 0.0], [1.0, 0.0]).p == 1.0
