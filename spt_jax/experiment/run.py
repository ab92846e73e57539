"""Loads the base and data of a config."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from spt_jax.bases.base import FrozenBase, check_base, load_base, read_tokenizer
from spt_jax.data.batches import BatchPlan, multiples, plan_batches
from spt_jax.data.encoded import encode_records
from spt_jax.data.encoder import Encoder, encoder_for
from spt_jax.data.examples import CompactExamples, Example, digest
from spt_jax.data.sequences import packing_saves
from spt_jax.data.sources import check_fields, located, read_records
from spt_jax.data.task import PairCriterion, task_of
from spt_jax.data.templates import Template
from spt_jax.data.values import field_text
from spt_jax.errors import ConfigError
from spt_jax.evaluation.evaluate import EvaluationSet, make_evaluation_set, scores_after_text
from spt_jax.evaluation.rewards import Judge, make_rewards, reward_fields
from spt_jax.experiment.config import ExperimentConfig, make_template, resolve
from spt_jax.experiment.distillation import check_answers, distillation_facts, with_answers
from spt_jax.experiment.self_study import Study, check_study
from spt_jax.experiment.shared_studies import SharedStudies, study_of
from spt_jax.models.stacks import Remat
from spt_jax.prompts import Method, PromptParams, VirtualPrompt
from spt_jax.prompts.method import check_method
from spt_jax.prompts.storage import save_prompt
from spt_jax.runtime import measure, processes
from spt_jax.runtime.hf_library import keep_torch
from spt_jax.runtime.sharding import make_mesh, row_shards
from spt_jax.runtime.waits import spoken
from spt_jax.training.cost import StepMemory, choose_remat, plan_shape
from spt_jax.training.encoder_decoder_memory import step_memory_of
from spt_jax.training.objectives import ClassDistillation, Distillation, Grpo, Objective
from spt_jax.training.optimizers import resolve_optimizer
from spt_jax.training.rollouts import Questions

Records = Sequence[Mapping[str, Any]]
STUDY = "self-study"  # the source of records that the base writes itself
MEASURED = 64  # records of which one of middle length is asked to time first tokens
MAX_REPEATS = 100  # of a record in one batch; more is surely a mistake in the batch size


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A prompt to save: its method, the prompt as the model sees it, the template, and JSON to store with them."""

    method: Method
    virtual: VirtualPrompt
    template: Template
    extra: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A config in which every field is resolved, with its base loaded and its records read.

    `study` has the records that the base wrote itself, which are also in `train` and `validation`.
    """

    config: ExperimentConfig[Any]
    base: FrozenBase
    template: Template
    train: Records
    validation: Records | None
    test: Records | None
    study: Study | None = None

    @property
    def hard_prompts(self) -> tuple[str, ...]:
        """The hand-written prompts; only the first one if there is no validation data to choose by."""
        hard_prompts = self.config.data.hard_prompt
        return hard_prompts if self.validation is not None else hard_prompts[:1]

    def encoder(self, template: Template) -> Encoder:
        """Returns an encoder for a template, with the run's maximum length."""
        taken, max_length = self.config.method.prefix_length, self.config.data.max_length
        return encoder_for(self.base, template, taken=taken, max_length=max_length)

    @functools.cached_property
    def text_ids(self) -> Int[np.ndarray, " P"] | None:
        """The ids of the text that the prompt learns by distillation; None for another objective."""
        objective = distillation_of(self.config)
        return None if objective is None else objective.text_ids(self.base)

    @functools.cached_property
    def judge(self) -> Judge | None:
        """The reward functions of the run; None for a task without any."""
        task, objective = self.config.task, self.config.loss.objective(2)
        if not isinstance(objective, Grpo):
            return None
        rewards = make_rewards(task.reward, task.reward_weights)
        return Judge(rewards, task.reward_failures, objective.max_new_tokens, objective.temperature)

    @property
    def questions(self) -> Questions | None:
        """What sampled answers to the training records are judged by; None for a task without reward functions."""
        judge = self.judge
        return None if judge is None else Questions(self.train, judge, self.encoder(self.template).end_ids)

    def with_answers(self) -> "Experiment":
        """Returns the experiment with answers of the base after the text for records without a target."""
        objective, text, data = distillation_of(self.config), self.text_ids, self.config.data
        assert objective is not None and text is not None
        encoder, size = self.encoder(self.template), self.config.evaluation.batch_size

        def answered(records: Records | None, source: str | None) -> Records | None:
            if records is None:
                return None
            with located(source), spoken(f"generating answers to {source}"):
                return with_answers(self.base, encoder, objective, text, records, size)

        return dataclasses.replace(
            self,
            train=answered(self.train, data.train) or (),
            validation=answered(self.validation, data.validation),
            test=answered(self.test, data.test),
        )

    def with_study(self, saved: Path | SharedStudies | None) -> "Experiment":
        """Returns the experiment with the records of the self-study, from a file if it exists.

        Args:
          saved: the file of an earlier part of the run, or the studies of a sweep; None if there are none.
        """
        objective, text, encoder = distillation_of(self.config), self.text_ids, self.encoder(self.template)
        assert objective is not None and text is not None
        study = study_of(saved, self.base, encoder, objective, text, self.config.evaluation.batch_size)
        validation = self.validation if self.validation is not None else study.validation or None
        return dataclasses.replace(self, train=[*self.train, *study.train], validation=validation, study=study)

    def distilled(self, virtual: VirtualPrompt) -> dict[str, Any] | None:
        """Returns what the soft prompt saves compared with the text of a distillation; None for another objective."""
        if self.text_ids is None:
            return None
        records = (self.test or self.validation or self.train)[:MEASURED]
        return distillation_facts(self.base, self.encoder(self.template), self.text_ids, virtual, records)

    def evaluation_set(self, records: Records, template: Template) -> EvaluationSet:
        """Returns the records encoded with a template."""
        data, objective = self.config.data, self.config.loss.objective(2)
        with located(data.validation if records is self.validation else data.test):
            found = make_evaluation_set(
                self.base,
                self.encoder(template),
                records,
                self.config.evaluation,
                packing=data.packing,
                taken=self.config.method.prefix_length,
                reference=template == self.template,
                criterion=objective if isinstance(objective, PairCriterion) else None,
                text=self.text_ids if template in (self.template, self.template.bare()) else None,
                judge=self.judge,
            )
            text, examples = found.text, found.examples
            if text is None:
                return found
            if self.template.continues and template != self.template:
                examples = encode_records(self.encoder(self.template), records)
                found = dataclasses.replace(found, text_examples=examples)
            if not isinstance(objective, ClassDistillation):
                return found
            scores = scores_after_text(self.base, text, examples, self.config.evaluation.batch_size)
            return dataclasses.replace(found, text_scores=scores)

    def training_set(self) -> tuple[Sequence[Example], BatchPlan]:
        """Returns the encoded training examples and the shapes of their batches.

        Raises:
          ConfigError: the batch size does not fit the mesh or the number of records, or the labels of a context do not
            come before all fields.
          DataError: a record cannot be encoded.
        """
        config = self.config
        options = multiples(self.base.mesh, config.train.microbatches)
        if config.train.batch_size < options["multiple"]:
            raise ConfigError(
                f"train.batch_size={config.train.batch_size} in {config.train.microbatches} microbatches does not give"
                f" a row to each of the {row_shards(self.base.mesh)} devices along mesh.data and mesh.fsdp;"
                f" use at least {options['multiple']}, or a smaller mesh"
            )
        if config.train.batch_size > MAX_REPEATS * len(self.train):
            raise ConfigError(
                f"train.batch_size is {config.train.batch_size}, but {config.data.train} has {len(self.train)} records,"
                f" and a batch may have each at most {MAX_REPEATS} times; {len(self.train)} would take each once"
            )
        encoder = self.encoder(self.template)
        with located(config.data.train):
            examples: Sequence[Example] = encode_records(encoder, self.train)
        if not config.loss.uses_choices:
            examples = CompactExamples.of(example.as_target() for example in examples)
        examples = config.loss.objective(2).planned(examples)
        plan = plan_batches(
            examples,
            lead=encoder.leads(examples),
            batch_size=config.train.batch_size,
            packing=config.data.packing and packing_saves(examples, self.base.layout),
            **options,
            max_length=self.base.layout.max_positions,
        )
        auxiliary = config.method.auxiliary()
        if auxiliary is not None:
            auxiliary.check(plan.lead_ids, self.base.layout.vocab_size)
        return examples, plan

    def virtual(self, params: PromptParams) -> VirtualPrompt:
        """Materializes the soft prompt from the method's parameters."""
        return self.config.method.materialize(jax.tree.map(jnp.asarray, params), self.base.model)

    def artifacts(self, params: PromptParams, extra: Mapping[str, Any]) -> dict[str, Artifact]:
        """Returns the soft prompt under "", or one per task under its name.

        Args:
          params: the method's parameters.
          extra: JSON to store with the prompts, in addition to the number of trained parameters and the seed.
        """
        template = dataclasses.replace(self.template, task=None, tasks=())
        extra = {"trainable_parameters": self.config.method.trainable_count(params), **extra}
        found = {}
        for name, (method, prompt) in self.config.method.artifacts(self.virtual(params), params).items():
            start = {"seed": self.config.train.seed} if method == self.config.method else {}
            found[name] = Artifact(method, prompt, template, {**start, **extra})
        return found

    def save(self, folder: Path, params: PromptParams, extra: Mapping[str, Any]) -> None:
        """Saves `artifacts`, each in the subdirectory of its name."""
        artifacts = self.artifacts(params, extra)
        if not processes.leads():
            return
        for name, own in artifacts.items():
            save_prompt(folder / name, self.base, own.method, own.virtual, own.template, extra=own.extra)

    def fitted(self, plan: BatchPlan, together: int = 1) -> tuple["Experiment", StepMemory | None]:
        """Chooses the rematerialization.

        Args:
          plan: the shapes of the batches.
          together: the number of prompts that are trained in one step.

        Returns:
          The experiment with the rematerialization set, and the estimated memory of a step on each device; None for a
          base from `from_flax`, where "auto" leaves the base as it is.
        """
        config, base = self.config, self.base
        memory_of = step_memory_of(base.model)
        if memory_of is None:
            return dataclasses.replace(self, base=base.with_remat(config.base.remat)), None

        edits = config.method.spec(base.layout).edits
        rank = 0 if edits is None else edits.bias.shape[-1]

        def estimate(remat: Remat) -> StepMemory:
            return memory_of(
                plan_shape(plan, config.method.prefix_length, rank),
                remat=remat,
                itemsize=base.dtype.itemsize,
                mesh=base.mesh,
                microbatches=config.train.microbatches,
                params=base.params,
            ).of_prompts(together)

        limit = processes.from_first("memory limit", measure.memory_limit)
        remat = config.base.remat
        chosen = choose_remat(estimate, limit) if remat == "auto" else remat
        return dataclasses.replace(self, base=base.with_remat(chosen)), estimate(chosen)

    def window_note(self, examples: Sequence[Example]) -> str | None:
        """Returns a note if examples are longer than a sliding window, since the soft prompt then leaves the window."""
        if not self.base.layout.windowed:
            return None
        model: Any = self.base.model
        sizes, longest, method = model.config, max(example.length for example in examples), self.config.method
        leaves = (method.token_count or method.prefix_length) and not method.pins
        if not sizes.window_layers or not leaves or longest + method.prefix_length <= sizes.window:
            return None
        near = "last" if self.base.is_decoder else "nearest"
        return (
            f"note: {len(sizes.window_layers)} of {sizes.layers} layers see only the {near} {sizes.window} tokens, and"
            f" examples have up to {longest}; in those layers, later tokens do not attend to the soft prompt;"
            " with --method.pin-prefix they do"
        )

    def objective(self, plan: BatchPlan) -> Objective:
        """Returns the objective for batches of these shapes."""
        return self.config.loss.objective(plan.choices)


