"""The engine answers any mixture of requests as `generate` answers each alone, and prompts come and go meanwhile."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spt_jax
from spt_jax.errors import CheckpointError, ConfigError, DataError
from spt_jax.inference.answers import token_text
from spt_jax.inference.generation import SamplingConfig, generate
from spt_jax.prompts import LlamaAdapter, PrefixTuning, PromptTuning
from spt_jax.serving.bank import PromptBank
from spt_jax.serving.engine import Engine
from spt_jax.serving.requests import Request
from spt_jax.serving.slots import MAX_STEPS, MIN_STEPS, Until
from spt_jax.testing import tiny_base
from tests.layouts import Run, forward, lay_out

METHODS = {
    "front": (PromptTuning(length=3), "<soft>{text}\n"),
    "end": (PromptTuning(length=5), "Say {text}\n<soft>"),
    "keys": (PrefixTuning(length=4), "A word: {text}\n"),
}
GREEDY = SamplingConfig(max_new_tokens=7)
SAMPLED = SamplingConfig(max_new_tokens=9, temperature=1.3, seed=5)
NARROW = SamplingConfig(max_new_tokens=5, temperature=0.7, top_k=20, top_p=0.9, seed=11)


def saved(tmp_path, base, name: str, seed: int = 0):
    method, prompt = METHODS[name]
    params = jax.tree.map(lambda a: a + 0.2, method.init_params(jax.random.key(seed), base))
    virtual = method.materialize(params, base.model)
    template = spt_jax.Template(prompt=prompt, target="{label}", virtual_tokens=method.token_count)
    spt_jax.save_prompt(tmp_path / f"{name}{seed}", base, method, virtual, template)
    return spt_jax.load_prompt(tmp_path / f"{name}{seed}", base)


@pytest.fixture(scope="module")
def bank(tmp_path_factory) -> PromptBank:
    base, folder = tiny_base(), tmp_path_factory.mktemp("prompts")
    bank = PromptBank(base)
    for name in METHODS:
        bank.add(name, saved(folder, base, name))
    return bank


def requests_of(bank: PromptBank) -> list[Request]:
    requests = []
    for number, text in enumerate(["a question", "the", "word " * 9, "and another"]):
        for place, name in enumerate([*METHODS, None]):
            ids = bank.request_ids(name, {"text": text}) if name else np.asarray([1, 40, 41 + number], np.int32)
            requests.append(Request(ids, name, (GREEDY, SAMPLED, NARROW)[(number + place) % 3]))
    return requests


def alone(bank: PromptBank, request: Request):
    virtual = None if request.prompt is None else bank.entry(request.prompt).virtual
    (found,) = generate(bank.base, [request.ids], virtual, request.sampling)
    return found


def same(ours, theirs) -> None:
    assert (ours.ids, ours.text, ours.finished) == (theirs.ids, theirs.text, theirs.finished)
    np.testing.assert_allclose(ours.log_probabilities, theirs.log_probabilities, atol=1e-4)


@pytest.mark.parametrize("slots", [3, 16])
def test_a_mixture_is_answered_as_each_alone(bank: PromptBank, slots: int):
    """Sixteen requests of four kinds: through three slots, where each starts where another has just ended; through
    sixteen, where those of a kind and length come in together."""
    requests = requests_of(bank)
    for ours, request in zip(Engine(bank, slots=slots).generate(requests), requests, strict=True):
        same(ours, alone(bank, request))


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_how_often_the_host_looks_changes_no_answer(bank: PromptBank, monkeypatch, seconds: float):
    monkeypatch.setattr("spt_jax.serving.engine.POLL_SECONDS", seconds)
    engine, requests = Engine(bank, slots=2), requests_of(bank)
    for request, found in zip(requests, engine.generate(requests), strict=True):
        same(found, alone(bank, request))
    engine.submit(Request(requests[-1].ids, None, SamplingConfig(max_new_tokens=13)))
    looks = 0
    while not engine.idle:
        engine.step()
        looks += 1
    assert looks == (1 + 12 if seconds == 0 else 1 + 1)
    engine.submit(Request(requests[-1].ids, None, SamplingConfig(max_new_tokens=13, stop=("nothing says this",))))
    for _ in range(1 + (12 if seconds == 0 else 3)):
        assert not engine.idle
        engine.step()
    assert engine.idle


@pytest.mark.parametrize("end_at", [2, 9])
def test_decoding_returns_at_an_end_that_others_wait_for(bank: PromptBank, end_at: int):
    engine, requests = Engine(bank, slots=2), requests_of(bank)[:2]
    long = SamplingConfig(max_new_tokens=20, temperature=1.0)
    expected = [alone(bank, dataclasses.replace(request, sampling=long)).ids for request in requests]
    for request in requests:
        engine.submit(dataclasses.replace(request, sampling=long))
    engine.step()
    programs, base = engine._programs, bank.base
    end, steps = expected[0][end_at], max(end_at, MIN_STEPS)
    assert end not in expected[0][1:end_at] + expected[1][1:end_at]
    until = Until(jnp.int32(MAX_STEPS), jnp.int32(1), jnp.asarray([end]))
    inputs = np.ones(2, bool), np.asarray(False), until, None, engine._slots
    _, new, count = programs.decode(64, base.model, *inputs)
    assert int(count) == steps < MAX_STEPS
    np.testing.assert_array_equal(new.ids[:steps].T, [ids[1 : steps + 1] for ids in expected])


def test_a_prompt_that_overflows_ends_its_own_requests_alone(bank: PromptBank, tmp_path):
    """What it leaves in a slot is weighed with 0 by the next request, and 0 times infinity would be no number."""
    base, method = bank.base, PrefixTuning(length=4)
    virtual = method.materialize(method.init_params(jax.random.key(0), base), base.model)
    huge = jax.tree.map(lambda a: jnp.full_like(a, 3e38), virtual)
    template = spt_jax.Template(prompt="{text}\n", target="{label}", virtual_tokens=0)
    spt_jax.save_prompt(tmp_path / "huge", base, method, huge, template)
    bank.add("huge", spt_jax.load_prompt(tmp_path / "huge", base))
    engine, bare = Engine(bank, slots=1), Request(np.asarray([1, 40, 41], np.int32), None, GREEDY)
    with pytest.raises(ConfigError, match="'huge' produces values that overflow float32"):
        engine.generate([Request(bank.request_ids("huge", {"text": "a question"}), "huge", GREEDY)])
    assert engine.idle
    (found,) = engine.generate([bare])
    same(found, alone(bank, bare))
    bank.remove("huge")


def test_requests_of_one_kind_come_in_by_one_program(bank: PromptBank, tmp_path):
    """Sixteen of five prompts, then seven, four of which come in together."""
    others = [f"like{seed}" for seed in range(4)]
    for seed, name in enumerate(others):
        bank.add(name, saved(tmp_path, bank.base, "front", seed=seed + 5))
    engine = Engine(bank, slots=16)
    requests = [
        Request(bank.request_ids(name, {"text": "a question"}), name, (GREEDY, SAMPLED)[number % 2])
        for number, name in enumerate([*others, "front"] * 4)
    ]
    for group, programs in ((requests[:16], 1), (requests[:7], 4)):
        with mock.patch.object(engine, "_admit", wraps=engine._admit) as admit:
            answers = engine.generate(group)
        assert admit.call_count == programs
        for ours, request in zip(answers, group, strict=True):
            same(ours, alone(bank, request))
    for name in others:
        bank.remove(name)


def test_stop_strings_and_control_tokens(bank: PromptBank):
    request = Request(bank.request_ids("front", {"text": "a question"}), "front", SamplingConfig(max_new_tokens=12))
    whole = alone(bank, request)
    stop = whole.text[3:5]
    stopping = Request(request.ids, "front", SamplingConfig(max_new_tokens=12, stop=(stop,)))
    (ours,) = Engine(bank, slots=2).generate([stopping])
    same(ours, alone(bank, stopping))
    assert ours.finished == "stop" and stop not in ours.text


def test_the_likeliest_tokens_of_each_step(bank: PromptBank):
    """Those of the whole row's logits; a request beside it that asks for none gets none."""
    ids = np.asarray([1, 40, 41], np.int32)
    ours, other = Engine(bank, slots=2).generate([Request(ids, None, SAMPLED, alternatives=4), Request(ids)])
    whole = np.concatenate([ids, np.asarray(ours.ids, np.int32)])
    row, stream = lay_out([Run(0, 0, whole)], len(whole))
    scores = np.asarray(jax.nn.log_softmax(forward(bank.base, row, stream)[0][0]))[len(ids) - 1 : -1]
    assert len(ours.alternatives) == len(ours.ids) and other.alternatives == []
    for found, expected in zip(ours.alternatives, scores, strict=True):
        assert list(found) == np.argsort(-expected)[:4].tolist()
        np.testing.assert_allclose(list(found.values()), np.sort(expected)[::-1][:4], atol=1e-4)
    assert token_text(bank.base.tokenizer, 10**6) == "<1000000>"  # a base's vocabulary may be padded
    with pytest.raises(ConfigError, match="alternatives is 21; it must be between 0 and 20"):
        Engine(bank, slots=1).submit(Request(ids, alternatives=21))


