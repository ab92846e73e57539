"""Sweeps over lengths and seeds of an encoder-decoder and of an encoder, end to end."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

import train
from spt_jax.__main__ import main
from spt_jax.testing import write_tiny_checkpoint
from tests.jobs import ROOT, arrays

# An encoder's verbalizers are single tokens at its mask.
CASES = {
    "t5": ("<soft>{text}", {"good": "fine", "bad": "a bad one"}),
    "bert": ("<soft>{text} <mask>", {"good": "H", "bad": "L"}),
}
COUNTS = {"train": 16, "validation": 12}


def words(files: Path, workdir: Path, prompt: str, verbalizers: dict[str, str], *more: str) -> list[str]:
    flags = {"base.path": "model", **{f"data.{split}": f"{split}.jsonl" for split in COUNTS}}
    line = [str(ROOT / "configs" / "local_files.py"), "--workdir", str(workdir), "--data.prompt", prompt]
    for name, file in flags.items():
        line += [f"--{name}", str(files / file)]
    pairs = [f"{label}={text}" for label, text in verbalizers.items()]
    quick = "--train.steps 4 --train.batch-size 4 --train.evaluate-every 2 --train.checkpoint-every 2"
    return [
        *line,
        "--data.target",
        "{label}",
        "--data.verbalizers",
        *pairs,
        "--data.hard-prompt",
        *quick.split(),
        *more,
    ]


@pytest.mark.parametrize("family", CASES)
def test_lengths_and_seeds(family, tmp_path):
    """Each trial is a run of its own; the table, the chosen setting and the saved prompt follow from them."""
    write_tiny_checkpoint(tmp_path / "model", family)
    for split, count in COUNTS.items():
        records = [
            {"text": "a nice one" if n % 2 else "it was sad", "label": ["bad", "good"][n % 2]} for n in range(count)
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    case, workdir = CASES[family], tmp_path / "sweep"
    options = ["--lengths", "1", "3", "--seeds", "0", "1", "--patience", "1", "--resolution", "0.2"]
    assert main(["sweep", *words(tmp_path, workdir, *case, *options)]) == 0
    with open(workdir / "trials.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    settings = [(row["method.length"], row["seed"], row["status"]) for row in rows]
    assert settings == [(length, seed, "finished") for length in "13" for seed in "01"]
    results = json.loads((workdir / "results.json").read_text())
    for own in results["settings"]:
        values = [
            row["validation.accuracy"] for row in rows if row["method.length"] == own["settings"]["method.length"]
        ]
        assert own["validation"]["mean"] == pytest.approx(np.mean([float(value) for value in values]))
    chosen = workdir / "trials" / f"{results['chosen']['trial']:03d}"
    np.testing.assert_array_equal(arrays(workdir), arrays(chosen))
    if family == "bert":  # whose trials are trained as T5's are
        return
    alone = words(tmp_path, tmp_path / "run", *case, "--method.length", "3", "--train.seed", "1")
    assert train.main(alone) == 0
    np.testing.assert_array_equal(arrays(workdir / "trials" / "004"), arrays(tmp_path / "run"))
    expected = json.loads((tmp_path / "run" / "results.json").read_text())
    assert float(rows[3]["validation.accuracy"]) == expected["validation"]["soft_prompt"]["accuracy"]
    assert float(rows[3]["validation.loss"]) == pytest.approx(expected["validation"]["soft_prompt"]["loss"])