def distillation_of(config: ExperimentConfig[Any]) -> Distillation | None:
    """Returns the objective if it is a distillation."""
    objective = config.loss.objective(2)
    return objective if isinstance(objective, Distillation) else None


def load_experiment(
    config: ExperimentConfig[Any],
    base: FrozenBase | None = None,
    records: Mapping[str, Records] | None = None,
    study: Path | SharedStudies | None = None,
) -> Experiment:
    """Reads the data and the base of a resolved config; the weights last, because errors elsewhere show sooner.

    Args:
      config: the resolved config.
      base: the base, if it is already loaded with the config's base, mesh and maximum length.
      records: the records of "train" and, if there are any, "validation" and "test", in place of those of the config's
        sources, which are then only names in error messages.
      study: the file of the questions that an earlier part of the run wrote about the text of a distillation, or those
        that trials share.

    Raises:
      ConfigError, DataError, CheckpointError: the config, the data or the base is invalid.
    """
    config = _with_study_sources(config)
    data = config.data
    if config.base.path and config.method.needs_tokenizer:
        tokenizer = base.tokenizer if base is not None else read_tokenizer(config.base.path, config.base.revision)
        config = resolve(dataclasses.replace(config, method=config.method.bind(tokenizer)))
    if not data.train or not data.prompt or not config.base.path:
        missing = [
            n
            for n, v in (("base.path", config.base.path), ("data.train", data.train), ("data.prompt", data.prompt))
            if not v
        ]
        raise ConfigError(f"{', '.join('--' + name for name in missing)} must be given")
    if config.task.reward:
        keep_torch()  # a reward function may use a model of transformers
    if base is None:
        check_base(config.base.path, config.base.revision)
    template = make_template(config)
    distillation = distillation_of(config)
    fields = task_of(template).required_fields(template)
    if distillation is not None and distillation.study:
        check_study(template)
    if answers := distillation is not None and distillation.answer_tokens > 0:
        check_answers(template)
        fields = template.prompt_fields
    fields = (*fields, *([] if data.task is None else [data.task]), *reward_fields(config.task.reward))
    if config.task.reward:
        make_rewards(config.task.reward, config.task.reward_weights)  # errors in them show before the base is loaded
    for hard_prompt in data.hard_prompt:
        template.bare(hard_prompt)

    def read(name: str, source: str | None, split: str) -> Records | None:
        if source is None:
            return None
        if source == STUDY:
            return [] if name == "train" else None
        if records is not None:
            found = records[name]
        else:
            found = read_records(source, split=split, revision=data.revision, limit=data.limit)
        check_fields(found, fields, source)
        return found

    train = read("train", data.train, data.train_split)
    assert train is not None
    config = _with_names(config, train)
    template = make_template(config)
    validation = read("validation", data.validation, data.validation_split)
    test = read("test", data.test, data.test_split)
    base = base or load_base(
        config.base.path,
        revision=config.base.revision,
        dtype=config.base.dtype,
        mesh=make_mesh(config.mesh),
        max_length=data.max_length,
        attention=config.base.attention,
        quantize=config.base.quantize,
    )
    positions = base.layout.max_positions
    if data.max_length is not None and data.max_length > positions:
        raise ConfigError(f"data.max_length is {data.max_length}, but {base.name} has {positions} positions")
    check_method(config.method, base)
    taken = config.method.token_count + config.method.prefix_length
    if taken >= (data.max_length or positions):
        raise ConfigError(f"{taken} virtual tokens leave no room in {data.max_length or positions} positions")
    optimizer = resolve_optimizer(config.optimizer, base.family, config.method.recipe_for(base.layout))
    config = dataclasses.replace(config, optimizer=optimizer)
    experiment = Experiment(config, base, template, train, validation, test)
    if answers:
        experiment = experiment.with_answers()
    return experiment.with_study(study) if distillation is not None and distillation.study else experiment


