"""Every end of an answer that a model's files declare is found."""

import json

import pytest

from spt_jax.bases.base import load_base
from spt_jax.bases.ends import declared_ends
from spt_jax.errors import CheckpointError
from spt_jax.testing import EOS_ID, tiny_tokenizer, write_tiny_checkpoint


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, None, [EOS_ID]),
        (None, 7, [EOS_ID, 7]),
        (7, None, [EOS_ID, 7]),
        ([5, 7], EOS_ID, [EOS_ID, 5, 7]),
        ([EOS_ID, 9], [5, 7], [EOS_ID, 5, 7, 9]),
        ([], -1, [EOS_ID]),
        ([319, 320], None, [EOS_ID, 319]),  # the model has 320 ids
    ],
)
def test_ends_of_all_files_count(tmp_path, generation, config, expected):
    for name, value in (("generation_config.json", generation), ("config.json", config)):
        (tmp_path / name).write_text(json.dumps({} if value is None else {"eos_token_id": value}))
    assert declared_ends(tmp_path, tiny_tokenizer(), 320) == tuple(expected)


def test_without_files_and_without_an_eos(tmp_path):
    tokenizer = tiny_tokenizer()
    assert declared_ends(tmp_path, tokenizer, 320) == (EOS_ID,)
    tokenizer.eos_token = None
    assert declared_ends(tmp_path, tokenizer, 320) == ()


def test_a_base_has_them(tmp_path):
    write_tiny_checkpoint(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [40, 41]}))
    assert load_base(tmp_path).end_ids == (EOS_ID, 40, 41)


@pytest.mark.parametrize("declared", ['"</s>"', "[1, null]", "true", "1.5", "{}", "not JSON"])
def test_what_is_not_an_id_is_refused(tmp_path, declared):
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {declared}}}')
    with pytest.raises(CheckpointError, match=r"generation_config\.json: "):
        declared_ends(tmp_path, tiny_tokenizer(), 320)
