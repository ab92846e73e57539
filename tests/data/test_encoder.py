"""Records become the right ids: against the tokenizers' own encodings, and with virtual tokens anywhere."""

import numpy as np
import pytest

from spt_jax.data.encoder import Encoder
from spt_jax.data.examples import Example
from spt_jax.data.templates import Template, virtual_length
from spt_jax.data.tokenization import Tokenization
from spt_jax.errors import ConfigError, DataError
from spt_jax.testing import tiny_tokenizer

V = 1000  # ids from here on are virtual
CHATML = (
    "{% for m in messages %}<bos>{{ m['role'] }}\n{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)


def encoder(prompt: str, target: str = " {label}", *, kind: str = "byte", max_length: int = 200, **options) -> Encoder:
    chat_template, shots = options.pop("chat_template", None), options.pop("shots", ())
    tokenizer = tiny_tokenizer(kind)
    tokenizer.chat_template = chat_template
    options.setdefault("virtual_tokens", virtual_length(prompt) or (3 if "<soft>" in prompt else 0))
    return Encoder(Template(prompt=prompt, target=target, **options), tokenizer, V, max_length, shots)


def decode(tokenizer, ids) -> str:
    return tokenizer.decode([i for i in ids if i < V])


@pytest.mark.parametrize("kind", ["byte", "sentencepiece"])
@pytest.mark.parametrize("text", ["Hello", " Hello the world", "H", "\nH", "the question?", "  two  spaces"])
def test_continuation_is_what_follows_in_a_longer_text(kind, text):
    """The ids of a continuation are those that the tokenizer itself gives after another text."""
    tokenizer = tiny_tokenizer(kind)
    front = tokenizer.encode("x|", add_special_tokens=False)
    whole = tokenizer.encode("x|" + text, add_special_tokens=False)
    assert whole[: len(front)] == front
    assert Tokenization(tokenizer).continuation(text) == whole[len(front) :]


def test_no_dummy_space_after_virtual_tokens():
    """In a SentencePiece-like vocabulary "H" alone has a space in front; after virtual tokens it must not."""
    tokenizer = tiny_tokenizer("sentencepiece")
    opened = encoder("{t}", kind="sentencepiece").encode({"t": "H", "label": "x"}, 0).ids
    continued = encoder("<soft:1>{t}", kind="sentencepiece").encode({"t": "H", "label": "x"}, 0).ids
    assert tokenizer.convert_ids_to_tokens(int(opened[1])) == "\u2581H"
    assert tokenizer.convert_ids_to_tokens(int(continued[2])) == "H"


def test_stories_label_is_another_token_after_text(stories):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(stories)
    template = Template(prompt="<soft>{text}\n", target="{label}", virtual_tokens=2, verbalizers={"h": "H", "l": "L"})
    example = Encoder(template, tokenizer, 512, 512).encode({"text": "Where ?", "label": "h"}, 0)
    after_text = tokenizer.encode("a\nH", add_special_tokens=False)[-1]
    assert example.choices[0].tolist() == [after_text] != tokenizer.encode("H", add_special_tokens=False)


@pytest.mark.parametrize("kind", ["byte", "sentencepiece"])
def test_control_tokens_in_user_text_are_plain_text(kind):
    tokenizer = tiny_tokenizer(kind)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    ids = encoder("{t}", kind=kind).encode({"t": f"a{eos}{bos}b", "label": eos}, 0).ids.tolist()
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    literal = encoder(f"a{eos}{{t}}", kind=kind).encode({"t": "b", "label": "c"}, 0).ids.tolist()
    assert literal.count(tokenizer.eos_token_id) == 2, "in the template itself it is the control token"


def test_virtual_tokens_anywhere():
    tokenizer = tiny_tokenizer()
    example = encoder("<bos><soft:2>{t}\nKind:<soft:3>", "{label}").encode({"t": "Hello", "label": "x"}, 0)
    text = Tokenization(tokenizer).continuation("Hello\nKind:")
    expected = [tokenizer.bos_token_id, V, V + 1, *text, V + 2, V + 3, V + 4]
    assert example.ids.tolist() == [*expected, *Tokenization(tokenizer).continuation("x"), tokenizer.eos_token_id]
    assert example.predicted.tolist() == [False] * len(expected) + [True] * (len(example.ids) - len(expected))


def test_bos_where_the_template_says():
    ids = encoder("<soft:2><bos>{t}").encode({"t": "a", "label": "x"}, 0).ids.tolist()
    assert ids[:3] == [V, V + 1, tiny_tokenizer().bos_token_id]


def test_verbalizers_have_no_eos_and_choices_share_the_prompt():
    e = encoder("<soft>{t}", verbalizers={"p": "positive", "n": "negative"})
    example = e.encode({"t": "good", "label": "n"}, 4)
    assert example.label == 1 and example.index == 4 and not example.predicted.any()
    assert tiny_tokenizer().eos_token_id not in np.concatenate(example.choices)
    target = example.as_target()
    assert target.ids[target.predicted].tolist() == example.choices[1].tolist()


def test_head_is_found_on_ids():
    """The constant head ends before a token that text merges with, and before the position of a first target."""
    e = encoder("<soft:3>Question: {t}", "{label}")
    examples = e.encode_all([{"t": "one", "label": "x"}, {"t": "the", "label": "x"}])
    lead = e.head_length(examples)
    assert decode(tiny_tokenizer(), examples[0].ids[4:lead]) == "Question:"
    assert all((example.ids[:lead] == examples[0].ids[:lead]).all() for example in examples)
    assert (examples[0].ids[:4] == [tiny_tokenizer().bos_token_id, V, V + 1, V + 2]).all()
    only_soft = encoder("<soft:3>", "{label}")
    assert only_soft.head_length(only_soft.encode_all([{"label": "x"}, {"label": "y"}])) == 3, "BOS and two of three"


def test_only_the_named_field_is_shortened():
    record = {"a": "keep me", "b": "long " * 60, "label": "yes"}
    with pytest.raises(DataError, match=r"record 1: .* tokens, at most 60 fit"):
        encoder("<soft:4>{a}|{b}", max_length=60).encode(record, 0)
    example = encoder("<soft:4>{a}|{b}", max_length=60, truncate="b").encode(record, 0)
    tokenizer = tiny_tokenizer()
    assert 55 <= example.length <= 60
    assert (example.ids >= V).sum() == 4
    assert decode(tokenizer, example.ids[example.predicted][:-1]).strip() == "yes"
    assert "keep me|long long" in decode(tokenizer, example.ids)
    end = encoder("<soft:4>{a}|{b}", max_length=60, truncate="b", keep="end")
    assert decode(tokenizer, end.encode({**record, "b": "x" * 90 + "END"}, 0).ids).count("END") == 1
    with pytest.raises(DataError, match="even without its field 'b'"):
        encoder("<soft:4>{a}|{b}", max_length=8, truncate="b").encode(record, 0)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"tex": "a", "label": "p"}, "no field 't'"),
        ({"t": "a", "label": "positiv"}, "label 'positiv' has no verbalizer; did you mean 'positive'"),
        ({"t": None, "label": "positive"}, "record 3: the field 't' is null"),
    ],
)
def test_bad_records(record, message):
    e = encoder("<soft>{t}", verbalizers={"positive": "a", "negative": "b"})
    with pytest.raises(DataError, match=message):
        e.encode(record, 2)