def _with_study_sources(config: ExperimentConfig[Any]) -> ExperimentConfig[Any]:
    """Names the self-study as the source of the records that only it gives."""
    distillation, data = distillation_of(config), config.data
    if distillation is None or not distillation.study:
        return config
    if distillation.study_validation and data.validation not in (None, STUDY):
        raise ConfigError("loss.study_validation and data.validation both give validation records; set one of them")
    validation = data.validation or (STUDY if distillation.study_validation else None)
    return dataclasses.replace(config, data=dataclasses.replace(data, train=data.train or STUDY, validation=validation))


def _with_names(config: ExperimentConfig[Any], train: Records) -> ExperimentConfig[Any]:
    """Fills in names that the config takes from the training data: tasks, and classes such as tags."""
    data, method = config.data, config.method
    if data.task is not None and not method.tasks:
        with located(data.train):
            tasks = tuple(sorted({field_text(record, data.task, number) for number, record in enumerate(train)}))
        return dataclasses.replace(config, method=dataclasses.replace(method, tasks=tasks))
    template = make_template(config)
    with located(data.train):
        classes = task_of(template).classes(template, train)
    if classes == data.verbalizers:
        return config
    return resolve(dataclasses.replace(config, data=dataclasses.replace(data, verbalizers=classes)))


def input_digests(
    read: Sequence[tuple[Experiment, Mapping[str, Sequence[Example]]]],
) -> dict[str, dict[str, Any]]:
    """Returns digests that show whether two runs have the same data and base.

    Args:
      read: experiments, each with its encoded examples of "train", "validation" and "test".

    Returns:
      Under "data", for each source, the sorted digests of its encoded examples; under "base", for each path, the
      fingerprint.
    """
    data: dict[str, set[str]] = {}
    bases: dict[str, Any] = {}
    known: dict[int, str] = {}  # trials of a sweep share their examples
    for experiment, by_split in read:
        for split, examples in by_split.items():
            known[id(examples)] = known.get(id(examples)) or digest(examples)
            data.setdefault(getattr(experiment.config.data, split), set()).add(known[id(examples)])
        if experiment.text_ids is not None:
            objective = distillation_of(experiment.config)
            assert objective is not None
            data.setdefault(objective.text, set()).add(hashlib.sha256(experiment.text_ids.tobytes()).hexdigest())
        bases[experiment.config.base.path] = experiment.base.fingerprint.as_json()
    return {"data": {source: sorted(digests) for source, digests in data.items()}, "base": bases}
