"""README's Python runs as it stands there. `test_docs.py` checks its links and commands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_python_example_is_short_and_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(block.splitlines()) <= 15
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    first, last = (names["result"].history[i]["loss"] for i in (0, -1))
    assert last < 0.1 < first  # a coin would have a loss of 0.69
    assert names["prompt"].classify([record["text"] for record in names["train"]]) == ["billing", "returns"]
    classified, *generated = capsys.readouterr().out.splitlines()
    assert classified == "['billing', 'returns']" and any(generated)
