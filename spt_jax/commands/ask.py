"""`spt-jax generate | evaluate`: runs the base with one saved prompt, or with several in one batch."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from spt_jax.api.prompt import Prompt
from spt_jax.commands.saved import Saved
from spt_jax.data.encoder import Encoder, encoder_for
from spt_jax.data.requests import field_record, text_records
from spt_jax.data.sources import check_fields, read_records
from spt_jax.data.task import task_of
from spt_jax.data.templates import Template
from spt_jax.data.values import field_text
from spt_jax.errors import ConfigError
from spt_jax.evaluation.ensembles import evaluate_ensemble, score_together
from spt_jax.evaluation.evaluate import EvaluationConfig, EvaluationSet, evaluate, from_scores, make_evaluation_set
from spt_jax.evaluation.metrics import missing_note
from spt_jax.inference.generation import SamplingConfig, generate
from spt_jax.options import Lines, Pairs
from spt_jax.prompts import VirtualPrompt
from spt_jax.prompts.stacking import stack_prompts
from spt_jax.prompts.storage import load_prompt, read_prompt
from spt_jax.reports.report import comparison_table
from spt_jax.runtime.files import shown, write_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(Saved):
    """Answers texts with a soft prompt. A classifier prints the class, a tagging head a tag per word.

    Attributes:
      texts: one record each, for a template with one field.
      names: if `prompt` is a folder of prompts, the name of the prompt for each text; all run in the same batches.
      fields: a record as name=value pairs, for a template with several fields.
      max_new_tokens: most tokens of an answer.
      temperature: sampling temperature; 0 always takes the likeliest token.
      top_k: sample only from this number of likeliest tokens; 0 for all.
      top_p: sample only from the likeliest tokens with this total probability.
      stop: strings that end an answer.
      seed: seed for sampling.
    """

    texts: tyro.conf.Positional[tuple[str, ...]] = ()
    names: tuple[str, ...] = ()
    fields: Pairs = dataclasses.field(default_factory=dict)
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop: Lines = ()
    seed: int = 0

    def run(self) -> None:
        sampling = SamplingConfig(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            stop=self.stop,
            seed=self.seed,
        )
        if self.names:
            self.run_together(sampling)
            return
        template = read_prompt(self.prompt).template
        records = _records(template, self.texts, self.fields)
        base, saved = self.load()
        prompt = Prompt.of(saved, base)
        if task_of(template).generates:
            answers = prompt.generate(records, sampling)
        else:
            answers = [answer if isinstance(answer, str) else " ".join(answer) for answer in prompt.predict(records)]
        for answer in answers:
            print(answer)

    def run_together(self, sampling: SamplingConfig) -> None:
        """Answers each text under its own prompt, in the same batches."""
        if len(self.names) != len(self.texts):
            raise ConfigError(f"{len(self.names)} names for {len(self.texts)} texts; give one name per text")
        unique = list(dict.fromkeys(self.names))
        base, saved = self.load_all(self.named(unique))
        if len({bool(one.template.verbalizers) for one in saved}) > 1 or any(one.template.reads for one in saved):
            raise ConfigError("some of these prompts classify and others generate text; run them separately")
        encoders = [encoder_for(base, one.template, taken=one.virtual.prefix_length) for one in saved]
        index = [unique.index(name) for name in self.names]
        records = [_records(saved[i].template, [text], {})[0] for i, text in zip(index, self.texts, strict=True)]
        virtuals = [one.virtual for one in saved]
        if not saved[0].template.verbalizers:
            chosen = [encoders[i] for i in index]
            asked = zip(chosen, records, strict=True)
            prompts = [
                encoder.prompt_ids(record, room=min(self.max_new_tokens, encoder.max_length // 2))
                for encoder, record in asked
            ]
            samplings = [_ended(sampling, encoder) for encoder in chosen]
            for answer in generate(base, prompts, stack_prompts(virtuals), samplings, prompt_index=index):
                print(answer.text)
            return
        asked = [
            [encoder.with_any_label(r) for i, r in zip(index, records, strict=True) if i == number]
            for number, encoder in enumerate(encoders)
        ]
        sets = [make_evaluation_set(base, encoder, labelled) for encoder, labelled in zip(encoders, asked, strict=True)]
        scores = [iter(values) for values in score_together(base, sets, virtuals)]
        for i in index:
            print(list(saved[i].template.verbalizers)[int(next(scores[i]).argmax())])


def _ended(sampling: SamplingConfig, encoder: Encoder) -> SamplingConfig:
    """Returns the sampling settings with the end ids of this encoder's targets."""
    return dataclasses.replace(sampling, end_ids=encoder.end_ids)


