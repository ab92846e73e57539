"""Answers that a soft prompt samples during its own training, judged and encoded as batches.

A rollout is a function of the seed, its number and the prompt. The base's arrays are those that training uses, and the
prompt is an argument of the compiled programs, so nothing is compiled again when it changes.
"""

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spt_jax.bases.base import FrozenBase
from spt_jax.data.batches import Batch, BatchPlan, pack
from spt_jax.data.examples import Example
from spt_jax.errors import ConfigError
from spt_jax.evaluation.bare import bare_examples, bare_plan, token_log_probabilities
from spt_jax.evaluation.rewarded import prompt_text
from spt_jax.evaluation.rewards import Judge
from spt_jax.inference.generation import SamplingConfig, generate
from spt_jax.models.model import Model
from spt_jax.prompts import Method, PromptParams, VirtualPrompt
from spt_jax.runtime import processes
from spt_jax.training.objectives import Grpo, Objective
from spt_jax.training.objectives.grpo import group_extra, has_spread

ROWS_AT_ONCE = 128  # of answers that are generated together
# The names in `RolloutBatches.metrics`, beside those of each of several reward functions.
ROLLOUT_METRICS = ("reward", "groups_with_spread", "completion_length", "reward_failures")


@dataclasses.dataclass(frozen=True)
class Questions:
    """What the answers to training examples are judged by.

    Attributes:
      records: the record of each example.
      judge: the reward functions.
      end_ids: ids that end an answer, in addition to those of the base.
    """

    records: Sequence[Mapping[str, Any]]
    judge: Judge
    end_ids: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Answers to some questions.

    Attributes:
      questions: the numbers of N questions.
      ids: the token ids of each of the G answers to each question.
      log_probabilities: the log-probability of each token when it was sampled.
      rewards: the rewards [N, G], NaN where a function failed.
      by_name: the values of each reward function, likewise.
    """

    questions: list[int]
    ids: list[list[list[int]]]
    log_probabilities: list[list[list[float]]]
    rewards: np.ndarray
    by_name: Mapping[str, np.ndarray]

    def as_json(self) -> dict[str, Any]:
        """Returns plain JSON. It has no NaN, but None."""
        return {
            **{name: getattr(self, name) for name in ("questions", "ids", "log_probabilities")},
            "rewards": _listed(self.rewards),
            "by_name": {name: _listed(values) for name, values in self.by_name.items()},
        }

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> "Rollout":
        """Returns the rollout that `as_json` described."""
        by_name = {name: np.asarray(values, float) for name, values in found["by_name"].items()}
        return Rollout(**{**found, "rewards": np.asarray(found["rewards"], float), "by_name": by_name})


class RolloutBatches:
    """An endless stream of batches of answers that the prompt being trained samples (`streams.SampledBatches`).

    Args:
      base: the frozen base.
      method: the method.
      objective: the objective.
      examples: the training examples, from `Objective.planned`.
      plan: the shapes of batches.
      questions: what the answers are judged by.
      batch_size: questions per batch.
      seed: the random seed of the order of the questions and of the answers.
      member: the number of the prompt in a population.

    Raises:
      ConfigError: a prompt and an answer of the greatest length need more positions than the base has.
    """

    def __init__(
        self,
        base: FrozenBase,
        method: Method,
        objective: Grpo,
        examples: Sequence[Example],
        plan: BatchPlan,
        questions: Questions,
        *,
        batch_size: int,
        seed: int,
        member: int = 0,
    ):
        self._base, self._method, self._objective, self._plan = base, method, objective, plan
        self._examples, self._questions = examples, questions
        self._batch_size, self._seed, self._member = batch_size, seed, member
        longest = max(examples, key=lambda example: len(example.ids))
        needed = method.prefix_length + len(longest.ids) + objective.max_new_tokens
        if needed > base.layout.max_positions:
            raise ConfigError(
                f"record {longest.index + 1}: its prompt of {len(longest.ids)} tokens, {method.prefix_length} positions"
                f" of the soft prompt and loss.max_new_tokens={objective.max_new_tokens} make {needed}, but {base.name}"
                f" has {base.layout.max_positions} positions"
            )
        bare = bare_examples(base, examples)
        self._bare_plan = bare_plan(base, bare, batch_size, packing=plan.examples > 1)
        self._finished = 0  # rollouts whose steps are all done, or in `_current`
        self._used = objective.updates  # batches that were taken from the current rollout
        self._current: Rollout | None = None
        self._batch: Batch | None = None
        self._materialize = jax.jit(functools.partial(_virtual, method))

    def sample(self, params: PromptParams) -> None:
        """Samples the answers of the next batches, if those of the last rollout were used `updates` times.

        Args:
          params: the parameters of the prompt.

        Raises:
          RewardError: the reward functions failed for too many answers. The stream is as before.
        """
        if self._used < self._objective.updates and self._current is not None:
            return
        rollout = self._rollout(self._materialize(self._base.model, params), self._finished)
        self._current, self._batch = rollout, self._encoded(rollout)
        self._finished, self._used = self._finished + 1, 0

    def __next__(self) -> Batch:
        if self._current is None:
            raise ConfigError("the batches are those of a prompt's own answers; call sample first")
        if self._batch is None:
            self._batch = self._encoded(self._current)
        self._used += 1
        return self._batch

    def get_state(self) -> Any:
        """Returns the position as plain JSON, with the answers that are to be used again."""
        again = self._current is not None and self._used < self._objective.updates
        current = self._current.as_json() if again and self._current is not None else None
        return {"finished": self._finished, "used": self._used, "current": current}

    def set_state(self, state: Any) -> None:
        """Goes to a position from `get_state`."""
        self._finished, self._used, self._batch = state["finished"], state["used"], None
        self._current = None if state["current"] is None else Rollout.from_json(state["current"])

    @property
    def metrics(self) -> Mapping[str, float]:
        """The mean rewards, the share of groups with a spread, the mean length and failures of the current rollout."""
        rollout = self._current
        assert rollout is not None
        by_name = rollout.by_name if len(rollout.by_name) > 1 else {}
        lengths = [len(ids) for group in rollout.ids for ids in group]
        return {
            "reward": _mean(rollout.rewards),
            **{f"reward/{name}": _mean(values) for name, values in by_name.items()},
            "groups_with_spread": float(has_spread(rollout.rewards).mean()),
            "completion_length": float(np.mean(lengths)),
            "reward_failures": float(np.isnan(rollout.rewards).mean()),
        }

    def _rollout(self, virtual: VirtualPrompt, number: int) -> Rollout:
        """Samples and judges the answers of rollout number `number`."""
        base, objective, size = self._base, self._objective, self._objective.group_size
        chosen = self._order(number)
        prompts = [self._examples[question].ids for question in chosen for _ in range(size)]
        sampling = SamplingConfig(
            max_new_tokens=objective.max_new_tokens,
            temperature=objective.temperature,
            end_ids=self._questions.end_ids,
            seed=int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0]),
        )
        several = self._plan.lead_length is not None
        answers = generate(
            base,
            prompts,
            virtual,
            sampling,
            prompt_index=[self._examples[q].prompt for q in chosen for _ in range(size)] if several else None,
            lead=None if several else len(self._plan.lead_ids),
            batch_size=min(ROWS_AT_ONCE, len(prompts)),
        )
        texts = [prompt_text(base, self._examples[question].ids) for question in chosen]
        records = [self._questions.records[self._examples[question].index] for question in chosen]

        def judge() -> dict[str, Any]:
            found = self._questions.judge.judge(
                [text for text in texts for _ in range(size)],
                [answer.text for answer in answers],
                [record for record in records for _ in range(size)],
            )
            if found.problems:
                print(f"rollout {number + 1}: {found.problems[0]}; it counts as no answer", file=sys.stderr)
            by_name = {name: values.tolist() for name, values in found.by_name.items()}
            return {"rewards": found.rewards.tolist(), "by_name": by_name}

        judged = processes.from_first(f"rewards of rollout {number} of member {self._member}", judge)
        shape = len(chosen), size
        return Rollout(
            questions=chosen,
            ids=_grouped([answer.ids for answer in answers], size),
            log_probabilities=_grouped([answer.log_probabilities for answer in answers], size),
            rewards=np.asarray(judged["rewards"], float).reshape(shape),
            by_name={name: np.asarray(values, float).reshape(shape) for name, values in judged["by_name"].items()},
        )

    def _order(self, number: int) -> list[int]:
        """Returns the questions of a rollout: each once per epoch, in a new order."""
        count, start = len(self._examples), number * self._batch_size
        places = [divmod(place, count) for place in range(start, start + self._batch_size)]
        orders = {
            epoch: np.random.default_rng([self._seed, epoch]).permutation(count)
            for epoch in sorted({epoch for epoch, _ in places})
        }
        return [int(orders[epoch][place]) for epoch, place in places]

    def _encoded(self, rollout: Rollout) -> Batch:
        """Returns the batch of a rollout: each question with its answers as choices, in one row."""
        objective = self._objective
        answered = [
            dataclasses.replace(
                self._examples[question], choices=tuple(np.asarray(ids, np.int32) for ids in group), extra=None
            )
            for question, group in zip(rollout.questions, rollout.ids, strict=True)
        ]
        reference = token_log_probabilities(self._base, bare_examples(self._base, answered), self._bare_plan)
        advantages, weights = objective.advantages(rollout.rewards)
        examples = []
        for number, example in enumerate(answered):
            old = _padded(rollout.log_probabilities[number], objective.max_new_tokens)
            if self._base.layout.forced_id is not None:
                old[:, 0] = np.nan
            extra = group_extra(
                advantages[number],
                weights[number],
                np.asarray([len(choice) for choice in example.choices]),
                old,
                _padded(reference[number], objective.max_new_tokens),
            )
            examples.append(dataclasses.replace(example, extra=extra))
        return pack(examples, self._plan)


def rollout_batches(
    base: FrozenBase,
    method: Method,
    objective: Grpo,
    examples: Sequence[Example],
    plan: BatchPlan,
    questions: Questions | None,
    *,
    batch_size: int,
    seed: int,
    member: int = 0,
) -> RolloutBatches:
    """Returns a stream of batches of the answers that a prompt samples. The arguments are those of `RolloutBatches`.

    Raises:
      ConfigError: there is nothing to judge the answers by; or as in `RolloutBatches`.
    """
    if questions is None:
        raise ConfigError("Grpo samples answers, and there are no reward functions: use the task rewards")
    return RolloutBatches(
        base, method, objective, examples, plan, questions, batch_size=batch_size, seed=seed, member=member
    )


def check_samples_alone(objective: Objective, what: str) -> None:
    """Refuses an objective that samples answers where several prompts share a step.

    Args:
      objective: the objective.
      what: what would train with it, for the message.

    Raises:
      ConfigError: the objective samples answers.
    """
    if objective.samples:
        raise ConfigError(
            f"{type(objective).__name__} samples answers of one prompt, so {what} cannot use it; run `spt-jax train`"
        )


def _virtual(method: Method, model: Model, params: PromptParams) -> VirtualPrompt:
    return method.materialize(jax.tree.map(jnp.asarray, params), model)


def _grouped(values: list[Any], size: int) -> list[list[Any]]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def _padded(values: Sequence[Sequence[float] | np.ndarray], length: int) -> np.ndarray:
    found = np.zeros((len(values), length), np.float32)
    for row, own in zip(found, values, strict=True):
        row[: len(own)] = own
    return found


def _listed(values: np.ndarray) -> list[list[float | None]]:
    return [[None if np.isnan(value) else float(value) for value in row] for row in values]


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else 0.0
