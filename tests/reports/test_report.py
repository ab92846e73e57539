"""A report is a pure function of a work directory, and no text in it becomes markup."""

import html.parser
import json
import re
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from spt_jax.__main__ import main
from spt_jax.errors import ConfigError
from spt_jax.evaluation.classes import class_report
from spt_jax.evaluation.inspection import nearest_tokens, nearest_words
from spt_jax.evaluation.predictions import advantage, compared, with_fields
from spt_jax.prompts.virtual import VirtualPrompt
from spt_jax.reports.charts import Line, line_chart, smoothed, thinned, ticks
from spt_jax.reports.contents import bars_of
from spt_jax.reports.from_workdir import read_report
from spt_jax.reports.html import render, write_report
from spt_jax.runtime.provenance import git_commit, provenance
from spt_jax.testing import tiny_base
from tests.reports.workdirs import ANSWERS, CLASSES, MARKUP, WRITERS, write, write_run


class Page(html.parser.HTMLParser):
    """The tags of a page, its attributes' values, and its texts without the style sheet."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.values, self.texts = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.values += [value or "" for _, value in attrs]

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.mark.parametrize("kind", WRITERS)
def test_a_report_is_one_file_without_scripts_and_addresses(kind: str, tmp_path: Path):
    workdir = WRITERS[kind](tmp_path / "the & run")
    first = write_report(workdir).read_bytes()
    assert write_report(workdir).read_bytes() == first == render(read_report(workdir)).encode()
    page = Page(first.decode())
    assert not page.tags & {"script", "img", "iframe", "object", "form", "base"}
    addresses = re.compile(r"(?i)https?:|javascript:|url\(")
    assert not [value for value in page.values if addresses.search(value) and MARKUP not in value]
    assert MARKUP in page.text and MARKUP not in first.decode()
    assert "the & run" in page.text and "0123456789ab" in page.text and "2026-01-02" in page.text
    assert "0.50" in page.text and "\u2581jazz" in page.text  # the nearest tokens


def test_a_run_s_report_has_its_numbers(tmp_path: Path):
    report = read_report(write_run(tmp_path / "run"))
    assert [figure.value for figure in report.figures] == ["0.667", "0.500", "+0.167", "80", "12,345 B"]
    assert (
        "ahead of the best written prompt by 0.167" in report.summary and "McNemar p = 0.62, paired" in report.summary
    )
    (bars,) = report.bars
    assert [(bar.name, bar.ends) for bar in bars.bars] == [
        ("soft prompt", (66.67, 20.0, 90.0)),
        ("best hand-written prompt", (50.0, 20.0, 90.0)),
    ]
    assert [chart.title for chart in report.charts] == ["Training loss", "Validation accuracy"]
    assert all(("chosen", "chosen: step 80") in chart.keys for chart in report.charts)
    (matrix,) = report.confusions
    cells = [[cell.count for cell in row] for _, row, _ in matrix.rows]
    assert cells == [[sum(a[:2] == (i, j) for a in ANSWERS) for j in (0, 1)] for i in (0, 1)] == [[2, 1], [1, 2]]
    won, lost = report.examples
    assert (won.count, lost.count) == (3, 1)
    assert [example.fields[0][1][:8] for example in won.shown] == ["record 2", "record 4", "record 5"]
    assert lost.shown[0].answers == [("the soft prompt", CLASSES[1]), ("the written prompt", CLASSES[0])]
    assert dict(report.environment)["date"] == "2026-01-02T03:04:05+00:00"


def test_a_sweep_s_report_has_every_trial(tmp_path: Path):
    report = read_report(WRITERS["sweep"](tmp_path / "sweep"))
    (table,) = report.tables
    assert [row[0] for row in table.rows] == ["1", "2", "3", "4"]
    (chart,) = report.charts
    assert chart.svg.count("<polyline") == 4 and chart.keys[1] == ("faint", "the other 3 trials")
    assert report.examples[0].count == sum(right != guess for right, guess, _ in ANSWERS)
    assert report.examples[0].source == "trials/003/predictions.jsonl"


def test_a_comparison_s_report_is_against_the_written_prompt(tmp_path: Path):
    report = read_report(WRITERS["comparison"](tmp_path / "comparison"))
    assert [bar.value for bar in report.bars[0].bars] == ["0.750", "0.500", "0.250"]
    assert [own.count for own in report.examples] == [3, 1]
    assert report.tables[0].rows[1][1:4] == ["+0.250 [0.100, 0.400]", "0.04", "0.03"]
    assert ("best written prompt", MARKUP) in report.prompt


def test_parts_that_a_run_does_not_have_are_left_out(tmp_path: Path):
    """Answers in text, and a run of an older version without data to compare on."""
    workdir = write_run(tmp_path / "text")
    lines = [
        {"prompt": name, "record": 1, "fields": {"text": "a"}, "prediction": answer, "reference": "The cat."}
        for name, answer in (("soft_prompt", "a cat"), ("hard_prompt", "a dog"))
    ]
    write(workdir / "predictions.jsonl", *lines)
    results = json.loads((workdir / "results.json").read_text())
    scores = {"perplexity": 3.5, "loss": 1.25, "examples": 1, "exact_match": 1.0, "exact_match_interval": [1.0, 1.0]}
    kept = {name: results[name] for name in ("steps", "best_step", "command", "versions")}
    write(workdir / "results.json", {**kept, "test": {"soft_prompt": scores, "hard_prompt": None, "no_prompt": None}})
    report = read_report(workdir)
    assert report.figures[0].value == "1.000" and [own.count for own in report.examples] == [1, 0]
    assert not report.confusions and not report.tokens and not report.summary
    for name in ("predictions.jsonl", "metrics.jsonl"):
        (workdir / name).write_text("")
    write(workdir / "results.json", kept)
    report = read_report(workdir)
    assert not report.examples and not report.bars and not report.charts
    assert "of 120" in Page(render(report)).text


def test_a_directory_without_results_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["report", str(tmp_path)]) == 2
    assert f"there is no {tmp_path / 'config.json'}" in capsys.readouterr().err
    write_run(tmp_path / "run")
    (tmp_path / "run" / "results.json").write_text("{")
    with pytest.raises(ConfigError, match=r"results.json cannot be read"):
        read_report(tmp_path / "run")
    write_run(tmp_path / "run")
    assert main(["report", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run' / 'report.html'}\n"


def test_texts_that_utf_8_cannot_hold_and_numbers_that_are_none(tmp_path: Path):
    workdir = write_run(tmp_path / "run")
    lines = (workdir / "predictions.jsonl").read_text()
    (workdir / "predictions.jsonl").write_text(lines.replace("record 2", "record \\ud800"))
    (workdir / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": Infinity}\n')
    assert "record ?" in write_report(workdir).read_text()


def test_ticks_are_round_numbers():
    assert ticks(0.0, 1.0, 5) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(0.0, 600.0, 5) == [0.0, 200.0, 400.0, 600.0]
    assert ticks(-0.013, 0.021, 4) == [-0.01, 0.0, 0.01, 0.02]


def test_long_lines_are_averaged():
    points = [(x, float(y)) for x, y in enumerate(np.random.default_rng(0).normal(size=1000))]
    found = thinned(points, 250)
    np.testing.assert_allclose(found, np.asarray(points).reshape(250, 4, 2).mean(axis=1), atol=1e-12)
    expected = np.convolve([y for _, y in points], np.ones(20) / 20, mode="valid")
    np.testing.assert_allclose([y for _, y in smoothed(points, 20)], expected, atol=1e-12)
    assert line_chart([Line([(1, float("nan"))])], label="nothing") is None
    assert "nan" not in (line_chart([Line([(5, 2.0)])], label="one point") or "nan")


def test_scores_beyond_shares_have_a_scale_of_their_own():
    bars = bars_of("loss", [("a", -2.4, [-2.6, -2.2], True), ("b", float("nan"), None, False)], share=False)
    assert bars is not None and bars.scale == ("-2.6", "-2.2")
    assert [bar.ends for bar in bars.bars] == [(50.0, 0.0, 100.0)]
    assert bars_of("loss", [("b", float("nan"), None, False)], share=False) is None


def test_scores_of_classes_follow_from_the_counts():
    """Of a: 2 right of 3 records and 4 predictions."""
    pairs = ["aa", "aa", "ab", "ba", "bb", "ca", "cx"]
    report = class_report([{"label": a, "prediction": b} for a, b in pairs], ["a", "b", "c", "d"])
    assert report is not None
    assert report["confusion"] == [[2, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 1], [0] * 5]
    expected = {"precision": 0.5, "recall": pytest.approx(2 / 3), "f1": pytest.approx(4 / 7), "records": 3}
    assert report["scores"]["a"] == expected
    assert report["scores"]["d"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "records": 0}
    tagged = class_report([{"label": ["a", "b"], "prediction": ["a", "a"]}], ["a", "b"])
    assert tagged is not None and tagged["confusion"] == [[1, 0, 0], [1, 0, 0]]
    assert class_report([{"label": "e", "prediction": "a"}], ["a"]) is None
    assert class_report([{"prediction": "a", "reference": "b"}], ["a"]) is None


def test_predictions_hold_the_texts_of_their_records():
    records = [{"text": "a", "label": "x", "words": ["b", "c"], "score": np.float32(0.5)}]
    (found,) = with_fields([{"prediction": "x"}], records, ("text", "words", "score", "absent"))
    assert found == {"fields": {"text": "a", "words": '["b", "c"]', "score": "0.5"}, "prediction": "x"}


def test_systems_are_compared_by_a_measure_that_both_have():
    ours = [{"label": "a", "prediction": own, "tokens": 1, "log_probability": -1.0} for own in "aab"]
    theirs = [{"label": "a", "prediction": own} for own in "abb"]
    found = compared(ours, theirs)
    assert found is not None and found["measure"] == "accuracy" and found["ahead"] == pytest.approx(1 / 3)
    assert found["p_mcnemar"] == 1.0
    assert "p_mcnemar" not in advantage(np.asarray([0.5, 1.0]), np.asarray([0.0, 1.0]))
    assert compared(ours, [{"reference": "a", "prediction": "a"}]) is None


def test_nearest_words_are_those_of_the_whole_table(monkeypatch: pytest.MonkeyPatch):
    base = tiny_base()
    rows = np.random.default_rng(0).normal(size=(3, base.config.width)).astype(np.float32)
    monkeypatch.setattr("spt_jax.evaluation.inspection.VOCABULARY_PART", 100)
    found = nearest_words(base, VirtualPrompt(tokens=jnp.asarray(rows)), 4)
    expected = nearest_tokens(rows, base.model.embedding_table()[: len(base.tokenizer)], 4)
    for ours, theirs in zip(found, expected, strict=True):
        assert [word for word, _ in ours] == [base.tokenizer.convert_ids_to_tokens(id_) for id_, _ in theirs]
        np.testing.assert_allclose([cosine for _, cosine in ours], [cosine for _, cosine in theirs], atol=1e-5)
    assert nearest_words(base, VirtualPrompt(), 4) == []


def test_the_commit_is_that_of_git(tmp_path: Path):
    def git(*words: str) -> str:
        line = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(line, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    assert git_commit(tmp_path) is None and git_commit(tmp_path / "none") is None
    git("init", "-q")
    (tmp_path / "file").write_text("a")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "--short=12", "HEAD")
    assert provenance(tmp_path)["git_commit"] == commit
    (tmp_path / "file").write_text("b")
    assert git_commit(tmp_path) == f"{commit}+changes"
