"""From a config to everything that a run needs, and the comparison at its end."""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spt_jax import measure, processes
from spt_jax.base import FrozenBase, load_base, read_tokenizer
from spt_jax.config import ExperimentConfig, make_template, resolve
from spt_jax.data.batches import BatchPlan, multiples, plan_batches
from spt_jax.data.encoder import Encoder, Example
from spt_jax.data.reading import words_of
from spt_jax.data.sources import check_fields, read_records
from spt_jax.data.templates import Template
from spt_jax.data.values import field_text
from spt_jax.errors import ConfigError, DataError, differing_fields
from spt_jax.evaluation import Evaluation, EvaluationSet, evaluate, make_evaluation_set, selection_score
from spt_jax.files import write_json
from spt_jax.models.decoder import Remat
from spt_jax.prompts import PromptParams, VirtualPrompt
from spt_jax.prompts.storage import save_prompt
from spt_jax.sharding import make_mesh, row_shards
from spt_jax.training.cost import StepMemory, choose_remat, plan_shape, step_memory
from spt_jax.training.step import Objective

Records = Sequence[Mapping[str, Any]]
CONFIG_FILE = "config.json"


def check_workdir(path: Path, *, resume: bool | None = None, overwrite: bool) -> None:
    """Whether a run may use the work directory. `resume` is None for what cannot go on.

    Raises:
      ConfigError: it exists and neither resume nor overwrite is asked; or there is nothing to resume; or overwrite
        would delete a directory that no run of ours has made.
    """
    exists = path.is_dir() and any(path.iterdir())
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other")
    if path.exists() and not path.is_dir():
        raise ConfigError(f"work directory {path} is a file")
    if exists and not (resume or overwrite):
        ways = "--overwrite to start anew" if resume is None else "--resume to go on or --overwrite to start anew"
        raise ConfigError(f"work directory {path} already exists. Use {ways}")
    ours = (path / CONFIG_FILE).exists()
    if resume and not ours:
        raise ConfigError(f"work directory {path} holds no run to resume")
    if exists and overwrite and not ours:
        raise ConfigError(f"{path} has no {CONFIG_FILE}, so no run of ours made it; delete it yourself if you mean it")


def prepare_workdir(path: Path, *, resume: bool | None = None, overwrite: bool) -> None:
    """Makes the work directory, empty unless a run is resumed.

    Raises:
      ConfigError: as `check_workdir`.
    """
    check_workdir(path, resume=resume, overwrite=overwrite)
    if overwrite and path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True, exist_ok=True)


