"""What each position of a prompt is worth: against prompts that never had it, and against attention by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spt_jax
from spt_jax.errors import ConfigError
from spt_jax.evaluation.attribution import ablate, attention_received
from spt_jax.evaluation.evaluate import evaluate
from spt_jax.inference.forward import embed_stream
from spt_jax.models.attention import Stream
from spt_jax.prompts import LlamaAdapter, PrefixTuning, PromptTuning, VirtualPrompt
from spt_jax.prompts.virtual import VirtualPrefix
from spt_jax.testing import tiny_base

VERBALIZERS = {"good": "H", "bad": "L e", "so": " N"}
RECORDS = [{"text": f"word {i} " + "and " * (i % 4), "label": list(VERBALIZERS)[i % 3]} for i in range(13)]


def asked(base, prompt: str, tokens: int):
    template = spt_jax.Template(prompt=prompt, target="{label}", virtual_tokens=tokens, verbalizers=VERBALIZERS)
    return spt_jax.make_evaluation_set(
        base, spt_jax.Encoder(template, base.tokenizer, base.config.vocab_size, 100), RECORDS
    )


def prompt_of(base, method) -> VirtualPrompt:
    params = jax.tree.map(lambda a: a + 0.3, method.init_params(jax.random.key(0), base))
    return method.materialize(params, base.model)


def right(base, data, virtual) -> np.ndarray:
    predictions = evaluate(base, data, virtual).predictions
    return np.asarray([p["label"] == p["prediction"] for p in predictions], float)


@pytest.mark.parametrize("prompt", ["<soft>{text}\n", "{text}\n<soft>", "<soft:1>{text}<soft:2>"])
def test_without_a_token_is_the_prompt_that_never_had_it(prompt: str):
    base = tiny_base()
    virtual = prompt_of(base, PromptTuning(length=3))
    measure, lost = ablate(base, asked(base, prompt, 3), virtual)
    assert measure == "accuracy" and len(lost) == 3
    whole = right(base, asked(base, prompt, 3), virtual)
    shorter = {"<soft:1>{text}<soft:2>": "<soft:1>{text}<soft:1>"}.get(prompt, prompt)
    left = right(base, asked(base, shorter, 2), VirtualPrompt(tokens=jnp.delete(virtual.tokens, 1, axis=0)))
    assert lost[1].interval.value == pytest.approx((whole - left).mean())


@pytest.mark.parametrize("method", [PrefixTuning(length=3), LlamaAdapter(length=3, layers=2)])
def test_without_keys_and_values(method):
    base = tiny_base()
    virtual = prompt_of(base, method)
    data = asked(base, "{text}\n", 0)
    _, lost = ablate(base, data, virtual)
    part = "prefix" if virtual.prefix is not None else "gated"
    own = getattr(virtual, part)
    fewer = dataclasses.replace(own, memory=jax.tree.map(lambda a: jnp.delete(a, 2, axis=1), own.memory))
    left = right(base, data, VirtualPrompt(**{part: fewer}))
    assert lost[2].interval.value == pytest.approx((right(base, data, virtual) - left).mean())


def test_one_position_cannot_be_taken_away():
    base = tiny_base()
    with pytest.raises(ConfigError, match="one position"):
        ablate(base, asked(base, "<soft>{text}\n", 1), prompt_of(base, PromptTuning(length=1)))


def test_attention_weights_are_those_that_mix_the_values():
    """Every token's weights add up to 1 over what it sees and are 0 beyond; with equal keys they are even."""
    base = tiny_base()
    ids = jnp.asarray([[1, 5, 9, 300, 7]], jnp.int32)
    ones = jnp.ones_like(ids)
    stream = Stream(jnp.arange(5, dtype=jnp.int32)[None], ones, jnp.zeros_like(ids))
    x = embed_stream(base.model, None, ids, stream)
    weights = np.asarray(base.model.attention_weights(x, stream, None))
    assert weights.shape == (base.config.layers, 1, 5, 5)
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-5)
    assert np.abs(np.triu(weights[:, 0], 1)).max() == 0.0
    blind = jax.tree.map(lambda a: a, base.params)
    blind["layers"]["attention"]["key"] = jax.tree.map(jnp.zeros_like, base.params["layers"]["attention"]["key"])
    even = np.asarray(dataclasses.replace(base.model, params=blind).attention_weights(x, stream, None))
    np.testing.assert_allclose(
        even[:, 0], np.tril(np.ones((5, 5))) / np.arange(1, 6)[:, None] * np.ones((even.shape[0], 1, 1)), atol=1e-5
    )


