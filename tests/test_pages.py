"""The Python on the pages about the Python interfaces runs as it stands there, on a tiny base."""

import re
from pathlib import Path

import pytest

import spt_jax
from spt_jax.testing import tiny_base

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def run(page: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict:
    """The names that a page defines, with a tiny base in place of the starter."""
    base = tiny_base()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(spt_jax, "load_base", lambda name: base)
    monkeypatch.setattr("spt_jax.api.prompt.load_base", lambda name, revision, quantize: base)
    names: dict = {"__name__": "page"}
    for block in blocks(page):
        exec(compile(block, page, "exec"), names)
    return names


def test_the_short_api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names = run("python.md", monkeypatch, tmp_path)
    losses = [line["loss"] for line in names["result"].history if "loss" in line]
    assert losses[-1] < 0.5 * losses[0] and names["result"].validation is not None
    assert names["prompt"].template.verbalizers == {"billing": "billing", "returns": "returns"}
    assert names["focal"].history[9]["loss"] < names["focal"].history[0]["loss"]
    assert names["early"].validation["accuracy"] == 1 and names["early"].steps < 80
    own = next(block for block in blocks("python.md") if "class FocalLoss" in block)
    assert len(own.splitlines()) <= 25


def test_the_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two examples: a coin would have a loss of 0.69."""
    names = run("functional.md", monkeypatch, tmp_path)
    assert float(names["metrics"]["loss"]) < 0.1
    assert sorted(standing.steps for standing in names["standings"]) == [10, 10, 20, 40]
    assert max(standing.best.metrics["accuracy"] for standing in names["standings"]) == 1
    assert len(blocks("functional.md")[0].splitlines()) <= 25


def test_your_own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names = run("your_own_model.md", monkeypatch, tmp_path)
    assert names["classes"] == ["good", "bad"]
    losses = [line["loss"] for line in names["result"].history]
    assert losses[-1] < 0.5 * losses[0]
