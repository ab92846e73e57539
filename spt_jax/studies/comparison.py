"""Compares soft prompts with the alternatives to them on the same test records."""

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spt_jax.bases.base import FrozenBase
from spt_jax.data.encoder import Encoder, encoder_for
from spt_jax.data.examples import Example
from spt_jax.data.task import task_of, works_bare
from spt_jax.data.templates import Template
from spt_jax.data.values import field_text
from spt_jax.errors import ConfigError, DataError
from spt_jax.evaluation.evaluate import EvaluationSet, evaluate, make_evaluation_set, metrics, selection_score
from spt_jax.evaluation.predictions import (
    PREFERRED,
    SHOWN_BY,
    Prediction,
    advantage,
    measures,
    read_predictions,
    record_values,
    with_fields,
)
from spt_jax.experiment.run import Experiment, Records
from spt_jax.prompts import VirtualPrompt
from spt_jax.prompts.names import prompt_directory
from spt_jax.prompts.storage import load_prompt
from spt_jax.runtime.files import nearest_path, shown
from spt_jax.runtime.progress import Progress
from spt_jax.runtime.waits import spoken
from spt_jax.studies.probe import PENALTIES, features, fit_probe

FACTS_FILE, PREDICTIONS_FILE = "facts.json", "predictions.jsonl"


@dataclasses.dataclass(frozen=True)
class Facts:
    """The costs of a baseline; None if unknown.

    Attributes:
      trainable_parameters: the number of trained parameters.
      bytes: the size of what must be stored in addition to the base.
      train_seconds: the duration of training.
      test_seconds: the duration of the evaluation on the test records, compilation included.
      extra_tokens: the average number of positions of a request beyond those of the bare request.
    """

    trainable_parameters: int | None = 0
    bytes: int | None = 0
    train_seconds: float | None = 0.0
    test_seconds: float | None = None
    extra_tokens: float | None = 0.0


@dataclasses.dataclass(frozen=True)
class Baseline:
    """One row of the comparison: its name, the encoded test records, its soft prompt or probe if any, and its costs."""

    name: str
    data: EvaluationSet
    virtual: VirtualPrompt | None
    facts: Facts


@dataclasses.dataclass(frozen=True)
class Entry:
    """The result of a baseline: its predictions for all test records, and its costs."""

    name: str
    predictions: Sequence[Prediction]
    facts: Facts


def baselines(
    experiment: Experiment,
    prompts: Sequence[Path],
    *,
    shots: Sequence[int] = (),
    shots_seed: int = 0,
    probe: bool = True,
) -> list[Baseline]:
    """Returns the baselines to evaluate, in the order of the table.

    Args:
      experiment: the base, the data and the template.
      prompts: directories of saved soft prompts.
      shots: numbers of solved examples, each a baseline that uses the hand-written prompt with the best validation
        score; ignored for a chat of {messages}.
      shots_seed: seed for the choice of solved examples.
      probe: for classification, whether to include a linear probe.

    Raises:
      DataError: the test records cannot be encoded.
      CheckpointError: a prompt is damaged or for another base.
    """
    bare, template = bare_tokens(experiment), experiment.template
    found = [_soft(experiment, path, bare) for path in prompts]
    if works_bare(template, experiment.base):
        found += _without_prompt(experiment, bare, shots, shots_seed)
    if probe and template.verbalizers and task_of(template).bare:
        with spoken("training the linear probe"):
            found.append(_probe(experiment))
    return found


def _without_prompt(experiment: Experiment, bare: float, shots: Sequence[int], shots_seed: int) -> list[Baseline]:
    """Returns the base without a prompt, with each hand-written prompt, and with solved examples."""
    template, texts = experiment.template, experiment.config.data.hard_prompt
    found = [_written(experiment, "no prompt", bare, template.bare())]
    found += [_written(experiment, f"hand-written: {text}", bare, template.bare(text)) for text in texts]
    with spoken("choosing a hand-written prompt by validation"):
        asked_by = template.bare(best_text(experiment))
    for count in () if template.is_conversation else shots:
        solved = draw_shots(experiment.train, template, count, shots_seed)
        name = f"{count} solved example{'s' if count > 1 else ''}"
        found.append(_written(experiment, name, bare, asked_by, solved))
    return found


def ask_all(base: FrozenBase, rows: Sequence[Baseline]) -> list[Entry]:
    """Evaluates baselines on all test records, and shows the progress."""
    entries = []
    with Progress("comparing", len(rows)) as progress:
        for row in rows:
            progress.begin(row.name)
            entries.append(ask(base, row))
            progress.advance()
    return entries


def ask(base: FrozenBase, baseline: Baseline) -> Entry:
    """Evaluates a baseline on all test records."""
    begun, template = time.perf_counter(), baseline.data.encoder.template
    result = evaluate(base, baseline.data, baseline.virtual)
    seconds = round(time.perf_counter() - begun, 2)
    predictions = with_fields(result.predictions, baseline.data.records, template.prompt_fields)
    return Entry(baseline.name, predictions, dataclasses.replace(baseline.facts, test_seconds=seconds))


