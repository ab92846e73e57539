"""Slots that share the memory of long prompts give the answers that each request gets alone."""

import dataclasses

import httpx
import jax
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
from tests.serving.conftest import serving
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


def counted(engine: Engine, *names: str) -> dict[str, list]:
    """Returns lists to which the engine adds the arguments of each call of these programs."""
    calls = {name: [] for name in names}

    def counting(name: str):
        program = getattr(engine._programs, name)

        def run(*inputs):
            calls[name].append(inputs)
            return program(*inputs)

        return run

    engine._programs = dataclasses.replace(engine._programs, **{name: counting(name) for name in names})
    return calls


def written(engine: Engine) -> list:
    """Returns a list to which the engine adds the arguments of `share` for each prompt that it writes."""
    return counted(engine, "share")["share"]


def users(engine: Engine) -> int:
    return sum(place.users for place in engine._shared._places.values())


def lengths(bank: PromptBank, names) -> list[int]:
    return [bank.held(name).start for name in names]


@pytest.mark.parametrize("slots", [3, 16])
def test_a_mixture_is_answered_as_each_alone(bank: PromptBank, slots: int):
    """Each shared prompt is written once; slots have no room for one, so that it cannot be copied into them."""
    engine = Engine(bank, slots=slots, context=48, shared=256)
    calls = written(engine)
    check(engine, requests_of(bank))
    assert len(calls) == len(SHARED) and not users(engine)


def test_prompts_replace_those_that_no_request_reads(bank: PromptBank):
    """There is room for one prompt at a time, so each of nine requests in turns has to wait for the last to end."""
    engine = Engine(bank, slots=4, context=48, shared=max(lengths(bank, SHARED)))
    calls = written(engine)
    check(engine, requests_of(bank))
    assert len(calls) == 9
    check(engine, requests_of(bank, ["around"]))
    assert len(calls) == 9 and not users(engine)  # It was the last, and is still there.


def test_a_request_that_waits_for_room_is_not_overtaken(bank: PromptBank):
    engine = Engine(bank, slots=4, context=48, shared=max(lengths(bank, SHARED)))
    long, short = SamplingConfig(max_new_tokens=30), SamplingConfig(max_new_tokens=2)

    def submitted(client: str, name: str, sampling: SamplingConfig, number: int = 0):
        ids = bank.request_ids(name, {"text": "the"})
        return engine.submit(Request(ids, name, sampling, sender=Sender(client, number)))

    first, waits = submitted("a", "keys", long), submitted("b", "tokens", short)
    later, copied = submitted("c", "keys", short), submitted("d", "short", short)
    number = 0
    while not waits.done:
        # Requests that need no room, of the same client, are answered, and do not cost the one that waits its turn.
        other = submitted("b", "short", SamplingConfig(max_new_tokens=1), number := number + 1)
        engine.step()
        engine.step()
        assert copied.ids and other.done
        assert first.done or not waits.ids
        assert waits.ids or not later.ids
    while not engine.idle:
        engine.step()
    assert later.done and not users(engine)


def test_a_request_that_waits_for_room_can_be_cancelled(bank: PromptBank):
    engine = Engine(bank, slots=4, context=48, shared=max(lengths(bank, SHARED)))
    sampling = SamplingConfig(max_new_tokens=30)
    first, waits, later = (
        engine.submit(Request(bank.request_ids(name, {"text": "the"}), name, sampling, sender=Sender(name, number)))
        for number, name in enumerate(("keys", "tokens", "keys"))
    )
    engine.step()
    assert engine._blocked is waits and engine.under_way == 1
    engine.cancel(waits)
    engine.step()
    engine.step()
    assert later.ids and not first.done
    while not engine.idle:
        engine.step()
    assert not users(engine)


def test_prompts_of_one_padded_length_on_both_sides_of_a_limit(bank: PromptBank, tmp_path):
    """The shortest that is shared, and one that is not; the longest, and one for which there are too few entries."""
    own = PromptBank(bank.base)
    for length, pinned in ((62, False), (63, False), (64, True), (90, False), (91, True)):
        method = PrefixTuning(length=length, pin_prefix=pinned)
        virtual = method.materialize(method.init_params(jax.random.key(length), own.base), own.base.model)
        template = spt_jax.Template(prompt="{text}\n", target="{label}")
        spt_jax.save_prompt(tmp_path / f"p{length}", own.base, method, virtual, template)
        own.add(f"p{length}", spt_jax.load_prompt(tmp_path / f"p{length}", own.base))
    engine = Engine(own, slots=4, context=120, shared=91)
    calls = written(engine)
    check(engine, requests_of(own, own.names, ["the"]))
    assert sorted(int(call[2].shape[0]) for call in calls) == [96, 96, 128]


def test_a_prompt_that_left_the_device_is_the_same_prompt(bank: PromptBank, tmp_path):
    small = PromptBank(bank.base, budget_bytes=1)
    for name in ("keys", "short"):
        method, prompt = METHODS[name]
        template = spt_jax.Template(prompt=prompt, target="{label}", virtual_tokens=method.token_count)
        virtual = method.materialize(method.init_params(jax.random.key(0), bank.base), bank.base.model)
        spt_jax.save_prompt(tmp_path / name, bank.base, method, virtual, template)
        small.add(name, spt_jax.load_prompt(tmp_path / name, bank.base))
    engine = Engine(small, slots=2, context=48, shared=80)
    calls = written(engine)
    check(engine, requests_of(small, ["keys", "short"]))
    assert len(calls) == 1


