"""`spt-jax compare`: every number of its table, computed again from what it stored."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import train
from spt_jax.__main__ import main
from spt_jax.bases.base import read_tokenizer
from spt_jax.data.templates import Template
from spt_jax.errors import ConfigError
from spt_jax.studies.comparison import Facts, draw_shots, read_outside
from tests.jobs import words, write_task

QUICK = ("--train.steps", "20", "--train.evaluate-every", "10")
HARD = ("hand-written: {text}\nIt was", "hand-written: Is {text} good?\n")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    write_task(folder)
    assert train.main(words(folder, folder / "run", *QUICK)) == 0
    return folder


@pytest.fixture(scope="module")
def compared(files: Path) -> Path:
    """With a system from outside, which is always right."""
    (files / "outside").mkdir()
    labels = [json.loads(line)["label"] for line in (files / "test.jsonl").read_text().splitlines()]
    lines = [{"prompt": "x", "record": i, "label": own, "prediction": own} for i, own in enumerate(labels, 1)]
    (files / "outside" / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = {"trainable_parameters": 7, "bytes": None, "train_seconds": 1.5, "test_seconds": 0.5, "extra_tokens": 2.0}
    (files / "outside" / "facts.json").write_text(json.dumps(facts))
    assert compare(files, files / "compared", "--shots", "1", "3", "--others", f"Oracle={files / 'outside'}") == 0
    return files / "compared"


def compare(files: Path, workdir: Path, *more: str) -> int:
    return main(["compare", *words(files, workdir), "--prompts", str(files / "run" / "prompt"), *more])


def rows(compared: Path) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads((compared / "compare.json").read_text())["table"]}


def predictions(compared: Path) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for line in (compared / "predictions.jsonl").read_text().splitlines():
        prediction = json.loads(line)
        found.setdefault(prediction["prompt"], []).append(prediction)
    return found


def test_every_way_of_asking_has_a_row(files: Path, compared: Path):
    soft = f"soft prompt: {files / 'run' / 'prompt'}"
    expected = [soft, "no prompt", *HARD, "1 solved example", "3 solved examples", "linear probe", "Oracle"]
    assert list(rows(compared)) == expected == list(predictions(compared))
    text = (compared / "compare.md").read_text().splitlines()
    assert len(text) == 2 + len(expected) and len({line.count("|") for line in text}) == 1
    for line, row in zip(text[2:], rows(compared).values(), strict=True):
        assert f"| {row['accuracy']:.3f} [" in line and f"| {row['trainable_parameters']:,} |" in line
    assert "| 7 | - | 1.5 | 0.5 | 2.0 |" in text[-1]
    assert (compared / "compare.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    report = (compared / "report.html").read_text()
    assert all(f"{row['accuracy']:.3f}" in report for row in rows(compared).values())


def test_scores_follow_from_the_predictions(compared: Path):
    for name, own in predictions(compared).items():
        row = rows(compared)[name]
        right = np.asarray([p["label"] == p["prediction"] for p in own], float)
        assert row["records"] == len(own) == 30 and row["accuracy"] == right.mean()
        low, high = row["accuracy_interval"]
        half = 1.96 * right.std() / math.sqrt(30)  # what a bootstrap of a mean comes to
        assert low == pytest.approx(right.mean() - half, abs=0.05) and high == pytest.approx(
            right.mean() + half, abs=0.05
        )
        f1 = []
        for kind in ("good", "bad"):
            both = sum(p["label"] == kind == p["prediction"] for p in own)
            either = sum((p["label"] == kind) + (p["prediction"] == kind) for p in own)
            f1.append(2 * both / max(either, 1))
        assert row["macro_f1"] == pytest.approx(np.mean(f1))


def test_significance_follows_from_the_predictions(compared: Path):
    every = {
        name: np.asarray([p["label"] == p["prediction"] for p in own], float)
        for name, own in predictions(compared).items()
    }
    (first, ours), *others = every.items()
    assert "ahead" not in rows(compared)[first]
    for name, theirs in others:
        row = rows(compared)[name]
        won, lost = int(((ours == 1) & (theirs == 0)).sum()), int(((ours == 0) & (theirs == 1)).sum())
        tail = sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1)) / 2 ** (won + lost)
        assert row["p_mcnemar"] == pytest.approx(min(1.0, 2 * tail))
        assert row["ahead"] == pytest.approx((won - lost) / 30)
        drawn = (ours - theirs)[np.random.default_rng(9).integers(30, size=(20_000, 30))].mean(axis=1)
        assert row["p_bootstrap"] == pytest.approx(min(1, 2 * min((drawn <= 0).mean(), (drawn >= 0).mean())), abs=0.02)
        assert row["ahead_interval"] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.04)


def test_costs_are_those_of_the_files_and_the_tokenizer(files: Path, compared: Path):
    table, folder = rows(compared), files / "run" / "prompt"
    tokenizer = read_tokenizer(files / "model")
    records = [json.loads(line) for line in (files / "test.jsonl").read_text().splitlines()]

    def length(text: str) -> float:
        return float(np.mean([len(tokenizer.encode(text.replace("{text}", r["text"]))) for r in records]))

    soft = table[f"soft prompt: {folder}"]
    assert soft["trainable_parameters"] == sum(
        array.size for array in load_file(folder / "prompt.safetensors").values()
    )
    assert soft["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    assert soft["train_seconds"] == json.loads((files / "run" / "results.json").read_text())["train_seconds"]
    assert soft["extra_tokens"] == 4
    nothing = {"trainable_parameters": 0, "train_seconds": 0.0}
    assert table["no prompt"].items() >= {**nothing, "bytes": 0, "extra_tokens": 0.0}.items()
    for name in HARD:
        text = name.removeprefix("hand-written: ")
        assert table[name].items() >= {**nothing, "bytes": len(text.encode())}.items()
        assert table[name]["extra_tokens"] == pytest.approx(length(text) - length("{text}\n"))
    width = 32
    assert table["linear probe"]["trainable_parameters"] == 2 * (width + 1) == table["linear probe"]["bytes"] / 4
    assert table["Oracle"].items() >= json.loads((files / "outside" / "facts.json").read_text()).items()
    assert table["3 solved examples"]["extra_tokens"] > 2 * table["1 solved example"]["extra_tokens"] > 0


def test_answers_that_are_written(files: Path, tmp_path: Path):
    """Without verbalizers, answers are generated: exact match of each against its reference."""
    folder = tmp_path / "task"
    shutil.copytree(files, folder)
    flags = words(folder, folder / "speak", *QUICK)
    plain = [*flags[: flags.index("--data.verbalizers")], "--data.hard-prompt", "{text} is"]
    plain += ["--evaluation.max-new-tokens", "3"]
    assert train.main([*plain, *QUICK]) == 0
    plain[plain.index("--workdir") + 1] = str(folder / "out")
    assert main(["compare", *plain, "--prompts", str(folder / "speak" / "prompt"), "--shots", "2"]) == 0
    table, own = rows(folder / "out"), predictions(folder / "out")
    assert len(table) == 4
    for name, row in table.items():
        right = [p["prediction"].strip().lower() == p["reference"].lower() for p in own[name]]
        assert row["exact_match"] == np.mean(right) and row["records"] == 30


def test_a_work_directory_that_exists_is_left_alone(files: Path, compared: Path, capsys):
    before = (compared / "compare.json").read_bytes()
    assert compare(files, compared) == 2
    assert "already exists. Use --overwrite" in capsys.readouterr().err
    assert compare(files, compared, "--shots", "30", "--overwrite") == 1  # what fails deletes nothing
    assert (compared / "compare.json").read_bytes() == before


def test_the_longest_example_is_that_of_the_run(files: Path, tmp_path: Path, capsys):
    """`data.max_length` holds for every way of asking; solved examples add their own length."""
    more = ("--data.max-length", "24", "--shots", "2", "--no-probe")
    assert compare(files, tmp_path / "out", *more) == 1
    assert "at most 24 fit" in capsys.readouterr().err
    assert compare(files, tmp_path / "out", *more, "--data.truncate", "text") == 0


def test_shots_are_balanced_and_follow_from_their_seed():
    records = [{"text": str(i), "label": "a" if i % 5 else "b"} for i in range(50)]
    template = Template(prompt="{text}", target="{label}", verbalizers={"a": "A", "b": "B"})
    drawn = draw_shots(records, template, 7, 0)
    assert drawn == draw_shots(records, template, 7, 0) != draw_shots(records, template, 7, 1)
    assert sorted(abs(2 * [s["label"] for s in drawn[:k]].count("a") - k) for k in (2, 4, 6)) == [0, 0, 0]
    with pytest.raises(ConfigError, match="there are only 50 training records"):
        draw_shots(records, template, 51, 0)


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (("--shots", "0"), 2, "must be at least 1"),
        (("--shots", "30"), 1, "use fewer --shots"),
        (("--others", "LoRA=nowhere"), 2, "no file nowhere/facts.json"),
        (("--prompts", "nowhere"), 1, "nowhere"),
        (("--prompts",), 2, "give the saved soft prompts"),
    ],
)
def test_wrong_comparisons_say_what_is_wrong(files, tmp_path, capsys, more, code, message):
    assert compare(files, tmp_path / "out", *more) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_prompt_of_another_template_is_noted(files: Path, tmp_path: Path, capsys):
    more = "--no-probe", "--shots", "--data.prompt", "<soft>{text}: ", "--data.target", "{label}"
    assert compare(files, tmp_path / "out", *more) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("note: "))
    assert "was trained with the prompt" in line and "rows without a soft prompt have '{text}: ' and '{label}'" in line


def test_others_must_have_been_asked_the_same(files: Path, compared: Path, tmp_path: Path, capsys):
    shutil.copytree(files / "outside", tmp_path / "other")
    lines = (tmp_path / "other" / "predictions.jsonl").read_text().splitlines()
    (tmp_path / "other" / "predictions.jsonl").write_text("\n".join(lines[:-1]))
    assert compare(files, tmp_path / "out", "--others", f"X={tmp_path / 'other'}", "--no-probe") == 1
    assert "X was not evaluated on the same records" in capsys.readouterr().err
    (tmp_path / "other" / "predictions.jsonl").write_text("{")
    assert compare(files, tmp_path / "out", "--others", f"X={tmp_path / 'other'}", "--no-probe") == 1
    assert "line 1" in capsys.readouterr().err
    (tmp_path / "other" / "facts.json").write_text('{"bytes": "many"}')
    assert compare(files, tmp_path / "out", "--others", f"X={tmp_path / 'other'}", "--no-probe") == 2
    assert "bytes is 'many', not a number" in capsys.readouterr().err
    (tmp_path / "other" / "facts.json").write_text('{"bytes": true}')
    assert compare(files, tmp_path / "out", "--others", f"X={tmp_path / 'other'}", "--no-probe") == 2
    assert "bytes is True, not a number" in capsys.readouterr().err
    (tmp_path / "other" / "facts.json").write_text("{}")
    shutil.copy(files / "outside" / "predictions.jsonl", tmp_path / "other")
    assert read_outside("X", tmp_path / "other").facts == Facts(None, None, None, None, None)  # unknown, and not 0
    (tmp_path / "other" / "facts.json").write_text('{"size": 3}')
    assert compare(files, tmp_path / "out", "--others", f"X={tmp_path / 'other'}") == 2
    assert "the known fields are trainable_parameters" in capsys.readouterr().err
