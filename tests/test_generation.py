"""Generation against whole sequences run without a cache, and its programs."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spt_jax.bases.base import load_base
from spt_jax.errors import ConfigError, DataError
from spt_jax.inference.answers import Generated
from spt_jax.inference.generation import SamplingConfig, generate, programs
from spt_jax.prompts import VirtualPrompt
from spt_jax.runtime.sharding import MeshConfig, make_mesh
from spt_jax.testing import BOS_ID, EOS_ID, tiny_base
from tests.examples import HEAD, VOCAB, random_examples, sequence_logits
from tests.rigged import base_of, count_steps, virtual_of

NEW = 24
PROMPTS = [example.ids for example in random_examples("target", 4)]
GREEDY = SamplingConfig(max_new_tokens=NEW)


@functools.cache
def greedy_answers() -> list[Generated]:
    return generate(base_of(), PROMPTS, virtual_of(base_of()), GREEDY)


def regrown(base, virtual, prompt, count: int) -> tuple[list[int], list[float]]:
    """Greedy ids up to EOS and their log-probabilities: the whole sequence is run again for every token."""
    ids, log_probabilities = prompt.tolist(), []
    while len(log_probabilities) < count and ids[-1] != EOS_ID:
        scores = sequence_logits(base, virtual.tokens, np.pad(ids, (0, 64 - len(ids))))[len(ids) - 1]
        ids.append(int(scores.argmax()))
        log_probabilities.append(float(scores.max() - np.logaddexp.reduce(scores)))
    return ids[len(prompt) :], log_probabilities


def whole_log_probabilities(base, virtual, prompt, ids: list[int]) -> np.ndarray:
    """Log-probability of each of `ids` behind the prompt, from one pass over all of them."""
    whole = np.concatenate([prompt, ids])
    scores = sequence_logits(base, virtual.tokens, np.pad(whole, (0, 64 - len(whole))))
    return np.asarray(jax.nn.log_softmax(scores))[np.arange(len(prompt) - 1, len(whole) - 1), ids]


def same(ours: list[Generated], theirs: list[Generated], tolerance: float = 1e-4) -> None:
    """The same answers, but for the rounding of their log-probabilities."""
    for one, other in zip(ours, theirs, strict=True):
        assert (one.ids, one.text, one.finished) == (other.ids, other.text, other.finished)
        np.testing.assert_allclose(one.log_probabilities, other.log_probabilities, atol=tolerance, rtol=0)


# The cache and the prefix change nothing.


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen3", "smollm3", "gemma2", "gpt2", "bloom", "gpt_neo", "phi"]
)
def test_same_as_growing_the_sequence_without_a_cache(family):
    """Prompts of several lengths with virtual tokens in and behind the shared run. Mistral's window is 7 tokens."""
    base = base_of(family)
    virtual = virtual_of(base)
    assert len({len(prompt) for prompt in PROMPTS}) > 2
    answers = greedy_answers() if family == "llama" else generate(base, PROMPTS, virtual, GREEDY)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids, log_probabilities = regrown(base, virtual, prompt, NEW)
        assert answer.ids == ids
        assert answer.finished == ("eos" if ids[-1] == EOS_ID else "length")
        np.testing.assert_allclose(answer.log_probabilities, log_probabilities, atol=1e-4, rtol=0)
    assert len({tuple(answer.ids) for answer in answers}) == len(answers)


def test_the_soft_prompt_matters():
    base = base_of()
    others = generate(base, PROMPTS, virtual_of(base, -1.0), GREEDY)
    assert all(one.ids != other.ids for one, other in zip(greedy_answers(), others, strict=True))


@pytest.mark.parametrize(("lead", "batch_size"), [(0, 1), (2, 32), (len(HEAD), 32)])
def test_a_shared_prefix_is_only_a_saving(lead, batch_size):
    """The soft prompt in every row, cut in two, and all of it in front; alone and in a batch."""
    base = base_of()
    same(generate(base, PROMPTS, virtual_of(base), GREEDY, lead=lead, batch_size=batch_size), greedy_answers())


def test_each_prompt_alone():
    base = base_of()
    alone = [generate(base, [prompt], virtual_of(base), GREEDY)[0] for prompt in PROMPTS]
    same(alone, greedy_answers())


def test_prompts_that_begin_one_another():
    """Rows without an id of their own between the shared run and the last id; results in the order of the prompts."""
    base = base_of()
    prompts = [PROMPTS[1], PROMPTS[0], PROMPTS[1], PROMPTS[1][:9]]
    answers = generate(base, prompts, virtual_of(base), GREEDY)
    one, zero = greedy_answers()[1], greedy_answers()[0]
    same(answers[:3], [one, zero, one])
    assert answers[3].ids == regrown(base, virtual_of(base), PROMPTS[1][:9], NEW)[0]


