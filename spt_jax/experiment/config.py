"""An experiment as frozen dataclasses. Files in `configs/` build one; the command line overrides its fields."""

import dataclasses
from typing import Any, Generic, Literal, TypeVar

from spt_jax.data.task import TASKS
from spt_jax.data.templates import MESSAGES, TEXT, Template, virtual_length, without_virtual
from spt_jax.errors import ConfigError, did_you_mean
from spt_jax.evaluation.evaluate import EvaluationConfig
from spt_jax.models.kernels import KernelChoice
from spt_jax.models.quantized import quantizations
from spt_jax.options import Line, Lines, Pairs
from spt_jax.prompts import METHODS, Method, MultitaskPromptTuning
from spt_jax.prompts.initializers import Initializer
from spt_jax.runtime.sharding import MeshConfig
from spt_jax.training.config import LogConfig, LossConfig, TrainConfig
from spt_jax.training.optimizers import OptimizerConfig

AnyMethod = TypeVar("AnyMethod", bound=Method)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """The frozen base.

    Attributes:
      path: a directory in Hugging Face format, a hub id, a GGUF file, or "starter" for the model that ships with the
        package.
      revision: branch, tag or commit on the hub.
      dtype: precision of the base; default float32 on CPU, bfloat16 on accelerators that compute in it, and float16 on
        those that do not, such as a T4.
      remat: rematerialization, what the backward pass recomputes instead of storing. none: nothing; dots: everything
        but the results of matrix products, which costs little; full: whole layers, with about a third more work and
        the least memory; auto: the first of these whose estimate fits the device, or dots if the device's memory is
        unknown, as on CPU.
      attention: xla, on all devices; cudnn, fused, on NVIDIA GPUs with 16-bit dtypes; splash, fused, on TPUs. auto: the
        device's fused kernel if it can run, otherwise xla.
      quantize: how the matrices are stored. int8: in one byte per weight; fp8: in one byte with an exponent; int4: in
        4.25 bits, with a scale and an offset per group of 128 rows; nf4: in 4.5 bits, with 16 normally distributed
        levels; keep: as a GGUF file or quantized checkpoint packs them. Embeddings and the output matrix are int8 with
        all but keep. Default: in dtype.
    """

    path: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    remat: Literal["auto", "none", "dots", "full"] = "auto"
    attention: KernelChoice = "auto"
    quantize: str | None = None

    def __post_init__(self) -> None:
        if self.quantize is not None and self.quantize not in quantizations():
            raise ConfigError(f"base.quantize is {self.quantize!r}; known: {', '.join(quantizations())}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data sets and the template.

    Attributes:
      train: a .jsonl, .json, .csv, .tsv or .parquet file, or a hub data set (id or id:config).
      validation: likewise; used to choose the best prompt and the best hand-written prompt.
      test: likewise; used for the final comparison.
      train_split: split of a hub data set to train on.
      validation_split: split of a hub data set to validate on.
      test_split: split of a hub data set to test on.
      revision: revision of a hub data set.
      prompt: the template's prompt, with {fields} and <soft> where the virtual tokens go.
      target: the text that the model is trained to generate, for example " {label}"; empty for {messages}.
      rejected: for the preference task, the text of the rejected answer, for example " {rejected}"; the target is the
        chosen one. Their defaults are then {chosen} and {rejected}.
      verbalizers: for classification, the text that stands for each class.
      hard_prompt: hand-written prompts to compare with.
      reads: the prompt's field whose words a tagging head labels, or in which a span head finds the answer.
      task: the field with a record's task, for multitask_prompt_tuning.
      truncate: the field that may be truncated if an example is too long.
      keep: which end of that field is kept.
      max_length: maximum number of tokens of an example, virtual tokens included; default the model's positions.
      chat: render prompt and target with the tokenizer's chat template.
      system: the system turn of such a chat.
      continues: the prompt continues text that the prefix starts from, such as a remembered one: there is no BOS before
        it, and in a chat, system is the rest of the remembered system turn.
      packing: put several examples in one row.
      limit: maximum number of records to read from each source, for quick trials.
    """

    train: str
    validation: str | None = None
    test: str | None = None
    train_split: str = "train"
    validation_split: str = "validation"
    test_split: str = "test"
    revision: str | None = None
    prompt: Line
    target: Line = ""
    rejected: Line = ""
    verbalizers: Pairs = dataclasses.field(default_factory=dict)
    hard_prompt: Lines = ()
    reads: str | None = None
    task: str | None = None
    truncate: str | None = None
    keep: Literal["start", "end"] = "start"
    max_length: int | None = None
    chat: bool = False
    system: Line | None = None
    continues: bool = False
    packing: bool = True
    limit: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What is predicted.

    Attributes:
      name: a registered task, such as tagging. Defaults to method.head where the method has a head; otherwise to
        language_model, which is text or, with verbalizers, classification.
      reward: with the task rewards, what judges the answers: Python functions (module:function) from the Python path or
        the working directory, or names of fields that the answer must be equal to.
      reward_weights: the weight of each of them; by default all are 1.
      reward_failures: the largest share of the answers of a rollout for which reward functions may fail; beyond it, the
        run stops.
    """

    name: str | None = None
    reward: Lines = ()
    reward_weights: tuple[float, ...] = ()
    reward_failures: float = 0.05

    def __post_init__(self) -> None:
        if self.name is not None and self.name not in TASKS:
            raise ConfigError(f"task.name is {self.name!r}; {did_you_mean(self.name, TASKS)}")
        if not 0 <= self.reward_failures < 1:
            raise ConfigError(f"task.reward_failures is {self.reward_failures}; it must be in [0, 1)")
        if self.reward_weights and not self.reward:
            raise ConfigError("task.reward_weights is given without task.reward")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig(Generic[AnyMethod]):
    """Everything that defines a run, apart from where it is written.

    Attributes:
      base: the frozen base.
      data: the data sets and the template.
      method: the method and its options.
      task: what is predicted.
      optimizer: the optimizer and its schedule.
      loss: the objective and its options.
      train: the length of the run, its batches and checkpoints.
      evaluation: how validation and test are run.
      mesh: the number of devices along each axis.
      log: where metrics go besides the work directory.
    """

    base: BaseConfig
    data: DataConfig
    method: AnyMethod
    task: TaskConfig = dataclasses.field(default_factory=TaskConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)


def resolve(config: ExperimentConfig[Any]) -> ExperimentConfig[Any]:
    """Fills in fields that follow from others, and checks fields against each other.

    Raises:
      ConfigError: fields are incompatible; the message names them.
    """
    data, method, loss = config.data, config.method, config.loss
    placed = virtual_length(data.prompt)
    if not method.token_count:
        if placed:
            raise ConfigError(f"data.prompt has {placed} virtual tokens, but {method.name} has none: remove <soft:n>")
        data = dataclasses.replace(data, prompt=without_virtual(data.prompt))
    elif method.length is None and not method.needs_tokenizer:
        method = dataclasses.replace(method, length=placed or method.token_count)
    if data.continues and method.token_count:
        raise ConfigError(f"data.continues needs a prefix that holds text, and {method.name} has none; leave it out")
    if (data.task is not None) != isinstance(method, MultitaskPromptTuning):
        raise ConfigError("data.task and method.name=multitask_prompt_tuning need each other: give both or neither")
    init = getattr(method, "init", None)
    if isinstance(init, Initializer) and init.name == "labels" and not init.labels:
        if not data.verbalizers:
            raise ConfigError("method.init.name=labels needs data.verbalizers or method.init.labels")
        method = dataclasses.replace(method, init=dataclasses.replace(init, labels=tuple(data.verbalizers.values())))
    task = TASKS[task_name(config)].with_classes(data.verbalizers)
    default_target, default_rejected = task.targets
    data = dataclasses.replace(data, target=data.target or default_target, rejected=data.rejected or default_rejected)
    if loss.over not in (None, task.loss) and (task.has_head or loss.needs_head):
        raise ConfigError(f"loss.over={loss.over} is not compatible with a {task.name} head; leave it out")
    if data.hard_prompt and not task.bare:
        raise ConfigError(f"data.hard_prompt is not compatible with a {task.name} head")
    if task.has_head or loss.over is None:
        loss = dataclasses.replace(loss, over=task.loss)
    if task.has_head and method.head is None:
        method = dataclasses.replace(method, head=task.name)
    if task.has_head and task.outputs is None:
        if method.classes is None and data.verbalizers:
            method = dataclasses.replace(method, classes=len(data.verbalizers))
        if data.verbalizers and method.classes != len(data.verbalizers):
            raise ConfigError(f"method.classes is {method.classes}, but there are {len(data.verbalizers)} verbalizers")
    if not task.has_head and getattr(method, "classes", None) is not None:
        raise ConfigError(f"method.classes is {method.classes}, but {task.name} has no head: set task.name")
    if loss.pairs and not task.pairs:
        raise ConfigError(f"loss.over={loss.over} compares two answers of each record; it needs task.name=preference")
    if loss.samples != task.judged:
        raise ConfigError(f"task.name=rewards and loss.over=grpo need each other; loss.over is {loss.over}")
    if bool(config.task.reward) != task.judged:
        raise ConfigError("task.name=rewards and task.reward need each other: give both or neither")
    if loss.uses_choices and not task.pairs and not task.judged and len(data.verbalizers) < 2:
        raise ConfigError(f"loss.over={loss.over} needs data.verbalizers with at least 2 classes")
    if loss.class_weights and len(loss.class_weights) != len(data.verbalizers):
        raise ConfigError(
            f"loss.class_weights has {len(loss.class_weights)} numbers for {len(data.verbalizers)} classes"
        )
    if hasattr(loss, "system_rest"):
        given, rest = getattr(loss, "system_rest", None), data.system if data.continues else None
        if given not in (None, rest):
            raise ConfigError(f"loss.system_rest is {given!r}; it follows from data.system, so leave it out")
        loss = dataclasses.replace(loss, system_rest=rest)
    if data.hard_prompt and f"{{{MESSAGES}}}" in data.prompt:
        raise ConfigError("data.hard_prompt is not compatible with {messages}: write it as a turn of the chat")
    return dataclasses.replace(config, data=data, method=method, loss=loss.resolved(), train=config.train.resolved())


def task_name(config: ExperimentConfig[Any]) -> str:
    """Returns the name of the task, from `task.name` or `method.head`.

    Raises:
      ConfigError: the two differ, or the task needs a head and the method has none.
    """
    name, method = config.task.name, config.method
    head: str | None = getattr(method, "head", None)
    if name is None:
        return head or TEXT
    if not hasattr(method, "head") and TASKS[name].has_head:
        able = ", ".join(other for other, kind in METHODS.items() if hasattr(kind, "head"))
        raise ConfigError(f"task.name={name} needs a head, and {method.name} has none; methods with a head: {able}")
    if head not in (None, name):
        raise ConfigError(f"task.name={name} and method.head={head} differ; give only one of them")
    return name


def make_template(config: ExperimentConfig[Any]) -> Template:
    """Returns the template of a resolved config."""
    data = config.data
    return Template(
        prompt=data.prompt,
        target=data.target,
        rejected=data.rejected,
        virtual_tokens=config.method.token_count,
        verbalizers=data.verbalizers,
        truncate=data.truncate,
        keep=data.keep,
        task=data.task,
        tasks=getattr(config.method, "tasks", ()),
        head=task_name(config),
        reads=data.reads,
        chat=data.chat,
        system=data.system,
        continues=data.continues,
        new_tokens=getattr(config.method, "new_tokens", ()),
        per_input=config.method.per_input,
    )
