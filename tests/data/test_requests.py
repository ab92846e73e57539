"""Texts and named fields become records."""

import pytest

from spt_jax.data.encoder import encoder_for
from spt_jax.data.requests import field_record, text_records
from spt_jax.data.templates import Template
from spt_jax.errors import ConfigError
from spt_jax.testing import tiny_base

ONE = Template(prompt="{text} is", target="{label}")
TWO = Template(prompt="{question} {context}", target="{answer}")
CHAT = Template(prompt="{messages}")


@pytest.mark.parametrize(
    ("template", "texts", "records"),
    [
        (ONE, ["a", [3, 4]], [{"text": "a"}, {"text": [3, 4]}]),
        (CHAT, ["a"], [{"messages": [{"role": "user", "content": "a"}]}]),
        (TWO, [], None),
        (Template(prompt="Hello", target="{answer}"), ["a"], None),
    ],
)
def test_a_text_is_the_only_field_or_the_users_turn(template, texts, records):
    if records is not None:
        assert text_records(template, texts) == records
        return
    with pytest.raises(ConfigError, match=r"the template has the fields (question, context|none); give them by name"):
        text_records(template, texts)


def test_fields_have_the_names_of_the_template():
    assert field_record(TWO, {"question": "q", "context": "c"}) == {"question": "q", "context": "c"}
    with pytest.raises(ConfigError, match=r"the template has no field 'contxt'; did you mean 'context'\?"):
        field_record(TWO, {"question": "q", "contxt": "c"})


@pytest.mark.parametrize(
    ("taken", "max_length", "expected"), [(0, None, 128), (8, None, 120), (8, 50, 50), (100, 50, 28)]
)
def test_an_encoder_has_the_positions_that_are_left(taken, max_length, expected):
    base = tiny_base()
    encoder = encoder_for(base, ONE, taken=taken, max_length=max_length)
    assert (base.config.max_positions, encoder.max_length) == (128, expected)
    shots = [{"text": "b", "label": "c"}]
    with_shots = encoder_for(base, ONE, shots=shots).prompt_ids({"text": "a"})
    assert len(with_shots) > len(encoder.prompt_ids({"text": "a"}))