def bare_tokens(experiment: Experiment) -> float:
    """Returns the average number of tokens of a test request without a prompt."""
    assert experiment.test is not None
    template = experiment.template
    encoder = _encoder(experiment, dataclasses.replace(template.bare(), head=template.head, reads=template.reads))
    return _mean_length([encoder.encode(record, number) for number, record in enumerate(experiment.test)])


def _mean_length(examples: Sequence[Example]) -> float:
    return float(np.mean([len(example.ids) for example in examples]))


def _encoder(experiment: Experiment, template: Template, shots: Records = (), taken: int = 0) -> Encoder:
    """Returns an encoder with the run's maximum length, increased by the length of the solved examples."""
    max_length = experiment.config.data.max_length

    def encoder(limit: int | None, shots: Records) -> Encoder:
        return encoder_for(experiment.base, template, taken=taken, max_length=limit, shots=shots)

    if max_length is None or not shots:
        return encoder(max_length, shots)
    without, with_shots = (len(encoder(None, solved).prompt_ids(shots[0])) for solved in ((), shots))
    return encoder(max_length + with_shots - without, shots)


def _set(experiment: Experiment, encoder: Encoder, records: Records | None, taken: int = 0) -> EvaluationSet:
    assert records is not None
    config = experiment.config
    options: dict[str, Any] = {"packing": config.data.packing, "taken": taken}
    return make_evaluation_set(experiment.base, encoder, records, config.evaluation, **options)


def _soft(experiment: Experiment, path: Path, bare: float) -> Baseline:
    directory = prompt_directory(path)
    saved = load_prompt(directory, experiment.base)
    taken = saved.virtual.prefix_length
    data = _set(experiment, _encoder(experiment, saved.template, taken=taken), experiment.test, taken)
    run = directory.parent / "results.json"
    facts = Facts(
        trainable_parameters=(saved.info.get("extra") or {}).get("trainable_parameters"),
        bytes=sum(file.stat().st_size for file in directory.glob("prompt.*")),
        train_seconds=json.loads(run.read_text()).get("train_seconds") if run.exists() else None,
        extra_tokens=round(_mean_length(data.examples) + taken - bare, 3),
    )
    return Baseline(f"soft prompt: {shown(path)}", data, saved.virtual, facts)


def _written(experiment: Experiment, name: str, bare: float, template: Template, shots: Records = ()) -> Baseline:
    try:
        data = _set(experiment, _encoder(experiment, template, shots), experiment.test)
    except DataError as error:
        if shots:
            raise DataError(f"{len(shots)} solved examples: {error}, or use fewer --shots") from error
        raise
    # The texts that one would have to store: the prompt and the examples.
    words = [template.prompt, *(field_text(shot, field, 0) for shot in shots for field in template.fields)]
    size = 0 if name == "no prompt" else sum(len(word.encode()) for word in words)
    return Baseline(name, data, None, Facts(bytes=size, extra_tokens=round(_mean_length(data.examples) - bare, 3)))


