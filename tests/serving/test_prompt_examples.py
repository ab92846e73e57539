"""Examples come from a prompt's directory, and nothing but short texts for its fields does."""

import json
from pathlib import Path

import pytest

from spt_jax.errors import ConfigError
from spt_jax.serving.prompt_examples import EXAMPLES_FILE, examples_for, read_examples


def test_texts_stand_for_the_only_field(tmp_path: Path):
    assert read_examples(tmp_path) == []
    (tmp_path / EXAMPLES_FILE).write_text(json.dumps(["a", {"text": "b"}, {"question": "c", "answer": "d"}]))
    found = read_examples(tmp_path)
    assert examples_for(found, ["text"]) == [{"text": "a"}, {"text": "b"}]
    assert examples_for(found, ["answer", "question"]) == [{"question": "c", "answer": "d"}]
    assert examples_for(found, []) == []
    (tmp_path / EXAMPLES_FILE).write_text(json.dumps([str(number) for number in range(50)]))
    assert read_examples(tmp_path) == [str(number) for number in range(12)]


@pytest.mark.parametrize(
    "content", ["{", "3", "[3]", '[{"text": 3}]', '["\\ud800"]', f'["{"a" * 2001}"]', "[" * 100_000]
)
def test_anything_else_is_refused(tmp_path: Path, content: str):
    (tmp_path / EXAMPLES_FILE).write_text(content)
    with pytest.raises(ConfigError, match=EXAMPLES_FILE):
        read_examples(tmp_path)
