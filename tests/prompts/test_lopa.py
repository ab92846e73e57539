"""LoPA: what its virtual tokens depend on, that training and use agree, and what refuses such a prompt."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spt_jax
from spt_jax.data.batches import pack, plan_batches
from spt_jax.data.encoder import encoder_for
from spt_jax.data.examples import CompactExamples
from spt_jax.data.templates import Template
from spt_jax.errors import CheckpointError, ConfigError
from spt_jax.evaluation.attribution import ablate
from spt_jax.evaluation.continuations import score_continuations
from spt_jax.evaluation.evaluate import make_evaluation_set
from spt_jax.evaluation.inspection import describe_prompt
from spt_jax.inference.forward import embed_stream, encode_prefix, output_states, run_stream
from spt_jax.inference.generation import SamplingConfig, generate
from spt_jax.interop.arrays import export_embeddings
from spt_jax.interop.card import model_card
from spt_jax.interop.peft_export import export_peft
from spt_jax.models.attention import Stream
from spt_jax.prompts import LowRankPromptAdaptation, PromptTuning
from spt_jax.prompts.initializers import array
from spt_jax.prompts.initializers import prompt as from_prompt
from spt_jax.prompts.stacking import stack_prompts
from spt_jax.prompts.storage import read_prompt
from spt_jax.serving.bank import PromptBank
from spt_jax.testing import tiny_base
from tests.examples import VOCAB, random_examples
from tests.family import moved_params

METHOD = LowRankPromptAdaptation(length=2, rank=2, hidden=8)
TEMPLATE = Template(prompt="<soft>{text}\n", target=" {label}", verbalizers={"a": "good", "b": "bad"})
RECORDS = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(("the", "of a text", "is it", "42"))]


@pytest.fixture(scope="module")
def base():
    return tiny_base()


@pytest.fixture(scope="module")
def trained(base):
    return spt_jax.fit(base, METHOD, TEMPLATE, RECORDS, steps=3, batch_size=4, seed=1, progress=False).prompt


def virtual_of(base, method=METHOD):
    return method.materialize(moved_params(method, base), base.model)


def embedded(base, virtual, ids, segments, inputs=None):
    """The embeddings of one row."""
    ids, segments = np.asarray(ids, np.int32)[None], np.asarray(segments, np.int32)[None]
    inputs = None if inputs is None else np.asarray(inputs, bool)[None]
    stream = Stream(np.zeros_like(ids), segments, np.zeros_like(ids), inputs=inputs)
    return np.asarray(embed_stream(base.model, virtual, jnp.asarray(ids), stream))[0]


def test_it_starts_as_prompt_tuning(base):
    rows = np.random.default_rng(0).normal(size=(2, base.layout.width)).astype(np.float32)
    method = dataclasses.replace(METHOD, init=array(rows))
    virtual = method.materialize(method.init_params(jax.random.key(0), base), base.model)
    found = embedded(base, virtual, [VOCAB, VOCAB + 1, 7, 9], [1] * 4)
    np.testing.assert_allclose(found[:2], rows, rtol=1e-6)


def test_virtual_tokens_depend_on_the_inputs_of_their_own_example(base):
    virtual = virtual_of(base)
    prompt = [VOCAB, VOCAB + 1]
    alone = embedded(base, virtual, [*prompt, 7, 9, 11], [1] * 5, [1, 1, 1, 1, 0])
    other = embedded(base, virtual, [*prompt, 8, 9, 11], [1] * 5, [1, 1, 1, 1, 0])
    assert np.abs(alone[:2] - other[:2]).max() > 1e-3
    after_target = embedded(base, virtual, [*prompt, 7, 9, 200], [1] * 5, [1, 1, 1, 1, 0])
    np.testing.assert_array_equal(alone[:2], after_target[:2])
    packed = [*prompt, 7, 9, 11, 8, 9, *prompt, 11, 0, 0]
    row = embedded(base, virtual, packed, [1] * 5 + [2] * 5 + [0] * 2, [1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0])
    np.testing.assert_allclose(row[:2], alone[:2], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(row[7:9], other[:2], rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(row[[2, 3, 5]], base.model.embed(jnp.asarray([[7, 9, 8]]))[0])
    nothing = embedded(base, virtual, prompt, [1] * 2)
    assert np.isfinite(nothing).all()


@pytest.mark.parametrize(("kind", "end"), [("target", -1), ("choices", -1)])
def test_rows_read_the_prompt_without_its_last_id(kind, end):
    examples = [example.reading(causal=True) for example in random_examples(kind, 3)]
    stored = CompactExamples.of(examples)
    assert [own.input_end for own in stored] == [own.input_end for own in examples]
    rows = pack(list(stored), plan_batches(examples, lead=0, batch_size=3, packing=False)).rows
    for number, own in zip(rows.examples[:, 0], rows.stream.inputs, strict=True):
        expected = len(examples[number].ids) if kind == "choices" else examples[number].first_target
        np.testing.assert_array_equal(own, np.arange(len(own)) < expected + end)


def test_what_is_trained_is_what_loads_and_scores(base, trained, tmp_path):
    folder = trained.save(tmp_path / "prompt")
    loaded = spt_jax.load_prompt(folder, base, progress=False)
    assert loaded.template.per_input and loaded.method == trained.method
    texts = ["the", "no", "of it and of that"]
    ours = trained.score(texts)
    assert loaded.score(texts) == ours
    assert [trained.score([text])[0]["a"] for text in texts] == pytest.approx([own["a"] for own in ours], abs=1e-5)
    assert "lopa: 2 virtual tokens of width 32, factors of these tokens for each input" in describe_prompt(
        read_prompt(folder)
    )
    assert "2 virtual tokens, instance" in model_card("me/prompt", read_prompt(folder), on_hub=False)
    with pytest.raises(ConfigError, match="has no virtual tokens of its own"):
        PromptTuning(length=2, init=from_prompt(folder)).init_params(jax.random.key(0), base)


def test_what_refuses_such_a_prompt(base, trained, tmp_path):
    folder = trained.save(tmp_path / "prompt")
    saved = read_prompt(folder)
    bank = PromptBank(base)
    with pytest.raises(CheckpointError, match="'own' has virtual tokens that depend on each input"):
        bank.add("own", saved)
    assert bank.names == []
    with pytest.raises(ConfigError, match="virtual tokens of this lopa prompt depend on each input"):
        export_peft(tmp_path / "peft", saved, base)
    with pytest.raises(ConfigError, match="token"):
        export_embeddings(saved, base, {"text": "the"})
    with pytest.raises(ConfigError, match="cannot be stacked"):
        stack_prompts([saved.virtual, saved.virtual])
    with pytest.raises(ConfigError, match="none can be removed"):
        ablate(base, make_evaluation_set(base, encoder_for(base, saved.template), RECORDS), saved.virtual)


def test_what_would_share_or_leak_is_refused(base):
    virtual = virtual_of(base)
    with pytest.raises(ConfigError, match="no leading ids can be shared"):
        encode_prefix(base.model, virtual, jnp.asarray([1, VOCAB, VOCAB + 1]))
    examples = random_examples("target", 2)
    rows = pack(examples, plan_batches(examples, lead=0, batch_size=2)).rows
    with pytest.raises(ConfigError, match="do not say what the input is"):
        output_states(base.model, virtual, None, rows)
    prompts = [np.asarray([VOCAB, VOCAB + 1, 7, 9], np.int32)] * 2
    with pytest.raises(ConfigError, match="lead is 2"):
        generate(base, prompts, virtual, lead=2)
    with pytest.raises(ConfigError, match="prompt 0 ends with a virtual token"):
        generate(base, [prompts[0][:2]], virtual, SamplingConfig(max_new_tokens=2))


def test_continuations_are_scored_as_targets(base):
    """The contexts share leading ids, which virtual tokens of their own follow."""
    virtual = virtual_of(base)
    pairs = [([1, VOCAB, VOCAB + 1, *context], [9, 10]) for context in ([7, 8], [7, 11], [12])]
    found = [own.log_probability for own in score_continuations(base, pairs, virtual)]
    alone = [score_continuations(base, [pair], virtual)[0].log_probability for pair in pairs]
    np.testing.assert_allclose(found, alone, rtol=1e-5)
    for (context, target), own in zip(pairs, found, strict=True):
        ids = jnp.asarray([[*context, *target]], jnp.int32)
        places = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
        stream = Stream(places, jnp.ones_like(ids), jnp.zeros_like(ids), inputs=places < len(context) - 1)
        states, _ = run_stream(base.model, virtual, ids, stream)
        values = jax.nn.log_softmax(base.model.logits(states[0, len(context) - 1 : -1]))
        assert own == pytest.approx(float(values[[0, 1], target].sum()), rel=1e-4)


def test_no_answer_can_follow_virtual_tokens_at_the_end(base):
    """Refused before training, and not when the first answer is generated."""
    template = Template(prompt="{text}<soft>", target=" {label}", virtual_tokens=2, per_input=True)
    with pytest.raises(ConfigError, match="ends with virtual tokens that depend on the input"):
        encoder_for(base, template)
    encoder_for(base, dataclasses.replace(template, verbalizers={"a": "good", "b": "bad"}))


def test_options_and_bases_that_are_refused():
    for options in ({"rank": 0}, {"hidden": 0}, {"length": 0}):
        with pytest.raises(ConfigError, match="at least 1"):
            LowRankPromptAdaptation(**options)
    with pytest.raises(ConfigError, match="lopa does not support encoder-decoders"):
        METHOD.check_base(tiny_base("t5"))


def test_an_encoder_reads_the_whole_prompt(tmp_path):
    base = tiny_base("bert")
    template = Template(prompt="<soft>{text} <mask>", target="{label}", verbalizers={"a": "x", "b": "y"})
    result = spt_jax.fit(base, METHOD, template, RECORDS, steps=2, batch_size=4, progress=False)
    prompt = result.prompt
    assert prompt.classify(["the", "of it"]) == spt_jax.load_prompt(
        prompt.save(tmp_path / "prompt"), base, progress=False
    ).classify(["the", "of it"])