def test_a_prompt_that_it_cannot_decode_with_is_refused_by_its_parts(tmp_path):
    base = tiny_base()
    bank, template = PromptBank(base), spt_jax.Template(prompt="{text}", target="{label}")
    method = spt_jax.TrainedTokens(tokens=("a",)).bind(base.tokenizer)
    virtual = method.materialize(method.init_params(jax.random.key(0), base), base.model)
    spt_jax.save_prompt(tmp_path / "rows", base, method, virtual, template)
    bank.add("rows", spt_jax.load_prompt(tmp_path / "rows", base))
    request = Request(bank.request_ids("rows", {"text": "hi"}), "rows", GREEDY)
    with pytest.raises(ConfigError, match="'rows' has replaced embeddings, which the engine cannot decode with; use"):
        Engine(bank, slots=1).submit(request)


def test_prompts_come_and_go_without_a_new_program(bank: PromptBank, tmp_path):
    """Also while another request is under way, which goes on as if nothing had happened."""
    engine = Engine(bank, slots=2)
    ids = bank.request_ids("front", {"text": "a question"})
    engine.generate([Request(ids, "front", GREEDY)])
    engine.warm_decoding()
    before = {name: getattr(engine._programs, name)._cache_size() for name in ("admit", "decode")}
    slow = engine.submit(Request(ids, "front", SamplingConfig(max_new_tokens=20)))
    engine.step()
    bank.add("other", saved(tmp_path, bank.base, "front", seed=3))
    quick = Request(bank.request_ids("other", {"text": "a question"}), "other", GREEDY)
    (answer,) = engine.generate([quick])
    same(answer, alone(bank, quick))
    bank.remove("other")
    while not slow.done:
        engine.step()
    assert slow.result is not None
    same(slow.result, alone(bank, slow.request))
    assert before == {name: getattr(engine._programs, name)._cache_size() for name in before}
    assert engine.idle
    with pytest.raises(ConfigError, match="no prompt 'other'"):
        engine.submit(quick)


