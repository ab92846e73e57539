"""Reward functions: how they are found and called, their failures, and the advantages of groups."""

import os
import sys

import numpy as np
import pytest

from spt_jax.errors import ConfigError, RewardError
from spt_jax.evaluation.rewards import Judge, Reward, make_rewards, reward_text
from spt_jax.training.objectives import Grpo

PROMPTS, COMPLETIONS = ["a", "b", "c", "d"], ["one", "two ", "bad", "four"]
RECORDS = [{"answer": "one"}, {"answer": "two"}, {"answer": "x", "level": 3}, {"answer": 4}]


def lengths(prompts, completions, answer, level):
    assert prompts == PROMPTS[: len(prompts)] or len(prompts) == 1
    return [len(text) + (one or 0) for text, one in zip(completions, level, strict=True)]


def judged(*functions, failures=0.25):
    judge = Judge(tuple(Reward(function.__name__, function) for function in functions), failures=failures)
    return judge.judge(PROMPTS, COMPLETIONS, RECORDS)


def test_rewards_are_weighted_sums_and_fields_are_columns():
    exact = make_rewards(["answer", f"{__name__}:lengths"], [2.0, 0.5])
    found = Judge(exact).judge(PROMPTS, COMPLETIONS, RECORDS)
    np.testing.assert_array_equal(found.by_name["answer"], [1, 1, 0, 0])
    np.testing.assert_array_equal(found.by_name["lengths"], [3, 4, 6, 4])
    np.testing.assert_array_equal(found.rewards, [3.5, 4, 3, 2])
    assert found.failed == 0 and not found.problems


def raises(completions, **_):
    if "bad" in completions:
        raise KeyError("bad")
    return [1.0] * len(completions)


def drops(completions, **_):
    return [1.0 for text in completions if text != "bad"]


def not_a_number(completions, **_):
    return [float("nan") if text == "bad" else 1.0 for text in completions]


def text_instead(completions, **_):
    return ["1" if text == "bad" else 1 for text in completions]


def huge(completions, **_):
    return [1e38 if text == "bad" else 1.0 for text in completions]


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (huge, "it returned 1e+38, which with its weight exceeds 1e+15"),
        (raises, "KeyError: 'bad'"),
        (drops, "it returned 0 values for 1 answer"),
        (not_a_number, "it returned nan, which is not a finite number"),
        (text_instead, "it returned '1', which is not a finite number"),
    ],
)
def test_a_failure_names_its_sample_and_only_that_has_no_reward(function, problem):
    found = judged(function)
    np.testing.assert_array_equal(found.rewards, [1, 1, np.nan, 1])
    assert len(found.problems) == 1 and found.failed == 0.25
    assert f"reward '{function.__name__}' failed for sample 3, 'bad'" in found.problems[0]
    assert problem in found.problems[0]
    with pytest.raises(RewardError, match=r"sample 3.*failed for 1 of 4 answers, and task.reward_failures is 0.2$"):
        judged(function, failures=0.2)


def test_a_function_is_imported_from_the_working_directory_only_by_name(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text("def short(completions, **_):\n    return [len(c) for c in completions]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", os.getcwd())])
    (reward,) = make_rewards(["own_rewards:short"])
    assert reward.name == "short" and reward.function(completions=["ab"]) == [2]
    assert str(tmp_path) not in sys.path
    assert reward_text(reward.function) == "own_rewards:short" and reward_text("answer") == "answer"


@pytest.mark.parametrize(
    ("texts", "weights", "problem"),
    [
        ([], (), "task.reward is empty"),
        (["no_such_module_here:f"], (), "cannot import no_such_module_here: ModuleNotFoundError"),
        (["os:no_such_name"], (), "os has no function 'no_such_name'"),
        (["os:sep"], (), "os has no function 'sep'"),
        (["os:system('x')"], (), "it must be module:function"),
        (["../x:f"], (), "it must be module:function"),
        (["math:exp", "cmath:exp"], (), "two rewards of the name 'exp'"),
        (["answer"], (1.0, 2.0), "it needs a finite number for each of 1 rewards"),
    ],
)
def test_wrong_rewards_are_refused(texts, weights, problem):
    with pytest.raises(ConfigError) as error:
        make_rewards(texts, weights)
    assert problem in str(error.value)


def test_a_function_without_a_name_is_refused():
    with pytest.raises(ConfigError, match="has no name in a module"):
        reward_text(lambda completions, **_: [])


def test_advantages():
    """(r - mean) / std of a sample; equal rewards have none, and an answer without a reward is left out."""
    rewards = np.asarray([[1.0, 2.0, 6.0], [0.1, 0.1, 0.1], [1.0, np.nan, 3.0], [np.nan, np.nan, np.nan]])
    values, weights = Grpo(group_size=3).advantages(rewards)
    deviation = np.sqrt((4 + 1 + 9) / 2)
    expected = [[-2 / deviation, -1 / deviation, 3 / deviation], [0, 0, 0], [-1 / np.sqrt(2), 0, 1 / np.sqrt(2)]]
    np.testing.assert_allclose(values, [*expected, [0, 0, 0]], rtol=1e-6)
    np.testing.assert_array_equal(weights, [[1, 1, 1], [1, 1, 1], [1, 0, 1], [0, 0, 0]])
    values, weights = Grpo(group_size=3, normalize_by_std=False, drop_equal_groups=True).advantages(rewards)
    np.testing.assert_allclose(values, [[-2, -1, 3], [0, 0, 0], [-1, 0, 1], [0, 0, 0]], atol=1e-6)
    np.testing.assert_array_equal(weights, [[1, 1, 1], [0, 0, 0], [1, 0, 1], [0, 0, 0]])


@pytest.mark.parametrize(
    "options",
    [
        {"group_size": 1},
        {"temperature": 0.0},
        {"clip_low": 1.0},
        {"clip_high": 0.0},
        {"beta": -1.0},
        {"updates": 0},
        {"max_new_tokens": 0},
    ],
)
def test_options_out_of_range_are_refused(options):
    (name,) = options
    with pytest.raises(ConfigError, match=f"loss.{name} is"):
        Grpo(**options)
