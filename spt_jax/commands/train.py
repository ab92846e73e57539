"""`spt-jax train`: trains a soft prompt on a frozen base, compares it with hand-written prompts, and saves it.

    spt-jax train quickstart [--field value ...] [--resume | --overwrite] [--dry-run]

Exit codes: 0 done, 1 the run failed, 2 the command line or the config is invalid, 130 or 143 stopped by a signal after
saving.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from spt_jax.bases.base import describe_base
from spt_jax.data.batches import pack, place_batch
from spt_jax.data.preview import describe
from spt_jax.data.task import Evaluation
from spt_jax.evaluation import metrics
from spt_jax.evaluation.classes import class_report
from spt_jax.evaluation.inspection import NEAREST, nearest_words
from spt_jax.evaluation.predictions import Prediction, compared, predictions_jsonl, with_fields
from spt_jax.experiment.command_line import Command, config_json, first_command, parse_train
from spt_jax.experiment.comparison import compare, evaluation_sets
from spt_jax.experiment.config import resolve
from spt_jax.experiment.run import Experiment, input_digests, load_experiment
from spt_jax.experiment.self_study import STUDY_FILE, write_study
from spt_jax.experiment.shipped import config_path
from spt_jax.experiment.training import Prepared, begin, claimed, prepare, tune
from spt_jax.experiment.workdir import check_workdir, in_workdir, input_paths
from spt_jax.interop import peft_note
from spt_jax.reports.distilled import distillation_table, savings_sentence
from spt_jax.reports.html import write_report
from spt_jax.reports.plots import can_draw, missing_note, plot_curves
from spt_jax.reports.report import comparison_table, reference_lines
from spt_jax.reports.tables import text_table
from spt_jax.runtime import measure, processes, signals
from spt_jax.runtime.files import shown, write_json, write_text
from spt_jax.runtime.mirror import check_shared
from spt_jax.runtime.provenance import provenance
from spt_jax.runtime.waits import spoken
from spt_jax.training.logs import MetricsLog, NoLog, RunInfo, check_log, publish, read_metrics
from spt_jax.training.loop import Best
from spt_jax.training.objectives import prepare_examples
from spt_jax.training.single import Outcome
from spt_jax.training.step import init_state, make_train_step

PROGRAM = "spt-jax train"


def main(argv: Sequence[str], program: str = PROGRAM) -> None:
    """Runs the job from the command line to the results.

    Args:
      argv: the config, then flags.
      program: what the words were typed after, for messages and `results.json`.

    Raises:
      SptError: the command line, the data or the base is invalid, or training fails.
      Stopped: after SIGTERM or SIGINT, with the state saved.
    """
    command = parse_train(argv, program)
    check_shared(command.workdir, command.processes.several)
    with processes.joined(command.processes), in_workdir(command) as placed:
        run(placed, argv, program)


def run(command: Command[Any], argv: Sequence[str], program: str) -> None:
    """Runs a parsed command in the processes of its run."""
    measure.keep_compiled_programs(command.compilation_cache)
    compile_seconds = measure.compile_clock()
    processes.check_agreement(
        "command", lambda: {**config_json(command), "processes": None, "versions": measure.versions()}
    )
    workdir, mode = command.workdir, {"resume": command.resumes, "overwrite": command.overwrite}
    reads = input_paths(command.config, config_path(argv[0]))
    if not command.dry_run and processes.leads():
        check_workdir(workdir, **mode, reads=reads)
    check_log(command.config.log)
    if not command.dry_run and (note := missing_note("curves.png")):
        print(note)
    written = workdir / STUDY_FILE if command.resumes else None
    with spoken("loading the base and the records"):
        experiment = load_experiment(resolve(command.config), study=written)
    config, base = experiment.config, experiment.base
    with spoken("encoding the training records"):
        prepared = prepare(experiment)
    experiment, examples = prepared.experiment, prepared.examples
    print(describe_base(base))
    note = experiment.window_note(examples)
    if note is not None:
        print(note)
    print(peft_note(base, config.method, experiment.template))
    base = experiment.base
    memory = prepared.memory or "unknown"
    print(f"estimated memory of a step per device: {memory}; rematerialization: {base.remat}")
    if command.dry_run:
        dry_run(prepared)
        return
    start = begin(prepared)
    with spoken("encoding the other records"):
        asked = evaluation_sets(experiment)
    if "test" in asked and asked["test"].soft.prompts and (note := metrics.missing_note()):
        print(note)
    with spoken("hashing the base and the records"):
        digests = input_digests(
            [(experiment, {"train": examples, **{name: sets.soft.examples for name, sets in asked.items()}})]
        )
    processes.check_agreement("inputs", lambda: {**digests, "dtype": str(base.dtype), "attention": base.attention})

    def save_best(best: Best) -> None:
        extra = {"step": best.step, "validation": best.metrics, "command": first_command(argv)}
        experiment.save(workdir / "prompt", best.params, extra)

    def open_log(step: int) -> MetricsLog:
        if not processes.leads():
            return NoLog()
        return MetricsLog(workdir, config.log, from_step=step, run_config=prepared.settings)

    with claimed(workdir, prepared, digests, **mode, reads=reads), signals.advising("Continue with --resume"):
        if experiment.study is not None and processes.leads():
            write_study(workdir / STUDY_FILE, experiment.study)
        outcome = tune(
            prepared,
            asked["validation"].soft if "validation" in asked else None,
            workdir=workdir,
            log=open_log,
            save_best=save_best,
            resume=command.resumes,
            resume_from=command.resume_from,
            profile=command.profile if processes.leads() else 0,
            start=start,
        )
        signals.reclaim()
        virtual = experiment.virtual(outcome.best.params)
        results = compare(base, asked, virtual, outcome.best.metrics)
        words = nearest_words(base, virtual, NEAREST)
        distilled = experiment.distilled(virtual)
        if processes.leads():
            facts = {
                **({} if distilled is None else {"distillation": distilled}),
                "nearest_tokens": words,
                "compile_seconds": round(compile_seconds(), 2),
                "data": digests["data"],
                "command": shlex.join([*program.split(), *argv]),
            }
            with spoken("writing the results"):
                finish(experiment, outcome, results, workdir, facts)
            metrics_of = {split: {k: v.metrics for k, v in by.items() if v} for split, by in results.items()}
            publish(workdir, config.log, info=RunInfo(prepared.settings), results=metrics_of, prompt=workdir / "prompt")


def dry_run(prepared: Prepared) -> None:
    """Prints the training examples and the memory that a step needs."""
    experiment, examples, plan, optimizer = prepared.experiment, prepared.examples, prepared.plan, prepared.optimizer
    base, config = experiment.base, experiment.config
    print(describe(examples, plan, config.train.batch_size, base.tokenizer, base.layout.vocab_size))
    state = init_state(jax.random.key(config.train.seed), base, config.method, optimizer)
    objective = experiment.objective(plan)
    first = prepare_examples(objective, base, examples[: config.train.batch_size])
    batch = place_batch(pack(first, plan), base.mesh)
    step = make_train_step(base, config.method, optimizer, objective, config.train.microbatches)
    print(measure.planned_memory(step, state, batch, base.params))


def finish(
    experiment: Experiment,
    outcome: Outcome,
    results: Mapping[str, Mapping[str, Evaluation | None]],
    workdir: Path,
    facts: Mapping[str, Any],
) -> None:
    """Prints the comparison, and writes predictions.jsonl, curves.png, results.json and, last, report.html."""
    scores = {split: {k: v and v.metrics for k, v in by.items()} for split, by in results.items()}
    prompt_bytes = sum(file.stat().st_size for file in (workdir / "prompt").rglob("prompt.*"))
    answered = {name: result.predictions for name, result in results.get("test", {}).items() if result is not None}
    if answered:
        fields = experiment.template.prompt_fields
        answered = {name: with_fields(own, experiment.test or (), fields) for name, own in answered.items()}
    saved = facts.get("distillation")
    write_text(workdir / "predictions.jsonl", predictions_jsonl(answered))
    if can_draw():
        references = reference_lines(scores.get("validation", {}))
        lines = read_metrics(workdir / "metrics.jsonl")
        plot_curves(workdir / "curves.png", lines, references, title=workdir.name, chosen=outcome.best.step)
    write_json(
        workdir / "results.json",
        {
            **scores,
            **details(answered, list(experiment.template.verbalizers)),
            "steps": outcome.steps,
            "best_step": outcome.best.step,
            "trainable_parameters": experiment.config.method.trainable_count(outcome.best.params),
            "base_parameters": experiment.base.parameter_count,
            "base_dtype": str(experiment.base.dtype),
            "attention": experiment.base.attention,
            "prompt_bytes": prompt_bytes,
            "train_seconds": round(outcome.train_seconds, 2),
            "examples_per_second": round(outcome.rates.examples, 2),
            "tokens_per_second": round(outcome.rates.tokens, 1),
            "flops_utilization": round(outcome.rates.utilization, 4),
            "peak_memory_bytes": measure.peak_memory_bytes(),
            "device": measure.device_name(),
            "versions": measure.versions(),
            **facts,
            **provenance(),
        },
    )
    write_report(workdir)
    print(comparison_table(scores))
    if table := distillation_table(saved, scores.get("test", scores.get("validation", {}))):
        print(text_table(table.columns, table.rows))
        print(savings_sentence(saved or {}))
    files = ["report.html", "results.json", *(["curves.png"] if can_draw() else []), "metrics.jsonl"]
    where = shown(workdir)
    print(f"{where}/prompt: the soft prompt, {prompt_bytes:,} bytes. {where}: {', '.join(files)}")


def details(answered: Mapping[str, Sequence[Prediction]], classes: Sequence[str]) -> dict[str, Any]:
    """Returns the entries of `results.json` that are computed from the test predictions.

    Returns:
      "classes", for each prompt its `class_report`, and "soft_against_written", the soft prompt's `advantage` over the
      best hand-written prompt; each only where there are classes, or a hand-written prompt.
    """
    found: dict[str, Any] = {}
    reports = {name: class_report(predictions, classes) for name, predictions in answered.items()}
    if any(report is not None for report in reports.values()):
        found["classes"] = reports
    if {"soft_prompt", "hard_prompt"} <= answered.keys():
        found["soft_against_written"] = compared(answered["soft_prompt"], answered["hard_prompt"])
    return found
