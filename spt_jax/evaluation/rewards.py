"""Reward functions: plain Python functions that judge generated answers, and how they are called.

A reward function has the calling convention of TRL: `function(prompts=[...], completions=[...], **fields)` returns one
number for each answer. `fields` are lists too, of the records' fields with one value for each answer.
"""

import dataclasses
import importlib
import math
import numbers
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
from jaxtyping import Float

from spt_jax.errors import ConfigError, RewardError

RewardFunction = Callable[..., Sequence[float]]


# The largest absolute value of a weighted reward: its square must be finite in float32.
LARGEST = 1e15


@dataclasses.dataclass(frozen=True)
class Reward:
    """A reward function with its name and weight.

    Attributes:
      name: the name under which its mean is reported.
      function: the function.
      weight: the factor of its values in the reward of an answer.
    """

    name: str
    function: RewardFunction
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Judged:
    """The rewards of N answers.

    Attributes:
      rewards: the weighted sums; NaN where a function failed.
      by_name: the values of each function, NaN where it failed.
      problems: a description of each failure.
    """

    rewards: Float[np.ndarray, " N"]
    by_name: Mapping[str, Float[np.ndarray, " N"]]
    problems: Sequence[str]

    @property
    def failed(self) -> float:
        """The share of answers for which a function failed."""
        return float(np.mean(np.isnan(self.rewards)))


@dataclasses.dataclass(frozen=True)
class Judge:
    """The reward functions of a run, and how answers to judge are sampled.

    Attributes:
      rewards: the functions.
      failures: the largest share of answers of one call for which functions may fail.
      max_new_tokens: the maximum number of tokens of an answer.
      temperature: that of the samples.
    """

    rewards: tuple[Reward, ...]
    failures: float = 0.0
    max_new_tokens: int = 32
    temperature: float = 1.0

    def judge(self, prompts: Sequence[str], completions: Sequence[str], records: Sequence[Mapping[str, Any]]) -> Judged:
        """Returns the rewards of answers.

        A function that raises for all answers together, or returns another number of values, is called again for each
        answer alone, so that only the answers that it fails for have no reward.

        Args:
          prompts: the text before each answer.
          completions: the answers.
          records: the record of each answer. Its fields `prompts` and `completions` are not passed on.

        Raises:
          RewardError: functions failed for a larger share of the answers than `failures`.
        """
        names = dict.fromkeys(name for record in records for name in record if name not in ("prompts", "completions"))
        columns = {name: [record.get(name) for record in records] for name in names}
        inputs = {"prompts": list(prompts), "completions": list(completions), **columns}
        problems: list[str] = []
        values = {reward.name: _values(reward, inputs, problems) for reward in self.rewards}
        total = np.sum([reward.weight * values[reward.name] for reward in self.rewards], axis=0)
        found = Judged(total, values, problems)
        if found.failed > self.failures:
            raise RewardError(
                f"{problems[0]}. Reward functions failed for {np.isnan(total).sum()} of {len(total)} answers,"
                f" and task.reward_failures is {self.failures:g}"
            )
        return found


def make_rewards(texts: Sequence[str], weights: Sequence[float] = ()) -> tuple[Reward, ...]:
    """Returns the rewards that a config names.

    Args:
      texts: for each reward, `module:function`, or the name of a field of the records that the answer must be equal to.
      weights: the weight of each reward; if empty, all are 1.

    Raises:
      ConfigError: there are no texts, one names no function, two have the same name, or the weights are not as many.
    """
    if not texts:
        raise ConfigError("task.reward is empty; name a function, such as my_rewards:score, or a field of the records")
    weights = weights or (1.0,) * len(texts)
    if len(weights) != len(texts) or not all(math.isfinite(weight) for weight in weights):
        raise ConfigError(
            f"task.reward_weights is {list(weights)}; it needs a finite number for each of {len(texts)} rewards"
        )
    rewards = tuple(
        Reward(text.rpartition(":")[2].rpartition(".")[2], _load(text), weight)
        for text, weight in zip(texts, weights, strict=True)
    )
    names = [reward.name for reward in rewards]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"task.reward has two rewards of the name {name!r}; rename one of them")
    return rewards


def reward_fields(texts: Sequence[str]) -> list[str]:
    """Returns the fields of the records that answers must be equal to.

    Args:
      texts: as in `make_rewards`.
    """
    return [text for text in texts if ":" not in text]


def reward_text(reward: str | RewardFunction) -> str:
    """Returns the text of a config for a reward.

    Args:
      reward: the text itself, or a function that its module has under its name.

    Raises:
      ConfigError: the function cannot be found by its name, such as a lambda.
    """
    if isinstance(reward, str):
        return reward
    module, name = getattr(reward, "__module__", None), getattr(reward, "__qualname__", None)
    if not module or not name or getattr(sys.modules.get(module), name, None) is not reward:
        raise ConfigError(f"the reward {reward!r} has no name in a module; define it with `def` at the top of one")
    return f"{module}:{name}"


def _load(text: str) -> RewardFunction:
    """Returns the function of a text, imported from the Python path or the working directory."""
    if ":" not in text:
        return _equal_to(text)
    module, _, name = text.partition(":")
    if not name.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise ConfigError(f"task.reward is {text!r}; it must be module:function, such as my_rewards:score, or a field")
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        function = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # the module is the user's code
        raise ConfigError(f"task.reward={text}: cannot import {module}: {type(error).__name__}: {error}") from error
    finally:
        if added:
            sys.path.remove(here)
    if not callable(function):
        raise ConfigError(f"task.reward={text}: {module} has no function {name!r}")
    return cast(RewardFunction, function)


def _equal_to(field: str) -> RewardFunction:
    """Returns the reward of 1 for answers that are equal to a field, apart from surrounding whitespace, and else 0."""

    def equal(completions: Sequence[str], **fields: Sequence[Any]) -> list[float]:
        return [float(a.strip() == str(b).strip()) for a, b in zip(completions, fields[field], strict=True)]

    return equal


def _values(reward: Reward, inputs: Mapping[str, list[Any]], problems: list[str]) -> Float[np.ndarray, " N"]:
    """Returns the values of one function, NaN where it fails, and adds the failures to `problems`."""
    count = len(inputs["completions"])
    try:
        found: list[Any] | None = list(reward.function(**inputs))
    except Exception:  # the function is the user's code; it is called again for each answer below
        found = None
    values = np.full(count, np.nan)
    for number in range(count):
        try:
            if found is None or len(found) != count:
                one = list(reward.function(**{name: [column[number]] for name, column in inputs.items()}))
                if len(one) != 1:
                    raise ValueError(f"it returned {len(one)} values for 1 answer")
                value: Any = one[0]
            else:
                value = found[number]
            value = value.item() if hasattr(value, "item") else value  # of an array
            if not isinstance(value, numbers.Real) or not math.isfinite(value):
                raise ValueError(f"it returned {value!r}, which is not a finite number")
            if abs(float(value) * reward.weight) > LARGEST:
                raise ValueError(f"it returned {value!r}, which with its weight exceeds {LARGEST:g}")
            values[number] = float(value)
        except Exception as error:  # as above
            answer = inputs["completions"][number]
            sample = f"sample {number + 1}, {answer!r:.80}"
            problems.append(f"reward {reward.name!r} failed for {sample}: {type(error).__name__}: {error}")
    return values
