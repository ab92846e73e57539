"""Rigged models, of which the next token depends on the last one alone, so that their answers are known."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from spt_jax.inference import generation
from spt_jax.inference.answers import Generated
from spt_jax.inference.generation import SamplingConfig, generate, programs
from spt_jax.prompts import VirtualPrompt
from spt_jax.testing import BOS_ID, tiny_base
from tests.examples import VIRTUAL


@functools.cache
def base_of(family: str = "llama"):
    return tiny_base(family)


def virtual_of(base, scale: float = 1.0) -> VirtualPrompt:
    return VirtualPrompt(scale * jax.random.normal(jax.random.key(1), (VIRTUAL, base.config.width)))


def speaker(says: dict[int, int]):
    """A tiny Llama that answers token i with `says[i]`, for at most 32 tokens, with a probability of almost 1."""
    base = base_of()
    params = jax.tree.map(np.array, base.params)
    params["layers"]["attention"]["output"]["kernel"][:] = 0
    params["layers"]["mlp"]["down"]["kernel"][:] = 0
    params["final_norm"]["scale"][:] = 1
    params["embedding"][:] = params["output"][:] = 0
    for place, (last, following) in enumerate(says.items()):
        params["embedding"][last, place] = 1
        params["output"][place, following] = 10
    placed = jax.tree.map(lambda rigged, own: jax.device_put(rigged, own.sharding), params, base.params)
    return dataclasses.replace(base, model=dataclasses.replace(base.model, params=placed))


LETTERS = "abcdefghijklmnopqrstuvwx"


def letter_ids(letters: str = LETTERS) -> list[int]:
    return base_of().tokenizer.convert_tokens_to_ids(list(letters))


def alphabet(end: int | None = None):
    """Says the alphabet from any letter to x, then `end`; begins again without one."""
    ids = letter_ids()
    return speaker(dict(zip(ids, [*ids[1:], ids[0] if end is None else end], strict=True)))


def spoken(base, letters: str, **sampling) -> list[Generated]:
    """The answers to each letter alone."""
    prompts = [np.asarray([BOS_ID, *letter_ids(letter)]) for letter in letters]
    return generate(base, prompts, virtual_of(base), SamplingConfig(**{"max_new_tokens": 30, **sampling}))


def count_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that receives how many tokens per row there are after each call of the compiled loop."""
    steps = []

    def counting(*key):
        def decode(*args):
            state = programs(*key).decode(*args)
            steps.append(int(state.step))
            return state

        return dataclasses.replace(programs(*key), decode=decode)

    monkeypatch.setattr(generation, "programs", counting)
    return steps