def open_workdir(path: Path, settings: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
    """`prepare_workdir`, with the run's settings in its config.json.

    Raises:
      ConfigError: also, a resumed run must be the same run; only where it runs and logs may differ.
    """
    prepare_workdir(path, resume=resume, overwrite=overwrite)
    if resume:
        saved = json.loads((path / CONFIG_FILE).read_text())
        free = ("mesh", "log")
        different = differing_fields(
            {k: v for k, v in settings.items() if k not in free}, {k: v for k, v in saved.items() if k not in free}
        )
        if different:
            fields = [f"{name}: {there!r} in the work directory, {now!r} now" for name, now, there in different]
            raise ConfigError("this is not the config of the run to resume: " + "; ".join(fields))
    write_json(path / CONFIG_FILE, settings)


@contextlib.contextmanager
def _located(source: str | None) -> Iterator[None]:
    """Says of which file or data set a record is wrong."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{source}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A resolved config with its base loaded and its records read."""

    config: ExperimentConfig[Any]
    base: FrozenBase
    template: Template
    train: Records
    validation: Records | None
    test: Records | None

    @property
    def hard_prompts(self) -> tuple[str, ...]:
        """Without validation data to choose by, only the first of the hand-written prompts."""
        every = self.config.data.hard_prompt
        return every if self.validation is not None else every[:1]

    def encoder(self, template: Template) -> Encoder:
        """An encoder of this base for a template, up to the run's longest example."""
        return Encoder(template, self.base.tokenizer, self.base.config.vocab_size, self.max_length)

    @property
    def max_length(self) -> int:
        """Tokens of an example at most, in the positions that the method's own prefix leaves."""
        positions = self.base.config.max_positions - self.config.method.prefix_length
        return min(self.config.data.max_length or positions, positions)

    def evaluation_set(self, records: Records, template: Template) -> EvaluationSet:
        """Records as this template reads them."""
        data = self.config.data
        with _located(data.validation if records is self.validation else data.test):
            return make_evaluation_set(
                self.base,
                self.encoder(template),
                records,
                self.config.evaluation,
                packing=data.packing,
                taken=self.config.method.prefix_length,
            )

    def training_set(self) -> tuple[list[Example], BatchPlan]:
        """Encoded training examples and the shapes of their batches."""
        config = self.config
        options = multiples(self.base.mesh, config.train.microbatches)
        if config.train.batch_size < options["multiple"]:
            raise ConfigError(
                f"train.batch_size={config.train.batch_size} leaves some of {row_shards(self.base.mesh)} devices along"
                f" mesh.data and mesh.fsdp without a row in {config.train.microbatches} microbatches;"
                f" {options['multiple']} works, or a smaller mesh"
            )
        encoder = self.encoder(self.template)
        with _located(config.data.train):
            examples = encoder.encode_all(self.train)
        if config.loss.over == "vocabulary":
            examples = [example.as_target() for example in examples]
        plan = plan_batches(
            examples,
            lead=encoder.leads(examples),
            batch_size=config.train.batch_size,
            packing=config.data.packing,
            **options,
            max_length=self.base.config.max_positions,
        )
        virtual = {self.base.config.vocab_size + number for number, _, _ in config.method.context_targets}
        if not virtual <= set(plan.lead_ids.flat):
            raise ConfigError("a context with labels must open data.prompt: <soft> before any field")
        return examples, plan

    def virtual(self, params: PromptParams) -> VirtualPrompt:
        """The soft prompt that the method's parameters stand for."""
        return self.config.method.materialize(self.base.module, self.base.params, params)

    def save(self, folder: Path, params: PromptParams, extra: Mapping[str, Any]) -> None:
        """Saves the soft prompt, or that of every task, with `extra`, what was trained, and the seed of its start."""
        virtual = self.virtual(params)
        if not processes.leads():
            return
        template = dataclasses.replace(self.template, task=None, tasks=())
        extra = {"trainable_parameters": self.config.method.trainable_count(params), **extra}
        for name, (method, own) in self.config.method.artifacts(virtual, params).items():
            start = {"seed": self.config.train.seed} if method == self.config.method else {}
            save_prompt(folder / name, self.base, method, own, template, extra={**start, **extra})

    def fitted(self, plan: BatchPlan, together: int = 1) -> tuple["Experiment", StepMemory]:
        """The same with its rematerialisation chosen, and an estimate of what a step holds on each device.

        together: how many prompts go through a step at once.
        """
        config, base = self.config, self.base

        def estimate(remat: Remat) -> StepMemory:
            return step_memory(
                base.config,
                plan_shape(plan, config.method.prefix_length),
                remat=remat,
                itemsize=base.dtype.itemsize,
                mesh=base.mesh,
                microbatches=config.train.microbatches,
            )

        def limit() -> int | None:
            whole = measure.memory_limit()
            return None if whole is None else whole // together

        remat = config.base.remat
        chosen = choose_remat(estimate, processes.from_first("memory limit", limit)) if remat == "auto" else remat
        base = dataclasses.replace(base, module=base.module.clone(remat=chosen))
        return dataclasses.replace(self, base=base), estimate(chosen)

    def window_note(self, examples: Sequence[Example]) -> str | None:
        """What to know where examples are longer than a sliding window: the soft prompt slides out of it too."""
        sizes, longest = self.base.config, max(example.length for example in examples)
        if not sizes.window_layers or longest + self.config.method.prefix_length <= sizes.window:
            return None
        return (
            f"note: {len(sizes.window_layers)} of {sizes.layers} layers see only the last {sizes.window} tokens, and"
            f" examples have up to {longest}; in those layers the soft prompt is out of sight beyond that"
        )

    def objective(self, plan: BatchPlan) -> Objective:
        """The static part of the loss."""
        loss = self.config.loss
        return Objective(
            over=loss.over or "vocabulary",
            choices=plan.choices,
            label_smoothing=loss.label_smoothing,
            microbatches=self.config.train.microbatches,
        )


def load_experiment(config: ExperimentConfig[Any], base: FrozenBase | None = None) -> Experiment:
    """Reads what a resolved config names. The data are read first: they are quick to be wrong.

    base: what the config's base, mesh and longest example give, where it is loaded already.

    Raises:
      ConfigError, DataError, CheckpointError: as the config, the data and the base have it.
    """
    data = config.data
    if config.base.path and config.method.needs_tokenizer:
        tokenizer = read_tokenizer(config.base.path, config.base.revision)
        config = resolve(dataclasses.replace(config, method=config.method.bind(tokenizer)))
    if not data.train or not data.prompt or not config.base.path:
        missing = [
            n
            for n, v in (("base.path", config.base.path), ("data.train", data.train), ("data.prompt", data.prompt))
            if not v
        ]
        raise ConfigError(f"{', '.join('--' + name for name in missing)} must be given")
    template = make_template(config)
    fields = (*template.fields, *([] if data.task is None else [data.task]))
    for hard_prompt in data.hard_prompt:
        template.bare(hard_prompt)

    def read(source: str | None, split: str) -> Records | None:
        if source is None:
            return None
        records = read_records(source, split=split, revision=data.revision, limit=data.limit)
        check_fields(records, fields, source)
        return records

    train = read(data.train, data.train_split)
    assert train is not None
    config = _with_names(config, train)
    template = make_template(config)
    validation, test = read(data.validation, data.validation_split), read(data.test, data.test_split)
    base = base or load_base(
        config.base.path,
        revision=config.base.revision,
        dtype=config.base.dtype,
        mesh=make_mesh(config.mesh),
        max_length=data.max_length,
        attention=config.base.attention,
        quantize=config.base.quantize,
    )
    positions = base.config.max_positions
    if data.max_length is not None and data.max_length > positions:
        raise ConfigError(f"data.max_length is {data.max_length}; {base.name} has {positions} positions")
    taken = config.method.token_count + config.method.prefix_length
    if taken >= (data.max_length or positions):
        raise ConfigError(f"{taken} virtual tokens leave no room in {data.max_length or positions} positions")
    return Experiment(config, base, template, train, validation, test)


def _with_names(config: ExperimentConfig[Any], train: Records) -> ExperimentConfig[Any]:
    """Names that the config leaves to the training data: of the tasks, and of a tagging head's tags."""
    data, method = config.data, config.method
    if data.task is not None and not method.tasks:
        with _located(data.train):
            tasks = tuple(sorted({field_text(record, data.task, number) for number, record in enumerate(train)}))
        return dataclasses.replace(config, method=dataclasses.replace(method, tasks=tasks))
    template = make_template(config)
    if template.head == "tagging" and not data.verbalizers:
        label = template.label_field or ""
        with _located(data.train):
            where = ((record, f"record {number}: the field {label!r}") for number, record in enumerate(train, 1))
            tags = sorted({tag for record, what in where for tag in words_of(record[label], what)})
        data = dataclasses.replace(data, verbalizers={tag: tag for tag in tags})
        return resolve(dataclasses.replace(config, data=data))
    return config


@dataclasses.dataclass(frozen=True)
class Questions:
    """One split as each side of the comparison reads it; hand-written prompts by their texts."""

    soft: EvaluationSet
    hard: Mapping[str, EvaluationSet]
    bare: EvaluationSet | None


def questions(experiment: Experiment) -> dict[str, Questions]:
    """Everything that `compare` asks, encoded before training, so that bad records do not wait for its end."""
    template = experiment.template
    splits = {"validation": experiment.validation, "test": experiment.test}
    return {
        split: Questions(
            soft=experiment.evaluation_set(records, template),
            hard={text: experiment.evaluation_set(records, template.bare(text)) for text in experiment.hard_prompts},
            # The model as it is does not tag words or point at spans.
            bare=None if template.reads is not None else experiment.evaluation_set(records, template.bare()),
        )
        for split, records in splits.items()
        if records is not None
    }


def compare(
    base: FrozenBase, asked: Mapping[str, Questions], virtual: VirtualPrompt
) -> dict[str, dict[str, Evaluation | None]]:
    """The soft prompt, the best hand-written prompt and no prompt, on the same records.

    The best hand-written prompt is the one that validation prefers; its text stands in its metrics. Without validation
    data, the first is taken. Answers are generated for the test split alone.
    """

    def ask(data: EvaluationSet, virtual: VirtualPrompt | None, split: str, **more: str) -> Evaluation:
        result = evaluate(base, data, virtual, generated=split == "test")
        return dataclasses.replace(result, metrics={**result.metrics, **more})

    chosen: str | None = None
    results: dict[str, dict[str, Evaluation | None]] = {}
    for split, own in asked.items():
        hard = {text: ask(data, None, split, text=text) for text, data in own.hard.items() if chosen in (None, text)}
        if chosen is None and hard:
            chosen = max(hard, key=lambda text: selection_score(hard[text].metrics))
        results[split] = {
            "soft_prompt": ask(own.soft, virtual, split),
            "hard_prompt": None if chosen is None else hard[chosen],
            "no_prompt": None if own.bare is None else ask(own.bare, None, split),
        }
    return results
