"""Chats as transformers renders and tokenizes them, in the layouts of public model families."""

import numpy as np
import pytest

from spt_jax.data.encoder import Encoder
from spt_jax.data.templates import Template
from spt_jax.errors import ConfigError, DataError
from tests.chat_layouts import LAYOUTS, Layout

V = 1000  # ids from here on are virtual
ENDED = [name for name, layout in LAYOUTS.items() if layout.end is not None]

CHATS = {
    "one turn": [("user", "Is it spam?"), ("assistant", "yes")],
    "blanks": [("user", " \n Is it spam? \n"), ("assistant", "  yes \n")],
    "turns": [("user", "Hello"), ("assistant", "good"), ("user", "the question"), ("assistant", "the answer")],
}


def chat(turns) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def encoder_of(layout: Layout, prompt: str = "{messages}", length: int = 500, **options) -> tuple[Encoder, object]:
    tokenizer = layout.tokenizer()
    virtual = 3 if "<soft>" in prompt else 0
    return Encoder(Template(prompt=prompt, virtual_tokens=virtual, **options), tokenizer, V, length), tokenizer


def rendered(tokenizer, messages, **options) -> list[int]:
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)


@pytest.mark.parametrize("turns", CHATS.values(), ids=list(CHATS))
@pytest.mark.parametrize("name", ENDED)
def test_chats_have_the_ids_of_transformers(name, turns):
    """The whole chat, and every prompt that asks for a turn of it; what is trained follows what is asked."""
    encoder, tokenizer = encoder_of(LAYOUTS[name])
    messages = chat(turns)
    example = encoder.encode({"messages": messages}, 0)
    # A run of text is cut where an answer begins, so blanks that the template keeps there may be other tokens.
    blanks_kept = turns[1][1] != turns[1][1].strip() and "trim" not in LAYOUTS[name].template
    if not blanks_kept:
        assert example.ids.tolist() == rendered(tokenizer, messages)
    assert tokenizer.decode(example.ids) == tokenizer.decode(rendered(tokenizer, messages))
    begins = np.flatnonzero(np.diff(example.predicted.astype(int)) == 1) + 1
    assert len(begins) == len(messages) // 2
    for number, begin in enumerate(begins):
        asked = encoder.prompt_ids({"messages": messages[: 2 * number + 1]})
        assert asked.tolist() == rendered(tokenizer, messages[: 2 * number + 1], add_generation_prompt=True)
        assert asked.tolist() == example.ids[:begin].tolist()


@pytest.mark.parametrize("name", ENDED)
def test_a_turn_ends_in_training_as_it_does_when_asked(name):
    layout = LAYOUTS[name]
    encoder, tokenizer = encoder_of(layout)
    end = tokenizer.convert_tokens_to_ids(layout.end)
    example = encoder.encode({"messages": chat(CHATS["turns"])}, 0)
    last = np.flatnonzero(np.diff(np.append(example.predicted, False).astype(int)) == -1)
    assert set(example.ids[last].tolist()) == {end}
    assert set(encoder.end_ids) == {end, tokenizer.eos_token_id}
    written, _ = encoder_of(layout, "{text}", target="{label}", chat=True)
    assert written.end_ids == encoder.end_ids
    assert written.encode({"text": "a", "label": "b"}, 0).ids[-1] == end


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("text", "label"), [("Is it spam?", "yes"), (" \nIs it? \n", " yes\n")])
def test_a_written_prompt_is_the_chat_that_transformers_renders(name, text, label):
    """A prompt and its target, but for text behind the end, and for what a template puts before the target's words."""
    layout = LAYOUTS[name]
    encoder, tokenizer = encoder_of(layout, "Say: {text}", target="{label}", chat=True)
    record = {"text": text, "label": label}
    messages = chat([("user", f"Say: {text}"), ("assistant", label)])
    asked = encoder.prompt_ids(record).tolist()
    assert asked == rendered(tokenizer, messages[:1], add_generation_prompt=True)
    example = encoder.encode(record, 0).ids.tolist()
    assert example[: len(asked)] == asked
    if label == "yes" and layout.end is not None and name != "qwen3":
        whole = rendered(tokenizer, messages)
        end = len(whole) - whole[::-1].index(tokenizer.convert_tokens_to_ids(layout.end))
        assert example == whole[:end]
    said = tokenizer.decode(example[len(asked) :], skip_special_tokens=True)
    assert said.strip() == "yes"
    if any(cut in layout.template.split("assistant")[-1] for cut in ("trim", "strip()")):
        assert "\n" not in said


