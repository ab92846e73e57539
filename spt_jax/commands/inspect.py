"""`spt-jax inspect | similar`: describes a saved prompt, and finds similar ones."""

import dataclasses
from pathlib import Path
from typing import Any

from spt_jax.bases.base import FrozenBase
from spt_jax.commands.saved import Saved, bank_of
from spt_jax.data.encoder import encoder_for
from spt_jax.data.sources import check_fields, check_source, read_records
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect(Saved):
    """Describes a saved prompt: its rows compared with the vocabulary and their initial values, and each row's effect.

    Attributes:
      nearest: how many of the nearest tokens to show per row.
      offline: show only the contents of the files, without loading the base.
      data: a file or hub data set on which to ablate each position and to measure the attention it receives.
      split: split of a hub data set.
      limit: most records to read.
      others: further prompts, for a matrix of similarities.
      output: a directory for inspect.json and inspect.png.
    """

    nearest: int = 5
    offline: bool = False
    data: str | None = None
    split: str = "validation"
    limit: int = 500
    others: tuple[Path, ...] = ()
    output: Path | None = None

    def run(self) -> None:
        if self.offline:
            if self.data is not None or self.others or self.output is not None:
                raise ConfigError(
                    "--offline only reads the prompt's files; --data, --others and --output need the base"
                )
            print(describe_prompt(read_prompt(self.prompt)))
            return
        if self.data is not None:
            check_source(self.data)
        if self.output is not None and (note := missing_note("inspect.png")):
            print(note)
        base, saved = self.load()
        start = started_from(saved, base)
        rows, drifts = compared_rows(saved, start, base, self.nearest), layer_drift(saved, start)
        print(describe_prompt(saved))
        if rows:
            print(row_lines(rows))
        if drifts:
            print(drift_lines(drifts))
        report: dict[str, Any] = {"rows": [dataclasses.asdict(row) for row in rows], "layer_drift": drifts}
        if self.data is not None:
            report |= self.worth(base, saved)
        if self.others:
            names = [shown(path) for path in (self.prompt, *self.others)]
            others = [load_prompt(path, base, force=self.force) for path in self.others]
            cosines = similarity_map([saved.virtual, *(other.virtual for other in others)])
            report["similarity"] = {"prompts": names, "cosines": cosines.tolist()}
            print(similarity_lines(names, cosines))
        if self.output is not None:
            if not url_of(self.output):
                self.output.mkdir(parents=True, exist_ok=True)
            write_json(self.output / "inspect.json", report)
            if can_draw():
                plot_inspection(self.output / "inspect.png", report)
            print(f"{shown(self.output)}: inspect.json{', inspect.png' if can_draw() else ''}")

    def worth(self, base: FrozenBase, saved: SavedPrompt) -> dict[str, Any]:
        """Returns the effect of ablating each position on the records, and the attention that it receives."""
        assert self.data is not None
        records = read_records(self.data, split=self.split, limit=self.limit)
        check_fields(records, saved.template.fields, self.data)
        data = make_evaluation_set(base, encoder_for(base, saved.template, taken=saved.virtual.prefix_length), records)
        measure, lost = ablate(base, data, saved.virtual)
        print(ablation_lines(measure, lost))
        report: dict[str, Any] = {"measure": measure, "lost": [dataclasses.asdict(loss) for loss in lost]}
        if saved.virtual.gated is None:
            received = attention_received(base, data.examples, saved.virtual)
            print(attention_lines(received))
            report["attention"] = {"by_layer_and_position": received.by_position.tolist(), "even": received.even}
        return report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Similar:
    """Ranks the saved prompts of a folder as initial values for a new task, by similarity to the task's prompt (SPoT).

    Attributes:
      prompt: the new task's prompt, trained for a few steps.
      bank: a folder of prompt directories for the same base.
    """

    prompt: Path
    bank: Path

    def run(self) -> None:
        target = read_prompt(self.prompt)
        where = shown(self.bank)
        bank = {f"{where}/{name}": read_prompt(folder) for name, folder in bank_of(self.bank).items()}
        for folder, saved in bank.items():
            differences = target.fingerprint.differences(saved.fingerprint)
            if differences:
                fields = "; ".join(differences)
                raise CheckpointError(f"{folder}: this prompt is for another base than {self.prompt}: {fields}")
        for folder, value in ranked_sources(target.virtual, {name: saved.virtual for name, saved in bank.items()}):
            print(f"{value:7.4f}  {folder}")
