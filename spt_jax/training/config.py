"""Configuration of the loss, of the training loop and of logging."""

import dataclasses
import functools
import math
import typing

import tyro

from spt_jax.errors import ConfigError, did_you_mean
from spt_jax.training.objectives import OBJECTIVES, Objective

# Fields of objectives that are no options: they follow from the data.
_COUNTED = frozenset({"choices"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Which objective is minimized, and its options.

    An objective's own options are fields of a subclass, which `of` and `with_options` return.

    Attributes:
      over: the name of a registered objective. "vocabulary" is the next-token cross-entropy of the target;
        "verbalizers" is the cross-entropy of the correct class, given the sequence probabilities of the verbalizers;
        "span" is over the positions of the text that a span head reads; "dpo", "ipo", "simpo" and "orpo" compare a
        chosen with a rejected answer; "distillation" learns what the base says after a text; "grpo" raises the rewards
        of sampled answers. Defaults to that of the task: "verbalizers" if there are any. With a task head it is set
        automatically.
      label_smoothing: the share of the target distribution that is spread evenly over the vocabulary or the classes.
      class_weights: a weight per class, in the order of the verbalizers; if empty, all classes have equal weight.

    Raises:
      ConfigError: there is no such objective, or a field is out of its range or not an option of the objective.
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
        if self.over is not None:
            check_objective(self.over)
        used = {"label_smoothing"} if self.over is not None and self.label_smoothing else set()
        for name in sorted((used | self._own) - _options(self._objective)):
            raise ConfigError(f"loss.{name} is not compatible with loss.over={self.over}")
        if self._own and not self._missing:
            self.objective(2)  # which checks its options

    @staticmethod
    def of(objective: Objective, *, class_weights: tuple[float, ...] = ()) -> "LossConfig":
        """Returns the config of a registered objective with its options.

        Args:
          objective: the objective. One that counts the choices of the data takes them from the data instead.
          class_weights: a weight per class, as in the attributes.

        Raises:
          ConfigError: the class of the objective is not registered.
        """
        names = [name for name, kind in OBJECTIVES.items() if kind is type(objective)]
        if not names:
            raise ConfigError(f"{type(objective).__name__} is not registered: add it to OBJECTIVES under a name")
        options = {name: getattr(objective, name) for name in _options(type(objective))}
        return _config_type(type(objective))(over=names[0], class_weights=class_weights, **options)

    def with_options(self, over: str | None) -> "LossConfig":
        """Returns the config for an objective, with its options as fields.

        Options of another objective are dropped. Those that are not set have their defaults, or `tyro.MISSING`, which
        the command line replaces or refuses.

        Args:
          over: the name of the objective; None for the default of the task.

        Raises:
          ConfigError: there is no such objective, or the label smoothing is not an option of it.
        """
        kind = LossConfig if over is None else _config_type(check_objective(over))
        if type(self) is kind:
            return dataclasses.replace(self, over=over)
        own = {
            field.name: tyro.MISSING
            for field in dataclasses.fields(kind)
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        }
        return kind(over=over, label_smoothing=self.label_smoothing, class_weights=self.class_weights, **own)

    def resolved(self) -> "LossConfig":
        """Returns the config with all options of its objective as fields.

        Raises:
          ConfigError: an option without a default is not set.
        """
        loss = self.with_options(self.over)
        for name in sorted(loss._missing):
            raise ConfigError(f"loss.over={loss.over} needs loss.{name}")
        return loss

    def objective(self, choices: int) -> Objective:
        """Returns the objective, by default over the vocabulary.

        Args:
          choices: the number of scored sequences per example.
        """
        fields = {field.name for field in dataclasses.fields(self._objective)}
        options = {**{field.name: getattr(self, field.name) for field in dataclasses.fields(self)}, "choices": choices}
        return self._objective(**{name: value for name, value in options.items() if name in fields})

    @property
    def uses_choices(self) -> bool:
        """Whether examples keep all their choices."""
        return self._objective.uses_choices

    @property
    def pairs(self) -> bool:
        """Whether each example must be a pair of a chosen and a rejected answer."""
        return self._objective.pairs

    @property
    def samples(self) -> bool:
        """Whether the answers are sampled under the prompt being trained."""
        return self._objective.samples

    @property
    def needs_head(self) -> bool:
        """Whether the loss is that of a task head."""
        return self._objective.needs_head

    @property
    def _objective(self) -> type[Objective]:
        return OBJECTIVES[self.over or "vocabulary"]

    @property
    def _own(self) -> set[str]:
        return {field.name for field in dataclasses.fields(self)} - _SHARED

    @property
    def _missing(self) -> set[str]:
        return {name for name in self._own if getattr(self, name) is tyro.MISSING}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GivenLoss(LossConfig):
    """The config of an objective that need not be registered; only in Python. `given` makes one.

    Attributes:
      instance: the objective.
    """

    instance: Objective

    def __post_init__(self) -> None:
        dataclasses.replace(LossConfig(), class_weights=self.class_weights)  # which checks the weights

    def with_options(self, over: str | None) -> "LossConfig":
        return self if over == self.over else super().with_options(over)

    def objective(self, choices: int) -> Objective:
        counted = {field.name for field in dataclasses.fields(self.instance)} & _COUNTED
        return dataclasses.replace(self.instance, **dict.fromkeys(counted, choices))

    @property
    def _objective(self) -> type[Objective]:
        return type(self.instance)


def given(objective: Objective | None, class_weights: tuple[float, ...] = ()) -> LossConfig:
    """Returns the config of an objective, registered or not; None is the default of the task.

    Args:
      objective: the objective. One that counts the choices of the data takes them from the data instead.
      class_weights: a weight per class, as in `LossConfig`.

    Raises:
      ConfigError: the class weights are out of their range.
    """
    if objective is None:
        return LossConfig(class_weights=class_weights)
    if type(objective) in OBJECTIVES.values():
        return LossConfig.of(objective, class_weights=class_weights)
    return GivenLoss(over=type(objective).__name__, class_weights=class_weights, instance=objective)


_SHARED = frozenset(field.name for field in dataclasses.fields(LossConfig))


def check_objective(over: str) -> type[Objective]:
    """Returns the registered objective of a name.

    Raises:
      ConfigError: there is none.
    """
    if over not in OBJECTIVES:
        raise ConfigError(f"loss.over is {over!r}; {did_you_mean(over, OBJECTIVES)}")
    return OBJECTIVES[over]


def _options(objective: type[Objective]) -> set[str]:
    return {field.name for field in dataclasses.fields(objective) if field.init} - _COUNTED


@functools.cache
def _config_type(objective: type[Objective]) -> type[LossConfig]:
    """Returns `LossConfig` with an objective's own options as further fields, from which the flags are made.

    Raises:
      ConfigError: an option has the name of a field of `LossConfig` that means something else.
    """
    options = _options(objective)
    for name in sorted(options & (_SHARED - {"label_smoothing"})):
        raise ConfigError(f"{objective.__name__}.{name}: an option of an objective cannot have this name; rename it")
    types = typing.get_type_hints(objective, include_extras=True)
    own = [
        (field.name, types[field.name], dataclasses.field(default=field.default, default_factory=field.default_factory))
        for field in dataclasses.fields(objective)
        if field.name in options - _SHARED
    ]
    if not own:
        return LossConfig
    return dataclasses.make_dataclass(
        f"{objective.__name__}Config",
        own,
        bases=(LossConfig,),
        namespace={"__doc__": objective.__doc__, "__module__": __name__},
        frozen=True,
        kw_only=True,
    )


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