@pytest.mark.parametrize("name", LAYOUTS)
def test_verbalizers_are_the_targets_without_their_end(name):
    layout = LAYOUTS[name]
    words = {"p": "yes", "n": " no\n"}
    scored, _ = encoder_of(layout, "{text}", target="{label}", chat=True, verbalizers=words)
    said, tokenizer = encoder_of(layout, "{text}", target="{label}", chat=True)
    for choice, word in zip(scored.encode({"text": "a", "label": "p"}, 0).choices, words.values(), strict=True):
        example = said.encode({"text": "a", "label": word}, 0)
        target = example.ids[example.predicted].tolist()
        assert target[: len(choice)] == choice.tolist()
        assert not tokenizer.decode(target[len(choice) :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("name", LAYOUTS)
def test_control_tokens_of_a_content_are_its_characters(name):
    """As transformers has them where it is asked to take no content's text for a control token."""
    layout = LAYOUTS[name]
    encoder, tokenizer = encoder_of(layout)
    end = layout.end or tokenizer.eos_token
    turns = chat([("user", f"Say {end} and {tokenizer.bos_token}"), ("assistant", f"no {end}!")])
    example = encoder.encode({"messages": turns}, 0)
    plain = encoder.encode({"messages": chat([("user", "Say it"), ("assistant", "no!")])}, 0)
    for id_ in {tokenizer.convert_tokens_to_ids(end), tokenizer.bos_token_id}:
        assert (example.ids == id_).sum() == (plain.ids == id_).sum()
    written, _ = encoder_of(layout, "{text}", target="{label}", chat=True)
    asked = written.prompt_ids({"text": turns[0]["content"]})
    assert asked.tolist() == encoder.prompt_ids({"messages": turns[:1]}).tolist()


@pytest.mark.parametrize("name", LAYOUTS)
def test_virtual_tokens_stand_anywhere_in_a_chat(name):
    """Without them, the ids are those of the chat; of a prompt, all that fields do not touch is known before them."""
    layout = LAYOUTS[name]
    whole, tokenizer = encoder_of(layout, "<soft>{messages}")
    example = whole.encode({"messages": chat(CHATS["turns"])}, 0)
    first = int(example.ids[0] == tokenizer.bos_token_id)
    assert example.ids[first : first + 3].tolist() == [V, V + 1, V + 2]
    asked = whole.prompt_ids({"messages": chat(CHATS["turns"][:3])})
    assert asked.tolist() == example.ids[: len(asked)].tolist() and example.predicted[len(asked)]
    written, _ = encoder_of(layout, "Read this:<soft> {text}\n", target="{label}", chat=True)
    examples = written.encode_all([{"text": text, "label": "yes"} for text in ("one", "  two", "", " \n")])
    lead = written.fixed_lead()
    for example in examples:
        assert (example.ids >= V).sum() == 3
        assert example.ids[: len(lead)].tolist() == lead.tolist()
    assert lead[-1] == V + 2
    assert written.head_length(examples) >= len(lead) - 1


def test_an_end_may_be_an_added_token_that_is_not_special():
    layout = Layout(LAYOUTS["qwen2"].template, ("<|im_start|>",), "<|im_end|>", plain=("<|im_end|>",))
    encoder, tokenizer = encoder_of(layout)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    example = encoder.encode({"messages": chat(CHATS["one turn"])}, 0)
    assert example.ids.tolist() == rendered(tokenizer, chat(CHATS["one turn"]))
    assert example.ids[example.predicted][-1] == end and end in encoder.end_ids
    written, _ = encoder_of(layout, "{text}", target="{label}", chat=True)
    assert written.encode({"text": "a", "label": "b"}, 0).ids[-1] == end and written.end_ids == encoder.end_ids


def test_the_assistant_mask_is_the_templates_own():
    layout = LAYOUTS["smollm3"]
    encoder, tokenizer = encoder_of(layout)
    for turns in (CHATS["one turn"], CHATS["turns"]):
        theirs = tokenizer.apply_chat_template(
            chat(turns), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        example = encoder.encode({"messages": chat(turns)}, 0)
        assert example.ids.tolist() == theirs["input_ids"]
        assert example.predicted.astype(int).tolist() == theirs["assistant_masks"]


def test_a_mask_never_has_what_the_generation_prompt_writes():
    """A template may put the header of a turn into its block; it stands before the answer that is asked for."""
    template = LAYOUTS["smollm3"].template
    wide = template.replace(
        "{{ '<|im_start|>assistant\n' }}{% generation %}", "{% generation %}{{ '<|im_start|>assistant\n' }}", 1
    )
    assert wide != template
    layout = Layout(wide, ("<|im_start|>", "<|im_end|>"), "<|im_end|>", eos="<|im_end|>")
    narrow, _ = encoder_of(LAYOUTS["smollm3"])
    encoder, _ = encoder_of(layout)
    ours, theirs = (e.encode({"messages": chat(CHATS["turns"])}, 0) for e in (encoder, narrow))
    assert ours.ids.tolist() == theirs.ids.tolist() and ours.predicted.tolist() == theirs.predicted.tolist()


def test_a_think_block_is_part_of_the_answer():
    """It stands behind the generation prompt, so the model says it; a turn before the last has none."""
    encoder, tokenizer = encoder_of(LAYOUTS["qwen3"])
    messages = chat(CHATS["turns"])
    example = encoder.encode({"messages": messages}, 0)
    assert tokenizer.decode(example.ids[example.predicted]) == (
        "good<|im_end|><think>\n\n</think>\n\nthe answer<|im_end|>"
    )
    assert encoder.reference({"messages": messages}) == "<think>\n\n</think>\n\nthe answer"
    for answer in (
        {"content": "<think>\nSo.\n</think>\n\nthe answer"},
        {"content": "the answer", "reasoning_content": "So."},
    ):
        turns = [*messages[:3], {"role": "assistant", **answer}]
        example = encoder.encode({"messages": turns}, 0)
        assert example.ids.tolist() == rendered(tokenizer, turns)
        assert encoder.reference({"messages": turns}) == "<think>\nSo.\n</think>\n\nthe answer"
    written, _ = encoder_of(LAYOUTS["qwen3"], "{text}", target="{label}", chat=True)
    example = written.encode({"text": "a", "label": "yes"}, 0)
    assert tokenizer.decode(example.ids[example.predicted]) == "yes<|im_end|>"


def test_where_no_token_ends_the_last_turn_eos_does():
    encoder, tokenizer = encoder_of(LAYOUTS["solar"])
    for turns in (CHATS["one turn"], CHATS["turns"]):
        example = encoder.encode({"messages": chat(turns)}, 0)
        whole = tokenizer.apply_chat_template(chat(turns), tokenize=False)
        assert tokenizer.decode(example.ids) == whole.removesuffix("\n\n") + tokenizer.eos_token
        assert example.predicted[-1]


def test_a_template_that_asks_otherwise_than_it_trains_is_refused():
    """A generation prompt that opens a think block, which the whole chat does not have."""
    template = LAYOUTS["qwen2"].template.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")
    encoder, _ = encoder_of(Layout(template, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"))
    with pytest.raises(DataError, match=r"record 4: before the answer of turn 2, .*assistant.*yes.* and .*<think>"):
        encoder.encode({"messages": chat(CHATS["one turn"])}, 3)
    written, tokenizer = encoder_of(
        Layout(template, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"), "{text}", target="{label}", chat=True
    )
    example = written.encode({"text": "a", "label": "yes"}, 0)
    assert tokenizer.decode(example.ids).endswith("<|im_start|>assistant\n<think>\nyes<|im_end|>")


def test_bos_is_written_once():
    """Where the prompt says, and nowhere if the template writes none."""
    tokenizer = LAYOUTS["gemma"].tokenizer()
    for prompt, start in (
        ("<soft>{messages}", [tokenizer.bos_token_id, V]),
        ("<soft><bos>{messages}", [V, V + 1, V + 2, tokenizer.bos_token_id]),
    ):
        encoder, _ = encoder_of(LAYOUTS["gemma"], prompt)
        ids = encoder.prompt_ids({"messages": chat(CHATS["one turn"])}).tolist()
        assert ids[: len(start)] == start and ids.count(tokenizer.bos_token_id) == 1


def test_a_chat_up_to_its_last_answer():
    encoder, _ = encoder_of(LAYOUTS["qwen2"])
    messages = chat([*CHATS["one turn"], ("user", "Why?")])
    assert encoder.up_to_answer({"messages": messages}) == {"messages": messages[:2]}
    assert encoder.reference({"messages": messages}) == "yes"


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, "the content of turn 2 is null"),
        ({"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}, "turn 2 has 'tool_calls'"),
        ({"role": "assistant", "content": ["yes"]}, r"the content of turn 2 is a list \(\['yes'\]\)"),
        ({"role": "assistant", "content": [{"type": "image", "url": "x"}]}, "the content of turn 2 is a list"),
        ({"role": "assistant", "content": {"text": "yes"}}, "the content of turn 2 is a mapping"),
        ({"role": "assistant", "content": float("nan")}, "the content of turn 2 is NaN"),
        ({"role": ["assistant"], "content": "yes"}, "the role of turn 2 is a list"),
        ({"role": "assistant", "content": "a\ufdd1b"}, "noncharacters"),
        ({"role": "assistant"}, "needs 'role' and 'content'"),
    ],
)
def test_turns_that_are_not_text(turn, message):
    encoder, _ = encoder_of(LAYOUTS["qwen2"])
    with pytest.raises(DataError, match=f"record 3: .*{message}"):
        encoder.encode({"messages": [{"role": "user", "content": "a"}, turn]}, 2)


def test_text_parts_are_one_text():
    encoder, _ = encoder_of(LAYOUTS["qwen2"])
    parts = [{"type": "text", "text": "Is it"}, {"type": "text", "text": " spam?", "image": None}]
    messages = chat(CHATS["one turn"])
    split = [{"role": "user", "content": parts, "tool_calls": None}, messages[1]]
    assert encoder.encode({"messages": split}, 0).ids.tolist() == encoder.encode({"messages": messages}, 0).ids.tolist()


def test_what_follows_a_chat_is_refused():
    with pytest.raises(ConfigError, match=r"\{messages\} must come last"):
        encoder_of(LAYOUTS["qwen2"], "{messages}<soft>")
    with pytest.raises(ConfigError, match=r"data.truncate cannot shorten a chat"):
        encoder_of(LAYOUTS["qwen2"], truncate="messages")