def test_a_cancelled_request_leaves_its_slot(bank: PromptBank):
    engine = Engine(bank, slots=1)
    request = Request(bank.request_ids("keys", {"text": "the"}), "keys", SamplingConfig(max_new_tokens=30))
    first, second, third = (engine.submit(request) for _ in range(3))
    engine.step()
    engine.cancel(first)
    engine.cancel(second)
    while not third.done:
        engine.step()
    assert first.result is second.result is None and first.done and second.done
    assert third.result is not None
    same(third.result, alone(bank, request))


def test_twins_and_others_are_told_apart(bank: PromptBank):
    """Of two tickets for one request, and one for another, the second twin is cancelled."""
    engine = Engine(bank, slots=1)
    request = Request(bank.request_ids("keys", {"text": "the"}), "keys", GREEDY)
    longer = Request(bank.request_ids("front", {"text": "another"}), "front", GREEDY)
    first, other, twin = engine.submit(request), engine.submit(longer), engine.submit(request)
    engine.cancel(twin)
    while not (first.done and other.done):
        engine.step()
    assert first.result is not None and other.result is not None and twin.result is None
    same(first.result, alone(bank, request))
    same(other.result, alone(bank, longer))


def test_a_prompt_may_change_while_its_request_waits(bank: PromptBank, tmp_path):
    """The request is answered by the prompt that it was sent to, and the one before it as ever."""
    bank.add("passing", saved(tmp_path, bank.base, "front", seed=4))
    request = Request(bank.request_ids("passing", {"text": "a question"}), "passing", GREEDY)
    expected, base_alone = alone(bank, request), Request(np.asarray([1, 40, 41], np.int32), None, GREEDY)
    for change in (
        lambda: bank.add("passing", saved(tmp_path, bank.base, "end", seed=1)),
        lambda: bank.remove("passing"),
    ):
        engine = Engine(bank, slots=1)
        before, waiting = engine.submit(base_alone), engine.submit(request)
        change()
        while not waiting.done:
            engine.step()
        assert before.result is not None and waiting.result is not None
        same(before.result, alone(bank, base_alone))
        same(waiting.result, expected)
        bank.add("passing", saved(tmp_path, bank.base, "front", seed=4))
    bank.remove("passing")


def test_empty_fields_and_whole_contexts(bank: PromptBank, tmp_path):
    """A template that ends in a field which is empty, and a request that fills the base's positions."""
    base, method = bank.base, PrefixTuning(length=4)
    virtual = method.materialize(method.init_params(jax.random.key(0), base), base.model)
    for name, prompt in (("bare", "{text}"), ("lead", "A <bos>{text}")):
        template = spt_jax.Template(prompt=prompt, target="{label}")
        spt_jax.save_prompt(tmp_path / name, base, method, virtual, template)
        bank.add(name, spt_jax.load_prompt(tmp_path / name, base))
    empty = Request(bank.request_ids("lead", {"text": ""}), "lead", GREEDY)
    ids = bank.request_ids("bare", {"text": "hi"})
    full = Request(ids, "bare", SamplingConfig(max_new_tokens=base.config.max_positions - 4 - len(ids)))
    for ours, request in zip(Engine(bank, slots=2).generate([empty, full]), [empty, full], strict=True):
        same(ours, alone(bank, request))
    bank.remove("bare")
    bank.remove("lead")


