"""A short training run with checkpoints, which can kill itself partway and be resumed."""

import dataclasses
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from benchmarks.accelerator_stages.process import Record, Task
from benchmarks.accelerator_stages.workload import TINY, examples, prompt_rows, random_base
from spt_jax.data.batches import plan_batches
from spt_jax.prompts import PromptTuning
from spt_jax.prompts.initializers import array
from spt_jax.training.config import TrainConfig
from spt_jax.training.logs import NoLog
from spt_jax.training.objectives import CrossEntropy
from spt_jax.training.single import TrainingData, fit

STEPS, CHECKPOINT_EVERY, KILL_AT = 8, 2, 5


class _Losses(NoLog):
    """Stores losses by step, and kills the process once the loss of a given step is known."""

    def __init__(self, kill_at: int | None) -> None:
        self.by_step: dict[int, float] = {}
        self._kill_at = kill_at

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self.by_step[step] = values["loss"]
        if step == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclasses.dataclass(frozen=True)
class Trained:
    """Losses by step, for the steps that this process ran, and the last prompt, flattened."""

    losses: dict[int, float]
    prompt: np.ndarray


def train(workdir: Path, *, kill_at: int | None = None, resume: bool = False) -> Trained:
    """Runs to the end, or kills this process once the loss of a step is known."""
    rows = prompt_rows(TINY.prompt, TINY.model["hidden_size"])
    base, method = random_base(TINY), PromptTuning(length=TINY.prompt, init=array(rows))
    items = examples(TINY, 12, virtual=TINY.prompt)
    plan = plan_batches(items, lead=TINY.prompt, batch_size=6)
    log = _Losses(kill_at)
    outcome = fit(
        base,
        method,
        optax.adam(0.01),
        CrossEntropy(),
        TrainingData(items, plan),
        TrainConfig(steps=STEPS, batch_size=6, checkpoint_every=CHECKPOINT_EVERY).resolved(),
        workdir=workdir,
        log=lambda step: log,
        validate=None,
        save_best=lambda best: None,
        metadata={},
        resume=resume,
    )
    leaves = jax.tree.leaves(outcome.best.params)
    return Trained(log.by_step, np.concatenate([np.asarray(leaf).ravel() for leaf in leaves]))


def run(task: Task, record: Record) -> None:
    """Options: workdir. Does not return, because the process kills itself."""
    train(Path(task.options["workdir"]), kill_at=KILL_AT)
    raise RuntimeError("the run ended without being killed")
