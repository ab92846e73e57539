"""What each method says of itself: where it starts, what it is made of, and which options it refuses."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spt_jax.data.batches import pack, plan_batches
from spt_jax.data.examples import Example
from spt_jax.data.templates import Template
from spt_jax.errors import ConfigError
from spt_jax.inference.forward import encode_prefix, output_logits
from spt_jax.models.memory import KeysValues
from spt_jax.prompts import (
    METHODS,
    ContextPromptTuning,
    DecomposedPromptTuning,
    LlamaAdapter,
    LowRankPromptTuning,
    PrefixTuning,
    PromptTuning,
    PTuning,
    ResidualPromptTuning,
    VirtualPrompt,
    initializers,
)
from spt_jax.prompts.initializers import initialize
from spt_jax.prompts.networks import init_lstm, lstm
from spt_jax.prompts.storage import save_prompt
from spt_jax.testing import tiny_base
from spt_jax.training.objectives import CrossEntropy
from spt_jax.training.step import loss_and_gradient
from tests.examples import QUICK_COMPILE, VOCAB, random_examples
from tests.family import has_length

WORDS = "Hello world, this is the question"


@functools.cache
def base_of(family: str = "llama"):
    return tiny_base(family)


def start_of(method, base, seed: int = 0) -> VirtualPrompt:
    return method.materialize(method.init_params(jax.random.key(seed), base), base.model)


def of(virtual: VirtualPrompt) -> KeysValues:
    """The keys and values of a prefix."""
    return virtual.prefix.memory["self"]


@functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
def logits_of(model, virtual, batch):
    prefix = encode_prefix(model, virtual, batch.lead_ids)
    return output_logits(model, virtual, prefix, batch.rows)


def next_token_logits(base, virtual, ids) -> np.ndarray:
    """[T - 1, V]: at every position of one sequence but the last."""
    ids = np.asarray(ids, np.int32)
    example = Example(ids, np.arange(len(ids)) >= 1, (), 0, 0)
    return np.asarray(logits_of(base.model, virtual, pack([example], plan_batches([example], lead=0, batch_size=1))))[0]


TEXT = np.asarray([1, 40, 99, 17, 250, 31, 8], np.int32)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "smollm3", "qwen3", "gemma2"])
def test_a_prefix_of_a_text_is_the_text(family):
    """Learned positions, sliding windows, layers without RoPE and normed keys included."""
    base = base_of(family)
    words = base.tokenizer.encode(WORDS, add_special_tokens=False)
    method = PrefixTuning(length=len(words), init=initializers.text(WORDS))
    ours = next_token_logits(base, start_of(method, base), TEXT)
    whole = next_token_logits(base, None, [*words, *TEXT])
    np.testing.assert_allclose(ours, whole[len(words) :], atol=2e-5)


def test_a_prefix_goes_on_from_a_saved_prompt(tmp_path):
    base = base_of()
    tokens = PromptTuning(length=4)
    virtual = start_of(tokens, base)
    template = Template(prompt="<soft>{a}", target="{b}", virtual_tokens=4)
    save_prompt(tmp_path / "tokens", base, tokens, virtual, template)
    prefix = PrefixTuning(length=4, init=initializers.prompt(tmp_path / "tokens"))
    ours = next_token_logits(base, start_of(prefix, base), TEXT)
    ids = [*(VOCAB + np.arange(4)), *TEXT]
    np.testing.assert_allclose(ours, next_token_logits(base, virtual, ids)[4:], atol=2e-5)

    trained = jax.tree.map(lambda a: a + 0.1, start_of(prefix, base))
    bare = Template(prompt="{a}", target="{b}")
    save_prompt(tmp_path / "prefix", base, prefix, trained, bare)
    again = start_of(dataclasses.replace(prefix, init=initializers.prompt(tmp_path / "prefix")), base)
    np.testing.assert_allclose(of(again).keys, of(trained).keys, rtol=1e-6)
    with pytest.raises(ConfigError, match=r"a prefix of 4 positions; method.length is 5"):
        start_of(PrefixTuning(length=5, init=initializers.prompt(tmp_path / "prefix")), base)


def test_prefixes_start_as_asked():
    base = base_of()
    zero = of(start_of(PrefixTuning(length=5, start="zero"), base))
    assert not np.any(zero.keys) and not np.any(zero.values)
    tokens = of(start_of(PrefixTuning(length=40), base))
    random = of(start_of(PrefixTuning(length=40, start="random"), base))
    np.testing.assert_allclose(random.values.std((0, 1)), tokens.values.std((0, 1)), rtol=0.5)
    network = start_of(PrefixTuning(length=40, reparameterization="mlp"), base, seed=3)
    assert np.asarray(of(network).keys).std() == pytest.approx(np.asarray(tokens.keys).std(), rel=0.2)
    sunk = of(start_of(PrefixTuning(length=5, sink=2), base))
    bos = start_of(PrefixTuning(length=1, init=initializers.array(np.asarray(base.params["embedding"][1:2]))), base)
    np.testing.assert_allclose(sunk.keys[:, 0], of(bos).keys[:, 0], atol=1e-6)


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_an_encoder_starts_at_the_scale_of_the_table(encoder):
    """PEFT's starts wherever torch's default weights lead."""
    base = base_of()
    rows = np.asarray(start_of(PTuning(length=30, encoder=encoder), base).tokens)
    table = np.asarray(base.params["embedding"])
    assert rows.std() == pytest.approx(table.std(), rel=0.35)


def test_the_lstm_is_the_textbooks():
    layer = init_lstm(jax.random.key(0), 5, 3)
    layer["bias"] = jax.random.normal(jax.random.key(1), (12,))
    x = np.asarray(jax.random.normal(jax.random.key(2), (6, 5)))

    def sigmoid(z):
        return 1 / (1 + np.exp(-z))

    hidden, cell, states = np.zeros(3), np.zeros(3), []
    for row in x:
        gates = row @ np.asarray(layer["input"]) + hidden @ np.asarray(layer["recurrent"]) + np.asarray(layer["bias"])
        enter, forget, candidate, leave = np.split(gates, 4)
        cell = sigmoid(forget) * cell + sigmoid(enter) * np.tanh(candidate)
        hidden = sigmoid(leave) * np.tanh(cell)
        states.append(hidden)
    np.testing.assert_allclose(lstm(layer, jnp.asarray(x)), states, atol=1e-6)
    backward = lstm(layer, jnp.asarray(x[::-1].copy()), reverse=True)
    np.testing.assert_allclose(backward[::-1], states, atol=1e-6)


@pytest.mark.parametrize(
    "method", [ResidualPromptTuning(length=6), LowRankPromptTuning(length=6), ContextPromptTuning(length=6)]
)
def test_what_changes_rows_starts_at_them(method):
    base = base_of()
    rows = np.asarray(start_of(method, base).tokens)
    table = np.asarray(base.params["embedding"])
    assert all((row == table).all(1).any() for row in rows)


def test_low_rank_rows_differ_from_their_start_by_a_matrix_of_that_rank():
    base, method = base_of(), LowRankPromptTuning(length=8, rank=2)
    params = method.init_params(jax.random.key(0), base)
    params["right"] = jax.random.normal(jax.random.key(1), params["right"].shape)
    change = method.materialize(params, base.model).tokens - params["start"]
    assert np.linalg.matrix_rank(np.asarray(change), tol=1e-4) == 2


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_closed_gate_is_the_bare_model(family):
    base = base_of(family)
    method = LlamaAdapter(length=5, layers=2)
    virtual = start_of(method, base)
    bare = next_token_logits(base, None, TEXT)
    np.testing.assert_array_equal(next_token_logits(base, virtual, TEXT), bare)
    opened = dataclasses.replace(virtual, gated=dataclasses.replace(virtual.gated, gates=jnp.ones(2)))
    assert np.abs(next_token_logits(base, opened, TEXT) - bare).max() > 0.01


def test_the_decomposed_change_is_added_to_the_texts_own_embeddings():
    base, method = base_of(), DecomposedPromptTuning(length=3, span=6, rank=2)
    params = method.init_params(jax.random.key(0), base)
    params["right"] = jax.random.normal(jax.random.key(1), params["right"].shape)
    virtual = method.materialize(params, base.model)
    ids = [*(VOCAB + np.arange(3)), *TEXT]
    table = np.asarray(base.params["embedding"])
    rows = np.concatenate([virtual.tokens, table[TEXT] + np.pad(virtual.shift[3:], [(0, len(TEXT) - 3), (0, 0)])])
    given = VirtualPrompt(tokens=jnp.asarray(rows))
    ours = next_token_logits(base, virtual, ids)
    theirs = next_token_logits(base, given, VOCAB + np.arange(len(ids)))[:, :VOCAB]
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_context_tokens_stay_within_their_balls():
    base, method = base_of(), ContextPromptTuning(length=4, kinds=(1, 2, 0, 6), epsilon=3.0, format_epsilon=1.0)
    params = method.init_params(jax.random.key(0), base)
    params["delta"] = jnp.asarray(np.random.default_rng(0).normal(size=params["delta"].shape), jnp.float32)
    norms = np.linalg.norm(method.project(params)["delta"], axis=1)
    scale = (base.config.width / 2048) ** 0.5
    np.testing.assert_allclose(norms, [scale, 3 * scale, 0, 3 * scale], rtol=1e-5)
    inside = {**params, "delta": 1e-3 * params["delta"]}
    np.testing.assert_array_equal(method.project(inside)["delta"][:2], inside["delta"][:2])


def test_a_context_in_words():
    """Its labels are tokens of their own, as a target's are; what lies between them is encoded piece by piece."""
    base = base_of()
    method = ContextPromptTuning(context="The question\n[[ world]]\nHello[[ the]]\n", decay=0.5).bind(base.tokenizer)
    pieces = ["The question\n", " world", "\nHello", " the", "\n"]
    ids = [base.tokenizer.encode(piece, add_special_tokens=False) for piece in pieces]
    assert method.ids == tuple(itertools.chain(*ids))
    kinds = [2, 4, 6, 8, 10]
    assert method.kinds == tuple(kind for kind, piece in zip(kinds, ids, strict=True) for _ in piece)
    assert method.length == method.token_count == len(method.ids)
    labels = {i: 0.5 ** (2 if kind == 4 else 1) for i, kind in enumerate(method.kinds) if kind in (4, 8)}
    found = method.auxiliary()
    assert dict(zip(found.numbers, found.weights, strict=True)) == labels
    assert found.ids == tuple(method.ids[i] for i in labels)
    rows = method.init_params(jax.random.key(0), base)["start"]
    np.testing.assert_array_equal(rows, np.asarray(base.params["embedding"])[list(method.ids)])
    lead = np.asarray([1, *(base.config.vocab_size + np.arange(method.length))])
    found.check(lead, base.config.vocab_size)
    with pytest.raises(ConfigError, match="must come first"):
        found.check(lead[:-2], base.config.vocab_size)
    targets = found.targets(jnp.asarray(lead), base.config.vocab_size)
    assert targets.outputs.tolist() == [list(labels)]  # BOS comes first, so the label i is predicted at i
    np.testing.assert_allclose(targets.weights[0], list(labels.values()))
    unpaired = found.targets(jnp.asarray(lead[:-2]), base.config.vocab_size)
    assert np.isnan(unpaired.weights).sum() == sum(i >= method.length - 2 for i in labels)
    examples = random_examples("target", 2)
    batch = pack(examples, plan_batches(examples, lead=0, batch_size=2))
    with pytest.raises(ConfigError, match="cpt has a loss on the leading ids, and the batch has none"):
        loss_and_gradient(method, CrossEntropy(), base.model, {"start": rows, "delta": rows}, batch)
    assert method.bind(base.tokenizer) is method
    with pytest.raises(ConfigError, match=r"use method\.bind"):
        ContextPromptTuning(context="a[[b]]").init_params(jax.random.key(0), base)
    with pytest.raises(ConfigError, match=r"leave method\.length=3 out"):
        ContextPromptTuning(context="The question", length=3).bind(base.tokenizer)
    with pytest.raises(ConfigError, match="ids go up to 999"):
        ContextPromptTuning(ids=(999,)).init_params(jax.random.key(0), base)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        *((name, {"length": 0}, "length is 0") for name in METHODS if has_length(name)),
        ("prefix_tuning", {"sink": 20}, "sink is 20; it must be in 0 to 19"),
        ("prefix_tuning", {"hidden": 0}, "hidden is 0"),
        ("p_tuning", {"hidden": 0}, "hidden is 0"),
        ("p_tuning", {"init": initializers.prompt("a")}, "an encoder cannot start at given rows"),
        ("residual_prompt_tuning", {"bottleneck": 0}, "bottleneck is 0"),
        ("residual_prompt_tuning", {"network_rate": 0.0}, "network_rate is 0"),
        ("deep_prompts", {"classes": 1}, "classes is 1"),
        ("low_rank_prompt_tuning", {"length": 4, "rank": 5}, "rank is 5; it must be in 1 to the length, 4"),
        ("decomposed_prompt_tuning", {"rank": 0}, "rank is 0"),
        ("decomposed_prompt_tuning", {"change_rate": 0.0}, "change_rate is 0"),
        ("cpt", {"length": 3, "kinds": (1, 2)}, "kinds has 2 numbers for 3 virtual tokens"),
        ("cpt", {"epsilon": -1.0}, "at least 0"),
        ("cpt", {"decay": 1.5}, "decay is 1.5"),
        ("cpt", {"ids": (1, 2), "kinds": (1,)}, "ids has 2 numbers for 1 virtual tokens"),
        ("llama_adapter", {"layers": 0}, "layers is 0"),
        ("state_tuning", {"noise": -1.0}, "noise is -1"),
        ("state_tuning", {"noise": 0.1, "path": "a"}, "give only one"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ConfigError, match=message):
        METHODS[name](**options)


def test_more_layers_than_the_base_has():
    with pytest.raises(ConfigError, match="layers is 9; tiny-llama has 3 layers"):
        LlamaAdapter(layers=9).init_params(jax.random.key(0), base_of())


def test_saved_rows_start_other_methods(tmp_path):
    """Token rows of a saved prompt, whichever method they came from."""
    base, method = base_of(), PTuning(length=4)
    virtual = start_of(method, base)
    template = Template(prompt="<soft>{a}", target="{b}", virtual_tokens=4)
    save_prompt(tmp_path / "prompt", base, method, virtual, template)
    rows = initialize(initializers.prompt(tmp_path / "prompt"), jax.random.key(0), base, 4)
    np.testing.assert_array_equal(rows, virtual.tokens)
