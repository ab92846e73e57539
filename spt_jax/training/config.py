"""Configuration of the loss, of the training loop and of logging."""

import dataclasses
import math

from spt_jax.errors import ConfigError, did_you_mean
from spt_jax.training.objectives import OBJECTIVES, Objective


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Which loss is minimized.

    Attributes:
      over: "vocabulary" is the next-token cross-entropy of the target; "verbalizers" is the cross-entropy of the
        correct class, given the sequence probabilities of the verbalizers; "span" is over the positions of the text
        that a span head reads. Defaults to "verbalizers" if there are any. With a task head it is set automatically.
      label_smoothing: the share of the target distribution that is spread evenly over the vocabulary or the classes.
      class_weights: a weight per class, in the order of the verbalizers; if empty, all classes have equal weight.
    """

    over: str | None = None
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"loss.label_smoothing is {self.label_smoothing}; it must be in [0, 1)")
        finite = all(0 <= weight < math.inf for weight in self.class_weights)
        if not finite or (self.class_weights and not any(self.class_weights)):
            raise ConfigError("loss.class_weights must be finite numbers of at least 0, and not all 0")
        if self.over is not None and self.over not in OBJECTIVES:
            raise ConfigError(f"loss.over is {self.over!r}; {did_you_mean(self.over, OBJECTIVES)}")
        if self.over is not None and self.label_smoothing and "label_smoothing" not in self._options:
            raise ConfigError(f"loss.label_smoothing is not compatible with loss.over={self.over}")

    def objective(self, choices: int) -> Objective:
        """Returns the objective, by default over the vocabulary.

        Args:
          choices: the number of scored sequences per example.
        """
        options = {"label_smoothing": self.label_smoothing, "choices": choices}
        return self._objective(**{name: value for name, value in options.items() if name in self._options})

    @property
    def uses_choices(self) -> bool:
        """Whether examples keep all their choices."""
        return self._objective.uses_choices

    @property
    def needs_head(self) -> bool:
        """Whether the loss is that of a task head."""
        return self._objective.needs_head

    @property
    def _objective(self) -> type[Objective]:
        return OBJECTIVES[self.over or "vocabulary"]

    @property
    def _options(self) -> set[str]:
        return {field.name for field in dataclasses.fields(self._objective)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Options of the training loop.

    Attributes:
      steps: optimizer steps.
      batch_size: examples per step.
      microbatches: the number of parts that a batch is split into, which saves memory and has the same result.
      seed: the random seed of initialization and data order.
      evaluate_every: steps between validations; default a tenth of the run.
      patience: stop after this many validations without improvement; 0 never stops early.
      checkpoint_every: steps between checkpoints; defaults to evaluate_every.
      keep: how many of the latest checkpoints to keep.
    """

    steps: int = 1000
    batch_size: int = 32
    microbatches: int = 1
    seed: int = 0
    evaluate_every: int | None = None
    patience: int = 0
    checkpoint_every: int | None = None
    keep: int = 2

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "microbatches", "evaluate_every", "checkpoint_every", "keep"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"train.{name} is {value}; it must be at least 1")
        if self.patience < 0:
            raise ConfigError(f"train.patience is {self.patience}; it must be at least 0")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"train.seed is {self.seed}; it must be at least 0 and below 2**32")
        if self.steps >= 2**31:
            raise ConfigError(f"train.steps is {self.steps}; steps are counted in 32 bits, so it must be below 2**31")

    def resolved(self) -> "TrainConfig":
        """Returns the config with defaults filled in that depend on the length of the run."""
        every = self.evaluate_every or max(1, self.steps // 10)
        return dataclasses.replace(self, evaluate_every=every, checkpoint_every=self.checkpoint_every or every)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where metrics are logged in addition to `metrics.jsonl`.

    Attributes:
      tensorboard: whether to write TensorBoard event files to the work directory.
      wandb: the Weights & Biases project to log to.
    """

    tensorboard: bool = False
    wandb: str | None = None