def _probe(experiment: Experiment) -> Baseline:
    """Trains a linear probe, with the penalty of the best validation score, or the middle one without validation."""
    base, template = experiment.base, dataclasses.replace(experiment.template.bare(), head="classification")
    encoder = _encoder(experiment, template)
    data = _set(experiment, encoder, experiment.test)
    begun = time.perf_counter()
    train = _set(experiment, encoder, experiment.train)
    states, labels = features(base, train), np.asarray([example.label for example in train.examples])
    probes = [fit_probe(states, labels, len(template.verbalizers), penalty) for penalty in PENALTIES]
    chosen = probes[len(probes) // 2]
    if experiment.validation is not None:
        validation = _set(experiment, encoder, experiment.validation)
        chosen = max(probes, key=lambda probe: selection_score(evaluate(base, validation, probe).metrics))
    seconds = round(time.perf_counter() - begun, 2)
    numbers = (base.layout.head_width + 1) * len(template.verbalizers)
    return Baseline("linear probe", data, chosen, Facts(numbers, 4 * numbers, seconds))


def best_text(experiment: Experiment) -> str | None:
    """Returns the hand-written prompt with the best validation score, or the first without validation; None if none."""
    texts = experiment.config.data.hard_prompt
    if len(texts) < 2 or experiment.validation is None:
        return texts[0] if texts else None
    records = experiment.validation

    def score(text: str) -> float:
        data = experiment.evaluation_set(records, experiment.template.bare(text))
        return selection_score(evaluate(experiment.base, data, None, generated=False).metrics)

    return max(texts, key=score)


def draw_shots(records: Records, template: Template, count: int, seed: int) -> list[Mapping[str, Any]]:
    """Returns `count` training records in random order; class counts differ by at most one.

    Raises:
      ConfigError: there are too few records.
    """
    order = [records[i] for i in np.random.default_rng(seed).permutation(len(records))]
    if template.verbalizers:
        by_class: dict[str, list[Mapping[str, Any]]] = {}
        for record in order:
            by_class.setdefault(field_text(record, template.label_field or "", 0), []).append(record)
        rank = {id(record): place for members in by_class.values() for place, record in enumerate(members)}
        order = sorted(order, key=lambda record: rank[id(record)])
    if len(order) < count:
        raise ConfigError(f"--shots {count}: there are only {len(order)} training records")
    return order[:count]


def read_outside(name: str, folder: Path) -> Entry:
    """Reads the results of a system that was evaluated outside this library.

    Raises:
      ConfigError: a file is missing, or facts.json does not have numbers with the names of `Facts`.
      DataError: the predictions cannot be read.
    """
    for file in (FACTS_FILE, PREDICTIONS_FILE):
        if not (folder / file).is_file():
            raise ConfigError(f"--others {name}: no file {shown(folder)}/{file}{nearest_path(folder)}")
    known = [field.name for field in dataclasses.fields(Facts)]
    try:
        facts = dict(json.loads((folder / FACTS_FILE).read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{folder / FACTS_FILE}: {error}; the known fields are {', '.join(known)}") from error
    for field, value in facts.items():
        if field not in known:
            raise ConfigError(
                f"{folder / FACTS_FILE}: unknown field {field!r}; the known fields are {', '.join(known)}"
            )
        if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
            raise ConfigError(f"{folder / FACTS_FILE}: {field} is {value!r}, not a number")
    groups = read_predictions(folder / PREDICTIONS_FILE).values()
    predictions = [prediction for group in groups for prediction in group]
    return Entry(name, predictions, Facts(**(dict.fromkeys(known) | facts)))


def make_table(entries: Sequence[Entry], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Returns one row per entry, computed only from its predictions; each entry is compared with the first.

    Entries are compared by accuracy, or else by exact match, or else by log-probability.

    Raises:
      DataError: the entries were not evaluated on the same records.
    """
    first = entries[0].predictions
    shared = [name for name in PREFERRED if name in measures(first)]
    kind = shared[0]
    for entry in entries:
        if kind not in measures(entry.predictions) or _answers(entry.predictions, kind) != _answers(first, kind):
            raise DataError(f"{entry.name} was not evaluated on the same records as {entries[0].name}")
    ours = record_values(first, kind)
    table = []
    for entry in entries:
        theirs = record_values(entry.predictions, kind)
        row: dict[str, Any] = {"name": entry.name, "records": len(theirs), "measure": kind}
        row |= _interval(kind, metrics.bootstrap_interval(theirs))
        if kind == "accuracy" and isinstance(first[0]["label"], str):
            pair = [p["prediction"] for p in entry.predictions], [p["label"] for p in entry.predictions]
            row |= _interval("macro_f1", metrics.macro_f1_interval(*pair, list(classes)))
        if kind == "exact_match":
            answered = [p for p in entry.predictions if "reference" in p]
            row["token_f1"] = metrics.token_f1([p["prediction"] for p in answered], [p["reference"] for p in answered])
        if entry is not entries[0]:
            row |= advantage(ours, theirs)
        table.append({**row, **dataclasses.asdict(entry.facts)})
    return table


def _answers(predictions: Sequence[Prediction], kind: str) -> list[Any]:
    """Returns the correct answers, which must be equal for predictions on the same records."""
    return [prediction.get(SHOWN_BY[kind]) for prediction in predictions]


def _interval(name: str, interval: metrics.Interval) -> dict[str, Any]:
    return {name: interval.value, f"{name}_interval": [interval.low, interval.high]}


def markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table in Markdown."""
    kind = table[0]["measure"]
    second = next((name for name in ("macro_f1", "token_f1") if name in table[0]), None)
    columns = [
        *(kind.replace("_", " "), second.replace("_", "-") if second else ""),
        *("first is ahead by", "McNemar p", "bootstrap p"),
        *("trained parameters", "bytes", "training s", "test s", "extra tokens"),
    ]
    lines = ["| | " + " | ".join(column for column in columns if column) + " |"]
    lines.append("|---" * (1 + sum(map(bool, columns))) + "|")
    for row in table:
        name = row["name"].replace("\n", "\\n").replace("|", "\\|")
        cells = [
            name,
            _cell(row, kind),
            *([_cell(row, second)] if second else []),
            _cell(row, "ahead"),
            *(f"{row[p]:.2g}" if p in row else "-" for p in ("p_mcnemar", "p_bootstrap")),
            *(_number(row[field], ",") for field in ("trainable_parameters", "bytes")),
            *(_number(row[field], ",.1f") for field in ("train_seconds", "test_seconds", "extra_tokens")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(value: float | int | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _cell(row: Mapping[str, Any], name: str) -> str:
    if name not in row:
        return "-"
    ends = row.get(f"{name}_interval")
    return f"{row[name]:.3f}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else "")
