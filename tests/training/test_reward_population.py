"""Populations of GRPO: each member samples answers of its own, as a run of its own with the same seed does."""

import dataclasses

import jax
import numpy as np
import pytest

from spt_jax.data.batches import plan_batches
from spt_jax.data.examples import Example
from spt_jax.errors import ConfigError, RewardError
from spt_jax.evaluation.rewards import Judge, Reward
from spt_jax.prompts import PromptTuning
from spt_jax.testing import tiny_base
from spt_jax.training.config import TrainConfig
from spt_jax.training.halving import fit_population
from spt_jax.training.logs import NoLog
from spt_jax.training.objectives import Grpo
from spt_jax.training.optimizers import OptimizerConfig, make_optimizer, resolve_optimizer
from spt_jax.training.population import Member
from spt_jax.training.rollouts import Questions
from spt_jax.training.single import TrainingData, fit
from tests.examples import HEAD, VIRTUAL
from tests.groups import random_groups

STEPS, LONGEST, GROUP = 4, 4, 3
OBJECTIVE = Grpo(group_size=GROUP, max_new_tokens=LONGEST, beta=0.1, updates=2)
ADAM = resolve_optimizer(OptimizerConfig(name="adam", learning_rate=0.05), "llama")
CONFIG = TrainConfig(steps=STEPS, batch_size=2, evaluate_every=STEPS, checkpoint_every=STEPS).resolved()


@pytest.fixture(scope="module")
def base():
    return tiny_base("llama")


def letters(completions, **_):
    return [float(sum(letter.isalpha() for letter in text)) for text in completions]


def member(seed: int, rate: float, reward=letters) -> Member:
    groups = random_groups(5, LONGEST)
    questions = [Example(own.ids, own.predicted, (np.zeros(1, np.int32),), 0, i) for i, own in enumerate(groups)]
    planned = OBJECTIVE.planned(questions)
    plan = plan_batches(planned, lead=len(HEAD), batch_size=2)
    judge = Judge((Reward("letters", reward),), 0.0, LONGEST, OBJECTIVE.temperature)
    judged = Questions([{"number": number} for number in range(5)], judge)
    return Member(PromptTuning(length=VIRTUAL), planned, plan, seed, rate, questions=judged)


class Rewards(NoLog):
    """Keeps the mean rewards of all members by step."""

    def __init__(self) -> None:
        self.by_step: dict[int, dict[str, float]] = {}

    def write(self, step, values) -> None:
        if "reward" in values:
            assert {"groups_with_spread", "completion_length", "reward_failures"} <= set(values)
            self.by_step[step] = dict(values["reward"])


def population(base, members, workdir, **options):
    log = Rewards()
    standings = fit_population(
        base,
        members,
        ADAM,
        OBJECTIVE,
        CONFIG,
        workdir=workdir,
        validate=lambda number, params: {"loss": 1.0},
        log=lambda step: log,
        **options,
    )
    return log.by_step, [standing.best.params["tokens"] for standing in standings]


def alone(base, own: Member) -> np.ndarray:
    optimizer = make_optimizer(ADAM, STEPS, own.learning_rate)
    outcome = fit(
        base,
        own.method,
        optimizer,
        OBJECTIVE,
        TrainingData(own.examples, own.plan, None, own.questions),
        dataclasses.replace(CONFIG, seed=own.seed),
        workdir=None,
        log=lambda step: NoLog(),
        validate=None,
        save_best=lambda best: None,
        metadata={},
        progress=False,
    )
    return outcome.best.params["tokens"]


@pytest.fixture(scope="module")
def expected(base):
    """The last parameters of two runs of one prompt each."""
    return [alone(base, member(0, 0.05)), alone(base, member(3, 0.02))]


def test_members_train_as_alone_in_any_groups(base, expected, tmp_path):
    members = [member(0, 0.05), member(3, 0.02)]
    rewards, separate = population(base, members, tmp_path / "one", group_size=1)
    for ours, theirs in zip(separate, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert sorted(rewards) == list(range(1, STEPS + 1)) and set(rewards[1]) == {"0", "1"}
    assert rewards[1] == rewards[2] != rewards[3], "two updates with each rollout"
    assert rewards[1]["0"] != rewards[1]["1"]
    _, together = population(base, members, tmp_path / "two", group_size=2)
    for ours, theirs in zip(together, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    start = members[0].method.init_params(jax.random.key(0), base)["tokens"]
    assert np.abs(expected[0] - start).max() > 0.01


def test_a_member_whose_reward_function_fails_leaves_all_at_one_step(base, expected, tmp_path):
    calls, healed = [], []

    def breaks(completions, **_):
        calls.append(1)
        if len(calls) > 1 and not healed:
            raise OSError("the judge is not reachable")
        return letters(completions)

    members = [member(0, 0.05), member(3, 0.02, breaks)]
    with pytest.raises(RewardError, match="the judge is not reachable"):
        population(base, members, tmp_path / "run", group_size=1)
    healed.append(True)
    _, resumed = population(base, members, tmp_path / "run", group_size=1, resume=True)
    for ours, theirs in zip(resumed, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_member_without_questions_is_refused(base, tmp_path):
    own = dataclasses.replace(member(0, 0.05), questions=None)
    with pytest.raises(ConfigError, match="there are no reward functions"):
        population(base, [own], tmp_path)
