"""With drafts from earlier text, the engine gives the answers that it gives without them."""

import dataclasses

import numpy as np
import pytest

from spt_jax.errors import ConfigError
from spt_jax.inference.generation import SamplingConfig
from spt_jax.serving.bank import PromptBank
from spt_jax.serving.engine import Engine
from spt_jax.serving.lookup import draft
from spt_jax.serving.requests import Request
from spt_jax.testing import tiny_base

SAMPLINGS = (
    SamplingConfig(max_new_tokens=40),
    SamplingConfig(max_new_tokens=37, temperature=0.02, seed=3),
    SamplingConfig(max_new_tokens=30, temperature=0.05, top_p=0.9, seed=4),
    SamplingConfig(max_new_tokens=30, temperature=1.2, top_k=20, seed=5),
    SamplingConfig(max_new_tokens=2),
    SamplingConfig(max_new_tokens=1),
)


@pytest.fixture(scope="module")
def bank() -> PromptBank:
    return PromptBank(tiny_base())


def requests_of(samplings=SAMPLINGS) -> list[Request]:
    texts = [np.asarray([1, *([40 + number, 50, 60] * (1 + number % 3))], np.int32) for number in range(6)]
    return [
        Request(text, None, sampling, alternatives=number % 3)
        for number, (text, sampling) in enumerate(zip(texts, samplings, strict=True))
    ]


def same(ours, theirs) -> None:
    for own, other in zip(ours, theirs, strict=True):
        assert (own.ids, own.text, own.finished) == (other.ids, other.text, other.finished)
        np.testing.assert_allclose(own.log_probabilities, other.log_probabilities, atol=1e-4)
        assert [list(one) for one in own.alternatives] == [list(one) for one in other.alternatives]


def counted(engine: Engine, requests) -> tuple[list, list[int]]:
    """Returns the answers, and how many tokens each slot got in each pass that had drafts."""
    counts, verify = [], engine._programs.verify

    def counting(*inputs):
        found = verify(*inputs)
        counts.extend(np.asarray(found[2])[inputs[2]].tolist())
        return found

    engine._programs = dataclasses.replace(engine._programs, verify=counting)
    return engine.generate(requests), counts


@pytest.mark.parametrize("slots", [2, 6])
def test_answers_are_those_of_plain_decoding(bank: PromptBank, slots: int):
    """Greedy answers of the tiny base repeat themselves, and hot ones do not: some drafts are kept, some are not."""
    requests = requests_of()
    ours, counts = counted(Engine(bank, slots=slots, context=128, lookup=4), requests)
    same(ours, Engine(bank, slots=slots, context=128).generate(requests))
    assert {1, 5} <= set(counts) and max(counts) == 5


def oracle(requests: list[Request], answers: list, every: int):
    """Returns a stand-in for `draft` that knows the answers, and is wrong at every `every`-th place of an answer."""

    def known(ids: np.ndarray, most: int) -> np.ndarray:
        for request, answer in zip(requests, answers, strict=True):
            own = len(request.ids)
            if np.array_equal(ids[:own], request.ids) and answer.ids[: len(ids) - own] == ids[own:].tolist():
                places = np.arange(len(ids) - own, len(answer.ids))[:most]
                right = np.asarray(answer.ids, np.int32)[places]
                return np.where(places % every == every - 1, right ^ 1, right)
        raise AssertionError("not a part of the answer")

    return known


