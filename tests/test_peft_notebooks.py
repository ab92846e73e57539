"""The notebooks that follow PEFT's for encoders and encoder-decoders, run with tiny bases and files.

Their cells run in the process of the tests, which saves the start of a kernel.
"""

import json
import linecache
from pathlib import Path

import nbformat
import pytest

from spt_jax.testing import write_tiny_checkpoint

COLAB = Path(__file__).parents[1] / "colab"


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys, **settings: object) -> list[str]:
    """Runs the cells of a notebook after the one that installs the package, and returns the lines they print."""
    for setting, value in settings.items():
        monkeypatch.setenv(f"SPT_JAX_NOTEBOOK_{setting}", str(value))
    monkeypatch.chdir(folder)
    cells = [
        cell.source for cell in nbformat.read(COLAB / f"{name}.ipynb", as_version=4).cells if cell.cell_type == "code"
    ]
    assert "%pip" in cells[0] and not any("%" in line[:1] for cell in cells[1:] for line in cell.splitlines())
    names: dict[str, object] = {"__name__": "__main__"}
    for number, source in enumerate(cells[1:], 2):
        file = f"<{name}, cell {number}>"
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        exec(compile(source, file, "exec"), names)
    return capsys.readouterr().out.splitlines()


def write(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def losses(line: str) -> tuple[float, float]:
    """Returns the numbers in `loss 5.6 -> 4.2`."""
    first, last = line.split("loss ")[1].split(",")[0].split(" -> ")
    return float(first), float(last)


def test_financial_sentiment(tmp_path, monkeypatch, capsys):
    rows = [f"the {label} text number {i},{label}" for i in range(10) for label in ("negative", "neutral", "positive")]
    (tmp_path / "news.csv").write_text("\n".join(["sentence,label", *rows]) + "\n")
    base = write_tiny_checkpoint(tmp_path / "model", "t5", num_layers=1, num_decoder_layers=1)
    printed = run("financial_sentiment", tmp_path, monkeypatch, capsys, BASE=base, DATA="news.csv", STEPS=2)
    assert any("27 sentences to train on, 3 to test on" in line for line in printed)
    for name in ("prompt tuning", "prefix tuning"):
        assert any(line.startswith(f"{name}: exact match") and "of 3 sentences" in line for line in printed)
    assert "the same answers after reloading: True" in printed


def test_two_tasks(tmp_path, monkeypatch, capsys):
    tasks = [
        {"task": "sst2", "input": "good text", "output": "positive"},
        {"task": "mnli", "input": "the world is the question", "output": "neutral"},
    ]
    write(tmp_path / "tasks.jsonl", tasks * 8)
    write(tmp_path / "new_task.jsonl", [{"input": "a message", "output": "spam"}] * 8)
    base = write_tiny_checkpoint(tmp_path / "model", "t5", num_layers=1, num_decoder_layers=1)
    printed = run("two_tasks", tmp_path, monkeypatch, capsys, BASE=base, DATA=tmp_path, STEPS=20)
    first = next(line for line in printed if line.startswith("loss"))
    new = next(line for line in printed if line.startswith("new task"))
    for line in (first, new):
        before, after = losses(line)
        assert after < before
    assert first.endswith("prompts: ['mnli', 'shared', 'sst2']")
    assert "saved: ['prompt.json', 'prompt.safetensors']" in printed


def test_paraphrases(tmp_path, monkeypatch, capsys):
    pairs = [
        {"sentence1": "the good text", "sentence2": "a good text", "label": 1},
        {"sentence1": "the good text", "sentence2": "a bad world", "label": 0},
    ]
    for name in ("train", "validation"):
        write(tmp_path / f"{name}.jsonl", pairs * 8)
    base = write_tiny_checkpoint(tmp_path / "model", "roberta", num_hidden_layers=1)
    settings = {"BASE": base, "DATA": tmp_path, "STEPS": 2, "WORDS": " the, question"}
    printed = run("paraphrases", tmp_path, monkeypatch, capsys, **settings)
    for name, count in (("prompt tuning", 10 * 32), ("prefix and classifier", 2 * 20 * 32 + 2 * 32 + 2)):
        assert any(line.startswith(f"{name}: accuracy") and f", {count:,} trained" in line for line in printed)
    assert "the same classes after reloading: True" in printed
