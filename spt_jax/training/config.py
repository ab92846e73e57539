"""What the loop and the log of a run may be told."""

import dataclasses

from spt_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop.

    Attributes:
      steps: optimizer steps.
      batch_size: examples per step.
      microbatches: parts that a batch is split in, one after the other: less memory, the same result.
      seed: of initialisation and data order.
      evaluate_every: steps between validations; default a tenth of the run.
      patience: stop after so many validations without a better one; 0 never stops early.
      checkpoint_every: steps between checkpoints; default as evaluate_every.
      keep: how many of the latest checkpoints stay, beside the best.
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
        """With the defaults that follow from the length of the run."""
        every = self.evaluate_every or max(1, self.steps // 10)
        return dataclasses.replace(self, evaluate_every=every, checkpoint_every=self.checkpoint_every or every)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where metrics go besides `metrics.jsonl`.

    Attributes:
      tensorboard: write event files into the work directory.
      wandb: log to this Weights & Biases project.
    """

    tensorboard: bool = False
    wandb: str | None = None
