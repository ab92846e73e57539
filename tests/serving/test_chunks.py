"""Requests that are run in chunks get the answers that they get in one call, and others go on in the meantime."""

import dataclasses

import jax
import numpy as np
import pytest

import spt_jax
from spt_jax.errors import ConfigError
from spt_jax.inference.generation import SamplingConfig
from spt_jax.prompts import PromptTuning
from spt_jax.serving.bank import PromptBank
from spt_jax.serving.chunks import first_count, reach_of
from spt_jax.serving.engine import Engine
from spt_jax.serving.requests import Request
from spt_jax.testing import tiny_base

CHUNK = 16
SAMPLINGS = (
    SamplingConfig(max_new_tokens=9),
    SamplingConfig(max_new_tokens=12, temperature=1.3, seed=5),
    SamplingConfig(max_new_tokens=6, temperature=0.7, top_k=20, top_p=0.9, seed=11),
)


def bank_of(folder, family: str = "llama", **options) -> PromptBank:
    """Returns a base with one prompt, which has leading ids, and pinned virtual tokens after the text."""
    base, method = tiny_base(family, **options), PromptTuning(length=5, pin_prefix=True)
    virtual = method.materialize(method.init_params(jax.random.key(0), base), base.model)
    template = spt_jax.Template(prompt="Say {text}\n<soft>", target="{label}", virtual_tokens=5)
    spt_jax.save_prompt(folder, base, method, virtual, template)
    bank = PromptBank(base)
    bank.add("end", spt_jax.load_prompt(folder, base))
    return bank


@pytest.fixture(scope="module")
def bank(tmp_path_factory) -> PromptBank:
    return bank_of(tmp_path_factory.mktemp("prompts") / "end")


def ids_of(bank: PromptBank, name: str | None, count: int) -> np.ndarray:
    """Returns the ids of a request whose text has `count` tokens, all bytes."""
    letters = np.random.default_rng(count).integers(ord("a"), ord("z") + 1, count)
    return bank.request_ids(name, {"text": "".join(map(chr, letters))})


def requests_of(bank: PromptBank, names, counts=(70, 48)) -> list[Request]:
    return [
        Request(ids_of(bank, name, count), name, SAMPLINGS[(number + place) % 3], alternatives=number % 2)
        for number, count in enumerate(counts)
        for place, name in enumerate(names)
    ]


def same(ours, theirs) -> None:
    for own, other in zip(ours, theirs, strict=True):
        assert (own.ids, own.text, own.finished) == (other.ids, other.text, other.finished)
        np.testing.assert_allclose(own.log_probabilities, other.log_probabilities, atol=1e-5)
        assert [list(one) for one in own.alternatives] == [list(one) for one in other.alternatives]


def counted(engine: Engine) -> list[int]:
    """Returns a list to which the engine adds the reach of each chunk after a request's first."""
    reaches, extend = [], engine._programs.extend

    def counting(reach, *inputs):
        reaches.append(reach)
        return extend(reach, *inputs)

    engine._programs = dataclasses.replace(engine._programs, extend=counting)
    return reaches


def test_a_mixture_is_answered_as_in_one_call(bank: PromptBank):
    """Under a prompt and under none; more requests than slots."""
    requests = requests_of(bank, ["end", None])
    engine = Engine(bank, slots=2, context=160, chunk=CHUNK)
    reaches = counted(engine)
    same(engine.generate(requests), Engine(bank, slots=2, context=160, chunk=0).generate(requests))
    own = [len(request.ids) - len(bank.held(request.prompt).lead) for request in requests]
    assert len(reaches) == sum((count - 1) // CHUNK for count in own) and set(reaches) == {64, 224}


@pytest.mark.parametrize(
    ("family", "name", "options"), [("mistral", "end", {"sliding_window": 8}), ("qwen3_5_text", None, {})]
)
def test_windows_and_states_go_on_from_chunk_to_chunk(tmp_path, family: str, name, options):
    bank = bank_of(tmp_path / "end", family, **options)
    requests = requests_of(bank, [name], counts=(40, 7))
    plain = Engine(bank, slots=2, context=80, chunk=0).generate(requests)
    same(Engine(bank, slots=2, context=80, chunk=CHUNK).generate(requests), plain)


def test_running_requests_get_tokens_between_chunks(bank: PromptBank, monkeypatch):
    monkeypatch.setattr("spt_jax.serving.engine.POLL_SECONDS", 0.0)
    engine = Engine(bank, slots=2, context=160, chunk=CHUNK)
    quick = Request(ids_of(bank, None, 5), None, SamplingConfig(max_new_tokens=40))
    long = Request(ids_of(bank, None, 69), None, SAMPLINGS[0])
    first = engine.submit(quick)
    engine.step()
    second = engine.submit(long)
    seen = []
    while not second.ids:
        engine.step()
        seen.append(len(first.ids))
    chunks = (len(long.ids) - 1) // CHUNK + 1
    assert chunks == 5 and max(np.diff(seen)) >= 1 and len(set(seen)) >= chunks
    while not engine.idle:
        engine.step()
    same([first.result, second.result], Engine(bank, slots=2, context=160, chunk=0).generate([quick, long]))


def test_a_cancelled_request_leaves_its_slot_between_chunks(bank: PromptBank):
    engine = Engine(bank, slots=2, context=160, chunk=CHUNK)
    requests = requests_of(bank, ["end", None])
    cancelled, running, other, last = map(engine.submit, requests)
    engine.step()
    engine.step()
    assert not cancelled.ids and engine.under_way == 2
    engine.cancel(cancelled)
    assert engine.under_way == 1
    while not engine.idle:
        engine.step()
    expected = Engine(bank, slots=2, context=160, chunk=0).generate(requests[1:])
    same([running.result, other.result, last.result], expected)
    assert cancelled.result is None


def test_drafts_follow_once_all_ids_are_in(bank: PromptBank):
    sampling = SamplingConfig(max_new_tokens=30)
    texts = [np.asarray([1, *([40 + number, 50, 60] * 20)], np.int32) for number in range(2)]
    requests = [Request(ids, None, sampling) for ids in texts]
    plain = Engine(bank, slots=2, context=160, chunk=0).generate(requests)
    same(Engine(bank, slots=2, context=160, chunk=CHUNK, lookup=4).generate(requests), plain)


def test_one_program_serves_all_long_requests(bank: PromptBank):
    engine = Engine(bank, slots=1, chunk=32)
    held = bank.held(None)
    engine.warm(held, 64)
    before = len(engine._compiled)
    assert before and all(engine.is_warm(held, length) for length in (17 + 32, 32, 17 + 2 * 32))
    engine.warm(held, 90)
    assert len(engine._compiled) == before
    assert not engine.is_warm(held, 5)


def test_counts_and_reaches():
    assert [first_count(count, 16) for count in (1, 16, 17, 32, 33)] == [1, 16, 1, 16, 1]
    assert first_count(1000, 0) == 1000
    assert [reach_of(entries, 16, 1000) for entries in (1, 64, 65, 256, 257)] == [64, 64, 256, 256, 1000]


def test_chunks_that_are_refused(bank: PromptBank):
    for number in (-1, 15):
        with pytest.raises(ConfigError, match=f"chunk is {number}; it must be at least 16, or 0"):
            Engine(bank, slots=1, chunk=number)
    encoder_decoder = PromptBank(tiny_base("t5"))
    with pytest.raises(ConfigError, match="the encoder of tiny-t5 reads each request as a whole; use 0"):
        Engine(encoder_decoder, slots=1, context=64, chunk=64)
    assert Engine(encoder_decoder, slots=1, context=64)._admission.chunk == 0
