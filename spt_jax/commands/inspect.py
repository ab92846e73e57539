"""`spt-jax inspect | similar`: describes a saved prompt, and finds similar ones."""

import dataclasses
from typing import Any

from spt_jax.bases.base import FrozenBase
from spt_jax.commands.options import Inspect, Similar
from spt_jax.commands.saved import bank_of, load
from spt_jax.data.encoder import encoder_for
from spt_jax.data.sources import check_fields, check_source, read_records
from spt_jax.data.task import task_of
from spt_jax.errors import CheckpointError, ConfigError
from spt_jax.evaluation.attribution import ablate, attention_received
from spt_jax.evaluation.evaluate import make_evaluation_set
from spt_jax.evaluation.inspection import (
    ablation_lines,
    attention_lines,
    compared_rows,
    describe_prompt,
    drift_lines,
    layer_drift,
    row_lines,
    similarity_lines,
    similarity_map,
    started_from,
)
from spt_jax.prompts.storage import SavedPrompt, load_prompt, read_prompt
from spt_jax.prompts.transfer import ranked_sources
from spt_jax.reports.plots import can_draw, missing_note, plot_inspection
from spt_jax.runtime.files import shown, write_json
from spt_jax.runtime.remote import url_of


def inspect_prompt(options: Inspect) -> None:
    """Prints the description of a saved prompt."""
    if options.offline:
        if options.data is not None or options.others or options.output is not None:
            raise ConfigError("--offline only reads the prompt's files; --data, --others and --output need the base")
        print(describe_prompt(read_prompt(options.prompt)))
        return
    if options.data is not None:
        check_source(options.data)
    if options.output is not None and (note := missing_note("inspect.png")):
        print(note)
    base, saved = load(options)
    start = started_from(saved, base)
    rows, drifts = compared_rows(saved, start, base, options.nearest), layer_drift(saved, start)
    print(describe_prompt(saved))
    if rows:
        print(row_lines(rows))
    if drifts:
        print(drift_lines(drifts))
    report: dict[str, Any] = {"rows": [dataclasses.asdict(row) for row in rows], "layer_drift": drifts}
    if options.data is not None:
        report |= _worth(options, base, saved)
    if options.others:
        names = [shown(path) for path in (options.prompt, *options.others)]
        others = [load_prompt(path, base, force=options.force) for path in options.others]
        cosines = similarity_map([saved.virtual, *(other.virtual for other in others)])
        report["similarity"] = {"prompts": names, "cosines": cosines.tolist()}
        print(similarity_lines(names, cosines))
    if options.output is not None:
        if not url_of(options.output):
            options.output.mkdir(parents=True, exist_ok=True)
        write_json(options.output / "inspect.json", report)
        if can_draw():
            plot_inspection(options.output / "inspect.png", report)
        print(f"{shown(options.output)}: inspect.json{', inspect.png' if can_draw() else ''}")


def _worth(options: Inspect, base: FrozenBase, saved: SavedPrompt) -> dict[str, Any]:
    """Returns the effect of ablating each position on the records, and the attention that it receives."""
    assert options.data is not None
    records = read_records(options.data, split=options.split, limit=options.limit)
    check_fields(records, task_of(saved.template).required_fields(saved.template), options.data)
    data = make_evaluation_set(base, encoder_for(base, saved.template, taken=saved.virtual.prefix_length), records)
    measure, lost = ablate(base, data, saved.virtual)
    print(ablation_lines(measure, lost))
    report: dict[str, Any] = {"measure": measure, "lost": [dataclasses.asdict(loss) for loss in lost]}
    if saved.virtual.gated is None:
        received = attention_received(base, data.examples, saved.virtual)
        print(attention_lines(received))
        report["attention"] = {"by_layer_and_position": received.by_position.tolist(), "even": received.even}
    return report


def similar_prompts(options: Similar) -> None:
    """Prints the saved prompts of a folder by similarity."""
    target = read_prompt(options.prompt)
    where = shown(options.bank)
    bank = {f"{where}/{name}": read_prompt(folder) for name, folder in bank_of(options.bank).items()}
    for folder, saved in bank.items():
        differences = target.fingerprint.differences(saved.fingerprint)
        if differences:
            fields = "; ".join(differences)
            raise CheckpointError(f"{folder}: this prompt is for another base than {options.prompt}: {fields}")
    for folder, value in ranked_sources(target.virtual, {name: saved.virtual for name, saved in bank.items()}):
        print(f"{value:7.4f}  {folder}")
