"""Trains a single prompt: a population of one, with an optimizer of its own, that fails if its metrics do."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from spt_jax.bases.base import FrozenBase
from spt_jax.data.batches import Batch, BatchPlan, place_batch
from spt_jax.data.examples import Example
from spt_jax.data.streams import training_batches
from spt_jax.errors import TrainingError
from spt_jax.prompts import Method, PromptParams
from spt_jax.runtime.waits import spoken
from spt_jax.training.ahead import Start, compile_ahead
from spt_jax.training.clock import Rates
from spt_jax.training.config import TrainConfig
from spt_jax.training.logs import MetricsLog, shortest
from spt_jax.training.loop import Best, Events, GroupMetrics, TrainingRun, train
from spt_jax.training.objectives import CrossEntropy, Grpo, Objective, VerbalizerCrossEntropy, prepare_examples
from spt_jax.training.rollouts import Questions, RolloutBatches, rollout_batches
from spt_jax.training.step import TrainState, init_state, jit_train_step, make_train_step
from spt_jax.training.streams import Batches


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """Training data.

    Attributes:
      examples: the examples.
      plan: the shapes of batches.
      class_weights: a weight per class; None weighs all classes equally.
      questions: for an objective that samples answers, what they are judged by.
    """

    examples: Sequence[Example]
    plan: BatchPlan
    class_weights: Sequence[float] | None = None
    questions: Questions | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of training: the best prompt, the steps done, their total time in seconds, and the rates."""

    best: Best
    steps: int
    train_seconds: float
    rates: Rates


class _Events(Events):
    """Logs the metrics of the only member, and raises an error if they are not finite."""

    def __init__(self, save_best: Callable[[Best], None], also: Events, rates: Sequence[float] | None):
        self._save_best = save_best
        self._also = also
        self._rates = rates

    def trained(self, log: MetricsLog, step: int, values: Mapping[int, Mapping[str, float]]) -> None:
        own = values[0] if self._rates is None else {**values[0], "learning_rate": self._rates[step - 1]}
        log.write(step, own)
        self._also.trained(log, step, {0: own})

    def validated(self, log: MetricsLog, step: int, member: int, metrics: Mapping[str, Any]) -> None:
        log.write(step, {"validation": dict(metrics)})
        self._also.validated(log, step, member, metrics)

    def improved(self, member: int, best: Best) -> None:
        self._save_best(best)
        self._also.improved(member, best)

    def ends(self) -> bool:
        return self._also.ends()

    def failed(self, member: int, step: int, problem: str) -> str:
        raise TrainingError(f"step {step}: {problem}. The last checkpoint and the best prompt so far are kept")


def fit(
    base: FrozenBase,
    method: Method,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    data: TrainingData,
    config: TrainConfig,
    *,
    workdir: Path | None,
    log: Callable[[int], MetricsLog],
    validate: Callable[[PromptParams], Mapping[str, Any]] | None,
    save_best: Callable[[Best], None],
    metadata: Mapping[str, Any],
    resume: bool = False,
    resume_from: int | None = None,
    profile: int = 0,
    events: Events | None = None,
    progress: bool = True,
    learning_rates: Float[np.ndarray, " steps"] | None = None,
    start: Start | None = None,
) -> Outcome:
    """Trains until `config.steps`, an early stop, an end that `events` ask for, or a signal.

    Args:
      base: the frozen base.
      method: the method.
      optimizer: the optimizer.
      objective: the loss.
      data: the training data.
      config: options of the loop, resolved.
      workdir: the directory in which checkpoints are stored; None for no checkpoints.
      log: opens the metrics log at the step from which the run starts or resumes.
      validate: returns metrics of a prompt on the validation set; if None, the last prompt counts as the best.
      save_best: called with each new best prompt.
      metadata: plain JSON that is stored in each checkpoint.
      resume: whether to resume from the newest intact checkpoint in workdir.
      resume_from: with `resume`, the step of the checkpoint to resume from instead.
      profile: the number of steps to trace into `workdir/profile`.
      events: told what happens, after the log; its `failed` is not called, because a failure is raised.
      progress: whether to show progress and validations on stderr.
      learning_rates: the learning rate of each step, for the log; None if they are unknown.
      start: the result of `start_ahead` for the same base, method, optimizer, objective and data; default new ones.

    Raises:
      TrainingError: a loss, gradient or prompt is not finite; the last checkpoint and the best prompt are not lost.
      CheckpointError: a checkpoint cannot be written or read.
      Stopped: after SIGTERM or SIGINT, with the state saved.
    """
    if start is None:
        state = init_state(jax.random.key(config.seed), base, method, optimizer)
        start = Start(state, make_train_step(base, method, optimizer, objective, config.microbatches))
    stream, step = _stream(base, method, objective, data, config), start.step
    calls = itertools.count()

    def advance(
        numbers: Sequence[int], states: Sequence[TrainState], batches: Sequence[Batch]
    ) -> tuple[Sequence[TrainState], GroupMetrics]:
        with spoken("compiling the training step", shown=progress and next(calls) == 0):
            new, metrics = step(states[0], place_batch(batches[0], base.mesh))
        if isinstance(stream, RolloutBatches):
            metrics = {**metrics, **jax.tree.map(jnp.asarray, stream.metrics)}
        return [new], metrics

    run = TrainingRun(
        base=base,
        states=[start.state],
        batches=[stream],
        advance=advance,
        config=config,
        workdir=workdir,
        log=log,
        events=_Events(save_best, events or Events(), None if learning_rates is None else shortest(learning_rates)),
        validate=None if validate is None else lambda _, params: validate(params),
        prefix_length=method.prefix_length,
        metadata=metadata,
        profile=profile,
        progress=progress,
    )
    (standing,), seconds, rates = train(run, resume=resume, resume_from=resume_from)
    return Outcome(standing.best, standing.steps, seconds, rates)


def start_ahead(
    base: FrozenBase,
    method: Method,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    data: TrainingData,
    config: TrainConfig,
) -> Start | None:
    """Initializes the state, and begins to compile the training step in a thread. Arguments are those of `fit`.

    Returns:
      What the run starts with; None if its batches are not known yet, since other objectives than cross-entropies may
      prepare the examples or sample answers, or if the run has several processes, which must compile in the same order.

    Raises:
      ConfigError: the options of the method are not compatible with the base.
    """
    if not isinstance(objective, CrossEntropy | VerbalizerCrossEntropy) or jax.process_count() > 1:
        return None
    state = init_state(jax.random.key(config.seed), base, method, optimizer)
    batch = place_batch(next(_stream(base, method, objective, data, config)), base.mesh)
    step = jit_train_step(base, method, optimizer, objective, config.microbatches)
    return Start(state, compile_ahead(step, base.model, state, batch))


def _stream(base: FrozenBase, method: Method, objective: Objective, data: TrainingData, config: TrainConfig) -> Batches:
    """Returns the stream of batches: of the examples, or of answers that the prompt samples.

    Raises:
      ConfigError: the objective samples answers, and there is nothing to judge them by.
    """
    if isinstance(objective, Grpo):
        return rollout_batches(
            base,
            method,
            objective,
            data.examples,
            data.plan,
            data.questions,
            batch_size=config.batch_size,
            seed=config.seed,
        )
    examples = prepare_examples(objective, base, data.examples)
    return training_batches(
        examples, data.plan, batch_size=config.batch_size, seed=config.seed, class_weights=data.class_weights
    )
