"""From a config to everything that a run needs, and the comparison at its end."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spt_jax.bases.base import FrozenBase, load_base, read_tokenizer
from spt_jax.data.batches import BatchPlan, multiples, plan_batches
from spt_jax.data.encoder import Encoder
from spt_jax.data.examples import Example, digest
from spt_jax.data.reading import words_of
from spt_jax.data.sources import check_fields, read_records
from spt_jax.data.templates import Template
from spt_jax.data.values import field_text
from spt_jax.errors import ConfigError, DataError
from spt_jax.evaluation.evaluate import Evaluation, EvaluationSet, evaluate, make_evaluation_set, selection_score
from spt_jax.experiment.config import ExperimentConfig, make_template, resolve
from spt_jax.models.decoder import Remat
from spt_jax.prompts import PromptParams, VirtualPrompt
from spt_jax.prompts.storage import save_prompt
from spt_jax.runtime import measure, processes
from spt_jax.runtime.sharding import make_mesh, row_shards
from spt_jax.training.cost import StepMemory, choose_remat, plan_shape, step_memory
from spt_jax.training.step import Objective

Records = Sequence[Mapping[str, Any]]
MAX_REPEATS = 100  # of a record in one batch: more would be a batch size that nobody means


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
        if config.train.batch_size > MAX_REPEATS * len(self.train):
            raise ConfigError(
                f"train.batch_size is {config.train.batch_size}, and {config.data.train} has {len(self.train)} records,"
                f" each of which may be in a batch {MAX_REPEATS} times at most; {len(self.train)} takes each once"
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
            ).of_prompts(together)

        limit = processes.from_first("memory limit", measure.memory_limit)
        remat = config.base.remat
        chosen = choose_remat(estimate, limit) if remat == "auto" else remat
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
class EvaluationSets:
    """One split as each side of the comparison reads it; hand-written prompts by their texts."""

    soft: EvaluationSet
    hard: Mapping[str, EvaluationSet]
    bare: EvaluationSet | None


def input_digests(
    read: Sequence[tuple[Experiment, Mapping[str, Sequence[Example]]]],
) -> dict[str, dict[str, Any]]:
    """What tells whether runs read the same data and base.

    Args:
      read: experiments with the examples that each encodes from "train", "validation" and "test".

    Returns:
      Under "data", by source, the sorted digests of its encoded examples; under "base", by path, its fingerprint.
    """
    data: dict[str, set[str]] = {}
    bases: dict[str, Any] = {}
    known: dict[int, str] = {}  # trials of a sweep share their examples
    for experiment, by_split in read:
        for split, examples in by_split.items():
            known[id(examples)] = known.get(id(examples)) or digest(examples)
            data.setdefault(getattr(experiment.config.data, split), set()).add(known[id(examples)])
        bases[experiment.config.base.path] = dataclasses.asdict(experiment.base.fingerprint)
    return {"data": {source: sorted(own) for source, own in data.items()}, "base": bases}


def evaluation_sets(experiment: Experiment) -> dict[str, EvaluationSets]:
    """Everything that `compare` asks, encoded before training, so that bad records do not wait for its end."""
    template = experiment.template
    splits = {"validation": experiment.validation, "test": experiment.test}
    return {
        split: EvaluationSets(
            soft=experiment.evaluation_set(records, template),
            hard={text: experiment.evaluation_set(records, template.bare(text)) for text in experiment.hard_prompts},
            # The model as it is does not tag words or point at spans.
            bare=None if template.reads is not None else experiment.evaluation_set(records, template.bare()),
        )
        for split, records in splits.items()
        if records is not None
    }


def compare(
    base: FrozenBase, sets: Mapping[str, EvaluationSets], virtual: VirtualPrompt
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
    for split, own in sets.items():
        hard = {text: ask(data, None, split, text=text) for text, data in own.hard.items() if chosen in (None, text)}
        if chosen is None and hard:
            chosen = max(hard, key=lambda text: selection_score(hard[text].metrics))
        results[split] = {
            "soft_prompt": ask(own.soft, virtual, split),
            "hard_prompt": None if chosen is None else hard[chosen],
            "no_prompt": None if own.bare is None else ask(own.bare, None, split),
        }
    return results