def test_without_a_soft_prompt():
    base, prompt = base_of(), np.asarray([BOS_ID, 40, 41])
    (answer,) = generate(base, [prompt], sampling=GREEDY)
    assert answer.ids == regrown(base, VirtualPrompt(jnp.zeros((0, base.config.width))), prompt, NEW)[0]


def test_bfloat16():
    """Log-probabilities of what the model chooses in bfloat16 agree with the float32 model's, to that precision."""
    base = tiny_base(dtype="bfloat16")
    virtual = virtual_of(base)
    for prompt, answer in zip(PROMPTS, generate(base, PROMPTS, virtual, GREEDY), strict=True):
        expected = whole_log_probabilities(base_of(), virtual, prompt, answer.ids)
        error = np.abs(np.asarray(answer.log_probabilities) - expected)
        assert np.median(error) < 0.05
        assert error.max() < 0.3


@pytest.mark.parametrize("axes", [{"data": 4}, {"fsdp": 2, "tensor": 2}, {"data": 2, "sequence": 2}], ids=str)
def test_the_same_on_every_mesh(axes, monkeypatch):
    """Stop strings that never come make the loop stop and go on: that is no reason to compile it again."""
    expected = greedy_answers()
    decoded_steps = count_steps(monkeypatch)
    base = tiny_base(mesh=make_mesh(MeshConfig(**axes)))
    sampling = dataclasses.replace(GREEDY, stop=("nothing like it",))
    same(generate(base, PROMPTS, virtual_of(base), sampling), expected)
    assert decoded_steps == [16, NEW]
    assert programs(base.mesh, base.layout).decode._cache_size() == 1


def test_stories(stories):
    """A real model's greedy text from BOS, as transformers writes it."""
    answer = generate(
        load_base(stories, dtype="float32"), [np.asarray([1])], sampling=SamplingConfig(max_new_tokens=48)
    )[0]
    assert answer.text.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw"
        " a big, red ball."
    )


# Sampling.


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"top_k": 1, "top_p": 0.5}], ids=str)
def test_the_likeliest_alone_is_greedy(options):
    base = base_of()
    sampling = SamplingConfig(max_new_tokens=NEW, temperature=2.0, seed=5, **options)
    same(generate(base, PROMPTS, virtual_of(base), sampling), greedy_answers())


def test_seeds():
    """A prompt's text depends on the seed and the prompt's number, and not on the batch that it is in."""
    base = base_of()
    sampling = SamplingConfig(max_new_tokens=NEW, temperature=1.0, top_p=0.95, seed=3)
    first = generate(base, PROMPTS, virtual_of(base), sampling)
    same(generate(base, PROMPTS, virtual_of(base), sampling), first)
    same(generate(base, PROMPTS, virtual_of(base), sampling, lead=0, batch_size=1), first)
    same(generate(base, PROMPTS[:1], virtual_of(base), sampling), first[:1])
    others = generate(base, PROMPTS, virtual_of(base), dataclasses.replace(sampling, seed=4))
    assert all(one.ids != other.ids for one, other in zip(first, others, strict=True))
    repeated = generate(base, [PROMPTS[0]] * 4, virtual_of(base), sampling)
    assert len({tuple(answer.ids) for answer in repeated}) == 4


def test_log_probabilities_are_the_models_own():
    """Those of sampled tokens come from the distribution before temperature, top-k and top-p."""
    base = base_of()
    sampling = SamplingConfig(max_new_tokens=NEW, temperature=3.0, top_k=50, top_p=0.9)
    for prompt, answer in zip(PROMPTS, generate(base, PROMPTS, virtual_of(base), sampling), strict=True):
        expected = whole_log_probabilities(base, virtual_of(base), prompt, answer.ids)
        assert expected.std() > 0.3
        np.testing.assert_allclose(answer.log_probabilities, expected, atol=1e-4, rtol=0)


def test_every_prompt_may_have_its_own_sampling():
    """Limits, ends, stop strings, seeds and temperatures: as when each is asked by itself."""
    base = base_of()
    samplings = [
        SamplingConfig(max_new_tokens=3),
        SamplingConfig(max_new_tokens=20, temperature=1.5, seed=3),
        SamplingConfig(max_new_tokens=9, end_ids=tuple(range(3, 200))),
        SamplingConfig(max_new_tokens=20, temperature=0.7, top_k=5, stop=("e", "a")),
    ]
    together = generate(base, PROMPTS, virtual_of(base), samplings)
    for number, sampling in enumerate(samplings):
        same([together[number]], [generate(base, PROMPTS, virtual_of(base), sampling)[number]])
    assert len(together[0].ids) == 3 and together[2].finished == "eos" and len(together[2].ids) < 9
    with pytest.raises(ConfigError, match="1 samplings for 4 prompts"):
        generate(base, PROMPTS, virtual_of(base), samplings[:1])


# The programs.


