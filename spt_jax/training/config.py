"""Configuration of the training loop and of logging."""

import dataclasses

from spt_jax.errors import ConfigError


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
