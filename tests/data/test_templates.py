"""The template language and its checks."""

import dataclasses

import pytest

from spt_jax.data.templates import Bos, Field, Template, Text, Virtual, parse, virtual_length
from spt_jax.errors import ConfigError


def test_parse():
    assert parse("<bos><soft:2>a {{x}} {text}!<soft>") == [
        Bos(), Virtual(2), Text("a {x} "), Field("text"), Text("!"), Virtual(None),
    ]  # fmt: skip


@pytest.mark.parametrize("template", ["{", "a } b", "{not a name}", "<soft:0>"])
def test_bad_markup(template):
    with pytest.raises(ConfigError):
        parse(template)


def test_soft_counts():
    assert virtual_length("<soft:5>{a}<soft:2>") == 7
    assert virtual_length("<soft>{a}") is None
    with pytest.raises(ConfigError, match="only once"):
        virtual_length("<soft>{a}<soft:2>")
    with pytest.raises(ConfigError, match="places 7"):
        Template(prompt="<soft:5>{a}<soft:2>", target="{b}", virtual_tokens=8)
    with pytest.raises(ConfigError, match="no <soft>"):
        Template(prompt="{a}", target="{b}", virtual_tokens=8)
    assert Template(prompt="<soft:5>{a}<soft:2>", target="{b}").virtual_tokens == 7


def test_bad_templates():
    with pytest.raises(ConfigError, match="exactly one field"):
        Template(prompt="{a}", target="x", verbalizers={"a": "b"})
    with pytest.raises(ConfigError, match="did you mean 'text'"):
        Template(prompt="{text}", target="{label}", truncate="txt")
    with pytest.raises(ConfigError, match="target is empty"):
        Template(prompt="{text}")


def test_bare_templates_keep_the_task():
    template = Template(prompt="<soft:2>{t}<soft:1>", target="{label}", virtual_tokens=3, truncate="t")
    assert template.bare().prompt == "{t}" and template.bare().truncate == "t"
    assert template.bare("Q: {q}").truncate is None
    assert dataclasses.replace(template.bare(), prompt="<soft:2>{t}<soft:1>", virtual_tokens=3) == template
