"""Encoders tag words and find answers: trained, evaluated, saved and asked again."""

import jax
import numpy as np
import pytest

import spt_jax
from spt_jax.data.encoder import encoder_for
from spt_jax.prompts import DeepPrompts
from spt_jax.testing import tiny_base

FILLER, NAMES = ["the", "a", "was", "is"], ["Ann", "Bob", "Eve"]
TAGGING = spt_jax.Template(prompt="{words}", target="{tags}", head="tagging", reads="words")
SPAN = spt_jax.Template(prompt="Who? {words}", target="{answer}", head="span", reads="words")


def records(count, seed):
    """Sentences with one name, which the tags and the answer point at."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        words = [str(random.choice(FILLER)) for _ in range(random.integers(3, 7))]
        place = int(random.integers(len(words)))
        words[place] = str(random.choice(NAMES))
        tags = ["B-name" if word in NAMES else "O" for word in words]
        found.append({"words": " ".join(words), "tags": tags, "answer": words[place]})
    return found


def test_a_head_reads_the_first_token_of_each_word():
    base = tiny_base("bert")
    template = spt_jax.Template(
        prompt="<soft:2>{words}.", target="{tags}", virtual_tokens=2, head="tagging", reads="words",
        verbalizers={"O": "O", "B-name": "B"},
    )  # fmt: skip
    record = {"words": "Bob was Annabel", "tags": ["B-name", "O", "B-name"]}
    example = encoder_for(base, template).encode(record, 0)
    texts = [base.tokenizer.decode(example.ids[place:]) for place in example.reads]
    assert [text.strip().split("<eos>")[0] for text in texts] == ["Bob was Annabel.", "was Annabel.", "Annabel."]
    assert example.classes.tolist() == [1, 0, 1] and not example.pooled


@pytest.mark.parametrize(("family", "template"), [("deberta-v2", TAGGING), ("bert", SPAN)], ids=["tags", "answers"])
def test_fit_evaluate_and_load(family, template, tmp_path):
    base, test = tiny_base(family), records(30, 1)
    found = spt_jax.fit(
        base,
        DeepPrompts(length=4, head=template.head),
        template,
        records(80, 0),
        steps=60,
        batch_size=8,
        progress=False,
    )
    metrics = found.prompt.evaluate(test).metrics
    if template is TAGGING:
        assert metrics["accuracy"] > 0.95 and metrics["entity_f1"] > 0.9
    else:
        assert metrics["exact_match"] > 0.9 and metrics["token_f1"] >= metrics["exact_match"]
    found.prompt.save(tmp_path / "prompt")
    again = spt_jax.load_prompt(tmp_path / "prompt", base)
    assert jax.tree.all(jax.tree.map(np.array_equal, again.virtual, found.prompt.virtual))
    expected = [["O", "B-name", "O"], ["B-name", "O"]] if template is TAGGING else ["Bob", "Eve"]
    assert again.predict(["the Bob was", "Eve is"]) == expected