def test_attention_to_tokens_and_to_their_keys_and_values_is_the_same():
    """Three tokens in front, run as tokens, and given as the keys and values that they have there."""
    base = tiny_base()
    virtual = prompt_of(base, PromptTuning(length=3))
    # BOS comes first unless the template says where.
    by_tokens = attention_received(base, asked(base, "<soft><bos>{text}\n", 3).examples, virtual, batch_size=4)
    lead = jnp.asarray(base.config.vocab_size + np.arange(3), jnp.int32)
    prefix = spt_jax.encode_prefix(base.model, virtual, lead)
    assert prefix is not None
    bare = asked(base, "{text}\n", 0).examples
    by_keys = attention_received(base, bare, VirtualPrompt(prefix=VirtualPrefix(prefix.memory)))
    np.testing.assert_allclose(by_keys.by_position, by_tokens.by_position, atol=1e-4)
    assert by_keys.even == pytest.approx(by_tokens.even)
    assert by_keys.by_position.shape == (base.config.layers, 3)


def test_gated_prompts_have_no_share_of_the_bases_attention():
    base = tiny_base()
    with pytest.raises(ConfigError, match="no positions in the base's own attention"):
        attention_received(base, asked(base, "{text}\n", 0).examples, prompt_of(base, LlamaAdapter(length=3, layers=2)))


def test_attention_is_that_of_the_token_before_the_answer():
    """Whatever the answer is, and however long."""
    base = tiny_base()
    virtual = prompt_of(base, PromptTuning(length=3))
    template = spt_jax.Template(prompt="<soft>{text}\n", target="{answer}", virtual_tokens=3)
    encoder = spt_jax.Encoder(template, base.tokenizer, base.config.vocab_size, 100)
    found = [
        attention_received(base, [encoder.encode({"text": "a question", "answer": answer}, 0)], virtual)
        for answer in ("N", "a long answer to it")
    ]
    np.testing.assert_allclose(found[0].by_position, found[1].by_position, atol=1e-6)
    assert found[0].even == found[1].even == 3 / len(encoder.prompt_ids({"text": "a question"}))


def test_a_prompt_of_nothing_but_tokens():
    """The last token is not among the leading ones, for its output says the first word."""
    base = tiny_base()
    template = spt_jax.Template(prompt="<soft>", target="{text}", virtual_tokens=3)
    encoder = spt_jax.Encoder(template, base.tokenizer, base.config.vocab_size, 100)
    data = spt_jax.make_evaluation_set(base, encoder, RECORDS)
    measure, lost = ablate(base, data, prompt_of(base, PromptTuning(length=3)))
    assert measure == "log_probability" and len(lost) == 3


def test_shifts_stay_with_their_tokens():
    """DePT adds a row to each real token by its place: without a virtual token in front, the rows move up too."""
    base = tiny_base()
    rng = np.random.default_rng(0)
    tokens, shift = (jnp.asarray(rng.normal(size=(n, base.config.width)), jnp.float32) for n in (3, 12))
    virtual = VirtualPrompt(tokens=tokens, shift=shift)
    _, lost = ablate(base, asked(base, "<soft><bos>{text}\n", 3), virtual)
    shorter = VirtualPrompt(tokens=jnp.delete(tokens, 0, axis=0), shift=jnp.delete(shift, 0, axis=0))
    left = right(base, asked(base, "<soft><bos>{text}\n", 2), shorter)
    assert lost[0].interval.value == pytest.approx(
        (right(base, asked(base, "<soft><bos>{text}\n", 3), virtual) - left).mean()
    )
    with pytest.raises(ConfigError, match="put <soft> before any field"):
        ablate(base, asked(base, "{text}\n<soft>", 3), virtual)