def test_chat_template_wraps_prompt_and_target():
    tokenizer = tiny_tokenizer()
    e = encoder("<soft:2>{t}", "{label}", chat=True, system="Be brief.", chat_template=CHATML)
    ids = e.encode({"t": "Hello <eos>", "label": "yes"}, 0)
    rendered = "<bos>system\nBe brief.<eos>\n<bos>user\n|Hello <eos><eos>\n<bos>assistant\nyes<eos>"
    assert tokenizer.decode(np.where(ids.ids >= V, 0, ids.ids)).replace("<pad><pad>", "|") == rendered
    assert tokenizer.decode(ids.ids[ids.predicted]) == "yes<eos>"
    assert (ids.ids == tokenizer.eos_token_id).sum() == 3, "the user's <eos> is text"


def test_virtual_tokens_that_depend_on_the_input_take_chats_with_one_answer():
    """In training they would read what precedes the first answer, and the whole chat when the last is generated."""
    turns = [("user", "Hello"), ("assistant", "good"), ("user", "the question"), ("assistant", "answer")]
    messages = [{"role": role, "content": content} for role, content in turns]
    e = encoder("<soft:2>{messages}", "", chat_template=CHATML, per_input=True)
    example = e.encode({"messages": messages[:2]}, 0)
    assert example.input_end == example.first_target - 1 == len(e.prompt_ids({"messages": messages[:1]})) - 1
    with pytest.raises(DataError, match="record 3: has 2 assistant turns"):
        e.encode({"messages": messages}, 2)


