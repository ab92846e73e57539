"""Slots that share the memory of long prompts give the answers that each request gets alone."""

import dataclasses

import jax
import numpy as np
import pytest

import spt_jax
from spt_jax.errors import ConfigError
from spt_jax.inference.generation import SamplingConfig, generate
from spt_jax.prompts import PrefixTuning, PromptTuning
from spt_jax.runtime.sharding import MeshConfig, make_mesh
from spt_jax.serving.bank import PromptBank
from spt_jax.serving.engine import Engine
from spt_jax.serving.fairness import Sender
from spt_jax.serving.requests import Request
from spt_jax.testing import tiny_base
from tests.serving.test_engine import same

# Three that are shared, the last with virtual tokens after the text too, and one that is copied.
METHODS = {
    "keys": (PrefixTuning(length=70), "A word: {text}\n"),
    "tokens": (PromptTuning(length=66, pin_prefix=True), "<soft>{text}\n"),
    "around": (PromptTuning(length=67), "<soft:64>{text}\n<soft:3>"),
    "short": (PrefixTuning(length=4), "{text}\n"),
}
SHARED = ("keys", "tokens", "around")
SAMPLINGS = (
    SamplingConfig(max_new_tokens=9),
    SamplingConfig(max_new_tokens=12, temperature=1.3, seed=5),
    SamplingConfig(max_new_tokens=6, temperature=0.7, top_k=20, top_p=0.9, seed=11),
)


def bank_of(folder, base, names=METHODS) -> PromptBank:
    bank = PromptBank(base)
    for name in names:
        method, prompt = METHODS[name]
        params = jax.tree.map(lambda a: a + 0.2, method.init_params(jax.random.key(len(name)), base))
        template = spt_jax.Template(prompt=prompt, target="{label}", virtual_tokens=method.token_count)
        spt_jax.save_prompt(folder / name, base, method, method.materialize(params, base.model), template)
        bank.add(name, spt_jax.load_prompt(folder / name, base))
    return bank


@pytest.fixture(scope="module")
def bank(tmp_path_factory) -> PromptBank:
    return bank_of(tmp_path_factory.mktemp("prompts"), tiny_base())


def requests_of(bank: PromptBank, names=(*METHODS, None), texts=("a question", "the", "and another")) -> list[Request]:
    return [
        Request(bank.request_ids(name, {"text": text}), name, SAMPLINGS[(number + place) % 3], alternatives=number % 2)
        for number, text in enumerate(texts)
        for place, name in enumerate(names)
    ]


def check(engine: Engine, requests: list[Request], plain: PromptBank | None = None) -> None:
    """Compares the answers with those of `generate` on the bank's base, or on that of another bank."""
    bank = plain or engine.bank
    for ours, request in zip(engine.generate(requests), requests, strict=True):
        virtual = None if request.prompt is None else bank.entry(request.prompt).virtual
        same(ours, generate(bank.base, [request.ids], virtual, request.sampling)[0])


def written(engine: Engine) -> list[int]:
    """Returns a list to which the engine adds the number of positions of each prompt that it writes."""
    counts, put = [], engine._shared._put

    def counting(arrays, prefix, entries, segment):
        counts.append(int((entries < engine._shared.capacity).sum()))
        return put(arrays, prefix, entries, segment)

    engine._shared._put = counting
    return counts


def lengths(bank: PromptBank, names) -> list[int]:
    return [bank.held(name).start for name in names]


@pytest.mark.parametrize("slots", [3, 16])
def test_a_mixture_is_answered_as_each_alone(bank: PromptBank, slots: int):
    """Each shared prompt is written once; slots have no room for one, so that it cannot be copied into them."""
    engine = Engine(bank, slots=slots, context=48, shared=256)
    counts = written(engine)
    check(engine, requests_of(bank))
    assert sorted(counts) == sorted(lengths(bank, SHARED))
    assert not any(place.users for place in engine._shared._places.values())


def test_prompts_replace_those_that_no_request_reads(bank: PromptBank):
    """There is room for one prompt at a time: requests under others wait, the rest does not, and none waits forever."""
    engine = Engine(bank, slots=4, context=48, shared=max(lengths(bank, SHARED)))
    counts = written(engine)
    check(engine, requests_of(bank))
    assert set(counts) == set(lengths(bank, SHARED)) and len(counts) <= 9
    check(engine, requests_of(bank, ["keys"]))


def test_a_request_that_waits_for_room_is_not_overtaken(bank: PromptBank):
    engine = Engine(bank, slots=4, context=48, shared=max(lengths(bank, SHARED)))
    long, short = SamplingConfig(max_new_tokens=30), SamplingConfig(max_new_tokens=2)

    def submitted(client: str, name: str, sampling: SamplingConfig):
        ids = bank.request_ids(name, {"text": "the"})
        return engine.submit(Request(ids, name, sampling, sender=Sender(client, 0)))

    first, waits = submitted("a", "keys", long), submitted("b", "tokens", short)
    later, copied = submitted("c", "keys", short), submitted("d", "short", short)
    while not waits.done:
        engine.step()
        assert copied.ids
        assert first.done or not waits.ids
        assert waits.ids or not later.ids
    while not engine.idle:
        engine.step()
    assert later.done