def test_the_size_of_the_slots_is_that_of_the_documented_formula(bank: PromptBank):
    """Keys and values in float32, and the position and segment of each entry; 10 more numbers per slot."""
    (group,) = bank.base.layout.attention_groups.values()
    of_entry = 2 * len(group.layers) * group.kv_heads * group.key_size * 4 + 2 * 4
    for slots, context, entries in ((1, 96, 192), (3, 100, 224)):
        assert Engine(bank, slots=slots, context=context).slot_bytes == slots * (entries * of_entry + 10 * 4)


def test_prompts_wait_on_the_host(bank: PromptBank):
    for name in bank.names:
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(bank.entry(name).virtual))


def test_the_least_recently_used_leaves_the_device(bank: PromptBank, tmp_path):
    one = bank.held("front").bytes
    small = PromptBank(bank.base, budget_bytes=2 * one)
    for seed in range(3):
        small.add(f"p{seed}", saved(tmp_path, bank.base, "front", seed=seed))
    for name in ("p0", "p1", "p0", "p2"):
        small.held(name)
    assert list(small._held) == ["p0", "p2"] and small.device_bytes <= 2 * one and small.names == ["p0", "p1", "p2"]
    request = Request(small.request_ids("p1", {"text": "the"}), "p1", GREEDY)
    same(Engine(small, slots=1).generate([request])[0], alone(small, request))


def test_on_a_mesh(tmp_path):
    from spt_jax.runtime.sharding import MeshConfig, make_mesh

    base = tiny_base(mesh=make_mesh(MeshConfig(data=2, tensor=2)))
    bank = PromptBank(base)
    for name in METHODS:
        bank.add(name, saved(tmp_path, base, name))
    requests = [request for request in requests_of(bank) if request.sampling is GREEDY]
    plain = tiny_base()
    for ours, request in zip(Engine(bank, slots=4).generate(requests), requests, strict=True):
        virtual = None if request.prompt is None else bank.entry(request.prompt).virtual
        (theirs,) = generate(plain, [request.ids], jax.tree.map(np.asarray, virtual), request.sampling)
        same(ours, theirs)
    with pytest.raises(ConfigError, match="a multiple of 2"):
        Engine(bank, slots=3)


def test_what_is_refused(bank: PromptBank, tmp_path):
    engine = Engine(bank, slots=1, context=96)
    ids = bank.request_ids("front", {"text": "the"})
    with pytest.raises(ConfigError, match="did you mean 'front'"):
        engine.submit(Request(ids, "frond"))
    with pytest.raises(ConfigError, match="do not begin with the leading ids"):
        engine.submit(Request(ids[2:], "front"))
    stray = np.append(ids, bank.base.config.vocab_size + 20).astype(np.int32)
    with pytest.raises(DataError, match="the soft prompt 3"):
        engine.submit(Request(stray, "front"))
    with pytest.raises(DataError, match="empty"):
        engine.submit(Request(np.zeros(0, np.int32)))
    with pytest.raises(ConfigError, match="positions"):
        engine.submit(Request(ids, "front", SamplingConfig(max_new_tokens=1000)))
    with pytest.raises(ConfigError, match="a slot has 96"):
        engine.submit(Request(ids, "front", SamplingConfig(max_new_tokens=100)))
    with pytest.raises(ConfigError, match="did you mean 'keys'"):
        bank.remove("key")
    base, gated = bank.base, LlamaAdapter(length=2, layers=1)
    virtual = gated.materialize(gated.init_params(jax.random.key(0), base), base.model)
    template = spt_jax.Template(prompt="{text}", target="{label}")
    spt_jax.save_prompt(tmp_path / "gated", base, gated, virtual, template)
    bank.add("gated", spt_jax.load_prompt(tmp_path / "gated", base))
    with pytest.raises(ConfigError, match="has a gated prefix, which the engine cannot decode with"):
        engine.submit(Request(bank.request_ids("gated", {"text": "the"}), "gated"))
    bank.remove("gated")
    other = tiny_base("llama", seed=9)
    with pytest.raises(CheckpointError, match="for another base"):
        PromptBank(other).add("front", spt_jax.load_prompt(saved_folder(tmp_path, base), base))


def saved_folder(tmp_path, base):
    saved(tmp_path, base, "front")
    return tmp_path / "front0"
