"""Trained tokens: rows that replace the base's own wherever their tokens occur."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spt_jax
from spt_jax.data.templates import Template
from spt_jax.errors import ConfigError
from spt_jax.evaluation.inspection import describe_prompt
from spt_jax.inference.forward import run_stream
from spt_jax.inference.generation import SamplingConfig, generate
from spt_jax.interop.peft_export import export_peft
from spt_jax.models.attention import Stream
from spt_jax.prompts import TrainedTokens, VirtualPrompt
from spt_jax.prompts.storage import load_prompt
from spt_jax.prompts.virtual import ReplacedRows
from spt_jax.serving.bank import hold
from spt_jax.testing import tiny_base
from tests.examples import QUICK_COMPILE

IDS = np.asarray([[1, 40, 99, 17, 250, 17, 8]], np.int32)


@pytest.fixture(scope="module")
def base():
    return tiny_base()


@functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
def logits_of(model, virtual, ids):
    positions = jnp.arange(ids.shape[1])[None]
    stream = Stream(positions, jnp.ones_like(positions), jnp.zeros_like(positions))
    return model.logits(run_stream(model, virtual, ids, stream)[0])


def moved(base, method) -> VirtualPrompt:
    params = method.init_params(jax.random.key(0), base)
    return method.materialize({"rows": params["rows"] + 0.5}, base.model)


def with_rows(base, ids, rows):
    """A base whose table has other rows."""
    params = {**base.params, "embedding": base.params["embedding"].at[np.asarray(ids)].set(rows)}
    return dataclasses.replace(base.model, params=params)


def test_it_is_a_base_with_other_rows_in_its_table():
    """Of a base with an output matrix of its own, which the rows do not touch."""
    base = tiny_base(tie_word_embeddings=False)
    method = TrainedTokens(ids=(17, 99, 200))
    start = method.materialize(method.init_params(jax.random.key(0), base), base.model)
    np.testing.assert_array_equal(logits_of(base.model, start, IDS), logits_of(base.model, None, IDS))
    virtual = moved(base, method)
    expected = logits_of(with_rows(base, method.ids, virtual.replaced.rows), None, IDS)
    np.testing.assert_allclose(logits_of(base.model, virtual, IDS), expected, atol=1e-6)
    assert np.abs(expected - logits_of(base.model, None, IDS)).max() > 0.01


def test_generated_tokens_use_their_rows_too():
    base = tiny_base(tie_word_embeddings=False)
    prompt, sampling = IDS[0, :3], SamplingConfig(max_new_tokens=6)
    (bare,) = generate(base, [prompt], None, sampling)
    method = TrainedTokens(ids=tuple({*bare.ids}))
    virtual = moved(base, method)
    ours = generate(base, [prompt], virtual, sampling)
    other = dataclasses.replace(base, model=with_rows(base, method.ids, virtual.replaced.rows))
    assert ours[0].ids == generate(other, [prompt], None, sampling)[0].ids != bare.ids


def test_tokens_are_read_as_text_and_as_the_vocabulary_spells_them(base):
    vocabulary = base.tokenizer.get_vocab()
    spelled = next(name for name in vocabulary if name.startswith("\u0120"))
    bound = TrainedTokens(tokens=("a", spelled, "\n")).bind(base.tokenizer)
    newline = base.tokenizer.encode("\n", add_special_tokens=False)
    assert bound.ids == (vocabulary["a"], vocabulary[spelled], *newline) and not bound.needs_tokenizer
    assert bound.bind(base.tokenizer) == bound
    with pytest.raises(ConfigError, match=r"'<think>' is 7 tokens of this base \('<', 't', .* single tokens"):
        TrainedTokens(tokens=("<think>",)).bind(base.tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "method.tokens is empty"),
        ({"tokens": ("a",)}, r"use method.bind\(base.tokenizer\)"),
        ({"ids": (3, 4, 3)}, "method.ids holds 3 more than once"),
        ({"ids": (-1,)}, "method.ids holds -1"),
        ({"ids": (10**6,)}, "go up to 1000000; the vocabulary has"),
        ({"ids": (1, 2), "tokens": ("a",)}, "2 numbers for 1"),
    ],
)
def test_what_is_refused(base, options, message):
    with pytest.raises(ConfigError, match=message):
        TrainedTokens(**options).init_params(jax.random.key(0), base)


def test_a_trained_prompt_is_a_small_file_that_classifies_the_same(base, tmp_path):
    template = Template(prompt="{text}\n", target=" {label}", verbalizers={"a": "good", "b": "bad"})
    records = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(("the", "of a", "is it", "42"))]
    method = TrainedTokens(tokens=("\n", "a"))
    result = spt_jax.fit(base, method, template, records, steps=2, batch_size=4, progress=False)
    folder = result.prompt.save(tmp_path / "prompt")
    saved = load_prompt(folder, base)
    assert saved.method.tokens == ("\n", "a") and saved.method.ids == tuple(int(i) for i in saved.virtual.replaced.ids)
    assert saved.virtual.replaced.rows.shape == (2, 32) and result.trainable_parameters == 64
    texts = ["the", "no", "of it"]
    assert spt_jax.load_prompt(folder, base).classify(texts) == result.prompt.classify(texts)
    held = hold(base, saved.virtual, np.asarray([1], np.int32))
    assert not held.generates and isinstance(held.virtual.replaced, ReplacedRows)
    with pytest.raises(ConfigError, match="embeddings of real tokens, which PEFT's prompts do not have"):
        export_peft(tmp_path / "peft", saved, base)
    assert "trained_tokens: input embeddings of 2 tokens of the vocabulary" in describe_prompt(saved)
