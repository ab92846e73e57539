"""Training, saving, evaluating and generating with prompts of an encoder-decoder."""

import dataclasses

import jax
import numpy as np
import pytest

import spt_jax
from spt_jax.data.encoder import encoder_for
from spt_jax.data.sequences import form_of
from spt_jax.errors import CheckpointError, ConfigError
from spt_jax.inference.generation import SamplingConfig, generate
from spt_jax.interop import import_npy
from spt_jax.testing import tiny_base, tiny_tokenizer

CLASSES = {"good": "good", "bad": "bad"}
RECORDS = [{"text": f"{word} text", "label": label} for label in CLASSES for word in ("the", "of", "and", "world")]
TEMPLATE = spt_jax.Template(prompt="<soft> {text}", target="{label}", verbalizers=CLASSES)
OPTIONS = {"steps": 4, "batch_size": 4, "progress": False}


@pytest.fixture(scope="module")
def base():
    return tiny_base("t5", seed=3, tokenizer="sentencepiece")


@pytest.fixture(scope="module")
def result(base):
    return spt_jax.fit(base, spt_jax.PromptTuning(length=3), TEMPLATE, RECORDS, **OPTIONS)


def test_examples_end_as_the_tokenizer_and_the_decoder_say(base):
    """Prompt, </s> and start token; the target is a text of its own, with the space that opens one."""
    tokenizer = tiny_tokenizer("sentencepiece", add_bos=False, add_eos=True)
    encoder = encoder_for(base, spt_jax.Template(prompt="<soft:3> {text}", target="{label}", virtual_tokens=3))
    example = encoder.encode(RECORDS[0], 0)
    prompt, target = (tokenizer(RECORDS[0][name])["input_ids"] for name in ("text", "label"))
    start = base.layout.start_id
    assert example.ids.tolist() == [*(base.layout.vocab_size + np.arange(3)), *prompt, start, *target]
    assert example.starts == 3 + len(prompt) and example.predicted.sum() == len(target)
    assert encoder.prompt_ids(RECORDS[0]).tolist() == example.ids[: example.starts + 1].tolist()
    assert encoder.head_length([example, example]) == 0 == len(encoder.fixed_lead())
    scored = encoder_for(base, dataclasses.replace(TEMPLATE, virtual_tokens=3))
    assert [choice.tolist() for choice in scored.choices] == [tokenizer(text)["input_ids"][:-1] for text in CLASSES]


def test_only_the_prompt_changes_and_the_loss_falls(base, result):
    before = jax.tree.map(np.array, base.params)
    again = spt_jax.fit(base, spt_jax.PromptTuning(length=3), TEMPLATE, RECORDS, **{**OPTIONS, "steps": 12})
    jax.tree.map(np.testing.assert_array_equal, before, base.params)
    losses = [one.prompt.evaluate(RECORDS).metrics["loss"] for one in (result, again)]
    assert losses[1] < losses[0]


def test_a_saved_prompt_predicts_the_same(base, result, tmp_path):
    result.prompt.save(tmp_path / "prompt")
    loaded = spt_jax.load_prompt(tmp_path / "prompt", base)
    np.testing.assert_array_equal(loaded.virtual.tokens, result.prompt.virtual.tokens)
    texts = [record["text"] for record in RECORDS]
    assert loaded.score(texts) == result.prompt.score(texts)
    with pytest.raises(CheckpointError, match="family is 't5' here, 'umt5' there"):
        spt_jax.load_prompt(tmp_path / "prompt", tiny_base("umt5", seed=3, tokenizer="sentencepiece"))


def test_generated_text_of_a_prompt_for_all_sites(base, tmp_path):
    """What the prompt generates is likelier than other texts, by its own scores."""
    template = spt_jax.Template(prompt="{text}", target="{label}")
    method = spt_jax.PrefixTuning(length=2)
    prompt = spt_jax.fit(base, method, template, RECORDS, **OPTIONS).prompt
    assert set(prompt.virtual.prefix.memory) == {"encoder", "self", "cross"}
    (answer,) = prompt.generate(["the text"], SamplingConfig(max_new_tokens=4))
    prompt.save(tmp_path / "prompt")
    again = spt_jax.load_prompt(tmp_path / "prompt", base)
    assert again.generate(["the text"], SamplingConfig(max_new_tokens=4)) == [answer]
    only = spt_jax.fit(base, spt_jax.PrefixTuning(length=2, sites=("encoder",)), template, RECORDS, **OPTIONS).prompt
    assert set(only.virtual.prefix.memory) == {"encoder"}
    assert len(only.generate(["the text"], SamplingConfig(max_new_tokens=2))) == 1


def test_chats_are_refused(base):
    with pytest.raises(ConfigError, match="answers no chats"):
        form_of(base.tokenizer, base.layout).check(spt_jax.Template(prompt="{messages}"), False, [])


def test_prompts_of_google_research(shared):
    """Trained for T5 1.1 base with language model adaptation, whose width this base has."""
    sizes = {"d_model": 768, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
    base = tiny_base("t5", tie_word_embeddings=False, feed_forward_proj="gated-gelu", **sizes)
    files = sorted((shared / "data" / "google_t5_prompts").rglob("*.npy"))
    assert [file.stem for file in files] == ["mrpc", "rte", "sst2"]
    template = spt_jax.Template(prompt="<soft> {text}", target="{label}", virtual_tokens=100)
    ids = encoder_for(base, template).prompt_ids(RECORDS[0])
    answers = []
    for file in files:
        method, virtual = import_npy(file, base)
        np.testing.assert_array_equal(virtual.tokens, np.load(file).astype(np.float32))
        assert method.length == 100
        answers.append(generate(base, [ids], virtual, SamplingConfig(max_new_tokens=2))[0].log_probabilities)
    assert len({tuple(answer) for answer in answers}) == 3