def test_with_chunks_and_drafts(bank: PromptBank):
    engine = Engine(bank, slots=2, context=96, shared=256, chunk=16, lookup=4)
    calls = counted(engine, "extend", "verify")
    check(engine, requests_of(bank, texts=("again and again and again", "the", "the cat and the cat and the")))
    assert any(call[5] is not None for call in calls["extend"])
    assert any(call[5] is not None for call in calls["verify"])


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
    assert users(engine) == 1
    check(engine, requests_of(own, ["keys"]))
    (expected,) = generate(bank.base, [old.request.ids], bank.entry("keys").virtual, SAMPLINGS[0])
    same(old.result, expected)
    assert not users(engine)


@pytest.mark.parametrize("pinned", [False, True])
def test_warm_programs_serve_shared_prompts(tmp_path, pinned: bool):
    """Of a base with windows, whose prompts of one length differ in what is pinned."""
    base = tiny_base("mistral", sliding_window=8)
    bank = PromptBank(base)
    for number, pin in enumerate((pinned, not pinned)):
        method = PromptTuning(length=66, pin_prefix=pin)
        virtual = method.materialize(method.init_params(jax.random.key(number), base), base.model)
        template = spt_jax.Template(prompt="<soft>{text}\n", target="{label}", virtual_tokens=66)
        spt_jax.save_prompt(tmp_path / f"p{number}", base, method, virtual, template)
        bank.add(f"p{number}", spt_jax.load_prompt(tmp_path / f"p{number}", base))
    engine = Engine(bank, slots=2, context=48, shared=160, chunk=16, lookup=2)
    requests = requests_of(bank, ["p0", "p1"], ["a text of more tokens than one chunk", "the"])
    for number, request in enumerate(requests):
        # The second text is no longer than the first chunk of the first.
        assert engine.is_warm(bank.held(request.prompt), len(request.ids)) == (number > 1)
        engine.warm(bank.held(request.prompt), len(request.ids))
        assert engine.is_warm(bank.held(request.prompt), len(request.ids))
    engine.warm_decoding()
    calls = counted(engine, "admit", "extend", "share")
    check(engine, requests)
    assert not any(calls.values())  # All are those that `warm` has compiled.


def test_memory_grows_with_prompts_and_not_with_slots_times_prompts(bank: PromptBank):
    """The shared entries take the bytes of keys, values, position and segment."""
    group = bank.base.layout.attention_groups["self"]
    entry = 2 * len(group.layers) * group.kv_heads * group.key_size * 4 + 8
    plain, sharing = (Engine(bank, slots=4, context=48, shared=shared) for shared in (0, 256))
    assert sharing.slot_bytes - plain.slot_bytes == 256 * entry


def test_a_prompt_for_which_slots_have_no_room_is_served_to_nobody(bank: PromptBank, tmp_path):
    """The server starts with it, and says what is too short at the first request."""
    bank_of(tmp_path, bank.base, ["keys"])
    with serving(bank.base, tmp_path, engine=Engine(PromptBank(bank.base), slots=1, context=48)) as server:
        server.service.warm("keys")
        found = server.post("/v1/completions", {"model": "keys", "prompt": "the", "max_tokens": 4})
    assert found.status_code == 400 and "has 48 positions" in found.text


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
    engine = Engine(bank, slots=1, shared=128)
    with pytest.raises(ConfigError, match="but tiny-llama has 128 positions"):
        engine.submit(dataclasses.replace(request, sampling=SamplingConfig(max_new_tokens=59)))


def test_the_server_knows_that_shared_prompts_take_no_room_in_slots(bank: PromptBank, tmp_path):
    """An answer may fill its slot, or the positions of the base that the prompt leaves; texts are shortened to fit."""
    folder = tmp_path / "served"
    bank_of(folder, bank.base, ["keys", "short"])
    engine = Engine(PromptBank(bank.base), slots=2, context=48, shared=96)
    with serving(bank.base, folder, engine=engine) as server:

        def asked(model: str, text: str, **fields) -> httpx.Response:
            return server.post("/v1/completions", {"model": model, "prompt": text, "temperature": 0, **fields})

        found = asked("keys", "the", max_tokens=30)
        ids = bank.request_ids("keys", {"text": "the"})
        virtual, sampling = bank.entry("keys").virtual, SamplingConfig(max_new_tokens=30)
        assert found.json()["choices"][0]["text"] == generate(bank.base, [ids], virtual, sampling)[0].text
        own = len(ids) - len(bank.held("keys").lead)
        assert asked("keys", "the").json()["usage"]["completion_tokens"] <= 48 - own
        refused = asked("keys", "the", max_tokens=48)
        assert refused.status_code == 400 and f"has {bank.held('keys').start + 48} positions" in refused.text
