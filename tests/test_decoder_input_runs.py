"""Virtual tokens in the decoder's input: templates, training, scores, generation and files."""

import dataclasses

import jax
import numpy as np
import pytest

import spt_jax
from spt_jax.bases.base import load_base
from spt_jax.data.batches import pack, plan_batches
from spt_jax.data.encoder import encoder_for
from spt_jax.data.sequences import form_of
from spt_jax.errors import ConfigError
from spt_jax.evaluation.bare import bare_examples
from spt_jax.evaluation.evaluate import make_evaluation_set, score
from spt_jax.inference.forward import target_scores
from spt_jax.inference.generation import SamplingConfig, generate
from spt_jax.interop.arrays import export_npy
from spt_jax.interop.card import model_card
from spt_jax.interop.peft_export import peft_note
from spt_jax.prompts.storage import read_prompt
from spt_jax.prompts.virtual import VirtualPrompt
from spt_jax.testing import tiny_base, tiny_tokenizer, write_tiny_checkpoint
from tests.encoder_decoders import START, VARIANTS

CLASSES = {"good": "good", "bad": "a bad one"}
RECORDS = [{"text": f"{word} text", "label": label} for label in CLASSES for word in ("the", "of", "and", "world")]
SIDES = "<soft:2> {text}<decoder><soft:3>"
BOTH = spt_jax.Template(prompt=SIDES, target="{label}", verbalizers=CLASSES, virtual_tokens=5)
TEXT = spt_jax.Template(prompt="{text}<decoder>answer<soft:3>", target="{label}", virtual_tokens=3)
OPTIONS = {"steps": 4, "batch_size": 4, "progress": False}


@pytest.fixture(scope="module")
def base():
    return tiny_base("t5", seed=3, tokenizer="sentencepiece")


def numbered(base, first: int, count: int) -> list[int]:
    return list(range(base.layout.vocab_size + first, base.layout.vocab_size + first + count))


def rows_of(base, count: int, scale: float = 0.3) -> VirtualPrompt:
    tokens = np.random.default_rng(7).normal(0, scale, (count, base.layout.width)).astype(np.float32)
    return VirtualPrompt(tokens=tokens)


def test_what_each_side_reads(base):
    """The encoder's text and </s>; the start token, the decoder's rows, and the target as a text of its own."""
    tokenizer = tiny_tokenizer("sentencepiece", add_bos=False, add_eos=True)
    text, target, word = (tokenizer(part)["input_ids"] for part in ("the text", "good", "answer"))
    encoder = encoder_for(base, spt_jax.Template(prompt=SIDES, target="{label}", virtual_tokens=5))
    example = encoder.encode(RECORDS[0], 0)
    start = base.layout.start_id
    front = [*numbered(base, 0, 2), *text]
    assert example.ids.tolist() == [*front, start, *numbered(base, 2, 3), *target]
    assert example.starts == len(front) and example.predicted.sum() == len(target)
    assert encoder.prompt_ids(RECORDS[0]).tolist() == example.ids[: len(front) + 4].tolist()
    own = encoder_for(base, TEXT).prompt_ids(RECORDS[0])
    assert own.tolist() == [*text, start, *word[:-1], *numbered(base, 0, 3)]
    (bare,) = bare_examples(base, [example])
    assert bare.ids.tolist() == [*text, start, *target] and bare.starts == len(text)


def test_shots_are_in_the_encoder_s_input(base):
    template = spt_jax.Template(prompt="{text}<decoder>answer", target="{label}")
    (start,) = np.flatnonzero(encoder_for(base, template, shots=RECORDS[:2]).prompt_ids(RECORDS[2]) == START)
    plain = encoder_for(base, spt_jax.Template(prompt="{text}", target="{label}")).prompt_ids(RECORDS[2])
    assert start > len(plain)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("{text}<decoder><soft><decoder>", "has several <decoder>"),
        ("<decoder><soft>{text}", "there is nothing for the encoder before <decoder>"),
        ("<soft>{text}<decoder>{text}", "{text} is after <decoder>"),
        ("{text}<decoder><bos><soft>", "<bos> cannot follow <decoder>"),
        ("{text}<decoder>a<sep>b<soft>", "<sep> cannot follow <decoder>"),
        ("{text}<decoder><unk><soft>", "<unk> cannot follow <decoder>"),  # the tiny base starts with it,
    ],
)
def test_wrong_templates_are_refused(base, prompt, message):
    with pytest.raises(ConfigError, match=message):
        encoder_for(base, spt_jax.Template(prompt=prompt, target="{label}", virtual_tokens=3))


def test_other_bases_have_no_decoder_s_input():
    """Neither a decoder nor an encoder."""
    template = spt_jax.Template(prompt="{text}<decoder><soft>", target="{label}", virtual_tokens=3)
    decoder = form_of(tiny_tokenizer(), None)
    for form in (decoder, dataclasses.replace(decoder, causal=False)):
        with pytest.raises(ConfigError, match="<decoder> is for encoder-decoders"):
            form.check(template, False, [])