def _records(template: Template, texts: Sequence[str], fields: Mapping[str, str]) -> list[dict[str, Any]]:
    if texts and fields:
        raise ConfigError("give texts or --fields, not both")
    if fields or not (texts or template.prompt_fields):
        return [field_record(template, fields)]
    if not texts and len(template.prompt_fields) == 1:
        raise ConfigError("give at least one text to answer")
    return text_records(template, texts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(Saved):
    """Scores a soft prompt, hand-written prompts and no prompt on a data set.

    Attributes:
      data: a .jsonl, .json, .csv, .tsv or .parquet file, or a hub data set id.
      split: split of a hub data set.
      hard_prompt: hand-written prompts to compare with.
      by: if `prompt` is a folder of prompts, the field with the prompt's name for each record; all run in the same
        batches.
      others: further prompts for the same task; each one is scored separately, and all together as an ensemble.
      combine: how the ensemble decides: by mean log-probability or by vote.
      batch_size: examples per batch.
      max_new_tokens: most tokens of a generated answer.
      output: a JSON file for all metrics.
    """

    data: str
    split: str = "test"
    hard_prompt: Lines = ()
    by: str | None = None
    others: tuple[Path, ...] = ()
    combine: Literal["mean", "vote"] = "mean"
    batch_size: int = 64
    max_new_tokens: int = 64
    output: Path | None = None

    def run(self) -> None:
        records = read_records(self.data, split=self.split)
        config = EvaluationConfig(batch_size=self.batch_size, max_new_tokens=self.max_new_tokens)
        if self.by is not None:
            self.run_together(records, config)
            return
        template = read_prompt(self.prompt).template
        check_fields(records, template.fields, self.data)
        if task_of(template).generates and (note := missing_note()):
            print(note)
        base, saved = self.load()

        def asked(template: Template, virtual: VirtualPrompt | None) -> EvaluationSet:
            taken = 0 if virtual is None else virtual.prefix_length
            return make_evaluation_set(base, encoder_for(base, template, taken=taken), records, config, taken=taken)

        def metrics(template: Template, virtual: VirtualPrompt | None) -> dict[str, Any]:
            return evaluate(base, asked(template, virtual), virtual).metrics

        results: dict[str, Any] = {"soft_prompt": metrics(template, saved.virtual)}
        if self.others:
            prompts = [saved, *(load_prompt(path, base, force=self.force) for path in self.others)]
            for path, other in zip(self.others, prompts[1:], strict=True):
                results[shown(path)] = metrics(other.template, other.virtual)
            sets = [asked(prompt.template, prompt.virtual) for prompt in prompts]
            together = evaluate_ensemble(base, sets, [prompt.virtual for prompt in prompts], self.combine)
            results[f"{self.combine} of {len(prompts)} prompts"] = together.metrics
        if task_of(template).bare:
            results["no_prompt"] = metrics(template.bare(), None)
        elif self.hard_prompt:
            raise ConfigError(f"--hard-prompt is not compatible with a {template.head} head")
        for text in self.hard_prompt:
            results[f"hard prompt {text!r}"] = metrics(template.bare(text), None)
        self.report(results)

    def report(self, results: Mapping[str, Any]) -> None:
        print(comparison_table({"test": results}))
        if self.output is not None:
            write_json(self.output, results)

    def run_together(self, records: Sequence[Mapping[str, Any]], config: EvaluationConfig) -> None:
        """Scores each record under the prompt that it names, in the same batches."""
        if self.others or self.hard_prompt:
            raise ConfigError("--by evaluates a folder of prompts; it is not compatible with --others or --hard-prompt")
        check_fields(records, [self.by or ""], self.data)
        by_prompt: dict[str, list[Mapping[str, Any]]] = {}
        for number, record in enumerate(records):
            by_prompt.setdefault(field_text(record, self.by or "", number), []).append(record)
        base, saved = self.load_all(self.named(list(by_prompt)))
        sets = []
        for one, asked in zip(saved, by_prompt.values(), strict=True):
            check_fields(asked, one.template.fields, self.data)
            encoder = encoder_for(base, one.template, taken=one.virtual.prefix_length)
            sets.append(make_evaluation_set(base, encoder, asked, config))
        scores = score_together(base, sets, [one.virtual for one in saved])
        results = [from_scores(asked, list(values)).metrics for asked, values in zip(sets, scores, strict=True)]
        self.report(dict(zip(by_prompt, results, strict=True)))
