"""Training of an experiment's prompt, as `spt-jax train` and `spt_jax.fit` do it."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Float

from spt_jax.data.batches import BatchPlan
from spt_jax.data.examples import Example
from spt_jax.errors import ConfigError, TrainingError
from spt_jax.evaluation.evaluate import EvaluationSet, evaluate
from spt_jax.experiment.command_line import config_json
from spt_jax.experiment.run import Experiment
from spt_jax.experiment.workdir import CONFIG_FILE, Inputs, held, open_workdir
from spt_jax.prompts import PromptParams
from spt_jax.runtime import processes
from spt_jax.training.ahead import Start
from spt_jax.training.cost import StepMemory
from spt_jax.training.logs import MetricsLog
from spt_jax.training.loop import Best, Events
from spt_jax.training.optimizers import learning_rates, make_optimizer
from spt_jax.training.single import Outcome, TrainingData, fit, start_ahead


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An experiment that is ready to train.

    Attributes:
      experiment: the experiment, with its rematerialization chosen.
      optimizer: the optimizer.
      examples: the encoded training records.
      plan: the shapes of batches.
      memory: the estimated memory of a step on each device; None for a base from `from_flax`.
      learning_rates: the learning rate of each step; None if the optimizer is not that of the config.
    """

    experiment: Experiment
    optimizer: optax.GradientTransformation
    examples: Sequence[Example]
    plan: BatchPlan
    memory: StepMemory | None
    learning_rates: Float[np.ndarray, " steps"] | None

    @property
    def data(self) -> TrainingData:
        """The training data."""
        experiment = self.experiment
        weights = experiment.config.loss.class_weights or None
        return TrainingData(self.examples, self.plan, weights, experiment.questions)

    @property
    def settings(self) -> dict[str, Any]:
        """The config as plain JSON, with the precision of the base: a run may be resumed on another device."""
        config, base = self.experiment.config, self.experiment.base
        return config_json(dataclasses.replace(config, base=dataclasses.replace(config.base, dtype=str(base.dtype))))


def prepare(experiment: Experiment, optimizer: optax.GradientTransformation | None = None) -> Prepared:
    """Encodes the training records and chooses the rematerialization.

    Args:
      experiment: the experiment.
      optimizer: the optimizer; None for the one of the config.

    Raises:
      ConfigError, DataError: as in `Experiment.training_set`, or the optimizer's schedule is longer than the run, or
        the class weights leave nothing to train.
    """
    config = experiment.config
    rates = None if optimizer else learning_rates(config.optimizer, config.train.steps)
    optimizer = optimizer or make_optimizer(config.optimizer, config.train.steps)
    examples, plan = experiment.training_set()
    weights = config.loss.class_weights
    if weights and not any(weights[i] for example in examples for i in _classes(example)):
        raise ConfigError(
            "loss.class_weights is 0 for every class that the training records have, so nothing would be trained; the"
            f" classes are, in order, {', '.join(experiment.template.verbalizers)}"
        )
    experiment, memory = experiment.fitted(plan)
    return Prepared(experiment, optimizer, examples, plan, memory, rates)


def _classes(example: Example) -> Iterable[int]:
    """Returns the classes of an example that class weights are for."""
    return [example.label] if example.classes is None else np.unique(example.classes).tolist()


def begin(prepared: Prepared) -> Start | None:
    """Returns the result of `start_ahead` for the run, to compile its training step while other records are encoded.

    Raises:
      ConfigError: the options of the method are not compatible with the base.
    """
    experiment = prepared.experiment
    config, objective = experiment.config, experiment.objective(prepared.plan)
    return start_ahead(experiment.base, config.method, prepared.optimizer, objective, prepared.data, config.train)


@contextlib.contextmanager
def claimed(
    workdir: Path,
    prepared: Prepared,
    inputs: Inputs,
    *,
    resume: bool,
    overwrite: bool,
    reads: Sequence[Path] = (),
) -> Iterator[None]:
    """Context manager that locks and prepares the work directory of a run. See `open_workdir` for the arguments.

    Raises:
      ConfigError: as in `open_workdir`, or the processes of the run have different directories.
    """
    with contextlib.ExitStack() as stack:

        def claim() -> None:
            stack.enter_context(held(workdir))
            open_workdir(workdir, prepared.settings, inputs, resume=resume, overwrite=overwrite, reads=reads)

        processes.from_first("workdir", claim)
        if not (workdir / CONFIG_FILE).exists():
            raise ConfigError(
                f"{workdir} is not the same directory in all processes; --workdir must be a shared directory"
            )
        yield


def tune(
    prepared: Prepared,
    validation: EvaluationSet | None,
    *,
    workdir: Path | None,
    log: Callable[[int], MetricsLog],
    save_best: Callable[[Best], None],
    resume: bool = False,
    resume_from: int | None = None,
    profile: int = 0,
    events: Events | None = None,
    progress: bool = True,
    start: Start | None = None,
) -> Outcome:
    """Trains the prompt with the options of the config. The arguments after `validation` are those of `single.fit`.

    Args:
      prepared: the experiment and its training data.
      validation: the records that choose the best prompt; None takes the last one.

    Raises:
      TrainingError: a loss, gradient or prompt is not finite, or the device ran out of memory.
      CheckpointError: a checkpoint cannot be written or read.
      Stopped: after SIGTERM or SIGINT, with the state saved.
    """
    experiment, plan = prepared.experiment, prepared.plan
    base, config = experiment.base, experiment.config

    def validate(params: PromptParams) -> Mapping[str, Any]:
        assert validation is not None
        return evaluate(base, validation, experiment.virtual(params), generated=False).metrics

    try:
        return fit(
            base,
            config.method,
            prepared.optimizer,
            experiment.objective(plan),
            prepared.data,
            config.train,
            workdir=workdir,
            log=log,
            validate=None if validation is None else validate,
            save_best=save_best,
            metadata={"config": prepared.settings},
            resume=resume,
            resume_from=resume_from,
            profile=profile,
            events=events,
            progress=progress,
            learning_rates=prepared.learning_rates,
            start=start,
        )
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        memory, remat = prepared.memory or "unknown", base.remat
        raise TrainingError(
            f"the device ran out of memory. Estimated: {memory}; rematerialization: {remat}. To reduce memory,"
            " use more --train.microbatches, --base.remat full, a smaller --evaluation.batch-size, or --mesh.fsdp over"
            " more devices"
        ) from error
