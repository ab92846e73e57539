"""Texts that are compacted to fewer positions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spt_jax
from spt_jax.errors import ConfigError
from spt_jax.models.attention import Prefix, Stream
from spt_jax.models.layout import SELF
from spt_jax.models.memory import KeysValues
from spt_jax.prompts.compaction import _of_layer, compact, moved
from spt_jax.prompts.prefix_tuning import memory_of_rows
from spt_jax.testing import tiny_base

TEXT = "The question is a text of the world, and the answer is positive. "


@functools.cache
def base():
    return spt_jax.load_base("starter", dtype="float32")


@functools.cache
def text_ids() -> np.ndarray:
    words = (
        "One day, a fox met a bear in the wood. The bear had a red ball and was very sad. The fox asked him why."
        " He said that his friend Lily had lost her blue hat. They went to the river, and there was the hat on a"
        " small boat. Lily was happy, and all of them played with the ball until it was dark."
    )
    return np.asarray(base().tokenizer(words)["input_ids"][:96], np.int32)


@jax.jit
def log_probabilities(model, memory, ids):
    count = memory[SELF].keys.shape[1]
    places = (count + jnp.arange(ids.shape[0]))[None]
    stream = Stream(places, jnp.ones_like(places), jnp.zeros_like(places), ids=ids[None])
    hidden, _ = model.run(model.embed(ids[None]), stream, Prefix(memory, jnp.arange(count)))
    return jax.nn.log_softmax(model.logits(hidden)[0])


def divergence(memory, whole) -> float:
    """The mean KL divergence from the text's predictions of what follows, a text that is not in it."""
    ids = jnp.asarray(
        base().tokenizer("The next day, the bear gave the fox a new", add_special_tokens=False)["input_ids"]
    )
    expected, found = (log_probabilities(base().model, own, ids) for own in (whole, memory))
    return float((jnp.exp(expected) * (expected - found)).sum(-1).mean())


def test_compaction_is_closer_than_truncation_and_random_keys():
    ids, count = text_ids(), 24
    whole = memory_of_rows(base().model, base().model.embed(jnp.asarray(ids)), jnp.asarray(ids))
    own = whole[SELF]

    def chosen(places):
        keys = moved(own.keys[:, places], base().config.rope, count - len(ids))
        return {SELF: KeysValues(keys, own.values[:, places])}

    found = divergence(compact(base(), ids, whole, count), whole)
    first, last = ids[:count], np.concatenate([ids[:1], ids[len(ids) - count + 1 :]])
    truncated = [
        memory_of_rows(base().model, base().model.embed(jnp.asarray(a)), jnp.asarray(a)) for a in (first, last)
    ]
    generators = map(np.random.default_rng, range(3))
    random = [chosen(np.sort(generator.choice(len(ids), count, replace=False))) for generator in generators]
    others = [divergence(memory, whole) for memory in [*truncated, *random]]
    assert found < 0.8 * min(others), (found, others)


def test_a_moved_key_is_the_key_at_the_other_position():
    model, ids = tiny_base().model, jnp.arange(5, 15)

    def keys(first: int):
        places = (first + jnp.arange(10))[None]
        stream = Stream(places, jnp.ones_like(places), jnp.zeros_like(places), ids=ids[None])
        return model.run(model.embed(ids[None]), stream, return_memory=True)[1][SELF].keys[:, 0]

    found = moved(keys(20), tiny_base().config.rope, -20)
    np.testing.assert_allclose(found, keys(0), atol=1e-4)


def test_values_are_fitted_by_least_squares():
    """With as many keys as matter, the outputs of attention for the reference queries are exact."""
    draw = np.random.default_rng(0).standard_normal
    keys, values = (jnp.asarray(draw((12, 2, 4)), jnp.float32) for _ in range(2))
    keys = keys.at[6:].set(-50.0)  # no query attends to these
    queries = jnp.abs(jnp.asarray(draw((1, 9, 4, 4)), jnp.float32))
    own = [jnp.asarray(draw((1, 9, 2, 4)), jnp.float32) for _ in range(2)]
    kept, fitted = _of_layer(queries, keys, values, *own, count=6, scale=1.0)
    np.testing.assert_allclose(kept, keys[:6])
    np.testing.assert_allclose(fitted, values[:6], atol=1e-5)


def test_a_compacted_prompt_has_the_length_that_was_asked_for(tmp_path):
    prompt = spt_jax.remember(base(), "One day, a fox met a bear.\n" * 3, tokens=8, progress=False)
    assert prompt.virtual.prefix_length == 8 == prompt.info["extra"]["remembered"]["compacted_to"]
    assert prompt.info["extra"]["remembered"]["tokens"] > 8
    again = spt_jax.load_prompt(prompt.save(tmp_path / "short"), base())
    assert again.generate(["The fox"], max_new_tokens=4) == prompt.generate(["The fox"], max_new_tokens=4)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [(0, "tokens is 0"), (-1, "tokens is -1"), (7, "tokens is 7, and the text has 7"), (80, "tokens is 80")],
)
def test_a_number_of_positions_that_is_not_fewer_is_refused(tokens, message):
    with pytest.raises(ConfigError, match=message):
        spt_jax.remember(tiny_base(), "Hello and\n\n\n\n", tokens=tokens)


@pytest.mark.parametrize(
    ("family", "reason"),
    [("gpt2", "RoPE"), ("gemma2", "sliding windows"), ("falcon_h1", "several kinds"), ("deepseek_v3", "latents")],
)
def test_a_base_that_cannot_be_compacted_is_refused(family, reason):
    with pytest.raises(ConfigError, match=reason):
        spt_jax.remember(tiny_base(family), TEXT, tokens=4)