def test_heads_that_read_the_encoder_are_refused(base):
    options = {"target": "{tags}", "reads": "text", "head": "tagging", "verbalizers": CLASSES, "virtual_tokens": 3}
    with pytest.raises(ConfigError, match="reads hidden states of the encoder, which nothing after <decoder> changes"):
        encoder_for(base, spt_jax.Template(prompt="{text}<decoder><soft>", **options))


def test_peft_has_no_prompts_there(base):
    note = peft_note(base, spt_jax.PromptTuning(length=5), BOTH)
    assert note.endswith("the template has <decoder>, and PEFT has no prompts in the decoder's input")


def test_no_file_of_rows_takes_those_of_the_decoder(base, tmp_path):
    """In google-research's format, all of them precede the encoder's text."""
    template = spt_jax.Template(prompt="<soft>{text}<decoder>answer", target="{label}", virtual_tokens=5)
    folder = spt_jax.save_prompt(tmp_path / "prompt", base, spt_jax.PromptTuning(length=5), rows_of(base, 5), template)
    saved = read_prompt(folder)
    assert "PEFT has no soft prompts of this kind" in model_card("me/prompt", saved, on_hub=False)
    with pytest.raises(ConfigError, match="has <decoder>, and all rows of this format are in the encoder's input"):
        export_npy(tmp_path / "rows.npy", saved)
    assert not (tmp_path / "rows.npy").exists()


def test_training_microbatches_and_files(base, tmp_path):
    """The rows of both sides learn, microbatches change nothing, and a saved prompt scores the same."""
    method = spt_jax.PromptTuning(length=5)
    prompt = spt_jax.fit(base, method, BOTH, RECORDS, **OPTIONS).prompt
    halves = spt_jax.fit(base, method, BOTH, RECORDS, microbatches=2, **OPTIONS).prompt
    np.testing.assert_allclose(halves.virtual.tokens, prompt.virtual.tokens, atol=1e-4)
    started = spt_jax.fit(base, method, BOTH, RECORDS, **{**OPTIONS, "steps": 1}).prompt
    moved = np.abs(np.asarray(prompt.virtual.tokens) - np.asarray(started.virtual.tokens)).max(axis=1)
    assert (moved > 1e-3).all()
    assert prompt.evaluate(RECORDS).metrics["loss"] < started.evaluate(RECORDS).metrics["loss"]
    prompt.save(tmp_path / "prompt")
    again = spt_jax.load_prompt(tmp_path / "prompt", base)
    assert again.template.prompt == SIDES
    assert again.score(["the text"]) == prompt.score(["the text"])


def test_scores_of_rows_of_one_and_of_several_examples_agree(base):
    """Verbalizers of several tokens follow the decoder's rows."""
    encoder = encoder_for(base, BOTH)
    virtual = rows_of(base, 5)
    found = [
        score(base, make_evaluation_set(base, encoder, RECORDS, packing=packing), virtual) for packing in (False, True)
    ]
    np.testing.assert_allclose(*found, atol=1e-4)


def test_generated_tokens_are_as_likely_as_scored_ones():
    """Beyond the decoder's window, with prompts of different lengths and templates in one batch."""
    family, fields = VARIANTS["t5gemma"]
    base = tiny_base(family, seed=3, **fields)
    virtual = dataclasses.replace(rows_of(base, 5), pinned=True)
    templates = [
        spt_jax.Template(prompt=prompt, target="{label}", virtual_tokens=5)
        for prompt in ("<soft:2>{text}<decoder><soft:3>", "<soft:5>{text}")
    ]
    encoders = [encoder_for(base, template) for template in templates]
    prompts = [encoder.prompt_ids(record) for encoder in encoders for record in RECORDS[:2]]
    answers = generate(base, prompts, virtual, SamplingConfig(max_new_tokens=20, temperature=1.0, seed=4))
    examples = []
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = np.concatenate([prompt, answer.ids]).astype(np.int32)
        predicted = np.arange(len(ids)) >= len(prompt)
        examples.append(spt_jax.Example(ids, predicted, (), 0, number).decoded(base.layout.start_id))
    rows = pack(examples, plan_batches(examples, lead=0, batch_size=8, packing=False)).rows
    found = jax.jit(target_scores)(base.model, virtual, None, rows).log_probabilities[:, :, 0]
    for row, number in enumerate(rows.examples[:, 0]):
        own = np.asarray(found)[row][rows.target_weights[row] > 0]
        np.testing.assert_allclose(own, answers[number].log_probabilities, atol=1e-4)


def test_a_forced_token_is_the_first_of_the_answer(tmp_path):
    """It follows the decoder's rows, in targets and in generated text."""
    directory = write_tiny_checkpoint(tmp_path, "bart", seed=3)
    (directory / "generation_config.json").write_text('{"forced_bos_token_id": 17}')
    base = load_base(directory, dtype="float32")
    encoder = encoder_for(base, spt_jax.Template(prompt="{text}<decoder><soft>", target="{label}", virtual_tokens=3))
    example = encoder.encode(RECORDS[0], 0)
    assert example.ids[example.starts + 1 : example.starts + 5].tolist() == [*numbered(base, 0, 3), 17]
    (answer,) = generate(base, [encoder.prompt_ids(RECORDS[0])], rows_of(base, 3), SamplingConfig(max_new_tokens=4))
    assert answer.ids[0] == 17 and answer.log_probabilities[0] == 0