def test_one_trace_per_bucket():
    """Other prompts, lengths, leads, samplings, and numbers of new tokens of the same buckets reuse the programs."""
    jax.clear_caches()  # what other tests have compiled
    base, compiled = base_of(), []

    def listen(name, _, **details):
        if name == "/jax/core/compile/backend_compile_duration":
            compiled.append(details.get("fun_name"))

    ours = list(vars(programs(base.mesh, base.layout)).values())
    virtual = virtual_of(base)
    before = [program._cache_size() for program in ours]
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        generate(base, PROMPTS, virtual, GREEDY, batch_size=3)  # rows that no other test has; two batches
        first = [program._cache_size() for program in ours]
        assert [b - a for a, b in zip(before, first, strict=True)] == [1, 0, 1, 1]  # one prompt: no mixture
        assert len(compiled) >= 2
        compiled.clear()
        for lengths, options in [
            ((3, 7, 12), {}),
            ((1, 20, 22), {"temperature": 0.5}),
            ((9,), {"temperature": 0.7, "top_k": 3, "seed": 1}),
            ((9, 8), {"temperature": 0.7, "top_p": 0.3, "max_new_tokens": 32}),
            ((5, 9), {"stop": ("a", "b c", "<pad>")}),
        ]:
            prompts = [example.ids for example in random_examples("target", 7, seed=9, lengths=lengths)]
            generate(base, prompts, virtual, SamplingConfig(**{"max_new_tokens": NEW, **options}), batch_size=3)
        generate(base, PROMPTS, virtual, GREEDY, batch_size=3, lead=3)
        assert compiled == []
        assert [program._cache_size() for program in ours] == first
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_the_frozen_base_is_no_constant_of_the_programs():
    """5 MB of weights: arguments of the programs."""
    base = tiny_base(hidden_size=128, intermediate_size=1024)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(base.params)) > 5_000_000
    before = jax.config.jax_captured_constants_warn_bytes
    jax.config.update("jax_captured_constants_warn_bytes", 100_000)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            generate(base, PROMPTS[:1], virtual_of(base), SamplingConfig(max_new_tokens=2))
            with pytest.raises(UserWarning, match="constants were captured"):
                jax.jit(lambda ids: base.model.embed(ids)).lower(jnp.zeros((1, 1), jnp.int32))
    finally:
        jax.config.update("jax_captured_constants_warn_bytes", before)


# Bad input.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1, "temperature": 1.0}, "top_k is -1"),
        ({"top_p": 0.0, "temperature": 1.0}, "top_p is 0.0"),
        ({"top_p": 1.1, "temperature": 1.0}, "top_p is 1.1"),
        ({"top_p": 0.9}, "need temperature > 0"),
        ({"top_k": 5}, "need temperature > 0"),
        ({"stop": ("a", "")}, "tuple of non-empty strings"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
    ],
    ids=str,
)
def test_wrong_sampling(options, message):
    with pytest.raises(ConfigError, match=message):
        SamplingConfig(**options)


BOS = np.asarray([BOS_ID, 5])


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        ([BOS, np.asarray([], int)], {}, DataError, "prompt 1 is empty"),
        ([BOS, np.asarray([3, VOCAB + 7])], {"virtual": True}, DataError, f"prompt 1 has id {VOCAB + 7}"),
        ([np.asarray([3, -1])], {}, DataError, "prompt 0 has id -1"),
        ([BOS, np.asarray([3, VOCAB + 2])], {}, ConfigError, "prompt 1 has virtual token 2, but no soft prompt"),
        (
            [BOS, np.full(105, 9)],
            {},
            ConfigError,
            "prompt 1: 105 tokens and max_new_tokens=24 make 129, .* 128 positions",
        ),
        ([BOS, BOS], {"lead": 2}, ConfigError, "lead is 2; these prompts share 1"),
        ([BOS, np.asarray([7, 5])], {"lead": 1}, ConfigError, "lead is 1; these prompts share 0"),
        ([BOS], {"lead": -1}, ConfigError, "lead is -1"),
        ([BOS], {"batch_size": 0}, ConfigError, "batch_size is 0"),
    ],
    ids=str,
)
def test_wrong_prompts(prompts, options, error, message):
    base = base_of()
    virtual = virtual_of(base) if options.get("virtual") else None
    options = {name: value for name, value in options.items() if name != "virtual"}
    with pytest.raises(error, match=message):
        generate(base, prompts, virtual, GREEDY, **options)


def test_every_position_can_be_used():
    """A prompt of 6 and 24 new tokens in 30 positions, and not in 29."""
    base, prompt = base_of(), PROMPTS[0][:6]
    for positions in (30, 29):
        shorter = dataclasses.replace(base.config, max_positions=positions)
        short = dataclasses.replace(base, model=base.model.with_options(config=shorter))
        if positions == 30:
            (answer,) = generate(short, [prompt], virtual_of(base), GREEDY)
            assert answer.ids == regrown(base, virtual_of(base), prompt, NEW)[0]
            continue
        with pytest.raises(ConfigError, match="make 30, but tiny-llama has 29 positions"):
            generate(short, [prompt], virtual_of(base), GREEDY)


def test_no_prompts():
    assert generate(base_of(), []) == []
