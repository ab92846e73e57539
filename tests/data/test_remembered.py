"""The ids of a remembered text and of what follows it are those of both together, whatever the tokenizer."""

import dataclasses
import functools

import pytest

from spt_jax.data.encoder import encoder_for
from spt_jax.data.remembered import remembered_system, remembered_text, system_ids
from spt_jax.data.templates import MESSAGES, Template
from spt_jax.errors import ConfigError, DataError
from spt_jax.evaluation.after_text import ids_after_text
from spt_jax.testing import BOS_ID, tiny_base, tiny_tokenizer
from tests.chat_layouts import LAYOUTS

# Ends of a text that merge with what follows, and those that do not.
ENDS = (
    "",
    " world",
    "\n",
    " and the\n\n",
    " {good}",
    ' "wor',
    " good.",
    " ",
    "  ",
    " <soft>\n",
    " 12",
    "é",
    "\nText: ",
)
NEXT = ("ld of text", " the world", "\n\nQuestion", "", "34", ".", " <bos> {a}", "\u0301")


@functools.cache
def bare_base():
    return tiny_base(vocab_size=420, max_position_embeddings=4096)


def base_of(tokenizer):
    return dataclasses.replace(bare_base(), tokenizer=tokenizer)


@pytest.mark.parametrize("kind", ["byte", "sentencepiece"])
@pytest.mark.parametrize("add_bos", [True, False])
def test_a_text_and_its_continuation_have_the_ids_of_both(kind, add_bos):
    base = base_of(tiny_tokenizer(kind, add_bos=add_bos))
    for end in ENDS:
        text = f"Hello world of text{end}"
        found = remembered_text(base, text)
        encoder = encoder_for(base, found.template)
        assert len(found.ids) >= 5 - 2, "most of the text is in the prefix"
        for following in NEXT:
            ids = [*found.ids, *encoder.prompt_ids({"text": following})]
            front = [BOS_ID] if add_bos else []
            plain = base_of(tiny_tokenizer(kind, add_bos=False)).tokenizer
            whole = plain.backend_tokenizer
            whole.encode_special_tokens = True
            assert ids == [*front, *whole.encode(text + following, add_special_tokens=False).ids], (end, following)


def test_names_of_control_tokens_are_text_unless_asked():
    base = base_of(tiny_tokenizer())
    plain, control = (
        remembered_text(base, "<bos>Hello<eos>\n", control_tokens=control).ids.tolist() for control in (False, True)
    )
    assert plain[0] == BOS_ID and BOS_ID not in plain[1:] and base.tokenizer.eos_token_id not in plain
    assert control == base.tokenizer("<bos>Hello<eos>\n", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", ["", " \n\t "])
def test_an_empty_text_is_refused(text):
    with pytest.raises(DataError, match="the text is empty"):
        remembered_text(base_of(tiny_tokenizer()), text)


def test_a_text_longer_than_the_context_is_refused_with_the_numbers():
    base = base_of(tiny_tokenizer())
    with pytest.raises(DataError, match=r"has 5,001 tokens and tiny-llama has 4,096 positions"):
        remembered_text(base, "0" * 5000)
    with pytest.raises(DataError, match="4,194,304 characters"):
        remembered_text(base, "0" * 2**22)


CHATS = (
    [{"role": "user", "content": "the question"}],
    [{"role": "user", "content": "\n a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "<eos>"}],
)
WITHOUT_SYSTEM = ("gemma", "mistral", "mistral-v3")


@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - set(WITHOUT_SYSTEM)))
def test_a_chat_continues_its_remembered_system_turn(layout):
    base = base_of(LAYOUTS[layout].tokenizer())
    plain = encoder_for(base, Template(prompt=f"{{{MESSAGES}}}"))
    for text in ("Answer the question in the world of text.\n", "wor", "a <bos> {b}"):
        found = remembered_system(base, text)
        encoder = encoder_for(base, found.template)
        assert encoder.end_ids == plain.end_ids
        for chat in CHATS:
            whole = [{"role": "system", "content": text}, *chat]
            ids = [*found.ids, *encoder.prompt_ids({MESSAGES: chat})]
            assert ids == plain.prompt_ids({MESSAGES: whole}).tolist()
        learned = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        own = encoder.encode({MESSAGES: learned}, 0)
        whole = plain.encode({MESSAGES: [{"role": "system", "content": text}, *learned]}, 0)
        assert [*found.ids, *own.ids] == whole.ids.tolist()
        assert own.predicted.tolist() == whole.predicted[len(found.ids) :].tolist()


@pytest.mark.parametrize("layout", WITHOUT_SYSTEM)
def test_a_template_without_system_turns_is_refused(layout):
    with pytest.raises(ConfigError, match="chat template"):
        remembered_system(base_of(LAYOUTS[layout].tokenizer()), "Be brief.\n")


def test_a_template_that_moves_the_system_turn_is_refused():
    """The system turn of some templates is part of the last user turn."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{% set told = messages[0].content %}{% set said = messages[1:] %}"
        "{% else %}{% set said = messages %}{% endif %}{% for m in said %}<bos>"
        "{% if loop.last and told is defined %}{{ told + '\n' }}{% endif %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(ConfigError, match="does not begin every chat with its system turn"):
        remembered_system(base_of(tokenizer), "Be brief.")


def test_a_second_system_turn_is_refused():
    base = base_of(LAYOUTS["llama3"].tokenizer())
    encoder = encoder_for(base, remembered_system(base, "Be brief.\n").template)
    with pytest.raises(DataError, match="the prompt holds one already"):
        encoder.prompt_ids({MESSAGES: [{"role": "system", "content": "No."}, *CHATS[0]]})


def test_a_baseline_without_the_prefix_continues_nothing():
    template = remembered_text(base_of(tiny_tokenizer()), "Hello world\n").template
    assert template.continues and not template.bare().continues
    with pytest.raises(ConfigError, match="without system"):
        Template(prompt=f"{{{MESSAGES}}}", continues=True)


def test_ids_of_a_system_turn_and_a_chat_are_those_of_both_unless_it_is_refused():
    """A template that writes a default system turn has no such ids."""
    refused = set()
    for layout in sorted(set(LAYOUTS) - set(WITHOUT_SYSTEM)):
        base = base_of(LAYOUTS[layout].tokenizer())
        encoder, system = encoder_for(base, Template(prompt=f"{{{MESSAGES}}}")), "Be brief.\n"
        try:
            found = system_ids(base, system)
        except ConfigError:
            refused.add(layout)
            continue
        for chat in CHATS:
            whole = encoder.prompt_ids({MESSAGES: [{"role": "system", "content": system}, *chat]})
            alone = encoder.prompt_ids({MESSAGES: chat})
            assert ids_after_text(base, found, alone).tolist() == whole.tolist()
    assert refused == {"llama2", "qwen2", "zephyr"}
