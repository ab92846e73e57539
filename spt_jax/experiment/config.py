"""An experiment as frozen dataclasses. Files in `configs/` build one; the command line overrides its fields."""

import dataclasses
from typing import Any, Generic, Literal, TypeVar

from spt_jax.data.templates import MESSAGES, Template, virtual_length, without_virtual
from spt_jax.errors import ConfigError
from spt_jax.evaluation.evaluate import EvaluationConfig
from spt_jax.models.kernels import KernelChoice
from spt_jax.options import Line, Lines, Pairs
from spt_jax.prompts import Method, MultitaskPromptTuning
from spt_jax.prompts.initializers import Initializer
from spt_jax.runtime.sharding import MeshConfig
from spt_jax.training.config import LogConfig, TrainConfig
from spt_jax.training.losses import LossConfig
from spt_jax.training.optimizers import OptimizerConfig

AnyMethod = TypeVar("AnyMethod", bound=Method)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """The frozen base.

    Attributes:
      path: a directory in Hugging Face format, a hub id, or "starter" for the model that ships with the package.
      revision: branch, tag or commit on the hub.
      dtype: precision of the base; default float32 on CPU, bfloat16 on accelerators that compute in it, and float16 on
        those that do not, such as a T4.
      remat: what the backward pass computes again instead of keeping: none; dots, all but the results of linear maps,
        which costs little; full, whole layers, for about a third more work and the least memory. auto: the first of
        them whose estimate fits the device, or dots where its memory is not known, as on CPU.
      attention: xla, everywhere; cudnn, fused, on NVIDIA GPUs with 16 bits; splash, fused, on TPUs. auto: the fused one
        of the device where it can run, and xla elsewhere.
      quantize: int8 keeps the layers' matrices in a byte per weight.
    """

    path: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    remat: Literal["auto", "none", "dots", "full"] = "auto"
    attention: KernelChoice = "auto"
    quantize: Literal["int8"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the examples come from and how they read.

    Attributes:
      train: a .jsonl, .json, .csv, .tsv or .parquet file, or a hub data set (id or id:config).
      validation: likewise; chooses the best prompt and the best hand-written prompt.
      test: likewise; for the final comparison.
      train_split: split of a hub data set to train on.
      validation_split: split of a hub data set to validate on.
      test_split: split of a hub data set to test on.
      revision: of a hub data set.
      prompt: the template's prompt, with {fields} and <soft> where the virtual tokens go.
      target: what the model shall say, for example " {label}"; empty for {messages}.
      verbalizers: for classification, the text that stands for each class.
      hard_prompt: prompts that a person would write, to compare with.
      reads: the prompt's field that a tagging head reads words of, or a span head a part of.
      task: the field that names a record's task, for multitask_prompt_tuning.
      truncate: the field that may be shortened when an example is too long.
      keep: which end of that field stays.
      max_length: tokens of an example at most, virtual ones included; default the model's positions.
      chat: render prompt and target through the tokenizer's chat template.
      system: the system turn of such a chat.
      packing: several examples share a row.
      limit: read at most so many records of each source, to try things out.
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
    verbalizers: Pairs = dataclasses.field(default_factory=dict)
    hard_prompt: Lines = ()
    reads: str | None = None
    task: str | None = None
    truncate: str | None = None
    keep: Literal["start", "end"] = "start"
    max_length: int | None = None
    chat: bool = False
    system: Line | None = None
    packing: bool = True
    limit: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig(Generic[AnyMethod]):
    """Everything that defines a run, apart from where it is written."""

    base: BaseConfig
    data: DataConfig
    method: AnyMethod
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)


def resolve(config: ExperimentConfig[Any]) -> ExperimentConfig[Any]:
    """Fills in what follows from other fields, and checks what no single part can.

    Raises:
      ConfigError: naming the fields that do not fit together.
    """
    data, method, loss = config.data, config.method, config.loss
    placed = virtual_length(data.prompt)
    if not method.token_count:
        if placed:
            raise ConfigError(f"data.prompt places {placed} virtual tokens, but {method.name} has none: drop <soft:n>")
        data = dataclasses.replace(data, prompt=without_virtual(data.prompt))
    elif method.length is None and not method.needs_tokenizer:
        method = dataclasses.replace(method, length=placed or method.token_count)
    if (data.task is not None) != isinstance(method, MultitaskPromptTuning):
        raise ConfigError("data.task and method.name=multitask_prompt_tuning go together: give both or neither")
    init = getattr(method, "init", None)
    if isinstance(init, Initializer) and init.name == "labels" and not init.labels:
        if not data.verbalizers:
            raise ConfigError("method.init.name=labels needs data.verbalizers or method.init.labels")
        method = dataclasses.replace(method, init=dataclasses.replace(init, labels=tuple(data.verbalizers.values())))
    head = _head(method)
    own_loss = {"classification": "vocabulary", "tagging": "vocabulary", "span": "span"}.get(head)
    if loss.over not in (None, own_loss) and (own_loss or loss.over == "span"):
        raise ConfigError(f"loss.over={loss.over} does not go with a {head} head; leave it out")
    if head in ("tagging", "span") and data.hard_prompt:
        raise ConfigError(f"data.hard_prompt: without a head, the model has no {head} to compare with")
    if own_loss is not None:
        loss = dataclasses.replace(loss, over=own_loss)
    if head in ("classification", "tagging"):
        if method.classes is None and data.verbalizers:
            method = dataclasses.replace(method, classes=len(data.verbalizers))
        if data.verbalizers and method.classes != len(data.verbalizers):
            raise ConfigError(f"method.classes is {method.classes} for {len(data.verbalizers)} verbalizers")
    elif loss.over is None:
        loss = dataclasses.replace(loss, over="verbalizers" if data.verbalizers else "vocabulary")
    if loss.over == "verbalizers" and len(data.verbalizers) < 2:
        raise ConfigError("loss.over=verbalizers needs data.verbalizers with at least 2 classes")
    if loss.class_weights and len(loss.class_weights) != len(data.verbalizers):
        raise ConfigError(
            f"loss.class_weights has {len(loss.class_weights)} numbers for {len(data.verbalizers)} classes"
        )
    if data.hard_prompt and f"{{{MESSAGES}}}" in data.prompt:
        raise ConfigError("data.hard_prompt does not go with {messages}: write it as a turn of the chat")
    return dataclasses.replace(config, data=data, method=method, loss=loss, train=config.train.resolved())


def _head(method: Any) -> Any:
    return getattr(method, "head", "language_model")


def make_template(config: ExperimentConfig[Any]) -> Template:
    """The template of a resolved config."""
    data = config.data
    return Template(
        prompt=data.prompt,
        target=data.target,
        virtual_tokens=config.method.token_count,
        verbalizers=data.verbalizers,
        truncate=data.truncate,
        keep=data.keep,
        task=data.task,
        tasks=getattr(config.method, "tasks", ()),
        head=_head(config.method),
        reads=data.reads,
        chat=data.chat,
        system=data.system,
    )
