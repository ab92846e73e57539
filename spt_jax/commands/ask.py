"""`spt-jax generate | evaluate`: runs the base with one saved prompt, or with several in one batch."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from spt_jax.api.prompt import Prompt
from spt_jax.commands.options import Evaluate, Generate
from spt_jax.commands.saved import load, load_all, named
from spt_jax.data.encoder import Encoder, encoder_for
from spt_jax.data.requests import field_record, text_records
from spt_jax.data.sources import check_fields, located, read_records
from spt_jax.data.task import task_of, works_bare
from spt_jax.data.templates import Template
from spt_jax.data.values import field_text
from spt_jax.errors import ConfigError
from spt_jax.evaluation.ensembles import evaluate_ensemble, score_together
from spt_jax.evaluation.evaluate import EvaluationConfig, EvaluationSet, evaluate, from_scores, make_evaluation_set
from spt_jax.evaluation.metrics import missing_note
from spt_jax.evaluation.rewards import Judge, make_rewards, reward_fields
from spt_jax.inference.generation import SamplingConfig, generate
from spt_jax.prompts import VirtualPrompt
from spt_jax.prompts.stacking import stack_prompts
from spt_jax.prompts.storage import load_prompt, read_prompt
from spt_jax.reports.report import comparison_table
from spt_jax.runtime.files import shown, write_json


def generate_answers(options: Generate) -> None:
    """Answers texts with a saved prompt."""
    sampling = SamplingConfig(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        stop=options.stop,
        seed=options.seed,
    )
    if options.names:
        _generate_together(options, sampling)
        return
    template = read_prompt(options.prompt).template
    records = _records(template, options.texts, options.fields)
    base, saved = load(options)
    prompt = Prompt.of(saved, base)
    if task_of(template).generates:
        answers = prompt.generate(records, sampling)
    else:
        answers = [answer if isinstance(answer, str) else " ".join(answer) for answer in prompt.predict(records)]
    for answer in answers:
        print(answer)


def _generate_together(options: Generate, sampling: SamplingConfig) -> None:
    """Answers each text under its own prompt, in the same batches."""
    if len(options.names) != len(options.texts):
        raise ConfigError(f"{len(options.names)} names for {len(options.texts)} texts; give one name per text")
    unique = list(dict.fromkeys(options.names))
    base, saved = load_all(options, named(options, unique))
    if len({bool(one.template.verbalizers) for one in saved}) > 1 or any(one.template.reads for one in saved):
        raise ConfigError("some of these prompts classify and others generate text; run them separately")
    encoders = [encoder_for(base, one.template, taken=one.virtual.prefix_length) for one in saved]
    index = [unique.index(name) for name in options.names]
    records = [_records(saved[i].template, [text], {})[0] for i, text in zip(index, options.texts, strict=True)]
    virtuals = [one.virtual for one in saved]
    if not saved[0].template.verbalizers:
        chosen = [encoders[i] for i in index]
        asked = zip(chosen, records, strict=True)
        prompts = [
            encoder.prompt_ids(record, room=min(options.max_new_tokens, encoder.max_length // 2))
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


def evaluate_prompt(options: Evaluate) -> None:
    """Scores a saved prompt on a data set, and prints the table."""
    records = read_records(options.data, split=options.split)
    config = EvaluationConfig(batch_size=options.batch_size, max_new_tokens=options.max_new_tokens)
    if options.by is not None:
        _evaluate_together(options, records, config)
        return
    template = read_prompt(options.prompt).template
    judge = _judge(options, template)
    check_fields(records, (*task_of(template).required_fields(template), *reward_fields(options.reward)), options.data)
    if task_of(template).generates and (note := missing_note()):
        print(note)
    base, saved = load(options)

    def asked(template: Template, virtual: VirtualPrompt | None) -> EvaluationSet:
        taken = 0 if virtual is None else virtual.prefix_length
        with located(options.data):
            return make_evaluation_set(
                base, encoder_for(base, template, taken=taken), records, config, taken=taken, judge=judge
            )

    def metrics(template: Template, virtual: VirtualPrompt | None) -> dict[str, Any]:
        return evaluate(base, asked(template, virtual), virtual).metrics

    results: dict[str, Any] = {"soft_prompt": metrics(template, saved.virtual)}
    if options.others:
        prompts = [saved, *(load_prompt(path, base, force=options.force) for path in options.others)]
        for path, other in zip(options.others, prompts[1:], strict=True):
            results[shown(path)] = metrics(other.template, other.virtual)
        sets = [asked(prompt.template, prompt.virtual) for prompt in prompts]
        together = evaluate_ensemble(base, sets, [prompt.virtual for prompt in prompts], options.combine)
        results[f"{options.combine} of {len(prompts)} prompts"] = together.metrics
    if works_bare(template, base):
        results["no_prompt"] = metrics(template.bare(), None)
    elif options.hard_prompt:
        raise ConfigError(f"--hard-prompt is not compatible with a {template.head} head on this base")
    for text in options.hard_prompt:
        results[f"hard prompt {text!r}"] = metrics(template.bare(text), None)
    _report(options, results)


def _report(options: Evaluate, results: Mapping[str, Any]) -> None:
    print(comparison_table({"test": results}))
    if options.output is not None:
        write_json(options.output, results)


def _judge(options: Evaluate, template: Template) -> Judge | None:
    """Returns the reward functions of the options, for a prompt of the task rewards."""
    judged = task_of(template).judged
    if judged != bool(options.reward):
        raise ConfigError("--reward and a prompt of the task rewards need each other: it judges the prompt's answers")
    if not judged:
        return None
    return Judge(make_rewards(options.reward), max_new_tokens=options.max_new_tokens, temperature=options.temperature)


def _evaluate_together(options: Evaluate, records: Sequence[Mapping[str, Any]], config: EvaluationConfig) -> None:
    """Scores each record under the prompt that it names, in the same batches."""
    if options.others or options.hard_prompt:
        raise ConfigError("--by evaluates a folder of prompts; it is not compatible with --others or --hard-prompt")
    check_fields(records, [options.by or ""], options.data)
    by_prompt: dict[str, list[Mapping[str, Any]]] = {}
    for number, record in enumerate(records):
        by_prompt.setdefault(field_text(record, options.by or "", number), []).append(record)
    base, saved = load_all(options, named(options, list(by_prompt)))
    sets = []
    for one, asked in zip(saved, by_prompt.values(), strict=True):
        check_fields(asked, task_of(one.template).required_fields(one.template), options.data)
        encoder = encoder_for(base, one.template, taken=one.virtual.prefix_length)
        sets.append(make_evaluation_set(base, encoder, asked, config))
    scores = score_together(base, sets, [one.virtual for one in saved])
    results = [from_scores(asked, list(values)).metrics for asked, values in zip(sets, scores, strict=True)]
    _report(options, dict(zip(by_prompt, results, strict=True)))
