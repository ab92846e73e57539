"""Pairs of answers in the column conventions of TRL, and what is refused."""

import dataclasses

import numpy as np
import pytest

from spt_jax.data.encoder import Encoder
from spt_jax.data.preferences import chat_pair
from spt_jax.data.sources import check_fields
from spt_jax.data.task import task_of
from spt_jax.data.templates import Template
from spt_jax.errors import ConfigError, DataError
from spt_jax.testing import tiny_tokenizer
from tests.chat_layouts import LAYOUTS

V = 1000
PAIR = {"prompt": "the question", "chosen": "good", "rejected": "bad one"}


def template(prompt="<soft>{prompt}\n", target="{chosen}", rejected="{rejected}", **options) -> Template:
    virtual = 3 if "<soft>" in prompt else 0
    return Template(
        prompt=prompt, target=target, rejected=rejected, virtual_tokens=virtual, head="preference", **options
    )


def encoder(length: int = 100, tokenizer=None, **options) -> Encoder:
    return Encoder(template(**options), tokenizer or tiny_tokenizer(), V, length)


def chat(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def text_of(tokenizer, ids) -> str:
    return tokenizer.decode([i for i in ids if i < V])


def test_both_answers_are_choices_of_one_prompt():
    own, tokenizer = encoder(target=" {chosen}", rejected=" {rejected}!"), tiny_tokenizer()
    example = own.encode(PAIR, 4)
    assert example.ids.tolist() == [1, V, V + 1, V + 2, *tokenizer.encode("the question\n", add_special_tokens=False)]
    assert [text_of(tokenizer, choice) for choice in example.choices] == [" good<eos>", " bad one!<eos>"]
    assert example.label == 0 and example.index == 4 and not example.predicted.any()
    assert text_of(tokenizer, example.as_target().ids).endswith("the question\n good<eos>")


@pytest.mark.parametrize("name", ["gemma", "llama3"])
def test_conversations_of_every_form_have_the_ids_of_transformers(name):
    """An explicit prompt with answers as messages or text, and an implicit one: the same pair, with the chat template's
    own ids."""
    tokenizer = LAYOUTS[name].tokenizer()
    own = encoder(300, tokenizer, prompt="{messages}")
    context, good, bad = chat("Hello", "good", "the question"), chat("", "yes")[1:], chat("", "not at all")[1:]
    forms = [
        {"prompt": context, "chosen": good, "rejected": bad},
        {"messages": context, "chosen": "yes", "rejected": "not at all"},
        {"chosen": [*context, *good], "rejected": [*context, *bad]},
        {"prompt": None, "chosen": [*context, *good], "rejected": [*context, *bad]},
    ]
    asked = tokenizer.apply_chat_template(context, tokenize=True, return_dict=False, add_generation_prompt=True)
    end = tokenizer.convert_tokens_to_ids(LAYOUTS[name].end)
    for form in forms:
        check_fields([form], task_of(own.template).required_fields(own.template), "pairs")
        example = own.encode(form, 0)
        assert example.ids.tolist() == asked
        for choice, answer in zip(example.choices, (good, bad), strict=True):
            whole = tokenizer.apply_chat_template([*context, *answer], tokenize=True, return_dict=False)
            assert [*asked, *choice] == whole[: len(asked) + len(choice)]
            assert choice[-1] == end


def test_a_prompt_and_its_answers_are_rendered_as_a_chat():
    tokenizer = LAYOUTS["llama3"].tokenizer()
    example = encoder(300, tokenizer, prompt="{prompt}", chat=True).encode(PAIR, 0)
    turn = [{"role": "user", "content": "the question"}]
    assert example.ids.tolist() == tokenizer.apply_chat_template(
        turn, tokenize=True, return_dict=False, add_generation_prompt=True
    )
    good, bad = (text_of(tokenizer, choice) for choice in example.choices)
    assert good.startswith("good<") and bad.startswith("bad one<")


def test_a_long_prompt_is_shortened_for_the_longer_answer():
    record = {**PAIR, "prompt": "word " * 200}
    example = encoder(60, truncate="prompt").encode(record, 0)
    assert 55 < example.length <= 60 and len(example.choices[1]) > len(example.choices[0])
    assert text_of(tiny_tokenizer(), example.choices[1]) == "bad one<eos>"
    with pytest.raises(DataError, match=r"record 1: .* tokens, at most 60 fit; name a field"):
        encoder(60).encode(record, 0)


CONTEXT = chat("Hello")
CHATS = {"chosen": chat("Hello", "a"), "rejected": chat("Hello", "b")}


@pytest.mark.parametrize(
    ("prompt", "record", "problem"),
    [
        (
            "{prompt}",
            {**PAIR, "rejected": "good"},
            r"record 3: the chosen and the rejected answer are equal \('good'\)",
        ),
        ("{prompt}", {**PAIR, "chosen": " \n"}, "record 3: the chosen answer is empty"),
        ("{prompt}", {**PAIR, "rejected": ""}, "record 3: the rejected answer is empty"),
        ("{prompt}", {"prompt": "a", "chosen": "b"}, "record 3: no field 'rejected'"),
        ("{prompt}", {**PAIR, "chosen": None}, "record 3: the field 'chosen' is null"),
        ("{prompt}", {**PAIR, "prompt": CONTEXT}, r"'prompt' is a list of messages; use \{messages\} in data.prompt"),
        ("{messages}", {**PAIR, "prompt": "Hello"}, "record 3: the field 'prompt' is no list of messages"),
        ("{messages}", {"chosen": CHATS["chosen"]}, "record 3: the field 'rejected' is missing"),
        ("{messages}", {**CHATS, "rejected": chat("Hi", "b")}, "have different prompts, from message 1 on"),
        (
            "{messages}",
            {**CHATS, "rejected": chat("Hello", "a", "c", "d")},
            "have different prompts, from message 2 on",
        ),
        ("{messages}", {name: side[1:] for name, side in CHATS.items()}, "no message before the answer"),
        (
            "{messages}",
            {**CHATS, "rejected": CHATS["chosen"]},
            "record 3: the chosen and the rejected answer are equal",
        ),
        ("{messages}", {**CHATS, "rejected": chat("Hello", " ")}, "record 3: the rejected answer is empty"),
        ("{messages}", {**CHATS, "prompt": CONTEXT}, "record 3: the field 'chosen' has 2 messages beside the field"),
        ("{messages}", {"chosen": chat("a", "b", "c"), "rejected": chat("a", "b", "d")}, "has the role 'user'"),
        ("{messages}", {"prompt": CONTEXT, "chosen": "a", "rejected": 3.0j}, "it must be text or a number"),
    ],
)
def test_bad_records_are_named(prompt, record, problem):
    with pytest.raises(DataError, match=problem):
        encoder(300, LAYOUTS["llama3"].tokenizer(), prompt=prompt).encode(record, 2)


def test_answers_of_equal_tokens_are_refused():
    """Two texts that the tokenizer cannot tell apart; here, because both are only the end of the text."""
    own = encoder()
    own.encode_target = lambda *_: [5, 2]  # type: ignore[method-assign]
    with pytest.raises(DataError, match="record 1: the chosen and the rejected answer have the same tokens"):
        own.encode(PAIR, 0)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"rejected": ""}, "needs data.target and data.rejected"),
        ({"rejected": "{chosen}"}, "all answers are equal"),
        ({"rejected": "<soft>{rejected}"}, "virtual tokens belong to the prompt"),
        ({"verbalizers": {"a": "b", "c": "d"}}, "data.verbalizers are classes"),
        ({"prompt": "{messages}", "target": " {chosen}"}, "one field each"),
        ({"reads": "prompt"}, "data.reads"),
    ],
)
def test_bad_templates_are_refused(options, problem):
    with pytest.raises(ConfigError, match=problem):
        template(**options)
    with pytest.raises(ConfigError, match=r"needs task\.name=preference"):
        dataclasses.replace(template(), head="language_model")


def test_the_prompt_is_taken_from_the_messages_before_the_column_prompt():
    pair = chat_pair({"messages": CONTEXT, "prompt": "x", "chosen": "a", "rejected": "b"}, "chosen", "rejected", 0)
    assert [side[-1]["content"] for side in (pair.chosen, pair.rejected)] == ["a", "b"]
    assert list(pair.chosen[:-1]) == list(pair.rejected[:-1]) == CONTEXT
    np.testing.assert_equal(len(pair.chosen), 2)