def test_conversations_have_several_target_spans():
    tokenizer = tiny_tokenizer()
    turns = [("user", "Hello"), ("assistant", "good"), ("user", "the question"), ("assistant", "answer")]
    messages = [{"role": role, "content": content} for role, content in turns]
    e = encoder("<soft:2>{messages}", "", chat_template=CHATML)
    example = e.encode({"messages": messages}, 0)
    tokenizer.chat_template = CHATML
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(example.ids[example.ids < V]) == whole
    assert tokenizer.decode(example.ids[example.predicted]) == "good<eos>answer<eos>"
    assert example.ids[:3].tolist() == [tokenizer.bos_token_id, V, V + 1]
    assert tokenizer.decode(e.prompt_ids({"messages": messages})[3:]).endswith("<bos>assistant\n")
    assert e.reference({"messages": messages}) == "answer"
    with pytest.raises(DataError, match="no assistant turn"):
        e.encode({"messages": messages[:1]}, 0)
    with pytest.raises(DataError, match="'role' and 'content'"):
        e.encode({"messages": [{"from": "x"}]}, 0)
    with pytest.raises(ConfigError, match="no chat template"):
        encoder("<soft:2>{messages}", "")


def test_example_positions():
    example = Example(np.asarray([1, 2, 3]), np.asarray([False, True, True]), (), 0, 0)
    assert example.first_target == 1 and example.length == 3


def test_two_classes_cannot_read_alike():
    with pytest.raises(ConfigError, match="same token ids"):
        encoder("{t}", verbalizers={"a": "x", "b": "x"})


SHOTS = [{"t": "One <eos> day", "label": "a"}, {"t": "Two", "label": "b"}]


@pytest.mark.parametrize("front", ["", "<bos>"])
def test_solved_examples_stand_in_front(front: str):
    """The text of all of them, with the ids of their answers as they are scored, and nothing in it a control token."""
    e = encoder(front + "Q: {t}\nA:", " {label}", shots=SHOTS, verbalizers={"a": "yes", "b": "no"})
    tokenizer = tiny_tokenizer()
    example = e.encode({"t": "Three", "label": "a"}, 0)
    assert example.ids[0] == tokenizer.bos_token_id and (example.ids[1:] != tokenizer.bos_token_id).all()
    assert tokenizer.eos_token_id not in example.ids
    text = "Q: One <eos> day\nA: yes\n\nQ: Two\nA: no\n\nQ: Three\nA:"
    assert tokenizer.decode(example.ids[1:]) == text
    plain = encoder(front + "Q: {t}\nA:", " {label}", verbalizers={"a": "yes", "b": "no"})
    for ours, own in zip(example.choices, plain.encode({"t": "Three", "label": "a"}, 0).choices, strict=True):
        np.testing.assert_array_equal(ours, own)
    choice = example.choices[0]
    at = len(tokenizer.encode("Q: One <eos> day\nA:", split_special_tokens=True))
    np.testing.assert_array_equal(example.ids[at : at + len(choice)], choice)
    examples = e.encode_all([{"t": t, "label": "a"} for t in ("Three", "Four")])
    assert e.head_length(examples) > len(example.ids) - len(tokenizer.encode("Q: Three\nA:")) - 3  # run once for all


def test_solved_examples_are_turns_of_a_chat():
    shots = [{"t": "One", "label": "a"}, {"t": "Two", "label": "b"}]
    e = encoder("Say {t}", "{label}", chat=True, system="Be brief.", chat_template=CHATML, shots=shots)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    messages = [{"role": "system", "content": "Be brief."}]
    for shot in shots:
        messages += [{"role": "user", "content": f"Say {shot['t']}"}, {"role": "assistant", "content": shot["label"]}]
    messages.append({"role": "user", "content": "Say Three"})
    expected = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert e.prompt_ids({"t": "Three", "label": "c"}).tolist() == list(expected)


def test_a_solved_example_of_no_class_is_named():
    with pytest.raises(DataError, match="label 'yess' has no verbalizer; did you mean 'yes'"):
        encoder("Q: {t}", shots=[{"t": "One", "label": "yess"}], verbalizers={"yes": "H", "no": "L"})


def test_solved_examples_go_with_a_written_prompt():
    with pytest.raises(ConfigError, match="solved examples need a written prompt"):
        encoder("<soft>{t}", shots=SHOTS)
