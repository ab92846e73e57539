"""First tokens: what is timed is the first token of the answer, with what a server keeps kept."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spt_jax.evaluation import first_token
from spt_jax.evaluation.first_token import Request, first_token_seconds
from spt_jax.inference.generation import SamplingConfig, generate
from spt_jax.prompts import VirtualPrompt
from spt_jax.prompts.prefix_tuning import memory_of_rows
from spt_jax.prompts.virtual import VirtualPrefix
from spt_jax.reports.distilled import distillation_table, savings_sentence
from spt_jax.runtime.sharding import MeshConfig, make_mesh
from spt_jax.testing import tiny_base

IDS = np.asarray([1, 7, 30, 12, 5, 44, 9], np.int32)


@functools.cache
def base_of(**axes):
    return tiny_base(mesh=make_mesh(MeshConfig(**axes)))


def requests(base):
    rows = 0.3 * jax.random.normal(jax.random.key(0), (3, base.layout.width))
    tokens = VirtualPrompt(tokens=rows)
    found = memory_of_rows(base.model, base.model.embed(jnp.asarray(IDS[:4])), jnp.asarray(IDS[:4]))
    prefix = VirtualPrompt(prefix=VirtualPrefix(found))
    virtual = np.concatenate([[1], base.layout.vocab_size + np.arange(3), IDS[1:]]).astype(np.int32)
    return {
        "plain": Request(IDS),
        "lead": Request(IDS, None, 3),
        "tokens": Request(virtual, tokens, 4),
        "prefix": Request(IDS[4:], prefix),
    }


@pytest.mark.parametrize("axes", [{}, {"data": 2, "fsdp": 2}], ids=str)
def test_the_token_is_that_of_generation(axes):
    base = base_of(**axes)
    for request in requests(base).values():
        expected = generate(base, [request.ids], request.virtual, SamplingConfig(max_new_tokens=1))[0].ids[0]
        found = np.asarray(first_token._call(base, request)())
        assert (found == expected).all()
    plain, prefix = (np.asarray(first_token._call(base, requests(base)[name])()) for name in ("plain", "prefix"))
    assert (plain == prefix).all(), "the prefix is the memory of the first ids"


@pytest.mark.parametrize(("scale", "rounds"), [(1.0, 5), (1e-4, 51)])
def test_seconds_are_medians_of_each_request(monkeypatch, scale: float, rounds: int):
    """A call takes the next of its durations; the first one, which compiles, is not counted. Short calls have more."""
    now, made = [0.0], {"plain": [90.0], "lead": [80.0]}
    durations = {"plain": itertools.cycle([1.0, 2.0, 3.0]), "lead": itertools.cycle([7.0, 5.0, 6.0])}
    own = requests(base_of())
    names = {id(own[name]): name for name in made}

    def call(base, request):
        name = names[id(request)]
        first = iter(made[name])

        def run():
            duration = next(first, None)
            if duration is None:
                duration = next(durations[name])
                made[name].append(duration)
            now[0] += scale * duration

        return run

    monkeypatch.setattr(first_token, "_call", call)
    monkeypatch.setattr(first_token.time, "perf_counter", lambda: now[0])
    found = first_token_seconds(base_of(), {"a": own["plain"], "b": own["lead"]})
    assert {name: len(values) - 1 for name, values in made.items()} == {"plain": rounds, "lead": rounds}
    assert found == {"a": pytest.approx(2 * scale), "b": pytest.approx(6 * scale)}


FACTS = {"text_tokens": 120, "prompt_tokens": 16, "text_bytes": 9600, "prompt_bytes": 1280}


def test_the_table_and_the_sentence_have_the_differences():
    seconds = {"with_text": 0.04, "soft_prompt": 0.012, "no_prompt": 0.01}
    scores = {
        "soft_prompt": {"agreement": 0.95, "kl_to_text": 0.01},
        "no_prompt": {"agreement": 0.4, "kl_to_text": 2.0},
    }
    table = distillation_table({**FACTS, "first_token_seconds": seconds}, scores)
    assert table is not None and [list(row) for row in table.rows] == [
        ["the text itself", "120", "9,600", "40.0", "1.000", "0.000"],
        ["soft prompt", "16", "1,280", "12.0", "0.950", "0.010"],
        ["no prompt", "0", "0", "10.0", "0.400", "2.000"],
    ]
    sentence = savings_sentence({**FACTS, "first_token_seconds": seconds})
    assert (
        "104 tokens less" in sentence and "8,320 bytes" in sentence and "0.30 of the time, and 1.20 of that" in sentence
    )
    assert distillation_table(None, scores) is None
    older = distillation_table(FACTS, {})  # without what older runs did not measure
    assert older is not None and list(older.rows[1]) == ["soft prompt", "16", "1,280", "-", "-", "-"]
    assert savings_sentence(FACTS).endswith("bytes in float32")
