"""The loop of one prompt and of many: checkpoints of version 0.1, early stops, and what a run reports."""

import dataclasses

import jax
import numpy as np
import pytest

from spt_jax.data.streams import training_batches
from spt_jax.errors import CheckpointError
from spt_jax.runtime import measure
from spt_jax.training import single
from spt_jax.training.checkpoints import Checkpoints
from spt_jax.training.config import TrainConfig
from spt_jax.training.logs import NoLog
from spt_jax.training.objectives import CrossEntropy
from spt_jax.training.optimizers import make_optimizer
from spt_jax.training.step import init_state, make_train_step
from tests.jobs import unmeasured
from tests.training.test_population import ADAM, BATCH, STEPS, base_of, member

OWN = member(seed=3, rate=0.05)
CONFIG = TrainConfig(steps=STEPS, batch_size=BATCH, evaluate_every=2, checkpoint_every=4, seed=OWN.seed).resolved()
OPTIMIZER = make_optimizer(dataclasses.replace(ADAM, learning_rate=OWN.learning_rate), STEPS)


class Lines(NoLog):
    def __init__(self):
        self.lines = []

    def write(self, step, values):
        self.lines.append((step, dict(values)))


def falls_until(best: int):
    """Validation metrics whose loss is lowest at the validation with this number, counted from 1."""
    count = 0

    def validate(params):
        nonlocal count
        count += 1
        return {"loss": abs(count - best) + 1.0}

    return validate


def fit(workdir, *, validate=None, config=CONFIG, **options):
    """The outcome, the lines of the log, and the steps of the best prompts."""
    log, best = Lines(), []
    outcome = single.fit(
        base_of(),
        OWN.method,
        OPTIMIZER,
        CrossEntropy(),
        single.TrainingData(OWN.examples, OWN.plan),
        config,
        workdir=workdir,
        log=lambda step: log,
        validate=validate,
        save_best=best.append,
        metadata={"config": "of the run"},
        **options,
    )
    return outcome, log.lines, [own.step for own in best]


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def write_old_run(workdir, steps: int, best: int, since: int):
    """The checkpoints of a run of version 0.1: a single state each, and the best prompt in that of its step."""
    state = init_state(jax.random.key(OWN.seed), base_of(), OWN.method, OPTIMIZER)
    stream = training_batches(OWN.examples, OWN.plan, batch_size=BATCH, seed=OWN.seed)
    step = make_train_step(base_of(), OWN.method, OPTIMIZER)
    details = {"step": 0, "metrics": None, "since": 0}
    with Checkpoints(workdir / "checkpoints", keep=9) as checkpoints:
        checkpoints.save(state, stream.get_state(), {"best": details})
        for number in range(1, steps + 1):
            state, _ = step(state, single.place_batch(next(stream), base_of().mesh))
            if number >= best:
                details = {"step": best, "metrics": {"loss": 1.0}, "since": since if number == steps else 0}
            if number in (best, steps):
                checkpoints.save(state, stream.get_state(), {"best": details})


def test_a_run_of_version_0_1_is_resumed_to_the_same_end(tmp_path):
    whole, lines, _ = fit(tmp_path / "whole")
    write_old_run(tmp_path / "old", steps=6, best=4, since=1)
    resumed, rest, _ = fit(tmp_path / "old", resume=True)
    assert unmeasured(rest) == unmeasured([line for line in lines if line[0] > 6])
    same(resumed.best.params, whole.best.params)
    with Checkpoints(tmp_path / "old" / "checkpoints") as checkpoints:
        assert "standings" in checkpoints.metadata(STEPS)


def test_the_best_prompt_of_a_run_of_version_0_1_is_read(tmp_path):
    """No later validation is better, so the run ends with the prompt of step 4."""
    write_old_run(tmp_path, steps=6, best=4, since=1)
    outcome, _, best = fit(tmp_path, validate=lambda params: {"loss": 2.0}, resume=True)
    assert (outcome.best.step, outcome.best.since, best) == (4, 1 + (STEPS - 6) // 2, [4])
    short, _, _ = fit(tmp_path / "short", config=dataclasses.replace(CONFIG, steps=4))
    same(outcome.best.params, short.best.params)


def test_a_run_of_version_0_1_without_its_best_prompt_is_damaged(tmp_path):
    write_old_run(tmp_path, steps=6, best=4, since=1)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints._remove([4])
    with pytest.raises(CheckpointError, match="the best prompt up to step 6, of step 4, is missing"):
        fit(tmp_path, resume=True, resume_from=6)


def test_an_early_stop_is_saved_and_final(tmp_path):
    """Two validations without a better prompt end the run; a resumed one does not go on."""
    config = dataclasses.replace(CONFIG, patience=2)
    outcome, lines, best = fit(tmp_path, validate=falls_until(1), config=config)
    assert (outcome.steps, outcome.best.step, best) == (6, 2, [2, 2])
    assert [step for step, values in lines if "validation" in values] == [2, 4, 6]
    again, lines, best = fit(tmp_path, validate=falls_until(1), config=config, resume=True)
    assert (again.steps, again.best.step, lines, best) == (6, 2, [], [2])
    same(again.best.params, outcome.best.params)


def test_rates_count_all_starts_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "peak_flops", lambda dtype: 1e9)
    first, _, _ = fit(tmp_path)
    again, _, _ = fit(tmp_path, resume=True)
    assert again.rates == first.rates and first.rates.examples > 0 < first.rates.utilization