def test_with_chunks_and_drafts(bank: PromptBank):
    engine = Engine(bank, slots=2, context=96, shared=256, chunk=16, lookup=4)
    check(engine, requests_of(bank, texts=("again and again and again", "the", "the cat and the cat and the")))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mistral", {"sliding_window": 8}),
        ("gemma3_text", {"sliding_window": 8}),
        ("deepseek_v3", {}),
        ("bloom", {}),
        ("gemma4_text", {}),
    ],
)
def test_families(tmp_path, family: str, options):
    """Windows, with pinned virtual tokens; latents; ALiBi; layers that read those of others."""
    bank = bank_of(tmp_path, tiny_base(family, **options), ["tokens", "keys"])
    check(Engine(bank, slots=4, context=64, shared=192), requests_of(bank, ["tokens", "keys"], ("the", "a word")))


def test_on_a_mesh(bank: PromptBank, tmp_path):
    ours = bank_of(tmp_path, tiny_base(mesh=make_mesh(MeshConfig(data=2, tensor=2))), ["keys", "short"])
    check(Engine(ours, slots=4, context=48, shared=96), requests_of(ours, ["keys", "short"]), bank)


def test_a_prompt_that_is_replaced_or_cancelled(bank: PromptBank, tmp_path):
    """Requests that run keep the old prompt; later ones get the new."""
    own = bank_of(tmp_path, bank.base, ["keys"])
    engine = Engine(own, slots=2, context=48, shared=160)
    old = engine.submit(Request(own.request_ids("keys", {"text": "the"}), "keys", SAMPLINGS[0]))
    cancelled = engine.submit(Request(own.request_ids("keys", {"text": "a"}), "keys", SAMPLINGS[0]))
    engine.step()
    method, prompt = PrefixTuning(length=70), METHODS["keys"][1]
    virtual = method.materialize(method.init_params(jax.random.key(3), own.base), own.base.model)
    template = spt_jax.Template(prompt=prompt, target="{label}")
    spt_jax.save_prompt(tmp_path / "new", own.base, method, virtual, template)
    own.add("keys", spt_jax.load_prompt(tmp_path / "new", own.base))
    engine.cancel(cancelled)
    check(engine, requests_of(own, ["keys"]))
    (expected,) = generate(bank.base, [old.request.ids], bank.entry("keys").virtual, SAMPLINGS[0])
    same(old.result, expected)
    assert not any(place.users for place in engine._shared._places.values())


def test_warm_programs_serve_shared_prompts(bank: PromptBank):
    engine = Engine(bank, slots=2, context=48, shared=256)
    held, request = bank.held("keys"), requests_of(bank, ["keys"])[0]
    assert not engine.is_warm(held, len(request.ids))
    engine.warm(held, len(request.ids))
    engine.warm_decoding()
    assert engine.is_warm(held, len(request.ids))
    programs = engine._programs
    sizes = {name: getattr(programs, name)._cache_size() for name in ("admit", "decode", "share")}
    check(engine, [request])
    assert {name: getattr(programs, name)._cache_size() for name in sizes} == sizes


def test_memory_grows_with_prompts_and_not_with_slots_times_prompts(bank: PromptBank):
    """The shared entries take the bytes of keys, values, position and segment."""
    group = bank.base.layout.attention_groups["self"]
    entry = 2 * len(group.layers) * group.kv_heads * group.key_size * 4 + 8
    plain, sharing = (Engine(bank, slots=4, context=48, shared=shared) for shared in (0, 256))
    assert sharing.slot_bytes - plain.slot_bytes == 256 * entry


def test_what_is_refused(bank: PromptBank):
    with pytest.raises(ConfigError, match="shared is 9; it must be at least 64, or 0"):
        Engine(bank, slots=1, shared=9)
    with pytest.raises(ConfigError, match="recurrent layers, whose states"):
        Engine(PromptBank(tiny_base("qwen3_5_text")), slots=1, shared=128)
    with pytest.raises(ConfigError, match="not one of the decoders of this library"):
        Engine(PromptBank(tiny_base("t5")), slots=1, shared=128)
    engine = Engine(bank, slots=1, context=48, shared=64)
    with pytest.raises(ConfigError, match="but a slot has 48"):
        engine.submit(requests_of(bank, ["keys"])[0])  # longer than the shared entries
    request = requests_of(bank, ["tokens"])[0]
    engine = Engine(bank, slots=1, context=48, shared=128)
    with pytest.raises(ConfigError, match="but a slot has 48"):
        engine.submit(dataclasses.replace(request, sampling=SamplingConfig(max_new_tokens=46)))
    beyond = SamplingConfig(max_new_tokens=bank.base.layout.max_positions - 60)
    with pytest.raises(ConfigError, match="positions"):
        engine.submit(dataclasses.replace(request, ids=np.asarray(request.ids), sampling=beyond))
