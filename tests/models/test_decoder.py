"""The decoder against stored logits of transformers, and against itself in every layout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from spt_jax.models.attention import Cache, Prefix
from spt_jax.models.memory import KeysValues, to_cache
from spt_jax.testing import FAMILIES, tiny_base
from tests.golden.cases import CASES, GOLDEN, KEPT, LENGTH, token_ids
from tests.layouts import Run, every_layout, forward, lay_out

BY_NAME = {case.name: case for case in CASES}
GOLDEN_LOGITS = safetensors.numpy.load_file(GOLDEN)


def base_of(name: str):
    case = BY_NAME[name]
    return tiny_base(case.family, seed=case.seed, max_length=case.max_length, **case.overrides), token_ids(case)


@pytest.mark.parametrize("case", {case.family: case for case in reversed(CASES)}.values(), ids=str)
def test_logits_of_a_case_of_each_family_equal_stored_ones_of_transformers(case):
    """The other cases are compared with transformers itself, in tests/parity."""
    base, ids = base_of(case.name)
    ours = forward(base, *lay_out([Run(0, 0, ids)], LENGTH))[0][0]
    np.testing.assert_allclose(np.asarray(ours)[list(KEPT)], GOLDEN_LOGITS[case.name], atol=1e-4, rtol=0)


def test_every_case_is_stored():
    assert set(GOLDEN_LOGITS) == set(BY_NAME)
    assert {case.family for case in CASES} == set(FAMILIES)


def test_stored_logits_of_different_options_differ():
    """A case whose option changed nothing would guard nothing."""
    rows = list(GOLDEN_LOGITS.items())
    for i, (name, values) in enumerate(rows):
        for other, others in rows[:i]:
            assert np.abs(values - others).max() > 0.1, f"{name} and {other}"


@pytest.mark.parametrize("name", ["mistral", "smollm3", "gpt2"])
def test_padded_packed_and_child_rows_equal_the_example_alone(name):
    base, ids = base_of(name)
    runs = [run for runs in every_layout(ids).values() for run in runs]
    ours = np.asarray(forward(base, *lay_out(runs, LENGTH))[0])
    for i in range(0, len(runs), 5):
        alone = [Run(row, 0, run.example) for row, run in enumerate(runs[i : i + 5])]
        expected = np.asarray(forward(base, *lay_out(alone, LENGTH, rows=5))[0])
        for row, run in enumerate(runs[i : i + 5]):
            tokens = slice(len(run.context), len(run.example))
            np.testing.assert_allclose(ours[run.slice], expected[row, tokens], atol=2e-5)


def test_tokens_see_no_later_token_and_no_other_segment():
    """Logits of one segment do not change when any token outside of what it may see does."""
    base, ids = base_of("llama")
    runs = every_layout(ids)["children"]
    row, stream = lay_out([Run(0, r.start, r.ids, r.context, r.segment, r.parent) for r in runs], LENGTH)
    before = np.asarray(forward(base, row, stream)[0][0])
    for changed in (0, 41, 45, 56, 57, 79):
        other = row.copy()
        other[0, changed] = 5 if row[0, changed] != 5 else 6
        moved = np.abs(np.asarray(forward(base, other, stream)[0][0]) - before).max(-1) > 0
        segments = np.asarray(stream.segments[0])
        segment = segments[changed]
        may_see = (segments == segment) & (np.arange(LENGTH) >= changed)
        may_see |= np.asarray(stream.parents[0]) == segment
        assert not np.any(moved & ~may_see)
        assert moved[changed]


LEAD = 11


def prefix_and_whole(name):
    """Two functions of the embeddings of 11 leading tokens: rows after a shared prefix, and rows that repeat it."""
    base, ids = base_of(name)
    rows = np.stack([ids[20:30], ids[40:50], ids[60:70]])
    # The second row packs two examples, which both follow the prefix.
    runs = [Run(0, 0, rows[0], ids[:LEAD]), Run(2, 0, rows[2], ids[:LEAD])]
    runs += [Run(1, 0, rows[1, :4], ids[:LEAD]), Run(1, 4, rows[1, 4:], ids[:LEAD], segment=2)]
    row_ids, stream = lay_out(runs, 10)
    lead_stream = lay_out([Run(0, 0, ids[:LEAD])], LEAD)[1]
    tokens = base.model.embed(jnp.asarray(row_ids))

    def shared(start):
        _, memory = base.model.run(start[None], lead_stream, return_memory=True)
        prefix = Prefix(jax.tree.map(lambda a: a[:, 0], memory), jnp.arange(LEAD))
        hidden, _ = base.model.run(tokens, stream, prefix)
        return base.model.logits(hidden)

    whole_runs = [Run(0, 0, rows[0]), Run(1, 0, rows[1, :4]), Run(2, 0, rows[1, 4:]), Run(3, 0, rows[2])]
    whole_ids, _ = lay_out(whole_runs, 10)
    _, whole_stream = lay_out([Run(r.row, 0, np.concatenate([ids[:LEAD], r.ids])) for r in whole_runs], LEAD + 10)
    whole_tokens = base.model.embed(jnp.asarray(whole_ids))

    def whole(start):
        repeated = jnp.broadcast_to(start[None], (4, *start.shape))
        hidden, _ = base.model.run(jnp.concatenate([repeated, whole_tokens], 1), whole_stream)
        out = base.model.logits(hidden[:, LEAD:])
        return jnp.stack([out[0], jnp.concatenate([out[1, :4], out[2, :6]]), out[3]])

    return shared, whole, base.model.embed(jnp.asarray(ids[:LEAD])), rows


@pytest.mark.parametrize("name", ["mistral", "gpt2"])
def test_a_shared_prefix_equals_repeating_it(name):
    """Logits and gradients. Attentions merged by their log-sum-exp would pass the first and fail the second."""
    shared, whole, start, rows = prefix_and_whole(name)

    def with_loss(function):
        def loss(start):
            scores = function(start)
            return jnp.take_along_axis(jax.nn.log_softmax(scores), jnp.asarray(rows)[..., None], -1).sum(), scores

        return jax.jit(jax.grad(loss, has_aux=True))

    (ours, our_scores), (expected, scores) = with_loss(shared)(start), with_loss(whole)(start)
    np.testing.assert_allclose(our_scores, scores, atol=2e-5)
    scale = np.abs(expected).max()
    assert scale > 1e-2
    np.testing.assert_allclose(ours / scale, expected / scale, atol=1e-5)


def test_a_cache_with_empty_slots_equals_the_whole_row():
    """Two rows with different numbers of cached tokens; empty slots hold large numbers that must not be seen."""
    base, ids = base_of("mistral")
    config, slots, cached = base.config, 24, (17, 5)
    examples = [ids[:27], ids[50:65]]
    row, stream = lay_out([Run(i, 0, e) for i, e in enumerate(examples)], 27)
    expected, memory = forward(base, row, stream)
    keys, values = memory["self"].keys, memory["self"].values
    shape = (config.layers, 2, slots, config.kv_heads, config.head_size)
    held = [np.full(shape, 1e3, np.float32) for _ in range(2)]
    positions, segments = np.zeros((2, slots), np.int32), np.zeros((2, slots), np.int32)
    for i, n in enumerate(cached):
        held[0][:, i, :n], held[1][:, i, :n] = keys[:, i, :n], values[:, i, :n]
        positions[i, :n], segments[i, :n] = np.arange(n), 1
    held = to_cache({"self": KeysValues(*map(jnp.asarray, held))})
    cache = Cache(held, jnp.asarray(positions), jnp.asarray(segments))
    runs = [Run(i, 0, e[n:], e[:n]) for i, (e, n) in enumerate(zip(examples, cached, strict=True))]
    ours, _ = forward(base, *lay_out(runs, 10), None, cache)
    for run, n in zip(runs, cached, strict=True):
        np.testing.assert_allclose(ours[run.slice], expected[run.row, n : n + len(run.ids)], atol=2e-5)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_changes_nothing(remat):
    base, ids = base_of("smollm3")
    base, again = (dataclasses.replace(base, model=base.model.with_options(remat=kind)) for kind in ("none", remat))
    row, stream = lay_out([Run(0, 0, ids[:20])], 20)

    def loss(base):
        def of(x):
            hidden, _ = base.model.run(x, stream)
            return jnp.square(base.model.logits(hidden)).mean()

        return jax.jit(jax.value_and_grad(of))(base.model.embed(jnp.asarray(row)))

    (value, gradient), (value_again, gradient_again) = loss(base), loss(again)
    np.testing.assert_allclose(value, value_again, rtol=1e-6)
    np.testing.assert_allclose(gradient, gradient_again, atol=1e-6)


def test_bfloat16_is_near_float32():
    """Logits in bfloat16 leave float32's by its rounding (eight bits), and come out as float32."""
    base, ids = base_of("llama")
    half = tiny_base("llama", seed=BY_NAME["llama"].seed, dtype="bfloat16")
    row, stream = lay_out([Run(0, 0, ids)], LENGTH)
    exact, rounded = forward(base, row, stream)[0], forward(half, row, stream)[0]
    assert half.dtype == jnp.bfloat16
    assert rounded.dtype == jnp.float32
    error = np.abs(np.asarray(exact - rounded)).mean() / np.asarray(exact).std()
    assert 1e-4 < error < 0.05
