"""Prediction files come back as they were, and the values read of them have the spread of what they measure."""

import json

import numpy as np
import pytest

from spt_jax.errors import DataError
from spt_jax.evaluation.predictions import measures, predictions_jsonl, read_predictions, record_values


def test_any_text_comes_back(tmp_path):
    """Some characters end a line for Python and not for JSON."""
    own = [{"prediction": f"a{c}b", "reference": "ü"} for c in "\u2028\u2029\u0085\n\x1c"]
    path = tmp_path / "predictions.jsonl"
    path.write_bytes(predictions_jsonl({"x": own, "y": own[:1]}).encode())
    assert read_predictions(path) == {"x": own, "y": own[:1]}


def test_records_come_in_their_order(tmp_path):
    lines = [{"prompt": "x", "record": n, "label": str(n)} for n in (2, 10, 1)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [p["label"] for p in read_predictions(tmp_path / "p.jsonl")["x"]] == ["1", "2", "10"]


@pytest.mark.parametrize("line", ["{", '{"prompt": "x"}', "[]", '{"record": 1}', '{"prompt": "x", "record": "one"}'])
def test_a_broken_line_is_named(tmp_path, line: str):
    (tmp_path / "p.jsonl").write_text('{"prompt": "x", "record": 1}\n' + line + "\n")
    with pytest.raises(DataError, match="line 2"):
        read_predictions(tmp_path / "p.jsonl")


def test_what_can_be_measured():
    assert measures([]) == ()
    assert measures([{"label": "a", "prediction": "b"}]) == ("accuracy",)
    assert measures([{"log_probability": -1.0, "tokens": 2, "reference": "x"}]) == ("log_probability", "exact_match")


def tagged(rng: np.random.Generator, records: int) -> list[dict]:
    found = []
    for _ in range(records):
        right = rng.random(rng.integers(1, 40)) < 0.9
        found.append({"label": ["a"] * len(right), "prediction": ["a" if own else "b" for own in right]})
    return found


def test_long_records_do_not_widen_the_spread_of_a_share_of_words():
    """The standard error that the values have is that of the share itself, in experiments done anew."""
    rng = np.random.default_rng(0)
    shares, errors = [], []
    for _ in range(300):
        predictions = tagged(rng, 60)
        values = record_values(predictions, "accuracy")
        words = [a == b for p in predictions for a, b in zip(p["label"], p["prediction"], strict=True)]
        assert values.mean() == pytest.approx(np.mean(words))
        shares.append(np.mean(words))
        errors.append(values.std(ddof=1) / np.sqrt(60))
    assert np.mean(errors) == pytest.approx(np.std(shares), rel=0.15)


def test_log_probabilities_are_per_token():
    predictions = [{"log_probability": -6.0, "tokens": 3}, {"log_probability": -2.0, "tokens": 1}]
    np.testing.assert_allclose(record_values(predictions, "log_probability"), -2.0)  # each token costs 2


def test_classes_are_right_or_wrong():
    predictions = [{"label": "a", "prediction": "a"}, {"label": "a", "prediction": "b"}]
    assert record_values(predictions, "accuracy").tolist() == [1.0, 0.0]
    answers = [{"prediction": "The cat", "reference": "cat"}, {"log_probability": -1.0, "tokens": 1}]
    assert record_values(answers, "exact_match").tolist() == [1.0]  # the second was not generated


def test_an_answer_without_a_reward_counts_as_the_mean_of_the_others():
    answers = [{"prediction": "", "reward": reward} for reward in (1.0, None, 0.5)]
    assert measures(answers) == ("reward",)
    np.testing.assert_array_equal(record_values(answers, "reward"), [1.0, 0.75, 0.5])
    np.testing.assert_array_equal(record_values(answers[1:2], "reward"), [0.0])