@pytest.mark.parametrize("every", [1000, 3])
def test_answers_end_at_the_same_ids_and_texts(bank: PromptBank, monkeypatch, every: int):
    """Tokens that a pass has chosen after the end are not part of the answer, even if all drafts are right."""
    plain = Engine(bank, slots=6, context=128).generate(requests_of())
    lasts = [max(place for place, id_ in enumerate(answer.ids) if answer.ids.index(id_) == place) for answer in plain]
    ends = [answer.ids[last] for answer, last in zip(plain, lasts, strict=True)]
    ending = [dataclasses.replace(s, end_ids=(id_,)) for s, id_ in zip(SAMPLINGS, ends, strict=True)]
    texts = [answer.text[len(answer.text) // 2 :][:2] for answer in plain]
    stopping = [dataclasses.replace(s, stop=(t,) if t else ()) for s, t in zip(SAMPLINGS, texts, strict=True)]
    monkeypatch.setattr("spt_jax.serving.lookup.draft", oracle(requests_of(), plain, every))
    for samplings in (SAMPLINGS, ending, stopping):
        requests = requests_of(samplings)
        expected = Engine(bank, slots=6, context=128).generate(requests)
        shorter = sum(len(answer.ids) for answer in expected) < sum(len(answer.ids) for answer in plain)
        assert shorter == (samplings is not SAMPLINGS)
        ours, counts = counted(Engine(bank, slots=6, context=128, lookup=4), requests)
        same(ours, expected)
        assert max(counts) == min(5, every)


def test_in_bfloat16_only_nearly_equal_tokens_may_change_places():
    """A pass over several tokens may round differently, by some units of the 8 bits that bfloat16 has."""
    bank = PromptBank(tiny_base(dtype="bfloat16"))
    requests = [
        dataclasses.replace(request, alternatives=10, sampling=dataclasses.replace(request.sampling, max_new_tokens=25))
        for request in requests_of()[:2]
    ]
    plain = Engine(bank, slots=2, context=64).generate(requests)
    ours, counts = counted(Engine(bank, slots=2, context=64, lookup=4), requests)
    assert max(counts) > 1
    for own, other in zip(ours, plain, strict=True):
        pairs = list(zip(own.ids, other.ids, strict=False))
        equal = next((step for step, (left, right) in enumerate(pairs) if left != right), len(pairs))
        np.testing.assert_allclose(own.log_probabilities[:equal], other.log_probabilities[:equal], atol=0.05)
        if equal < len(pairs):
            both = own.alternatives[equal], other.alternatives[equal]
            assert all(abs(found[own.ids[equal]] - found[other.ids[equal]]) < 0.05 for found in both)
        else:
            assert own.ids == other.ids


def test_a_sliding_window_forgets_no_entry_to_a_rejected_draft():
    bank = PromptBank(tiny_base("mistral", sliding_window=8))
    requests = requests_of()
    ours, counts = counted(Engine(bank, slots=6, context=128, lookup=4), requests)
    same(ours, Engine(bank, slots=6, context=128).generate(requests))
    assert 1 in counts


def test_a_draft_continues_the_latest_longest_occurrence():
    assert draft([7, 1, 2, 3, 4, 9, 1, 2, 3], 2).tolist() == [4, 9]
    assert draft([1, 2, 5, 0, 1, 2, 6, 0, 8, 1, 2], 3).tolist() == [6, 0, 8]
    assert draft([5, 6, 5, 6, 5, 6], 5).tolist() == [5, 6, 5, 6, 5]
    assert draft([4, 4, 4, 4], 3).tolist() == [4, 4, 4]
    for nothing in ([], [1], [1, 2, 3, 4], [3, 1, 3]):
        assert draft(nothing, 3).tolist() == []


def test_bases_and_numbers_that_are_refused(bank: PromptBank):
    for number in (-1, 33):
        with pytest.raises(ConfigError, match=f"lookup is {number}; it must be between 0 and 32"):
            Engine(bank, slots=1, lookup=number)
    with pytest.raises(ConfigError, match="tiny-qwen3_5_text has recurrent layers"):
        Engine(PromptBank(tiny_base("qwen3_5_text")), slots=1, lookup=2)
    with pytest.raises(ConfigError, match="tiny-t5 is not a decoder-only base"):
        Engine(PromptBank(tiny_base("t5")), slots=1, lookup=2)
