"""Memory by groups: each operation against numpy, and a model with a recurrent layer beside attention of two sizes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spt_jax.errors import ConfigError
from spt_jax.inference.decoding import PromptRows, RowSampling, decode, prefill
from spt_jax.inference.forward import encode_prefix, run_stream
from spt_jax.models import memory
from spt_jax.models.attention import Source, Stream, attend, visible
from spt_jax.models.decoder import of_row
from spt_jax.models.layout import Group, Layout, StateGroup, only_layers
from spt_jax.models.memory import KeysValues, Memory, State
from spt_jax.models.model import Model
from spt_jax.prompts import LlamaAdapter, PrefixTuning, VirtualPrompt
from spt_jax.prompts.stacking import stack_prompts
from spt_jax.prompts.storage import named_leaves
from spt_jax.serving import slots as serving
from tests.examples import QUICK_COMPILE

GROUPS = {
    "self": Group((0, 2), kv_heads=2, key_size=4, value_size=4),
    "wide": Group((1, 4), kv_heads=1, key_size=2, value_size=3),
    "recurrent": StateGroup((3,), (("sum", (5,)),)),
}
LAYOUT = Layout(vocab_size=30, width=8, max_positions=64, groups=GROUPS)
ROWS = 3


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def of_prompt(positions: int, seed: int = 0, *rows: int) -> Memory:
    """Arrays of all groups, with a row axis if its size is given."""
    arrays = {
        "self": KeysValues(noise(seed, 2, *rows, positions, 2, 4), noise(seed + 1, 2, *rows, positions, 2, 4)),
        "wide": KeysValues(noise(seed + 2, 2, *rows, positions, 1, 2), noise(seed + 3, 2, *rows, positions, 1, 3)),
        "recurrent": State({"sum": noise(seed + 4, 1, *rows, 5)}),
    }
    return jax.tree.map(jnp.asarray, arrays)


def same(ours: Memory, expected: Memory) -> None:
    assert jax.tree.structure(dict(ours)) == jax.tree.structure(dict(expected))
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def changed(function, *memories: Memory) -> Memory:
    """Applies a numpy function to keys and values; the last state replaces the others."""
    last = memories[-1]
    return {
        name: own
        if isinstance(own, State)
        else jax.tree.map(lambda *own: jnp.asarray(function(*map(np.asarray, own))), *(one[name] for one in memories))
        for name, own in last.items()
    }


def test_operations_along_positions():
    one, other = of_prompt(3), of_prompt(2, seed=10)
    assert memory.length(one) == 3
    assert memory.length({"recurrent": one["recurrent"]}) == 0
    same(memory.concatenate(one, other), changed(lambda a, b: np.concatenate([a, b], 1), one, other))
    same(memory.pad(one, 2), changed(lambda a: np.pad(a, [(0, 0), (0, 2), (0, 0), (0, 0)]), one))
    same(memory.without_position(one, 1), changed(lambda a: np.delete(a, 1, 1), one))
    same(memory.cast(one, jnp.bfloat16), jax.tree.map(lambda a: a.astype(jnp.bfloat16), one))
    without = {name: own for name, own in one.items() if name != "recurrent"}
    same(memory.of_all_layers(without, LAYOUT), {**without, "recurrent": State({"sum": jnp.zeros((1, 5))})})
    same(memory.of_all_layers(one, LAYOUT), one)
    whole = memory.of_all_layers({"recurrent": one["recurrent"]}, LAYOUT)
    same({"recurrent": whole["recurrent"]}, {"recurrent": one["recurrent"]})
    nothing = {name: memory.KeysValues(own.keys[:, :0], own.values[:, :0]) for name, own in without.items()}
    same({name: whole[name] for name in without}, nothing)
    same(memory.concatenate(whole, one), one)


def test_stacking():
    one, other = of_prompt(3), of_prompt(2, seed=10)
    rows = memory.stack_rows([one, one])
    same(rows, jax.tree.map(lambda a: np.stack([a, a], 1), one))
    stacked = memory.stack_prompts([one, None, other])
    for name, own in stacked.items():
        padded = [one[name], jax.tree.map(np.zeros_like, one[name]), memory.pad(other, 1)[name]]
        jax.tree.map(lambda got, *arrays: np.testing.assert_array_equal(got, np.stack(arrays)), own, *padded)
    last = {"self": jax.tree.map(lambda a: a[1:], one["self"])}
    stacked = memory.stack_last_layers([last, {"self": one["self"]}])["self"]
    np.testing.assert_array_equal(stacked.keys[0, 0], 0)
    np.testing.assert_array_equal(stacked.keys[0, 1], one["self"].keys[1])
    np.testing.assert_array_equal(stacked.values[1], one["self"].values)
    with pytest.raises(ConfigError, match="not compatible: their arrays have the shapes"):
        memory.stack_last_layers([{"self": one["self"]}, {"self": other["self"]}])


def test_the_cache():
    found = of_prompt(6, 0, ROWS)
    cached = memory.to_cache(found)
    np.testing.assert_array_equal(cached["wide"].keys, found["wide"].keys.transpose(0, 1, 3, 4, 2))
    np.testing.assert_array_equal(cached["wide"].values, found["wide"].values.transpose(0, 1, 3, 2, 4))
    same({"recurrent": cached["recurrent"]}, {"recurrent": found["recurrent"]})
    back = memory.from_cache(jax.tree.map(lambda a: a[0], cached["self"]), 4)
    np.testing.assert_array_equal(back.keys, found["self"].keys[0, :, :4])
    np.testing.assert_array_equal(back.values, found["self"].values[0, :, :4])
    empty = memory.empty_cache(LAYOUT, ROWS, 6, jnp.float32)
    same(empty, jax.tree.map(np.zeros_like, cached))


def test_writing_to_the_cache():
    cache = memory.to_cache(of_prompt(6, 0, ROWS))
    whole = of_prompt(6, 0, ROWS)
    new = of_prompt(1, 20, ROWS)

    def written(places: list[int]) -> Memory:
        def put(old: np.ndarray, own: np.ndarray) -> np.ndarray:
            old = old.copy()
            for row, place in enumerate(places):
                old[:, row, place] = own[:, row, 0]
            return old

        return memory.to_cache(changed(put, whole, new))

    same(memory.put(cache, memory.to_cache(new), jnp.int32(4)), written([4] * ROWS))
    same(memory.put_each(cache, new, jnp.asarray([5, 0, 2])), written([5, 0, 2]))

    some, rows = of_prompt(2, 30, 2), np.asarray([2, 0])
    ours = memory.put_rows(cache, memory.to_cache(some), jnp.asarray(rows), slice(3, 5))
    expected = jax.tree.map(np.array, whole)
    for number, row in enumerate(rows):
        for name in ("self", "wide"):
            for part in ("keys", "values"):
                getattr(expected[name], part)[:, row, 3:5] = getattr(some[name], part)[:, number]
        expected["recurrent"].arrays["sum"][:, row] = some["recurrent"].arrays["sum"][:, number]
    same(ours, memory.to_cache(jax.tree.map(jnp.asarray, expected)))


def test_only_values_that_are_not_finite_become_0():
    found = of_prompt(2)
    found["self"] = jax.tree.map(lambda a: a.at[0, 0, 0, :2].set(jnp.asarray([jnp.inf, jnp.nan])), found["self"])
    cleaned = memory.finite(found)
    np.testing.assert_array_equal(cleaned["self"].keys, found["self"].keys)
    np.testing.assert_array_equal(cleaned["self"].values, np.nan_to_num(found["self"].values, nan=0, posinf=0))
    same({"recurrent": cleaned["recurrent"]}, {"recurrent": found["recurrent"]})


def test_a_prefix_for_several_groups():
    method = PrefixTuning(length=3)
    shapes = {name: leaf.shape for name, leaf in named_leaves(method.spec(LAYOUT)).items()}
    assert shapes == {
        "prefix/keys": (2, 3, 2, 4),
        "prefix/values": (2, 3, 2, 4),
        "prefix/wide/keys": (2, 3, 1, 2),
        "prefix/wide/values": (2, 3, 1, 3),
    }
    found = {name: own for name, own in of_prompt(3).items() if name != "recurrent"}
    free = {name: {"keys": own.keys / 2, "values": own.values / 2} for name, own in found.items()}
    virtual = method.materialize({"free": free, "scale": jnp.float32(2)}, MODEL)
    same(virtual.prefix.memory, found)
    assert virtual.prefix_length == 3
    layers = memory.by_layer(found, LAYOUT)
    assert [own.values.shape for own in layers] == [(3, 2, 4), (3, 1, 3), (3, 2, 4), (3, 1, 3)]
    np.testing.assert_array_equal(layers[3].keys, found["wide"].keys[1])


def test_a_gated_prefix_for_several_groups():
    shapes = {name: leaf.shape for name, leaf in named_leaves(LlamaAdapter(length=3, layers=3).spec(LAYOUT)).items()}
    assert shapes == {
        "gated/keys": (1, 3, 2, 4),
        "gated/values": (1, 3, 2, 4),
        "gated/wide/keys": (2, 3, 1, 2),
        "gated/wide/values": (2, 3, 1, 3),
        "gated/gates": (3,),
        "gated/rows": (3, 3, 8),
    }
    assert LAYOUT.attention_layers == [0, 1, 2, 4]
    assert list(only_layers(LAYOUT.attention_groups, [1])) == ["wide"]


def test_layouts_with_equal_facts_share_programs():
    again = dataclasses.replace(LAYOUT, groups=dict(GROUPS))
    assert again == LAYOUT and hash(again) == hash(LAYOUT)
    assert dataclasses.replace(LAYOUT, groups={"self": GROUPS["self"]}) != LAYOUT


# A small model with all kinds of memory.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mixed(Model):
    """Attention with values larger than keys, and a sum that decays, side by side; no positions but causality."""

    weights: dict

    layout = Layout(30, 8, 64, {"wide": Group((0,), 1, 4, 6), "recurrent": StateGroup((1,), (("sum", (8,)),))})
    dtype, mesh = jnp.dtype("float32"), None

    @property
    def params(self):
        return self.weights

    @property
    def input_matrix(self):
        return self.weights["table"]

    output_matrix = input_matrix

    def embed(self, ids):
        return jnp.take(self.weights["table"], ids, axis=0)

    def logits(self, hidden):
        return hidden @ self.weights["table"].T

    def run(self, x, stream, prefix=None, cache=None, gated=None, *, return_memory=False, return_hidden=True):
        assert gated is None
        rows = x.shape[0]
        keys, values = ((x @ self.weights[name])[:, :, None] for name in ("key", "value"))
        sources, total = (
            [Source(keys, values, visible(stream, stream.positions, stream.segments))],
            jnp.zeros((rows, 8)),
        )
        if prefix is not None:
            many = stream.prompt_index is not None
            held, positions = of_row(stream.prompt_index, (prefix.memory, prefix.positions))
            pair = jax.tree.map(lambda a: a[:, 0] if many else a[0], held["wide"])
            mask = visible(stream, jnp.broadcast_to(positions, (rows, positions.shape[-1])), None)
            sources.insert(0, Source(pair.keys, pair.values, mask))
            state = held["recurrent"].arrays["sum"]
            total = state[:, 0] if many else jnp.broadcast_to(state[0], total.shape)
        if cache is not None:
            pair = memory.from_cache(jax.tree.map(lambda a: a[0], cache.memory["wide"]), cache.positions.shape[1])
            sources.insert(0, Source(pair.keys, pair.values, visible(stream, cache.positions, cache.segments)))
            total = cache.memory["recurrent"].arrays["sum"][0]

        def step(total, inputs):
            token, segment = inputs
            total = jnp.where(segment[:, None] > 0, 0.9 * total + token, total)
            return total, total

        added = jnp.swapaxes(x @ self.weights["input"], 0, 1)
        total, totals = jax.lax.scan(step, total, (added, jnp.swapaxes(stream.segments, 0, 1)))
        attended = attend((x @ self.weights["query"])[:, :, None], sources)[:, :, 0]
        hidden = x + attended @ self.weights["output"] + jnp.tanh(jnp.swapaxes(totals, 0, 1))
        own = {"wide": KeysValues(keys[None], values[None]), "recurrent": State({"sum": total[None]})}
        return hidden if return_hidden else None, own if return_memory else None


def mixed() -> Mixed:
    sizes = {"table": (30, 8), "query": (8, 4), "key": (8, 4), "value": (8, 6), "output": (6, 8), "input": (8, 8)}
    return Mixed({name: jnp.asarray(noise(seed, *shape)) for seed, (name, shape) in enumerate(sizes.items())})


MODEL = mixed()
LEAD = np.asarray([30, 31, 5, 7, 30], np.int32)
IDS = np.asarray([[4, 9, 2, 8], [11, 3, 6, 1]], np.int32)


def virtual_of(seed: int) -> VirtualPrompt:
    return VirtualPrompt(tokens=jnp.asarray(noise(seed, 2, 8)))


def stream_of(rows: int, length: int, start: int = 0, prompt_index=None) -> Stream:
    positions = jnp.broadcast_to(start + jnp.arange(length, dtype=jnp.int32), (rows, length))
    return Stream(positions, jnp.ones_like(positions), jnp.zeros_like(positions), prompt_index)


def whole_logits(virtual: VirtualPrompt | None, ids: jax.Array) -> jax.Array:
    """The logits [T, V] of one row, run at once."""
    return MODEL.logits(run_stream(MODEL, virtual, ids[None], stream_of(1, len(ids)))[0])[0]


whole = jax.jit(whole_logits, compiler_options=QUICK_COMPILE)


def after_lead(virtual: VirtualPrompt, padding: int = 0) -> jax.Array:
    """The logits of rows after a lead that is encoded once."""
    lead = np.pad(LEAD, (0, padding))
    prefix = encode_prefix(MODEL, virtual, jnp.asarray(lead), jnp.int32(len(LEAD)))
    hidden, _ = run_stream(MODEL, virtual, jnp.asarray(IDS), stream_of(2, 4, len(LEAD)), prefix)
    return MODEL.logits(hidden)


def inline(virtual: VirtualPrompt) -> jax.Array:
    """The same logits, with the lead in each row."""
    return jnp.stack([whole_logits(virtual, jnp.asarray([*LEAD, *ids]))[len(LEAD) :] for ids in IDS])


@pytest.mark.parametrize("padding", [0, 3])
def test_a_shared_lead_leaves_its_state_behind(padding):
    def logits_and_gradient(function):
        def loss(tokens):
            logits = function(VirtualPrompt(tokens=tokens))
            return jnp.square(logits).mean(), logits

        gradient, logits = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK_COMPILE)(virtual_of(0).tokens)
        return logits, gradient

    logits, gradient = logits_and_gradient(functools.partial(after_lead, padding=padding))
    expected, expected_gradient = logits_and_gradient(inline)
    np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5 * np.abs(expected_gradient).max())


def test_rows_after_different_leads():
    prompts = [virtual_of(0), virtual_of(1)]
    leads, lengths = np.stack([LEAD, LEAD]), np.asarray([5, 3], np.int32)
    stacked, index = stack_prompts(prompts), jnp.asarray([1, 0])
    prefix = encode_prefix(MODEL, stacked, jnp.asarray(leads), jnp.asarray(lengths))
    starts = jnp.asarray(lengths)[index][:, None]
    stream = dataclasses.replace(stream_of(2, 4, 0, index), positions=starts + jnp.arange(4, dtype=jnp.int32)[None])
    ours = MODEL.logits(run_stream(MODEL, stacked, jnp.asarray(IDS), stream, prefix)[0])
    for row, prompt in enumerate((1, 0)):
        lead = LEAD[: lengths[prompt]]
        expected = whole(prompts[prompt], np.concatenate([lead, IDS[row]]))[len(lead) :]
        np.testing.assert_allclose(ours[row], expected, atol=1e-5, rtol=1e-5)


def grown(virtual: VirtualPrompt | None, ids: np.ndarray, count: int) -> list[int]:
    """The ids that continue a row, by running it whole for each of them."""
    for _ in range(count):
        ids = np.append(ids, int(np.argmax(whole(virtual, ids)[-1])))
    return ids[-count:].tolist()


def greedy(rows: int) -> RowSampling:
    zeros = jnp.zeros(rows, jnp.int32)
    return RowSampling(jnp.zeros(rows), zeros, jnp.ones(rows), zeros.astype(jnp.uint32), zeros)


def test_generation_is_growing_the_rows():
    virtual, lengths = virtual_of(0), np.asarray([3, 1], np.int32)
    prefix = encode_prefix(MODEL, virtual, jnp.asarray(LEAD))
    rows = PromptRows(
        jnp.asarray(IDS[:, :3] * (np.arange(3) < lengths[:, None])),
        jnp.asarray(lengths),
        jnp.asarray([IDS[0, 3], IDS[1, 1]]),
        jnp.full(2, len(LEAD), jnp.int32),
    )
    state = prefill(MODEL, 6, virtual, prefix, rows)
    never, limits = jnp.full((2, 1), -1, jnp.int32), jnp.full(2, 5, jnp.int32)
    state = decode(MODEL, virtual, prefix, jnp.int32(5), jnp.zeros(2, bool), greedy(2), never, limits, None, state)
    for row, length in enumerate(lengths):
        start = np.concatenate([LEAD, IDS[row, : length + 1]])
        assert state.ids[row, 1:6].tolist() == grown(virtual, start, 5)


def test_slots_hold_each_requests_memory():
    """Two requests of prompts with leads, into slots that others have used."""
    virtual = virtual_of(0)
    prefix = encode_prefix(MODEL, virtual, jnp.asarray(np.pad(LEAD, (0, 2))), jnp.int32(len(LEAD)))
    slots = serving.empty_slots(MODEL, 3, 24)
    slots = dataclasses.replace(
        slots, cache=dataclasses.replace(slots.cache, memory=jax.tree.map(lambda a: a + 1, slots.cache.memory))
    )
    lengths = np.asarray([4, 2], np.int32)
    starts, none = jnp.full(2, len(LEAD), jnp.int32), jnp.zeros(2, jnp.int32)
    requests = serving.RequestIds(jnp.asarray(IDS), jnp.asarray(lengths), starts, none)
    no, prompts = jnp.asarray(False), [(None, prefix)] * 2
    slots, firsts = serving.admit(MODEL, prompts, None, requests, greedy(2), jnp.asarray([2, 0]), no, slots)
    until = serving.Until(jnp.int32(4), jnp.int32(3), jnp.full(8, -1, jnp.int32))
    slots, new, steps = serving.decode(20, MODEL, jnp.asarray([True, False, True]), no, until, None, slots)
    assert int(steps) == 4
    for row, slot in enumerate((2, 0)):
        expected = grown(virtual, np.concatenate([LEAD, IDS[row, : lengths[row]]]), 5)
        assert [int(firsts.ids[row]), *new.ids[:4, slot].tolist()] == expected
